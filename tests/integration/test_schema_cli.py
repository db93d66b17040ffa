"""`dlrm schema`: its proposals are taken by `dlrm preprocess` and `dlrm train` as they are."""

import gzip
import json
import random

import pytest

from helpers.raw_logs import movielens_like, write

CONFIG = "criteo-small"


@pytest.mark.slow
def test_a_proposal_is_preprocessed_and_trained_on_as_it_is(dlrm, tmp_path, seed):
    write(tmp_path / "log.csv", movielens_like(2_000, random.Random(seed)))
    for command in (
        ["schema", "log.csv", "--out", "proposed.toml"],
        ["preprocess", "log.csv", "--schema", "proposed.toml", "--out", "dataset"],
        ["train", CONFIG, "--dataset", "dataset", "--run", "run", "--logging.tensorboard", "false"],
    ):
        done = dlrm(*command, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
    assert (tmp_path / "run" / "metrics.jsonl").read_text()


def test_json_is_one_object_and_people_are_told_on_standard_error(dlrm, small_log, tmp_path):
    (tmp_path / "log.gz").write_bytes(gzip.compress(small_log.read_bytes()))
    done = dlrm("schema", tmp_path / "log.gz", "--json", "--rows", "1000")
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert (told["preset"], told["out"], len(told["schema"]["columns"])) == ("criteo", None, 40)
    assert told["read"].startswith("1,000 rows from")
    assert f"look: {told['warnings'][0]}" in done.stderr
    assert dlrm("schema", tmp_path / "log.gz", "--rows", "1000").stdout == told["text"]
    done = dlrm("schema", tmp_path / "log.gz", "--rows", "0")
    assert (done.returncode, "--rows: must be at least 1, got 0" in done.stderr) == (2, True)
