"""The synthetic log: its bytes, its columns, and the truth beside it against independent computations."""

import gzip
import hashlib
import json
import math

import numpy as np
import polars as pl
import pytest
from sklearn.metrics import log_loss, roc_auc_score

from helpers.raw_logs import CRITEO_NAMES as NAMES
from helpers.raw_logs import read_criteo as read
from helpers.raw_logs import real_log
from torchdlrm.errors import ConfigError, LogError
from torchdlrm.progress import SilentProgress
from torchdlrm.synthetic import log as synthetic_log
from torchdlrm.synthetic.log import read_truth, truth_path
from torchdlrm.synthetic.model import LOGIT_UNITS, NUM_LOGITS
from torchdlrm.synthetic.rows import BLOCK_ROWS, RowGenerator
from torchdlrm.synthetic.shapes import NUM_CELLS, PRESETS
from torchdlrm.synthetic.synthesize import synthesize
from torchdlrm.synthetic.values import Drift

NUM_ROWS = 70_001  # more than a chunk, and no multiple of anything


def sha256(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("synthetic")


@pytest.fixture(scope="module", params=list(PRESETS))
def made(request, folder):
    path = folder / f"{request.param}.tsv"
    return path, synthesize(path, rows=NUM_ROWS, seed=3, preset=request.param)


@pytest.fixture(scope="module")
def outcomes(made):
    """The labels, and the probabilities of a click as the hidden model gives them."""
    logits = RowGenerator(made[1].preset, 3).rows(0, NUM_ROWS, with_text=False).outcomes // 2
    return read(made[0])["label"].to_numpy(), 1 / (1 + np.exp(-(logits - NUM_LOGITS / 2) / LOGIT_UNITS))


@pytest.fixture(scope="module")
def kaggle(folder):
    path = folder / "kaggle.tsv"
    truth = synthesize(path, rows=NUM_ROWS, seed=3)
    return path, truth, read(path)


@pytest.mark.parametrize(("chunk_rows", "max_workers"), [(BLOCK_ROWS, 1), (3 * BLOCK_ROWS, 4)])
def test_bytes_and_truth_do_not_depend_on_chunks_and_workers(kaggle, tmp_path, monkeypatch, chunk_rows, max_workers):
    monkeypatch.setattr(synthetic_log, "_CHUNK_ROWS", chunk_rows)
    monkeypatch.setattr(synthetic_log, "_MAX_WORKERS", max_workers)
    monkeypatch.setattr(synthetic_log.os, "sched_getaffinity", lambda _: range(8))
    assert synthesize(tmp_path / "log.tsv", rows=NUM_ROWS, seed=3) == kaggle[1]
    assert sha256(tmp_path / "log.tsv") == sha256(kaggle[0])


def test_a_shorter_log_is_the_beginning_of_a_longer_one_and_another_seed_gives_another(kaggle, tmp_path):
    synthesize(tmp_path / "short.tsv", rows=5_000, seed=3)
    synthesize(tmp_path / "other.tsv", rows=5_000, seed=4)
    short = (tmp_path / "short.tsv").read_bytes()
    assert short.count(b"\n") == 5_000
    assert kaggle[0].read_bytes().startswith(short)
    assert (tmp_path / "other.tsv").read_bytes() != short


def test_gzip_holds_the_plain_bytes_without_a_time(kaggle, tmp_path):
    packed = tmp_path / "log.tsv.gz"
    truth = synthesize(packed, rows=NUM_ROWS, seed=3)
    data = packed.read_bytes()
    assert gzip.decompress(data) == kaggle[0].read_bytes()
    assert data[4:8] == bytes(4)
    assert len(data) < kaggle[0].stat().st_size / 2
    assert read(packed).equals(kaggle[2])  # Polars has a decompressor of its own
    assert truth == kaggle[1]


def test_rows_have_the_layout_of_criteo(made):
    path, _ = made
    lines = path.read_text().splitlines()
    assert len(lines) == NUM_ROWS
    fields = [line.split("\t") for line in lines[:3_000]]
    assert {len(line) for line in fields} == {40}
    for label, *rest in fields:
        assert label in {"0", "1"}
        assert all(value == "" or str(int(value)) == value for value in rest[:13])
        assert all(value == "" or f"{int(value, 16):08x}" == value for value in rest[13:])


def test_click_rate_is_that_of_the_preset(made):
    path, truth = made
    rate = {"criteo-kaggle": 0.256, "criteo-1tb": 0.03}[truth.preset]
    assert truth.click_rate == read(path)["label"].mean()
    # Three standard deviations of the draw, and a little for the calibration of the intercept.
    assert abs(truth.click_rate - rate) < 3 * math.sqrt(rate * (1 - rate) / NUM_ROWS) + 0.002


def test_truth_is_what_scikit_learn_says_about_the_true_probabilities(made, outcomes):
    truth, (labels, probabilities) = made[1], outcomes
    held_out = NUM_ROWS // 7
    starts = {"held_out": (NUM_ROWS - held_out, NUM_ROWS)}
    middle = NUM_ROWS - held_out + math.ceil(held_out / 2)
    starts |= {"val": (NUM_ROWS - held_out, middle), "test": (middle, NUM_ROWS)}
    assert set(truth.splits) == set(starts)
    for part, (start, end) in [(truth, (0, NUM_ROWS)), *((truth.splits[k], v) for k, v in starts.items())]:
        assert part.rows == end - start
        assert part.click_rate == pytest.approx(labels[start:end].mean())
        assert part.auc == pytest.approx(roc_auc_score(labels[start:end], probabilities[start:end]), abs=1e-9)
        assert part.logloss == pytest.approx(log_loss(labels[start:end], probabilities[start:end]), abs=1e-7)
    assert 0.78 < truth.auc < 0.83


def test_labels_follow_the_true_probabilities(outcomes):
    """Calibrated in every tenth of the rows: the truth is no number beside the log, but how the log came about."""
    labels, probabilities = outcomes
    for tenth in np.array_split(np.argsort(probabilities, kind="stable"), 10):
        spread = math.sqrt((probabilities[tenth] * (1 - probabilities[tenth])).sum())
        assert abs(labels[tenth].sum() - probabilities[tenth].sum()) < 4 * spread


def test_what_a_single_row_leaves_undefined_is_null_in_the_truth(tmp_path):
    truth = synthesize(tmp_path / "log.tsv", rows=1)
    assert math.isnan(truth.auc)
    text = truth_path(tmp_path / "log.tsv").read_text()
    assert "NaN" not in text
    assert json.loads(text)["auc"] is None
    assert json.loads(text)["splits"]["val"]["rows"] == 0


def test_columns_are_missing_as_often_as_in_the_real_log_and_together(made):
    path, truth = made
    shape = PRESETS[truth.preset]
    missing = read(path).select(pl.all().is_null()).drop("label")
    for name, column in zip(missing.columns, shape.columns, strict=True):
        assert missing[name].mean() == pytest.approx(column.missing_rate, abs=0.008), name
    if truth.preset == "criteo-kaggle":
        assert missing["cat_18"].equals(missing["cat_25"].alias("cat_18"))


@pytest.mark.parametrize(
    ("preset", "name"),
    [("criteo-kaggle", "criteo_kaggle_sample.tsv.gz"), ("criteo-1tb", "criteo_1tb_day_0_sample.tsv.gz")],
)
def test_columns_look_like_those_of_the_real_log(preset, name, tmp_path):
    real = read(real_log(name))
    synthesize(tmp_path / "log.tsv", rows=len(real), preset=preset)
    made = read(tmp_path / "log.tsv")
    for column in NAMES[1:]:
        assert made[column].null_count() == pytest.approx(real[column].null_count(), abs=0.03 * len(real)), column
        ours, theirs = made[column].drop_nulls(), real[column].drop_nulls()
        if column.startswith("int"):
            for fraction in (0.25, 0.5, 0.75, 0.9, 0.99):
                ours_there, theirs_there = (math.log(values.quantile(fraction) + 3) for values in (ours, theirs))
                assert ours_there == pytest.approx(theirs_there, abs=0.35), (column, fraction)
        else:
            top = [values.value_counts(sort=True)["count"][0] / len(values) for values in (ours, theirs)]
            assert top[0] == pytest.approx(top[1], abs=0.13), column
            if theirs.n_unique() > 200:
                assert ours.n_unique() == pytest.approx(theirs.n_unique(), rel=0.2), column


def test_values_come_from_the_whole_cardinality_and_from_no_other_column(kaggle):
    _, _, log = kaggle
    cardinalities = [column.cardinality for column in PRESETS["criteo-kaggle"].sparse]
    values = [set(log[f"cat_{i}"].drop_nulls()) for i in range(26)]
    assert all(len(found) <= cardinality for found, cardinality in zip(values, cardinalities, strict=True))
    assert [len(found) for found, n in zip(values, cardinalities, strict=True) if n <= 27] == [24, 3, 27, 10, 4, 18, 15]
    assert len(set().union(*values)) == sum(map(len, values))


def test_every_value_of_a_column_can_be_drawn_and_frequencies_follow_the_power_law():
    for column in [column for shape in PRESETS.values() for column in shape.sparse]:
        first, num = (column.cells >> np.uint64(32)).astype(np.int64), (column.cells & np.uint64(2**32 - 1)).astype(int)
        assert first[0] == 0
        assert first[-1] + num[-1] == column.cardinality
        assert (first[1:] <= first[:-1] + num[:-1]).all()
        ranks = np.arange(min(column.cardinality, 50))
        wanted = (ranks + 0.5 + column.shift) ** -column.exponent  # up to the width of a rank
        drawn = np.array([(first == rank).sum() for rank in ranks]) / NUM_CELLS
        # Below that a cell is a tenth of a rank, and above the shape within a rank shows.
        fine = (drawn > 10 / NUM_CELLS) & (ranks >= 5)
        if fine.sum() > 10:
            ratio = drawn[fine] / drawn[fine].sum() / (wanted[fine] / wanted[fine].sum())
            assert np.abs(ratio - 1).max() < 0.2


class Interrupted(SilentProgress):
    def advance(self, amount, **figures):  # noqa: ARG002
        raise KeyboardInterrupt


@pytest.mark.parametrize("name", ["log.tsv", "log.tsv.gz"])
def test_an_interrupted_write_leaves_what_was_there(tmp_path, name):
    with pytest.raises(KeyboardInterrupt):
        synthesize(tmp_path / name, rows=20_000, progress=Interrupted())
    assert list(tmp_path.iterdir()) == []
    (tmp_path / name).write_text("mine")
    with pytest.raises(KeyboardInterrupt):
        synthesize(tmp_path / name, rows=20_000, progress=Interrupted())
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [(name, "mine")]


@pytest.mark.parametrize("content", ["{", "[]", '{"rows": 1}'])
def test_a_truth_that_is_none_is_named_with_a_remedy(tmp_path, content):
    truth_path(tmp_path / "log.tsv").write_text(content)
    with pytest.raises(
        LogError, match=r"^.*log\.tsv\.truth\.json: not what dlrm synthesize writes .*; remove the log .*$"
    ):
        read_truth(tmp_path / "log.tsv")


def test_progress_counts_every_row(tmp_path):
    class Listener(SilentProgress):
        total = done = 0

        def start_phase(self, name, total, unit="rows"):  # noqa: ARG002
            self.total = total

        def advance(self, amount, **figures):  # noqa: ARG002
            self.done += amount

    listener = Listener()
    synthesize(tmp_path / "log.tsv", rows=NUM_ROWS, progress=listener)
    assert (listener.total, listener.done) == (NUM_ROWS, NUM_ROWS)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"rows": 0}, ["rows", "0", "at least 1"]),
        ({"seed": -1}, ["seed", "-1", "0 or more"]),
        ({"preset": "avazu"}, ["preset", "avazu", "criteo-kaggle or criteo-1tb"]),
        ({"multi_hot": "zipf"}, ["multi_hot", "zipf", "uniform or pareto"]),
        ({"max_embeddings": 10}, ["max_embeddings", "multi_hot"]),
        ({"multi_hot": "uniform", "max_embeddings": 0}, ["max_embeddings", "0", "at least 1"]),
        ({"days": 0}, ["days", "0", "at least 1"]),
        ({"drift": Drift()}, ["drift", "days"]),
        ({"label_delay": 0.1}, ["label_delay", "days"]),
        ({"days": 2, "label_delay": 1.0}, ["label_delay", "1.0", "less than 1"]),
        ({"days": 2, "multi_hot": "uniform"}, ["days", "multi_hot"]),
        ({"days": 2, "drift": Drift(values=0.6)}, ["drift.values", "0.6", "0 to 0.5"]),
        ({"days": 2, "drift": Drift(popularity=-0.1)}, ["drift.popularity", "-0.1", "0 to 0.5"]),
        ({"days": 2, "drift": Drift(effects=math.nan)}, ["drift.effects", "nan", "0 to 1"]),
        ({"days": 500, "drift": Drift(values=0.5)}, ["drift.values", "2^32 values", "500 days"]),
    ],
)
def test_wrong_arguments_are_named_with_a_remedy(tmp_path, arguments, words):
    with pytest.raises(ConfigError) as raised:
        synthesize(tmp_path / "log", **{"rows": 10, **arguments})
    assert all(word in str(raised.value) for word in words)
    assert list(tmp_path.iterdir()) == []
