"""The job that turns a raw log into a dataset.

In: log files, a schema, thresholds, a seed.  Out: a `Dataset`, complete or absent.

    1. read      each chunk of lines -> typed columns, each sparse value hashed once (`EncodedChunk`)
    2. split     the number of good rows says which are training rows, which val, which test
    3. count     each feature: counts of the training rows -> vocabulary -> the id of every value met
    4. encode    each chunk -> float32 and int32; its training rows scattered to buckets by a hash of their position
    5. write     each bucket, permuted by a second hash, is a part file; val and test keep the order of the log

Every step is a function of its chunk, feature or bucket alone.  All chunks stay in memory here, about 210 bytes a row.
"""

import os
import shutil
from collections import deque
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import polars as pl

from torchdlrm.data import shuffle
from torchdlrm.data.bad_rows import BadRows
from torchdlrm.data.dataset import (
    MANIFEST_NAME,
    ROW_GROUP_ROWS,
    BadRowsRecord,
    Dataset,
    FileRecord,
    Manifest,
    SourceRecord,
    SparseRecord,
    file_record,
    write_part,
)
from torchdlrm.data.encoded_rows import EncodedChunk, EncodedRows
from torchdlrm.data.source import CHUNK_BYTES, LogFile, find_files, parse_chunk, read_chunks
from torchdlrm.data.splits import SPLIT_NAMES, SplitBounds, SplitName, criteo_split
from torchdlrm.data.transforms import FittedDense, Moments, encode_dense, fit_dense
from torchdlrm.data.vocabulary import (
    DEFAULT_MIN_COUNT,
    Vocabulary,
    dictionary_encode,
    merge_counts,
)
from torchdlrm.errors import ConfigError, DatasetError
from torchdlrm.progress import ProgressListener, SilentProgress
from torchdlrm.schema import FeatureSchema

PART_ROWS = 1 << 20


@dataclass(frozen=True)
class PreprocessOptions:
    """What the bytes of a dataset depend on, besides log and schema; `max_bad_rows` only decides whether there is one.

    Raises:
        ConfigError: a number is out of its range.
    """

    min_count: int = DEFAULT_MIN_COUNT
    max_rows: int | None = None
    seed: int = 0
    max_bad_rows: int = 0
    part_rows: int = PART_ROWS

    def __post_init__(self) -> None:
        wrong = [
            f"--{name.replace('_', '-')}: must be at least {least}, got {value}"
            for name, value, least in (
                ("min_count", self.min_count, 1),
                ("max_rows", self.max_rows, 2),
                ("seed", self.seed, 0),
                ("max_bad_rows", self.max_bad_rows, 0),
                ("part_rows", self.part_rows, 1),
            )
            if value is not None and value < least
        ]
        if self.seed >= 2**63:
            wrong.append(f"--seed: must be below 2^63, got {self.seed}")
        if wrong:
            raise ConfigError("\n".join(wrong))


@dataclass(frozen=True)
class Feature:
    """A fitted sparse feature, and for each chunk the id of each of its distinct values: int32 [D]."""

    vocabulary: Vocabulary
    ids_of_values: list[npt.NDArray[np.int32]]


def preprocess(
    logs: Sequence[Path],
    out: Path,
    schema: FeatureSchema,
    options: PreprocessOptions | None = None,
    progress: ProgressListener | None = None,
    chunk_bytes: int = CHUNK_BYTES,
) -> Dataset:
    """Turn a raw log into a dataset in the new folder `out`.

    Args:
        logs: the files of the log.
        out: the folder to make; until it is whole, its content grows beside it under another name.
        schema: the log's columns.
        options: thresholds and seed.
        progress: hears of the phases.
        chunk_bytes: text that is read at a time; changes no byte of the dataset.

    Raises:
        LogError: a file of the log is missing, damaged or empty, or has more bad rows than allowed.
        DatasetError: `out` exists, or cannot be written.
    """
    options = options or PreprocessOptions()
    progress = progress or SilentProgress()
    files = find_files(logs)
    if out.exists():
        msg = f"{out}: exists; choose another --out, or remove it first"
        raise DatasetError(msg)
    partial = out.parent / f".{out.name}.partial"
    try:
        if partial.exists():
            shutil.rmtree(partial)  # left behind by a job that was killed
        partial.mkdir(parents=True)
        manifest = _write_dataset(files, partial, schema, options, progress, chunk_bytes)
        (partial / MANIFEST_NAME).write_text(manifest.to_json(), encoding="utf-8")
        partial.rename(out)
    except OSError as error:
        msg = f"{out}: cannot be written: {error.strerror or error}"
        raise DatasetError(msg) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return Dataset.open(out)


def _write_dataset(
    files: Sequence[LogFile],
    folder: Path,
    schema: FeatureSchema,
    options: PreprocessOptions,
    progress: ProgressListener,
    chunk_bytes: int,
) -> Manifest:
    bad_rows = BadRows()
    progress.start_phase("read", sum(file.size_bytes for file in files), "bytes")
    chunks_of_files = [
        list(_read_file(file, schema, bad_rows, options.max_bad_rows, progress, chunk_bytes)) for file in files
    ]
    rows_of_files = [sum(chunk.num_rows for chunk in chunks_of_file) for chunks_of_file in chunks_of_files]
    chunks = deque(chunk for chunks_of_file in chunks_of_files for chunk in chunks_of_file)
    chunks_of_files.clear()
    split = criteo_split(files, rows_of_files)

    (folder / "vocabulary").mkdir()
    features = _fit_sparse_columns(chunks, schema, split, options, progress)
    sparse = {name: _write_vocabulary(feature.vocabulary, folder) for name, feature in features.items()}
    dense = _fit_dense_columns(chunks, schema, split)

    progress.start_phase("encode", sum(rows_of_files))
    rows = _encode_and_scatter(chunks, schema, dense, features, split, options, progress)
    progress.start_phase("write", sum(rows_of_files))
    frames: dict[SplitName, Iterable[pl.DataFrame]] = {
        "train": rows.training_parts(options.seed),
        "val": _in_parts(rows.val, options.part_rows),
        "test": _in_parts(rows.test, options.part_rows),
    }
    num_embeddings = {name: record.num_embeddings for name, record in sparse.items()}
    return Manifest(
        feature_schema=schema,
        split_rule=split.rule,
        seed=options.seed,
        min_count=options.min_count,
        max_rows=options.max_rows,
        row_group_rows=ROW_GROUP_ROWS,
        part_rows=options.part_rows,
        dense=dense,
        sparse=sparse,
        splits={
            name: rows.tallies[name].record(_write_parts(frames[name], name, schema, num_embeddings, folder, progress))
            for name in SPLIT_NAMES
        },
        source=tuple(
            SourceRecord(name=file.name, size_bytes=file.size_bytes, rows=num_rows)
            for file, num_rows in zip(files, rows_of_files, strict=True)
        ),
        bad_rows=BadRowsRecord.of(bad_rows),
    )


def _read_file(
    file: LogFile,
    schema: FeatureSchema,
    bad_rows: BadRows,
    max_bad_rows: int,
    progress: ProgressListener,
    chunk_bytes: int,
) -> Iterator[EncodedChunk]:
    """The chunks of a file, in order.

    Raises:
        LogError: the file is not what the schema says, or there are too many bad rows.
    """
    num_lines = int(schema.header)
    read_bytes = 0
    for lines, offset_bytes in read_chunks(file, schema, chunk_bytes):
        parsed = parse_chunk(lines, schema)
        bad_rows.add_chunk(parsed.bad_rows, file.name, num_lines)
        bad_rows.check(max_bad_rows)
        num_lines += parsed.num_lines
        yield _encode_chunk(parsed.frame, schema)
        progress.advance(offset_bytes - read_bytes)
        read_bytes = offset_bytes


def _encode_chunk(frame: pl.DataFrame, schema: FeatureSchema) -> EncodedChunk:
    names = [column.name for column in schema.sparse]
    with ThreadPoolExecutor(os.cpu_count()) as threads:  # PyArrow hashes without holding the GIL
        columns = list(threads.map(lambda name: dictionary_encode(frame[name]), names))
    return EncodedChunk(frame.drop(names), dict(zip(names, columns, strict=True)))


def _fit_sparse_columns(
    chunks: Collection[EncodedChunk],
    schema: FeatureSchema,
    split: SplitBounds,
    options: PreprocessOptions,
    progress: ProgressListener,
) -> dict[str, Feature]:
    """A vocabulary for each sparse feature, of the training rows, and the ids of all values met."""
    training_rows = [rows["train"] for rows in _rows_of_chunks(chunks, split)]
    progress.start_phase("count", len(schema.sparse), "features")
    features = {}
    for column in schema.sparse:
        columns = [chunk.sparse[column.name] for chunk in chunks]
        counts = merge_counts((c.values, c.counts(rows)) for c, rows in zip(columns, training_rows, strict=True))
        vocabulary = Vocabulary.from_counts(
            column.name, column.kind, counts, min_count=options.min_count, max_rows=options.max_rows
        )
        ids = vocabulary.lookup(pl.concat([c.values for c in columns])).to_numpy()
        ends = np.cumsum([len(c.values) for c in columns])
        features[column.name] = Feature(vocabulary, np.split(ids, ends[:-1]))
        progress.advance(1)
    return features


def _rows_of_chunks(chunks: Iterable[EncodedChunk], split: SplitBounds) -> Iterator[dict[SplitName, slice]]:
    first_row = 0
    for chunk in chunks:
        yield split.rows_of(first_row, chunk.num_rows)
        first_row += chunk.num_rows


def _write_vocabulary(vocabulary: Vocabulary, folder: Path) -> SparseRecord:
    name = f"vocabulary/{vocabulary.name}.parquet"
    vocabulary.write(folder / name)
    return SparseRecord(
        num_embeddings=vocabulary.num_embeddings, vocabulary=file_record(folder, name, vocabulary.table.height)
    )


def _fit_dense_columns(
    chunks: Collection[EncodedChunk], schema: FeatureSchema, split: SplitBounds
) -> dict[str, FittedDense]:
    """The transform of each dense column with its constants, of the training rows where it needs any."""
    moments = {column.name: Moments() for column in schema.dense if column.transform == "standardize"}
    for chunk, rows in zip(chunks, _rows_of_chunks(chunks, split), strict=True):
        for name, sums in moments.items():
            sums.add(chunk.label_and_dense[name][rows["train"]])
    return {column.name: fit_dense(column, moments.get(column.name)) for column in schema.dense}


def _encode_and_scatter(
    chunks: deque[EncodedChunk],
    schema: FeatureSchema,
    dense: Mapping[str, FittedDense],
    features: Mapping[str, Feature],
    split: SplitBounds,
    options: PreprocessOptions,
    progress: ProgressListener,
) -> EncodedRows:
    """Encode chunk by chunk, dropping each; deal the training rows out to their buckets."""
    rows = EncodedRows(num_buckets=shuffle.num_buckets(split.train_rows, options.part_rows))
    first_row = 0
    for i in range(len(chunks)):
        chunk = chunks.popleft()
        encoded = _encode(chunk, i, schema, dense, features)
        slices = split.rows_of(first_row, chunk.num_rows)
        for name in SPLIT_NAMES:
            rows.tallies[name].add(chunk, slices[name], {n: f.ids_of_values[i] for n, f in features.items()}, schema)
        rows.scatter(encoded[slices["train"]], first_row, options.seed)
        rows.val.append(encoded[slices["val"]])
        rows.test.append(encoded[slices["test"]])
        first_row += chunk.num_rows
        progress.advance(chunk.num_rows)
    return rows


def _encode(
    chunk: EncodedChunk,
    i: int,
    schema: FeatureSchema,
    dense: Mapping[str, FittedDense],
    features: Mapping[str, Feature],
) -> pl.DataFrame:
    """Label, dense float32 and sparse int32: what `transforms.encode` gives for the raw rows, got from the codes."""
    ids = [
        pl.Series(name, features[name].ids_of_values[i][column.codes], dtype=pl.Int32)
        for name, column in chunk.sparse.items()
    ]
    label = chunk.label_and_dense.select(schema.label.name)
    return pl.concat([label, encode_dense(chunk.label_and_dense, dense), pl.DataFrame(ids)], how="horizontal")


def _in_parts(frames: list[pl.DataFrame], part_rows: int) -> Iterator[pl.DataFrame]:
    """The rows of all `frames`, in order, in frames of `part_rows`."""
    whole = pl.concat(frames)
    yield from whole.iter_slices(part_rows)


def _write_parts(
    frames: Iterable[pl.DataFrame],
    split_name: SplitName,
    schema: FeatureSchema,
    num_embeddings: Mapping[str, int],
    folder: Path,
    progress: ProgressListener,
) -> tuple[FileRecord, ...]:
    (folder / split_name).mkdir()
    records = []
    for i, frame in enumerate(frames):
        records.append(write_part(frame, schema, num_embeddings, folder, f"{split_name}/part-{i:05d}.parquet"))
        progress.advance(frame.height)
    return tuple(records)
