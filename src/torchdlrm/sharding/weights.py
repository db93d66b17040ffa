"""Draws the initial values of sharded tables: the same on any number of ranks and under any plan.

A table is cut into blocks of rows, and each block is drawn from a generator of its own, so a rank draws only what it
holds and still gets the same values as a rank that holds the whole table.
Why: docs/decisions/initial-weights-do-not-depend-on-the-plan.md.
"""

from collections.abc import Sequence

import numpy as np
import polars as pl
import torch
from numpy.typing import NDArray
from torch import nn
from torch.distributed._shard.sharded_tensor import ShardedTensor

from torchdlrm.data.dataset import Dataset
from torchdlrm.errors import ConfigError
from torchdlrm.features.kinds import KINDS
from torchdlrm.features.tables import FeatureTable
from torchdlrm.storage.mirror import fetch
from torchdlrm.storage.places import located
from torchdlrm.toml import did_you_mean

_BLOCK_ROWS = 65_536
KnownRows = tuple[str, NDArray[np.int64], NDArray[np.float32]]  # the name of a table, ids of it, rows [ids, dim]


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


def known_rows(file: str, name: str, tables: Sequence[FeatureTable], dataset: Dataset) -> KnownRows:
    """Rows of a table that are the vectors of a Parquet file (value, vector).

    Longer vectors become their leading principal components; shorter ones are filled up with zeros.

    Raises:
        ConfigError: there is no such file or no such table, or the file has no vectors of the table's values.
        DatasetError: the feature has no vocabulary.
    """
    of = {table.table_key: table for table in tables}
    if name not in of:
        msg = f"train.init_tables.{name}: there is no such table; there is {', '.join(of)}{did_you_mean(name, of)}"
        raise ConfigError(msg)
    table, vocabulary = of[name], dataset.vocabulary(name.partition("@")[0])
    try:
        values = pl.read_parquet(fetch(located(file)), columns=["value", "vector"]).drop_nulls()
        typed = values.select(KINDS[vocabulary.kind].from_text(pl.col("value").cast(pl.String))).to_series()
        if values["value"].dtype.is_numeric():  # 3.0 is 3, as in a log
            typed, _ = KINDS[vocabulary.kind].from_numbers(values["value"])
        lists = values["vector"].cast(pl.List(pl.Float64))
        lengths = lists.list.len().to_numpy()
        size = int(np.bincount(lengths, minlength=2).argmax()) or 1
        finite = lists.list.eval(pl.element().cast(pl.Float32).is_finite().fill_null(value=False)).list.all()
        wrong = pl.Series(lengths != size) | ~finite | (typed.is_duplicated() & typed.is_not_null())
        if wrong.any():
            msg = f"{values['value'].filter(wrong)[0]!r} has not one vector of {size} finite numbers"
            raise ValueError(msg)
        vectors = lists.explode().to_numpy().reshape(-1, size)
    except (OSError, ValueError, pl.exceptions.PolarsError) as error:
        msg = f"train.init_tables.{name}: {file} is no Parquet file of columns value and vector, lists of one length: "
        raise ConfigError(msg + str(error).partition("\n")[0]) from error
    dim = table.dim if table.asked is None else table.asked.dim
    if vectors.shape[1] > dim:
        vectors = vectors - vectors.mean(axis=0)
        vectors = vectors @ np.linalg.eigh(vectors.T @ vectors)[1][:, : -dim - 1 : -1]
    ids = np.where(typed.is_null(), 0, vocabulary.lookup(typed)).astype(np.int64)
    if not ids.any():
        msg = f"train.init_tables.{name}: no value of {file} has an id in {dataset.path}; write them as in the log"
        raise ConfigError(msg)
    rows = np.pad(vectors, ((0, 0), (0, table.dim - vectors.shape[1]))).astype(np.float32)
    return table.name, ids[ids > 0], rows[ids > 0]


def set_rows(model: nn.Module, table: str, ids: NDArray[np.int64], rows: NDArray[np.float32]) -> None:
    """Give those ids of a sharded table that this rank has these rows."""
    for value in (value for name, value in model.state_dict().items() if f".{table}." in name):
        for shard in value.local_shards():
            (first, column), (count, width) = shard.metadata.shard_offsets, shard.metadata.shard_sizes
            here = (ids >= first) & (ids < first + count)
            found = torch.from_numpy(rows[here, column : column + width]).to(shard.tensor.device)
            shard.tensor.detach()[torch.from_numpy(ids[here] - first).to(found.device)] = found
