"""`dlrm inspect` on a run: how far it is, and whether its checkpoints are whole."""

import json
import shutil


def test_a_run_and_a_damaged_checkpoint_of_it(small_run, dlrm, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(small_run, run)
    content = json.loads(dlrm("inspect", run, "--json").stdout)
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert content["kind"] == "run"
    assert content["last_metrics"]["train"] == [line for line in lines if line["split"] == "train"][-1]
    steps = sorted(int(folder.name[5:]) for folder in (run / "checkpoints").glob("step-*"))
    assert list(map(int, content["checkpoints"])) == steps
    assert all(about["damage"] is None for about in content["checkpoints"].values())

    damaged = next((run / "checkpoints" / f"step-{steps[-1]:08d}").glob("*.distcp"))
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"?")
    shown = dlrm("inspect", run)
    assert shown.returncode == 0, shown.stderr
    assert f"step {steps[-1]:,}" in shown.stderr
    assert "damaged" in shown.stderr

    (run / "checkpoints" / f"step-{steps[-1]:08d}" / "checkpoint.json").write_text("{")
    about = json.loads(dlrm("inspect", run, "--json").stdout)["checkpoints"][str(steps[-1])]
    assert "damaged" in about["damage"]
