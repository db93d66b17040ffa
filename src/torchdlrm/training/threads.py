"""How many threads a step can use on CPU."""

import torch

from torchdlrm.config import Config

# Below this much work a step is so short that waking a second thread for each of its hundred kernels costs more than
# the thread saves: measured on two cores with the model of configs/criteo-small.toml.
FLOPS_PER_THREAD = 0.5e9


def useful_threads(config: Config, num_dense_features: int, num_sparse_features: int, world_size: int) -> int:
    """The threads that this process may use (`torch.get_num_threads`), or fewer where a step is small.

    Args:
        config: model and batch size.
        num_dense_features: number of dense features.
        num_sparse_features: F.
        world_size: number of ranks that share a batch.
    """
    wanted = round(step_flops(config, num_dense_features, num_sparse_features, world_size) / FLOPS_PER_THREAD)
    return max(1, min(torch.get_num_threads(), wanted))


def step_flops(config: Config, num_dense_features: int, num_sparse_features: int, world_size: int) -> float:
    """Floating point operations of the matrix products of one step on one rank, forward and backward."""
    rows = config.train.batch_size_global / world_size
    # Two a multiply-add; forward, and two products backward.
    return 6 * rows * config.model.row_multiply_adds(num_dense_features, num_sparse_features)
