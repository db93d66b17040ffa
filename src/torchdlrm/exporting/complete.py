"""Sees whether the bundle that an export would write is there already."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel

from torchdlrm.bundle import TablePrecision
from torchdlrm.bundle.bundle import Bundle
from torchdlrm.bundle.manifest import BundleManifest
from torchdlrm.bundle.write import WeightSource, quantize_rows
from torchdlrm.errors import BundleError, differences
from torchdlrm.model import table_weight

_COMPARED_ROWS = 4096


def require_same(
    out: Path,
    about: Mapping[str, Any],
    check_rows: int,
    weights: WeightSource,
    tables: Mapping[str, TablePrecision],
    *,
    may_be_float32: bool,
) -> None:
    """See that a bundle is what an export would write; all of it is read, and its checksums compared.

    Args:
        out: where something is.
        about: what the manifest would have, by its names.
        check_rows: rows that the bundle would be checked on.
        weights: of the checkpoint.
        tables: the precision of each table by its key.
        may_be_float32: its arches may compute in float32, whatever `about` says: its check may have failed otherwise.

    Raises:
        BundleError: it is no bundle, a damaged one, or another one; names what differs.
    """
    try:
        found = BundleManifest.read(out)
    except BundleError as error:
        raise BundleError(f"`out`: {out} is there already; give another name, or remove it first ({error})") from error
    was = {key: getattr(found, key) for key in about} | {"check_rows": found.check.rows if found.check else 0}
    if may_be_float32 and found.dense_precision == "float32":
        about = {**about, "dense_precision": "float32"}
    was["tables"] = {table.table_key: found.sparse[table.feature].precision for table in found.tables}
    lines = differences(_flat(was), _flat({**about, "check_rows": check_rows, "tables": dict(tables)}))
    if not lines and (name := next(_other_weights(out, weights, tables), None)):
        lines = [f"  {name}: the checkpoint has others"]
    if lines:
        head = f"`out`: {out} is there already, and is another bundle than would be written:"
        raise BundleError("\n".join([head, *lines, "Give another name, or `overwrite` to replace it."]))


def _other_weights(out: Path, weights: WeightSource, tables: Mapping[str, TablePrecision]) -> Iterator[str]:
    """Names of weights that differ: all of those outside of tables, and the first rows of each table, are compared.

    A training that was begun again has others after the same step, whatever its folder is called.
    """
    stored, precisions = Bundle.open(out).weights, {table_weight(key): precision for key, precision in tables.items()}
    for name, shape in weights.shapes.items():
        if name in precisions:
            expected = quantize_rows(weights.rows(name, 0, min(shape[0], _COMPARED_ROWS)), precisions[name])
        else:
            expected = weights.tensor(name)
        if not torch.equal(stored.tensor(name)[: len(expected)].contiguous().view(expected.dtype), expected):
            yield name


def _flat(about: Mapping[str, Any]) -> dict[str, Any]:
    """By dotted name, so that a difference names the setting and not the whole record."""
    flat: dict[str, Any] = {}
    for key, value in about.items():
        parts = dict(value) if isinstance(value, BaseModel | dict) else None
        flat |= {key: value} if parts is None else {f"{key}.{name}": part for name, part in parts.items()}
    return flat
