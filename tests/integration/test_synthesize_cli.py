"""`dlrm synthesize` as people run it."""

import json

import pytest

from torchdlrm.data.synthetic import truth_path


def test_command_prints_one_json_object_and_writes_log_and_truth(dlrm, tmp_path):
    out = tmp_path / "log.tsv"
    done = dlrm("synthesize", "--rows", 1_000, "--out", out, "--preset", "criteo-1tb", "--seed", 5, "--json")
    assert done.returncode == 0, done.stderr
    shown = json.loads(done.stdout)
    stored = json.loads(truth_path(out).read_text())
    assert shown == {"log": str(out), "truth": str(truth_path(out)), **stored}
    assert len(out.read_text().splitlines()) == 1_000
    assert f"{shown['auc']:.4f}" in done.stderr


def test_command_replaces_a_file_only_when_told(dlrm, tmp_path):
    out = tmp_path / "log.tsv"
    out.write_text("mine")
    refused = dlrm("synthesize", "--rows", 10, "--out", out)
    assert refused.returncode == 2
    assert str(out) in refused.stderr
    assert "--force" in refused.stderr
    assert refused.stdout == ""
    assert out.read_text() == "mine"
    assert dlrm("synthesize", "--rows", 10, "--out", out, "--force").returncode == 0
    assert len(out.read_text().splitlines()) == 10


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--rows", "0"], ["rows", "0", "at least 1"]),
        (["--out", "nowhere/log.tsv"], ["nowhere/log.tsv", "folder that exists"]),
        (["--out", "."], ["--out", "is a folder"]),
        (["--preset", "avazu"], ["avazu"]),
        (["--companions", "pareto"], ["--companions", "--multi-hot"]),
        (["--max-embeddings", "10"], ["--max-embeddings", "--multi-hot"]),
    ],
)
def test_command_exits_with_2_and_says_what_is_wrong(dlrm, tmp_path, arguments, words):
    given = arguments if "--out" in arguments else ["--out", "log.tsv", *arguments]
    done = dlrm("synthesize", *given, cwd=tmp_path)
    assert done.returncode == 2
    assert all(word in done.stderr for word in words)
    assert "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []
