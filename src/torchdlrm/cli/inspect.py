"""`dlrm inspect`: what a folder that another verb wrote holds."""

from importlib import import_module
from pathlib import Path

from torchdlrm.cli.terminal import Json
from torchdlrm.errors import UserError

# The file that tells what a folder is -> what it is called, and the module whose `show` knows it.
_KINDS = {
    "dataset.json": ("a dataset", "torchdlrm.cli.inspect_dataset"),
    "bundle.json": ("a bundle", "torchdlrm.cli.inspect_bundle"),
    "environment.json": ("a run", "torchdlrm.cli.inspect_run"),
}


def inspect(
    folder: Path,
    *,
    values: int = 3,
    as_json: Json = False,
) -> None:
    """Show what a dataset, a run or a bundle holds.

    Of a dataset: rows, click rates, tables, unknown and missing values. Of a run: how far it is, its checkpoints, its
    evaluations. Of a bundle: tables and their precision, the check at the end of the export. All files are read and
    their checksums compared.

    Args:
        folder: What to look at.
        values: How many of a feature's most frequent values to show, of a dataset.
        as_json: Print one JSON object on standard output, and nothing else.
    """
    if values < 0:
        msg = f"--values: must not be negative, got {values}"
        raise UserError(msg)
    for marker, (_, module) in _KINDS.items():
        if (folder / marker).exists():
            import_module(module).show(folder, num_values=values, as_json=as_json)
            return
    found = "holds none of these" if folder.is_dir() else "is not a folder"
    kinds = " or ".join(f"{name} ({marker})" for marker, (name, _) in _KINDS.items())
    msg = f"{folder}: {found}: {kinds}; give the folder that another `dlrm` command wrote"
    raise UserError(msg)
