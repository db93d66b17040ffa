"""Draws the initial values of sharded tables: the same on any number of ranks and under any plan.

A table is cut into blocks of rows, and each block is drawn from a generator of its own, so a rank draws only what it
holds and still gets the same values as a rank that holds the whole table.
Why: docs/decisions/initial-weights-do-not-depend-on-the-plan.md.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import nn
from torch.distributed._shard.sharded_tensor import ShardedTensor

from torchdlrm.features.tables import FeatureTable

_BLOCK_ROWS = 65_536


def initialize_tables(
    model: nn.Module, *, seed: int, parts: Sequence[FeatureTable] = (), scale: float = 1.0, epoch: int = 0
) -> None:
    """Fill every sharded table from U(-scale/sqrt(rows), scale/sqrt(rows)).

    With scale 1 that is the range of TorchRec and of the paper's code.

    Two tables of one feature of n ids together give vectors of that scale, too. Where they are added, each has the
    range of 1/sqrt(2 n). Where they are multiplied, the quotients' has that of n, and the remainders' are signs: so the
    products are exactly as if they had been drawn for one table, vectors with a quotient in common are uncorrelated,
    and no column starts near 0 in both, where neither would learn.

    Args:
        model: after `DistributedModelParallel`; tables are found in its state dict as `ShardedTensor` of
            float32 [rows, dim].
        seed: of the whole model; each table draws from its own stream.
        parts: tables of the model of which a feature has two, or which say their range; others may be among them.
        scale: of vectors: of two tables that are multiplied, the quotients' have it.
        epoch: each draws other values.
    """
    pairs = {table.name: table for table in parts if table.combination is not None or table.asked is not None}
    tables = {name: value for name, value in model.state_dict().items() if isinstance(value, ShardedTensor)}
    for table_index, name in enumerate(sorted(tables)):
        num_rows, dim = tables[name].size()
        part = pairs.get(name.split(".")[-2])
        num_ids = num_rows if part is None else part.num_ids * (2 if part.combination == "add" else 1)
        bound = scale * float(num_ids) ** -0.5
        if part is not None and part.asked is not None:
            bound = part.asked.init
        for shard in tables[name].local_shards():
            first_row, first_column = shard.metadata.shard_offsets
            rows, columns = shard.metadata.shard_sizes
            for block in range(first_row // _BLOCK_ROWS, -(-(first_row + rows) // _BLOCK_ROWS)):
                start = block * _BLOCK_ROWS
                generator = np.random.default_rng([seed, table_index, block, *[epoch] * (epoch > 0)])
                values = generator.random((min(_BLOCK_ROWS, num_rows - start), dim), dtype=np.float32)
                values *= 2  # in place: what is freed stays with the process
                values *= bound
                values -= bound
                if part is not None and part.combination == "mult" and part.is_remainder:
                    values = np.copysign(np.float32(1), values)
                begin, end = max(first_row, start), min(first_row + rows, start + values.shape[0])
                drawn = values[begin - start : end - start, first_column : first_column + columns]
                with torch.no_grad():
                    shard.tensor[begin - first_row : end - first_row].copy_(torch.from_numpy(drawn))
