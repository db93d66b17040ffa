"""Runs a model's own forward over embeddings that other code has looked up, to check and to serve any model.

The collection of tables is replaced by one that gives the embeddings it was handed; all else runs as it was written,
on the same kind of inputs as in training.  The served model falls back to it, a checkpoint's predictions are made by
it, and the planner times it.

B rows of the batch, F sparse features, D embedding dimension.
"""

from collections.abc import Mapping, Sequence
from functools import cache

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor, KeyedTensor

from torchdlrm.model.architecture import ModelShape, Product
from torchdlrm.model.build import build_model
from torchdlrm.model.dlrm import logits_of

_TRACED_ROWS = 4


class _GivenEmbeddings(nn.Module):
    """Stands where an `EmbeddingBagCollection` stood."""

    def __init__(self, features: Sequence[str], embedding_dim: int) -> None:
        super().__init__()
        self._features, self._dims = list(features), [embedding_dim] * len(features)
        self.pooled_BFD: Tensor | None = None

    def forward(self, features: KeyedJaggedTensor) -> KeyedTensor:
        """The embeddings that were given, whatever the ids."""
        del features
        assert self.pooled_BFD is not None
        return KeyedTensor(self._features, self._dims, self.pooled_BFD.flatten(1))


class EagerModel:
    """A model that is given its embeddings, for one thread at a time.

    Args:
        shape: of the model, which is built here with random weights.
        num_embeddings: rows of the table of each sparse feature, F of them.
        device: where it computes; None: on CPU.

    Attributes:
        module: the model without its tables, evaluating.
        weight_shapes: of its state dict, the tables included.
    """

    def __init__(
        self, shape: ModelShape, num_embeddings: Mapping[str, int], device: torch.device | None = None
    ) -> None:
        self.module = build_model(shape, num_embeddings, device or torch.device("cpu")).model.eval()
        self.weight_shapes = {name: tuple(weight.shape) for name, weight in self.module.state_dict().items()}
        self._features = list(num_embeddings)
        self._given = _GivenEmbeddings(self._features, shape.config.embedding_dim)
        self.module.get_submodule("sparse_arch").embedding_bag_collection = self._given

    def logits(self, dense: Tensor, ids: Tensor, lengths: Tensor, pooled_BFD: Tensor) -> Tensor:
        """The log-odds of a click of each row: [B].

        Args:
            dense: float32 [B, num_dense].
            ids: of all rows, feature by feature.
            lengths: how many ids each row has: [F * B], feature by feature.
            pooled_BFD: the sum of each feature's embeddings.
        """
        self._given.pooled_BFD = pooled_BFD
        try:
            return logits_of(self.module(dense, KeyedJaggedTensor(self._features, ids, lengths=lengths)))
        finally:
            self._given.pooled_BFD = None


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
    """The matrix products that a model computes, found by running it once on a few rows of zeros."""
    num_sparse = shape.num_sparse
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        model = EagerModel(shape, {f"feature_{i}": 1 for i in range(num_sparse)})
        with _Products() as products:
            model.logits(
                torch.zeros(_TRACED_ROWS, shape.num_dense),
                torch.zeros(_TRACED_ROWS * num_sparse, dtype=torch.int64),
                torch.ones(_TRACED_ROWS * num_sparse, dtype=torch.int32),
                torch.zeros(_TRACED_ROWS, num_sparse, shape.config.embedding_dim),
            )
    return tuple(products.found)
