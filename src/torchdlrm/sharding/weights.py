"""Draws the initial values of sharded tables: the same on any number of ranks and under any plan.

A table is cut into blocks of rows, and each block is drawn from a generator of its own, so a rank draws only what it
holds and still gets the same values as a rank that holds the whole table.
"""

import numpy as np
import torch
from torch import nn
from torch.distributed._shard.sharded_tensor import ShardedTensor

_BLOCK_ROWS = 65_536


def initialize_tables(model: nn.Module, *, seed: int) -> None:
    """Fill every sharded table from U(-1/sqrt(rows), 1/sqrt(rows)), the range of TorchRec and of the paper's code.

    Args:
        model: after `DistributedModelParallel`; tables are found in its state dict as `ShardedTensor` of
            float32 [rows, D].
        seed: of the whole model; each table draws from its own stream.
    """
    tables = {name: value for name, value in model.state_dict().items() if isinstance(value, ShardedTensor)}
    for table_index, name in enumerate(sorted(tables)):
        num_rows, dim = tables[name].size()
        bound = float(num_rows) ** -0.5
        for shard in tables[name].local_shards():
            first_row, first_column = shard.metadata.shard_offsets
            rows, columns = shard.metadata.shard_sizes
            for block in range(first_row // _BLOCK_ROWS, -(-(first_row + rows) // _BLOCK_ROWS)):
                start = block * _BLOCK_ROWS
                generator = np.random.default_rng([seed, table_index, block])
                values = generator.random((min(_BLOCK_ROWS, num_rows - start), dim), dtype=np.float32)
                values *= 2  # in place: what is freed stays with the process
                values *= bound
                values -= bound
                begin, end = max(first_row, start), min(first_row + rows, start + values.shape[0])
                part = values[begin - start : end - start, first_column : first_column + columns]
                with torch.no_grad():
                    shard.tensor[begin - first_row : end - first_row].copy_(torch.from_numpy(part))
