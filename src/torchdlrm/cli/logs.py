"""`dlrm synthesize`, `dlrm download` and `dlrm schema`: a log, and what its columns are."""

import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Literal

from cyclopts import Parameter

from torchdlrm.cli.options import Flag, Json
from torchdlrm.cli.terminal import look_at, print_json, print_table, progress_bars, say, say_next
from torchdlrm.errors import ConfigError, LogError, UserError
from torchdlrm.logs.download import SOURCES, parse_days
from torchdlrm.logs.download import download as run_download
from torchdlrm.logs.proposal.propose import SAMPLE_ROWS, propose_schema
from torchdlrm.synthetic.log import Attainable, SyntheticTruth, schema_path, truth_path
from torchdlrm.synthetic.shop import Extra
from torchdlrm.synthetic.synthesize import day_path, late_path
from torchdlrm.synthetic.synthesize import synthesize as write_log
from torchdlrm.synthetic.values import Companions, Drift


def synthesize(
    *,
    rows: int = 1_000_000,
    out: Path,
    seed: int = 0,
    preset: Literal["criteo-kaggle", "criteo-1tb"] | None = None,
    multi_hot: Flag = False,
    companions: Companions | None = None,
    max_embeddings: int | None = None,
    days: int | None = None,
    drift: Drift | None = None,
    label_delay: float | None = None,
    labels: Literal[1, 2] = 1,
    content: Flag = False,
    history: Flag = False,
    force: Flag = False,
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
        labels: 2: Write the log of a shop, where a purchase may follow a click. The schema of it, and of the next two,
            goes to the same name with .schema.toml appended.
        content: Write the log of a shop whose items have a vector each; most of those at the end of the log are new.
        history: Write the log of a shop with the items that a user looked at last, the newest last.
        force: Replace a file that is there; with --days all days that are in the folder.
    """
    if out.is_dir() and days is None:
        raise LogError(f"--out: {out} is a folder; name a file in it")
    if out.exists() and not force and days is None:
        raise LogError(f"--out: {out} is there already; name another file, or give --force to replace it")
    if companions is not None and not multi_hot:
        raise ConfigError("--companions: is for cells of several values; give --multi-hot too")
    chosen: dict[Extra, bool] = {"purchase": labels == 2, "content": content, "history": history}
    extras = [name for name, is_chosen in chosen.items() if is_chosen]
    has_schema = multi_hot or bool(extras)
    started_at_s = time.perf_counter()
    with progress_bars(f"synthesize {out}") as progress:
        truth = write_log(
            out,
            rows=rows,
            seed=seed,
            preset=preset or ("criteo-1tb" if multi_hot else None),
            multi_hot=(companions or "uniform") if multi_hot else None,
            max_embeddings=max_embeddings,
            days=days,
            drift=drift,
            label_delay=label_delay,
            extras=extras,
            resume=not force,
            progress=progress,
        )
    elapsed_s = time.perf_counter() - started_at_s
    parts: dict[str, SyntheticTruth | Attainable] = {"all rows": truth, **truth.splits}
    attainable = [
        {"attainable on": name, "rows": f"{part.rows:,}", "click rate": f"{part.click_rate:.4f}"}
        | {"AUC": f"{part.auc:.4f}", "logloss": f"{part.logloss:.4f}"}
        for name, part in parts.items()
    ]
    print_table("", attainable)
    logs = [out] if days is None else [day_path(out, day) for day in range(days)]
    say(f"{sum(log.stat().st_size for log in logs):,} bytes in {elapsed_s:.1f} s; truth: {truth_path(out)}")
    if days is None:
        option = " --schema {}" if has_schema else ""
        say_next(f"dlrm preprocess {{}}{option} --out dataset", out, schema_path(out))
    else:
        advance = "dlrm advance live {} --config criteo-small --schema criteo-bucketed"
        say_next(f"{advance}, and then day by day", logs[0])
    if as_json:
        schema = {"schema": str(schema_path(out))} if has_schema else {}
        files = {"days": [_day(out, day, truth) for day in range(days)]} if days is not None else {}
        print_json({"log": str(out), "truth": str(truth_path(out)), **schema, **truth.as_dict(), **files})


def _day(folder: Path, day: int, truth: SyntheticTruth) -> dict[str, object]:
    log, late = day_path(folder, day), late_path(folder, day)
    late_log = {"late": str(late)} if truth.label_delay else {}
    attainable = truth.as_dict()["splits"][log.stem]
    return {"day": day, "log": str(log), "truth": str(truth_path(log)), **late_log, **attainable}


def download(
    log: Literal["criteo-kaggle", "criteo-1tb"],
    *,
    out: Path,
    days: str | None = None,
    source: Annotated[str | None, Parameter(name="--from")] = None,
    at_a_time: int = 4,
    as_json: Json = False,
) -> None:
    """Fetch a public click log; a download that was cut off resumes when the same command is given again.

    Args:
        log: Which log.
        out: Folder for the files.
        days: Days of criteo-1tb, such as 0-23 or 0,5,7; all by default.
        source: Another address to fetch the files from: they are at this address followed by their names.
        at_a_time: Files to fetch at a time.
    """
    place = SOURCES[log]
    if source is not None:
        place = replace(place, base=source if source.endswith("/") else source + "/")
    if days is not None and place.days is None:
        raise ConfigError(f"--days: {log} is one file; leave the option out")
    wanted = None if days is None or place.days is None else parse_days(days, place.days)
    with progress_bars(f"download {log} from {place.base}") as progress:
        files = run_download(place, out, wanted, at_a_time=at_a_time, progress=progress)
    total = sum(file.size_bytes for file in files)
    say(f"{len(files)} files, {total:,} bytes, in {out}")
    if as_json:
        print_json({"log": log, "files": [str(file.path) for file in files], "size_bytes": total})
    elif files[0].name.endswith(".tar.gz"):
        say_next("tar -xzf {} -C {}", files[0].path, out)
    else:
        say_next("dlrm preprocess {}/* --out dataset", out)


def schema(
    log: Path,
    *,
    out: Path | None = None,
    rows: int = SAMPLE_ROWS,
    as_json: Json = False,
) -> None:
    """Propose a schema file for a log, from rows all over it, for you to edit.

    Args:
        log: A file of the log: CSV, TSV, JSON Lines, Parquet or ORC.
        out: Where to write the file; by default it is printed.
        rows: How many rows to read, about, from the beginning, the middle and the end.
    """
    if rows < 1:
        raise UserError(f"--rows: must be at least 1, got {rows}")
    if out is not None and out.exists():
        raise UserError(f"{out}: exists; choose another --out, or remove it first")
    proposal = propose_schema(log, rows)
    look_at(proposal.warnings)
    if out is not None:
        try:
            out.write_text(proposal.text, encoding="utf-8")
        except OSError as error:
            raise UserError(f"{out}: cannot be written: {error.strerror}") from error
        say(f"wrote {out} from {proposal.origin}; read and edit it")
        say_next("dlrm preprocess {} --schema {} --out dataset", log, out)
    if as_json:
        about = {"log": str(log), "out": out and str(out), "read": proposal.origin, "schema": proposal.schema}
        print_json(about | {name: value for name, value in vars(proposal).items() if name != "origin"})
    elif out is None:
        sys.stdout.write(proposal.text)
