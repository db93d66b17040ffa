"""Reads plan.json as it is, without TorchRec: for pages and tables of plans. `plan_file` writes it."""

import json
from pathlib import Path
from typing import Any

from torchdlrm.errors import PlanError

FORMAT, FORMAT_VERSION, _WITH_OLD_NAMES = "torchdlrm-plan", 2, 1
_NEW_NAMES = {
    "cache_share": "cache_fraction",
    "host_cache_share": "cache_fraction",
    "memory_share": "memory_fraction",
    "reserved_share": "reserved_fraction",
}


def read_plan(path: Path) -> dict[str, Any]:
    """Read the object in a plan.json.

    Raises:
        PlanError: the file cannot be read, is no plan, or of another format version.
    """
    try:
        plan: Any = json.loads(path.read_text(encoding="utf-8"), object_hook=_in_new_names)
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise PlanError(f"{path}: cannot read the plan: {error}; dlrm plan writes one") from error
    if not isinstance(plan, dict) or "tables" not in plan or "format_version" not in plan:
        raise PlanError(f"{path}: not a plan (no tables, no format_version); dlrm plan writes one")
    if plan["format_version"] not in {FORMAT_VERSION, _WITH_OLD_NAMES}:
        msg = f"{path}: format_version is {plan['format_version']!r}, this version reads {FORMAT_VERSION}; plan again"
        raise PlanError(msg)
    return plan


def _in_new_names(found: dict[str, Any]) -> dict[str, Any]:
    """What the first format version called otherwise; a table, which is an object itself, keeps its name."""
    return {key if isinstance(value, dict) else _NEW_NAMES.get(key, key): value for key, value in found.items()}
