"""Proposes a schema for a log, as text that a user can edit.

In: a file of the log.  Out: a `Proposal`: the text of a schema file, with what was read and a reason beside each
column, and what a user should look at first.
"""

import re
import shlex
import tomllib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import polars as pl
from pydantic import ValidationError

from torchdlrm.features.bad_rows import BadRows, describe_bad_rows
from torchdlrm.features.cells import to_typed_columns
from torchdlrm.features.schema import PRESETS, FeatureSchema
from torchdlrm.logs.find import find_files
from torchdlrm.logs.proposal.columns import Choice, choose_role
from torchdlrm.logs.proposal.facts import USUAL_NULLS, Facts
from torchdlrm.logs.proposal.label import Label, find_label, find_leaks
from torchdlrm.logs.proposal.sample import Sample, take_sample
from torchdlrm.logs.proposal.times import Time, about_dates, find_time
from torchdlrm.records import problems
from torchdlrm.toml import toml_value

SAMPLE_ROWS = 20_000
_MAX_EXAMPLE_CHARACTERS = 40
_MAX_LINES = 2
_MAX_BAD_FRACTION = 0.01  # of the rows of a log with a preset's layout


@dataclass(frozen=True)
class Proposal:
    """A proposed schema.

    Attributes:
        text: of the schema file.
        preset: the preset that has the log's layout.
        origin: what was read, in words.
        warnings: what to look at.
        reasons: of each column in the order of the log, by its name in the schema.
    """

    text: str
    preset: str | None
    origin: str
    warnings: Sequence[str]
    reasons: dict[str, str]

    @property
    def schema(self) -> dict[str, Any]:
        """The content of the schema file."""
        return tomllib.loads(self.text)


def propose_schema(path: Path, num_rows: int = SAMPLE_ROWS) -> Proposal:
    """A schema for a log, from about `num_rows` rows from all over it.

    Raises:
        LogError: the file cannot be read, or has no columns that could be told apart.
    """
    (file,) = find_files([path])
    sample = take_sample(file, num_rows)
    names = _identifiers(sample.names)
    preset = _preset_of(sample)
    if preset is not None:
        return _of_preset(preset, path, sample)
    facts = [
        Facts.of(name, sample.frame.to_series(i), is_floating=i in sample.floating)
        for i, name in enumerate(sample.names)
    ]
    label = find_label(facts)
    leaks, suspects = find_leaks(label, facts, sample.frame) if label is not None else ({}, {})
    time, other_times = find_time(facts, {*leaks, *([label.place] if label is not None else [])})
    known = {i: Choice("ignore", why) for i, why in other_times.items()}
    known |= {i: Choice("ignore", f"LEAK? {why}") for i, why in leaks.items()}
    known |= {i: Choice("ignore", f"cannot be read: {why}") for i, why in sample.unread.items()}
    if time is not None:
        known[time.place] = Choice("time", time.reason, {"kind": time.kind})
    if label is not None:
        known[label.place] = Choice("label", label.reason, dict(label.keys))
    choices = [known.get(i) or choose_role(about, is_whole_log=sample.is_whole) for i, about in enumerate(facts)]
    body = [*_head(path, sample, facts, choices), "", *_split(label, time, facts)]
    warnings = [f"{names[i]} looks like the label and is left out: {why}" for i, why in leaks.items()]
    warnings += [f"{names[i]} is {why}" for i, why in suspects.items()]
    warnings += [
        f"{name} holds {about.as_people_write[0]} written as {about.cells[0]:.80}: {about.as_people_write[1]}"
        for name, about, choice in zip(names, facts, choices, strict=True)
        if choice.role == "sparse" and about.as_people_write
    ]
    warnings += [*about_dates(facts, time), *_about_label(label, facts), *_about_lines(sample), *_check(body, sample)]
    reasons = {name: choice.reason for name, choice in zip(names, choices, strict=True)}
    return Proposal(_text(path, sample, warnings, body), None, sample.origin, warnings, reasons)


def _head(path: Path, sample: Sample, facts: Sequence[Facts], choices: Sequence[Choice]) -> list[str]:
    """How the log is written, and its columns."""
    nulls = _nulls_of_file(facts, choices)
    lines = [f"name = {toml_value(_identifiers([path.name.split('.')[0]])[0])}"]
    if sample.separator is not None:
        lines += [f"separator = {toml_value(sample.separator)}"]
        lines += ["quote = '\"'"] if sample.is_quoted else []
        lines += [f"header = {toml_value(sample.has_header)}"]
    lines += [f"null_values = {toml_value(nulls)}"] if nulls else []
    columns = zip(_identifiers(sample.names), facts, choices, strict=True)
    return [*lines, "columns = [", *(_line(*column, nulls) for column in columns), "]"]


def _identifiers(names: Sequence[str]) -> list[str]:
    """Names as a schema may have them, each once."""
    taken: list[str] = []
    for name in names:
        base = re.sub(r"\W", "_", re.sub(r"^(?=\d)", "_", name), flags=re.ASCII) or "column"
        found, number = base, 2
        while found in taken:
            found, number = f"{base}_{number}", number + 1
        taken.append(found)
    return taken


def _preset_of(sample: Sample) -> str | None:
    """The preset as which nearly all rows of a log without a header can be read."""
    if sample.separator is None or sample.has_header:
        return None
    for name, make in PRESETS.items():
        schema = make()
        if sample.separator == schema.separator and len(sample.names) == len(schema.columns):
            bad_rows = _bad_rows(schema, sample)
            if bad_rows.total <= _MAX_BAD_FRACTION * sample.frame.height:
                return name
    return None


def _of_preset(preset: str, path: Path, sample: Sample) -> Proposal:
    schema = PRESETS[preset]()
    warning = f"this is the layout of the preset `{preset}`, which needs no schema file: "
    warning += f"dlrm preprocess {shlex.quote(str(path))} --schema {preset} --out dataset"
    warnings = [warning, *_about_constant(sample.frame.to_series(schema.columns.index(schema.label)))]
    raw = schema.model_dump(mode="json", exclude_none=True)
    columns = raw.pop("columns")
    split = raw.pop("split")
    body = [f"{key} = {toml_value(value)}" for key, value in raw.items()]
    body += ["columns = [", *(f"    {{ {_pairs(column)} }}," for column in columns), "]", "", "[split]"]
    body += [f"{key} = {toml_value(value)}" for key, value in split.items()]
    text = _text(path, sample, warnings, body)
    return Proposal(text, preset, sample.origin, warnings, {column["name"]: f"preset {preset}" for column in columns})


def _text(path: Path, sample: Sample, warnings: Sequence[str], body: Sequence[str]) -> str:
    lines = [
        f"# Proposed by `dlrm schema`; read it and edit. Read of {toml_value(path.name)}: {sample.origin}.",
        "# Roles: label, dense (a number), sparse (a category), time, ignore. Each column has its reason next to it.",
    ]
    lines += [f"# LOOK: {_comment(warning)}" for warning in warnings]
    return "\n".join([*lines, *body]) + "\n"


def _comment(text: str) -> str:
    """Write a text as a comment of one line."""
    return re.sub(r"[\x00-\x1f\x7f]", lambda mark: repr(mark[0])[1:-1], text)


def _pairs(keys: Mapping[str, object]) -> str:
    return ", ".join(f"{key} = {toml_value(value)}" for key, value in keys.items())


def _line(name: str, facts: Facts, choice: Choice, nulls: Sequence[str]) -> str:
    keys: dict[str, object] = {"role": choice.role, "name": name}
    if name != facts.name:
        keys["header_name"] = facts.name
    keys |= choice.keys
    if choice.role != "ignore" and set(facts.nulls) - set(nulls):
        keys["null_values"] = [*nulls, *sorted(set(facts.nulls) - set(nulls))]
    seen = [choice.reason]
    if len(facts.cells):
        example = facts.cells[0]
        shown = example if isinstance(example, str) else ",".join(map(str, example))
        shown = shown if len(shown) <= _MAX_EXAMPLE_CHARACTERS else shown[:_MAX_EXAMPLE_CHARACTERS] + "..."
        seen.append(f"{facts.num_distinct:,} different, for example {toml_value(shown)}")
    if facts.num_missing and len(facts.cells):
        found = ", ".join(f"{toml_value(text)} {count:,}" for text, count in facts.nulls.items())
        seen.append(f"{facts.num_missing:,} missing" + (f" ({found})" if found else ""))
    return f"    {{ {_pairs(keys)} }},  # {_comment('; '.join(seen))}"


def _nulls_of_file(facts: Sequence[Facts], choices: Sequence[Choice]) -> list[str]:
    """Usual texts for a missing value that columns in use have, the commonest first."""
    counts: Counter[str] = Counter()
    for about, choice in zip(facts, choices, strict=True):
        if choice.role != "ignore":
            counts.update({text: count for text, count in about.nulls.items() if text in USUAL_NULLS})
    return [text for text, _ in counts.most_common()]


def _about_label(label: Label | None, facts: Sequence[Facts]) -> list[str]:
    if label is None:
        return ["no column looks like a label: give one the role label; threshold or positive say what a click is"]
    return _about_constant(facts[label.place].cells)


def _about_constant(labels: pl.Series) -> list[str]:
    found = labels.drop_nulls().unique()
    if len(found) != 1:
        return []
    return [f"every row read has the same label, {toml_value(found[0])}: nothing can be learnt from it"]


def _about_lines(sample: Sample) -> list[str]:
    if not sample.bad_lines:
        return []
    return [f"lines that are no rows, at which preprocess stops: {_few(sample.bad_lines)}"]


def _split(label: Label | None, time: Time | None, facts: Sequence[Facts]) -> list[str]:
    rule, why = "order", "the last rows are held out"
    if time is not None and time.can_split:
        rule, why = "time", f"the latest rows by {toml_value(facts[time.place].name)} are held out"
    elif label is not None and facts[label.place].cells.is_sorted() and facts[label.place].num_distinct > 1:
        rule, why = "random", "rows chosen by a hash are held out, as the log is sorted by its label"
    elif time is not None:
        why += ": too many rows have the same time"
    return ["[split]", f'rule = "{rule}"  # {why}; others: order, random, time', "val = 0.1", "test = 0.1"]


def _check(body: Sequence[str], sample: Sample) -> list[str]:
    """What is wrong with a proposal: what the schema lacks, or rows of the sample that it cannot read."""
    try:
        schema = FeatureSchema.model_validate(tomllib.loads("\n".join(body)))
    except ValidationError as error:
        return [f"to be edited: {line.strip()}" for line in problems(error)]
    bad_rows = _bad_rows(schema, sample)
    lines = [line.strip() for line in describe_bad_rows(bad_rows.counts, bad_rows.examples)]
    lines = [line.partition(", column ")[2] or line for line in lines]
    return [f"{bad_rows.total:,} of the rows read are bad: {_few(lines)}"] if lines else []


def _few(lines: Sequence[str]) -> str:
    return "; ".join(lines[:_MAX_LINES]) + (" and more" if len(lines) > _MAX_LINES else "")


def _bad_rows(schema: FeatureSchema, sample: Sample) -> BadRows:
    bad_rows = BadRows()
    frame = sample.frame.rename({f"column_{i}": column.name for i, column in enumerate(schema.columns)})
    to_typed_columns(frame, schema, bad_rows)
    return bad_rows
