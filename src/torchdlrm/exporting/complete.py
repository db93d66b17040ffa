"""Sees whether what an export would write is there already.

In: the folder, and what the export would say and write.  Out: the bundle that is there, or what differs in it.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel

from torchdlrm.bundle import DensePrecision, TablePrecision
from torchdlrm.bundle.bundle import Bundle
from torchdlrm.bundle.manifest import BundleManifest
from torchdlrm.bundle.precision import quantize_rows
from torchdlrm.bundle.write import WeightSource
from torchdlrm.errors import BundleError, shown
from torchdlrm.model import table_weight

_COMPARED_ROWS = 4096


def require_same(out: Path, about: Mapping[str, Any]) -> BundleManifest:
    """The manifest of the bundle that is there, if it says of itself what a new one would say.

    Args:
        out: where something is.
        about: what the new one's manifest would have, by the names of `BundleManifest`.

    Raises:
        BundleError: it is no bundle, or another one.
    """
    try:
        manifest = BundleManifest.read(out)
    except BundleError as error:
        msg = f"`out`: {out} is there already; give another name, or remove it first ({error})"
        raise BundleError(msg) from error
    _refuse_differences(out, _flat({key: getattr(manifest, key) for key in about}), _flat(about))
    return manifest


def require_same_options(
    out: Path,
    found: BundleManifest,
    precisions: Mapping[str, TablePrecision],
    dense_precision: DensePrecision,
    check_rows: int,
    max_logloss_increase: float | None,
) -> None:
    """See that the bundle that is there was exported, and checked, as one would be now.

    Raises:
        BundleError: it was not; names what differs.
    """
    was: dict[str, Any] = {name: record.precision for name, record in found.sparse.items()}
    now: dict[str, Any] = {**precisions, "dense_precision": dense_precision, "check_rows": check_rows}
    check = found.check
    was |= {"dense_precision": found.dense_precision, "check_rows": 0 if check is None else check.rows}
    if check is not None and max_logloss_increase is not None:
        increase = check.bundle.logloss - check.checkpoint.logloss
        now["max_logloss_increase"] = max_logloss_increase
        was["max_logloss_increase"] = max(increase, max_logloss_increase)
    _refuse_differences(out, was, now)


def require_same_weights(out: Path, weights: WeightSource, precisions: Mapping[str, TablePrecision]) -> None:
    """See that the bundle that is there has these weights: all dense ones, and the first rows of each table.

    A training that was begun again has others after the same step, whatever its folder is called.

    Args:
        out: the bundle; it is read as a whole, and its checksums compared.
        weights: of the checkpoint.
        precisions: of each table by its key.

    Raises:
        BundleError: it has others, or is damaged.
    """
    found = Bundle.open(out).weights
    tables = {table_weight(key): precision for key, precision in precisions.items()}
    for name, shape in weights.shapes.items():
        if name not in tables:
            expected = weights.tensor(name)
        else:
            expected = quantize_rows(weights.rows(name, 0, min(shape[0], _COMPARED_ROWS)), tables[name])
        stored = found.tensor(name)[: len(expected)].contiguous()
        if not torch.equal(stored.view(expected.dtype), expected):
            raise _other(out, [f"the checkpoint has other weights ({name})"])


def _refuse_differences(out: Path, was: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    differing = [key for key in now if was.get(key) != now[key]]
    if differing:
        raise _other(out, [f"{key} was {shown(was.get(key))}, is {shown(now[key])}" for key in differing])


def _other(out: Path, differences: list[str]) -> BundleError:
    head = f"`out`: {out} is there already, and is another bundle than would be written:"
    return BundleError("\n  ".join([head, *differences, "give another name, or `overwrite` to replace it"]))


def _flat(about: Mapping[str, Any]) -> dict[str, Any]:
    """By dotted name, so that a difference names the setting and not the whole record."""
    flat: dict[str, Any] = {}
    for key, value in about.items():
        fields = dict(value) if isinstance(value, BaseModel) else value if isinstance(value, dict) else None
        flat |= {key: value} if fields is None else {f"{key}.{name}": part for name, part in fields.items()}
    return flat
