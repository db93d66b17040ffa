"""Builds a model from its sizes and those of its tables; it is not sharded yet, its tables are on the meta device."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torchrec.models.dlrm import OverArch
from torchrec.modules.embedding_modules import EmbeddingBagCollection

from torchdlrm.config.model import HeadsConfig
from torchdlrm.errors import ConfigError
from torchdlrm.features.tables import FeatureTable
from torchdlrm.model.architecture import ModelShape
from torchdlrm.model.dropout import add_dropout
from torchdlrm.model.heads import HEADS
from torchdlrm.model.loss import DLRMTrain, LossWeights
from torchdlrm.model.sparse_arch import TableOfFeatures


def feature_collection(tables: Sequence[FeatureTable], *, is_weighted: bool = False) -> EmbeddingBagCollection:
    """The tables of a model's features, on the meta device; `is_weighted`: their ids come with weights."""
    configs = [
        TableOfFeatures(
            name=table.name,
            embedding_dim=table.dim,
            num_embeddings=table.rows,
            feature_names=[other.key for other in tables if other.name == table.name],
            init_fn=_leave_as_is,
            keys=tuple(tables),
        )
        for table in {table.name: table for table in tables}.values()
    ]
    return EmbeddingBagCollection(tables=configs, is_weighted=is_weighted, device=torch.device("meta"))


def build_model(
    shape: ModelShape,
    device: torch.device,
    *,
    dropout: float = 0.0,
    negative_weight: float = 1.0,
    loss_weights: LossWeights = None,
) -> DLRMTrain:
    """A model for training, with the same initial weights on every device; its tables have no memory yet.

    Args:
        shape: of the model.
        device: where everything but the tables is created.
        dropout: fraction of the hidden units of dense and over arch that each training row leaves out.
        negative_weight: weight of rows without a click in the loss.
        loss_weights: of several labels, as `train.loss_weights`.

    Raises:
        ConfigError: a model class makes no model, or one without arches to drop units of.
    """
    collection = feature_collection(shape.tables, is_weighted=shape.is_weighted)
    # A GPU draws other random numbers than a CPU with the same seed, and a model class of the user's may keep more than
    # parameters where it is made: so it is made twice there, and takes the CPU's weights.
    where = torch.device("meta" if device.type == "meta" else "cpu")
    drawn = _with_heads(shape.architecture.build(shape, collection, where), shape, where)
    model = drawn
    if device.type not in {"cpu", "meta"}:
        model = _with_heads(shape.architecture.build(shape, collection, device), shape, device)
        model.load_state_dict(drawn.state_dict())
    if dropout:
        if not all(isinstance(getattr(model, name, None), nn.Module) for name in ("dense_arch", "over_arch")):
            raise ConfigError(f"train.dropout: {type(model).__name__} has no dense_arch and over_arch to drop units of")
        add_dropout(model, dropout)
    train = DLRMTrain(model, negative_weight, shape.labels, loss_weights)
    train.loss.to(device)
    return train


def _with_heads(model: nn.Module, shape: ModelShape, device: torch.device) -> nn.Module:
    """A model whose over arch of one logit makes that of each label; ConfigError if none does though heads are set."""
    arch, config = getattr(model, "over_arch", None), shape.config
    if shape.num_labels > 1 and isinstance(arch, OverArch) and [*arch.parameters()][-1].shape == (1,):
        (_, in_features), kind = next(arch.parameters()).shape, HEADS[config.heads.kind]
        model.over_arch = kind(in_features, config.over_arch_layer_sizes, shape.labels, config.heads, device)
    elif shape.num_labels > 1 and config.heads != HeadsConfig():
        msg = f"model.heads: {type(model).__name__} has no over arch of one logit, of which they could be made"
        raise ConfigError(msg)
    return model


def standardize_dense_input(model: nn.Module, dense_rows: Tensor) -> None:
    """Change a fresh model so that its dense arch starts as if its input had mean 0 and standard deviation 1.

    The transformed integers are positive and far from 0, so every unit of the first layer moves with their common
    mean; with Adagrad, whose first steps have the size of the learning rate whatever the gradient, the last ReLU of
    the dense arch then dies in some runs and the dense features are lost. The statistics go into the first layer's
    weight and bias, so the model and its state dict stay TorchRec's.
    Why: docs/decisions/the-dense-arch-knows-the-scale-of-its-input.md.

    Args:
        model: with a `dense_arch` whose first parameters are the first layer's weight and bias; another one is left
            as it is.
        dense_rows: a sample of the encoded dense features, float32 [rows, num_dense].
    """
    first = [*getattr(model, "dense_arch", nn.Identity()).parameters()][:2]
    if len(first) < 2 or first[0].shape != (len(first[1]), dense_rows.shape[1]):
        return
    weight, bias = first
    deviation, mean = torch.std_mean(dense_rows.double(), dim=0, correction=0)
    deviation[deviation < 1e-3] = 1.0  # a column that is (nearly) constant in the sample is only centred
    with torch.no_grad():
        weight.div_(deviation.to(weight))
        bias.sub_(weight @ mean.to(weight))


def _leave_as_is(_: Tensor) -> None:
    """Without it each table would be initialised here."""
