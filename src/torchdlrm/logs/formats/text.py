r"""Reads text whose cells stand between separators: CSV, TSV and others, with a header or without.

Lines that are not rows are counted by reason.  `parse_chunk` is a pure function of the bytes of the lines, and the same
rows come out however a file is cut.  Cost: for a log of Criteo's layout about 1.5 times what Polars needs to parse it
to typed columns.
"""

import csv
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice, pairwise
from pathlib import Path
from typing import ClassVar, Self

import numpy as np
import numpy.typing as npt
import polars as pl

from torchdlrm.features.bad_rows import BadRow, BadRows
from torchdlrm.features.cells import text_frame, to_typed_columns
from torchdlrm.features.columns import IgnoredColumn
from torchdlrm.features.schema import FeatureSchema
from torchdlrm.logs.files import LogFile, open_text
from torchdlrm.logs.format import ParsedChunk, found_by_name, ignored
from torchdlrm.logs.lines import BYTE_ORDER_MARK, MAX_ROW_BYTES, LineFormat, read_header
from torchdlrm.logs.quotes import find_quoted
from torchdlrm.logs.sniff import SEPARATORS, check_encoding, check_layout

_LINES_LOOKED_AT = 100
_COUNT_BLOCK_BYTES = 256 << 10
_SHOWN_BYTES = 400  # of a cell that is at fault


class _Text(LineFormat):
    """Cells between separators."""

    name: ClassVar[str] = "UTF-8 text"

    def recognises(self, start: bytes, path: Path) -> bool:  # noqa: ARG002
        return True

    def layout(self, file: LogFile, schema: FeatureSchema, max_bad_rows: int = 0) -> FeatureSchema:
        check_layout(file, schema, max_bad_rows)
        if not schema.header:
            return schema
        with open_text(file) as text:
            line, _ = read_header(text)
        check_encoding(line, file)
        header = line.decode(errors="replace").removesuffix("\n").removesuffix("\r")
        names = next(_cells([header], schema))
        where = f"{file.path}, line 1 (header)"
        found = found_by_name(names, where, schema, schema.used, f"the schema {schema.name!r}")
        return schema.with_columns([column or ignored(i, names[i]) for i, column in enumerate(found)])

    def parse(self, lines: bytes, layout: FeatureSchema, *, is_label_optional: bool = False) -> ParsedChunk:
        return parse_chunk(lines, layout, is_label_optional=is_label_optional)

    def columns(self, head: bytes, schema: FeatureSchema) -> tuple[Sequence[str] | None, Sequence[Sequence[str]]]:
        lines = [line.removesuffix("\r") for line in head.decode(errors="replace").removesuffix("\n").split("\n")]
        return None, list(islice(_cells(lines, schema), _LINES_LOOKED_AT))

    def sample(self, file: LogFile, num_rows: int) -> None:  # noqa: ARG002
        return


TEXT = _Text()


def _cells(lines: Sequence[str], schema: FeatureSchema) -> Iterator[list[str]]:
    if schema.quote is None:
        yield from (line.split(schema.separator) for line in lines)
        return
    reader = csv.reader(lines, delimiter=schema.separator)
    while True:
        try:
            yield next(reader)
        except StopIteration:
            return
        except csv.Error:  # a cell of more than 128 KiB, or a carriage return inside a line
            yield lines[reader.line_num - 1].split(schema.separator)


def parse_chunk(lines: bytes, schema: FeatureSchema, *, is_label_optional: bool = False) -> ParsedChunk:
    """Parse whole lines into typed columns; a label may be missing where `is_label_optional`.

    Everything is read as text first and cast afterwards, so that a row is good or bad by itself: a parser that gives up
    on the first bad value of a block cannot tell which rows of it are good.
    """
    bad_rows = BadRows()
    line_numbers: npt.NDArray[np.int64] | None = None
    whole: npt.NDArray[np.bool_] | None = None
    num_lines = lines.count(b"\n") + (not lines.endswith(b"\n"))
    quoted = schema.quote is not None and b'"' in lines
    text = None if quoted else _read_text(lines, schema, quoted=False)
    is_odd = b"\0" in lines or _may_hold_long_row(lines)
    if text is None or text.height != num_lines or is_odd or _count(lines, schema) != num_lines:
        lines, line_numbers, whole = _drop_broken_rows(lines, schema, bad_rows, quoted=quoted)
        text = _read_text(lines, schema, quoted=quoted) if lines else text_frame(schema, {})
        assert text is not None, "the rows that are left are UTF-8 and have the right number of columns"
        assert text.height == len(line_numbers), "the parser cuts rows where we do"
    frame, good = to_typed_columns(text, schema, bad_rows, line_numbers, is_label_optional=is_label_optional)
    return ParsedChunk.of(frame, good, num_lines, bad_rows, whole)


def _read_text(lines: bytes, schema: FeatureSchema, *, quoted: bool) -> pl.DataFrame | None:
    if lines.startswith(BYTE_ORDER_MARK):
        lines = BYTE_ORDER_MARK + lines  # Polars drops one, which is right only at the start of a file
    try:
        text = pl.read_csv(
            lines,
            has_header=False,
            separator=schema.separator,
            quote_char=schema.quote if quoted else None,
            schema={column.name: pl.String for column in schema.columns},
        )
    except pl.exceptions.PolarsError:
        return None  # a line that is too long, or bytes that are not UTF-8: `_drop_broken_rows` finds them
    # An empty cell is a missing one, whether or not the writer put quotes around it.
    return text.with_columns(pl.when(pl.all() != "").then(pl.all())) if quoted else text


def _may_hold_long_row(lines: bytes) -> bool:
    """Whether a part of the text has no line end that is so long that every row which is too long has one such part."""
    size = MAX_ROW_BYTES // 2
    return any(lines.find(b"\n", start, start + size) < 0 for start in range(0, len(lines) - size + 1, size))


def _count(lines: bytes, schema: FeatureSchema) -> float:
    """How many whole rows the separators make up. Polars fills rows that are too short with nulls."""
    codes = np.frombuffer(lines, np.uint8)
    # By blocks that fit a core's cache: the comparison makes an array as long as the text.
    blocks = (codes[start : start + _COUNT_BLOCK_BYTES] for start in range(0, len(codes), _COUNT_BLOCK_BYTES))
    num_separators = sum(int(np.count_nonzero(block == ord(schema.separator))) for block in blocks)
    return num_separators / (len(schema.columns) - 1)


@dataclass(frozen=True)
class _Rows:
    """Where the N rows of a text lie: `starts` and `ends` (of the line end) are int64 [N], the others bool [bytes]."""

    codes: npt.NDArray[np.uint8]
    starts: npt.NDArray[np.int64]
    ends: npt.NDArray[np.int64]
    separators: npt.NDArray[np.bool_]
    stray_quotes: npt.NDArray[np.bool_] | None

    @classmethod
    def of(cls, text: bytes, separator: str, *, quoted: bool) -> Self:
        """Find the rows of a text that ends with a line end."""
        codes = np.frombuffer(text, np.uint8)
        is_end, is_separator, stray = codes == ord("\n"), codes == ord(separator), None
        if quoted:
            inside, stray = find_quoted(text, separator)
            if inside[-1]:
                # The last cell is never closed: its quote is out of place, and the lines are rows.
                opened = len(inside) - 1 - int(np.argmin(inside[::-1])) + 1 if not inside.all() else 0
                inside[opened:] = False
                stray = np.zeros(len(codes), np.bool_) if stray is None else stray
                stray[opened] = True
            is_end, is_separator = is_end & ~inside, is_separator & ~inside
        ends = np.flatnonzero(is_end)
        return cls(codes, np.concatenate([[0], ends[:-1] + 1]), ends, is_separator, stray)

    def count(self, found: npt.NDArray[np.bool_]) -> npt.NDArray[np.int64]:
        """How many bytes of each row are among `found` (bool [bytes]): int64 [N]."""
        edges = np.concatenate([self.starts, [len(self.codes)]])
        return np.diff(np.searchsorted(np.flatnonzero(found), edges))

    def cells(self, row: int) -> list[bytes]:
        """The cells of a row as they are written."""
        start, end = int(self.starts[row]), int(self.ends[row])
        line = self.codes[start:end].tobytes()
        cuts = [-1, *np.flatnonzero(self.separators[start:end]).tolist(), len(line)]
        cells = [line[before + 1 : after] for before, after in pairwise(cuts)]
        return [*cells[:-1], cells[-1].rstrip(b"\r")]


def _drop_broken_rows(
    lines: bytes, schema: FeatureSchema, bad_rows: BadRows, *, quoted: bool
) -> tuple[bytes, npt.NDArray[np.int64], npt.NDArray[np.bool_]]:
    """Leave out the rows that are too long, have the wrong number of columns, a NUL, or bytes that are not UTF-8.

    Returns:
        The R rows that are left; int64 [R], the lines from 0 they start on; bool, which of all rows they are.
    """
    if not lines.endswith(b"\n"):
        lines += b"\n"
    rows = _Rows.of(lines, schema.separator, quoted=quoted)
    codes = rows.codes
    masks: dict[str, npt.NDArray[np.bool_]] = {"long": rows.ends - rows.starts > MAX_ROW_BYTES}
    if rows.stray_quotes is not None:
        masks["quotes"] = rows.count(rows.stray_quotes) > 0
    masks["columns"] = rows.count(rows.separators) + 1 != len(schema.columns)
    masks["nul_byte"] = rows.count(codes == 0) > 0
    fine = np.ones(len(rows.ends), np.bool_)
    for mask in masks.values():
        mask &= fine  # noqa: PLW2901 - in place: of a row's faults the first one counts
        fine &= ~mask
    masks["utf8"] = np.zeros(len(fine), np.bool_)
    for i in np.flatnonzero((rows.count(codes >= 0x80) > 0) & fine):
        try:
            lines[rows.starts[i] : rows.ends[i]].decode()
        except UnicodeDecodeError:
            masks["utf8"][i] = True
    fine &= ~masks["utf8"]

    line_numbers = np.searchsorted(np.flatnonzero(codes == ord("\n")), rows.starts)
    for reason, mask in masks.items():
        first_few = np.flatnonzero(mask)[: BadRows.NUM_EXAMPLES].tolist()
        examples = [_broken_row(rows.cells(i), int(line_numbers[i]) + 1, reason, schema) for i in first_few]
        bad_rows.add(reason, int(mask.sum()), examples)
    if fine.all():
        return lines, line_numbers, fine
    good = np.flatnonzero(fine)
    return b"".join(lines[rows.starts[i] : rows.ends[i] + 1] for i in good), line_numbers[good], fine


def _broken_row(cells: list[bytes], line: int, reason: str, schema: FeatureSchema) -> BadRow:
    if reason == "columns":
        found = f"{len(cells)} columns, not {len(schema.columns)}"
        why = f", cut at each {SEPARATORS.get(schema.separator, repr(schema.separator))}"
        if len(cells) == 1 and cells[0].startswith(b"#"):
            why = ": a comment?"
        return BadRow(line=line, column=None, value=found + why if cells != [b""] else "an empty line")
    if reason in ("long", "quotes"):
        return BadRow(line=line, column=None, value=_as_text(schema.separator.encode().join(cells)))
    for column, cell in zip(schema.columns, cells, strict=True):
        if (b"\0" in cell) if reason == "nul_byte" else ("\ufffd" in cell.decode(errors="replace")):
            name = column.log_name if isinstance(column, IgnoredColumn) else column.name
            return BadRow(line=line, column=name, value=_as_text(cell))
    raise AssertionError("the fault of a broken row lies in one of its cells")


def _as_text(cell: bytes) -> str:
    return cell[:_SHOWN_BYTES].decode(errors="replace")
