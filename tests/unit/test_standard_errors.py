"""Standard errors of metrics against a model that says nothing, and against how estimates really scatter."""

import math

import numpy as np
import pytest

from torchdlrm.judged import Judged
from torchdlrm.metrics import METRICS


def models(rng, num_rows):
    """Labels, and logits of a worse and a better model, with ties."""
    truth = rng.normal(size=num_rows)
    labels = (rng.random(num_rows) < 1 / (1 + np.exp(-truth))).astype(np.float32)
    worse, better = truth + rng.normal(size=num_rows), truth + rng.normal(0, 0.5, num_rows)
    return labels, worse.round(1).astype(np.float32), better.round(1).astype(np.float32)


def difference(name, labels, first, second, weights=None):
    return METRICS[name].difference(*(Judged.of(labels, logits, weights) for logits in (first, second)))


def estimate(name, labels, logits, weights=None):
    return METRICS[name].estimate(Judged.of(labels, logits, weights))


def test_the_standard_error_of_one_auc_is_that_of_its_difference_from_no_model(seed):
    """A model that says the same of every row has wins of one half, which do not scatter."""
    labels, scores, _ = models(np.random.default_rng(seed), 120)
    weights = np.random.default_rng(seed).integers(0, 3, len(labels)).astype(np.float64)
    for of in (None, weights):
        expected = difference("auc", labels, np.zeros_like(scores), scores, of).standard_error
        assert estimate("auc", labels, scores, of).standard_error == pytest.approx(expected, rel=1e-12)
    assert math.isnan(estimate("auc", np.ones(5), np.arange(5.0)).standard_error)


@pytest.mark.parametrize("weigh", [False, True])
def test_standard_errors_are_how_much_estimates_scatter(weigh, seed):
    rng = np.random.default_rng(seed)
    rows = [models(rng, 400) + ((rng.choice([0.0, 0.3, 1.0, 4.0], 400),) if weigh else ()) for _ in range(600)]
    found = {name: [difference(name, *one) for one in rows] for name in ("auc", "logloss")}
    found["calibration"] = [estimate("calibration", labels, first, *weights) for labels, first, _, *weights in rows]
    for name, estimates in found.items():
        values, errors = np.array([(one.value, one.standard_error) for one in estimates]).T
        assert np.sqrt(np.mean(errors**2)) == pytest.approx(np.std(values), rel=0.1), name
    assert math.isnan(estimate("calibration", np.zeros(5), np.zeros(5)).standard_error)


def test_without_both_classes_the_difference_of_aucs_is_undefined():
    labels, first = np.ones(3), np.arange(3.0)
    assert math.isnan(difference("auc", labels, first, first + 1).value)
    assert math.isnan(difference("auc", labels, first, first + 1).standard_error)
    assert difference("logloss", labels, first, first + 1).value < 0
