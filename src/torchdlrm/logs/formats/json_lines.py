"""Reads JSON Lines: an object a line, whose keys are the names of columns.

| cell | read as |
| --- | --- |
| absent, null, or an empty text | missing; so is what the column's `null_values` name |
| text | what the same text means in a text log |
| a number | itself, in int and float columns; for hex, which is digits of text, a bad cell; for string, its text |
| true, false | a label; elsewhere a text |
| a list | the values of a multi-valued column, with a weight behind one's separator where the column has weights |
| an object | where the column has weights: the weight of each value |

So a row means what it means in a request to a server.  Cost: about 10 us a row of Criteo's 40 columns.
"""

import re
from collections.abc import Iterable, Sequence
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
from torchdlrm.features.kinds import FLOAT
from torchdlrm.features.schema import FeatureSchema
from torchdlrm.logs.cut import BYTE_ORDER_MARK, MAX_ROW_BYTES
from torchdlrm.logs.files import LogFile
from torchdlrm.logs.format import ParsedChunk, SampledRows
from torchdlrm.logs.lines import LineFormat, read_blocks, read_head
from torchdlrm.logs.names import found_by_name

_Row = dict[str, Any]
_MISSING, _NESTED = type(None), {list, dict}
_SHOWN_BYTES = 400  # of a line that is at fault
_MAX_SAMPLED_BAD_LINES = 3


class JsonLinesFormat(LineFormat):
    """An object of JSON a line."""

    name: ClassVar[str] = "JSON Lines"

    def recognises(self, start: bytes, path: Path) -> bool:  # noqa: ARG002
        """By an object that begins."""
        return re.match(rb"\s*\{\s*[\"\}]", start.removeprefix(BYTE_ORDER_MARK)) is not None

    def check(self, file: LogFile, schema: FeatureSchema, max_bad_rows: int) -> None:  # noqa: ARG002
        """See that what is never missing is there, and some feature: those that no row names are missing."""
        names, _ = self.columns(read_head(file), schema)
        found_by_name(names, str(file.path), schema, schema.used, f"the schema {schema.name!r}")

    def layout(self, file: LogFile, schema: FeatureSchema) -> FeatureSchema:  # noqa: ARG002
        """The schema; lines are cut at their ends alone."""
        return schema.model_copy(update={"header": False, "quote": None})

    def columns(self, head: bytes, schema: FeatureSchema) -> tuple[Sequence[str], Sequence[Sequence[str]]]:
        """The keys of the first rows; and where these have some features, the others, which may come later or never."""
        names = _keys(_objects(head.split(b"\n"), BadRows())[0])
        features = [column.log_name for column in schema.features]
        return list(dict.fromkeys([*names, *features])) if set(names) & set(features) else names, ()

    def parse(self, lines: bytes, layout: FeatureSchema, *, is_label_optional: bool = False) -> ParsedChunk:
        """Parse whole lines."""
        bad_rows = BadRows()
        texts = lines.removesuffix(b"\n").split(b"\n")
        rows, fine = _objects(texts, bad_rows)
        fine = _without_nested(rows, fine, layout.used, bad_rows)
        rows = [row for row, is_fine in zip(rows, fine.tolist(), strict=True) if is_fine]
        columns = [_as_text([row.get(column.log_name) for row in rows], column) for column in layout.used]
        numbers = None if fine.all() else np.flatnonzero(fine)
        frame, good = to_typed_columns(
            pl.DataFrame(columns), layout, bad_rows, numbers, is_label_optional=is_label_optional
        )
        return ParsedChunk.of(frame, good, len(texts), bad_rows, None if numbers is None else fine)

    def sample(self, file: LogFile, num_rows: int) -> SampledRows:
        """Rows of several blocks of the file."""
        blocks, _, places = read_blocks(file, num_rows)
        # A block that starts or ends anywhere loses the line that it cuts.
        texts = [block.split(b"\n") for block in blocks]
        inner = [lines[i > 0 : len(lines) - (len(lines[-1]) == 0 or len(blocks) > 1)] for i, lines in enumerate(texts)]
        bad_rows = BadRows()
        rows, fine = _objects([line for lines in inner for line in lines], bad_rows)
        if bad_rows.total and len(blocks) > 1:
            first = []
        else:
            first = [f"line {row.line:,}: {row.value}" for row in bad_rows.examples.get("json", [])]
        found = [row for row, is_fine in zip(rows, fine.tolist(), strict=True) if is_fine]
        if not found:
            msg = f"{file.path}: no line is an object of JSON"
            raise LogError(msg)
        names = _keys(found)
        frame = pl.DataFrame([_sampled([row.get(name) for row in found], str(i)) for i, name in enumerate(names)])
        table = frame.to_arrow().rename_columns(names)
        return SampledRows(table, len(blocks) == 1 and bool(fine.all()), places, first[:_MAX_SAMPLED_BAD_LINES])


def _objects(lines: Sequence[bytes], bad_rows: BadRows) -> tuple[list[_Row], npt.NDArray[np.bool_]]:
    """The object in each line, an empty one where there is none; and bool, which lines have one."""
    rows: list[_Row] = []
    wrong: list[int] = []
    for number, line in enumerate(lines):
        try:
            row = orjson.loads(line)
        except orjson.JSONDecodeError:
            row = None
        if type(row) is not dict:
            wrong.append(number)
            row = {}
        rows.append(row)
    fine = np.ones(len(lines), np.bool_)
    fine[wrong] = False
    long = [number for number in wrong if len(lines[number]) > MAX_ROW_BYTES]
    for reason, numbers in (("long", long), ("json", sorted({*wrong} - {*long}))):
        examples = [_bad_line(lines[number], number) for number in numbers[: BadRows.NUM_EXAMPLES]]
        bad_rows.add(reason, len(numbers), examples)
    return rows, fine


def _bad_line(line: bytes, number: int) -> BadRow:
    text = line[:_SHOWN_BYTES].decode(errors="backslashreplace").strip()
    return BadRow(line=number + 1, column=None, value=text or "an empty line")


def _without_nested(
    rows: Sequence[_Row], fine: npt.NDArray[np.bool_], columns: Sequence[Column], bad_rows: BadRows
) -> npt.NDArray[np.bool_]:
    """Which of the fine rows have one value where the schema has one."""
    for column in columns:
        name = column.log_name
        if isinstance(column, SparseColumn) and column.is_multi_valued:
            allowed = _NESTED if column.weight_separator is not None else {list}
        else:
            allowed = set()
        cells = [row.get(name) for row in rows]
        refused = set(map(type, cells)) & (_NESTED - allowed)
        if not refused:
            continue
        places = [i for i, cell in enumerate(cells) if type(cell) in refused and fine[i]]
        fine[places] = False
        examples = [
            BadRow(line=i + 1, column=column.name, value=orjson.dumps(cells[i]).decode())
            for i in places[: BadRows.NUM_EXAMPLES]
        ]
        bad_rows.add("nested", len(places), examples)
    return fine


def _as_text(cells: list[Any], column: Column) -> pl.Series:
    """Cells as a text log has them: String, or lists of it."""
    if isinstance(column, SparseColumn) and column.is_multi_valued:
        lists = [_values(cell, column) for cell in cells]
        return pl.Series(column.name, lists, pl.List(pl.String))
    if not {str, _MISSING}.issuperset(map(type, cells)) or "" in cells:
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
        text = (column.value_kind if isinstance(column, Feature) else FLOAT).text_of_number(cell)
    except ValueError:  # it may have been rounded
        text = None
    return f"the number {cell}" if text is None else text


def _keys(rows: Iterable[_Row]) -> list[str]:
    """All keys, in the order in which they are met."""
    return list(dict.fromkeys(key for row in rows for key in row))


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
