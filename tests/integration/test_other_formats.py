"""`dlrm import-weights` and `dlrm export --format`, as they are typed."""

import json

import pytest
import torch


def test_weights_leave_and_come_back_by_commands(dlrm, small_run, small_dataset, tmp_path):
    done = dlrm("export", small_run, "--format", "dlrm", "--out", "weights.pt", "--json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == {"out": "weights.pt", "format": "dlrm"}
    command = ("import-weights", "weights.pt", "--dataset", small_dataset.path, "--run", "run", "--json")
    done = dlrm(*command, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["model"]["interaction"] == "dot"
    assert "next: dlrm evaluate run" in done.stderr
    again = dlrm(*command, cwd=tmp_path)
    assert (again.returncode, again.stdout) == (2, "")
    assert again.stderr == "error: --run: run has weights already; give another folder, or --overwrite\n"
    evaluated = [
        json.loads(dlrm("evaluate", run, "--json", "--checkpoint", "last", cwd=tmp_path).stdout)
        for run in ("run", small_run)
    ]
    assert evaluated[0]["auc"] == pytest.approx(evaluated[1]["auc"], abs=1e-6)


def test_a_graph_is_written_by_a_command(dlrm, small_bundle, tmp_path):
    for name, form in (("model.onnx", "onnx"), ("clicks", "triton")):
        done = dlrm("export", small_bundle, "--format", form, "--out", name, cwd=tmp_path)
        assert (done.returncode, done.stdout) == (0, ""), done.stderr
    assert {path.name for path in (tmp_path / "clicks").iterdir()} == {"config.pbtxt", "1"}


def test_a_file_that_runs_code_is_refused_and_runs_none(dlrm, small_dataset, tmp_path):
    class Hostile:
        def __reduce__(self):
            return open, (str(tmp_path / "was-run"), "w")

    torch.save({"emb_l.0.weight": Hostile()}, tmp_path / "weights.pt")
    done = dlrm("import-weights", "weights.pt", "--dataset", small_dataset.path, "--run", "run", cwd=tmp_path)
    assert done.returncode == 2
    assert "weights.pt: more than tensors, or damaged" in done.stderr
    assert not (tmp_path / "was-run").exists()
    assert not (tmp_path / "run").exists()
