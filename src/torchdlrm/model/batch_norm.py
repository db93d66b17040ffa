"""Normalises over the rows of the global batch, so that a model learns the same on any number of processes.

`torch.nn.BatchNorm1d` takes mean and variance of the rows of its own process, rows of padding included, and each
process would have running statistics of its own; `torch.nn.SyncBatchNorm` is for GPUs alone.  This one is for both.

Cost: on several processes one all-reduce of 2 C + 1 numbers in the forward pass and one in the backward pass.  It is
the one module that asks for the other processes; a loss of a model's own may, by `global_mean`.

B rows of the batch on this rank, C features, R ranks.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.nn.functional import batch_norm


class GlobalBatchNorm1d(nn.Module):
    """Batch normalisation whose mean and variance are those of the global batch, over all processes.

    As `torch.nn.BatchNorm1d` on the whole batch, but for a batch of one row, which has no variance: it is normalised by
    the running statistics, and they stay as they are.  There is no count of batches: all of the state is float32.

    In a process group every process must call it the same number of times.

    Args:
        num_features: C.
        eps: is added to the variance.
        momentum: how much of a batch goes into the running statistics, which evaluation uses.
        device: of parameters and buffers.

    Attributes:
        num_padding: how many of the rows that come next, the last ones, are padding: they count for nothing.
            `DLRMTrain` sets it before each batch.
    """

    def __init__(
        self, num_features: int, eps: float = 1e-5, momentum: float = 0.1, device: torch.device | None = None
    ) -> None:
        super().__init__()
        self.num_features, self.eps, self.momentum, self.num_padding = num_features, eps, momentum, 0
        self.weight = nn.Parameter(torch.ones(num_features, device=device))
        self.bias = nn.Parameter(torch.zeros(num_features, device=device))
        self.running_mean: Tensor
        self.running_var: Tensor
        self.register_buffer("running_mean", torch.zeros(num_features, device=device))
        self.register_buffer("running_var", torch.ones(num_features, device=device))

    def forward(self, inputs_BC: Tensor) -> Tensor:
        """Maps [B, C] to [B, C], of the same dtype; statistics are float32, of float64 float64.

        Raises:
            ValueError: the input has another shape.
        """
        if inputs_BC.dim() != 2 or inputs_BC.shape[1] != self.num_features:
            msg = f"GlobalBatchNorm1d({self.num_features}) takes [rows, {self.num_features}], got {[*inputs_BC.shape]}"
            raise ValueError(msg)
        if not self.training:
            return self._by_torch(inputs_BC, by_batch=False)
        if not dist.is_initialized() or dist.get_world_size() == 1:
            assert not self.num_padding, "a single process has no padding"
            return self._by_torch(inputs_BC, by_batch=len(inputs_BC) > 1)
        exact_BC = _exact(inputs_BC)
        # In float64 the squares of float32 are exact, so that nothing is lost where the mean is large.
        rows_BC = exact_BC[: len(exact_BC) - self.num_padding].double()
        (mean_C, square_C), num_rows = _over_processes(torch.stack([rows_BC, rows_BC.square()], dim=1))
        variance_C = (square_C - mean_C.square()).clamp(min=0).to(exact_BC.dtype)
        mean_C = mean_C.to(exact_BC.dtype)
        # No more than one row on any rank, so all of them ask; otherwise no rank waits for its GPU.
        if len(inputs_BC) <= 1 and int(num_rows) == 1:
            return self._by_torch(inputs_BC, by_batch=False)
        with torch.no_grad():
            self.running_mean.lerp_(mean_C, self.momentum)
            self.running_var.lerp_(variance_C * (num_rows / (num_rows - 1)), self.momentum)
        normal_BC = (exact_BC - mean_C) * torch.rsqrt(variance_C + self.eps)
        return torch.addcmul(self.bias, normal_BC, self.weight).to(inputs_BC.dtype)

    def extra_repr(self) -> str:
        """What `print(model)` shows of it."""
        return f"{self.num_features}, eps={self.eps}, momentum={self.momentum}"

    def _by_torch(self, inputs_BC: Tensor, *, by_batch: bool) -> Tensor:
        """By the statistics of these rows, or by the running ones."""
        return batch_norm(
            *(inputs_BC, self.running_mean, self.running_var, self.weight, self.bias),
            training=by_batch,
            momentum=self.momentum,
            eps=self.eps,
        )


def _exact(tensor: Tensor) -> Tensor:
    """In float32, or float64 where it is that."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def global_mean(values: Tensor) -> Tensor:
    """The mean over the rows of the global batch, with its gradient, on any number of processes: for a model's `loss`.

    In a process group every process must call it the same number of times. A mean by weights w is
    `global_mean(w * values) / global_mean(w)`.

    Args:
        values: of this process's rows, without padding, perhaps none: float [B] or [B, C].

    Returns:
        Float [] or [C], the same on every process.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return values.mean(0)
    return _over_processes(values)[0]


def _over_processes(values: Tensor) -> tuple[Tensor, Tensor]:
    """The mean over the rows of all processes, bit for bit the same on each, and their number []."""
    mine = torch.cat([values.sum(0).view(-1), values.new_full((1,), len(values))])
    sums: Tensor = _Summed.apply(mine)  # type: ignore[no-untyped-call]
    return (sums[:-1] / sums[-1]).view(values.shape[1:]), sums[-1]


class _Summed(torch.autograd.Function):
    """The sum over processes; its gradient is that of the sum of all ranks' losses, of which each has every row's."""

    @staticmethod
    def forward(ctx: Any, values: Tensor) -> Tensor:
        del ctx
        total = values.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        """The sum of what the ranks have."""
        return _Summed.forward(ctx, gradient)
