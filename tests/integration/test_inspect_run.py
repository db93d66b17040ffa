"""`dlrm inspect` and `dlrm report` on a run: how far it is, whether its checkpoints are whole, and its page."""

import json
import re
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


def test_a_trained_run_becomes_one_page(dlrm, small_run, tmp_path):
    out = tmp_path / "report.html"
    done = dlrm("report", small_run, "--out", out, "--json")
    assert done.returncode == 0, done.stderr
    page = out.read_text()
    assert json.loads(done.stdout) == {"run": str(small_run), "report": str(out), "bytes": len(page.encode())}
    last = [json.loads(line) for line in (small_run / "metrics.jsonl").read_text().splitlines()][-1]
    assert last["split"] == "val"
    assert f"<b>{last['auc']:.4f}</b><span>val AUC, last</span>" in page
    plan = json.loads((small_run / "plan.json").read_text())
    assert set(plan["tables"]) <= set(re.findall(r'<td class="l">([^<]+)</td>', page))
