"""What people mistype, misplace and misunderstand, verb by verb: never a traceback, and the exit code says whose fault.

Each command line runs in this process, on a folder with a log, a dataset, a run, a bundle and files that are none of
these. What most messages say is tested where they are made; here, that there is one.
"""

import datetime
import json
import math
import os
import random
import re
import shutil
import subprocess
import sys

import polars as pl
import pytest
from rich.console import Console

import torchdlrm.cli.main
from torchdlrm.cli.main import main

pytestmark = pytest.mark.slow

# One a line, run in a folder as `odd_things` makes it, and words of some messages. All are refused: exit code 2. So are
# those of WRONG_FOLDERS, and of `unit/cli/test_command_line.py`.
REFUSED = """
preprocess
preprocess log.tsv
preprocess --out d
preprocess no-such-file.tsv --out d -> no-such-file.tsv: there is no such file
preprocess dataset --out d
preprocess empty.tsv --out d
preprocess binary.bin --out d
preprocess cut.gz --out d
preprocess named-gz.gz --out d
preprocess archive.zip --out d
preprocess utf16.tsv --out d
preprocess comma.csv --out d
preprocess log.tsv --out dataset -> dataset: exists
preprocess log.tsv --out log.tsv
preprocess log.tsv --out log.tsv/d
preprocess log.tsv --out d --schema no-such-schema.toml -> --schema ... 'no-such-schema.toml' ... criteo
preprocess log.tsv --out d --schema criteoo
preprocess log.tsv --out d --schema log.tsv
preprocess log.tsv --out d --schema broken.toml
preprocess log.tsv --out d --schema target-role.toml
preprocess log.tsv --out d --schema two-times.toml
preprocess log.tsv --out d --schema no-label.toml
preprocess log.tsv --out d --split random --val 0.9 --test 0.9 -> 0.9 + 0.9 is not below 1
preprocess log.tsv --out d --split weekly
preprocess log.tsv --out d --split time -> a split by time needs one
preprocess log.tsv --out d --val -1
preprocess log.tsv --out d --val nan
preprocess log.tsv --out d --val 0.2 -> make --split order, random or time
preprocess log.tsv --out d --max-bad-rows -1
preprocess log.tsv --out d --memory 1MB -> --memory: 1 MB is too little
preprocess log.tsv --out d --workers 0 -> --workers: must be at least 1, got 0
preprocess log.tsv --out d --cluster nowhere
preprocess log.tsv --out d --vocabulary nowhere -> nowhere: is not a folder
preprocess log.tsv --out d --vocabulary bundle
preprocess log.tsv --out d --extend-vocabulary -> --extend-vocabulary: needs --vocabulary
preprocess duration.parquet --out d --schema duration.toml
preprocess nan.parquet --out d
preprocess log.tsv nan.parquet --out d
schema
schema no-such-file.csv
schema dataset
schema empty.tsv
schema binary.bin
schema archive.zip
schema utf16.tsv
schema comma.csv --out log.tsv
schema comma.csv --out nowhere/s.toml
inspect
inspect log.tsv -> log.tsv: is not a folder
inspect . -> dataset.json
train criteo-small --dataset dataset
train criteo-small --dataset dataset --run log.tsv
train criteo-small --dataset dataset --run run --seed 99
train criteo-small --dataset dataset --run r --lr 0.1
train criteo-small --dataset dataset --run r --train.epochs two --model.embedding-dim 15
train criteo-small --dataset dataset --run r --model.embedding-dim 0
train criteo-small --dataset dataset --run r --table-optimizer.learning-rate nan
train criteo-small --dataset dataset --run r --table-optimizer.name adamm
train criteo-small --dataset dataset --run r --nproc-per-node 0
train criteo-small --dataset dataset --run r --stop.patience-validations 2
train criteo-small --dataset dataset --run r --plan log.tsv
train criteo-small --dataset dataset --run r --plan nowhere.json
train criteo-small --dataset dataset --run r --device cuda
train criteo-small --dataset dataset --run r --train.device cuda
train criteo-small --dataset dataset --run r --train.device tpu
train criteo-small --dataset dataset --run r --nnodes 2
train log.tsv --dataset dataset --run r
sweep criteo-small --dataset dataset --out s
sweep --space log.tsv --dataset dataset --out s -> CONFIG is missing
sweep criteo-small --space log.tsv --dataset dataset --out s -> --space: log.tsv cannot be read
sweep criteo-small --space nowhere.toml --dataset dataset --out s -> nowhere.toml cannot be read: No such file
sweep criteo-small --space broken.toml --dataset run --out s -> run: is a run, not a dataset
evaluate
evaluate run --split tset
evaluate run --split ""
evaluate run --checkpoint 12345
evaluate run --device cuda
evaluate run --dataset nowhere
report
report run --out nowhere/r.html
report run --out dataset
export
export run
export run --out bundle
export run --out log.tsv
export run --out b --checkpoint 12345
export run --out b --dataset nowhere
export run --out b --name a/b
export run --out b --check-rows -1
export run --out b --format onnx -> is a run, not a bundle; `dlrm export
export bundle --out b --format torchrec -> is a bundle, not a run
export bundle --out b --format onnx --precision int8 -> --format onnx: reads --out, --checkpoint and --dataset
export run --out b --format onx -> must be one of bundle, torchrec, dlrm, onnx, triton, not 'onx'; did you
predict bundle dataset
predict bundle empty.tsv
predict bundle comma.csv
predict bundle archive.zip
predict bundle nan.parquet
predict bundle log.tsv --out log.tsv
predict bundle log.tsv --out dataset
predict bundle log.tsv --out nowhere/p.csv
predict bundle log.tsv --out p.xlsx
predict bundle log.tsv --out LONG.csv
predict bundle log.tsv --out p.csv --columns label,label
predict bundle log.tsv --out p.csv --columns click
predict bundle log.tsv --out p.csv --bad-rows maybe
predict bundle log.tsv --out p.csv --num-threads 0
predict bundle log.tsv --out p.csv --format xml
predict damaged log.tsv --out p.csv
inspect damaged
verify bundle
verify bundle log.tsv --dataset dataset --run nowhere
verify bundle log.tsv --dataset dataset --run run --url http://localhost:1
verify bundle log.tsv --dataset dataset --run run --url gopher://x
serve
serve damaged
serve bundle --port 99999
serve bundle --workers 0
serve bundle --api-key-file nowhere
serve bundle --api-key-file empty.tsv
serve bundle --api-key-file binary.bin
serve bundle --log-predictions log.tsv
serve bundle --name a/b -> a/b ... slash
serve bundle --deadline-ms 0
serve bundle --max-batch-rows 0
serve bundle --max-body-bytes -1
serve bundle --host nowhere.invalid
plan -> give one of --dataset, --run and --tables
plan --tables no-such-preset -> there is no preset and no file 'no-such-preset'
plan --dataset dataset --train.device cuda
plan --tables criteo-1tb-40m --device toaster -> unknown device 'toaster'; known are a100-40gb,
plan --tables criteo-1tb-40m --devices 8 --hosts 3
plan --tables criteo-1tb-40m --hbm big -> --hbm: must be a size above zero
plan --tables criteo-1tb-40m --sweep devices
plan --tables criteo-1tb-40m --sweep colour=red
plan --tables criteo-1tb-40m --constraint cat_3
plan --tables criteo-1tb-40m --constraint cat_99=row_wise
plan --tables criteo-1tb-40m --optimizer best
plan --compare nowhere.json log.tsv
plan --compare log.tsv
synthesize
synthesize --rows 10
synthesize --rows 0 --out s.tsv
synthesize --rows 10 --out log.tsv -> log.tsv ... --force
synthesize --rows 10 --out s.tsv --preset criteo-2tb
synthesize --out nowhere/s.tsv -> nowhere/s.tsv ... folder that exists
synthesize --out . -> --out ... is a folder
synthesize --out s.tsv --companions pareto -> --companions ... --multi-hot
synthesize --out s.tsv --days 2 -> s.tsv ... --days ... name a folder
synthesize --out s.tsv --max-embeddings 10 -> --max-embeddings ... --multi-hot
import dataset --out i --format npy
import nowhere --out i --format parquet
import log.tsv --out i --format parquet
import dataset --out i --format csv
quickstart --out dataset -> --out: dataset is not an empty folder, nor that of an interrupted quickstart; remove it
quickstart --out older -> --out: older holds a quickstart with other settings (quickstart.json:
quickstart --out marked -> --out: marked holds a quickstart with other settings (quickstart.json:
quickstart --rows -1 --out q
bench step --batch-size 0
bench step --train.device cuda
doctor now
bench loader nowhere
bench predict --rounds 0
--verbose
"""


@pytest.fixture(scope="module")
def odd_things(small_log, small_dataset, small_run, small_bundle, tmp_path_factory):
    """A folder with all that the command lines above name."""
    folder = tmp_path_factory.mktemp("odd")
    shutil.copy(small_log, folder / "log.tsv")
    for name, source in (("dataset", small_dataset.path), ("run", small_run), ("bundle", small_bundle)):
        shutil.copytree(source, folder / name)
    shutil.copytree(small_bundle, folder / "damaged")
    weights = folder / "damaged" / "weights.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    (folder / "empty.tsv").write_bytes(b"")
    (folder / "binary.bin").write_bytes(random.Random(0).randbytes(3_000))
    (folder / "cut.gz").write_bytes(bytes.fromhex("1f8b080000000000000a") + b"\x00" * 5)
    (folder / "named-gz.gz").write_text("1\t2\n")
    (folder / "archive.zip").write_bytes(b"PK\x03\x04" + bytes(200))
    (folder / "utf16.tsv").write_text("1\t2\t3\n" * 30, encoding="utf-16")
    rows = [f"{row % 2},{row}.5,x{row % 7}" for row in range(300)]
    (folder / "comma.csv").write_text("\n".join(["click,price,shop", *rows]) + "\n")
    for name, mark in (("older", '{"torchdlrm": "0.0.1", "rows": 1000000}'), ("marked", "x")):
        (folder / name).mkdir()
        (folder / name / "quickstart.json").write_text(mark)
    (folder / "broken.toml").write_text('name = "unfinished\n')
    for name, columns in (
        ("target-role", '{ role = "target", name = "click" }, { role = "sparse", name = "c", kind = "string" }'),
        ("no-label", '{ role = "sparse", name = "c", kind = "string" }'),
        ("two-times", '{ role = "label", name = "y" }, { role = "time", name = "a" }, { role = "time", name = "b" }'),
    ):
        (folder / f"{name}.toml").write_text(f'name = "x"\ncolumns = [{columns}]\n')
    seconds = [datetime.timedelta(seconds=row) for row in range(100)]
    pl.DataFrame({"click": [0, 1] * 50, "d": seconds}).write_parquet(folder / "duration.parquet")
    (folder / "duration.toml").write_text(
        'name = "x"\ncolumns = [{ role = "label", name = "click" }, { role = "sparse", name = "d", kind = "string" }]\n'
    )
    pl.DataFrame({"click": [0, 1] * 50, "p": [1.5, math.nan] * 50}).write_parquet(folder / "nan.parquet")
    return folder


def _files(folder):
    return {path.relative_to(folder): path.lstat().st_size for path in folder.rglob("*")}


@pytest.mark.parametrize("line", REFUSED.strip().splitlines())
def test_a_misuse_is_refused_in_words_and_leaves_nothing(line, odd_things, monkeypatch, capfd):
    monkeypatch.chdir(odd_things)
    monkeypatch.setattr(torchdlrm.cli.main, "console", Console(stderr=True, highlight=False, width=200))
    monkeypatch.setattr("signal.signal", lambda *_: None)
    monkeypatch.setattr("signal.pthread_sigmask", lambda *_: set())  # what this process blocks, later ones would too
    line, _, words = line.partition(" -> ")
    arguments = [argument.replace("LONG", "x" * 300).strip('"') for argument in line.split()]
    monkeypatch.setattr(sys, "argv", ["dlrm", *arguments])
    before = _files(odd_things)
    with pytest.raises(SystemExit) as end:
        main()
    told = capfd.readouterr()
    assert end.value.code == 2, told.err
    assert told.err.count("error: ") == 1, told.err
    assert len(told.err) < 2_000
    assert "Traceback" not in told.err
    assert told.out == ""
    assert [word for word in words.split(" ... ") if word not in " ".join(told.err.split())] == []
    assert _files(odd_things) == before


def test_an_interrupt_during_an_import_ends_the_command_without_raising_there(tmp_path):
    """Modules of C++ that call Python let no exception through: one ended the process by an abort."""
    (tmp_path / "polars.py").write_text(
        "import os, signal\ntry:\n    os.kill(os.getpid(), signal.SIGINT)\nexcept BaseException:\n    print('raised')\n"
    )
    (tmp_path / "log.tsv").write_text("1\t2\n")
    start = "from torchdlrm.cli.main import main; main()"
    command = [sys.executable, "-c", start, "preprocess", tmp_path / "log.tsv", "--out", tmp_path / "dataset"]
    done = subprocess.run(
        command, env={**os.environ, "PYTHONPATH": str(tmp_path)}, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "interrupted\n")


# Command lines with a folder of another kind, or none -> words of the answer.
WRONG_FOLDERS = {
    "predict run log.tsv": "run: is a run, not a bundle; `dlrm export run --out BUNDLE` makes a bundle of it",
    "predict log.tsv bundle": "log.tsv: the bundle comes first: dlrm predict bundle log.tsv",
    "predict bundel log.tsv": "make one with `dlrm export RUN --out bundel`; did you mean bundle?",
    "predict bundle nowhere.tsv": "nowhere.tsv: there is no such file",
    "serve run": "run: is a run, not a bundle; `dlrm export run --out BUNDLE` makes a bundle of it",
    "serve dataset": "`dlrm train CONFIG --dataset dataset --run RUN` trains on it",
    "evaluate dataset": "dataset: is a dataset, not a run; `dlrm train CONFIG --dataset dataset --run RUN` makes a run",
    "evaluate runs": "make one with `dlrm train CONFIG --dataset DATASET --run runs`; did you mean run?",
    "evaluate run --dataset bundle": "not a dataset; make one with `dlrm preprocess LOG --out DATASET`",
    "export bundle --out b": "bundle: is a bundle, not a run; give the run that it was exported from",
    "export run --out b --delta-to dataset": "dataset: is a dataset, not a bundle",
    "report bundle": "bundle: is a bundle, not a run",
    "verify run --dataset dataset": "run: is a run, not a bundle",
    "verify bundle --dataset run": "not a dataset; give the dataset that it was trained on; `dlrm inspect run`",
    "apply bundle run --out b": "not a delta; make one with `dlrm export RUN --delta-to BUNDLE --out DELTA`",
    "predict bundle log.tsv --bathc-rows 3": "--bathc-rows: there is no such option; dlrm predict --help shows all",
    "verify bundle --dataset dataset --rwos=3": "--rwos=3: there is no such option; dlrm verify --help shows all",
    "inspect nowhere": "nowhere: is not a folder",
    "rollback run 1": "run: is a run, not a live model",
    "train criteo-small --dataset run --run r": "run: is a run, not a dataset",
    "train criteo-small --dataset log.tsv --run r": "make one with `dlrm preprocess log.tsv --out DATASET`",
    "train criteo-small --dataset dataset --run bundle": "bundle: is a bundle, not a run",
    "train criteo-small --dataset dataset --run r --from bundle": "bundle: is a bundle, not a run",
    "train dataset --dataset dataset --run r": "dataset: is a dataset, not a config; name a TOML file",
    "bench loader run": "run: is a run, not a dataset",
    "plan --dataset run": "run: is a run, not a dataset",
    "plan --run dataset": "dataset: is a dataset, not a run",
}
# Says for each of its arguments' command lines what was answered, the exit code, and whether torch was imported.
IN_A_PROCESS_OF_ITS_OWN = """
import io, json, sys
from torchdlrm.cli import main as cli
for line in sys.argv[1:]:
    sys.argv = ["dlrm", *line.split()]
    cli.console.file = io.StringIO()
    code = None
    try:
        cli.main()
    except SystemExit as end:
        code = end.code
    print(json.dumps([cli.console.file.getvalue(), code, "torch" in sys.modules]))
"""


def test_a_folder_of_another_kind_is_named_for_what_it_is_before_torch_is_imported(odd_things):
    command = [sys.executable, "-c", IN_A_PROCESS_OF_ITS_OWN, *WRONG_FOLDERS]
    done = subprocess.run(command, cwd=odd_things, capture_output=True, text=True, check=True, env=os.environ)
    answers = dict(zip(WRONG_FOLDERS, map(json.loads, done.stdout.splitlines()), strict=True))
    assert {line: told for line, (told, *_) in answers.items() if WRONG_FOLDERS[line] not in told} == {}
    assert {line: rest for line, (_, *rest) in answers.items() if rest != [2, False]} == {}
    # No advice would write to a folder or a file that is there.
    there = [path.name for path in odd_things.iterdir()]
    assert [told for told, *_ in answers.values() for name in there if re.search(f"--(out|run) {name}\\b", told)] == []
