"""TorchRec's own DLRM in a given shape: what both benchmarks compare with."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torchrec.models.dlrm import DLRM
from torchrec.modules.embedding_configs import EmbeddingBagConfig
from torchrec.modules.embedding_modules import EmbeddingBagCollection
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from torchdlrm.model import table_name
from torchdlrm.model.architecture import ModelShape


def torchrec_dlrm(
    shape: ModelShape, num_embeddings: Mapping[str, int], *, tables: torch.device, dense: torch.device
) -> Any:
    """TorchRec's DLRM with random weights.

    Args:
        shape: of the model.
        num_embeddings: rows of each feature's table.
        tables: where the tables are created.
        dense: where everything else is.
    """
    configs = [
        EmbeddingBagConfig(
            name=table_name(feature),
            embedding_dim=shape.config.embedding_dim,
            num_embeddings=rows,
            feature_names=[feature],
        )
        for feature, rows in num_embeddings.items()
    ]
    return DLRM(EmbeddingBagCollection(tables=configs, device=tables), **shape.arguments, dense_device=dense)


def torchrec_kjt(features: Iterable[str], ids_FB: Any) -> KeyedJaggedTensor:
    """One id of each feature a row, as TorchRec's examples make it; `ids_FB` is an array of integers [F, B]."""
    return KeyedJaggedTensor.from_lengths_sync(
        keys=list(features),
        values=torch.from_numpy(ids_FB).view(-1),
        lengths=torch.ones(ids_FB.size, dtype=torch.int32),
    )
