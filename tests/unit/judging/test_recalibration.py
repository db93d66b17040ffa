"""Maps of logits: against scikit-learn, on rows whose truth is known, and as a bundle holds them."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from sklearn.isotonic import IsotonicRegression
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import log_loss
from test_reliability import drawn, probabilities_of

from torchdlrm.judged import Judged
from torchdlrm.judging.recalibration import LogitMap, Recalibration, Verdict, fit
from torchdlrm.metrics import METRICS

METHODS = ["platt", "isotonic", "histogram"]


def verdict_of(method, rng, scale, num_rows=40_000):
    """What a map that was fitted on as many rows changes on others, and both."""
    fitted, (labels, logits) = Judged.of(*drawn(rng, num_rows, scale)), drawn(rng, num_rows, scale)
    before = Judged.of(labels, logits)
    after = Judged.of(labels, fit(fitted, method).apply(logits))
    return Verdict.of("others", before, after), before, after


@pytest.mark.parametrize("are_weighted", [False, True])
def test_platt_is_the_logistic_regression_of_scikit_learn(seed, are_weighted):
    rng = np.random.default_rng(seed)
    labels, logits = drawn(rng, 5_000, scale=8)  # so sure that a plain step of Newton's goes astray
    weights = rng.integers(0, 4, 5_000).astype(np.float32) if are_weighted else None
    found = fit(Judged.of(labels, logits, weights), "platt").map
    expected = LogisticRegression(C=np.inf, tol=1e-10, max_iter=1_000).fit(
        logits[:, None].astype(float), labels, weights
    )
    assert found.slope == pytest.approx(expected.coef_[0, 0], rel=1e-4)
    assert found.values[0] == pytest.approx(expected.intercept_[0], rel=1e-4)


@pytest.mark.parametrize("method", METHODS)
def test_an_overconfident_model_becomes_right_and_keeps_its_order(method, seed):
    verdict, before, after = verdict_of(method, np.random.default_rng(seed), scale=2.0)
    assert verdict.is_better
    assert verdict.calibration_error[1] < verdict.calibration_error[0] / 2
    assert verdict.calibration_error[1] < 2 * verdict.by_chance
    assert METRICS["auc"].of(after) == pytest.approx(METRICS["auc"].of(before), abs=1e-6)
    p = probabilities_of(after.logits)
    assert verdict.loss[1] == pytest.approx(log_loss(after.labels, p), abs=1e-9)
    assert f"{verdict.loss[1]:.5f}" in str(verdict)


@pytest.mark.parametrize("method", METHODS)
def test_a_model_that_is_right_is_rarely_made_better(method, seed):
    rng = np.random.default_rng(seed)
    assert sum(verdict_of(method, rng, scale=1.0, num_rows=3_000)[0].is_better for _ in range(12)) <= 2


def test_isotonic_is_as_good_as_that_of_scikit_learn_where_no_line_is(seed):
    rng = np.random.default_rng(seed)

    def rows(num_rows):
        labels, truth = drawn(rng, num_rows)
        return labels, np.where(truth < -2, 3 * truth + 4, truth / 2 - 1).astype(np.float32)

    (labels, logits), (test_labels, test_logits) = rows(60_000), rows(60_000)
    judged = Judged.of(labels, logits)
    losses = {
        method: log_loss(test_labels, probabilities_of(fit(judged, method).apply(test_logits))) for method in METHODS
    }
    theirs = IsotonicRegression(y_min=1e-6, y_max=1 - 1e-6, out_of_bounds="clip").fit(logits, labels)
    expected = log_loss(test_labels, theirs.predict(test_logits))
    assert losses["isotonic"] < expected + 2e-4
    assert losses["histogram"] < expected + 1e-3
    assert losses["platt"] > losses["isotonic"] + 1e-3


@pytest.mark.parametrize("method", METHODS)
def test_rows_that_teach_nothing_give_no_map_or_one_that_moves_all_alike(method, seed):
    labels, logits = drawn(np.random.default_rng(seed), 2_000)
    assert fit(Judged.of(np.zeros(2_000), logits), method) is None
    assert fit(Judged.of(labels, logits, np.zeros(2_000, np.float32)), method) is None
    same = fit(Judged.of(labels, np.full(2_000, 1, np.float32)), method)
    if method == "platt":
        assert same is None
        assert fit(Judged.of(labels, -logits), method) is None
    else:
        rate = probabilities_of(same.apply(np.float32([1])))[0]
        assert rate == pytest.approx(labels.mean(), rel=1e-3)
        assert len(fit(Judged.of(labels, -logits), method).map.knots) == 1


steps = st.lists(st.floats(1e-3, 9), min_size=8, max_size=8)


@given(st.integers(1, 8), steps, steps, st.lists(st.floats(-50, 50, width=32), min_size=2))
def test_a_map_never_turns_rows_round_and_pieces_and_json_give_the_same_bits(count, runs, slopes, logits):
    x = np.cumsum(runs)[:count] - 20
    y = np.cumsum(np.multiply(runs, slopes))[:count] - 20
    moved = LogitMap(knots=tuple(x.tolist()), values=tuple(y.tolist()), slope=slopes[0])
    logits = np.sort(np.float32(logits))
    values = moved.apply(logits)
    assert values.dtype == np.float32
    assert (np.diff(values) >= 0).all()
    pieces = [LogitMap.model_validate_json(moved.model_dump_json()).apply(one) for one in logits[:, None]]
    np.testing.assert_array_equal(np.concatenate(pieces), values)


def test_what_is_no_rising_map_is_refused():
    good = {"knots": [0.0, 1.0], "values": [0.0, 1.0], "slope": 1.0}
    LogitMap.model_validate(good)
    for wrong in (
        {"knots": [1.0, 0.0]},
        {"values": [1.0, 1.0]},
        {"knots": [0.0]},
        {"knots": [], "values": []},
        {"slope": 0.0},
        {"slope": 11.0},
        {"values": [0.0, 11.0]},
        {"values": [0.0, float("nan")]},
        {"values": [0.0, float("inf")]},
        {"knots": [*map(float, range(65))], "values": [*map(float, range(65))]},
    ):
        with pytest.raises(ValidationError):
            LogitMap.model_validate(good | wrong)


def test_frequent_values_have_maps_of_their_own_and_the_others_share_one(seed):
    rng = np.random.default_rng(seed)
    labels, truth = drawn(rng, 60_000)
    ids = np.where(rng.random(60_000) < 0.1, rng.integers(10, 1_000, 60_000), rng.integers(1, 4, 60_000)).astype(
        np.int32
    )
    shift = np.select([ids == 1, ids == 2], [1.0, -1.0], 0.5)
    logits = (truth + shift).astype(np.float32)
    found = fit(Judged.of(labels, logits), "platt", "cat_5", ids)
    assert [*found.segments] == [1, 2, 3]
    expected = {1: -1.0, 2: 1.0, 3: -0.5}
    for value, own in found.segments.items():
        assert own.values[0] == pytest.approx(expected[value], abs=0.15)
    again = Recalibration.model_validate_json(found.model_dump_json())
    assert again == found
    values = again.apply(logits, ids)
    np.testing.assert_array_equal(values[ids == 2], found.segments[2].apply(logits[ids == 2]))
    np.testing.assert_array_equal(values[ids > 3], found.map.apply(logits[ids > 3]))
    assert found.map.values[0] == pytest.approx(-0.5, abs=0.2)
    few = fit(Judged.of(labels[:900], logits[:900]), "platt", "cat_5", ids[:900])
    assert (few.segments, few.by) == ({}, "cat_5")
    assert few.map == fit(Judged.of(labels[:900], logits[:900]), "platt").map
