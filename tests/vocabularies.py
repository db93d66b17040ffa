"""Vocabularies as the preprocessing job makes them: by its tasks, from rows in chunks."""

import tempfile
from itertools import pairwise
from pathlib import Path

import polars as pl

from torchdlrm.data.splits import SplitBounds
from torchdlrm.features.columns import SparseColumn
from torchdlrm.features.kinds import KINDS
from torchdlrm.features.vocabulary import MAX_ID, Vocabulary
from torchdlrm.preprocessing.count import ValueRange, count_values, rank_values
from torchdlrm.preprocessing.read import ChunkFile, encode_column
from torchdlrm.preprocessing.work_folder import write_sections


def fit(kind, values, *, min_count=1, max_embeddings=None, cuts=(), num_train=None, num_partitions=1):
    """The vocabulary of rows with these values.

    Args:
        kind: of the values.
        values: of all rows.
        min_count: a value of fewer rows is unknown.
        max_embeddings: rows of the table.
        cuts: where the rows are cut into chunks.
        num_train: how many of the first rows are for training; all by default.
        num_partitions: ranges of values that are counted by themselves, a power of two.
    """
    column = SparseColumn(name="f", kind=kind)
    series = pl.Series("f", values, dtype=KINDS[kind].dtype)
    num_train = len(series) if num_train is None else num_train
    split = SplitBounds("", num_train, len(series) - num_train, 0)
    edges = sorted([0, len(series), *(min(cut, len(series)) for cut in cuts)])
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        chunks = []
        for start, end in pairwise(edges):
            sections = {}
            codes = encode_column(series[start:end], column, num_partitions, sections)
            sections["rows"] = pl.DataFrame([codes]).to_arrow()
            train = min(end, num_train) - min(start, num_train)
            chunks.append(
                ChunkFile(folder / f"{len(chunks)}", start, end - start, (0, 0, 0), (train, end - start - train, 0))
            )
            write_sections(chunks[-1].path, sections)
        ranges = [ValueRange(column, i, i, i + 1) for i in range(num_partitions)]
        counts = [folder / f"counts-{i}" for i in range(num_partitions)]
        for values_of_range, target in zip(ranges, counts, strict=True):
            count_values(values_of_range, chunks, split, min_count, None, target)
        targets = [folder / f"ids-{i}" for i in range(num_partitions)]
        max_ids = MAX_ID if max_embeddings is None else max_embeddings - 1
        rank_values(column, counts, max_ids, 10_000, None, None, targets, folder / "f.parquet")
        return Vocabulary.read(folder / "f.parquet", "f", kind)
