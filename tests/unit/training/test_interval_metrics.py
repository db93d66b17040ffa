"""Metrics of the steps: sums and counts say what a sort of all logits says."""

import numpy as np
import pytest
import torch
from torch import distributed as dist

from torchdlrm.metrics import binary_metrics
from torchdlrm.ranks import auc_from_counts
from torchdlrm.training import interval_metrics
from torchdlrm.training.interval_metrics import IntervalMetrics
from torchdlrm.training.processes.process_group import Ranks

ALONE = Ranks(0, 1, 1, torch.device("cpu"))


def predictions(num_rows, seed):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(num_rows, generator=generator) * 1.2 - 1.5
    return logits, torch.bernoulli(logits.sigmoid(), generator=generator)


def measured(parts, ranks=ALONE):
    interval = IntervalMetrics(ranks.device)
    for part in parts:
        interval.add(*part)
    return interval.take(ranks)


def assert_same(found, expected, *, auc):
    assert found.rows == expected.rows
    assert found.accuracy == expected.accuracy
    for name in ("logloss", "ne", "calibration"):
        assert getattr(found, name) == pytest.approx(getattr(expected, name), rel=1e-12, nan_ok=True), name
    assert found.auc == pytest.approx(expected.auc, abs=auc, nan_ok=True)


@pytest.mark.parametrize(("num_rows", "auc"), [(2_000, 3e-5), (300_000, 1e-6)])
def test_they_are_those_of_all_logits_and_auc_nearly(seed, num_rows, auc, monkeypatch):
    monkeypatch.setattr(interval_metrics, "_BLOCK_ROWS", 100_000)  # several reductions
    logits, labels = predictions(num_rows, seed)
    found = measured(zip(logits.split(1_001), labels.split(1_001), strict=True))
    assert_same(found, binary_metrics(labels.numpy(), logits.numpy()), auc=auc)
    assert found.auc > 0.6
    counts = [np.histogram(logits[labels == label], 1 << 16, (-16, 16))[0] for label in (1, 0)]
    assert found.auc == auc_from_counts(*counts), "to the last bit: bins are counted in integers"


def test_rows_count_as_often_as_they_weigh(seed):
    logits, labels = predictions(2_000, seed)
    weights = torch.rand(2_000, generator=torch.Generator().manual_seed(seed)) * 3
    weights[:100] = 0
    found = measured(zip(logits.split(1_001), labels.split(1_001), weights.split(1_001), strict=True))
    expected = binary_metrics(labels.numpy(), logits.numpy(), weights.numpy())
    assert vars(found) == pytest.approx(vars(expected), abs=3e-5)
    assert abs(expected.logloss - binary_metrics(labels.numpy(), logits.numpy()).logloss) > 1e-3


@pytest.mark.parametrize("label", [0.0, 1.0])
def test_rows_of_one_label_have_no_auc(label):
    logits = torch.tensor([-1.0, 0.0, 3.0])
    expected = binary_metrics(np.full(3, label), logits.numpy())
    assert_same(measured([(logits, torch.full((3,), label))]), expected, auc=0)
    assert np.isnan(expected.auc)


def test_logits_beyond_the_bins_count_where_the_bins_end():
    logits = torch.tensor([-1e30, -20.0, 20.0, 1e30])
    found = measured([(logits, torch.tensor([0.0, 0.0, 1.0, 1.0]))])
    assert (found.auc, found.rows, found.accuracy) == (1.0, 4, 1.0)


def test_a_prediction_that_is_no_number_shows_in_the_loss():
    assert np.isnan(measured([(torch.tensor([0.5, float("nan")]), torch.tensor([1.0, 0.0]))]).logloss)


def test_what_ranks_exchange_does_not_grow_with_the_rows(seed, monkeypatch):
    """Of two ranks, whose rows are the same: each would otherwise send all its logits."""
    sent = []

    def twice(totals, dst, group):
        assert (dst, group) == (0, "everyone")
        sent.append(totals.nbytes)
        totals.mul_(2)

    monkeypatch.setattr(dist, "reduce", twice)
    monkeypatch.setattr(Ranks, "process_group", "everyone")
    for num_rows in (10, 1_000_000):
        logits, labels = predictions(num_rows, seed)
        found = measured([(logits, labels)], Ranks(0, 2, 2, torch.device("cpu")))
        expected = binary_metrics(labels.repeat(2).numpy(), logits.repeat(2).numpy())
        assert_same(found, expected, auc=1e-6)
    assert sent[0] == sent[1] < 1.1e6
