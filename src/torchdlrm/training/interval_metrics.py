"""Measures the predictions of a training's steps without stopping them.

In: logits and labels of each step, where they were computed.  Out: `BinaryMetrics` of an interval on rank 0.  They are
reduced to sums and to counts of logits where they are: what the ranks exchange and the host reads is a megabyte,
however many rows the interval had. Exact AUC needs all logits in one place, sorted, while every rank waits.

B rows of a batch on this rank, N rows that are reduced together, K bins.
"""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch import distributed as dist
from torch.nn.functional import logsigmoid

from torchdlrm.judged import Judged, MetricSums
from torchdlrm.metrics import BinaryMetrics, metrics_of
from torchdlrm.ranks import auc_from_counts
from torchdlrm.training.processes.process_group import Ranks

# Logits are counted in bins of 1/2,048 from -16 to 16 (a probability of 1e-7), all others in the outermost two. Pairs
# in one bin count half: of a million rows AUC is then exact to about 1e-7, of 6,000 to 1e-5.
_NUM_BINS, _LIMIT = 1 << 16, 16.0
_BLOCK_ROWS = 1 << 20  # float64 temporaries of a block stay at 8 MB each
# Label and logit of each bin: those of rows that were not clicked come first.
_BINS = np.repeat([0, 1], _NUM_BINS), np.tile((np.arange(_NUM_BINS) + 0.5) * (2 * _LIMIT / _NUM_BINS) - _LIMIT, 2)


@dataclass(frozen=True)
class _Counted(Judged):
    """Bins in place of rows, each weighing what its rows do together: `weights`, also where rows have none."""

    weights: NDArray[np.float64]

    def auc(self) -> float:
        """As of the rows, had they the logits of their bins; of rows without weights it is counted in integers."""
        counts = self.weights if self.sums.weight_sum is not None else self.weights.astype(np.int64)
        others, clicks = counts.reshape(2, -1)
        return auc_from_counts(clicks, others)


class IntervalMetrics:
    """Metrics of the rows since they were last taken, on this rank and all others; up to 16 MB on its device."""

    def __init__(self, device: torch.device) -> None:
        self._device, self._has_weights = device, False
        self._clear()

    def add(self, logits_B: Tensor, labels_B: Tensor, *row_weights_B: Tensor) -> None:
        """Count a batch: float32 [B] each; with weights always, or never."""
        self._waiting.append((logits_B, labels_B, *row_weights_B))
        self._waiting_rows += len(logits_B)
        if self._waiting_rows >= _BLOCK_ROWS:
            self._reduce()

    def take(self, ranks: Ranks) -> BinaryMetrics | None:
        """The metrics of all ranks' rows on rank 0, and None elsewhere; begins a new interval.

        All are exact but AUC, for which logits in the same bin are equal. Every rank must call this.
        """
        self._reduce()
        if ranks.world_size > 1:
            dist.reduce(self._totals, dst=0, group=ranks.process_group)
        totals = self._totals.cpu().numpy() if ranks.is_first else None
        self._clear()
        if totals is None:
            return None
        counts, (rows, right, prediction_sum, logloss_sum) = totals[: 2 * _NUM_BINS], totals[2 * _NUM_BINS :].tolist()
        others, clicks = counts.reshape(2, -1).sum(axis=1)
        weight_sum = clicks + others if self._has_weights else None
        sums = MetricSums(int(rows), clicks, right, prediction_sum, logloss_sum, weight_sum)
        return metrics_of(_Counted(*_BINS, counts, sums))

    def _clear(self) -> None:
        self._waiting: list[tuple[Tensor, ...]] = []
        self._waiting_rows = 0
        # Rows in each bin, not clicked and clicked, each as often as it weighs; then the number of rows and three sums.
        # Counts below 2**53 are exact in float64.
        self._totals = torch.zeros(2 * _NUM_BINS + 4, dtype=torch.float64, device=self._device)

    def _reduce(self) -> None:
        if not self._waiting:
            return
        logits_N, labels_N, *weights = (torch.cat(column).double() for column in zip(*self._waiting, strict=True))
        clicked_N = labels_N != 0
        self._waiting, self._waiting_rows, self._has_weights = [], 0, bool(weights)
        # NaN has no bin: its loss, which is NaN too, ends the training.
        bins_N = (torch.nan_to_num(logits_N) + _LIMIT).mul_(_NUM_BINS / (2 * _LIMIT)).clamp_(0, _NUM_BINS - 1).long()
        cells_N = bins_N.add_(clicked_N, alpha=_NUM_BINS)
        # Not bincount, for which the host would wait: on a GPU it asks for the largest cell first.
        self._totals.scatter_add_(0, cells_N, weights[0] if weights else torch.ones_like(logits_N))
        loss_N = logsigmoid(torch.where(clicked_N, logits_N, -logits_N)).neg_()
        right_N = ((logits_N > 0) == clicked_N).double()
        summed = [right_N, logits_N.sigmoid(), loss_N]
        sums = [(weights[0] * values_N if weights else values_N).sum() for values_N in summed]
        self._totals[2 * _NUM_BINS :] += torch.stack([logits_N.new_full((), len(logits_N)), *sums])
