"""`dlrm export`: a run -> a bundle, one folder that predicts from raw rows."""

from dataclasses import asdict
from pathlib import Path

from torchdlrm.cli.terminal import Flag, Json, announce, print_json, progress_bars, say, say_next
from torchdlrm.exporting.options import ExportOptions
from torchdlrm.folders import expect


def export(
    run: Path,
    *,
    out: Path,
    delta_to: Path | None = None,
    dataset: Path | None = None,
    model_class: str | None = None,
    allow_changed_model_class: Flag = False,
    options: ExportOptions = ExportOptions(),  # noqa: B008 - frozen, and what the parser fills
    overwrite: Flag = False,
    as_json: Json = False,
) -> None:
    """Turn a trained run into a bundle, and check that it predicts what the checkpoint predicts.

    Args:
        run: Folder written by `dlrm train`.
        out: Folder to write; nothing else may be there. Where it is this bundle already, nothing is left to do.
        delta_to: Write what has changed since this bundle instead of a whole one; `dlrm apply` makes the bundle of it.
            The model keeps that bundle's name unless --name says another.
        dataset: Where the dataset is now, if it has moved since the training.
        model_class: The model class that the run was trained with, FILE.py:NAME or MODULE:NAME; only where it is not
            the DLRM.
        allow_changed_model_class: Take the model class though its file has changed since.
        options: of the export.
        overwrite: Export also where a bundle or a delta is there; it is replaced when the new one is complete.
        as_json: Print one JSON object on standard output.
    """
    expect("run", run)
    expect("dataset", dataset)
    expect("bundle", delta_to)
    announce(f"export {run} to {out}")

    from torchdlrm.cli.bundles import bundle_as_dict, delta_as_dict, print_check, print_delta, print_precision_search
    from torchdlrm.cli.datasets import print_never_missing
    from torchdlrm.exporting.export import export as export_run

    with progress_bars("") as progress:
        exported = export_run(
            run,
            out,
            delta_to=delta_to,
            options=options,
            dataset=dataset,
            model_class=model_class,
            allow_changed_model_class=allow_changed_model_class,
            overwrite=overwrite,
            progress=progress,
        )
    bundle = exported.bundle
    if exported.was_complete:
        say(f"{out} is complete, of {run} at {exported.checkpoint}: nothing was left to do")
    else:
        say(f"exported {run} at {exported.checkpoint} to {out}")
    if exported.search is not None:
        print_precision_search(exported.search)
    print_check(bundle, exported.agreement)
    print_never_missing(bundle.dense)
    say(f"matrix products: {bundle.manifest.dense_precision} ({exported.dense_reason})")
    about = bundle_as_dict(bundle, exported.search)
    if exported.agreement is not None:
        about["agreement"] = asdict(exported.agreement)
    if exported.delta is not None:
        print_delta(exported.delta)
        say_next("dlrm apply {} {} --out BUNDLE", delta_to, out)
        about |= {"path": str(out), "delta": delta_as_dict(exported.delta)}
    else:
        say_next("dlrm predict {0} ROWS, or dlrm serve {0}", out)
    if as_json:
        print_json(about)
