"""`dlrm synthesize`: write a click log whose true click probabilities are known."""

import time
from pathlib import Path
from typing import Annotated, Literal

from cyclopts import Parameter
from rich.table import Table

from torchdlrm.cli.terminal import Json, console, print_json, progress_bars
from torchdlrm.data.synthetic import Attainable, SyntheticTruth, truth_path
from torchdlrm.data.synthetic import synthesize as write_log
from torchdlrm.errors import LogError


def synthesize(
    *,
    rows: int = 1_000_000,
    out: Path,
    seed: int = 0,
    preset: Literal["criteo-kaggle", "criteo-1tb"] = "criteo-kaggle",
    force: Annotated[bool, Parameter(negative="")] = False,
    as_json: Json = False,
) -> None:
    """Write a click log in the Criteo layout, and a file with the AUC and logloss that can be reached on it.

    Args:
        rows: Rows to write.
        out: File to write; compressed when it ends in .gz. The truth goes to the same name with .truth.json appended.
        seed: Seed; the same rows, seed and preset give the same bytes.
        preset: Which of Criteo's logs it resembles in columns and click rate.
        force: Replace a file that is there.
        as_json: Print one JSON object on standard output.
    """
    if out.is_dir():
        msg = f"--out: {out} is a folder; name a file in it"
        raise LogError(msg)
    if out.exists() and not force:
        msg = f"--out: {out} is there already; name another file, or give --force to replace it"
        raise LogError(msg)
    started_at_s = time.perf_counter()
    with progress_bars(f"synthesize {out}") as progress:
        truth = write_log(out, rows=rows, seed=seed, preset=preset, progress=progress)
    elapsed_s = time.perf_counter() - started_at_s

    table = Table("attainable on", "rows", "click rate", "AUC", "logloss")
    for column in table.columns[1:]:
        column.justify = "right"
    parts: dict[str, SyntheticTruth | Attainable] = {"all rows": truth, **truth.splits}
    for name, part in parts.items():
        table.add_row(name, f"{part.rows:,}", f"{part.click_rate:.4f}", f"{part.auc:.4f}", f"{part.logloss:.4f}")
    console.print(table)
    console.print(f"{out.stat().st_size:,} bytes in {elapsed_s:.1f} s; truth: {truth_path(out)}", soft_wrap=True)
    console.print(f"next: dlrm preprocess {out} --out dataset", soft_wrap=True)
    if as_json:
        print_json({"log": str(out), "truth": str(truth_path(out)), **truth.as_dict()})
