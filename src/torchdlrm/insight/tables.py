"""Says what a bundle's tables hold. Each is read in blocks; memory holds some 12 bytes for each of its R rows.

D is the dimension of a row.
"""

import heapq
import os
from collections.abc import Iterator
from typing import Any

import numpy as np
import polars as pl
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray

from torchdlrm.bundle.bundle import Bundle
from torchdlrm.bundle.precision import TABLE_PRECISIONS
from torchdlrm.bundle.weights_file import MappedWeights
from torchdlrm.bundle.write import dequantize_rows
from torchdlrm.errors import ConfigError, shown
from torchdlrm.features.tables import FeatureTable
from torchdlrm.model import table_weight
from torchdlrm.progress import ProgressListener
from torchdlrm.toml import did_you_mean

_BLOCK_BYTES = 16 << 20
_QUANTILES = (0.05, 0.5, 0.95)
SEEN_FROM = (1, 10, 100, 1_000)  # rows are told apart by how often training has seen their value


def table_uses(bundle: Bundle, progress: ProgressListener) -> list[dict[str, Any]]:
    """What each table of a bundle holds.

    Returns:
        Of each table `table`, `rows`, `dim`; `effective_rank`, how many of the D dimensions its rows use: exp of
        the entropy of the singular values as fractions of their sum (Roy and Vetterli 2007), NaN where all are 0;
        `seen_rows`, those whose value training has seen, without row 0, of unknown values; and by `SEEN_FROM` `norms`,
        the lengths that 5 %, 50 % and 95 % of the rows that were seen that often are below. Where values are hashed or
        are ids, or several share a row, `seen_rows` is None and there are no `norms`.
    """
    tables = {table.name: table for table in bundle.manifest.tables}.values()  # several keys may look into one
    progress.start_phase("tables", sum(table.rows for table in tables))
    return [_use_of(bundle, table, progress) for table in tables]


def nearest(bundle: Bundle, feature: str, value: str, count: int = 10) -> dict[str, float]:
    """The values of a feature whose rows point most nearly where that of one does, and the cosines of the angles.

    Values are as the vocabulary has them: hex as 8 digits, of buckets the number, empty for a missing one.

    Raises:
        ConfigError: there is no such feature or value, or no row is of one value alone.
    """
    tables = {table.feature: table for table in bundle.manifest.tables}
    seen_R = None if feature not in tables else _seen(bundle, tables[feature])
    if seen_R is None:
        msg = f"`neighbours`: the model has no vocabulary with a table for {feature}{did_you_mean(feature, tables)}"
        raise ConfigError(msg)
    path = bundle.path / str(bundle.manifest.sparse[feature].vocabulary)
    vocabulary = pl.scan_parquet(path).select(pl.col("value").cast(pl.String).fill_null(""), "id")
    found = vocabulary.filter(pl.col("value") == value).collect()["id"]
    if found.is_empty():
        raise ConfigError(f"`neighbours`: {shown(value)} has no id in the vocabulary of {feature}")
    row, near, end = next(_blocks(bundle, tables[feature], start=found[0]))[0], list[tuple[float, int]](), 0
    for block in _blocks(bundle, tables[feature]):
        cosines = block @ row / (np.linalg.norm(block, axis=1) * np.linalg.norm(row)).clip(1e-30)
        cosines[seen_R[end : end + len(block)] == 0] = -2  # row 0, and those whose value has expired
        best = np.argpartition(-cosines, min(count, len(block) - 1))[: count + 1]
        near += zip(cosines[best].tolist(), (end + best).tolist(), strict=True)
        end += len(block)
    nearest_ids = {i: cosine for cosine, i in heapq.nlargest(count + 1, near) if i != found[0] and cosine > -2}
    names = dict(vocabulary.filter(pl.col("id").is_in([*nearest_ids])).select("id", "value").collect().iter_rows())
    return {names[i]: cosine for i, cosine in [*nearest_ids.items()][:count]}


def _use_of(bundle: Bundle, table: FeatureTable, progress: ProgressListener) -> dict[str, Any]:
    seen_R, lengths_R = _seen(bundle, table), np.empty(table.rows, np.float32)
    gram_DD, end = np.zeros((table.dim, table.dim)), 0
    for block in _blocks(bundle, table):
        exact = block.astype(np.float64)
        gram_DD += exact.T @ exact
        lengths_R[end : (end := end + len(block))] = np.linalg.norm(block, axis=1)
        progress.advance(len(block))
    singular_D = np.sqrt(np.linalg.eigvalsh(gram_DD).clip(0))
    fractions = singular_D[singular_D > 0] / singular_D.sum()
    rank = float(np.exp(-(fractions * np.log(fractions)).sum())) if fractions.size else np.nan
    use = {"table": table.table_key, "rows": table.rows, "dim": table.dim, "effective_rank": rank}
    if seen_R is None:
        return use | {"seen_rows": None, "norms": {}}
    groups = ((seen, lengths_R[seen_R == i]) for i, seen in enumerate(SEEN_FROM, 1))
    norms = {seen: np.quantile(of, _QUANTILES, overwrite_input=True).tolist() for seen, of in groups if of.size}
    return use | {"seen_rows": int(np.count_nonzero(seen_R)), "norms": norms}


def _seen(bundle: Bundle, table: FeatureTable) -> NDArray[np.uint8] | None:
    """How many of `SEEN_FROM` the value of each row has reached, by the vocabulary, 0 where it has none: [R]."""
    path = bundle.manifest.sparse[table.feature].vocabulary
    if path is None or table.combination is not None:
        return None
    seen = np.zeros(table.rows, np.uint8)
    with pq.ParquetFile(bundle.path / path) as file:  # its checksum was compared when the bundle was opened
        for batch in file.iter_batches(columns=["count", "id"]):
            counts, ids = (batch.column(name).to_numpy() for name in ("count", "id"))
            seen[ids] = np.searchsorted(SEEN_FROM, counts, side="right")
    return seen


def _blocks(bundle: Bundle, table: FeatureTable, start: int = 0) -> Iterator[NDArray[np.float32]]:
    """The rows of a table from one on, in blocks: read, and not mapped, so that none stay in memory."""
    precision = bundle.manifest.sparse[table.feature].precision
    row_bytes = TABLE_PRECISIONS[precision].row_bytes(table.dim)
    assert isinstance(bundle.weights, MappedWeights), "it was opened from its folder"
    begin, num_rows = bundle.weights.place(table_weight(table.table_key)).start, _BLOCK_BYTES // row_bytes
    for first in range(start, table.rows, num_rows):
        size_bytes = min(num_rows, table.rows - first) * row_bytes
        data = bytearray(os.pread(bundle.weights.file, size_bytes, begin + first * row_bytes))
        stored = torch.frombuffer(data, dtype=torch.uint8).view(-1, row_bytes)
        yield dequantize_rows(stored, precision, table.dim).numpy()
