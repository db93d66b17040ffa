"""How many threads a step can use on CPU."""

from itertools import pairwise

import torch

from torchdlrm.config import Config

# Below this much work a step is so short that waking a second thread for each of its hundred kernels costs more than
# the thread saves: measured on two cores with the model of configs/criteo-small.toml.
FLOPS_PER_THREAD = 0.5e9


def useful_threads(config: Config, num_sparse_features: int, world_size: int) -> int:
    """The threads that this process may use (`torch.get_num_threads`), or fewer where a step is small.

    Args:
        config: model and batch size.
        num_sparse_features: F.
        world_size: number of ranks that share a batch.
    """
    wanted = round(step_flops(config, num_sparse_features, world_size) / FLOPS_PER_THREAD)
    return max(1, min(torch.get_num_threads(), wanted))


def step_flops(config: Config, num_sparse_features: int, world_size: int) -> float:
    """Floating point operations of the matrix products of one step on one rank, forward and backward."""
    num_vectors = num_sparse_features + 1
    dim = config.model.embedding_dim
    over_in = dim + num_vectors * (num_vectors - 1) // 2
    layers = [*pairwise(config.model.dense_arch_layer_sizes), *pairwise([over_in, *config.model.over_arch_layer_sizes])]
    multiply_adds = sum(inputs * outputs for inputs, outputs in layers) + num_vectors**2 * dim
    rows = config.train.batch_size_global / world_size
    return 6 * rows * multiply_adds  # two a multiply-add; forward, and two products backward
