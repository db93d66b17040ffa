"""`dlrm export`: a run -> a bundle, one folder that predicts from raw rows."""

from pathlib import Path
from typing import Annotated, Literal

from cyclopts import Parameter
from cyclopts.validators import Number

from torchdlrm.cli.terminal import console, print_json, progress_bars

Precision = Literal["float32", "float16", "int8", "int4"]


def export(
    run: Path,
    *,
    out: Path,
    precision: Precision = "float32",
    checkpoint: str = "last",
    dataset: Path | None = None,
    name: str | None = None,
    check_rows: Annotated[int, Parameter(validator=Number(gte=1))] = 100_000,
    json: bool = False,
) -> None:
    """Turn a trained run into a bundle, and check that it predicts what the checkpoint predicts.

    Parameters
    ----------
    run
        Folder written by `dlrm train`.
    out
        Folder to write; nothing may be there.
    precision
        Of the tables.
    checkpoint
        last, best (the highest AUC of the val split), or a step.
    dataset
        Where the dataset is now, if it has moved since the training.
    name
        Name of the model, shown by the server; the folder's name by default.
    check_rows
        Predict at most so many held-out rows by checkpoint and by bundle.
    json
        Print one JSON object on standard output.
    """
    from torchdlrm.export.export import ExportOptions
    from torchdlrm.export.export import export as export_run
    from torchdlrm.train.run import Run

    trained = Run.open(run)
    data = trained.open_dataset(dataset)
    options = ExportOptions(
        name=name or out.name,
        precisions=dict.fromkeys(data.sparse_names, precision),
        checkpoint=checkpoint,
        check_rows=check_rows,
    )
    with progress_bars("") as progress:
        bundle = export_run(trained, data, out, options, progress)
    console.print(bundle.manifest.check)
    if json:
        print_json({"bundle": str(out), "name": bundle.name, "version": bundle.version})
