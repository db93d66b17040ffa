"""`dlrm synthesize` as people run it."""

import json
from pathlib import Path

from torchdlrm.synthetic.log import truth_path


def test_command_prints_one_json_object_and_writes_log_and_truth(dlrm, tmp_path):
    out = tmp_path / "log.tsv"
    done = dlrm("synthesize", "--rows", 1_000, "--out", out, "--preset", "criteo-1tb", "--seed", 5, "--json")
    assert done.returncode == 0, done.stderr
    shown = json.loads(done.stdout)
    stored = json.loads(truth_path(out).read_text())
    assert shown == {"log": str(out), "truth": str(truth_path(out)), **stored}
    assert len(out.read_text().splitlines()) == 1_000
    assert f"{shown['auc']:.4f}" in done.stderr


def test_command_replaces_a_file_with_force(dlrm, tmp_path):
    out = tmp_path / "log.tsv"
    out.write_text("mine")
    assert dlrm("synthesize", "--rows", 10, "--out", out, "--force").returncode == 0
    assert len(out.read_text().splitlines()) == 10


def test_command_writes_the_days_of_a_log_and_lists_them(dlrm, tmp_path):
    command = ["synthesize", "--rows", 500, "--out", tmp_path / "log", "--drift.effects", 0.2, "--label-delay", 0.1]
    done = dlrm(*command, "--days", 2, "--json")
    assert done.returncode == 0, done.stderr
    shown = json.loads(done.stdout)
    assert [day["day"] for day in shown["days"]] == [0, 1]
    assert f"next: dlrm advance live {shown['days'][0]['log']} --config" in done.stderr
    for day in shown["days"]:
        truth = json.loads(Path(day["truth"]).read_text())
        assert truth["drift"] == {"values": 0.02, "popularity": 0.1, "effects": 0.2}
        assert (day["auc"], day["rows"]) == (truth["auc"], 500)
        assert Path(day["log"]).read_bytes().count(b"\n") == 500
        assert Path(day["late"]).read_bytes().count(b"\n") == truth["late_clicks"]
    assert json.loads(Path(shown["truth"]).read_text()) == {k: v for k, v in shown.items() if k not in _OF_COMMAND}
    refused = dlrm("synthesize", "--rows", 500, "--out", tmp_path / "log", "--days", 2)
    assert refused.returncode == 2
    assert "--force" in refused.stderr
    assert dlrm("synthesize", "--rows", 500, "--out", tmp_path / "log", "--days", 2, "--force").returncode == 0
    assert not list((tmp_path / "log").glob("late_*"))


_OF_COMMAND = {"log", "truth", "days"}
