"""Executes the tutorials: `python -m website.notebooks`, and the tests, which keep what they have executed.

In: docs/**/*.ipynb, which hold no outputs.  Out: build/notebooks/, the same with outputs, from which the site is made.
"""

import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import nbformat
from nbclient import NotebookClient

from torchdlrm.processor import processor_name

ROOT = Path(__file__).parents[1]
DOCS, EXECUTED = ROOT / "docs", ROOT / "build" / "notebooks"


def notebooks() -> list[Path]:
    """All of them."""
    return sorted(DOCS.rglob("*.ipynb"))


def executed(path: Path) -> Any | None:
    """A notebook as it was executed; None where it was not, or was another one then."""
    kept = EXECUTED / path.relative_to(DOCS)
    if not kept.exists():
        return None
    done = nbformat.read(kept, as_version=4)
    is_same = [cell.source for cell in done.cells] == [cell.source for cell in nbformat.read(path, as_version=4).cells]
    return done if is_same else None


def execute(path: Path, folder: Path, commands: Path | None = None) -> Any:
    """Execute a notebook in a folder, and keep it with its outputs.

    Args:
        path: of the notebook.
        folder: where its cells write.
        commands: the folder of a `dlrm` that has loaded torch already, as tests have one.

    Raises:
        CellExecutionError: a cell has failed.
    """
    notebook, start_s = nbformat.read(path, as_version=4), time.perf_counter()
    # As in an activated environment: `dlrm` is the one beside this Python.
    environment = os.environ | {"PATH": f"{commands or Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    client = NotebookClient(
        notebook,
        timeout=600,
        kernel_name="python3",
        resources={"metadata": {"path": str(folder)}},
        coalesce_streams=True,  # else each piece that a program writes is an output of its own
    )
    client.execute(env=environment)
    notebook.metadata["is_warm"] = commands is not None
    notebook.metadata["seconds"], notebook.metadata["processor"] = time.perf_counter() - start_s, processor_name()
    kept = EXECUTED / path.relative_to(DOCS)
    kept.parent.mkdir(parents=True, exist_ok=True)
    nbformat.write(notebook, kept)
    return notebook


def main() -> None:
    """Execute those that have changed since they were executed."""
    for path in notebooks():
        if executed(path) is None:
            sys.stdout.write(f"execute {path.relative_to(ROOT)}\n")
            sys.stdout.flush()
            with tempfile.TemporaryDirectory() as folder:
                execute(path, Path(folder))


if __name__ == "__main__":
    main()
