"""Describes a model before it is built: one object for each way in which its vectors interact.

An `Architecture` builds the module, names its matrix products, and says how the interaction is served.  All that counts
work asks `ModelShape.products`: threads and precision of training, the planner's estimate, the export, the benchmark's
floor.  A new architecture is a class here, or a class of somebody's own (`torchdlrm.model.model_class`).

Nothing here imports TorchRec before a model is built: a server asks too.

B rows of the batch, F sparse features, D embedding dimension, N = F + 1 vectors that interact.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Protocol, Self

import torch
from torch import Tensor, nn

from torchdlrm.config import ModelConfig
from torchdlrm.model.interaction import PairLayout, dot_output_size

if TYPE_CHECKING:
    from torchrec.modules.embedding_modules import EmbeddingBagCollection

    from torchdlrm.data.dataset import Dataset


@dataclass(frozen=True)
class Product:
    """A matrix product of the forward pass: what one row of the batch contributes to it.

    Attributes:
        rows: of the left factor.
        inputs: columns of the left factor, rows of the right one.
        outputs: columns of the right factor.
        has_weight: whether the right factor is a weight, the same for all rows of the batch.
        num_gradients: products of its backward pass: one for each factor that needs a gradient of its own.
    """

    rows: int
    inputs: int
    outputs: int
    has_weight: bool = True
    num_gradients: int = 2

    @property
    def multiply_adds(self) -> int:
        """Multiply-adds of the forward pass for a row of the batch."""
        return self.rows * self.inputs * self.outputs


class FastInteraction(Protocol):
    """An interaction as it is served: reads the vectors where the lookup has put them.

    The over arch's first weight may be laid out in another way than in training, to suit `interact`.

    Attributes:
        num_slots: vectors of a row; the dense one comes first, then the embeddings, and what is left is zero.
        output_size: numbers of a row that the over arch reads.
    """

    num_slots: int
    output_size: int

    def interact(self, vectors_BMD: Tensor) -> Tensor:
        """Maps [B, num_slots, D] to [B, output_size]."""

    def spread(self, weight: Tensor) -> Tensor:
        """The over arch's first weight of training, [O, inputs], for inputs in this layout: [O, output_size]."""


class Architecture(ABC):
    """How a dense vector and F embeddings become a logit."""

    @abstractmethod
    def build(
        self, shape: "ModelShape", embedding_bag_collection: "EmbeddingBagCollection", device: torch.device
    ) -> nn.Module:
        """The model, which maps dense features [B, num_dense] and a KJT of F keys to logits [B, 1].

        Args:
            shape: sizes of its parts.
            embedding_bag_collection: the tables; the model holds them as `sparse_arch.embedding_bag_collection`.
            device: where to create everything but the tables.
        """

    @abstractmethod
    def products(self, shape: "ModelShape") -> Sequence[Product]:
        """The matrix products of a forward pass, in its order."""

    def fast_interaction(self, shape: "ModelShape", dtype: torch.dtype) -> FastInteraction | None:
        """The interaction as it is served in `dtype`, between a dense arch and an over arch of plain layers.

        None: the model's own forward serves it (`torchdlrm.model.eager`), which any model can do, but not as fast.
        """
        del shape, dtype
        return None


class DotArchitecture(Architecture):
    """The paper's: dot products of all pairs of vectors."""

    def build(
        self, shape: "ModelShape", embedding_bag_collection: "EmbeddingBagCollection", device: torch.device
    ) -> nn.Module:
        """A `torchdlrm.model.dlrm.DLRM`."""
        from torchdlrm.model.dlrm import DLRM  # noqa: PLC0415 - with TorchRec, which a server can do without

        return DLRM(embedding_bag_collection, **shape.arguments, dense_device=device)

    def products(self, shape: "ModelShape") -> Sequence[Product]:
        """Those of the layers, and V V^T between the two arches."""
        config, num_vectors = shape.config, shape.num_sparse + 1
        # Without dense features the dense arch has one input, which is always 1.
        dense = [Product(1, *sizes) for sizes in pairwise((max(1, shape.num_dense), *config.dense_arch_layer_sizes))]
        over_in = dot_output_size(shape.num_sparse, config.embedding_dim)
        return (
            replace(dense[0], num_gradients=1),  # its inputs are data
            *dense[1:],
            Product(num_vectors, config.embedding_dim, num_vectors, has_weight=False, num_gradients=1),
            *(Product(1, *sizes) for sizes in pairwise((over_in, *config.over_arch_layer_sizes))),
        )

    def fast_interaction(self, shape: "ModelShape", dtype: torch.dtype) -> FastInteraction:
        """Picks the pairs out of the square, two at a time in bfloat16."""
        return PairLayout(shape.num_sparse + 1, shape.config.embedding_dim, dtype)


DOT = DotArchitecture()


@dataclass(frozen=True)
class ModelShape:
    """A model's architecture and sizes.

    Attributes:
        config: sizes that a run chooses.
        num_dense: number of dense features of the data, may be 0.
        num_sparse: F.
        architecture: how the vectors interact.
    """

    config: ModelConfig
    num_dense: int
    num_sparse: int
    architecture: Architecture = DOT

    @classmethod
    def of(cls, config: ModelConfig, dataset: "Dataset", architecture: Architecture = DOT) -> Self:
        """A model for the features of a dataset."""
        return cls(config, len(dataset.dense_names), len(dataset.sparse_names), architecture)

    @property
    def products(self) -> Sequence[Product]:
        """The matrix products of a forward pass."""
        return self.architecture.products(self)

    @property
    def multiply_adds(self) -> int:
        """Multiply-adds of a row's forward pass."""
        return sum(product.multiply_adds for product in self.products)

    def step_flops(self, rows: float) -> float:
        """Floating point operations of the products of a training step of so many rows, forward and backward."""
        return 6 * rows * self.multiply_adds  # two a multiply-add; forward, and two products backward

    @property
    def arguments(self) -> dict[str, Any]:
        """The sizes as TorchRec's constructors name them."""
        return {
            "dense_in_features": self.num_dense,
            "dense_arch_layer_sizes": list(self.config.dense_arch_layer_sizes),
            "over_arch_layer_sizes": list(self.config.over_arch_layer_sizes),
        }
