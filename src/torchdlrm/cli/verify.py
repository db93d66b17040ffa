"""`dlrm verify`: do checkpoint, bundle and server predict the same from the same raw rows?"""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from cyclopts import Parameter

from torchdlrm.cli.options import refuse_mistyped
from torchdlrm.cli.terminal import (
    Flag,
    Json,
    Positive,
    print_json,
    print_table,
    progress_bars,
    say,
    say_undefined,
)
from torchdlrm.errors import SkewError
from torchdlrm.folders import expect
from torchdlrm.units import show_number

if TYPE_CHECKING:
    from torchdlrm.exporting.verify import PredictionPath, Verification


def verify(
    bundle: Path,
    *rows: Annotated[Path, Parameter(allow_leading_hyphen=True)],
    dataset: Path,
    run: Path | None = None,
    url: str | None = None,
    model_class: str | None = None,
    allow_changed_model_class: Flag = False,
    max_rows: Annotated[Positive, Parameter(name="--rows")] = 10_000,
    log_format: Annotated[Literal["log", "csv", "tsv"], Parameter(name="--format")] = "log",
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
        model_class: The model class that the bundle was made with, FILE.py:NAME or MODULE:NAME; only where it is
            not the DLRM.
        allow_changed_model_class: Take the model class though its file has changed since.
        max_rows: Most rows to predict.
        log_format: How text is written: as the model's schema says (log); with commas, quotes and a header (csv); with
            tabs (tsv).
        as_json: Print one JSON object on standard output.
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
            model_class=model_class,
            allow_changed_model_class=allow_changed_model_class,
            max_rows=max_rows,
            log_format=log_format,
            progress=progress,
        )
    source = found.bundle.manifest.source
    best = ", the best of the val split" if source.checkpoint == "best" else ""
    say(f"checkpoint: {found.run.path} at step {source.step:,}{best}")
    _print_table(found, ", ".join(map(str, found.log)))
    if as_json:
        about = {"bundle": str(bundle), "version": found.bundle.version}
        print_json({**about, "step": source.step, "checkpoint": source.checkpoint, **found.as_dict()})
    for before, path in zip(found.paths, found.paths[1:], strict=False):
        if path.problem is not None:
            msg = f"{path.name} and {before.name} do not predict the same: {path.problem}"
            raise SkewError(msg)


def _print_table(found: "Verification", log: str) -> None:
    from torchdlrm.metrics import metrics_in

    def number(path: "PredictionPath", value: float) -> str:
        return "" if path.allowed is None else f"{value:.2g}"

    bad = f", {found.bad_rows:,} bad ones left out" if found.bad_rows else ""
    rows = [
        {
            "by": path.name,
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
        for path in found.paths
    ]
    print_table(f"{found.rows:,} rows of {log}{bad}", rows, droppable=["median"])
    if found.paths[0].metrics is not None:
        say_undefined(found.paths[0].metrics.as_dict())
