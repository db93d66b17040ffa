"""Guesses from its first lines how a text log is written.

In: the start of a text.  Out: the separator that cuts most of its lines into the same number of cells, and whether
cells are quoted; a log that is cut otherwise than its schema says is refused before any work.
"""

import re
import shlex
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Self

from torchdlrm.errors import LogError
from torchdlrm.features.schema import FeatureSchema
from torchdlrm.logs.files import LogFile, open_text
from torchdlrm.logs.lines import BYTE_ORDER_MARK
from torchdlrm.logs.quotes import find_quoted, last_row_end

SEPARATORS = {"\t": "tab", ",": "comma", ";": "semicolon", "|": "bar", "\x01": "^A"}
_HEAD_BYTES = 64 << 10
_HEAD_LINES = 100
_QUOTED_CELL = r'(?:(?<=[{marks}\n])|\A)"(?:[^"]++|"")*+"(?=[{marks}]|\r?\n|\Z)'
# Of the quotes in a text whose cells are quoted, at most this many in a hundred are out of place.
_MAX_STRAY_PERCENT = 1
_MAX_DAMAGED_PERCENT = 5
_SURE_FRACTION = 0.9
_RETURNS_A_LINE = 3  # more than these, and they end the lines


@dataclass(frozen=True)
class Cut:
    """What a mark makes of some lines: the number of columns that most of them have, and the fraction that has it."""

    mark: str
    num_columns: int
    fraction: float

    @classmethod
    def of(cls, lines: Sequence[str], mark: str) -> Self:
        """Count how a separator cuts lines."""
        widths = Counter(line.count(mark) + 1 for line in lines)
        width, count = widths.most_common(1)[0] if widths else (1, 0)
        return cls(mark, width, count / max(1, len(lines)))

    @property
    def rank(self) -> tuple[object, ...]:
        """Texts hold no tabs; bars stand between the values of a cell, and commas in numbers and in texts."""
        cuts = self.num_columns > 1
        sure = self.mark in "\t\x01" and self.fraction >= _SURE_FRACTION
        return cuts, sure, self.fraction, self.mark != "|", self.num_columns, self.mark == ","

    @property
    def in_words(self) -> str:
        """Describe the cut for a message."""
        return f"{SEPARATORS.get(self.mark, self.mark)}-separated ({self.num_columns:,} columns)"


def sniff(text: bytes, file: LogFile) -> Cut:
    """The separator of a text that starts so, with the number of its columns; blank lines do not count.

    Raises:
        LogError: the lines end as none does that is read, or are not UTF-8.
    """
    if text.count(b"\r", 0, _HEAD_BYTES) > _RETURNS_A_LINE * text.count(b"\n", 0, _HEAD_BYTES):
        path = shlex.quote(str(file.path))
        raise LogError(
            f"{file.path}: its lines end with a carriage return alone; this makes a log: tr '\\r' '\\n' < {path} > NEW"
        )
    head = text[: text.find(b"\n", _HEAD_BYTES) + 1 or None]
    check_encoding(head, file)
    lines = _lines(head.decode(errors="replace"), quoted_by="".join(SEPARATORS))
    return max((Cut.of(lines, mark) for mark in SEPARATORS), key=lambda cut: cut.rank)


def check_encoding(lines: bytes, file: LogFile) -> None:
    """See that whole lines, the first ones of a text, are in UTF-8; a few of many may be damaged.

    Raises:
        LogError: the first line is not, or more than a few are not.
    """
    texts = lines.split(b"\n")
    wrong = [i for i, text in enumerate(texts, start=1) if text.decode(errors="replace").encode() != text]
    if not wrong or (wrong[0] > 1 and len(wrong) * 100 <= len(texts) * _MAX_DAMAGED_PERCENT):
        return
    path, convert = shlex.quote(str(file.path)), "iconv -f WINDOWS-1252 -t UTF-8"
    unpack = {None: f"{convert} {path}", "gzip": f"zcat {path} | {convert}", "zstd": f"zstdcat {path} | {convert}"}
    raise LogError(
        f"{file.path}, line {wrong[0]}: is not UTF-8, as a log is; where it is Latin-1, this makes a log: "
        f"{unpack[file.packing]} > {path}.utf8"
    )


def is_quoted(texts: Iterable[bytes], separator: str) -> bool:
    """Whether cells are quoted: some start with a quote, and nearly no quote is out of place."""
    num_quotes, num_stray, num_inside = 0, 0, 0
    for text in texts:
        if b'"' in text:
            inside, stray = find_quoted(text, separator)
            num_quotes += text.count(b'"')
            num_stray += 0 if stray is None else int(stray.sum())
            num_inside += int(inside.sum())
    return num_inside > 0 and num_stray * 100 <= num_quotes * _MAX_STRAY_PERCENT


def check_layout(file: LogFile, schema: FeatureSchema, max_bad_rows: int) -> None:
    """See that a text log seems to be cut as its schema says.

    Raises:
        LogError: more than `max_bad_rows` of its first lines have another number of columns, and no line has this one.
    """
    with open_text(file) as text:
        head = text.read(_HEAD_BYTES).removeprefix(BYTE_ORDER_MARK)
    if len(head) == _HEAD_BYTES:
        head = head[: last_row_end(head, schema.separator) if schema.quote else head.rfind(b"\n") + 1]
    lines = _lines(head.decode(errors="replace"), schema.separator if schema.quote else "")
    widths = [line.count(schema.separator) + 1 for line in lines]
    # With a header columns are found by name, and others may stand among them.
    if (max(widths, default=0) > 1 if schema.header else len(schema.columns) in widths) or len(widths) <= max_bad_rows:
        return
    found, expected = sniff(head, file), Cut(schema.separator, len(schema.columns), 1.0)
    if found.num_columns < 2:
        return
    raise LogError(
        f"{file.path}: looks {found.in_words}, and the schema {schema.name!r} is {expected.in_words}; "
        f"try `dlrm schema {shlex.quote(str(file.path))}`, which proposes a schema"
    )


def _lines(text: str, quoted_by: str) -> Sequence[str]:
    """The first rows that are not blank, as lines; the quoted cells between these marks are empty."""
    if quoted_by and '"' in text:
        text = re.sub(_QUOTED_CELL.replace("{marks}", re.escape(quoted_by)), "", text)
    return [line for line in text.split("\n") if line.strip()][:_HEAD_LINES]
