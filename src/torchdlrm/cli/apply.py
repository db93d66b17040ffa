"""`dlrm apply`: a bundle and a delta to it -> the bundle that the delta was made of."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from torchdlrm.cli.terminal import Json, print_json, print_table, progress_bars, say, say_next
from torchdlrm.folders import expect
from torchdlrm.units import show_bytes

if TYPE_CHECKING:
    from torchdlrm.bundle.delta import Delta


def apply(bundle: Path, delta: Path, *, out: Path, as_json: Json = False) -> None:
    """Make a bundle of another one and a delta to it: the very bytes of the whole export.

    Args:
        bundle: The bundle that it is a delta to; it stays as it is.
        delta: Folder written by `dlrm export --delta-to`.
        out: Folder to write; nothing may be there.
        as_json: Print one JSON object on standard output.
    """
    expect("bundle", bundle)
    expect("delta", delta)
    from torchdlrm.bundle.apply import apply_delta
    from torchdlrm.cli.inspect import bundle_as_dict

    with progress_bars("") as progress:
        made = apply_delta(bundle, delta, out, progress=progress)
    say(f"applied {delta} to {bundle}: {out}, model {made.name}, version {made.version}, complete and undamaged")
    say_next("dlrm predict {0} ROWS, or dlrm serve {0}", out)
    if as_json:
        print_json(bundle_as_dict(made, None))


def print_delta(delta: "Delta") -> None:
    """Print between which bundles a delta is, and what of each table and file it holds."""
    about = delta_as_dict(delta)
    say(
        f"delta {delta.path}, model {delta.manifest.name}: complete and undamaged; from version "
        f"{delta.manifest.base.version} to {delta.manifest.result.version}; {show_bytes(about['size_bytes'])} of "
        f"{show_bytes(delta.manifest.result.size_bytes)} ({about['size_bytes'] / delta.manifest.result.size_bytes:.1%})"
    )
    rows = [
        {
            "table": name,
            "rows": f"{table['rows']:,}",
            "changed": f"{table['changed_rows']:,}",
            "new": f"{table['new_rows']:,}",
            "bytes": show_bytes(table["size_bytes"]),
        }
        for name, table in about["tables"].items()
    ]
    print_table("", rows)
    files = [
        {"file": name, "how": file["how"], "bytes": show_bytes(file["size_bytes"])}
        for name, file in about["files"].items()
        if file["how"] != "base"
    ]
    print_table("files that changed", files, left_aligned=("how",))


def delta_as_dict(delta: "Delta") -> dict[str, Any]:
    """Return what a delta changes, for JSON; `new_rows` are not counted among `changed_rows`."""
    manifest = delta.manifest
    tables = {
        recipe.table.split(".")[-2].removeprefix("t_"): {
            "rows": recipe.num_rows,
            "changed_rows": sum(recipe.changed_rows) - (recipe.num_rows - recipe.base_rows),
            "new_rows": recipe.num_rows - recipe.base_rows,
            "size_bytes": recipe.size_bytes,
        }
        for recipe in manifest.weights.tables
    }
    files = {
        name: {"how": recipe.how, "size_bytes": recipe.file.size_bytes if recipe.file is not None else 0}
        for name, recipe in manifest.files.items()
    }
    return {
        "path": str(delta.path),
        "name": manifest.name,
        "base": manifest.base.model_dump(mode="json"),
        "result": manifest.result.model_dump(mode="json"),
        "size_bytes": delta.size_bytes,
        "tables": tables,
        "files": files,
    }
