"""Provides what the benchmarks of training and of prediction share: TorchRec's own model, and random rows."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torchrec.models import dlrm
from torchrec.modules.embedding_configs import EmbeddingBagConfig
from torchrec.modules.embedding_modules import EmbeddingBagCollection
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from torchdlrm.config import Config, ModelConfig
from torchdlrm.errors import ConfigError
from torchdlrm.features.schema import NUM_CRITEO_DENSE
from torchdlrm.features.tables import table_name
from torchdlrm.model.architecture import BuiltInArchitecture, ModelShape
from torchdlrm.training.processes.process_group import Ranks

_NUM_BATCHES = 16


def random_rows(
    num_embeddings: Iterable[int], num_rows: int, generator: np.random.Generator, id_type: type[np.integer[Any]]
) -> Iterator[tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]]:
    """16 batches: dense float32 [B, 13] and ids [F, B], uniform over the tables, the hardest case for the caches."""
    sizes = list(num_embeddings)
    for _ in range(_NUM_BATCHES):
        dense = generator.random((num_rows, NUM_CRITEO_DENSE), dtype=np.float32)
        yield dense, np.stack([generator.integers(rows, size=num_rows, dtype=id_type) for rows in sizes])


def random_batches(
    ranks: Ranks, config: Config, num_embeddings: Mapping[str, int]
) -> Iterator[tuple[np.ndarray[Any, Any], np.ndarray[Any, Any], np.ndarray[Any, Any]]]:
    """This rank's part of each batch: dense [B, 13] and ids [F, B] as `random_rows` gives them, labels float32 [B]."""
    num_rows, generator = config.train.batch_size_global // ranks.world_size, np.random.default_rng(ranks.rank)
    for dense, ids_FB in random_rows(num_embeddings.values(), num_rows, generator, np.int64):
        yield dense, ids_FB, generator.integers(2, size=num_rows).astype(np.float32)


def check_torchrec_has(config: ModelConfig) -> None:
    """Refuse to compare a model with TorchRec's own that has no such thing.

    Raises:
        ConfigError: the cross net has gates, or tables are smaller.
    """
    if config.features:
        msg = "model.features: TorchRec's own model, which this is compared with, has no smaller tables; leave them out"
        raise ConfigError(msg)
    if config.dcn.gated:
        msg = "model.dcn.gated: TorchRec's DLRM_DCN, which this is compared with, has no gates; leave the setting out"
        raise ConfigError(msg)


def torchrec_dlrm(
    shape: ModelShape, num_embeddings: Mapping[str, int], *, tables: torch.device, dense: torch.device
) -> Any:
    """TorchRec's class of this architecture with random weights, its tables on one device and all else on another.

    A model class of somebody's own is itself, on TorchRec's tables.
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
    architecture, collection = shape.architecture, EmbeddingBagCollection(tables=configs, device=tables)
    if not isinstance(architecture, BuiltInArchitecture):
        return architecture.build(shape, collection, dense)
    model = getattr(dlrm, architecture.class_name)(collection, **shape.arguments, dense_device=dense)
    model.inter_arch.to(dense)  # TorchRec leaves the cross net on the CPU
    return model


def torchrec_kjt(features: Iterable[str], ids_FB: Any) -> KeyedJaggedTensor:
    """One id of each feature a row, as TorchRec's examples make it; `ids_FB` is an array of integers [F, B]."""
    return KeyedJaggedTensor.from_lengths_sync(
        keys=list(features),
        values=torch.from_numpy(ids_FB).view(-1),
        lengths=torch.ones(ids_FB.size, dtype=torch.int32),
    )
