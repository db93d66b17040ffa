"""Reads JSON Lines: an object a line, whose keys are the names of columns.

Cells are read as in a request to a server (`torchdlrm.prediction.json_rows` has the table); what a request would be
refused for, such as a number where digits are wanted, is a bad cell, and true and false are a label, elsewhere a text.

Cost: about 15 us a row of Criteo's 40 columns.
"""

import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import orjson
import polars as pl

from torchdlrm.errors import LogError
from torchdlrm.features.bad_rows import BadRow, BadRows
from torchdlrm.features.cells import to_typed_columns
from torchdlrm.features.columns import Column, Feature, SparseColumn
from torchdlrm.features.kinds import FLOAT, ValueKind
from torchdlrm.features.schema import FeatureSchema
from torchdlrm.features.vectors import cells_of_json, is_vector
from torchdlrm.logs.files import LogFile
from torchdlrm.logs.format import ParsedChunk, SampledRows, found_by_name
from torchdlrm.logs.lines import BYTE_ORDER_MARK, MAX_ROW_BYTES, LineFormat, read_blocks, read_head

_Row = dict[str, Any]
_MISSING: type = type(None)
_NESTED: set[type] = {list, dict}
_BLOCK_ROWS = 512
_SHOWN_BYTES = 400  # of a line that is at fault
_MAX_SAMPLED_BAD_LINES = 3


class _JsonLines(LineFormat):
    """An object of JSON a line."""

    name: ClassVar[str] = "JSON Lines"

    def recognises(self, start: bytes, path: Path) -> bool:  # noqa: ARG002
        return re.match(rb"\s*\{\s*[\"\}]", start.removeprefix(BYTE_ORDER_MARK)) is not None

    def layout(self, file: LogFile, schema: FeatureSchema, max_bad_rows: int = 0) -> FeatureSchema:  # noqa: ARG002
        names, _ = self.columns(read_head(file), schema)
        found_by_name(names, str(file.path), schema, schema.used, f"the schema {schema.name!r}")
        return schema.named_as_in(names).model_copy(update={"header": False, "quote": None})

    def columns(self, head: bytes, schema: FeatureSchema) -> tuple[Sequence[str], Sequence[Sequence[str]]]:
        names = _keys(_objects(head.split(b"\n"), 0, BadRows()))
        features = [column.log_name for column in schema.named_as_in(names).features]
        # Where the first rows have some features, the others may come later, or never.
        return list(dict.fromkeys([*names, *features])) if set(names) & set(features) else names, ()

    def parse(self, lines: bytes, layout: FeatureSchema, *, is_label_optional: bool = False) -> ParsedChunk:
        bad_rows = BadRows()
        texts = lines.removesuffix(b"\n").split(b"\n")
        fine = np.ones(len(texts), np.bool_)
        # A few rows at a time: as objects they are many times as large as the text.
        blocks = [
            _text_frame(texts[start : start + _BLOCK_ROWS], start, fine, layout, bad_rows)
            for start in range(0, len(texts), _BLOCK_ROWS)
        ]
        numbers = None if fine.all() else np.flatnonzero(fine)
        frame, good = to_typed_columns(
            pl.concat(blocks), layout, bad_rows, numbers, is_label_optional=is_label_optional
        )
        return ParsedChunk.of(frame, good, len(texts), bad_rows, None if numbers is None else fine)

    def sample(self, file: LogFile, num_rows: int) -> SampledRows:
        blocks, _, places = read_blocks(file, num_rows)
        # A block that starts or ends anywhere loses the line that it cuts.
        texts = [block.split(b"\n") for block in blocks]
        inner = [lines[i > 0 : len(lines) - (len(lines[-1]) == 0 or len(blocks) > 1)] for i, lines in enumerate(texts)]
        bad_rows = BadRows()
        found = [row for row in _objects([line for lines in inner for line in lines], 0, bad_rows) if row is not None]
        # Of one block alone it is known which line each is.
        examples = bad_rows.examples.get("json", []) if len(blocks) == 1 else []
        bad_lines = [f"line {row.line:,}: {row.value}" for row in examples[:_MAX_SAMPLED_BAD_LINES]]
        if not found:
            msg = f"{file.path}: no line is an object of JSON"
            raise LogError(msg)
        names = _keys(found)
        frame = pl.DataFrame([_sampled([row.get(name) for row in found], str(i)) for i, name in enumerate(names)])
        table = frame.to_arrow().rename_columns(names)
        return SampledRows(table, len(blocks) == 1 and not bad_rows.total, places, bad_lines)


JSON_LINES = _JsonLines()


def _objects(lines: Iterable[bytes], first: int, bad_rows: BadRows) -> Iterator[_Row | None]:
    """The object in each line, the first of which has this number from 0; None where there is none."""
    for number, line in enumerate(lines, first):
        try:
            row = orjson.loads(line)
        except orjson.JSONDecodeError:
            row = None
        if type(row) is dict:
            yield row
            continue
        value = line[:_SHOWN_BYTES].decode(errors="backslashreplace").strip() or "an empty line"
        reason = "long" if len(line) > MAX_ROW_BYTES else "json"
        bad_rows.add(reason, 1, [BadRow(line=number + 1, column=None, value=value)])
        yield None


def _text_frame(
    lines: Sequence[bytes], first: int, fine: npt.NDArray[np.bool_], layout: FeatureSchema, bad_rows: BadRows
) -> pl.DataFrame:
    """The cells of lines, whose first has this number from 0, as texts or lists of these; only of `fine` rows."""
    names = [column.log_name for column in layout.used]
    rows = []
    for number, row in enumerate(_objects(lines, first, bad_rows), first):
        fine[number] = row is not None
        if row is not None:
            rows.append([*map(row.get, names)])
    numbers = first + np.flatnonzero(fine[first : first + len(lines)])
    columns = []
    for column, cells in zip(layout.used, zip(*rows, strict=True) if rows else [()] * len(names), strict=True):
        allowed: set[type] = set()
        if isinstance(column, Feature) and column.is_multi_valued:
            allowed = {list} if column.weight_separator is None else _NESTED
        refused, faults = set(map(type, cells)) & (_NESTED - allowed), dict[int, str]()
        if is_vector(column):
            read, faults = cells_of_json(cells, column)
        else:
            read = _text_column(cells, column)
            if refused:
                faults = {i: orjson.dumps(cell).decode() for i, cell in enumerate(cells) if type(cell) in refused}
        for i, value in faults.items():
            if fine[numbers[i]]:
                fine[numbers[i]] = False
                reason = column.kind if is_vector(column) else "nested"
                bad_rows.add(reason, 1, [BadRow(line=int(numbers[i]) + 1, column=column.name, value=value)])
        columns.append(read)
    frame = pl.DataFrame(columns)
    return frame if fine[numbers].all() else frame.filter(pl.Series(fine[numbers]))


def _text_column(cells: Sequence[Any], column: Column) -> pl.Series:
    """Cells as a text log has them: String, or lists of it."""
    if isinstance(column, SparseColumn) and column.is_multi_valued:
        return pl.Series(column.name, [_values(cell, column) for cell in cells], pl.List(pl.String))
    types = set(map(type, cells)) - {_MISSING}
    if types and types <= _kind_of(column).json_types - {str}:
        with suppress(OverflowError, TypeError):  # integers of more than 64 bits
            return pl.Series(column.name, cells, pl.Int64 if types == {int} else pl.Float64).cast(pl.String)
    if types - {str} or "" in cells:
        cells = [_text(cell, column) for cell in cells]
    return pl.Series(column.name, cells, pl.String)


def _values(cell: Any, column: SparseColumn) -> Sequence[str | None] | None:
    """The texts of the values of a cell; empty ones are left out later."""
    if isinstance(cell, dict):
        cell = [f"{value}{column.weight_separator}{weight}" for value, weight in cell.items()]
    if isinstance(cell, list):
        return [_text(value, column) for value in cell]
    text = _text(cell, column)
    return None if text is None or text in (column.null_values or ()) else text.split(column.value_separator)


def _text(cell: Any, column: Column) -> str | None:
    """A cell as a text log has it; a number that the column does not take as a text that it does not take either."""
    if cell is None or cell == "":
        return None
    if isinstance(cell, str):
        return cell
    if isinstance(cell, bool | list | dict):
        return orjson.dumps(cell).decode()
    try:
        text = _kind_of(column).text_of_number(cell)
    except ValueError:  # it may have been rounded
        text = None
    return f"the number {cell}" if text is None else text


def _kind_of(column: Column) -> ValueKind:
    """How numbers of a column are read."""
    return column.value_kind if isinstance(column, Feature) else FLOAT


def _keys(rows: Iterable[_Row | None]) -> list[str]:
    """All keys, in the order in which they are met."""
    return list(dict.fromkeys(key for row in rows for key in row or ()))


def _sampled(cells: Sequence[Any], name: str) -> pl.Series:
    """Cells of one type as a column of it, of several as texts."""
    types = set(map(type, cells)) - {_MISSING}
    if types == {list}:
        return pl.Series(name, [None if cell is None else [_shown(value) for value in cell] for cell in cells])
    try:
        if types in ({bool}, {int}):
            return pl.Series(name, cells)
        if types and types <= {int, float}:
            return pl.Series(name, cells, pl.Float64, strict=False)
    except (OverflowError, TypeError):
        pass  # integers of more than 64 bits
    return pl.Series(name, [_shown(cell) for cell in cells], pl.String)


def _shown(cell: Any) -> str | None:
    return cell if cell is None or isinstance(cell, str) else orjson.dumps(cell).decode()
