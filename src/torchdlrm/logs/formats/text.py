"""Reads text whose cells stand between separators: CSV, TSV and others, with a header or without."""

import csv
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import ClassVar

from torchdlrm.features.schema import FeatureSchema
from torchdlrm.logs.cut import read_header
from torchdlrm.logs.files import LogFile, open_text
from torchdlrm.logs.format import ParsedChunk
from torchdlrm.logs.lines import LineFormat
from torchdlrm.logs.names import found_by_name, ignored
from torchdlrm.logs.sniff import check_layout
from torchdlrm.logs.text import parse_chunk

_LINES_LOOKED_AT = 100


class TextFormat(LineFormat):
    """Cells between separators."""

    name: ClassVar[str] = "UTF-8 text"

    def recognises(self, start: bytes, path: Path) -> bool:  # noqa: ARG002
        """What is nothing else is text."""
        return True

    def check(self, file: LogFile, schema: FeatureSchema, max_bad_rows: int) -> None:
        """See that the text seems to be cut as the schema says."""
        check_layout(file, schema, max_bad_rows)

    def layout(self, file: LogFile, schema: FeatureSchema) -> FeatureSchema:
        """The columns in the order in which the header names them; without one, the schema."""
        if not schema.header:
            return schema
        with open_text(file) as text:
            line, _ = read_header(text)
        header = line.decode(errors="replace").removesuffix("\n").removesuffix("\r")
        try:
            names = next(_cells([header], schema), [])
        except csv.Error:  # a name of more than 128 KiB is none
            names = header.split(schema.separator)
        where = f"{file.path}, line 1 (header)"
        found = found_by_name(names, where, schema, schema.used, f"the schema {schema.name!r}")
        return schema.with_columns([column or ignored(i, names[i]) for i, column in enumerate(found)])

    def parse(self, lines: bytes, layout: FeatureSchema, *, is_label_optional: bool = False) -> ParsedChunk:
        """Parse whole lines."""
        return parse_chunk(lines, layout, is_label_optional=is_label_optional)

    def columns(self, head: bytes, schema: FeatureSchema) -> tuple[Sequence[str] | None, Sequence[Sequence[str]]]:
        """The cells of the first lines, of which the first may name the columns."""
        lines = (line.removesuffix("\r") for line in head.decode(errors="replace").removesuffix("\n").split("\n"))
        return None, list(islice(_cells(lines, schema), _LINES_LOOKED_AT))

    def sample(self, file: LogFile, num_rows: int) -> None:  # noqa: ARG002
        """A text does not say how it is cut into columns; the proposal of a schema finds out."""
        return


def _cells(lines: Iterable[str], schema: FeatureSchema) -> Iterator[list[str]]:
    if schema.quote is None:
        return (line.split(schema.separator) for line in lines)
    return csv.reader(lines, delimiter=schema.separator)
