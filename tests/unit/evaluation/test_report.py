"""The page of a run says what the run's files say, whatever part of them is there yet."""

import json
import re

import pytest

from helpers.pages import tables_of
from torchdlrm.config import load_config
from torchdlrm.evaluation.report import report_page, split_chart
from torchdlrm.html import bars, short, ticks
from torchdlrm.training.run import Run


@pytest.fixture
def run(small_dataset, tmp_path):
    run = Run(tmp_path / "<b>run", load_config(None, {"train.batch-size-global": "77", "seed": "5"})).start(
        small_dataset, world_size=2
    )
    yield run
    run.close()


def write_metrics(run, lines, cut=""):
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (run.path / "metrics.jsonl").write_text(text + cut)


def line(split, step, **figures):
    return {
        "split": split,
        "step": step,
        "rows": 100 * step,
        "loss": 0.5,
        "auc": 0.7,
        "ne": 0.9,
        "time": 0.0,
        **figures,
    }


def test_the_page_tells_what_is_in_the_runs_files(run, small_dataset):
    train = [line("train", step, rows_per_s=1_000 + step) for step in (1, 2, 3)]
    write_metrics(run, [*train, line("val", 2, auc=0.71234), line("val", 3, auc=0.65)], cut='{"step": 4, "sp')
    run.write_evaluation(
        "test", {"split": "test", "step": 3, "checkpoint": "best", "rows": 357, "auc": 0.7654321, "logloss": 0.4}
    )
    page = report_page(run)
    rows = tables_of(page)
    assert ["train.batch_size_global", "77", "2048"] in rows
    assert {row[0] for row in rows if row[0].count(".") or row[0] == "seed"} == {"train.batch_size_global", "seed"}
    assert ["test", "3", "best", "357", "0.76543", "0.40000", "-", "-", "-"] in rows
    for split, record in small_dataset.manifest.splits.items():
        assert [split, f"{record.rows:,}", f"{record.clicks / record.rows:.4f}"] in rows
    assert ["world_size", "2"] in rows
    assert "<b>0.7123 at step 2</b><span>val AUC, best</span>" in page
    assert "<b>0.6500</b><span>val AUC, last</span>" in page
    assert "<b>1,002</b><span>rows/s, median</span>" in page
    assert page.count("<svg") == 4
    assert "val: 0.71234 at 200 rows" in page


def test_the_page_needs_nothing_but_itself(run):
    write_metrics(run, [line("train", 1)])
    page = report_page(run)
    assert re.findall(r"<script|<link|\b(?:src|href)=|url\(|@import", page) == []
    assert "<b>run" not in page  # the folder's name is text
    assert "&lt;b&gt;run" in page


def test_a_run_that_has_just_begun_has_a_page(run):
    page = report_page(run)
    tables_of(page)
    assert "Nothing has been logged yet." in page
    assert "<svg" not in page


def test_the_dataset_may_be_gone(run, tmp_path):
    environment = run.environment
    environment["dataset"]["path"] = str(tmp_path / "moved")
    (run.path / "environment.json").write_text(json.dumps(environment))
    assert environment["dataset"]["manifest_sha256"] in report_page(run)


def test_a_short_last_interval_is_not_drawn_as_a_spike(run):
    write_metrics(run, [*(line("train", step) for step in (1, 2, 3)), line("train", 3.1, loss=9.75)])
    assert "9.75" not in report_page(run)


def test_a_curve_keeps_its_first_and_last_point_and_stays_small():
    points = [(float(i), 0.1 * i) for i in range(100_001)]
    chart = split_chart("loss", {"train": points}).svg
    assert len(chart) < 30_000
    path = re.search(r'points="([^"]+)"', chart)[1].split()
    assert path[0].startswith("70.0,")
    assert path[-1].startswith("510.0,")


@pytest.mark.parametrize(("low", "high"), [(0, 1), (0.61, 0.78), (3, 3), (0, 45_840_617), (-2, 5), (0, 0)])
def test_ticks_are_few_round_and_hold_the_values(low, high):
    got = ticks(low, high)
    assert 2 <= len(got) <= 7
    assert got[0] <= low <= high <= got[-1]
    assert all(len(short(value)) <= 6 for value in got)


def test_bars_of_a_column_are_on_one_scale():
    def ends(cell, tag):
        found = re.search(rf'<{tag} style="left:([\d.]+)%;width:([\d.]+)%">', cell)
        return found and [float(found[1]), float(found[1]) + float(found[2])]

    first, second, third = bars([2.0, -1.0, None], [(1.0, 3.0), None, None])
    assert [ends(first, "i"), ends(first, "u"), ends(second, "i")] == [[25, 75], [50, 100], [0, 25]]
    assert [ends(third, tag) for tag in "su"] == [[25, 25], None]
