"""Runs tasks that encode groups of chunks and distribute their rows over the parts, and that write each part.

A group's file has a table for each part that has rows in it, called by its number.  Its columns are `@position` (int64,
of training rows in the log), labels, the weight if there is one, the dense columns as float32 and the sparse
ones as ids of the smallest type that holds the feature's, or lists of these, and of float32 where values have weights.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq

from torchdlrm.data.manifest import FileRecord
from torchdlrm.data.splits import SPLIT_NAMES, RowSplit, SplitCodes, buckets, order_in_bucket
from torchdlrm.features.columns import SparseColumn
from torchdlrm.features.encode import encode_dense
from torchdlrm.features.schema import FeatureSchema
from torchdlrm.features.transforms import DenseTransform
from torchdlrm.features.value_hash import hashed_ids
from torchdlrm.features.vectors import encode_vectors
from torchdlrm.files import replacing_durably
from torchdlrm.jobs.sections import Sections, as_table, write_sections
from torchdlrm.jobs.work_folder import Result
from torchdlrm.preprocessing.read import ChunkFile, smallest_type, stored_categories
from torchdlrm.preprocessing.tally import Tally, dense_bins
from torchdlrm.storage.reading import parts_of, read_each

POSITION = "@position"
# A reader takes a row group at a time: 16,384 rows of Criteo's 40 columns are 2.5 MB, read in 2 ms.
ROW_GROUP_ROWS = 16_384
# Values of features with fewer ids than this repeat often enough in a row group for a Parquet dictionary to pay.
_DICTIONARY_MAX_IDS = 2_048
_IDS, _WEIGHTS = (pa.list_(pa.field("element", kind, nullable=False)) for kind in (pa.int32(), pa.float32()))


@dataclass(frozen=True)
class Parts:
    """The parts of a dataset, numbered: `num_train` buckets, then those of val and of test, of `part_rows` each."""

    part_rows: int
    seed: int
    rows_of_split: tuple[int, int, int]

    @property
    def num_parts(self) -> tuple[int, int, int]:
        """Parts of each split; a split without rows has none."""
        train, val, test = (-(-rows // self.part_rows) for rows in self.rows_of_split)
        return train, val, test

    @property
    def files(self) -> list[tuple[int, str]]:
        """For each part its split and the name of its file."""
        return [
            (split, f"{name}/part-{i:05d}.parquet")
            for split, name in enumerate(SPLIT_NAMES)
            for i in range(self.num_parts[split])
        ]

    def part_of_rows(
        self, first_row: int, first_of_split: tuple[int, int, int], codes: SplitCodes
    ) -> npt.NDArray[np.int64]:
        """The part of each of B rows that follow each other in the log, of these splits, uint8 [B]: int64 [B].

        `first_row` is the position of the first among the good rows of the log; `first_of_split` says for train, val
        and test how many rows of the split stand before it.
        """
        parts = np.empty(len(codes), np.int64)
        train_rows = np.flatnonzero(codes == 0)
        parts[train_rows] = buckets(first_row + train_rows, self.seed, self.num_parts[0])
        for split in (1, 2):
            rows = np.flatnonzero(codes == split)
            ranks = first_of_split[split] + np.arange(len(rows))
            parts[rows] = sum(self.num_parts[:split]) + ranks // self.part_rows
        return parts


@dataclass(frozen=True)
class Encoding:
    """All that the rows of a log are encoded by; `ids` are the files of `look_up_values`, by feature and range."""

    schema: FeatureSchema
    dense: Mapping[str, DenseTransform]
    ids: Mapping[str, Sequence[Path]]
    num_embeddings: Mapping[str, int]
    split: RowSplit
    parts: Parts


def encode_group(encoding: Encoding, chunks: Sequence[tuple[int, ChunkFile]], target: Path) -> Result:
    """Task: encode chunks, each with its number, and write their rows by part; returns the parts and the tallies."""
    tallies = [Tally() for _ in SPLIT_NAMES]
    columns: dict[str, list[pl.Series]] = {}
    parts = []
    for number, chunk in chunks:
        if not chunk.num_rows:
            continue
        sections = Sections(chunk.path, whole=True)
        frame, codes = _encode_chunk(encoding, number, chunk, sections, tallies)
        parts.append(encoding.parts.part_of_rows(chunk.first_row, chunk.first_of_split, codes))
        for column in frame:
            columns.setdefault(column.name, []).append(column)
        del frame
    part_of_rows = np.concatenate(parts) if parts else np.zeros(0, np.int64)
    num_parts = sum(encoding.parts.num_parts)
    # NumPy sorts 16 bits by radix, in a fraction of the time.
    order = np.argsort(part_of_rows.astype(np.uint16) if num_parts <= 1 << 16 else part_of_rows, kind="stable")
    bounds = np.cumsum(np.bincount(part_of_rows, minlength=num_parts))
    # Column by column, dropping what was gathered: never all rows twice.
    gathered = {name: _gather(columns.pop(name), order) for name in list(columns)}
    found = write_parts(gathered, bounds, target)
    return {"parts": found, "tallies": [tally.to_json() for tally in tallies]}


def _gather(pieces: list[pl.Series], order: npt.NDArray[np.int64]) -> pa.Array:
    column = pl.concat(pieces, rechunk=True)
    pieces.clear()
    return column.gather(order).rechunk().to_arrow()


def write_parts(
    columns: Mapping[str, pa.Array], bounds: npt.NDArray[np.int64], target: Path
) -> list[tuple[int, tuple[int, int]]]:
    """Write the rows of each part, which stand one after the other; each part that has rows, and its place."""
    table = pa.table(dict(columns))
    edges = enumerate(zip([0, *bounds[:-1].tolist()], bounds.tolist(), strict=True))
    places = write_sections(
        target, {str(part): table[start:end] for part, (start, end) in edges if end > start}.items()
    )
    return [(int(part), place) for part, place in places.items()]


def _encode_chunk(
    encoding: Encoding, number: int, chunk: ChunkFile, sections: Sections, tallies: Sequence[Tally]
) -> tuple[pl.DataFrame, SplitCodes]:
    """The rows of a chunk as the dataset has them, and the split of each."""
    schema = encoding.schema
    rows = sections.table("rows")
    frame = pl.DataFrame(rows)
    codes = chunk.split_of_rows(encoding.split, sections)
    rows_of_split = {
        split: codes == split if num_rows < chunk.num_rows else slice(None)
        for split, num_rows in enumerate(chunk.rows_of_split)
        if num_rows
    }
    positions = np.arange(chunk.first_row, chunk.first_row + chunk.num_rows)
    columns = [pl.Series(POSITION, positions), *(frame[name] for name in schema.stored_targets)]
    for split, here in rows_of_split.items():
        tallies[split].add_labels(*(frame[column.name].to_numpy()[here] for column in schema.labels))
    dense = encode_dense(frame, encoding.dense)
    for column in dense:
        columns.append(column)
        bins = dense_bins(column.to_numpy())
        missing = frame[column.name].is_null().to_numpy()
        for split, here in rows_of_split.items():
            tallies[split].add_dense(column.name, bins[here], int(missing[here].sum()))
    for vector in schema.content:
        columns.append(encode_vectors(frame[vector.name], vector))
        missing = frame[vector.name].is_null().to_numpy()
        for split, here in rows_of_split.items():
            tallies[split].missing_rows[vector.name] += int(missing[here].sum())
    looked_up = _looked_up(encoding, number)
    for about in schema.sparse:
        ids = np.concatenate(looked_up[about.name]) if about.has_vocabulary else _hashed(about, sections)
        values = pl.Series(sections.table(f"rows/{about.name}")[about.name])
        columns += _encode_sparse(encoding, about, values, ids, sections)
        for split, here in rows_of_split.items():
            _tally_sparse(tallies[split], about, values.to_numpy(), ids, sections, here)
    return pl.DataFrame(columns), codes


def _looked_up(encoding: Encoding, number: int) -> dict[str, list[npt.NDArray[np.int32]]]:
    """For each feature with a vocabulary the ids of the distinct values of a chunk, range after range."""

    def read(file: tuple[str, Path]) -> npt.NDArray[np.int32]:
        sections = Sections(file[1])
        return sections.numbers("ids", np.int32, *sections.numbers("start", np.int64, number, number + 2).tolist())

    found: dict[str, list[npt.NDArray[np.int32]]] = {}
    files = [(name, path) for name, paths in encoding.ids.items() for path in paths]
    for (name, _), ids in zip(files, read_each(files, read), strict=True):
        found.setdefault(name, []).append(ids)
    return found


def _hashed(column: SparseColumn, sections: Sections) -> npt.NDArray[np.int32]:
    """The id of each distinct value of the chunk, of a feature without a vocabulary: int32 [D]."""
    values = pl.Series(sections.table(f"values/{column.name}")["value"])
    if column.hash is None:
        return values.to_numpy().astype(np.int32)
    return hashed_ids(stored_categories(values, column), column.hash)


def _encode_sparse(
    encoding: Encoding, column: SparseColumn, rows: pl.Series, ids: npt.NDArray[np.int32], sections: Sections
) -> list[pl.Series]:
    narrow = ids.astype(smallest_type(encoding.num_embeddings[column.name]))
    if not column.is_multi_valued:
        return [pl.Series(column.name, narrow[rows.to_numpy()])]
    codes = sections.table(f"codes/{column.name}")
    offsets = pa.array(np.concatenate([[0], np.cumsum(rows.to_numpy(), dtype=np.int64)]))
    flat = [narrow[codes["code"].to_numpy()]]
    if column.weights_name is not None:
        flat.append(codes["weight"].to_numpy())
    return [
        pl.Series(name, pa.LargeListArray.from_arrays(offsets, pa.array(values)))
        for name, values in zip(column.encoded_names, flat, strict=True)
    ]


def _tally_sparse(
    tally: Tally,
    column: SparseColumn,
    rows: npt.NDArray[np.int64],
    ids: npt.NDArray[np.int32],
    sections: Sections,
    here: npt.NDArray[np.bool_] | slice,
) -> None:
    """Count the values of a split's rows, which are `here` (a slice: all of the chunk)."""
    values = sections.table(f"values/{column.name}")
    if isinstance(here, slice):
        counts = values["count"].to_numpy().astype(np.int64)
    elif column.is_multi_valued:
        codes = sections.table(f"codes/{column.name}")["code"].to_numpy()
        counts = np.bincount(codes[np.repeat(here, rows)], minlength=values.num_rows)
    else:
        counts = np.bincount(rows[here], minlength=values.num_rows)
    if column.is_multi_valued:
        num_missing = int((rows[here] == 0).sum())
    else:
        num_missing = int(counts[pl.Series(values["value"]).is_null().to_numpy()].sum())
    tally.add_sparse(column, ids, counts, num_missing)


def write_rows(
    groups: Sequence[tuple[Path, tuple[int, int]]],
    shuffle_seed: int | None,
    schema: FeatureSchema,
    num_embeddings: Mapping[str, int],
    folder: Path,
    name: str,
) -> Result:
    """Task: gather the rows of a part and write them as `folder/name`.

    `groups` are the files of groups in the order of the log, and where in each the part is.  The rows are in the order
    that `shuffle_seed` gives, without one in that of the log.
    """

    def read(group: tuple[Path, tuple[int, int]]) -> pa.Table:
        path, (start, length) = group
        return as_table(parts_of(path)(start, start + length))

    rows = list(read_each(groups, read))
    order: pl.Series | None = None
    if shuffle_seed is not None:
        positions = np.concatenate([table[POSITION].to_numpy() for table in rows])
        order = pl.Series(order_in_bucket(positions, shuffle_seed))
    columns = []
    sparse_names = {column.name for column in schema.sparse}
    for column in (*schema.stored_targets, *schema.encoded_names):
        values = pl.Series(column, pa.chunked_array([chunk for table in rows for chunk in table[column].chunks]))
        values = values.rechunk() if order is None else values.rechunk().gather(order)
        if column in sparse_names:
            values = values.cast(pl.List(pl.Int32) if values.dtype == pl.List else pl.Int32)
        columns.append(values)
    record = _write_part(pl.DataFrame(columns), schema, num_embeddings, folder, name)
    return record.model_dump()


def _write_part(
    rows: pl.DataFrame, schema: FeatureSchema, num_embeddings: Mapping[str, int], folder: Path, name: str
) -> FileRecord:
    """Write encoded rows as one Parquet file `folder/name`; the same rows give the same bytes.

    No column has nulls, which spares readers the definition levels.  There are no statistics: rows are shuffled, so the
    range of a row group says nothing.
    """
    fields = [pa.field(column.name, pa.int8(), nullable=False) for column in schema.labels]
    floats = [column.name for column in (schema.weight, *schema.dense) if column is not None]
    fields += [pa.field(name, pa.float32(), nullable=False) for name in floats]
    kinds = {column.name: getattr(pa, column.stored or "")() for column in schema.content}
    vectors = {name: pa.list_(pa.field("element", kind, nullable=False)) for name, kind in kinds.items()}
    fields += [pa.field(name, kind, nullable=False) for name, kind in vectors.items()]
    for column in schema.sparse:
        fields.append(pa.field(column.name, _IDS if column.is_multi_valued else pa.int32(), nullable=False))
        if column.weights_name is not None:
            fields.append(pa.field(column.weights_name, _WEIGHTS, nullable=False))
    arrow_schema = pa.schema(fields)
    # One chunk a column: the writer starts a new page wherever a chunk ends.
    arrays = [rows[field.name].rechunk().to_arrow().cast(field.type) for field in fields]
    small = [field.name for field in fields if num_embeddings.get(field.name, 0) <= _DICTIONARY_MAX_IDS]
    lists = [name for column in schema.sparse if column.is_multi_valued for name in column.encoded_names]
    with replacing_durably(folder / name) as temporary:
        pq.write_table(
            pa.Table.from_arrays(arrays, schema=arrow_schema),
            temporary,
            row_group_size=ROW_GROUP_ROWS,
            compression="zstd",
            compression_level=1,
            use_dictionary=[f"{name}.list.element" if name in lists else name for name in small],
            write_statistics=False,
            write_page_checksum=True,
            store_schema=False,
        )
    return FileRecord.of(folder, name, rows.height)
