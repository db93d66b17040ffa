"""A metric is one record: whatever measures, keeps or shows metrics has a new one without a change of its own."""

import json
import re
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from sklearn.metrics import brier_score_loss

import torchdlrm
from helpers.live_models import CONFIG
from helpers.pages import tables_of
from torchdlrm import LiveModel, advance, train
from torchdlrm.cli.evaluate import evaluate
from torchdlrm.cli.inspect import inspect
from torchdlrm.cli.options import Judging
from torchdlrm.evaluation.report import report_page as run_page
from torchdlrm.live.report import report_page as live_page
from torchdlrm.metrics import METRICS, Metric
from torchdlrm.progress import SilentProgress
from torchdlrm.training.run import Run

# Files and rooms that name a metric: what they are about, which a new metric does not change.
NAMED = {
    "metrics.py": "the list",
    "bundle/check.py": "the record of an export's check",
    "cli/bundles.py": "that record",
    "cli/quickstart.py": "what a synthetic log's truth could reach",
    "cli/logs.py": "the same",
    "data/judgements.py": "the calibration of a validation",
    "doctor/self_test.py": "a number that must be finite",
    "live/gate.py": "what the gate judges by",
    "live/settings.py": "its limits",
    "quickstart/": "the AUC day by day",
    "synthetic/": "what a synthetic log's truth could reach",
    "training/trainer.py": "what the best checkpoint is chosen by",
}


@pytest.fixture
def brier(monkeypatch):
    """The mean squared error of the probabilities."""

    def mean_square(judged):
        probabilities = 1 / (1 + np.exp(-judged.logits.astype(float)))
        return float(np.average((probabilities - judged.labels) ** 2, weights=judged.weights))

    def influence(judged):
        return lambda block: np.full(block.stop - block.start, 0.01 / np.sqrt(judged.labels.size))

    places = ("log", "bar", "brief", "table")
    record = Metric(
        "brier",
        "Brier",
        "Brier score",
        mean_square,
        places,
        influence=influence,
        largest=1.0,
    )
    monkeypatch.setitem(METRICS, record.name, record)


class Shown(SilentProgress):
    """Keeps what is shown."""

    def __init__(self):
        self.figures, self.lines = {}, []

    def advance(self, amount, **values):  # noqa: ARG002
        self.figures |= values

    def note(self, line):
        self.lines.append(line)


def test_a_run_logs_it_is_judged_by_it_and_shows_it(brier, small_dataset, tmp_path, capsys):
    config = CONFIG.model_copy(update={"logging": CONFIG.logging.model_copy(update={"every_steps": 5})})
    run, shown = tmp_path / "run", Shown()
    history = train(config, small_dataset, run, progress=shown)
    assert 0 < float(shown.figures["Brier"]) < 1
    assert re.search(r"NE 0\.\d+ Brier 0\.\d+", shown.lines[-1])
    assert history.series("train", "brier")
    (last,) = [value for step, value in history.series("val", "brier") if step == history.summary.step]

    evaluate(run, judging=Judging(split="val"), checkpoint="last", as_json=True)
    told = capsys.readouterr()
    assert json.loads(told.out)["brier"] == pytest.approx(last)
    assert "brier" in told.err

    page = run_page(Run.open(run))
    header = next(row for row in tables_of(page) if "chosen as" in row)
    assert header[-1] == "brier"
    assert "<figcaption>Brier score</figcaption>" in page
    assert "val Brier score, last" in page
    inspect(run)
    lines = capsys.readouterr().err.splitlines()
    assert any(re.match(r"val at step .*brier 0\.\d+", line) for line in lines)
    assert any(re.match(r"evaluated val: AUC .*Brier 0\.\d+", line) for line in lines)


def test_a_live_model_keeps_it_with_its_interval(brier, copied, logs, capsys):
    record = advance(copied, logs[3])
    live = LiveModel.open(copied)
    scores = pl.read_parquet(live.day(4) / "scores.parquet")
    value = record.progressive.all["brier"]
    assert value == pytest.approx(brier_score_loss(scores["label"], scores["prediction"]), abs=1e-6)
    assert record.progressive.all["brier_high"] - value == pytest.approx(0.0196, abs=1e-4)
    assert json.loads((live.day(4) / "period.json").read_text())["gate"]["new"]["brier"] == record.gate.new["brier"]
    page = live_page("Live model", live.periods, {}, 4)
    table = [row for row in tables_of(page) if len(row) > 15]
    assert dict(zip(table[0], table[1], strict=True))["Brier"] == f"{value:.4f}"
    assert table[-1][table[0].index("Brier")] == "-"  # an earlier period, which did not know of it
    assert "<figcaption>Brier score</figcaption>" in page
    inspect(copied, as_json=True)
    found = json.loads(capsys.readouterr().out)["periods"]
    assert (found[0]["brier"], found[3]["brier_low"]) == (None, record.progressive.all["brier_low"])
    inspect(copied)
    assert f"{value:.5f}" in capsys.readouterr().err


def test_no_other_file_lists_the_metrics():
    root, names = Path(torchdlrm.__file__).parent, "|".join(METRICS)
    for path in root.rglob("*.py"):
        code = re.sub(r'""".*?"""', "", path.read_text(), flags=re.DOTALL)
        if re.search(rf"""["']({names})["']|\.({names})\b(?!\()""", code):
            assert str(path.relative_to(root)).startswith(tuple(NAMED))
