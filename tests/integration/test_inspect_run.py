"""`dlrm inspect` and `dlrm report` on a run: how far it is, whether its checkpoints are whole, and its page."""

import json
import re
import shutil

import numpy as np
import pytest

from helpers.pages import tables_of
from torchdlrm.cli.evaluate import evaluate
from torchdlrm.cli.options import Judging
from torchdlrm.errors import RunError
from torchdlrm.evaluation.report import report_page
from torchdlrm.training.run import Run


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


def test_what_was_evaluated_is_drawn(small_run, tmp_path, capsys):
    path = shutil.copytree(small_run, tmp_path / "run")
    evaluate(path, judging=Judging(split="val+test"), as_json=True)
    result = json.loads(capsys.readouterr().out)
    assert "pictures" not in result
    assert Run.open(path).evaluations()["val+test"] == result
    drawn = Run.open(path).evaluations("pictures")["val+test"]["curves"]
    x, y = np.transpose(drawn["roc"])
    assert np.trapezoid(y, x) == pytest.approx(result["auc"], abs=0.002)
    page = report_page(Run.open(path))
    for caption in ("ROC", "precision and recall", "predictions by class, val+test"):
        assert f"<figcaption>{caption}</figcaption>" in page
    assert "<figcaption>reliability, val+test: calibration error 0.0" in page
    low, high = result["intervals"]["auc"]
    assert f"{result['auc']:.5f}\n{low:.5f} to {high:.5f}</td>" in page
    (path / "evaluation" / "pictures" / "val+test.json").write_text('{"curves": {"roc": 1}}')
    with pytest.raises(RunError, match=r"run: a file of evaluation/pictures/ is damaged; remove it"):
        report_page(Run.open(path))


def test_runs_beside_each_other_become_one_page(dlrm, small_run, tmp_path):
    path = shutil.copytree(small_run, tmp_path / "other")
    (path / "config.toml").write_text(
        re.sub(r"learning_rate = [\d.]+", "learning_rate = 0.125", (path / "config.toml").read_text())
    )
    done = dlrm("report", small_run, path, "--split", "test", "--json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    page = (tmp_path / "report.html").read_text()
    assert json.loads(done.stdout)["runs"] == [str(small_run), str(path)]
    rows = tables_of(page)
    differences = {row[1]: row[3:6] for row in rows if row[0] == "other" and row[2] == ""}
    assert differences["AUC"] == ["+0.00000"] * 3, "weights are the same"
    assert (
        f"<p><b>no difference in AUC larger than 0.00000 between the model other and the model {small_run.name}" in page
    )
    assert [row[1:] for row in rows if row[0] == "key"] == [[small_run.name, "other"]]
    assert [row[0] for row in rows if row[-1] == "0.125"] == [
        "table_optimizer.learning_rate",
        "dense_optimizer.learning_rate",
    ]


def test_what_is_no_folder_of_ours_is_told(dlrm, small_run, tmp_path):
    shutil.copytree(small_run, tmp_path / "run-1")
    done = dlrm("report", "run-2", cwd=tmp_path)
    assert done.returncode == 2
    assert "run-2: is not a folder; give one of these: " in done.stderr
    assert "did you mean run-1?" in done.stderr
    assert not (tmp_path / "report.html").exists()
