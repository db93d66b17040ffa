"""`dlrm export`: a run -> a bundle, one folder that predicts from raw rows."""

from pathlib import Path
from typing import Annotated, Literal

from cyclopts import Parameter
from cyclopts.validators import Number

from torchdlrm.cli.terminal import Json, announce, print_json, progress_bars, say


def export(
    run: Path,
    *,
    out: Path,
    precision: Literal["float32", "float16", "int8", "int4", "auto"] = "float32",
    dense_precision: Literal["float32", "bfloat16", "auto"] = "auto",
    max_logloss_increase: Annotated[float | None, Parameter(validator=Number(gte=0))] = None,
    checkpoint: str = "best",
    dataset: Path | None = None,
    model_class: str | None = None,
    name: str | None = None,
    check_rows: Annotated[int, Parameter(validator=Number(gte=1))] = 100_000,
    as_json: Json = False,
) -> None:
    """Turn a trained run into a bundle, and check that it predicts what the checkpoint predicts.

    Args:
        run: Folder written by `dlrm train`.
        out: Folder to write; nothing may be there.
        precision: Of the tables; auto measures what each table would cost at each precision, and chooses.
        dense_precision: Of the matrix products; auto takes bfloat16 where the tables are not float32 and the model is
            large enough.
        max_logloss_increase: What a lower precision may cost in nats, in the choice of auto (0.0001 when not given) and
            in the check at the end (when not given: what the precision usually explains).
        checkpoint: best (the highest AUC of the val split; the last where nothing was validated), last, or a step.
        dataset: Where the dataset is now, if it has moved since the training.
        model_class: The model class that the run was trained with, FILE.py:NAME or MODULE:NAME; only where it is not
            the DLRM.
        name: Name of the model, shown by the server; the folder's name when not given.
        check_rows: Predict at most so many held-out rows by checkpoint and by bundle.
        as_json: Print one JSON object on standard output.
    """
    announce(f"export {run} to {out}")

    from torchdlrm.cli.inspect import bundle_as_dict, print_check, print_precision_search
    from torchdlrm.exporting.export import ExportOptions
    from torchdlrm.exporting.export import export as export_run
    from torchdlrm.training.run import Run

    trained = Run.open(run)
    data = trained.open_dataset(dataset)
    options = ExportOptions(
        name=name or out.resolve().name,
        precision=precision,
        dense_precision=dense_precision,
        max_logloss_increase=max_logloss_increase,
        checkpoint=checkpoint,
        check_rows=check_rows,
        model_class=model_class,
    )
    with progress_bars("") as progress:
        exported = export_run(trained, data, out, options, progress)
    bundle = exported.bundle
    say(f"exported {run} at {exported.checkpoint} to {out}")
    if exported.trade is not None:
        print_precision_search(exported.trade)
    print_check(bundle)
    say(f"matrix products: {bundle.manifest.dense_precision} ({exported.dense_reason})")
    say(f"next: dlrm predict {out} ROWS, or dlrm serve {out}")
    if as_json:
        print_json(bundle_as_dict(bundle, exported.trade))
