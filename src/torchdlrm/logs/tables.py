"""What formats have in common whose columns have types, as Parquet has: they are read into the columns that text gives.

In: groups of a file's rows.  Out: a `ParsedChunk`; a row's "line" is its number in the file, from 1.  A value is good
or bad as it would be in a text file (`torchdlrm.features.cells`); lists are the values of a multi-valued column.

Numbers are taken as numbers, as in a request to a server: for a column of kind `hex` they are not read as digits, 3.0
is 3 where the column holds integers, and NaN is a missing value.
"""

import itertools
import shutil
import tempfile
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import polars as pl
import pyarrow as pa

from torchdlrm.errors import LogError
from torchdlrm.features.bad_rows import BadRows
from torchdlrm.features.cells import to_typed_columns
from torchdlrm.features.columns import Column, Feature
from torchdlrm.features.schema import FeatureSchema
from torchdlrm.logs.files import LogFile, reading
from torchdlrm.logs.format import NUM_PLACES, Chunk, LogFormat, OpenLog, ParsedChunk, SampledRows, found_by_name
from torchdlrm.logs.lines import thinned
from torchdlrm.storage.reading import identity_of

_BATCH_BYTES = 1 << 20
_MAX_SAMPLED_BYTES = 256 << 20
_MAX_SAMPLED_ROWS = 500_000
_LIST_TYPES = (pa.types.is_list, pa.types.is_large_list, pa.types.is_fixed_size_list)
_CELL_TYPES = (
    pa.types.is_boolean,
    pa.types.is_integer,
    pa.types.is_floating,
    pa.types.is_decimal,
    pa.types.is_string,
    pa.types.is_large_string,
    pa.types.is_string_view,
    pa.types.is_binary,
    pa.types.is_large_binary,
    pa.types.is_fixed_size_binary,
    pa.types.is_date,
    pa.types.is_timestamp,
    pa.types.is_time,
    pa.types.is_null,
)


@dataclass(frozen=True)
class TableFile:
    """What the metadata of a file say: its columns, and of each group of its rows what it takes and how many it has."""

    schema: pa.Schema
    group_bytes: Sequence[int]
    group_rows: Sequence[int]


class TableFormat(LogFormat):
    """A file of typed columns, whose rows lie in groups of which each is read as a whole.

    A format says what is in a file, and reads groups; where it has a quicker way to the first rows of one, that too.
    What goes wrong with a file is raised as OSError or ArrowException.
    """

    @abstractmethod
    def describe(self, file: LogFile) -> TableFile:
        """What the metadata of a file say."""

    @abstractmethod
    def table(self, file: LogFile, groups: range, names: Sequence[str]) -> pa.Table:
        """Columns of some groups of rows."""

    def batches(self, file: LogFile, group: int, batch_rows: int) -> Iterator[pa.RecordBatch]:
        """The rows of a group in batches of at most `batch_rows`, all columns."""
        table = self.table(file, range(group, group + 1), self.describe(file).schema.names)
        yield from table.to_batches(max_chunksize=batch_rows)

    def layout(self, file: LogFile, schema: FeatureSchema, max_bad_rows: int = 0) -> FeatureSchema:  # noqa: ARG002
        """The schema: columns are found by name, whatever their order."""
        if any(column.header_name is not None for column in schema.columns):
            schema = schema.named_as_in(self._describe(file).schema.names)
        return schema.model_copy(update={"header": False})

    def chunks(self, file: LogFile, layout: FeatureSchema, chunk_bytes: int) -> list[Chunk]:
        """Cut a file between groups of rows, at least a group each.

        Raises:
            LogError: the file cannot be read, lacks a column of the schema, or has one of a type that is no cell.
        """
        about = self._describe(file)
        found_by_name(about.schema.names, str(file.path), layout, layout.used, f"the schema {layout.name!r}")
        types = ((about.schema.field(column.log_name).type, column) for column in layout.used)
        wrong = [fault for kind, column in types if (fault := type_fault(kind, column, self.name))]
        if wrong:
            raise LogError("\n".join([f"{file.path}: columns that cannot be read as the schema says", *wrong]))
        chunks, start, size_bytes = [], 0, 0
        for i, group_bytes in enumerate(about.group_bytes):
            size_bytes += group_bytes
            if size_bytes >= chunk_bytes or i == len(about.group_bytes) - 1:
                chunks.append(Chunk(start, i + 1))
                start, size_bytes = i + 1, 0
        return chunks

    def read(
        self, file: LogFile, chunk: Chunk, layout: FeatureSchema, *, is_label_optional: bool = False
    ) -> ParsedChunk:
        """Read groups of rows as the schema says.

        Raises:
            LogError: the file is damaged, or a list stands where the schema has one value.
        """
        with self._reading(file):
            names = [column.log_name for column in layout.used]
            frame = pl.DataFrame(self.table(file, range(chunk.start, chunk.end), names))
        cells = pl.DataFrame([frame[column.log_name].alias(column.name) for column in layout.used])
        # In a text file an empty cell is a missing one.
        cells = cells.with_columns(pl.when(pl.col(pl.String) != "").then(pl.col(pl.String)))
        bad_rows = BadRows()
        try:
            typed, good = to_typed_columns(cells, layout, bad_rows, is_label_optional=is_label_optional)
        except LogError as error:
            raise LogError(f"{file.path}, {error}") from error
        return ParsedChunk.of(typed, good, frame.height, bad_rows)

    def has_rows(self, file: LogFile, layout: FeatureSchema) -> bool:
        """Whether there is a group of rows."""
        return bool(self.chunks(file, layout, 1))

    def sample(self, file: LogFile, num_rows: int) -> SampledRows:
        """Evenly spaced batches of the file."""
        about = self._describe(file)
        places = min(len(about.group_rows), NUM_PLACES)
        groups = [int(i * max(1, len(about.group_rows) / NUM_PLACES)) for i in range(places)]
        rows = sum(about.group_rows[group] for group in groups)
        bytes_a_row = sum(about.group_bytes[group] for group in groups) // max(1, rows) + 1
        batch_rows = max(1, min(num_rows // NUM_PLACES, _BATCH_BYTES // bytes_a_row))
        max_rows = min(_MAX_SAMPLED_ROWS, _MAX_SAMPLED_BYTES // bytes_a_row)
        with self._reading(file):
            batches = (
                batch
                for group in groups
                for batch in itertools.islice(
                    self.batches(file, group, batch_rows), -(-max_rows // batch_rows // len(groups))
                )
            )
            kept, _, _ = thinned(batches, -(-max_rows // batch_rows))
        table = pa.Table.from_batches(kept, about.schema)
        words = f"{len(kept)} places in {len(groups):,} of its {len(about.group_rows):,} row groups"
        return SampledRows(table, table.num_rows == sum(about.group_rows), words)

    @contextmanager
    def opened(self, raw: BinaryIO, file: LogFile, schema: FeatureSchema) -> Iterator[OpenLog]:  # noqa: ARG002
        """The file; of a stream a copy, since what the columns are stands at its end."""
        if file.size_bytes:
            yield self._open(file)
            return
        with tempfile.NamedTemporaryFile() as copy:
            shutil.copyfileobj(raw, copy)
            copy.flush()
            path = Path(copy.name)
            yield self._open(LogFile(path, identity_of(path), None, self))

    def _open(self, file: LogFile) -> OpenLog:
        def chunks(layout: FeatureSchema, chunk_bytes: int) -> Iterator[tuple[ParsedChunk, int]]:
            found = self.chunks(file, layout, chunk_bytes)
            for chunk in found:
                parsed = self.read(file, chunk, layout, is_label_optional=True)
                yield parsed, file.size_bytes * chunk.end // found[-1].end

        return OpenLog(self._describe(file).schema.names, chunks)

    def _describe(self, file: LogFile) -> TableFile:
        with self._reading(file):
            return self.describe(file)

    @contextmanager
    def _reading(self, file: LogFile) -> Iterator[None]:
        """Report what goes wrong inside as a fault of the file."""
        with reading(file.path):
            try:
                yield
            except (OSError, pa.ArrowException) as error:
                msg = f"{file.path}: the {self.name} file cannot be read ({error}); fetch the file again"
                raise LogError(msg) from error


def type_fault(arrow_type: pa.DataType, column: Column, kind: str) -> str | None:
    """What is wrong with the type of a column; None: nothing."""
    value_type = arrow_type
    if any(is_list(arrow_type) for is_list in _LIST_TYPES):
        if not (isinstance(column, Feature) and column.is_multi_valued):
            return (
                f"  column {column.log_name}: holds lists, and the schema has one value a row; "
                'give the column a value_separator = "," to take all values, or kind = "vector" of some size'
            )
        value_type = arrow_type.value_type
        if pa.types.is_struct(value_type) and column.weight_separator is not None:
            fields = {field.name: field.type for field in value_type}
            value_type = fields["value"] if fields.keys() == {"value", "weight"} else value_type
    if pa.types.is_dictionary(value_type):
        value_type = value_type.value_type
    if any(is_cell(value_type) for is_cell in _CELL_TYPES):
        return None
    return (
        f"  column {column.log_name}: is of the {kind} type {arrow_type}, which is no number, text or time; "
        "write it as one of these, or leave the column out of the schema"
    )
