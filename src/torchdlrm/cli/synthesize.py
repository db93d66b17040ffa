"""`dlrm synthesize`: write a click log whose true click probabilities are known."""

import time
from pathlib import Path
from typing import Annotated, Literal

from cyclopts import Parameter
from rich.table import Table

from torchdlrm.cli.terminal import Json, console, print_json, progress_bars, say_next
from torchdlrm.errors import ConfigError, LogError
from torchdlrm.synthetic.log import schema_path
from torchdlrm.synthetic.synthesize import day_path, late_path
from torchdlrm.synthetic.synthesize import synthesize as write_log
from torchdlrm.synthetic.truth import Attainable, SyntheticTruth, truth_path
from torchdlrm.synthetic.values import Companions, Drift


def synthesize(
    *,
    rows: int = 1_000_000,
    out: Path,
    seed: int = 0,
    preset: Literal["criteo-kaggle", "criteo-1tb"] | None = None,
    multi_hot: Annotated[bool, Parameter(negative="")] = False,
    companions: Companions | None = None,
    max_embeddings: int | None = None,
    days: int | None = None,
    drift: Drift | None = None,
    label_delay: float | None = None,
    force: Annotated[bool, Parameter(negative="")] = False,
    as_json: Json = False,
) -> None:
    """Write a click log in the Criteo layout, and a file with the AUC and logloss that can be reached on it.

    Args:
        rows: Rows to write; with --days of each day.
        out: File to write; compressed when it ends in .gz. The truth goes to the same name with .truth.json appended.
            With --days a folder: day_00.tsv and so on, the truth about each, and truth.json about all of them.
        seed: Seed; the same rows, seed and preset give the same bytes.
        preset: Which of Criteo's logs it resembles in columns and click rate; the default is criteo-kaggle, with
            --multi-hot criteo-1tb.
        multi_hot: Write as many values in a cell as MLPerf's DLRM-DCNv2 benchmark has, 214 a row, and a schema to the
            same name with .schema.toml appended.
        companions: With --multi-hot, how the values behind the first of a cell are distributed; the default is uniform.
        max_embeddings: With --multi-hot, the largest number of rows of a table that the schema asks for.
        days: Write a log for each of this number of days, on which values come and go, and popularity and effects
            drift. Days that are in the folder already, with the same options, are kept.
        drift: With --days, how much changes in a day.
        label_delay: With --days, the fraction of the clicks that are known only on the day after: 0 in day_00.tsv;
            their rows are in late_00.tsv, with a 1.
        force: Replace a file that is there; with --days all days that are in the folder.
        as_json: Print one JSON object on standard output.
    """
    if out.is_dir() and days is None:
        msg = f"--out: {out} is a folder; name a file in it"
        raise LogError(msg)
    if out.exists() and not force and days is None:
        msg = f"--out: {out} is there already; name another file, or give --force to replace it"
        raise LogError(msg)
    if companions is not None and not multi_hot:
        msg = "--companions: is for cells of several values; give --multi-hot too"
        raise ConfigError(msg)
    started_at_s = time.perf_counter()
    with progress_bars(f"synthesize {out}") as progress:
        truth = write_log(
            out,
            rows=rows,
            seed=seed,
            preset=preset or ("criteo-1tb" if multi_hot else "criteo-kaggle"),
            multi_hot=(companions or "uniform") if multi_hot else None,
            max_embeddings=max_embeddings,
            days=days,
            drift=drift,
            label_delay=label_delay,
            resume=not force,
            progress=progress,
        )
    elapsed_s = time.perf_counter() - started_at_s

    table = Table("attainable on", "rows", "click rate", "AUC", "logloss")
    for column in table.columns[1:]:
        column.justify = "right"
    parts: dict[str, SyntheticTruth | Attainable] = {"all rows": truth, **truth.splits}
    for name, part in parts.items():
        table.add_row(name, f"{part.rows:,}", f"{part.click_rate:.4f}", f"{part.auc:.4f}", f"{part.logloss:.4f}")
    console.print(table)
    logs = [out] if days is None else [day_path(out, day) for day in range(days)]
    num_bytes = sum(log.stat().st_size for log in logs)
    console.print(f"{num_bytes:,} bytes in {elapsed_s:.1f} s; truth: {truth_path(out)}", soft_wrap=True)
    schema = {"schema": str(schema_path(out))} if multi_hot else {}
    if days is None:
        option = " --schema {}" if multi_hot else ""
        say_next(f"dlrm preprocess {{}}{option} --out dataset", out, schema_path(out))
    else:
        advance = "dlrm advance live {} --config criteo-small --schema criteo-bucketed"
        say_next(f"{advance}, and then day by day", logs[0])
    if as_json:
        files = {"days": [_day(out, day, truth) for day in range(days)]} if days is not None else {}
        print_json({"log": str(out), "truth": str(truth_path(out)), **schema, **truth.as_dict(), **files})


def _day(folder: Path, day: int, truth: SyntheticTruth) -> dict[str, object]:
    log, late = day_path(folder, day), late_path(folder, day)
    late_log = {"late": str(late)} if truth.label_delay else {}
    attainable = truth.as_dict()["splits"][log.stem]
    return {"day": day, "log": str(log), "truth": str(truth_path(log)), **late_log, **attainable}
