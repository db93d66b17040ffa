"""`dlrm predict`: a bundle and raw rows -> click probabilities; `dlrm verify`: does all that predicts agree?"""

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from cyclopts import Parameter

from torchdlrm.cli.options import Json, OwnModel, Positive, TextFormat, refuse_mistyped
from torchdlrm.cli.terminal import (
    announce,
    metric_cells,
    print_json,
    print_table,
    progress_bars,
    say,
    say_facts,
    say_undefined,
    saying_at_ctrl_c,
)
from torchdlrm.errors import SkewError, UserError
from torchdlrm.folders import expect, kind_of
from torchdlrm.logs.find import find_files
from torchdlrm.prediction.scores_out import check_name
from torchdlrm.units import show_number

if TYPE_CHECKING:
    from torchdlrm.exporting.verify import PredictionPath, Verification
    from torchdlrm.prediction.files import PredictSummary
    from torchdlrm.prediction.rows_in import Kept

Hyphen = Parameter(allow_leading_hyphen=True)  # a lone one is standard input or output


def predict(
    bundle: Path,
    rows: Annotated[list[Path], Hyphen],
    *,
    out: Annotated[Path, Hyphen] = Path("-"),
    columns: str | None = None,
    bad_rows: Literal["refuse", "null"] = "refuse",
    log_format: TextFormat = "log",
    verify: Literal["full", "lazy"] = "full",
    own_model: OwnModel = OwnModel(),  # noqa: B008 - frozen, and what the parser fills
    num_threads: Positive | None = None,
    cluster: str | None = None,
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
        verify: Check every byte of the bundle before anything else (full), or its tables when they are used (lazy).
        num_threads: Threads of the model; by default one a core.
        cluster: Address of a Dask scheduler whose workers predict a file of the log each; they see the same files, or
            the same bucket. Interrupted, the same command goes on.
    """
    refuse_mistyped(rows, "predict")
    if as_json and out == Path("-"):
        raise UserError("--json: standard output takes either the JSON object or the scores; write these to --out FILE")
    if kind_of(bundle) is None and len(rows) == 1 and kind_of(rows[0]) is not None:
        msg = f"{bundle}: the bundle comes first: dlrm predict {shlex.quote(str(rows[0]))} {shlex.quote(str(bundle))}"
        raise UserError(msg)
    expect("bundle", bundle)
    check_name(out)  # refuses here what would be refused when torch is loaded
    if not any(path == Path("-") or path.is_fifo() for path in rows):
        find_files(rows)
    announce(f"predict by {bundle}")

    from torchdlrm.jobs.work_folder import work_folder
    from torchdlrm.prediction.files import predict_file
    from torchdlrm.prediction.predictor import Predictor
    from torchdlrm.prediction.rows_in import RowsIn

    nothing = "" if out == Path("-") else f": nothing was written to {out}"
    if cluster is not None:
        nothing = f": what is done is kept in {work_folder(out)}; the same command goes on"
    with saying_at_ctrl_c(f"interrupted{nothing}"), progress_bars("") as progress:
        predictor = Predictor.open(bundle, verify=verify, num_threads=num_threads, progress=progress, **vars(own_model))
        kept: Kept = "keys" if columns is None else "all" if columns == "all" else "none"
        asked = [] if columns in {None, "all", "none"} else (columns or "").split(",")
        names = [name.strip() for name in asked if name.strip()]
        log = RowsIn(rows, predictor.schema, log_format, names, kept)
        own = vars(own_model)
        summary = predict_file(
            predictor, log, out, bad_rows=bad_rows, cluster=cluster, own_model=own, progress=progress
        )
    _print_summary(summary, predictor.schema.first_of_several, out)
    if as_json:
        print_json({"bundle": str(bundle), "version": predictor.bundle.version, "out": str(out), **summary.as_dict()})


def _print_summary(summary: "PredictSummary", first: str, out: Path) -> None:
    cells = {"rows": f"{summary.rows:,}", "bad rows": f"{summary.bad_rows:,}", "rows/s": f"{summary.rows_per_s:,.0f}"}
    if summary.mean_prediction is not None:
        cells[f"mean prediction{first and f', {first}'}"] = f"{summary.mean_prediction:.5f}"
    judged = {} if summary.metrics is None else {first: summary.metrics, **summary.labels}
    cells |= metric_cells(judged.pop("").as_dict()) if "" in judged else {}
    say_facts("" if out == Path("-") else str(out), cells)
    if summary.metrics is not None:
        say_undefined(summary.metrics.as_dict())
    for label, metrics in judged.items():
        say_facts(label, metric_cells(metrics.as_dict()))
    if summary.num_never_missing:
        missing = ", ".join(f"{name} (in {count:,} rows)" for name, count in summary.num_never_missing.items())
        say(f"missing here, and never missing in training, so the mean stands for it: {missing}")
    for line in summary.described_bad_rows():
        say(line)


def verify(
    bundle: Path,
    *rows: Annotated[Path, Hyphen],
    dataset: Path,
    run: Path | None = None,
    url: str | None = None,
    own_model: OwnModel = OwnModel(),  # noqa: B008 - likewise
    max_rows: Annotated[Positive, Parameter(name="--rows")] = 10_000,
    log_format: TextFormat = "log",
    as_json: Json = False,
) -> None:
    """Predict the same raw rows by preprocessing and checkpoint, by the bundle and by a live server, and compare.

    Fails (exit code 1) where two of them differ by more than the bundle's precision explains.

    Args:
        bundle: Folder written by `dlrm export`.
        rows: Files of raw rows; by default the log that the dataset was made of, if it is still next to it or here.
        dataset: The dataset that the run was trained on.
        run: The run that the bundle was made of; by default looked for by its name next to the bundle and the dataset.
        url: Address of a server of the bundle, as in http://localhost:8080; a key is taken from DLRM_API_KEY.
        max_rows: Most rows to predict.
    """
    refuse_mistyped(rows, "verify")
    expect("bundle", bundle)
    expect("dataset", dataset)
    expect("run", run)
    from torchdlrm.exporting.verify import verify as verify_bundle

    with progress_bars("") as progress:
        found = verify_bundle(
            bundle,
            dataset,
            rows,
            run=run,
            url=url,
            max_rows=max_rows,
            log_format=log_format,
            progress=progress,
            **vars(own_model),
        )
    source = found.bundle.manifest.source
    best = ", the best of the val split" if source.checkpoint == "best" else ""
    say(f"checkpoint: {found.run.path} at step {source.step:,}{best}")
    _print_paths(found, ", ".join(map(str, found.log)))
    if as_json:
        about = {"bundle": str(bundle), "version": found.bundle.version}
        print_json({**about, "step": source.step, "checkpoint": source.checkpoint, **found.as_dict()})
    for before, path in zip(found.paths, found.paths[1:], strict=False):
        if path.problem is not None:
            msg = f"{path.name} and {before.name} do not predict the same: {path.problem}"
            raise SkewError(msg)


def _print_paths(found: "Verification", log: str) -> None:
    from torchdlrm.metrics import metrics_in

    def number(path: "PredictionPath", value: float) -> str:
        return "" if path.allowed is None else f"{value:.2g}"

    bad = f", {found.bad_rows:,} bad ones left out" if found.bad_rows else ""
    first = found.bundle.schema.first_of_several
    every = [(f"{path.name}{first and f', {first}'}", path) for path in found.paths]
    every += [(f"{path.name}, {label}", of) for path in found.paths for label, of in path.labels.items()]
    rows = [
        {
            "by": name,
            "difference": number(path, path.agreement.largest_difference),
            "allowed": number(path, path.allowed.difference if path.allowed else 0.0),
            "relative": number(path, path.agreement.largest_relative),
            "median": number(path, path.agreement.median_relative),
            "distinct": f"{path.agreement.distinct:,}",
            **{
                metric.label: "" if path.metrics is None else show_number(path.metrics.as_dict()[metric.name], 6)
                for metric in metrics_in("brief")
            },
        }
        for name, path in every
    ]
    print_table(f"{found.rows:,} rows of {log}{bad}", rows, droppable=["median"])
    if found.paths[0].metrics is not None:
        say_undefined(found.paths[0].metrics.as_dict())
