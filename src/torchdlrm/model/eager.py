"""Runs a model's own forward over embeddings that other code has looked up, to check and to serve any model.

The collection of tables is replaced by one that gives the embeddings it was handed; all else runs as it was written,
on the same kind of inputs as in training.  The served model falls back to it, a checkpoint's predictions are made by
it, and the planner times it.

B rows of the batch, F sparse features, D embedding dimension.
"""

from collections.abc import Mapping
from dataclasses import replace
from functools import cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor, KeyedTensor

from torchdlrm.features.tables import feature_tables
from torchdlrm.model.architecture import ModelShape, Product
from torchdlrm.model.build import build_model
from torchdlrm.model.given import GivenEmbeddings
from torchdlrm.model.loss import logits_of

_TRACED_ROWS = 4


class EagerModel:
    """A model that is given its embeddings, for one thread at a time.

    Args:
        shape: of the model, which is built here with random weights.
        num_embeddings: ids of each sparse feature, F of them.
        device: where it computes; None: on CPU.

    Attributes:
        module: the model without its tables, evaluating.
        weight_shapes: of its state dict, the tables included.
        tables: of all features, T of them: F, and one more for each feature that has two.
    """

    def __init__(
        self, shape: ModelShape, num_embeddings: Mapping[str, int], device: torch.device | None = None
    ) -> None:
        self.module = build_model(shape, num_embeddings, device or torch.device("cpu")).model.eval()
        self.weight_shapes = {name: tuple(weight.shape) for name, weight in self.module.state_dict().items()}
        self.tables = feature_tables(shape.config, num_embeddings)
        self._given = GivenEmbeddings()
        self.module.get_submodule("sparse_arch").embedding_bag_collection = self._given

    def logits(
        self,
        dense: Tensor,
        ids: Tensor,
        lengths: Tensor,
        pooled: Tensor,
        weights: NDArray[np.float32] | None = None,
    ) -> Tensor:
        """The log-odds of a click of each row: [B].

        Args:
            dense: float32 [B, num_dense].
            ids: of all rows, table by table.
            lengths: how many ids each row has: [T * B], table by table.
            pooled: the sums of each table's rows, [B, sum of their dimensions]; or [B, F, D] where all are alike.
            weights: of the ids, where they have some.
        """
        keys, dims = [table.key for table in self.tables], [table.dim for table in self.tables]
        given = None if weights is None else torch.from_numpy(weights)
        features = KeyedJaggedTensor(keys, ids, given, lengths=lengths)
        self._given.held.append((features, KeyedTensor(keys, dims, pooled.flatten(1))))
        try:
            return logits_of(self.module(dense, features))
        finally:
            self._given.held.clear()


class _Products(TorchDispatchMode):
    """Notes every matrix product that runs inside, of `_TRACED_ROWS` rows."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.found: list[Product] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN204
        del types
        aten = torch.ops.aten
        first = {aten.mm: 0, aten.bmm: 0, aten.addmm: 1, aten.baddbmm: 1, aten.addbmm: 1}.get(func.overloadpacket)
        if first is not None:
            *batch, rows, inputs = args[first].shape
            outputs = args[first + 1].shape[-1]
            matrices = batch[0] if batch else 1
            # Of one product for the whole batch the right factor is the same for all rows: a weight.
            has_weight = matrices % _TRACED_ROWS != 0
            of_a_row = -(-matrices * rows // _TRACED_ROWS)
            self.found.append(Product(of_a_row, inputs, outputs, has_weight=has_weight))
        return func(*args, **(kwargs or {}))


@cache
def trace_products(shape: ModelShape) -> tuple[Product, ...]:
    """The matrix products that a model computes, found by running it once on a few rows of zeros.

    Those of smaller tables are left out: the shape itself counts them.
    """
    num_sparse, shape = shape.num_sparse, replace(shape, config=shape.config.with_features({}))
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        model = EagerModel(shape, shape.features)
        with _Products() as products:
            model.logits(
                torch.zeros(_TRACED_ROWS, shape.num_dense),
                torch.zeros(_TRACED_ROWS * num_sparse, dtype=torch.int64),
                torch.ones(_TRACED_ROWS * num_sparse, dtype=torch.int32),
                torch.zeros(_TRACED_ROWS, num_sparse, shape.config.embedding_dim),
            )
    return tuple(products.found)
