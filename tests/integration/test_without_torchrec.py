"""What the wheel does where only what serves is installed: no TorchRec, nothing that it needs, no TensorBoard."""

import os
import shutil
import subprocess
import sys

import pytest

FOR_TRAINING = ("torchrec", "tensordict", "torchmetrics", "pyre_extensions", "tqdm", "tensorboard")
HIDING = """
import contextlib, io, sys
names = sys.argv[1].split(",")
class Hidden:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in names:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name.partition(".")[0])
sys.meta_path.insert(0, Hidden())
"""
# Each line of standard input is a command; what it says and how it ends follow each other on standard output.
COMMANDS = """
from torchdlrm.cli.main import main
for line in sys.stdin.read().splitlines():
    sys.argv = ["dlrm", *line.split()]
    try:
        main()
    except SystemExit as end:
        print(f"{line}: {end.code}", flush=True)
    else:
        print(f"{line}: 0", flush=True)
"""


def hiding(names, code, cwd, stdin=""):
    command = [sys.executable, "-c", HIDING + code, ",".join(names)]
    environment = {**os.environ, "COLUMNS": "200"}
    return subprocess.run(command, cwd=cwd, input=stdin, env=environment, capture_output=True, text=True, check=False)


@pytest.fixture
def folder(small_log, small_run, small_bundle, tmp_path):
    shutil.copy(small_log, tmp_path / "log.tsv")
    for name, path in {"run": small_run, "bundle": small_bundle}.items():
        (tmp_path / name).symlink_to(path)
    return tmp_path


def test_what_needs_no_torchrec_works_and_the_rest_says_the_line_to_type(folder):
    works = (
        *("schema log.tsv", "preprocess log.tsv --schema criteo --out dataset", "inspect dataset", "inspect run"),
        *("inspect bundle", "config criteo-small", "predict bundle log.tsv --out scores.parquet"),
        *("report run --out report.html", "synthesize --rows 2000 --out other.tsv"),
    )
    refused = ("train criteo-small --dataset dataset --run new", "plan --dataset dataset", "evaluate run")
    done = hiding(FOR_TRAINING, COMMANDS, folder, "\n".join([*works, *refused]))
    ends = [line for line in done.stdout.splitlines() if line.startswith((*works, *refused))]
    assert ends == [f"{line}: 0" for line in works] + [f"{line}: 2" for line in refused], done.stderr
    line = "error: torchrec is not installed: pip install 'torchdlrm[train]' && pip install --no-deps 'torchrec=="
    assert done.stderr.count(line) == len(refused)
    assert "calibration" in done.stderr  # of predictions with labels: an evaluation without the run
    assert not (folder / "new").exists()


def test_without_fbgemm_a_dataset_is_made_and_a_prediction_says_what_is_missing(folder):
    lines = ("preprocess log.tsv --schema criteo --out dataset", "predict bundle log.tsv")
    done = hiding([*FOR_TRAINING, "fbgemm_gpu"], COMMANDS, folder, "\n".join(lines))
    assert [line for line in done.stdout.splitlines() if line.startswith(lines)] == [f"{lines[0]}: 0", f"{lines[1]}: 2"]
    assert "error: fbgemm_gpu is not installed: pip install 'fbgemm-gpu-cpu==" in done.stderr
