"""Reports rows of a log that its schema cannot read: how many, why, and where the first of them are.

In: the bad rows of each chunk, lines counted from the chunk's start.  Out: counts by reason and a few positions for
each, for the manifest, the summary and the error that stops a job.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Self

from torchdlrm.errors import LogError
from torchdlrm.features.kinds import KINDS
from torchdlrm.records import Record

REASONS = {
    "long": "the line is longer than 1 MiB",
    "quotes": "a quote stands inside a cell, or text behind a quoted one, or a quote is not closed",
    "json": "the line is not an object of JSON",
    "nested": "the cell holds a list or an object, and the schema has one value",
    "columns": "the line has the wrong number of columns",
    "nul_byte": "the cell contains a NUL byte",
    "utf8": "the cell is not UTF-8",
    "no_label": "the label is missing",
    "label": "the label means neither 0 nor 1",
    "weight": "the weight of the row is missing, or not a finite number of at least 0",
    "value_weight": "the weight of a value is not a finite number",
    "time": "the cell is not a time as the schema says",
    **{kind.name: kind.fault for kind in KINDS.values() if kind.fault},
}
_MAX_VALUE_CHARACTERS = 80
_LONGEST_NULL = 12  # of texts that may stand for a missing value


class BadRow(Record):
    """Where a bad row is, and what stands there."""

    file: str = ""
    line: int
    column: str | None
    value: str


@dataclass
class BadRows:
    """Bad rows by reason; each row once: by its line as a whole if that is at fault, else by its leftmost cell."""

    NUM_EXAMPLES: ClassVar[int] = 5

    counts: dict[str, int] = field(default_factory=dict)
    examples: dict[str, list[BadRow]] = field(default_factory=dict)

    @property
    def total(self) -> int:
        """The number of bad rows, of all reasons together."""
        return sum(self.counts.values())

    def add(self, reason: str, count: int, examples: list[BadRow]) -> None:
        """Count more bad rows; of `examples`, in the order of the log, the first few are kept."""
        assert reason in REASONS
        if not count:
            return
        self.counts[reason] = self.counts.get(reason, 0) + count
        kept = self.examples.setdefault(reason, [])
        kept.extend(_shortened(example) for example in examples[: self.NUM_EXAMPLES - len(kept)])

    def add_chunk(self, chunk: "BadRows", file: str, num_lines_before: int) -> None:
        """Count the bad rows of the next chunk of the log, which starts after `num_lines_before` lines of `file`."""
        for reason, count in chunk.counts.items():
            placed = [
                example.model_copy(update={"file": file, "line": example.line + num_lines_before})
                for example in chunk.examples[reason]
            ]
            self.add(reason, count, placed)

    def to_json(self) -> dict[str, Any]:
        """Return what a work folder keeps, as JSON has it."""
        examples = {reason: [row.model_dump() for row in rows] for reason, rows in self.examples.items()}
        return {"counts": self.counts, "examples": examples}

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> Self:
        """Read what `to_json` returned."""
        examples = {reason: [BadRow(**row) for row in rows] for reason, rows in content["examples"].items()}
        return cls(dict(content["counts"]), examples)

    def check(self, max_bad_rows: int) -> None:
        """Stop a job that has met too many.

        Raises:
            LogError: there are more than `max_bad_rows`; names the first few, and how to allow them.
        """
        if self.total <= max_bad_rows:
            return
        lines = [
            f"the log has bad rows: {self.total:,} so far, {max_bad_rows:,} allowed",
            *describe_bad_rows(self.counts, self.examples),
        ]
        lines += _remedies(self.examples)
        lines.append("Fix the log, check the schema, or skip such rows with `max_bad_rows` N.")
        raise LogError("\n".join(lines))


def describe_bad_rows(counts: Mapping[str, int], examples: Mapping[str, Sequence[BadRow]]) -> list[str]:
    """A line for each position that was kept, and for each reason how many more there are."""
    lines = []
    for reason, meaning in REASONS.items():
        for row in examples.get(reason, []):
            column = f", column {row.column}" if row.column else ""
            value = f": {row.value!r}" if row.column else f" ({row.value})"
            lines.append(f"  {row.file}, line {row.line:,}{column}: {meaning}{value}")
        hidden = counts.get(reason, 0) - len(examples.get(reason, []))
        if hidden:
            lines.append(f"  and {hidden:,} more where {meaning}")
    return lines


def _remedies(examples: Mapping[str, Sequence[BadRow]]) -> list[str]:
    """Keys of the schema by which such cells can be read."""
    lines = []
    labels = sorted({row.value for row in examples.get("label", [])})
    if labels:
        shown = ", ".join(json.dumps(label, ensure_ascii=False) for label in labels)
        lines.append(
            f"Say in the schema which of the labels {shown} are clicks: positive = one or a list of them (negative: "
            "those that are none), or threshold = a number to reach."
        )
    nulls = [row.value for reason in KINDS for row in examples.get(reason, [])]
    nulls = sorted({value for value in nulls if not re.search(r"\d", value) and len(value) <= _LONGEST_NULL})
    if nulls:
        lines.append(
            f"Texts that stand for a missing value are named in the schema: null_values = {json.dumps(nulls)}."
        )
    if examples.get("id"):
        lines.append(
            "The rows of a table of ids are given in the schema, num_embeddings = N, or to an import by `table_sizes`; "
            "without it the table is as long as the largest id asks for."
        )
    if examples.get("utf8"):
        lines.append(
            "A log in Latin-1, as from Excel, becomes one in UTF-8 by iconv -f WINDOWS-1252 -t UTF-8 OLD > NEW."
        )
    if any(row.value.isdigit() and int(row.value) >= 2**63 for row in examples.get("int", [])):
        lines.append('Ids of 2^63 and more are read as text: kind = "string".')
    return lines


def _shortened(row: BadRow) -> BadRow:
    if len(row.value) <= _MAX_VALUE_CHARACTERS:
        return row
    return row.model_copy(update={"value": row.value[:_MAX_VALUE_CHARACTERS] + "..."})
