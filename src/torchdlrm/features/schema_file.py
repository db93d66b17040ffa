"""Reads a schema: a preset by its name, or a TOML file, whose problems are reported all at once.

In: a name or a path.  Out: a `FeatureSchema`.
"""

import re
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from torchdlrm.errors import SchemaError
from torchdlrm.features.columns import ROLES
from torchdlrm.features.schema import PRESETS, FeatureSchema, SplitRule
from torchdlrm.records import problems
from torchdlrm.storage.mirror import fetch
from torchdlrm.storage.places import located
from torchdlrm.toml import did_you_mean, explain, is_preset, read_toml, toml_text, toml_value


def load_schema(name_or_path: str | Path) -> FeatureSchema:
    """The preset of that name, or the schema in that TOML file; `./criteo` is a file.

    Args:
        name_or_path: `criteo`, `criteo-bucketed` or another preset, or a file that `dlrm schema` may have proposed.

    Raises:
        SchemaError: there is neither, or the file is not a valid schema; all problems in one message.
    """
    name_or_path = str(name_or_path)
    if is_preset(name_or_path, PRESETS):
        return PRESETS[name_or_path]()
    path = fetch(located(name_or_path))
    if not path.is_file():
        msg = f"`schema`: {name_or_path!r} is neither a preset ({', '.join(PRESETS)}) nor a file"
        msg += did_you_mean(name_or_path, PRESETS)
        raise SchemaError(msg)
    raw = read_toml(path, SchemaError)
    try:
        schema = FeatureSchema.model_validate(raw)
        found = []
    except ValidationError as error:
        found = [f"  {_in_schema_file(item, raw)}" for item in error.errors(include_url=False)]
    for key in {"run_label", "run_labels"} & raw.keys():
        found.append(f"  {key}: which label is learnt is said by train.label in the config of a run")
    columns = raw.get("columns")
    for i, column in enumerate(columns if isinstance(columns, list) else []):
        if isinstance(column, dict) and "max_rows" in column:
            found.append(f"  column {i + 1} ({column.get('name')}): max_rows: is called max_embeddings now")
    if found:
        raise SchemaError("\n".join([f"{path}: the schema is wrong:", *found]))
    return schema


def schema_toml(schema: FeatureSchema) -> str:
    """Write a schema as TOML text that `load_schema` reads back."""
    return toml_text(schema.model_dump(mode="json", by_alias=True, exclude_none=True))


def with_split(
    schema: FeatureSchema, rule: str | None = None, val: float | None = None, test: float | None = None
) -> FeatureSchema:
    """The schema with another split; what is None stays as it is.

    Raises:
        SchemaError: there is no such split of such a log.
    """
    changes = {key: value for key, value in (("rule", rule), ("val", val), ("test", test)) if value is not None}
    if not changes:
        return schema
    try:
        split = SplitRule.model_validate({**schema.split.model_dump(), **changes})
        if split.rule in ("criteo", "folder") and (val is not None or test is not None):
            msg = f"`val`, `test`: the split {split.rule!r} says what is held out; make `split` order, random or time"
            raise SchemaError(msg)
        return FeatureSchema.model_validate({**dict(schema), "split": split})
    except ValidationError as error:
        raise SchemaError("\n".join(["`split`, `val`, `test`: no such split of this log", *problems(error)])) from error


def _in_schema_file(item: Any, raw: dict[str, Any]) -> str:
    """A problem as a line about the file: the column by number and name, key, value and remedy."""
    place: list[str] = []
    keys, known, role = list(map(str, item["loc"])), list(FeatureSchema.model_fields), ""
    if len(keys) > 1 and keys[0] == "columns":
        column = raw["columns"][int(keys[1])]
        name = column.get("name") if isinstance(column, dict) else None
        place = [f"column {int(keys[1]) + 1}" + (f" ({name})" if name else "")]
        role = keys[2] if len(keys) > 2 else ""
        keys, known = keys[3:], list(ROLES[role].model_fields) if role else []
    elif len(keys) > 1 and keys[0] == "split":
        known = list(SplitRule.model_fields)
    if item["type"] == "extra_forbidden":
        hint = did_you_mean(keys[-1], known) or f"; there are {', '.join(known)}"
        if keys[0] == "split" and keys[-1] in FeatureSchema.model_fields:
            hint = "; it stands below [split] and so belongs to it: move it above"
        text = f"there is no such key{f' of a {role} column' if role else ''}{hint}"
    elif item["type"] == "union_tag_not_found":
        text = f"has no role; it is one of {', '.join(ROLES)}"
    elif item["type"] == "string_pattern_mismatch":
        name = re.sub(r"\W", "_", re.sub(r"^(?=\d)", "_", item["input"]), flags=re.ASCII) or "column"
        text = f"{item['input']!r} is not made of letters, digits and _, no digit first; "
        text += f'write name = "{name}", header_name = {toml_value(item["input"])}'
    else:
        text = explain(item)
    return ": ".join([*place, *([".".join(keys)] if keys else []), text])
