"""ROC, precision and recall, and histograms: exact at their points, whatever the blocks, by scikit-learn and NumPy."""

import numpy as np
import pytest
from sklearn.metrics import precision_recall_curve, roc_curve

import torchdlrm.judged
import torchdlrm.judging.curves as module
from torchdlrm.judged import Judged
from torchdlrm.judging.curves import curves


@pytest.fixture
def rng(seed):
    return np.random.default_rng(seed)


def rows_of(rng, num_rows=20_000, *, weighted=False, distinct=None):
    """Labels and logits of which clicks have larger ones; `distinct` logits, or all differ."""
    logits = rng.normal(-2, 1.3, num_rows).astype(np.float32)
    labels = (rng.random(num_rows) < 1 / (1 + np.exp(-logits))).astype(np.int8)
    if distinct is not None:
        logits = np.round(logits * distinct / 8).astype(np.float32)
    return labels, logits, rng.integers(0, 4, num_rows).astype(np.float32) if weighted else None


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("distinct", [None, 8])
def test_each_point_is_one_of_scikit_learns(rng, weighted, distinct, monkeypatch):
    labels, logits, weights = rows_of(rng, weighted=weighted, distinct=distinct)
    monkeypatch.setattr(torchdlrm.judged, "_BLOCK_ROWS", 3_001)
    found = curves(Judged.of(labels, logits, weights))
    fpr, tpr, _ = roc_curve(labels, logits, sample_weight=weights, drop_intermediate=False)
    precision, recall, _ = precision_recall_curve(labels, logits, sample_weight=weights)
    rate = found.click_rate
    by_recall = [(y, rate * y / (rate * y + (1 - rate) * x)) for x, y in found.roc if y]
    for points, exact in ((found.roc, (fpr, tpr)), (by_recall, (recall, precision))):
        everything = np.column_stack(exact)
        assert len(points) <= 200
        distance = [np.abs(everything - point).max(axis=1).min() for point in points]
        assert max(distance) < 1e-9
    assert found.roc[0] == (0, 0)
    assert found.roc[-1] == (1, 1)
    assert np.all(np.diff(found.roc, axis=0) >= 0)
    # Between the points little is lost.
    x, y = np.array(found.roc).T
    assert np.trapezoid(y, x) == pytest.approx(Judged.of(labels, logits, weights).auc(), abs=2e-4)
    assert found.click_rate == pytest.approx(np.average(labels, weights=weights))


@pytest.mark.parametrize("weighted", [False, True])
def test_the_bins_hold_what_numpy_counts(rng, weighted):
    labels, logits, weights = rows_of(rng, weighted=weighted)
    found = curves(Judged.of(labels, logits, weights))
    edges = np.array(found.edges)
    inside = np.clip(logits, edges[0], np.nextafter(np.float32(edges[-1]), np.float32(-100)))
    for shares, rows in ((found.others, labels == 0), (found.clicked, labels == 1)):
        counts, _ = np.histogram(inside[rows], edges, weights=None if weights is None else weights[rows].astype(float))
        assert shares == pytest.approx((counts / counts.sum()).tolist(), abs=1e-9)
        assert sum(shares) == pytest.approx(1)


def test_thresholds_are_taken_from_a_sample_and_points_stay_exact(rng, monkeypatch):
    labels, logits, _ = rows_of(rng)
    monkeypatch.setattr(module, "_SAMPLE_ROWS", 1_000)
    fpr, tpr, _ = roc_curve(labels, logits, drop_intermediate=False)
    everything = np.column_stack([fpr, tpr])
    found = curves(Judged.of(labels, logits)).roc
    assert len(found) > 150
    assert max(np.abs(everything - point).max(axis=1).min() for point in found) < 1e-9


@pytest.mark.parametrize(
    ("labels", "logits"),
    [([0, 0, 0], [0.1, 0.2, 0.3]), ([1, 1], [0.1, 0.2]), ([0, 1], [np.nan, 0.2]), ([], [])],
)
def test_rows_of_one_class_or_without_predictions_have_no_curves(labels, logits):
    assert curves(Judged.of(np.array(labels, np.int8), np.array(logits, np.float32))) is None


@pytest.mark.parametrize("logits", [[0.0, 0.0], [-50.0, 50.0], [-np.inf, np.inf], [1.0, 1.0], [3.0, 2.0]])
def test_few_and_extreme_predictions_have_curves(logits):
    found = curves(Judged.of(np.array([0, 1], np.int8), np.array(logits, np.float32)))
    assert found.roc[0] == (0, 0)
    assert found.roc[-1] == (1, 1)
    assert len(found.edges) == 51
    assert np.all(np.diff(found.edges) > 0)
    assert [sum(found.clicked), sum(found.others)] == pytest.approx([1, 1])
