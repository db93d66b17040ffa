"""The first rows of a log -> a schema that a user can edit.

In: a text file (plain or gzipped) or a Parquet file.  Out: the TOML text of a schema: separator, quotes and header as
they are found; for each column a role and a kind that fit the values that were seen, and what was seen, as a comment.
"""

import csv
import gzip
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from torchdlrm.data.log.files import LogFile, find_files
from torchdlrm.errors import LogError
from torchdlrm.toml import toml_value

_SAMPLE_ROWS = 2_000
_SAMPLE_BYTES = 8 << 20
_SEPARATORS = "\t,;|"
_LABEL_NAMES = ("label", "click", "clicked", "is_click", "target", "y", "conversion")
_TIME_NAMES = ("time", "timestamp", "date", "datetime", "ts", "hour", "event_time")
_INT = re.compile(r"[+-]?\d{1,18}")
_FLOAT = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?")
_HEX = re.compile(r"[0-9a-fA-F]{8}")
_DATETIME = re.compile(r"\d{4}-\d{2}-\d{2}([ T]\d{2}:\d{2}(:\d{2}(\.\d+)?)?(Z|[+-]\d{2}:\d{2})?)?")
# An integer column with at most this share of different values looks like a category.
_CATEGORY_SHARE = 0.05
_LIST_SEPARATORS = "|;, "


@dataclass(frozen=True)
class _Sample:
    """The first rows: names of the columns, and for each row its cells ("" is missing)."""

    separator: str
    quoted: bool
    header: bool
    names: list[str]
    rows: list[list[str]]
    lists: frozenset[int] = frozenset()


def propose_schema(path: Path) -> str:
    """The text of a schema file for a log, for the user to edit.

    Raises:
        LogError: the file cannot be read, or has no columns that could be told apart.
    """
    (file,) = find_files([path])
    sample = _sample_parquet(file) if file.format == "parquet" else _sample_text(file)
    if len(sample.names) < 2 or not sample.rows:
        msg = f"{path}: found {len(sample.names)} columns and {len(sample.rows)} rows; a log has a label and features"
        raise LogError(msg)
    cells = [[row[i] for row in sample.rows if row[i] != ""] for i in range(len(sample.names))]
    label = _find_label(sample.names, cells)
    taken: set[str] = set()
    columns = [
        _column(name, found, sample, taken, is_label=i == label, is_list=i in sample.lists)
        for i, (name, found) in enumerate(zip(sample.names, cells, strict=True))
    ]
    lines = [
        f"# Proposed by `dlrm schema` from the first {len(sample.rows):,} rows of {path.name}; read it and edit.",
        "# Roles: label, dense (a number), sparse (a category), time, ignore.",
        f'name = "{_identifier(path.name.split(".")[0], set())}"',
        f"separator = {toml_value(sample.separator)}",
        *(["quote = '\"'"] if sample.quoted else []),
        f"header = {str(sample.header).lower()}",
        *([] if label is not None else ["# No column looks like a label of 0 and 1: choose one below."]),
        "columns = [",
        *columns,
        "]",
        "",
        "[split]",
        '# "order": the last rows are held out; "time": the latest, by a column of that role; "random"',
        'rule = "order"',
        "val = 0.1",
        "test = 0.1",
    ]
    return "\n".join(lines) + "\n"


def _sample_text(file: LogFile) -> _Sample:
    try:
        with file.path.open("rb") as raw:
            is_gzip = file.format == "gzip"
            block = gzip.GzipFile(fileobj=raw).read(_SAMPLE_BYTES) if is_gzip else raw.read(_SAMPLE_BYTES)
        text = block.decode("utf-8-sig", errors="replace")
    except (OSError, EOFError) as error:
        msg = f"{file.path}: cannot be read: {error}"
        raise LogError(msg) from error
    if len(block) == _SAMPLE_BYTES:
        text = text[: text.rfind("\n") + 1]
    lines = text.splitlines()
    separator = max(_SEPARATORS, key=lambda mark: min((line.count(mark) for line in lines[:20]), default=0))
    quoted = separator != "\t" and '"' in text
    reader = csv.reader(
        text.splitlines(keepends=True),
        delimiter=separator,
        quoting=csv.QUOTE_MINIMAL if quoted else csv.QUOTE_NONE,
    )
    rows = [row for row, _ in zip(reader, range(_SAMPLE_ROWS + 1), strict=False)]
    width = len(rows[0]) if rows else 0
    rows = [row for row in rows if len(row) == width]
    header = bool(rows) and _looks_like_header(rows[0])
    names = rows[0] if header else [f"column_{i}" for i in range(width)]
    return _Sample(separator, quoted, header, names, rows[int(header) : _SAMPLE_ROWS + int(header)])


def _looks_like_header(cells: Sequence[str]) -> bool:
    return all(cell and not _FLOAT.fullmatch(cell) and not _HEX.fullmatch(cell) for cell in cells) and len(
        set(cells)
    ) == len(cells)


def _sample_parquet(file: LogFile) -> _Sample:
    try:
        parquet = pq.ParquetFile(file.path)
        batch = next(parquet.iter_batches(_SAMPLE_ROWS), None)
    except (OSError, pa.ArrowException) as error:
        msg = f"{file.path}: the Parquet file cannot be read ({error}); fetch the file again"
        raise LogError(msg) from error
    names = parquet.schema_arrow.names
    columns = batch.to_pydict() if batch is not None else {name: [] for name in names}
    lists = frozenset(i for i, name in enumerate(names) if any(isinstance(cell, list) for cell in columns[name]))
    rows = [[_cell(columns[name][i]) for name in names] for i in range(batch.num_rows if batch is not None else 0)]
    return _Sample("\t", quoted=False, header=True, names=names, rows=rows, lists=lists)


def _cell(value: object) -> str:
    if value is None:
        return ""
    if isinstance(value, list):
        return ",".join(map(str, value))
    return str(value)


def _find_label(names: Sequence[str], cells: Sequence[Sequence[str]]) -> int | None:
    binary = [
        i for i, found in enumerate(cells) if found and {cell.lower() for cell in found} <= {"0", "1", "true", "false"}
    ]
    named = [i for i in binary if names[i].lower() in _LABEL_NAMES]
    return named[0] if named else binary[0] if binary else None


def _column(name: str, cells: Sequence[str], sample: _Sample, taken: set[str], *, is_label: bool, is_list: bool) -> str:
    identifier = _identifier(name, taken)
    parts = ["", f'name = "{identifier}"']
    if identifier != name:
        parts.append(f"header_name = {toml_value(name)}")
    distinct = len(set(cells))
    if is_label:
        parts[0] = 'role = "label"'
    elif not cells:
        parts[0] = 'role = "ignore"'
    elif is_list or (separator := _list_separator(cells, sample.separator)) is not None:
        values = [value for cell in cells for value in cell.split("," if is_list else separator or ",")]
        kind = "int" if all(map(_INT.fullmatch, values)) else "string"
        parts[0] = 'role = "sparse"'
        parts += [f'kind = "{kind}"', f"value_separator = {toml_value(',' if is_list else separator or ',')}"]
    else:
        parts[0], *more = _role(name, cells, distinct)
        parts += more
    seen = f"{distinct:,} different, for example {toml_value(cells[0][:40])}" if cells else "always missing"
    return f"    {{ {', '.join(parts)} }},  # {seen}"


def _role(name: str, cells: Sequence[str], distinct: int) -> list[str]:
    if all(map(_DATETIME.fullmatch, cells)):
        return ['role = "time"', 'kind = "datetime"'] if name.lower() in _TIME_NAMES else ['role = "ignore"']
    if all(map(_INT.fullmatch, cells)):
        return _role_of_integers(name, cells, distinct)
    if all(map(_HEX.fullmatch, cells)):
        return ['role = "sparse"', 'kind = "hex"']
    if all(map(_FLOAT.fullmatch, cells)):
        return ['role = "dense"', 'kind = "float"', 'transform = "standardize"']
    return ['role = "sparse"', 'kind = "string"']


def _role_of_integers(name: str, cells: Sequence[str], distinct: int) -> list[str]:
    if name.lower() in _TIME_NAMES:
        return ['role = "time"', 'kind = "int"']
    is_number = not name.lower().endswith("id") and distinct > 2
    if is_number and (distinct > _CATEGORY_SHARE * len(cells) or max(map(len, cells)) <= 6):
        return ['role = "dense"', 'kind = "int"', 'transform = "log1p"']
    return ['role = "sparse"', 'kind = "int"']


def _list_separator(cells: Sequence[str], separator: str) -> str | None:
    """The mark between the values of a cell, where most cells have several values without spaces in them."""
    for mark in _LIST_SEPARATORS:
        if mark in (separator, " ", ","):
            continue
        if sum(mark in cell for cell in cells) > len(cells) / 4:
            return mark
    return None


def _identifier(name: str, taken: set[str]) -> str:
    base = re.sub(r"\W", "_", name, flags=re.ASCII) or "column"
    base = base if not base[0].isdigit() else f"_{base}"
    found, number = base, 2
    while found in taken:
        found, number = f"{base}_{number}", number + 1
    taken.add(found)
    return found
