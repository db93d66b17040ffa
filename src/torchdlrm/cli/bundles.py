"""`dlrm export` and `dlrm apply`, which make bundles, and what these and `dlrm inspect` say of bundles and deltas."""

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torchdlrm.cli.datasets import buckets_as_dict, print_inputs, print_never_missing
from torchdlrm.cli.options import Flag, Json, OwnModel
from torchdlrm.cli.terminal import announce, print_json, print_table, progress_bars, say, say_next
from torchdlrm.errors import ConfigError
from torchdlrm.exporting.formats import FORMATS, FormatName, export_as
from torchdlrm.exporting.options import ExportOptions
from torchdlrm.folders import expect
from torchdlrm.units import show_bytes, show_number

if TYPE_CHECKING:
    from torchdlrm.bundle.bundle import Bundle
    from torchdlrm.bundle.check import Agreement
    from torchdlrm.bundle.delta import Delta
    from torchdlrm.exporting.sensitivity import PrecisionSearch


def export(
    run: Path,
    *,
    out: Path,
    format: FormatName = "bundle",  # noqa: A002 - the name of the option
    delta_to: Path | None = None,
    dataset: Path | None = None,
    own_model: OwnModel = OwnModel(),  # noqa: B008 - frozen, and what the parser fills
    options: ExportOptions = ExportOptions(),  # noqa: B008 - likewise
    overwrite: Flag = False,
    as_json: Json = False,
) -> None:
    """Turn a trained run into a bundle, and check that it predicts what the checkpoint predicts.

    Args:
        run: Folder written by `dlrm train`; for --format onnx and triton a bundle.
        out: Folder to write, or for --format torchrec, dlrm and onnx the file; nothing else may be there. Where it is
            this bundle already, nothing is left to do.
        format: torchrec: a state dict of torchrec.models.dlrm; dlrm: one of dlrm_s_pytorch.py; onnx: a graph of a
            bundle; triton: that graph in a model's folder of Triton's repository.
        delta_to: Write what has changed since this bundle instead of a whole one; `dlrm apply` makes the bundle of it.
            The model keeps that bundle's name unless --name says another.
        dataset: Where the dataset is now, if it has moved since the training.
        overwrite: Export also where a bundle or a delta is there; it is replaced when the new one is complete.
    """
    if format != "bundle":
        if delta_to or own_model.model_class or overwrite or options != ExportOptions(checkpoint=options.checkpoint):
            msg = f"--format {format}: reads --out, --checkpoint and --dataset alone; other options are for bundles"
            raise ConfigError(msg)
        export_as(run, out, format, checkpoint=options.checkpoint, dataset=dataset)
        say(f"{out}: {FORMATS[format].what}")
        if as_json:
            print_json({"out": str(out), "format": format})
        return
    expect("run", run)
    expect("dataset", dataset)
    expect("bundle", delta_to)
    announce(f"export {run} to {out}")

    from torchdlrm.exporting.export import export as export_run

    with progress_bars("") as progress:
        exported = export_run(
            run,
            out,
            delta_to=delta_to,
            options=options,
            dataset=dataset,
            overwrite=overwrite,
            progress=progress,
            **vars(own_model),
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


def apply(bundle: Path, delta: Path, *, out: Path, as_json: Json = False) -> None:
    """Make a bundle of another one and a delta to it: the very bytes of the whole export.

    Args:
        bundle: The bundle that it is a delta to; it stays as it is.
        delta: Folder written by `dlrm export --delta-to`.
        out: Folder to write; nothing may be there.
    """
    expect("bundle", bundle)
    expect("delta", delta)
    from torchdlrm.bundle.apply import apply_delta

    with progress_bars("") as progress:
        made = apply_delta(bundle, delta, out, progress=progress)
    say(f"applied {delta} to {bundle}: {out}, model {made.name}, version {made.version}, complete and undamaged")
    say_next("dlrm predict {0} ROWS, or dlrm serve {0}", out)
    if as_json:
        print_json(bundle_as_dict(made, None))


def show_bundle(folder: Path, *, as_json: bool) -> None:
    """Print what a bundle holds, after checking all of it."""
    from torchdlrm.bundle.bundle import Bundle
    from torchdlrm.model import table_weight

    bundle = Bundle.open(folder)
    if as_json:
        print_json({"kind": "bundle"} | bundle_as_dict(bundle, None))
        return
    manifest, source = bundle.manifest, bundle.manifest.source
    best = ", the best of the val split" if source.checkpoint == "best" else ""
    say(
        f"bundle {folder}, model {bundle.name}, version {bundle.version}: complete and undamaged; from run "
        f"{source.run}, step {source.step:,}{best}; schema {bundle.schema.name}"
    )
    hashed = {column.name for column in bundle.schema.sparse if column.hash is not None}
    rows = []
    for column in bundle.schema.sparse:
        name, record = column.name, manifest.sparse[column.name]
        mine = [*{table.table_key: table for table in manifest.tables if table.feature == name}.values()]  # each once
        spans = [bundle.weights.span(table_weight(table.table_key)) for table in mine]
        known = "yes" if record.vocabulary is not None else "hashed" if name in hashed else "ids as they are"
        rows.append(
            {
                "feature": name,
                "table rows": " and ".join(f"{table.rows:,}" for table in mine)
                if column.table is None
                else f"as {column.table}",
                "dim": str(mine[0].dim),
                "precision": record.precision,
                "bytes": "-" if column.table is not None else show_bytes(sum(end - start for start, end in spans)),
                "vocabulary": known,
            }
        )
    print_table("", rows)
    print_inputs(bundle.schema, bundle.dense)
    model = manifest.model
    sizes = (max(1, len(bundle.schema.dense)), *model.dense_arch_layer_sizes), model.over_arch_layer_sizes
    layers = " and ".join("-".join(map(str, arch)) for arch in sizes)
    interaction = f", interaction {model.interaction_text}"
    say(
        f"arches {layers}, dimension {model.embedding_dim}{'' if manifest.model_class else interaction}; products in "
        f"{manifest.dense_precision}"
    )
    if manifest.model_class is not None:
        say(f"model class {manifest.model_class.name}: --model-class of whatever predicts")
    labels = [column.name for column in bundle.schema.labels]
    if len(labels) > 1:
        learnt = " and ".join(label.name for label in bundle.schema.learnt)
        say(f"label {learnt}, of {', '.join(labels)}")
    print_check(bundle)


def bundle_as_dict(bundle: "Bundle", search: "PrecisionSearch | None") -> dict[str, Any]:
    """Return what the manifest says, for JSON."""
    content = bundle.manifest.model_dump(
        mode="json", exclude={"files", "block_sha256", "block_bytes", "feature_schema"}
    )
    about: dict[str, Any] = {"path": str(bundle.path), "version": bundle.version, "schema": bundle.schema.name}
    about["buckets"] = buckets_as_dict(bundle.schema)
    about["size_bytes"] = sum(record.size_bytes for record in bundle.manifest.files.values())
    return about | content | ({} if search is None else {"precision_search": asdict(search)})


def print_check(bundle: "Bundle", agreement: "Agreement | None" = None) -> None:
    """Print how the bundle's predictions compare with the checkpoint's; of an export with what is not recorded."""
    from torchdlrm.metrics import METRICS

    check = bundle.manifest.check
    if check is None:
        return
    rows = [
        {"": f"{what}{label and f', {label}'}", **{METRICS[name].label: show_number(x, 6) for name, x in metrics}}
        for label, of in {bundle.schema.first_of_several: check, **check.labels}.items()
        for what, metrics in (("checkpoint", of.checkpoint), ("bundle", of.bundle))
    ]
    print_table(f"{check.rows:,} rows of {check.split}", rows)
    if check.checkpoint.auc is None:
        say("AUC is undefined: it needs rows of both labels")
    say(
        f"largest difference of two probabilities: {check.largest_difference:.2g} (the precision explains "
        f"{check.largest_allowed:.2g})"
    )
    if agreement is not None:
        say(
            f"relative to the probability: {agreement.largest_relative:.2g}, in half of the rows less than "
            f"{agreement.median_relative:.2g}; {agreement.distinct:,} different probabilities, the checkpoint has "
            f"{agreement.distinct_before:,}"
        )
    for label, recalibration in bundle.manifest.recalibrations.items():
        whose = f"{label}, " if check.labels else ""
        say(f"recalibrated after that, {whose}{recalibration}: {recalibration.verdict}")


def print_precision_search(search: "PrecisionSearch") -> None:
    """Print what each table costs and saves at each precision, and what was chosen."""
    rows = [
        {
            "feature": name,
            "table rows": f"{choice.num_embeddings:,}",
            "float32": show_bytes(choice.size_bytes["float32"]),
            **{precision: f"{1e6 * cost:.2f}" for precision, cost in list(choice.logloss_increase.items())[1:]},
            "chosen": choice.chosen,
            "bytes": show_bytes(choice.size_bytes[choice.chosen]),
        }
        for name, choice in search.tables.items()
    ]
    print_table(f"logloss increase expected of each table alone, on {search.rows:,} rows, in millionths", rows)
    before = sum(choice.size_bytes["float32"] for choice in search.tables.values())
    after = sum(choice.size_bytes[choice.chosen] for choice in search.tables.values())
    measured = search.measured_increase
    say(
        f"tables: {show_bytes(before)} -> {show_bytes(after)}; logloss increase {search.expected_increase:.2g} "
        f"expected, {measured.mean:.2g} (standard error {measured.standard_error:.1g}) measured,"
        f" {search.max_logloss_increase:.2g} allowed"
    )


def show_delta(folder: Path, *, as_json: bool) -> None:
    """Print what a delta changes, after checking all of it."""
    from torchdlrm.bundle.delta import Delta

    delta = Delta.open(folder)
    if as_json:
        print_json({"kind": "delta"} | delta_as_dict(delta))
        return
    print_delta(delta)


def print_delta(delta: "Delta") -> None:
    """Print between which bundles a delta is, and what of each table and file it holds."""
    about = delta_as_dict(delta)
    say(
        f"delta {delta.path}, model {delta.manifest.name}: complete and undamaged; from version "
        f"{delta.manifest.base.version} to {delta.manifest.result.version}; {show_bytes(about['size_bytes'])} of "
        f"{show_bytes(delta.manifest.result.size_bytes)} ({about['size_bytes'] / delta.manifest.result.size_bytes:.1%})"
    )
    rows = [
        {
            "table": name,
            "rows": f"{table['rows']:,}",
            "changed": f"{table['changed_rows']:,}",
            "new": f"{table['new_rows']:,}",
            "bytes": show_bytes(table["size_bytes"]),
        }
        for name, table in about["tables"].items()
    ]
    print_table("", rows)
    files = [
        {"file": name, "how": file["how"], "bytes": show_bytes(file["size_bytes"])}
        for name, file in about["files"].items()
        if file["how"] != "base"
    ]
    print_table("files that changed", files, left_aligned=("how",))


def delta_as_dict(delta: "Delta") -> dict[str, Any]:
    """Return what a delta changes, for JSON; `new_rows` are not counted among `changed_rows`."""
    manifest = delta.manifest
    tables = {
        recipe.table.split(".")[-2].removeprefix("t_"): {
            "rows": recipe.num_rows,
            "changed_rows": sum(recipe.changed_rows) - (recipe.num_rows - recipe.base_rows),
            "new_rows": recipe.num_rows - recipe.base_rows,
            "size_bytes": recipe.size_bytes,
        }
        for recipe in manifest.weights.tables
    }
    files = {
        name: {"how": recipe.how, "size_bytes": recipe.file.size_bytes if recipe.file is not None else 0}
        for name, recipe in manifest.files.items()
    }
    return {
        "path": str(delta.path),
        "name": manifest.name,
        "base": manifest.base.model_dump(mode="json"),
        "result": manifest.result.model_dump(mode="json"),
        "size_bytes": delta.size_bytes,
        "tables": tables,
        "files": files,
    }
