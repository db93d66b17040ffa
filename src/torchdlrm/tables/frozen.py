"""Lets FBGEMM's kernels look up tables without updating them; ours leave single tables out (`tables/lookup.py`)."""

from collections.abc import Callable, Collection
from typing import Any

import torch
from fbgemm_gpu.split_table_batched_embeddings_ops_training import SplitTableBatchedEmbeddingBagsCodegen
from torch import Tensor

from torchdlrm.errors import ConfigError


def frozen_forward(
    kernel: SplitTableBatchedEmbeddingBagsCodegen, forward: Callable[..., Tensor], frozen: Collection[str]
) -> Callable[..., Tensor]:
    """The forward of a kernel, without an update in its backward where its tables are frozen.

    Args:
        kernel: FBGEMM's module.
        forward: its own.
        frozen: names of tables that stay as they are.

    Raises:
        ConfigError: some of its tables are frozen and some are not: it updates all of them or none.
    """
    held = set(kernel.table_names or ())
    if not held.intersection(frozen):
        return forward
    if held.difference(frozen):
        msg = (
            "train.freeze: FBGEMM's kernels, which update tables on GPUs and weighted embeddings on CPU, cannot leave "
            f"out some tables of a rank ({', '.join(sorted(held.intersection(frozen)))}); freeze tables, all of them"
        )
        raise ConfigError(msg)
    placeholder = torch.zeros(0, requires_grad=True)

    def look_up(*arguments: Any, **named: Any) -> Tensor:
        with torch.no_grad():
            found = forward(*arguments, **named)
        # Other ranks may wait for this one's part in the backward.
        result: Tensor = _WithoutUpdate.apply(placeholder, found)  # type: ignore[no-untyped-call]
        return result

    return look_up


class _WithoutUpdate(torch.autograd.Function):
    """Takes a gradient, for which nothing is done."""

    @staticmethod
    def forward(_: Any, __: Tensor, pooled: Tensor) -> Tensor:
        return pooled.view_as(pooled)

    @staticmethod
    def backward(_: Any, __: Tensor) -> tuple[None, None]:
        return None, None
