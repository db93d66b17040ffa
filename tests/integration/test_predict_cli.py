"""`dlrm predict` and `dlrm verify`, the real commands."""

import gzip
import json
import os
import re
import shutil
import signal
import subprocess
import threading
import time

import numpy as np
import polars as pl
import pyarrow as pa
import pytest
from pyarrow import orc

from helpers.command_server import DLRM, shared_server
from torchdlrm.cli.predict import predict as predict_verb
from torchdlrm.cli.predict import verify as verify_verb
from torchdlrm.errors import UserError
from torchdlrm.exporting.export import export
from torchdlrm.exporting.options import ExportOptions
from torchdlrm.features.columns import DenseColumn, IgnoredColumn, LabelColumn, SparseColumn
from torchdlrm.features.schema import FeatureSchema, criteo_schema
from torchdlrm.prediction.predictor import Predictor
from torchdlrm.preprocessing.preprocess import PreprocessOptions, preprocess

NAMES = [column.name for column in criteo_schema().columns]
CONFIG = "criteo-small"


@pytest.fixture(scope="module")
def few_rows(small_log):
    """Cells of 60 rows as text, with the label."""
    return pl.read_csv(small_log, separator="\t", has_header=False, new_columns=NAMES, infer_schema=False).head(60)


@pytest.fixture(scope="module")
def expected(small_bundle, few_rows):
    predictor = Predictor.open(small_bundle)
    rows = [{name: cell for name, cell in row.items() if name != "label"} for row in few_rows.iter_rows(named=True)]
    return predictor.predict(predictor.parse_rows(rows))


@pytest.fixture
def predict(small_bundle, tmp_path):
    """dlrm predict small_bundle ARGS --out OUT; gives the scores and the JSON object."""

    def run(*args, out="scores.parquet", stdin=b"", bundle=small_bundle):
        target = tmp_path / out
        command = [DLRM, "predict", bundle, *args, "--out", target, "--json"]
        done = shared_server().run(command, given=stdin, timeout_s=120)
        assert done.returncode == 0, done.stderr
        read = pl.read_parquet if target.suffix == ".parquet" else pl.read_csv
        return read(target), json.loads(done.stdout)

    return run


def test_a_labelled_text_with_columns_handed_on(predict, small_log, few_rows, expected):
    scores, told = predict(small_log, "--columns", "label,cat_3,int_1")
    assert scores.columns == ["label", "cat_3", "int_1", "prediction"]
    assert scores.dtypes == [pl.Int8, pl.String, pl.Int64, pl.Float32]
    head = scores.head(60)
    np.testing.assert_allclose(head["prediction"], expected, rtol=0, atol=1e-6)
    assert head.select("label", "cat_3", "int_1").cast(pl.String).rows() == few_rows["label", "cat_3", "int_1"].rows()
    assert (told["rows"], told["bad_rows"]) == (5000, 0)
    assert told["mean_prediction"] == pytest.approx(scores["prediction"].mean(), abs=1e-6)
    clicked = scores.filter(pl.col("label") == 1)["prediction"].to_numpy()
    others = scores.filter(pl.col("label") == 0)["prediction"].to_numpy()
    pairs = (clicked[:, None] > others).mean() + 0.5 * (clicked[:, None] == others).mean()
    assert told["metrics"]["auc"] == pytest.approx(pairs, abs=1e-6)


def test_standard_input_without_labels_gzipped(predict, few_rows, expected):
    text = few_rows.drop("label").write_csv(separator="\t", include_header=False).encode()
    scores, told = predict("-", stdin=gzip.compress(text), out="scores.csv.gz")
    np.testing.assert_allclose(scores["prediction"], expected, rtol=0, atol=1e-6)
    assert told["metrics"] is None
    assert told["unknown_rate"]["cat_0"] < 0.2


@pytest.mark.parametrize("labelled_rows", [0, 25])
def test_rows_without_a_label_are_scored_and_metrics_are_of_the_others(
    predict, few_rows, expected, tmp_path, labelled_rows
):
    is_labelled = pl.Series(range(60)) < labelled_rows
    rows = few_rows.with_columns(pl.when(is_labelled).then("label"))
    scores, told = predict(
        "-", "--columns", "label", stdin=rows.write_csv(separator="\t", include_header=False).encode()
    )
    np.testing.assert_allclose(scores["prediction"], expected, rtol=0, atol=1e-6)
    assert scores["label"].to_list() == [None if label is None else int(label) for label in rows["label"]]
    rows.with_columns(pl.col("label").cast(pl.Float64)).write_parquet(tmp_path / "rows.parquet")
    by_parquet, told_of_parquet = predict(tmp_path / "rows.parquet", "--columns", "label", out="p.parquet")
    assert by_parquet.equals(scores)
    assert told_of_parquet["metrics"] == told["metrics"]
    if labelled_rows:
        assert told["metrics"]["rows"] == labelled_rows
        labels, found = few_rows["label"].head(labelled_rows).cast(int).to_numpy(), expected[:labelled_rows]
        logloss = -np.log(np.where(labels == 1, found, 1 - found)).mean()
        assert told["metrics"]["logloss"] == pytest.approx(logloss, abs=1e-6)
    else:
        assert told["metrics"] is None


def test_csv_with_header_quotes_and_other_columns(predict, few_rows, expected, tmp_path):
    ids = pl.Series("user id", [f'no "{i}", or so' for i in range(60)])
    rows = few_rows.drop("label").select(reversed(NAMES[1:])).insert_column(3, ids)
    rows.write_csv(tmp_path / "rows.csv", quote_style="always")
    scores, _ = predict(tmp_path / "rows.csv", "--format", "csv", out="scores.csv")
    assert scores.columns == ["user id", "prediction"]
    assert scores["user id"].to_list() == ids.to_list()
    np.testing.assert_allclose(scores["prediction"], expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", ["rows.parquet", "rows.orc", "rows.jsonl", "rows.jsonl.zst"])
def test_columns_of_numbers_found_by_name(predict, few_rows, expected, tmp_path, name):
    typed = few_rows.with_columns(pl.col(f"int_{i}").cast(pl.Int32) for i in range(13)).drop("label")
    if name == "rows.parquet":
        typed.write_parquet(tmp_path / name, row_group_size=7)
    elif name == "rows.orc":
        orc.write_table(typed.to_arrow(compat_level=pl.CompatLevel.oldest()), tmp_path / name)
    else:
        rows = ({key: cell for key, cell in row.items() if cell is not None} for row in typed.rows(named=True))
        text = "".join(json.dumps(row) + "\n" for row in rows).encode()
        (tmp_path / name).write_bytes(pa.compress(text, "zstd", asbytes=True) if name.endswith("zst") else text)
    scores, _ = predict(tmp_path / name)
    np.testing.assert_allclose(scores["prediction"], expected, rtol=0, atol=1e-6)


def test_bad_rows_are_refused_or_have_no_prediction(predict, dlrm, small_bundle, few_rows, expected, tmp_path, capsys):
    lines = few_rows.write_csv(separator="\t", include_header=False).encode().splitlines(keepends=True)
    lines[2] = lines[2].replace(b"\t", b"\tx", 1)
    lines[40] = b"\n"
    path, out = tmp_path / "rows.tsv", tmp_path / "scores.csv"
    path.write_bytes(b"".join(lines))
    done = dlrm("predict", small_bundle, path, "--out", out)
    assert done.returncode == 2
    assert f"{path}, line 3, column int_0: the cell is not an integer" in done.stderr
    assert f"{path}, line 41: the line has the wrong number of columns (an empty line)" in done.stderr
    assert "--bad-rows null" in done.stderr
    assert list(tmp_path.iterdir()) == [path]

    scores, told = predict(path, "--bad-rows", "null", out="scores.csv")
    good = np.delete(np.arange(60), [2, 40])
    # Alone in its line, a null is written as NaN: many readers take an empty line for no row.
    assert np.flatnonzero(scores["prediction"].is_nan()).tolist() == [2, 40]
    np.testing.assert_allclose(scores["prediction"].gather(good), expected[good], rtol=0, atol=1e-6)
    assert told["bad_rows_by_reason"] == {"int": 1, "columns": 1}
    assert told["metrics"]["rows"] == 58
    for out in ("scores.parquet", "more.csv"):
        predict_verb(small_bundle, [path], out=tmp_path / out, bad_rows="null", columns="label")
        scores = pl.read_parquet(tmp_path / out) if out.endswith("parquet") else pl.read_csv(tmp_path / out)
        assert np.flatnonzero(scores["prediction"].is_null()).tolist() == [2, 40]
    assert f"{path}, line 3, column int_0: the cell is not an integer of 64 bits: 'x" in capsys.readouterr().err


def test_scores_on_standard_output_and_what_cannot_be_written(dlrm, small_bundle, small_log, tmp_path):
    done = dlrm("predict", small_bundle, small_log)
    assert done.stdout.splitlines()[0] == "prediction"
    assert len(done.stdout.splitlines()) == 5001
    for options, message in [
        ({"as_json": True}, r"--json: standard output takes either the JSON object or the scores"),
        ({"out": tmp_path / "scores.txt"}, r"scores\.txt must end in \.parquet, \.csv or \.csv\.gz"),
        ({"out": tmp_path / "none" / "scores.csv"}, r"none/scores\.csv cannot be written: No such file"),
        ({"columns": "prediction"}, r"`columns`: prediction is what the scores' own column is called"),
        ({"columns": "user", "out": tmp_path / "a.csv"}, r"has no column user; it has label, int_0"),
        ({"columns": "label, cat_3,label", "out": tmp_path / "a.csv"}, r"`columns`: label is given more than once"),
        ({"out": tmp_path / f"{'x' * 248}.csv"}, r"x\.csv cannot be written: File name too long"),
    ]:
        with pytest.raises(UserError, match=message):
            predict_verb(small_bundle, [small_log], **options)
    assert list(tmp_path.iterdir()) == []
    folder, log = tmp_path / "folder.csv", tmp_path / "log.csv"
    folder.mkdir()
    shutil.copy(small_log, log)
    with pytest.raises(UserError, match=r"folder\.csv is a folder; name a file in it"):
        predict_verb(small_bundle, [small_log], out=folder)
    with pytest.raises(UserError, match=r"log\.csv is the log itself"):
        predict_verb(small_bundle, [log], out=log)
    assert log.read_bytes() == small_log.read_bytes()


def without_progress(told):
    """The lines that do not say how far the job is."""
    return [line for line in told.splitlines() if not re.match(r"\d\d:\d\d:\d\d (verify|predict): ", line)]


# A shell starts the first one from nothing; the others close a stream as it would, in a process that is forked.
CLOSES = """
import os, runpy, sys
sys.argv, stream = sys.argv[1:], sys.argv[1:].index("--closes")
name = sys.argv[stream + 1]
del sys.argv[stream : stream + 2]
os.close(getattr(sys, name).fileno())
setattr(sys, name, None)
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.parametrize(
    ("given", "closes", "code", "message"),
    [
        ("{log}", None, 1, "failed: standard output: No space left on device; free some space and start the"),
        ("{log}", "stdout", 2, "error: --out: standard output is closed; name a file to write to"),
        ("-", "stdin", 2, "error: standard input: is closed; give the log as a file, or pipe it in"),
    ],
)
def test_standard_streams_that_fail_are_one_line(given, closes, code, message, small_bundle, small_log, tmp_path):
    command = [DLRM, "predict", small_bundle, given.format(log=small_log)]
    if closes is None:
        shell = ["bash", "-c", f"{' '.join(map(str, command))} > /dev/full"]
        done = subprocess.run(shell, capture_output=True, text=True, check=False, timeout=120)
    else:
        (tmp_path / "closes.py").write_text(CLOSES)
        done = shared_server().run([tmp_path / "closes.py", *command, "--closes", closes])
    assert done.returncode == code
    (line,) = without_progress(done.stderr)
    assert line.startswith(message)


def test_a_full_disk_is_one_line_and_leaves_nothing(dlrm, small_bundle, small_log, full_disk):
    for name in ("scores.csv", "scores.parquet"):
        done = dlrm("predict", small_bundle, small_log, "--out", full_disk / name)
        assert done.returncode == 1
        (line,) = without_progress(done.stderr)
        assert line.startswith(f"failed: {full_disk / name}: No space left on device; free some space")
        assert list(full_disk.iterdir()) == []


def test_a_log_can_come_through_a_named_pipe(predict, few_rows, expected, tmp_path):
    pipe = tmp_path / "rows"
    os.mkfifo(pipe)
    text = few_rows.write_csv(separator="\t", include_header=False)
    writer = threading.Thread(target=pipe.write_text, args=(text,))
    writer.start()
    scores, _ = predict(pipe)
    writer.join(timeout=60)
    np.testing.assert_allclose(scores["prediction"], expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_an_interrupt_leaves_nothing_behind(number, small_bundle, few_rows, tmp_path):
    out = tmp_path / "scores.csv"
    command = [DLRM, "predict", small_bundle, "-", "--out", out]
    process = shared_server().start(command, stdin=subprocess.PIPE, stderr=subprocess.PIPE)
    text = few_rows.write_csv(separator="\t", include_header=False) * 50
    process.stdin.write(text)  # and it waits for more: the pipe stays open
    process.stdin.flush()
    deadline_s = time.monotonic() + 60
    while not list(tmp_path.iterdir()) and time.monotonic() < deadline_s:
        time.sleep(0.05)
    assert list(tmp_path.iterdir()) != []
    process.send_signal(number)
    assert process.wait(timeout=30) == 130
    process.stdin.close()
    with process.stderr as told:
        assert "interrupted: nothing was written" in told.read()
    assert list(tmp_path.iterdir()) == []


@pytest.fixture(scope="module")
def shop(dlrm, tmp_path_factory):
    """A bundle of a log of one's own: a header, quotes, a column of lists, an id, hashed values."""
    folder = tmp_path_factory.mktemp("shop")
    schema = FeatureSchema(
        name="shop",
        separator=",",
        quote='"',
        header=True,
        columns=(
            IgnoredColumn(name="order"),
            SparseColumn(name="tags", kind="hex", value_separator="|"),
            DenseColumn(name="price", kind="float", transform="standardize"),
            SparseColumn(name="city", kind="string", hash=50),
            LabelColumn(name="bought"),
        ),
    )
    rng = np.random.default_rng(5)
    rows = ["order,tags,price,city,bought"]
    for i in range(2_000):
        tags = "|".join(f"{tag:x}" for tag in rng.integers(0, 40, rng.integers(0, 4)))
        rows.append(f'{i},{tags},{rng.normal():.3f},"city, {rng.integers(0, 9)}",{int(rng.random() < 0.3)}')
    (folder / "log.csv").write_text("\n".join(rows) + "\n")
    dataset = preprocess([folder / "log.csv"], folder / "dataset", schema, PreprocessOptions())
    done = dlrm("train", CONFIG, "--dataset", dataset.path, "--run", folder / "run", "--logging.tensorboard", "false")
    assert done.returncode == 0, done.stderr
    export(folder / "run", folder / "bundle", options=ExportOptions(name="shop"), dataset=dataset)
    return folder


def test_a_log_of_ones_own_with_lists(shop, predict, dlrm):
    scores, told = predict(shop / "log.csv", "--columns", "order,tags", bundle=shop / "bundle")
    log = pl.read_csv(shop / "log.csv", infer_schema=False)
    assert scores["order"].to_list() == log["order"].to_list()
    digits = [
        [f"{int(tag, 16):08x}" for tag in tags.split("|")] if tags else None for tags in log["tags"].fill_null("")
    ]
    assert scores["tags"].to_list() == digits
    assert told["metrics"]["rows"] == 2_000
    as_text, _ = predict(shop / "log.csv", "--columns", "tags", bundle=shop / "bundle", out="scores.csv")
    assert as_text["tags"].to_list() == [None if tags is None else "|".join(tags) for tags in digits]
    np.testing.assert_allclose(as_text["prediction"], scores["prediction"], rtol=0, atol=1e-7)
    # The log is found beside the dataset, the run beside the bundle.
    done = dlrm("verify", shop / "bundle", "--dataset", shop / "dataset", "--json")
    assert done.returncode == 0, done.stderr
    ways = json.loads(done.stdout)["ways"]
    assert [way["name"] for way in ways] == ["checkpoint", "bundle"]
    assert ways[1]["largest_difference"] < 1e-6
    assert ways[0]["metrics"]["auc"] == pytest.approx(told["metrics"]["auc"], abs=1e-4)


def test_verify_asks_a_live_server_of_the_same_bundle(
    dlrm, serve, small_bundle, small_run, small_dataset, small_log, tmp_path, monkeypatch
):
    server = serve(small_bundle, DLRM_API_KEY="secret")
    with pytest.raises(UserError, match="answers 401"):
        verify_verb(small_bundle, small_log, dataset=small_dataset.path, run=small_run, url=server.url)
    monkeypatch.setenv("DLRM_API_KEY", "secret")
    args = ("--dataset", small_dataset.path, "--run", small_run, "--url", server.url, "--rows", 600, "--json")
    done = dlrm("verify", small_bundle, small_log, *args)
    assert done.returncode == 0, done.stderr
    assert "torch/fx" not in done.stderr  # what torch logs for its developers
    told = json.loads(done.stdout)
    assert told["agrees"]
    assert told["rows"] == 600
    assert [way["name"] for way in told["ways"]] == ["checkpoint", "bundle", "server"]
    assert max(way["largest_difference"] for way in told["ways"][1:]) < 1e-6
    assert len({round(way["metrics"]["logloss"], 6) for way in told["ways"]}) == 1

    # Another bundle of the same columns: what answers is not what was asked about.
    other = tmp_path / "other"
    export(small_run, other, options=ExportOptions(name="other", precision="int8"), dataset=small_dataset)
    with pytest.raises(UserError, match=f"serves version {server.version} of 'small', and the bundle is version"):
        verify_verb(other, small_log, dataset=small_dataset.path, run=small_run, url=server.url, max_rows=600)
    # Without the server, the difference of int8 is explained.
    verify_verb(other, small_log, dataset=small_dataset.path, run=small_run, max_rows=600)


def test_verify_fails_where_the_bundle_is_not_of_the_checkpoint(
    dlrm, small_bundle, small_run, small_dataset, small_log, tmp_path
):
    """Another training has put its checkpoint where the bundle's was."""
    other = tmp_path / "run"
    config = small_run / "config.toml"
    options = ["--dataset", small_dataset.path, "--run", other, "--seed", 5]
    assert dlrm("train", config, *options).returncode == 0
    options = ["--dataset", small_dataset.path, "--run", other, "--rows", 500, "--json"]
    done = dlrm("verify", small_bundle, small_log, *options)
    assert done.returncode == 1
    assert not json.loads(done.stdout)["agrees"]
    assert "bundle and checkpoint do not predict the same: a probability differs by" in done.stderr


def test_verify_says_what_it_cannot_find(
    small_bundle, small_run, small_dataset, small_log, shop, tmp_path, monkeypatch
):
    with pytest.raises(UserError, match=r"is not what the run of the bundle .* was trained on"):
        verify_verb(small_bundle, small_log, dataset=shop / "dataset", run=small_run)
    elsewhere, moved = tmp_path / "dataset", tmp_path / "bundle"
    shutil.copytree(small_dataset.path, elsewhere)
    shutil.copytree(small_bundle, moved)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"\(small\.tsv\) is neither next to it nor here"):
        verify_verb(moved, dataset=elsewhere, run=small_run)
    with pytest.raises(UserError, match=r"a run called 'run', and none is at .*; say where it is with `run`"):
        verify_verb(moved, small_log, dataset=elsewhere)
    with pytest.raises(UserError, match="`url`: 'localhost:8080' is no address of a server"):
        verify_verb(moved, small_log, dataset=elsewhere, run=small_run, url="localhost:8080")
