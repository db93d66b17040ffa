"""Describes a model before it is built: one object for each way in which its vectors interact (`model.interaction`).

An `Architecture` builds the module, names its matrix products, and says how the interaction is served.  All that counts
work asks `ModelShape.products`: threads and precision of training, the planner's estimate, the export, the benchmark's
floor.  A new interaction is its name and settings in `torchdlrm.config.model`, and a module here of that name with an
`ARCHITECTURE`; or a model class in a file of the user's (`torchdlrm.model.model_class`).

Nothing here imports TorchRec before a model is built: a server asks too.

B rows of the batch, F sparse features, D embedding dimension, N = F + 1 vectors that interact.
"""

import importlib
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import nn

from torchdlrm.config import InteractionName, ModelConfig
from torchdlrm.errors import BundleError
from torchdlrm.features.columns import DenseColumn
from torchdlrm.features.tables import Feature, FeatureTable, Table, check_features, feature_tables, sparse_features
from torchdlrm.model.graph import Graph
from torchdlrm.model.pooling import pooled_features, pooling_of
from torchdlrm.model.served import FastInteraction, ServedWeights

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

    @property
    def num_kept(self) -> int:
        """Numbers of a row that are kept for the backward pass: the factors."""
        return self.inputs * (self.rows + (0 if self.has_weight or self.num_gradients == 1 else self.outputs))


class Architecture(ABC):
    """How a dense vector and F embeddings become a logit."""

    @abstractmethod
    def build(
        self, shape: "ModelShape", embedding_bag_collection: "EmbeddingBagCollection", device: torch.device
    ) -> nn.Module:
        """The model, which maps dense features [B, num_dense] and a KJT of F keys to logits [B, L], L labels.

        Args:
            shape: sizes of its parts.
            embedding_bag_collection: the tables; the model holds them as `sparse_arch.embedding_bag_collection`.
            device: where to create everything but the tables.
        """

    @abstractmethod
    def products(self, shape: "ModelShape") -> Sequence[Product]:
        """The matrix products of a forward pass, in its order."""

    def check(self, shape: "ModelShape") -> None:
        """See that such a model can be trained on any number of processes, as those that are built in can.

        Raises:
            ConfigError: it cannot.
        """
        del shape

    def tables(self, features: Sequence[Feature]) -> Sequence[Table]:
        """What is looked up besides the vectors."""
        del features
        return ()

    def num_activations(self, shape: "ModelShape") -> int:
        """Numbers of a row that the forward pass keeps for the backward: the products' factors, at least."""
        return sum(product.num_kept for product in self.products(shape))

    def fast_interaction(self, shape: "ModelShape", weights: ServedWeights) -> FastInteraction | None:
        """The interaction as it is served, between a dense arch and an over arch of plain layers.

        None: the model's own forward serves it (`torchdlrm.model.eager`), which any model can do, but not as fast.
        """
        del shape, weights
        return None

    def graph_interaction(self, shape: "ModelShape", graph: Graph, dense_BD: str, vectors_BND: str) -> str:
        """What the over arch reads, of the dense vector and of all vectors; raises BundleError where none is known."""
        del shape, graph, dense_BD, vectors_BND
        raise BundleError("nothing says how to write the model's interaction as a graph")


class BuiltInArchitecture(Architecture):
    """A class of `torchdlrm.model.dlrm`: an interaction between a dense arch and an over arch of plain layers.

    Attributes:
        class_name: of the class, and of TorchRec's.
    """

    class_name: str

    def arguments(self, config: ModelConfig) -> dict[str, Any]:
        """The settings of the interaction as the constructor of the class names them."""
        del config
        return {}

    @abstractmethod
    def interaction(self, shape: "ModelShape") -> tuple[Sequence[Product], int]:
        """The interaction's matrix products, and how many numbers of a row it gives to the over arch."""

    def build(
        self, shape: "ModelShape", embedding_bag_collection: "EmbeddingBagCollection", device: torch.device
    ) -> nn.Module:
        """A model of the class."""
        from torchdlrm.model import dlrm  # noqa: PLC0415 - with TorchRec, which a server can do without

        return getattr(dlrm, self.class_name)(embedding_bag_collection, **shape.arguments, dense_device=device)

    def products(self, shape: "ModelShape") -> Sequence[Product]:
        """Those of the layers, and the interaction's between the two arches."""
        # Without dense features the dense arch has one input, which is always 1.
        first, *dense = layers(max(1, shape.num_dense), shape.config.dense_arch_layer_sizes)
        products, over_in = self.interaction(shape)
        over = layers(over_in, shape.config.over_arch_layer_sizes)
        if shape.num_labels > 1:
            from torchdlrm.model.heads import HEADS  # noqa: PLC0415 - it asks this module

            heads = HEADS[shape.config.heads.kind]
            over = heads.products(over_in, shape.config.over_arch_layer_sizes, shape.num_labels, shape.config.heads)
        vectors = ((column.size or 0, shape.config.embedding_dim) for column in shape.content)
        content = [Product(1, *sizes, num_gradients=1) for sizes in vectors]
        return (replace(first, num_gradients=1), *dense, *content, *products, *over)  # the first one's inputs are data

    def num_activations(self, shape: "ModelShape") -> int:
        """The products' factors, and the dense vector, whose copy among the others is a factor."""
        return super().num_activations(shape) + shape.config.embedding_dim


def built_in(name: InteractionName) -> Architecture:
    """The architecture of `model.interaction`: the module of that name beside this one has it."""
    return importlib.import_module(f"torchdlrm.model.{name}").ARCHITECTURE


def layers(inputs: int, sizes: Sequence[int]) -> list[Product]:
    """The products of plain layers."""
    return [Product(1, *pair) for pair in pairwise((inputs, *sizes))]


@dataclass(frozen=True)
class ModelShape:
    """A model's architecture and sizes.

    Attributes:
        config: sizes that a run chooses.
        num_dense: number of dense features of the data, may be 0.
        num_sparse: F; of a dataset with vectors, these count too.
        given_architecture: how the vectors interact, where it is not as the config says.
        is_weighted: whether ids have weights, by which their embeddings are multiplied before they are summed.
        known_features: the sparse features, in the order of the schema, where they are known.
        labels: the names of those that are learnt, in the order of the logits; empty where it is one without a name.
        content: the columns of vectors, which stand behind the dense features.
    """

    config: ModelConfig
    num_dense: int
    num_sparse: int
    given_architecture: Architecture | None = None
    is_weighted: bool = False
    known_features: tuple[Feature, ...] = ()
    labels: tuple[str, ...] = ()
    content: tuple[DenseColumn, ...] = ()

    @classmethod
    def of(cls, config: ModelConfig, dataset: "Dataset", architecture: Architecture | None = None) -> Self:
        """A model for the features of a dataset.

        Raises:
            ConfigError: `model.features` does not suit them.
        """
        features = sparse_features(dataset.schema, dataset.num_embeddings)
        check_features(config, features, () if architecture is None else architecture.tables(features))
        return cls(
            config,
            len(dataset.dense_names),
            len(features) + len(dataset.schema.content),
            architecture,
            is_weighted=dataset.schema.has_value_weights,
            known_features=features,
            labels=tuple(column.name for column in dataset.schema.learnt),
            content=dataset.schema.content,
        )

    @property
    def num_labels(self) -> int:
        """L: logits of a row."""
        return max(1, len(self.labels))

    @property
    def architecture(self) -> Architecture:
        """How the vectors interact."""
        return self.given_architecture or built_in(self.config.interaction)

    @property
    def features(self) -> tuple[Feature, ...]:
        """The sparse features; where they are not known, as many of one id each."""
        return self.known_features or tuple(Feature(f"feature_{i}", 1) for i in range(self.num_sparse))

    @property
    def tables(self) -> list[FeatureTable]:
        """What is looked up for the features, key by key."""
        return feature_tables(self.config, self.features, self.architecture.tables(self.features))

    @property
    def num_inputs(self) -> int:
        """Numbers of a row besides ids: the dense features, and behind them the vectors."""
        return self.num_dense + sum(column.size or 0 for column in self.content)

    @property
    def flat_size(self) -> int:
        """N D: the numbers of all vectors that interact."""
        return (self.num_sparse + 1) * self.config.embedding_dim

    @property
    def products(self) -> Sequence[Product]:
        """The matrix products of a forward pass: the architecture's, then those that make vectors of embeddings."""
        return (*self.architecture.products(self), *self._of_tables)

    @property
    def _of_tables(self) -> list[Product]:
        """Those that project smaller tables, and those that pool lists."""
        dim = self.config.embedding_dim
        small = (feature.embedding_dim or dim for feature in self.config.features.values())
        with torch.device("meta"):  # where no initial weights are drawn
            poolings = [pooling_of(keys) for keys in pooled_features(self.tables).values()]
        pooled = (Product(*sizes) for pooling in poolings for sizes in pooling.products)
        return [*(Product(1, inputs, dim) for inputs in small if inputs < dim), *pooled]

    @property
    def num_weights(self) -> int:
        """Of the products: all weights but biases."""
        return sum(product.inputs * product.outputs for product in self.products if product.has_weight)

    @property
    def num_activations(self) -> int:
        """Numbers of a row of the batch that a forward pass keeps for the backward."""
        multiplied = sum(feature.quotient_remainder == "mult" for feature in self.config.features.values())
        of_tables = sum(product.num_kept for product in self._of_tables) + 2 * self.config.embedding_dim * multiplied
        return self.architecture.num_activations(self) + of_tables

    @property
    def multiply_adds(self) -> int:
        """Multiply-adds of a row's forward pass."""
        return sum(product.multiply_adds for product in self.products)

    def step_flops(self, rows: float) -> float:
        """Floating point operations of the products of a training step of `rows` rows, forward and backward."""
        return 6 * rows * self.multiply_adds  # two a multiply-add; forward, and two products backward

    @property
    def arguments(self) -> dict[str, Any]:
        """The sizes and the interaction's settings as TorchRec's constructors name them."""
        architecture = self.architecture
        settings = architecture.arguments(self.config) if isinstance(architecture, BuiltInArchitecture) else {}
        return {
            "dense_in_features": self.num_dense,
            "dense_arch_layer_sizes": list(self.config.dense_arch_layer_sizes),
            "over_arch_layer_sizes": list(self.config.over_arch_layer_sizes),
            **settings,
            **({"content": {column.name: column.size for column in self.content}} if self.content else {}),
        }
