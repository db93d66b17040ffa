"""Config and table sizes -> a DLRM that is not sharded yet, its tables on the meta device."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torchrec.modules.embedding_configs import EmbeddingBagConfig
from torchrec.modules.embedding_modules import EmbeddingBagCollection

from torchdlrm.config import ModelConfig
from torchdlrm.model.dlrm import DLRM, DLRMTrain


def build_model(
    config: ModelConfig, *, num_dense_features: int, num_embeddings: Mapping[str, int], device: torch.device
) -> DLRMTrain:
    """A model for training; its tables have no memory until they are sharded.

    Args:
        config: the shape.
        num_dense_features: number of dense features.
        num_embeddings: rows of the table of each sparse feature, in the order of the KJT's keys.
        device: where the dense and over arch are created.
    """
    tables = [
        EmbeddingBagConfig(
            name=f"t_{feature}",
            embedding_dim=config.embedding_dim,
            num_embeddings=rows,
            feature_names=[feature],
            init_fn=_leave_as_is,
        )
        for feature, rows in num_embeddings.items()
    ]
    dlrm = DLRM(
        EmbeddingBagCollection(tables=tables, device=torch.device("meta")),
        dense_in_features=num_dense_features,
        dense_arch_layer_sizes=list(config.dense_arch_layer_sizes),
        over_arch_layer_sizes=list(config.over_arch_layer_sizes),
        dense_device=device,
    )
    return DLRMTrain(dlrm)


def standardize_dense_input(dense_arch: nn.Module, dense_rows: Tensor) -> None:
    """Change a fresh dense arch so that it starts as if its input had mean 0 and standard deviation 1.

    The transformed integers are positive and far from 0, so every unit of the first layer moves with their common
    mean; with Adagrad, whose first steps have the size of the learning rate whatever the gradient, the last ReLU of
    the dense arch then dies in some runs and the dense features are lost. The statistics go into the first layer's
    weight and bias, so the model and its state dict stay TorchRec's.

    Args:
        dense_arch: the arch; its first parameters are the first layer's weight and bias.
        dense_rows: a sample of the encoded dense features, float32 [rows, num_dense_features].
    """
    weight, bias = list(dense_arch.parameters())[:2]
    deviation, mean = torch.std_mean(dense_rows.double(), dim=0, correction=0)
    deviation[deviation < 1e-3] = 1.0  # a column that is (nearly) constant in the sample is only centred
    with torch.no_grad():
        weight.div_(deviation.to(weight))
        bias.sub_(weight @ mean.to(weight))


def _leave_as_is(_: Tensor) -> None:
    """Tables are initialised once they are sharded, in the same way on any number of ranks."""
