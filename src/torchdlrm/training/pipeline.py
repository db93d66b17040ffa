"""TorchRec's train pipeline around the sharded model, in the precision that was chosen."""

from typing import Any

import torch
from torch import nn
from torchrec.distributed.train_pipeline import TrainPipelineSparseDist
from torchrec.optim.keyed import KeyedOptimizer

from torchdlrm.tables.table_threads import use_table_threads


def build_pipeline(
    model: nn.Module, optimizer: KeyedOptimizer, *, dtype: torch.dtype, device: torch.device
) -> TrainPipelineSparseDist:
    """A pipeline that exchanges the next batch's ids while this one computes.

    Args:
        model: a `DLRMTrain` inside `DistributedModelParallel`.
        optimizer: steps after every backward.
        dtype: in which the dense parts compute.
        device: of this rank.
    """
    if device.type == "cpu":
        use_table_threads(model, num_threads=torch.get_num_threads())

    def forward(batch: Any) -> Any:
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
            return model(batch)

    return TrainPipelineSparseDist(model, optimizer, device, execute_all_batches=True, custom_model_fwd=forward)
