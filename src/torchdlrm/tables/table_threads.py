"""Runs FBGEMM's tables on all cores of a process.

FBGEMM's CPU kernels run on one core: the builds that pip installs have no OpenMP in them. Tables do not depend on each
other, so here they are dealt out to threads, each of which looks up and updates its share with the same kernels: the
same bits, in less time. Under autocast the pooled embeddings are written in its precision at once (half the bytes to
send, too), and their gradient is cast back by the thread that needs it.

B rows of the batch, T tables of this kernel, one feature each, D_t their dimensions.
"""

import itertools
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Self

import torch
from fbgemm_gpu.split_embedding_configs import EmbOptimType
from fbgemm_gpu.split_table_batched_embeddings_ops_training import SplitTableBatchedEmbeddingBagsCodegen
from torch import Tensor, nn

from torchdlrm.tables.optimizers import table_kernels

_BACKWARD = {
    EmbOptimType.EXACT_ROWWISE_ADAGRAD: "split_embedding_backward_codegen_rowwise_adagrad_cpu",
    EmbOptimType.EXACT_ADAGRAD: "split_embedding_backward_codegen_adagrad_cpu",
    EmbOptimType.EXACT_SGD: "split_embedding_backward_codegen_sgd_cpu",
}

_NO_WEIGHTS = None  # FBGEMM takes an empty tensor for weights that are there


def use_table_threads(model: nn.Module, *, num_threads: int) -> None:
    """Deal the tables of a sharded model on CPU out to threads; tables on a GPU are left alone."""
    pool = ThreadPoolExecutor(num_threads, "torchdlrm-tables", initializer=_single_threaded)
    for kernel in table_kernels(model):
        if kernel.use_cpu and kernel.optimizer in _BACKWARD and _has_a_feature_a_table(kernel):
            kernel.forward = _TableThreads(kernel, pool, num_threads)


def _single_threaded() -> None:
    """A thread of ours casts by itself: OpenMP would give each one a team of its own."""
    torch.set_num_threads(1)


def _has_a_feature_a_table(kernel: SplitTableBatchedEmbeddingBagsCodegen) -> bool:
    return list(kernel.feature_table_map) == list(range(len(kernel.embedding_specs)))


@dataclass(frozen=True)
class _Share:
    """The tables first to end - 1 of a kernel, as FBGEMM's operators want to be told of them."""

    first: int
    end: int
    columns: slice
    weights_offsets: Tensor
    weights_placements: Tensor
    D_offsets: Tensor
    hash_size_cumsum: Tensor
    momentum_offsets: Tensor | None
    momentum_placements: Tensor | None

    @classmethod
    def of(cls, kernel: SplitTableBatchedEmbeddingBagsCodegen, first: int, end: int) -> Self:
        dims, rows = kernel.D_offsets, kernel.hash_size_cumsum
        has_state = kernel.optimizer != EmbOptimType.EXACT_SGD
        return cls(
            first=first,
            end=end,
            columns=slice(int(dims[first]), int(dims[end])),
            weights_offsets=kernel.weights_offsets[first:end],
            weights_placements=kernel.weights_placements[first:end],
            D_offsets=dims[first : end + 1] - dims[first],
            hash_size_cumsum=rows[first : end + 1] - rows[first],
            momentum_offsets=kernel.momentum1_offsets[first:end] if has_state else None,
            momentum_placements=kernel.momentum1_placements[first:end] if has_state else None,
        )


def _deal_out(kernel: SplitTableBatchedEmbeddingBagsCodegen, num_shares: int) -> list[_Share]:
    """Neighbouring tables, so cut that the shares have about as many columns each."""
    dims = kernel.D_offsets
    num_tables = len(dims) - 1
    wanted = torch.arange(1, num_shares) * (int(dims[-1]) / num_shares)
    cuts = sorted({0, num_tables, *torch.searchsorted(dims.double(), wanted.double()).tolist()})
    return [_Share.of(kernel, first, end) for first, end in itertools.pairwise(cuts)]


class _TableThreads:
    """Stands in for a kernel's `forward`."""

    def __init__(
        self, kernel: SplitTableBatchedEmbeddingBagsCodegen, pool: ThreadPoolExecutor, num_threads: int
    ) -> None:
        self.kernel, self.pool = kernel, pool
        self.shares = _deal_out(kernel, num_threads)
        self._original_forward = kernel.forward
        # Tells autograd that somebody wants the gradient; the tables take theirs during the backward.
        self._placeholder = torch.zeros(0, requires_grad=True)

    def __call__(self, indices: Tensor, offsets: Tensor, per_sample_weights: Tensor | None = None) -> Tensor:
        """Maps the ids of T x B cells and their offsets, both int64, to pooled embeddings [B, sum of D_t]."""
        if per_sample_weights is not None:
            return self._original_forward(indices, offsets, per_sample_weights)
        indices, offsets, _, _ = self.kernel.prepare_inputs(indices, offsets, force_cast_input_types=True)
        return _Lookup.apply(self._placeholder, self, indices, offsets)  # type: ignore[no-untyped-call]

    def each_share(self, task: Callable[[_Share], None]) -> None:
        """Do a task for all shares at once, without recording it: each thread has a grad mode of its own."""

        def unrecorded(share: _Share) -> None:
            with torch.no_grad():
                task(share)

        if len(self.shares) == 1:
            unrecorded(self.shares[0])
            return
        for future in [self.pool.submit(unrecorded, share) for share in self.shares]:
            future.result()

    def cells_of(self, share: _Share, indices: Tensor, offsets: Tensor) -> tuple[Tensor, Tensor]:
        """The ids of a share's features and their offsets."""
        num_rows = (len(offsets) - 1) // self.shares[-1].end
        bounds = offsets[share.first * num_rows : share.end * num_rows + 1]
        first, end = int(bounds[0]), int(bounds[-1])
        return indices[first:end], bounds - first

    def look_up(self, share: _Share, indices: Tensor, offsets: Tensor) -> Tensor:
        """Pooled embeddings of a share's features: float32 [B, columns of the share]."""
        kernel = self.kernel
        share_indices, share_offsets = self.cells_of(share, indices, offsets)
        out: Tensor = torch.ops.fbgemm.split_embedding_codegen_forward_cpu(
            weights=kernel.weights_host,
            weights_offsets=share.weights_offsets,
            D_offsets=share.D_offsets,
            total_D=share.columns.stop - share.columns.start,
            hash_size_cumsum=share.hash_size_cumsum,
            indices=share_indices,
            offsets=share_offsets,
            pooling_mode=int(kernel.pooling_mode),
            indice_weights=_NO_WEIGHTS,
            output_dtype=kernel.output_dtype,
        )
        return out

    def update(self, share: _Share, grad: Tensor, indices: Tensor, offsets: Tensor) -> None:
        """Let the optimizer step on a share's tables; `grad` is float32 [B, columns of the share], contiguous."""
        kernel, args = self.kernel, self.kernel.optimizer_args
        share_indices, share_offsets = self.cells_of(share, indices, offsets)
        state: dict[str, Any] = {}
        if share.momentum_offsets is not None:
            state = {
                "momentum1_host": kernel.momentum1_host,
                "momentum1_placements": share.momentum_placements,
                "momentum1_offsets": share.momentum_offsets,
                "eps": args.eps,
            }
        getattr(torch.ops.fbgemm, _BACKWARD[kernel.optimizer])(
            grad_output=grad,
            host_weights=kernel.weights_host.detach(),
            weights_placements=share.weights_placements,
            weights_offsets=share.weights_offsets,
            D_offsets=share.D_offsets,
            max_D=kernel.max_D,
            hash_size_cumsum=share.hash_size_cumsum,
            total_hash_size_bits=kernel.total_hash_size_bits,
            indices=share_indices,
            offsets=share_offsets,
            pooling_mode=int(kernel.pooling_mode),
            indice_weights=_NO_WEIGHTS,
            stochastic_rounding=args.stochastic_rounding,
            learning_rate_tensor=kernel.learning_rate_tensor,
            **state,
        )


class _Lookup(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, _: Tensor, threads: _TableThreads, indices: Tensor, offsets: Tensor) -> Tensor:
        num_tables = threads.shares[-1].end
        dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else torch.float32
        out = torch.empty((len(offsets) - 1) // num_tables, threads.shares[-1].columns.stop, dtype=dtype)

        def look_up(share: _Share) -> None:
            out[:, share.columns] = threads.look_up(share, indices, offsets)

        threads.each_share(look_up)
        ctx.threads = threads
        ctx.save_for_backward(indices, offsets)
        return out

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> tuple[None, None, None, None]:
        indices, offsets = ctx.saved_tensors
        threads: _TableThreads = ctx.threads

        def update(share: _Share) -> None:
            threads.update(share, grad_out[:, share.columns].float().contiguous(), indices, offsets)

        threads.each_share(update)
        return None, None, None, None
