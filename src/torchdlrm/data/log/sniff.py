"""How a text log seems to be written: told from its first lines.

In: the start of a text.  Out: the separator that cuts most of its lines into the same number of cells, and whether
cells are quoted; a log that is cut otherwise than its schema says is refused before any work.
"""

import gzip
import re
import shlex
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import IO, Self, cast

from torchdlrm.data.log.cut import BYTE_ORDER_MARK, reading
from torchdlrm.data.log.files import LogFile
from torchdlrm.data.log.quotes import find_quoted
from torchdlrm.errors import LogError
from torchdlrm.schema import FeatureSchema

SEPARATORS = {"\t": "tab", ",": "comma", ";": "semicolon", "|": "bar", "\x01": "^A"}
_HEAD_BYTES = 64 << 10
_HEAD_LINES = 100
_QUOTED_CELL = r'(?:(?<={mark})|(?<=\n)|\A)"(?:[^"]++|"")*+"(?={mark}|\r?\n|\Z)'
# Of the quotes in a text whose cells are quoted, at most this many in a hundred are out of place.
_MAX_STRAY_PERCENT = 1
_SURE_SHARE = 0.9


@dataclass(frozen=True)
class TextLayout:
    """A separator, whether cells are quoted, and how many columns most lines have."""

    separator: str
    is_quoted: bool
    num_columns: int

    @property
    def in_words(self) -> str:
        """As a message says it."""
        return f"{SEPARATORS.get(self.separator, self.separator)}-separated ({self.num_columns:,} columns)"


def sniff(head: bytes, file: LogFile) -> TextLayout:
    """The layout of a text, from its first bytes, which end anywhere; blank lines do not count.

    Raises:
        LogError: the lines end as none does that is read.
    """
    if b"\r" in head and b"\n" not in head:
        path = shlex.quote(str(file.path))
        msg = (
            f"{file.path}: its lines end with a carriage return alone; this makes a log: tr '\\r' '\\n' < {path} > NEW"
        )
        raise LogError(msg)
    head = _whole_lines(head)
    text = head.decode(errors="replace")
    found = [_Cut.of(_lines(text, mark), mark) for mark in SEPARATORS]
    best = max(found, key=lambda cut: cut.rank)
    return TextLayout(best.mark, _is_quoted(head, best.mark), best.num_columns)


@dataclass(frozen=True)
class _Cut:
    """What a mark makes of some lines: the width that most of them have, and which share of them has it."""

    mark: str
    num_columns: int
    share: float

    @classmethod
    def of(cls, lines: Sequence[str], mark: str) -> Self:
        widths = Counter(line.count(mark) + 1 for line in lines)
        width, count = widths.most_common(1)[0] if widths else (1, 0)
        return cls(mark, width, count / max(1, len(lines)))

    @property
    def rank(self) -> tuple[object, ...]:
        """Texts hold no tabs; bars stand between the values of a cell, and commas in numbers and in texts."""
        cuts = self.num_columns > 1
        sure = self.mark in "\t\x01" and self.share >= _SURE_SHARE
        return cuts, sure, self.share, self.mark != "|", self.num_columns, self.mark == ","


def check_layout(file: LogFile, schema: FeatureSchema, max_bad_rows: int) -> None:
    """See that a text log seems to be cut as its schema says.

    Raises:
        LogError: more than `max_bad_rows` of its first lines have another number of columns, and no line has this one.
    """
    if file.format == "parquet":
        return
    with reading(file), file.path.open("rb") as raw:
        text = cast("IO[bytes]", gzip.GzipFile(fileobj=raw)) if file.format == "gzip" else raw
        head = text.read(_HEAD_BYTES).removeprefix(BYTE_ORDER_MARK)
    quoted_by = schema.separator if schema.quote else None
    lines = _lines(_whole_lines(head).decode(errors="replace"), quoted_by)
    widths = [line.count(schema.separator) + 1 for line in lines]
    # With a header columns are found by name, and others may stand among them.
    if (max(widths, default=0) > 1 if schema.header else len(schema.columns) in widths) or len(widths) <= max_bad_rows:
        return
    layout = sniff(head, file)
    if layout.num_columns < 2:
        return
    expected = TextLayout(schema.separator, schema.quote is not None, len(schema.columns))
    msg = (
        f"{file.path}: looks {layout.in_words}, and the schema {schema.name!r} is {expected.in_words}; "
        f"try `dlrm schema {shlex.quote(str(file.path))}`, which proposes a schema"
    )
    raise LogError(msg)


def _whole_lines(head: bytes) -> bytes:
    end = head.rfind(b"\n") + 1
    return head[:end] if len(head) >= _HEAD_BYTES and end else head


def _lines(text: str, quoted_by: str | None) -> Sequence[str]:
    """The first rows that are not blank, each quoted cell empty, as lines."""
    if quoted_by is not None and '"' in text:
        text = re.sub(_QUOTED_CELL.replace("{mark}", re.escape(quoted_by)), "", text)
    return [line for line in text.split("\n") if line.strip()][:_HEAD_LINES]


def _is_quoted(text: bytes, separator: str) -> bool:
    if b'"' not in text:
        return False
    inside, stray = find_quoted(text, separator)
    num_quotes = text.count(b'"')
    num_stray = 0 if stray is None else int(stray.sum())
    return bool(inside.any()) and num_stray * 100 <= num_quotes * _MAX_STRAY_PERCENT
