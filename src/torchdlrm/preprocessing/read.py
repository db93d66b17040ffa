"""Runs the task that reads a chunk of a log into a file of its good rows, with codes for its sparse values.

The chunk's file holds the tables

    rows         labels int8; weight float32, if there is one; dense columns as read, in the smallest type
    time         `@time` int64, where the log has times
    rows/f       the codes of the values of a sparse column, or for a multi-valued one how many values each row has
    codes/f      the codes of a multi-valued column, one row after the other, and their weights where there are some
    values/f     the D distinct values of column f: value, count (of all rows of the chunk), by partition; the buckets
                 of numbers, but the numbers themselves where the training rows will say what the buckets are
    bounds/f     where each partition of these values starts, when there is more than one
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import polars as pl
import pyarrow as pa
import pyarrow.compute as pc

from torchdlrm.data.splits import RowSplit, SplitCodes, TimeSplit
from torchdlrm.features.columns import SparseColumn
from torchdlrm.features.schema import FeatureSchema
from torchdlrm.features.value_hash import hash_values
from torchdlrm.files import replacing
from torchdlrm.jobs.sections import Sections, write_sections
from torchdlrm.jobs.work_folder import Result
from torchdlrm.logs.files import LogFile
from torchdlrm.logs.format import Chunk, ParsedChunk
from torchdlrm.logs.lines import LineFormat, read_chunks
from torchdlrm.storage.reading import parts_of

TIME = "@time"


def unpack(file: LogFile, layout: FeatureSchema, chunk_bytes: int, folder: Path, name: str) -> Result:
    """Task: a packed file -> its chunks as LZ4-packed text, `folder/name-00000` and so on.

    A gzip stream has no places to start from, so one task reads it from end to end; unpacking is five times as fast as
    what comes after.

    Raises:
        LogError: the file is damaged, or not what the schema says.
    """
    chunks, end = [], 0
    for i, lines in enumerate(read_chunks(file, layout, chunk_bytes)):
        path = folder / f"{name}-{i:05d}"
        if not path.exists():
            with replacing(path) as temporary, pa.CompressedOutputStream(str(temporary), "lz4") as packed:
                packed.write(lines)
        chunks.append([end, end := end + len(lines)])
    return {"chunks": chunks}


def read_chunk(
    file: LogFile,
    chunk: Chunk,
    text: Path | None,
    schema: FeatureSchema,
    layout: FeatureSchema,
    num_partitions: int,
    target: Path,
) -> Result:
    """Task: parse a chunk and write its file.

    `text` is the chunk's unpacked text where the file is packed; `layout` is the schema with its columns in the order
    of the file.

    Raises:
        LogError: the log's file cannot be read, or changed.
    """
    parsed = _parse(file, chunk, text, layout)
    sections: dict[str, pa.Table] = {}
    rows = parsed.frame
    columns = [rows[name] for name in schema.stored_targets]
    columns += [_shrunk(rows[column.name]) for column in (*schema.dense, *schema.content)]
    if schema.time is not None:
        sections["time"] = rows[schema.time.name].alias(TIME).to_frame().to_arrow()
    num_values, value_bytes, largest_ids = {}, {}, {}
    for column in schema.sparse:
        codes = encode_column(rows[column.raw_name], column, num_partitions, sections)
        sections[f"rows/{column.name}"] = codes.to_frame().to_arrow()
        values = sections[f"values/{column.name}"]
        num_values[column.name] = values.num_rows
        value_bytes[column.name] = values.nbytes
        if column.kind == "id":
            largest_ids[column.name] = pc.max(values["value"]).as_py() or 0
    sections["rows"] = pl.DataFrame(columns).to_arrow()
    write_sections(target, sections.items())
    return {
        "rows": rows.height,
        "lines": parsed.num_lines,
        "bad_rows": parsed.bad_rows.to_json(),
        "num_values": num_values,
        "value_bytes": value_bytes,
        "largest_ids": largest_ids,
    }


def _parse(file: LogFile, chunk: Chunk, text: Path | None, layout: FeatureSchema) -> ParsedChunk:
    file.check_unchanged()
    if text is None:
        parsed = file.format.read(file, chunk, layout)
    else:
        assert isinstance(file.format, LineFormat), "others are not packed"
        with pa.CompressedInputStream(pa.BufferReader(parts_of(text, whole=True)(0, None)), "lz4") as packed:
            parsed = file.format.parse(packed.read(), layout)
    file.check_unchanged()
    return parsed


def encode_column(
    column: pl.Series, about: SparseColumn, num_partitions: int, sections: dict[str, pa.Table]
) -> pl.Series:
    """Add the sections of a sparse column; returns what stands for it in the rows."""
    flat = column
    if about.is_multi_valued:
        flat = column.drop_nulls().explode(empty_as_null=False)
    weights: list[pl.Series] = []
    if about.weights_name is not None:
        weights = [flat.struct.field("weight")]
        flat = flat.struct.field("value")
    values, codes = _distinct(flat)  # hashes every value once
    if about.buckets is not None and not about.needs_fit:
        # Few numbers are searched for, if the same ones come often: a quarter of the time for Criteo's counts.
        values, places = _distinct(about.categories(values))
        codes = places[codes]
    counts = np.bincount(codes, minlength=len(values)).astype(np.int32)
    if num_partitions > 1:
        order, bounds = _by_partition(values, num_partitions)
        places = np.empty(len(order), np.int32)
        places[order] = np.arange(len(order), dtype=np.int32)
        values, counts, codes = values[order], counts[order], places[codes]
        sections[f"bounds/{about.name}"] = pa.table({"start": bounds})
    sections[f"values/{about.name}"] = pa.table({"value": values.to_arrow(), "count": counts})
    narrow = pl.Series(about.name, codes.astype(smallest_type(len(values))))
    if not about.is_multi_valued:
        return narrow
    sections[f"codes/{about.name}"] = pl.DataFrame([narrow.alias("code"), *weights]).to_arrow()
    return column.list.len().fill_null(0).cast(pl.UInt32)


def _distinct(values: pl.Series) -> tuple[pl.Series, npt.NDArray[np.int32]]:
    """The values, each once, D of them; and which of these each one is, [B]."""
    encoded = pc.dictionary_encode(values.to_arrow(), null_encoding="encode")
    return pl.Series(values.name, encoded.dictionary, dtype=values.dtype), encoded.indices.to_numpy()


def stored_categories(values: pl.Series, column: SparseColumn) -> pl.Series:
    """What gets ids of the values that a chunk's file holds, once buckets are fitted."""
    return column.categories(values) if column.needs_fit else values


def _by_partition(values: pl.Series, num_partitions: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int32]]:
    """The order of values by partition, int64 [D]; and where each partition starts, int32 [num_partitions + 1]."""
    partitions = partitions_of(values, num_partitions)
    bounds = np.concatenate([[0], np.cumsum(np.bincount(partitions, minlength=num_partitions))])
    return np.argsort(partitions, kind="stable"), bounds.astype(np.int32)


def partitions_of(values: pl.Series, num_partitions: int) -> npt.NDArray[np.uint16]:
    """The partition of each value, by its hash: uint16 [D]; `num_partitions` is a power of two, at most 65,536."""
    if values.dtype == pl.Float64:
        values = values.reinterpret(dtype=pl.Int64)
    return ((hash_values(values) >> np.uint64(48)) * np.uint64(num_partitions) >> np.uint64(16)).astype(np.uint16)


def smallest_type(num_values: int) -> type[np.uint8] | type[np.uint16] | type[np.int32]:
    """The type of fewest bytes that holds the numbers from 0 to `num_values` - 1."""
    return np.uint8 if num_values <= 1 << 8 else np.uint16 if num_values <= 1 << 16 else np.int32


def _shrunk(column: pl.Series) -> pl.Series:
    return column.shrink_dtype() if column.dtype == pl.Int64 else column


@dataclass(frozen=True)
class ChunkFile:
    """A chunk that was read: its file, where its rows stand in the log, how many are in each split.

    `first_of_split`: for train, val and test, how many rows of the split stand before this chunk.
    """

    path: Path
    first_row: int
    num_rows: int
    first_of_split: tuple[int, int, int]
    rows_of_split: tuple[int, int, int]

    def split_of_rows(self, split: RowSplit, sections: Sections) -> SplitCodes:
        """The split of each of the B rows of the chunk, of whose file these are: uint8 [B]."""
        times = sections.table("time")[TIME].to_numpy() if isinstance(split, TimeSplit) else None
        return split.split_of_rows(self.first_row, self.num_rows, times)
