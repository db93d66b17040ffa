"""`dlrm predict`: a bundle and raw rows -> click probabilities, a row out for each row in."""

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from cyclopts import Parameter
from cyclopts.validators import Number
from rich.table import Table

from torchdlrm.cli.options import refuse_mistyped
from torchdlrm.cli.terminal import (
    Flag,
    Json,
    announce,
    console,
    metric_cells,
    print_json,
    progress_bars,
    say,
    say_undefined,
)
from torchdlrm.errors import Interrupted, UserError
from torchdlrm.folders import expect, kind_of
from torchdlrm.logs.find import find_files

if TYPE_CHECKING:
    from torchdlrm.prediction.files import PredictSummary
    from torchdlrm.prediction.log_columns import Kept

Hyphen = Parameter(allow_leading_hyphen=True)  # a lone one is standard input or output


def predict(
    bundle: Path,
    rows: Annotated[list[Path], Hyphen],
    *,
    out: Annotated[Path, Hyphen] = Path("-"),
    columns: str | None = None,
    bad_rows: Literal["refuse", "null"] = "refuse",
    log_format: Annotated[Literal["log", "csv", "tsv"], Parameter(name="--format")] = "log",
    verify: Literal["full", "lazy"] = "full",
    model_class: str | None = None,
    allow_changed_model_class: Flag = False,
    num_threads: Annotated[int | None, Parameter(validator=Number(gte=1))] = None,
    as_json: Json = False,
) -> None:
    """Predict the probability of a click of every row of a log: a row out for each row in, in order.

    The log is text, JSON Lines, Parquet or ORC, with labels or without; with them, the metrics of the predictions are
    shown. Text without a header has the columns of the model's schema, in their order, with or without the label.

    Args:
        bundle: Folder written by `dlrm export`.
        rows: Files of raw rows, or - for standard input.
        out: File to write, .parquet, .csv or .csv.gz; - is CSV on standard output.
        columns: Columns of the log to write before `prediction`, with commas between, as in label,cat_3; by the log's
            name or the schema's. By default those that name a row, so that scores can be joined: times, what the
            schema ignores, and ids by their name (user_id); all or none of the columns with these words.
        bad_rows: A row that cannot be read stops everything (refuse), or has no prediction (null).
        log_format: How text is written: as the model's schema says (log); with commas, quotes and a header (csv); with
            tabs (tsv).
        verify: Check every byte of the bundle before anything else (full), or its tables when they are used (lazy).
        model_class: The model class that the bundle was made with, FILE.py:NAME or MODULE:NAME; only where it is
            not the DLRM.
        allow_changed_model_class: Take the model class though its file has changed since.
        num_threads: Threads of the model; by default one a core.
        as_json: Print one JSON object on standard output.
    """
    refuse_mistyped(rows, "predict")
    if as_json and out == Path("-"):
        raise UserError("--json: standard output takes either the JSON object or the scores; write these to --out FILE")
    if kind_of(bundle) is None and len(rows) == 1 and kind_of(rows[0]) is not None:
        msg = f"{bundle}: the bundle comes first: dlrm predict {shlex.quote(str(rows[0]))} {shlex.quote(str(bundle))}"
        raise UserError(msg)
    expect("bundle", bundle)
    if not any(path == Path("-") or path.is_fifo() for path in rows):
        find_files(rows)  # refuses here what would be refused when torch is loaded
    announce(f"predict by {bundle}")

    from torchdlrm.prediction.files import predict_file
    from torchdlrm.prediction.predictor import Predictor
    from torchdlrm.prediction.rows_in import RowsIn

    try:
        with progress_bars("") as progress:
            predictor = Predictor.open(
                bundle,
                model_class=model_class,
                allow_changed_model_class=allow_changed_model_class,
                verify=verify,
                num_threads=num_threads,
                progress=progress,
            )
            kept: Kept = "keys" if columns is None else "all" if columns == "all" else "none"
            asked = [] if columns in {None, "all", "none"} else (columns or "").split(",")
            names = [name.strip() for name in asked if name.strip()]
            log = RowsIn(rows, predictor.schema, log_format, names, kept)
            summary = predict_file(predictor, log, out, bad_rows=bad_rows, progress=progress)
    except KeyboardInterrupt as interrupt:
        done = "" if out == Path("-") else f": nothing was written to {out}"
        raise Interrupted("interrupted" + done) from interrupt
    _print_summary(summary, out)
    if as_json:
        print_json({"bundle": str(bundle), "version": predictor.bundle.version, "out": str(out), **summary.as_dict()})


def _print_summary(summary: "PredictSummary", out: Path) -> None:
    table = Table(title="" if out == Path("-") else str(out), title_justify="left", show_header=False)
    cells = {"rows": f"{summary.rows:,}", "bad rows": f"{summary.bad_rows:,}", "rows/s": f"{summary.rows_per_s:,.0f}"}
    if summary.mean_prediction is not None:
        cells["mean prediction"] = f"{summary.mean_prediction:.5f}"
    if summary.metrics is not None:
        cells |= metric_cells(summary.metrics.as_dict())
    table.add_column()
    table.add_column(justify="right")
    for cell in cells.items():
        table.add_row(*cell)
    console.print(table)
    if summary.metrics is not None:
        say_undefined(summary.metrics.as_dict())
    if summary.num_never_missing:
        missing = ", ".join(f"{name} (in {count:,} rows)" for name, count in summary.num_never_missing.items())
        say(f"missing here, and never missing in training, so the mean stands for it: {missing}")
    for line in summary.described_bad_rows():
        say(line)
