"""A synthetic log of several days: its bytes, what comes, goes and drifts, and the truth about each day."""

import json
import math
from dataclasses import asdict

import numpy as np
import polars as pl
import pytest
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import log_loss, roc_auc_score
from sklearn.preprocessing import OneHotEncoder

from helpers.raw_logs import CRITEO_NAMES as NAMES
from helpers.raw_logs import read_criteo as read
from torchdlrm.errors import LogError
from torchdlrm.synthetic.log import read_truth, truth_path
from torchdlrm.synthetic.model import LOGIT_UNITS, NUM_LOGITS
from torchdlrm.synthetic.rows import RowGenerator
from torchdlrm.synthetic.shapes import NUM_CELLS, PRESETS, DenseShape
from torchdlrm.synthetic.synthesize import day_path, late_path, synthesize
from torchdlrm.synthetic.values import Drift

NUM_ROWS = 30_001
SEED = 3
DRIFT = Drift(values=0.2, popularity=0.0, effects=0.5)
CATEGORIES = [f"cat_{i}" for i in range(26)]


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def generators(days, drift):
    found = [RowGenerator("criteo-kaggle", SEED, drift=drift)]
    while len(found) < days:
        found.append(found[-1].next_day())
    return found


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("days") / "log"
    return folder, synthesize(folder, rows=NUM_ROWS, seed=SEED, days=3, drift=DRIFT, label_delay=0.1)


@pytest.fixture(scope="module")
def logs(made):
    return [read(day_path(made[0], day)) for day in range(3)]


def test_a_day_has_the_same_bytes_however_many_days_there_are_and_whatever_was_killed(tmp_path):
    options = {"rows": 3_000, "seed": 1, "label_delay": 0.2}
    whole = synthesize(tmp_path / "whole", days=3, **options)
    expected = contents(tmp_path / "whole")
    days = {f"{name}_0{day}.tsv" for name in ("day", "late") for day in range(3)}
    assert set(expected) == {*days, *(f"day_0{day}.tsv.truth.json" for day in range(3)), "truth.json"}
    assert len({expected[name] for name in days}) == len(days)
    synthesize(tmp_path / "grown", days=1, **options)
    kept = day_path(tmp_path / "grown", 0).stat()
    late_path(tmp_path / "grown", 1).write_bytes(b"of a killed job")
    (tmp_path / "grown" / ".day_01.tsv.0123abcd").write_bytes(b"of a killed job")
    assert synthesize(tmp_path / "grown", days=3, **options) == whole
    assert contents(tmp_path / "grown") == expected
    assert day_path(tmp_path / "grown", 0).stat().st_mtime_ns == kept.st_mtime_ns
    assert day_path(tmp_path / "grown", 0).stat().st_ino == kept.st_ino


def test_the_first_day_is_the_log_without_days(tmp_path):
    synthesize(tmp_path / "log.tsv", rows=500, seed=1)
    synthesize(tmp_path / "days", rows=500, seed=1, days=1)
    assert day_path(tmp_path / "days", 0).read_bytes() == (tmp_path / "log.tsv").read_bytes()


def test_without_drift_a_later_day_has_other_rows_of_the_same_values_and_effects():
    first, _, third = generators(3, Drift(0, 0, 0))
    assert first.rows(0, 10).text != third.rows(0, 10).text
    assert all((a == b).all() for a, b in zip(first.model._main, third.model._main, strict=True))
    rank = np.arange(10_000, dtype=np.uint64)
    assert (third.values.lines(2, rank) == rank).all()
    assert (third.values.generations(2, rank) == 0).all()


def test_frequent_values_die_and_are_born_at_the_rate_and_do_not_come_back(logs):
    counts = [{name: dict(log[name].drop_nulls().value_counts().rows()) for name in CATEGORIES} for log in logs]
    for count_now, count_then in ((counts[0], counts[1]), (counts[1], counts[0])):  # deaths, births
        died = expected = variance = 0.0
        for name in CATEGORIES:
            # That many of a value would not be missed on the other day: exp(-25).
            frequent = {value: count / NUM_ROWS for value, count in count_now[name].items() if count >= 25}
            rates = [DRIFT.values * 0.01 / (0.01 + fraction) for fraction in frequent.values()]
            died += sum(value not in count_then[name] for value in frequent)
            expected += sum(rates)
            variance += sum(rate * (1 - rate) for rate in rates)
        assert expected > 100
        assert abs(died - expected) < 4 * math.sqrt(variance)
    for name in CATEGORIES:
        gone = {value for value, count in counts[0][name].items() if count >= 25} - set(counts[1][name])
        assert not gone & set(counts[2][name])


def test_values_never_share_a_number_and_lives_have_the_given_length_in_the_mean():
    first, *_, last = (day.values for day in generators(9, Drift(values=0.05)))
    rare = np.arange(100_000, 200_000, dtype=np.uint64)
    assert last.generations(2, rare).mean() == pytest.approx(8 * 0.05, rel=0.02)
    numbers = [values.numbers(column, rare)[0] for values in (first, last) for column in (2, 3)]
    lived_on = sum(int((last.generations(column, rare) == 0).sum()) for column in (2, 3))
    assert len(np.unique(np.concatenate(numbers))) == 400_000 - lived_on


def test_popularity_moves_ranks_by_the_given_rate_and_not_without_bound():
    drift = Drift(values=0.0, popularity=0.1, effects=0.0)
    days = generators(40, drift)
    column = 2  # 10 million values, exponent 1: frequencies halve where ranks double
    lines = [day.values._lines[column] for day in days]
    assert all((np.sort(line) == np.arange(4096)).all() for line in lines)
    logs = [np.log(np.argsort(line)[100:2_000] + 1.0) for line in lines]
    assert np.std(logs[1] - logs[0]) == pytest.approx(0.1, rel=0.15)
    assert 0.3 < np.std(logs[-1] - logs[0]) < 0.6
    # The walk is of popularity; effects stay with the values.
    assert all((a == b).all() for a, b in zip(days[0].model._effects, days[-1].model._effects, strict=True))


def same_rows(shape):
    """Codes of rows that are the same on every day: the cells of integers, the lines of values."""
    rng = np.random.default_rng(5)
    for column in shape.columns:
        cells = rng.integers(0, NUM_CELLS, 20_000)
        is_dense = isinstance(column, DenseShape)
        yield cells if is_dense else np.minimum(column.cells[cells] >> np.uint64(32), 4096).astype(np.int64)


def test_effects_drift_apart_from_day_to_day():
    days = generators(12, Drift(values=0.0, popularity=0.0, effects=0.3))
    codes = list(same_rows(days[0].shape))
    logits = [generator.model.logits(codes) for generator in days]
    correlations = [np.corrcoef(logits[0], logits[k])[0, 1] for k in (1, 3, 6, 11)]
    assert correlations == sorted(correlations, reverse=True)
    assert correlations[0] > 0.9
    assert correlations[-1] < 0.8
    effects = [np.concatenate(generator.model._effects[13:]) for generator in days]  # of 26 * 4,098 values
    for k in (1, 3, 6, 11):
        assert np.corrcoef(effects[0], effects[k])[0, 1] == pytest.approx((1 - 0.3**2) ** (k / 2), abs=0.01)
        assert effects[k].std() == pytest.approx(1.0, abs=0.01)


def test_truth_of_each_day_and_of_all_is_what_scikit_learn_says_about_the_true_probabilities(made, logs):
    folder, whole = made
    labels, probabilities = [], []
    for day, generator in enumerate(generators(3, DRIFT)):
        logits = generator.rows(0, NUM_ROWS, with_text=False).outcomes // 2
        probabilities.append(1 / (1 + np.exp(-(logits - NUM_LOGITS / 2) / LOGIT_UNITS)))
        late = read(late_path(folder, day)).with_columns(label=pl.lit(0, pl.Int64), late=1)
        clicked = logs[day].join(late, on=NAMES, how="left", nulls_equal=True, maintain_order="left")
        labels.append((clicked["label"] + clicked["late"].fill_null(0)).to_numpy())
        truth = read_truth(day_path(folder, day))
        assert (truth.day, truth.rows, truth.drift, truth.label_delay) == (day, NUM_ROWS, DRIFT, 0.1)
        assert truth.auc == pytest.approx(roc_auc_score(labels[-1], probabilities[-1]), abs=1e-9)
        assert truth.logloss == pytest.approx(log_loss(labels[-1], probabilities[-1]), abs=1e-6)
        assert truth.click_rate == labels[-1].mean()
        part = whole.splits[f"day_0{day}"]
        assert (part.first_row, part.rows, part.auc) == (day * NUM_ROWS, NUM_ROWS, truth.auc)
    assert (whole.rows, whole.day, list(whole.splits)) == (3 * NUM_ROWS, None, ["day_00", "day_01", "day_02"])
    assert whole.auc == pytest.approx(roc_auc_score(np.concatenate(labels), np.concatenate(probabilities)), abs=1e-9)
    assert whole.logloss == pytest.approx(log_loss(np.concatenate(labels), np.concatenate(probabilities)), abs=1e-6)
    assert json.loads(truth_path(folder).read_text()) == whole.as_dict()
    assert whole.as_dict()["drift"] == asdict(DRIFT)


def test_late_clicks_are_the_given_fraction_and_absent_from_the_day(made, tmp_path):
    folder, whole = made
    synthesize(tmp_path / "known", rows=NUM_ROWS, seed=SEED, days=1, drift=DRIFT)
    known = day_path(tmp_path / "known", 0).read_text().splitlines()
    shown = day_path(folder, 0).read_text().splitlines()
    late = [line for line, line_shown in zip(known, shown, strict=True) if line != line_shown]
    assert late_path(folder, 0).read_text().splitlines() == late
    assert all(
        line == line_shown or "0" + line[1:] == line_shown for line, line_shown in zip(known, shown, strict=True)
    )
    clicks = sum(line[0] == "1" for line in known)
    assert abs(len(late) - 0.1 * clicks) < 4 * math.sqrt(0.09 * clicks)
    assert read_truth(day_path(folder, 0)).late_clicks == len(late)
    late_logs = [late_path(folder, day).read_text().splitlines() for day in range(3)]
    assert whole.late_clicks == sum(len(lines) for lines in late_logs)
    assert not list((tmp_path / "known").glob("late_*"))


def test_a_frozen_logistic_regression_loses_against_one_of_the_day(logs):
    """Both see as many rows; integers are cut into categories, half a power of e each."""
    train, test = slice(0, 24_000), slice(24_000, None)
    integers = (pl.col(NAMES[1:14]).fill_null(0) + 3).log() * 2
    rows = [log.select(integers.round(0).cast(pl.String), pl.col(CATEGORIES).fill_null("")).to_numpy() for log in logs]
    labels = [log["label"].to_numpy() for log in logs]
    aucs = []
    for day in (0, 2):
        encoder = OneHotEncoder(handle_unknown="infrequent_if_exist", min_frequency=200)
        model = LogisticRegression(C=0.1, max_iter=200, tol=1e-2)
        model.fit(encoder.fit_transform(rows[day][train]), labels[day][train])
        predicted = model.predict_proba(encoder.transform(rows[2][test]))[:, 1]
        aucs.append(roc_auc_score(labels[2][test], predicted))
    assert aucs[0] + 0.02 < aucs[1]


def test_days_of_other_options_are_refused_and_replaced_on_demand(tmp_path):
    folder = tmp_path / "log"
    synthesize(folder, rows=100, days=3, drift=Drift(effects=0.5), label_delay=0.1)
    before = contents(folder)
    (folder / "notes.txt").write_text("mine")
    words = r"day_00\.tsv: is there already, with label_delay 0\.1, not 0\.0; drift\.effects 0\.5, not 0\.15; .*--force"
    with pytest.raises(LogError, match=words):
        synthesize(folder, rows=100, days=2)
    assert contents(folder) == {**before, "notes.txt": b"mine"}
    synthesize(folder, rows=100, days=2, resume=False)
    names = {"day_00.tsv", "day_00.tsv.truth.json", "day_01.tsv", "day_01.tsv.truth.json", "truth.json", "notes.txt"}
    assert set(contents(folder)) == names


def test_the_name_of_a_file_is_refused_for_a_folder(tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(LogError, match=r"file: .*name a folder"):
        synthesize(tmp_path / "file", rows=10, days=2)


def test_every_preset_has_numbers_for_the_values_of_a_year():
    for shape in PRESETS.values():
        assert not list(Drift().problems(365, shape))
