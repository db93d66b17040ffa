"""Vocabularies as the preprocessing job makes them: by its tasks, from rows in chunks."""

import tempfile
from itertools import pairwise
from pathlib import Path

import polars as pl

from torchdlrm.data.splits import SplitBounds
from torchdlrm.features.columns import SparseColumn
from torchdlrm.features.kinds import KINDS
from torchdlrm.features.vocabulary import CANDIDATE_COLUMNS, MAX_ID, PERIOD_COLUMNS, Vocabulary
from torchdlrm.jobs.sections import write_sections
from torchdlrm.preprocessing.count import ValueRange, spread_values
from torchdlrm.preprocessing.read import ChunkFile, encode_column
from torchdlrm.preprocessing.vocabularies import Period, assign_ids, count_values


def fit(kind, values, *, min_count=1, max_embeddings=None, values_at_a_time=10_000, **cut):
    """The vocabulary of rows with these values.

    Args:
        kind: of the values.
        values: of all rows.
        min_count: a value of fewer rows is unknown.
        max_embeddings: rows of the table.
        values_at_a_time: values that memory holds.
        cut: how rows and values are dealt out, for `read_chunks`.
    """
    column = SparseColumn(name="f", kind=kind)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        split, chunks, ranges = read_chunks(folder, column, values, **cut)
        counts = [folder / f"counts-{i}" for i in range(len(ranges))]
        for values_of_range, target in zip(ranges, counts, strict=True):
            count_values(values_of_range, chunks, split, min_count, None, None, None, target)
        targets = [folder / f"ids-{i}" for i in range(len(ranges))]
        max_ids = MAX_ID if max_embeddings is None else max_embeddings - 1
        (folder / "vocabulary").mkdir()
        assign_ids(column, counts, 1, 0, None, max_ids, values_at_a_time, targets, folder)
        return Vocabulary.read(folder / "vocabulary/f.parquet", "f", kind)


def read_chunks(folder, column, values, cuts=(), num_train=None, num_partitions=1):
    """Rows of one column as the first phase of a job leaves them: the split, the chunks and the ranges of values.

    Rows are cut into chunks at `cuts`, the first `num_train` are for training (all by default), and values lie in
    `num_partitions` ranges, a power of two.
    """
    series = pl.Series("f", values, dtype=KINDS[column.kind].dtype)
    num_train = len(series) if num_train is None else num_train
    split = SplitBounds("", num_train, len(series) - num_train, 0)
    edges = sorted([0, len(series), *(min(cut, len(series)) for cut in cuts)])
    chunks = []
    for start, end in pairwise(edges):
        sections = {}
        codes = encode_column(series[start:end], column, num_partitions, sections)
        sections["rows/f"] = pl.DataFrame([codes]).to_arrow()
        train = min(end, num_train) - min(start, num_train)
        chunks.append(
            ChunkFile(folder / f"{len(chunks)}", start, end - start, (0, 0, 0), (train, end - start - train, 0))
        )
        write_sections(chunks[-1].path, sections.items())
    return split, chunks, [ValueRange(column, i, i, i + 1) for i in range(num_partitions)]


def next_vocabulary(before, folder, values, period, *, num_partitions=1, values_at_a_time=10_000, **rules):
    """What the tasks make of the values of a period's training rows, from the folder of the one before.

    Args:
        before: the folder, and the result, of the period before; None for the first.
        folder: to write the vocabulary, and the files of reset ids and candidates, to.
        values: integers.
        period: its number.
        num_partitions: ranges of values that are counted by themselves, a power of two.
        values_at_a_time: values that memory holds.
        rules: min_count, expire_after, admit_over and max_embeddings.

    Returns:
        The result of the task that gives ids.
    """
    column = SparseColumn(name="f", kind="int")
    for name in ("vocabulary", "reset", "candidates"):
        (folder / name).mkdir(parents=True)
    split, chunks, ranges = read_chunks(folder, column, values, num_partitions=num_partitions)
    of_period = Period(period, rules.get("expire_after"), rules.get("admit_over", 1))
    places = {
        what: [folder / f"{what}-{i}" for i in range(num_partitions)]
        for what in ("known", "asked", "counted", "tables")
    }
    files = {"vocabulary": False, "candidates": False}
    if before is not None:
        for (what, columns, section), targets in zip(
            (("vocabulary", PERIOD_COLUMNS, "ids"), ("candidates", CANDIDATE_COLUMNS, "counts")),
            (places["known"], places["asked"]),
            strict=True,
        ):
            file = before[0] / what / "f.parquet"
            files[what] = file.exists()
            if files[what]:
                spread_values(column, file, columns, section, ranges, targets, num_partitions)
    for i, of_range in enumerate(ranges):
        count_values(
            *(of_range, chunks, split, rules["min_count"]),
            places["known"][i] if files["vocabulary"] else None,
            places["asked"][i] if files["candidates"] else None,
            *(of_period, places["counted"][i]),
        )
    known = (1, 0) if before is None else (before[1]["num_embeddings"], before[1]["num_values"])
    most = rules.get("max_embeddings")
    max_ids = MAX_ID if most is None else most - 1
    return assign_ids(column, places["counted"], *known, of_period, max_ids, values_at_a_time, places["tables"], folder)
