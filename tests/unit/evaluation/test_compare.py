"""Standard errors of a comparison against their definitions, pair by pair, and against how estimates really scatter."""

import math

import numpy as np
import pytest
from sklearn.metrics import log_loss, roc_auc_score

from torchdlrm.evaluation.compare import paired_difference
from torchdlrm.judged import Judged
from torchdlrm.metrics import METRICS, binary_metrics


def auc_standard_error(labels, scores, weights=None):
    return METRICS["auc"].estimate(Judged.of(labels, scores, weights)).standard_error


def calibration_standard_error(labels, logits, weights=None):
    return METRICS["calibration"].estimate(Judged.of(labels, logits, weights)).standard_error


def models(rng, num_rows):
    """Labels, and logits of a worse and a better model, with ties."""
    truth = rng.normal(size=num_rows)
    labels = (rng.random(num_rows) < 1 / (1 + np.exp(-truth))).astype(np.float32)
    worse, better = truth + rng.normal(size=num_rows), truth + rng.normal(0, 0.5, num_rows)
    return labels, worse.round(1).astype(np.float32), better.round(1).astype(np.float32)


def test_the_standard_error_of_the_auc_is_delongs(seed):
    """From the matrix of all pairs, as the paper defines it: variances of the means over its rows and columns."""
    labels, first, second = models(np.random.default_rng(seed), 120)

    def pairs(logits):
        positives, negatives = logits[labels == 1], logits[labels == 0]
        return (positives[:, None] > negatives) + 0.5 * (positives[:, None] == negatives)

    kernel = pairs(second) - pairs(first)
    by_positive, by_negative = kernel.mean(axis=1), kernel.mean(axis=0)
    variance = by_positive.var(ddof=1) / by_positive.size + by_negative.var(ddof=1) / by_negative.size
    assert paired_difference(labels, first, second).auc_standard_error == pytest.approx(math.sqrt(variance), rel=1e-12)


def test_the_standard_error_of_one_auc_is_that_of_its_difference_from_no_model(seed):
    """A model that says the same of every row has wins of one half, which do not scatter."""
    labels, scores, _ = models(np.random.default_rng(seed), 120)
    nothing = np.zeros_like(scores)
    expected = paired_difference(labels, nothing, scores).auc_standard_error
    assert auc_standard_error(labels, scores) == pytest.approx(expected, rel=1e-12)
    weights = np.random.default_rng(seed).integers(0, 3, len(labels)).astype(np.float64)
    expected = paired_difference(labels, nothing, scores, weights).auc_standard_error
    assert auc_standard_error(labels, scores, weights) == pytest.approx(expected, rel=1e-12)
    assert math.isnan(auc_standard_error(np.ones(5), np.arange(5.0)))


def test_differences_are_those_of_the_metrics_and_weights_of_one_change_nothing(seed):
    rng = np.random.default_rng(seed)
    labels, first, second = models(rng, 300)
    weights = rng.choice([0.0, 0.3, 1.0, 4.0], 300).astype(np.float32)
    found = paired_difference(labels, first, second, weights)
    expected = [roc_auc_score(labels, logits, sample_weight=weights) for logits in (first, second)]
    assert found.auc == pytest.approx(expected[1] - expected[0], abs=1e-12)
    losses = [log_loss(labels, 1 / (1 + np.exp(-x.astype(float))), sample_weight=weights) for x in (first, second)]
    assert found.logloss == pytest.approx(losses[1] - losses[0], abs=1e-12)
    assert found != paired_difference(labels, first, second)
    assert vars(paired_difference(labels, first, second, 2 * weights)) == pytest.approx(vars(found), rel=1e-12), (
        "it is their ratio that counts"
    )
    plain, ones = (paired_difference(labels, first, second, w) for w in (None, np.ones(300)))
    assert vars(ones) == pytest.approx(vars(plain), rel=1e-12)


@pytest.mark.parametrize("weigh", [False, True])
def test_standard_errors_are_how_much_estimates_scatter(weigh, seed):
    rng = np.random.default_rng(seed)
    rows = [models(rng, 400) + ((rng.choice([0.0, 0.3, 1.0, 4.0], 400),) if weigh else ()) for _ in range(600)]
    differences = [paired_difference(*one) for one in rows]
    found = {
        name: [(getattr(one, name), getattr(one, f"{name}_standard_error")) for one in differences]
        for name in ("auc", "logloss")
    }
    of_one = [(labels, first, *weights) for labels, first, _, *weights in rows]
    found["calibration"] = [(binary_metrics(*one).calibration, calibration_standard_error(*one)) for one in of_one]
    for name, pairs in found.items():
        values, errors = np.array(pairs).T
        assert np.sqrt(np.mean(errors**2)) == pytest.approx(np.std(values), rel=0.1), name
    assert math.isnan(calibration_standard_error(np.zeros(5), np.zeros(5)))


def test_a_model_does_not_differ_from_itself(seed):
    labels, first, _ = models(np.random.default_rng(seed), 50)
    found = paired_difference(labels, first, first)
    assert (found.auc, found.auc_standard_error, found.logloss, found.logloss_standard_error) == (0, 0, 0, 0)


def test_without_both_classes_the_auc_is_undefined():
    found = paired_difference(np.ones(3), np.arange(3.0), np.arange(3.0) + 1)
    assert math.isnan(found.auc)
    assert math.isnan(found.auc_standard_error)
    assert found.logloss < 0
