"""Metrics against scikit-learn, and where it has none against the definition."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import accuracy_score, log_loss, roc_auc_score

from torchdlrm import judged
from torchdlrm.metrics import BinaryMetrics, binary_metrics, why_undefined
from torchdlrm.ranks import auc, auc_from_counts

# Few distinct scores: most pairs are ties.
tied_rows = st.lists(st.tuples(st.booleans(), st.integers(-3, 3)), min_size=2, max_size=80)
# Up to where scikit-learn, which takes probabilities, still has 1 - p to 10 digits.
any_rows = st.lists(st.tuples(st.booleans(), st.floats(-12, 12, width=32)), min_size=2, max_size=80)


def arrays(rows, dtype):
    labels = np.array([label for label, _ in rows], dtype=np.float32)
    return labels, np.array([score for _, score in rows], dtype=dtype)


def sigmoid(logits):
    return 1 / (1 + np.exp(-logits.astype(np.float64)))


@given(st.one_of(tied_rows, any_rows), st.sampled_from([np.float32, np.float64]))
def test_auc_with_ties_equals_scikit_learn(rows, dtype):
    labels, scores = arrays(rows, dtype)
    if labels.min() == labels.max():
        assert math.isnan(auc(labels, scores))
    else:
        assert auc(labels, scores) == pytest.approx(roc_auc_score(labels, scores), abs=1e-12)


@given(tied_rows)
def test_auc_from_counts_equals_scikit_learn_on_the_rows(rows):
    labels, scores = arrays(rows, np.float64)
    clicks, others = (np.bincount((scores[labels == label] + 3).astype(int), minlength=7) for label in (1, 0))
    if labels.min() == labels.max():
        assert math.isnan(auc_from_counts(clicks, others))
    else:
        assert auc_from_counts(clicks, others) == pytest.approx(roc_auc_score(labels, scores), abs=1e-12)


# Whole weights and others, and rows that weigh nothing.
weights_of_rows = st.sampled_from([0.0, 0.25, 1.0, 1.0, 2.0, 3.7])
any_scores = st.one_of(st.integers(-3, 3), st.floats(-12, 12, width=32))
weighted_rows = st.lists(st.tuples(st.booleans(), any_scores, weights_of_rows), min_size=2, max_size=80)


@given(weighted_rows, st.booleans())
def test_metrics_equal_scikit_learn(rows, are_weighted):
    labels, logits = arrays([row[:2] for row in rows], np.float32)
    weights = np.array([row[2] for row in rows], np.float32) if are_weighted else None
    got = binary_metrics(labels, logits, weights)
    assert got.rows == len(rows)
    if weights is not None and not weights.any():
        assert all(math.isnan(value) for name, value in got.as_dict().items() if name != "rows")
        return
    p, counted = sigmoid(logits), labels if weights is None else labels[weights > 0]
    expected = log_loss(labels, p, labels=[0, 1], sample_weight=weights)
    assert got.logloss == pytest.approx(expected, rel=1e-9, abs=1e-12)
    assert got.accuracy == pytest.approx(accuracy_score(labels, logits > 0, sample_weight=weights))
    rate = np.average(labels.astype(float), weights=weights)
    if counted.any():
        assert got.calibration == pytest.approx(np.average(p, weights=weights) / rate)
    if counted.min() == counted.max():
        assert math.isnan(got.auc)
        assert math.isnan(got.ne)
        return
    assert got.auc == pytest.approx(roc_auc_score(labels, logits, sample_weight=weights), abs=1e-12)
    base = log_loss(labels, np.full(len(rows), rate), labels=[0, 1], sample_weight=weights)
    assert got.ne == pytest.approx(got.logloss / base)


@given(weighted_rows)
def test_a_row_that_weighs_two_is_two_rows(rows):
    labels, logits = arrays([row[:2] for row in rows], np.float32)
    twice = np.array([row[2] > 1 for row in rows])
    repeated = np.where(twice, 2, 1)
    expected = binary_metrics(np.repeat(labels, repeated), np.repeat(logits, repeated)).as_dict()
    found = binary_metrics(labels, logits, repeated.astype(np.float32)).as_dict()
    assert {**found, "rows": expected["rows"]} == pytest.approx(expected, nan_ok=True)


def test_weights_that_are_none_are_refused():
    labels, logits = np.array([0, 1]), np.array([0.5, 0.25])
    for weights, message in (
        (np.array([1.0, -0.5]), "weights: must be finite and at least 0, got -0.5"),
        (np.array([math.nan, 1.0]), "got nan"),
        (np.array([1.0]), r"weights: must be as many as labels, got shapes \(1,\) and \(2,\)"),
    ):
        with pytest.raises(ValueError, match=message):
            binary_metrics(labels, logits, weights)


def test_auc_of_a_nan_score_is_nan_instead_of_a_wrong_number():
    assert math.isnan(auc(np.array([0, 1, 1]), np.array([0.1, math.nan, 0.3])))


def test_metrics_do_not_depend_on_where_blocks_end(monkeypatch):
    rng = np.random.default_rng(1)
    labels, logits = rng.integers(0, 2, 1000), rng.normal(size=1000)
    whole = binary_metrics(labels, logits)
    monkeypatch.setattr(judged, "_BLOCK_ROWS", 7)
    assert binary_metrics(labels, logits).as_dict() == pytest.approx(whole.as_dict(), rel=1e-13)


def test_logloss_is_stable_where_the_sigmoid_is_not():
    def logloss(labels, logits):
        return binary_metrics(np.array(labels), np.array(logits)).logloss

    assert logloss([1, 0], [1000.0, -1000.0]) == 0.0
    assert logloss([0, 1], [1000.0, -1000.0]) == 1000.0
    # 1 - p is 0 in float64 here: a logloss of probabilities would be infinite or clipped.
    assert logloss([0], [50.0]) == 50.0
    assert logloss([1], [50.0]) == pytest.approx(math.exp(-50))


@pytest.mark.parametrize("label", [0, 1])
def test_one_class_has_no_auc_and_no_ne_but_a_logloss(label):
    got = binary_metrics(np.full(3, label), np.array([-1.0, 0.0, 2.0]))
    assert math.isnan(got.auc)
    assert math.isnan(got.ne)
    assert math.isnan(got.calibration) == (label == 0)
    assert got.logloss > 0


def test_no_rows_have_no_metrics():
    got = binary_metrics(np.zeros(0), np.zeros(0))
    assert got.rows == 0
    assert all(math.isnan(value) for name, value in got.as_dict().items() if name != "rows")


def test_as_dict_has_the_metrics_in_order():
    found = binary_metrics(np.array([0, 1]), np.array([-1.0, 1.0])).as_dict()
    assert list(found) == ["rows", "auc", "logloss", "ne", "calibration", "accuracy"]


def test_arguments_the_wrong_way_round_are_refused():
    labels, logits = np.array([0, 1, 1]), np.array([-1.5, 0.25, 2.0])
    with pytest.raises(ValueError, match=r"labels: must be 0 or 1, got -1\.5; the order is binary_metrics\(labels, "):
        binary_metrics(logits, labels)
    with pytest.raises(ValueError, match=r"got shapes \(3,\) and \(2,\)"):
        binary_metrics(labels, logits[:2])


def test_why_there_is_no_auc_is_known_from_the_metrics_alone():
    def why(labels, logits, form=BinaryMetrics.as_dict):
        return why_undefined(form(binary_metrics(np.array(labels, np.float32), np.array(logits, np.float32))))

    unweighted = binary_metrics(np.array([0, 1]), np.array([1.0, 2.0]), np.zeros(2))
    assert why_undefined(unweighted.as_dict()) == "the weights of all rows are 0"
    for form in (BinaryMetrics.as_dict, BinaryMetrics.as_json):
        assert why([0, 0], [1, 2], form) == "all labels are 0"
        assert why([1, 1], [1, 2], form) == "all labels are 1"
        assert why([], [], form) == "there are no rows"
        assert why([0, 1], [1, 2], form) == ""
    assert why([0, 1], [1, math.nan]) == "", "the predictions' fault, not the labels'"
