import json
import os
import re
import signal
import subprocess

import pytest
from sklearn.metrics import roc_auc_score

from helpers.command_server import shared_server
from torchdlrm import Predictor, __version__

# The real command on fewer rows, so that it can be interrupted often.
SMALL = (
    "import torchdlrm.cli.quickstart as verb; verb.NUM_ROWS = 35_000; from torchdlrm.cli.main import main; "
    "__name__ == '__main__' and main()"
)
ARGUMENTS = ("quickstart", "--out", "q", "--json")
SMALL_LIVE = SMALL.replace("verb.NUM_ROWS = 35_000", "verb.NUM_DAYS, verb.DAY_ROWS, verb.HISTORY_DAYS = 3, 4_000, 1")


@pytest.mark.slow
def test_quickstart_comes_close_to_the_attainable_auc_and_beats_logistic_regression(tmp_path):
    """On a fifth of its rows, from which less can be learnt."""
    (tmp_path / "fifth.py").write_text(SMALL.replace("35_000", "200_000"))
    done = shared_server().run([tmp_path / "fifth.py", *ARGUMENTS, "--nproc-per-node", 1], cwd=tmp_path, timeout_s=600)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    truth = json.loads((tmp_path / "q" / "log.tsv.truth.json").read_text())
    assert result["attainable_auc"] == truth["splits"]["held_out"]["auc"]
    assert result["rows"] == 200_000 // 7
    assert (result["auc"] - 0.5) / (result["attainable_auc"] - 0.5) > 0.95
    assert result["auc"] > result["logistic_regression_auc"] + 0.01
    assert "arning" not in done.stderr


def interrupted_when(said, folder, *options):
    """Start the quickstart, press Ctrl-C (which all its processes get) when it says this; what it said in all."""
    process = shared_server().start(
        [folder / "small.py", *ARGUMENTS, *options],
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )
    told = ""
    for line in process.stderr:
        told += line
        if re.search(said, line):
            os.killpg(process.pid, signal.SIGINT)
            break
    output, rest = process.communicate(timeout=120)
    assert process.returncode == 130, told + rest
    assert not output
    assert "Traceback" not in told + rest
    return told + rest


@pytest.mark.slow
def test_quickstart_interrupted_at_every_stage_goes_on_with_the_same_command(tmp_path):
    (tmp_path / "small.py").write_text(SMALL)
    stopped = "stopped; the same command resumes: dlrm quickstart --out q"
    for stage in ("write rows: begins", "count: begins"):
        assert stopped in interrupted_when(stage, tmp_path)
    assert json.loads((tmp_path / "q" / "quickstart.json").read_text()) == {"torchdlrm": __version__, "rows": 35_000}
    told = interrupted_when("train: begins", tmp_path)
    assert re.search(r"interrupted after step \d+ of 59; saved: the same command resumes there", told), told
    told = interrupted_when("4/5 evaluate", tmp_path)
    assert "1/5 synthesize: q/log.tsv is there already" in told
    assert re.search(r"train: (resumes after [1-9]|nothing is left)", told), told
    assert stopped in told
    done = shared_server().run([tmp_path / "small.py", *ARGUMENTS], cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["rows"] == 5_000
    assert "on 5,000 held-out rows" in done.stderr


@pytest.mark.slow
def test_live_quickstart_compares_models_that_predict_days_before_they_learn_them(tmp_path):
    (tmp_path / "small.py").write_text(SMALL_LIVE)
    told = interrupted_when("day 01: AUC", tmp_path, "--live")
    assert "the same command resumes" in told, told
    done = shared_server().run([tmp_path / "small.py", *ARGUMENTS, "--live"], cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["days"] == ["day 01", "day 02"]

    folder = tmp_path / "q"
    truth = json.loads((folder / "logs" / "truth.json").read_text())["splits"]
    assert result["attainable"] == [truth["day_01"]["auc"], truth["day_02"]["auc"]]
    aucs = {name: [score["auc"] for score in scores] for name, scores in result["scores"].items()}
    assert aucs["frozen"] == [judged(folder, "scratch/0001/bundle", day) for day in (1, 2)]
    assert aucs["live"] == [judged(folder, f"live/bundles/{day:04d}", day) for day in (1, 2)]
    assert aucs["scratch"][0] == aucs["frozen"][0], "there was nothing else to learn before the first day"
    assert len({*aucs["scratch"], aucs["frozen"][1], aucs["live"][1]}) == 4, "each has learnt otherwise"

    page = (folder / "story.html").read_text()
    assert page.count("<polyline") == 4
    assert "<script" not in page
    assert f"{aucs['live'][1]:.4f}, day 02" in page


def judged(folder, bundle, day):
    """The AUC of a bundle on a day's log, by scikit-learn."""
    rows = [line.split("\t") for line in (folder / "logs" / f"day_{day:02d}.tsv").read_text().splitlines()]
    predictor = Predictor.open(folder / bundle)
    names = [column.name for column in predictor.schema.columns]
    frame = {name: [row[i] or None for row in rows] for i, name in enumerate(names) if i}
    return pytest.approx(roc_auc_score([int(row[0]) for row in rows], predictor.predict(frame)), abs=1e-6)
