import json

import pytest


@pytest.mark.slow
def test_quickstart_comes_close_to_the_attainable_auc_and_beats_logistic_regression(dlrm, tmp_path):
    done = dlrm("quickstart", "--json", cwd=tmp_path, timeout_s=600)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    truth = json.loads((tmp_path / "quickstart" / "log.tsv.truth.json").read_text())
    assert result["attainable_auc"] == truth["splits"]["held_out"]["auc"]
    assert result["rows"] == 1_000_000 // 7
    assert (result["auc"] - 0.5) / (result["attainable_auc"] - 0.5) > 0.95
    assert result["auc"] > result["logistic_regression_auc"] + 0.01
    assert "arning" not in done.stderr


def test_quickstart_refuses_a_folder_that_holds_something(dlrm, tmp_path):
    (tmp_path / "quickstart").mkdir()
    (tmp_path / "quickstart" / "mine.txt").write_text("x")
    done = dlrm("quickstart", cwd=tmp_path)
    assert done.returncode == 2
    assert "--out: quickstart is not an empty folder; remove it" in done.stderr
