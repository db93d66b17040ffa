"""How `dlrm inspect` shows a bundle, and `dlrm export` what it has made."""

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.box import SIMPLE_HEAD
from rich.table import Table

from torchdlrm.cli.terminal import console, print_json, shown_metric
from torchdlrm.units import show_bytes

if TYPE_CHECKING:
    from torchdlrm.bundle.bundle import Bundle
    from torchdlrm.exporting.sensitivity import PrecisionSearch


def show(folder: Path, *, num_values: int, as_json: bool) -> None:  # noqa: ARG001 - a bundle has no values to show
    """Print what a bundle holds, after checking all of it.

    Raises:
        BundleError: it is damaged.
    """
    from torchdlrm.bundle.bundle import Bundle

    bundle = Bundle.open(folder)
    if as_json:
        print_json({"kind": "bundle"} | summary(bundle, None))
        return
    manifest = bundle.manifest
    source = manifest.source
    best = ", the best of the val split" if source.checkpoint == "best" else ""
    console.print(
        f"bundle {folder}, model {bundle.name}, version {bundle.version}: whole and undamaged; from run {source.run}, "
        f"step {source.step:,}{best}; schema {bundle.schema.name}",
        soft_wrap=True,
    )
    hashed = {column.name for column in bundle.schema.sparse if column.hash is not None}
    table = Table("feature", box=SIMPLE_HEAD, pad_edge=False)
    for title in ("table rows", "precision", "bytes", "vocabulary"):
        table.add_column(title, justify="right")
    for name, record in manifest.sparse.items():
        size_bytes = _table_bytes(bundle, name)
        known = "yes" if record.vocabulary is not None else "hashed" if name in hashed else "ids as they are"
        table.add_row(name, f"{record.num_embeddings:,}", record.precision, show_bytes(size_bytes), known)
    console.print(table)
    layers = " and ".join("-".join(map(str, sizes)) for sizes in _layers(bundle))
    console.print(f"arches {layers}, dimension {manifest.model.embedding_dim}; products in {manifest.dense_precision}")
    print_check(bundle)


def print_check(bundle: "Bundle") -> None:
    """Print how the bundle's predictions compare with the checkpoint's."""
    check = bundle.manifest.check
    if check is None:
        return
    table = Table(title=f"{check.rows:,} rows of {check.split}", title_justify="left", box=SIMPLE_HEAD, pad_edge=False)
    for title in ("", "AUC", "logloss"):
        table.add_column(title, justify="right" if title else "left")
    for name, judged in (("checkpoint", check.checkpoint), ("bundle", check.bundle)):
        table.add_row(name, shown_metric(judged.auc, 6), shown_metric(judged.logloss, 6))
    console.print(table)
    if check.checkpoint.auc is None:
        console.print("AUC is undefined: it needs rows of both labels")
    console.print(
        f"largest difference of two probabilities: {check.largest_difference:.2g} (the precision explains "
        f"{check.largest_allowed:.2g})",
        soft_wrap=True,
    )


def print_trade(trade: "PrecisionSearch") -> None:
    """Print what each table costs and saves at each precision, and what was chosen."""
    title = f"logloss increase expected of each table alone, on {trade.rows:,} rows, in millionths"
    table = Table("feature", title=title, title_justify="left", box=SIMPLE_HEAD, pad_edge=False)
    for column in ("table rows", "float32", "float16", "int8", "int4", "chosen", "bytes"):
        table.add_column(column, justify="right")
    for name, row in trade.tables.items():
        costs = [f"{1e6 * cost:.2f}" for precision, cost in row.logloss_increase.items() if precision != "float32"]
        sizes = show_bytes(row.size_bytes["float32"]), show_bytes(row.size_bytes[row.chosen])
        table.add_row(name, f"{row.num_embeddings:,}", sizes[0], *costs, row.chosen, sizes[1])
    console.print(table)
    before, after = (
        sum(row.size_bytes[precision or row.chosen] for row in trade.tables.values()) for precision in ("float32", None)
    )
    console.print(
        f"tables: {show_bytes(before)} -> {show_bytes(after)}; logloss increase {trade.expected_increase:.2g} expected,"
        f" {trade.measured_increase.mean:.2g} (standard error {trade.measured_increase.standard_error:.1g}) measured,"
        f" {trade.max_logloss_increase:.2g} allowed",
        soft_wrap=True,
    )


def summary(bundle: "Bundle", trade: "PrecisionSearch | None") -> dict[str, Any]:
    """For JSON."""
    content = bundle.manifest.model_dump(
        mode="json", exclude={"files", "block_sha256", "block_bytes", "feature_schema"}
    )
    about: dict[str, Any] = {"path": str(bundle.path), "version": bundle.version, "schema": bundle.schema.name}
    about["size_bytes"] = sum(record.size_bytes for record in bundle.manifest.files.values())
    return about | content | ({} if trade is None else {"trade": asdict(trade)})


def _table_bytes(bundle: "Bundle", feature: str) -> int:
    from torchdlrm.bundle.bundle import table_name

    start, end = bundle.weights.span(table_name(feature))
    return end - start


def _layers(bundle: "Bundle") -> tuple[tuple[int, ...], tuple[int, ...]]:
    model = bundle.manifest.model
    return (max(1, len(bundle.schema.dense)), *model.dense_arch_layer_sizes), model.over_arch_layer_sizes
