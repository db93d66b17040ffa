"""Slices against a loop over them with scikit-learn, and on a synthetic log, whose true probabilities are known."""

import math
from io import BytesIO

import numpy as np
import polars as pl
import pytest
from sklearn.metrics import log_loss, roc_auc_score

from helpers.raw_logs import read_criteo
from torchdlrm.errors import ConfigError
from torchdlrm.judged import Judged
from torchdlrm.judging.slices import MIN_CLICKS, MIN_ROWS, MOST_SLICES, slices
from torchdlrm.synthetic.model import LOGIT_UNITS, NUM_LOGITS
from torchdlrm.synthetic.rows import RowGenerator

NUM_ROWS = 16_384


def sigmoid(logits):
    return 1 / (1 + np.exp(-logits.astype(np.float64)))


@pytest.fixture(scope="module")
def log():
    """Labels, true logits and columns of a synthetic log."""
    rows = RowGenerator("criteo-kaggle", 3).rows(0, NUM_ROWS)
    frame = read_criteo(BytesIO(rows.text))
    logits = ((rows.outcomes >> 1) - NUM_LOGITS // 2) / LOGIT_UNITS
    assert (frame["label"].to_numpy() == rows.outcomes & 1).all()
    return frame["label"].to_numpy(), logits.astype(np.float32), frame


def naive(column, *, crossed=False):
    """Of each row what a column says of it."""
    name = column.name
    if not column.dtype.is_numeric() or column.n_unique() <= MOST_SLICES:
        return [f"{name} = {'missing' if value is None else value}" for value in column]
    numbers = sorted(value for value in column if value is not None)
    number = 4 if crossed else 10
    ends = sorted({numbers[int(k / number * (len(numbers) - 1))] for k in range(1, number)})

    def of(value):
        if value is None:
            return "missing"
        place = sum(value > end for end in ends)
        if place == 0:
            return f"up to {ends[0]:,}"
        if place == len(ends):
            return f"over {ends[-1]:,}"
        low, high = ends[place - 1] + 1, ends[place]
        return f"{high:,}" if low == high else f"{low:,} to {high:,}"

    return [f"{name} = {of(value)}" for value in column]


def test_slices_equal_a_loop_over_them_with_scikit_learn(log):
    labels, logits, columns = log
    weights = np.random.default_rng(1).choice([0.5, 1.0, 3.0], NUM_ROWS)
    found = slices(Judged.of(labels, logits, weights), columns, "cat_5,int_2, cat_5 * int_2")
    found = {part.name: part for part in found}
    crossed = map(", ".join, zip(naive(columns["cat_5"]), naive(columns["int_2"], crossed=True), strict=True))
    expected_names, least = set(), max(MIN_ROWS, MIN_CLICKS / labels.mean())
    for way, names in (
        ("cat_5", naive(columns["cat_5"])),
        ("int_2", naive(columns["int_2"])),
        ("cat_5*int_2", [*crossed]),
    ):
        keys = np.array(names)
        large = [(-np.count_nonzero(keys == key), key) for key in np.unique(keys)]
        large = [(rows, key) for rows, key in large if -rows >= least]
        kept = [key for _, key in sorted(large)[:MOST_SLICES]]
        rows_of = {key: keys == key for key in kept} | {f"{way} = others": ~np.isin(keys, kept)}
        expected_names |= {name for name, rows in rows_of.items() if rows.any()}
        for name, rows in rows_of.items():
            if not rows.any():
                continue
            part, label, weight, p = found[name], labels[rows], weights[rows], sigmoid(logits[rows])
            assert (part.rows, part.share) == (rows.sum(), pytest.approx(rows.mean()))
            rate = np.average(label, weights=weight)
            assert part.estimates["click_rate"].value == pytest.approx(rate)
            if len(label) < least:
                assert math.isnan(part.estimates["auc"].value)
                continue
            values = {metric: estimate.value for metric, estimate in part.estimates.items()}
            assert values["auc"] == pytest.approx(roc_auc_score(label, p, sample_weight=weight))
            loss = log_loss(label, p, sample_weight=weight)
            assert values["logloss"] == pytest.approx(loss)
            entropy = log_loss(label, np.full(len(label), rate), sample_weight=weight)
            assert values["ne"] == pytest.approx(loss / entropy)
            assert values["calibration"] == pytest.approx(np.average(p, weights=weight) / rate)
            assert part.estimates["ne"].low < values["ne"] < part.estimates["ne"].high
    assert set(found) == expected_names


def test_the_worst_metric_of_a_slice_and_its_corrected_p_value():
    """By hand, from residuals: errors of ratios, the others' mean by rows, and Holm's steps."""
    rng = np.random.default_rng(5)
    city = rng.choice(["a", "b", "c"], 6_000, p=[0.5, 0.3, 0.2])
    truth = rng.normal(-1, 1, 6_000)
    labels = (rng.random(6_000) < sigmoid(truth)).astype(int)
    logits = truth + (city == "c") * rng.normal(0, 0.8, 6_000)
    found = slices(Judged.of(labels, logits), pl.DataFrame({"city": city}), "city")
    ne, error, number, z = {}, {}, {}, {}
    for key in "abc":
        label, p = labels[city == key], sigmoid(logits[city == key])
        number[key], rate = len(label), label.mean()
        loss = -np.where(label == 1, np.log(p), np.log1p(-p))
        base = -np.where(label == 1, math.log(rate), math.log1p(-rate))
        ne[key] = loss.sum() / base.sum()
        error[key] = np.std(loss - ne[key] * base, ddof=1) * math.sqrt(len(label)) / base.sum()
        relative_error = np.std(p - p.sum() / label.sum() * label, ddof=1) * math.sqrt(len(label)) / p.sum()
        angle = abs(math.asin(math.sqrt(p.mean())) - math.asin(math.sqrt(rate)))
        z[key, "calibration"] = 2 * angle * math.sqrt((1 - rate) / rate) / relative_error
    for key in "abc":
        others = [other for other in "abc" if other != key]
        total = sum(number[other] for other in others)
        mean = sum(number[other] * ne[other] for other in others) / total
        of_mean = math.sqrt(sum((number[other] * error[other]) ** 2 for other in others)) / total
        z[key, "ne"] = (ne[key] - mean) / math.hypot(error[key], of_mean)
    expected = {key: max((z[key, metric], metric) for metric in ("ne", "calibration")) for key in "abc"}
    order = sorted("abc", key=lambda key: -expected[key][0])
    assert [part.name[-1] for part in found] == order
    assert order[0] == "c"
    largest = 0.0
    for place, (key, part) in enumerate(zip(order, found, strict=True)):
        assert (part.z, part.worst) == (pytest.approx(expected[key][0], rel=1e-9), expected[key][1])
        p_value = min(1, 2 * math.erfc(part.z / math.sqrt(2)))
        largest = max(largest, min(1, (3 - place) * p_value))
        assert part.p_value == pytest.approx(largest)


@pytest.mark.parametrize("damage", ["noise", "shift"])
def test_a_bad_slice_of_a_synthetic_log_comes_first_and_is_marked(log, damage, seed):
    labels, logits, columns = log
    value = columns["cat_5"].drop_nulls().value_counts(sort=True)["cat_5"][1]
    rows = (columns["cat_5"] == value).fill_null(value=False).to_numpy()
    change = np.random.default_rng(seed).normal(0, 1.5, NUM_ROWS) if damage == "noise" else 0.5
    bad = np.where(rows, logits + change, logits)
    judged = Judged.of(labels, bad)
    worst = slices(judged, columns, "cat_5,int_2,cat_8")[0]
    assert worst.name == f"cat_5 = {value}"
    assert worst.p_value < 0.001
    lost, *others = slices(judged, columns, "cat_5,int_2", first=Judged.of(labels, logits))
    assert (lost.name, lost.worst) == (worst.name, "ne")
    assert lost.p_value < 0.01
    assert lost.estimates["ne"].low > 0
    assert lost.estimates["click_rate"].value == pytest.approx(labels[rows].mean())
    unchanged = [part for part in others if part.name.startswith("cat_5")]
    assert unchanged
    assert {part.p_value for part in unchanged} == {1.0}


def test_a_slice_that_has_become_worse_comes_first(log):
    labels, logits, columns = log
    earlier, later = slice(0, NUM_ROWS // 2), slice(NUM_ROWS // 2, None)
    value = columns["cat_8"].value_counts(sort=True)["cat_8"][0]
    bad = np.where(columns["cat_8"].eq_missing(value).to_numpy(), logits + 0.5, logits)[later]
    before = Judged.of(labels[earlier], logits[earlier]), columns[earlier]
    worst, *others = slices(Judged.of(labels[later], bad), columns[later], "cat_8,int_2", before=before)
    assert worst.name == f"cat_8 = {value}"
    assert (worst.worst, worst.p_value < 0.05) == ("calibration", True)
    assert worst.before.estimates["calibration"].value < worst.estimates["calibration"].value
    assert worst.before.rows == columns["cat_8"][earlier].eq_missing(value).sum()
    as_json = worst.as_json()
    assert as_json["before"]["calibration"] == worst.before.estimates["calibration"].value
    assert as_json["intervals"]["calibration"] == list(worst.estimates["calibration"][2:])
    names = {part.name for part in (worst, *others)}
    same = slices(Judged.of(labels[earlier], logits[earlier]), columns[earlier], "cat_8,int_2")
    assert names >= {part.name for part in same}


def test_where_no_slice_is_bad_one_is_marked_in_one_of_twenty_logs(log):
    _, logits, columns = log
    some = logits[:4_000]
    marked = 0
    for draw in range(40):
        rng = np.random.default_rng(draw)
        labels = (rng.random(len(some)) < sigmoid(some)).astype(np.uint8)
        shuffled = columns[:4_000].select("cat_5", "int_2").sample(fraction=1, shuffle=True, seed=draw)
        marked += slices(Judged.of(labels, some), shuffled, "cat_5,int_2")[0].p_value < 0.05
    assert marked <= 5  # of 40 at 5 %: 3 in 200 such tests would find more


def test_rows_of_a_group_are_one_observation():
    rng = np.random.default_rng(2)
    labels, logits = rng.integers(0, 2, 800), rng.normal(size=800)
    column = pl.DataFrame({"device": rng.choice(["tv", "phone"], 800)})
    once = slices(Judged.of(labels, logits), column, "device")
    groups = np.tile(np.arange(800), 2)
    twice = slices(
        Judged.of(np.tile(labels, 2), np.tile(logits, 2), None, groups), pl.concat([column, column]), "device"
    )
    for part, doubled in zip(once, twice, strict=True):
        assert doubled.z == pytest.approx(part.z)
        assert doubled.estimates["click_rate"] == pytest.approx(part.estimates["click_rate"])


def test_numbers_that_are_not_whole_few_values_and_lists():
    rng = np.random.default_rng(4)
    labels, logits = rng.integers(0, 2, 3_000), rng.normal(size=3_000)
    columns = pl.DataFrame(
        {
            "price": np.where(rng.random(3_000) < 0.2, np.nan, rng.random(3_000)),
            "level": rng.integers(0, 3, 3_000),
            "tags": [["a", "b"]] * 3_000,
        }
    )
    judged = Judged.of(labels, logits)
    names = [part.name for part in slices(judged, columns, "price,level")]
    assert {"price = missing", "level = 0", "level = 1", "level = 2"} <= set(names)
    assert sum(name.startswith("price = 0.") and " to 0." in name for name in names) == 8
    with pytest.raises(ConfigError, match="`by`: tags holds several values in a cell"):
        slices(judged, columns, "tags")
