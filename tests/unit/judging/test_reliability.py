"""Reliability curves and calibration errors: against SciPy and scikit-learn, and against draws whose truth is known."""

import numpy as np
import pytest
from scipy.stats import binomtest
from sklearn.calibration import calibration_curve

from torchdlrm import judged as judged_module
from torchdlrm.judged import Judged
from torchdlrm.judging.reliability import reliability


def probabilities_of(logits):
    return 1 / (1 + np.exp(-logits.astype(np.float64)))


def drawn(rng, num_rows, scale=1.0):
    """Labels by true log-odds, and the logits of a model that takes these times `scale`."""
    truth = rng.normal(-2, 1.2, num_rows)
    labels = (rng.random(num_rows) < probabilities_of(truth)).astype(np.float32)
    return labels, (scale * truth).astype(np.float32)


def test_bins_are_those_of_scikit_learn_with_wilsons_intervals(seed):
    labels, logits = drawn(np.random.default_rng(seed), 20_000)
    found = reliability(Judged.of(labels, logits), 10)
    rates, means = calibration_curve(labels, probabilities_of(logits), n_bins=10, strategy="quantile")
    np.testing.assert_allclose(
        [(b.click_rate, b.prediction) for b in found.bins], np.stack([rates, means], 1), atol=2e-4
    )
    for one in found.bins:
        low, high = binomtest(round(one.rows * one.click_rate), one.rows).proportion_ci(method="wilson")
        assert (one.low, one.high) == pytest.approx((low, high), abs=1e-5)
    shares = np.array([one.rows for one in found.bins]) / labels.size
    assert found.error.value == pytest.approx(shares @ np.abs(rates - means), abs=1e-4)


def test_rows_of_one_prediction_are_in_one_bin_and_weights_count():
    logits = np.float32([0] * 6 + [-1] * 3 + [2])
    labels = np.float32([1, 1, 0, 0, 0, 0, 0, 1, 0, 1])
    weights = np.float32([1, 1, 1, 1, 1, 3, 1, 2, 0, 0])
    first, second = reliability(
        Judged.of(labels, logits, weights)
    ).bins  # the last row, alone in its bin, weighs nothing
    assert (first.rows, first.click_rate) == (2, pytest.approx(2 / 3))
    assert (second.rows, second.click_rate, second.prediction) == (6, pytest.approx(2 / 8), pytest.approx(0.5))
    assert 0 < second.low < 0.25 < second.high < 1


def test_groups_widen_intervals_as_copies_of_rows_must(seed):
    labels, logits = drawn(np.random.default_rng(seed), 4_000, scale=1.5)
    alone = reliability(Judged.of(labels, logits), 8)
    codes = np.repeat(np.arange(labels.size), 5)
    copied = reliability(Judged.of(labels.repeat(5), logits.repeat(5), None, codes), 8)
    for one, other in zip(alone.bins, copied.bins, strict=True):
        assert (other.low, other.high) == pytest.approx((one.low, one.high), rel=1e-3)
    assert copied.by_chance == pytest.approx(alone.by_chance, rel=1e-3)
    assert copied.error[1:] == pytest.approx(alone.error[1:], rel=0.02)


def test_an_error_by_chance_is_what_right_predictions_have_and_the_interval_holds_the_truth(seed):
    rng, errors, chances, held, held_0 = np.random.default_rng(seed), [], [], 0, 0
    for _ in range(60):
        right = reliability(Judged.of(*drawn(rng, 3_000)))
        errors.append(right.error.value)
        chances.append(right.by_chance)
        held_0 += right.error.low == 0
        labels, logits = drawn(rng, 3_000, scale=1.6)
        wrong = reliability(Judged.of(labels, logits))
        truth = np.abs(probabilities_of(logits / np.float32(1.6)) - probabilities_of(logits)).mean()
        held += wrong.error.low <= truth <= wrong.error.high
    assert np.mean(chances) == pytest.approx(np.mean(errors), rel=0.05)
    assert min(held, held_0) >= 53


def test_blocks_change_nothing(seed, monkeypatch):
    rng = np.random.default_rng(seed)
    labels, logits = drawn(rng, 3_000)
    weights = rng.random(3_000).astype(np.float32)
    whole = reliability(Judged.of(labels, logits, weights))
    monkeypatch.setattr(judged_module, "_BLOCK_ROWS", 700)
    again = reliability(Judged.of(labels, logits, weights))
    np.testing.assert_allclose(again.bins, whole.bins, rtol=1e-9)
    assert again.error == pytest.approx(whole.error, rel=1e-9)
