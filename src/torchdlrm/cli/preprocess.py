"""`dlrm preprocess`: a raw click log becomes a dataset."""

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter
from rich.table import Table

from torchdlrm.cli.terminal import console, print_json, progress_bars
from torchdlrm.data.bad_rows import describe_bad_rows
from torchdlrm.data.dataset import Dataset
from torchdlrm.data.preprocess import PreprocessOptions
from torchdlrm.data.preprocess import preprocess as run_preprocess
from torchdlrm.data.vocabulary import DEFAULT_MIN_COUNT
from torchdlrm.schema import load_schema


def preprocess(
    logs: list[Path],
    *,
    out: Path,
    schema: str = "criteo",
    min_count: int = DEFAULT_MIN_COUNT,
    max_rows: int | None = None,
    seed: int = 0,
    max_bad_rows: int = 0,
    as_json: Annotated[bool, Parameter(name="--json", negative="")] = False,
) -> None:
    """Turn a raw click log into a dataset that can be trained on.

    Args:
        logs: Files of the log, plain or gzipped, in the order of time (files named day_N are put in order).
        out: Folder to write the dataset to; must not exist.
        schema: What the columns are: the preset `criteo`, or a TOML file.
        min_count: A categorical value in fewer training rows than this has no id of its own.
        max_rows: Most rows that the embedding table of a feature may have; the rarest values lose their ids.
        seed: Seed of the order of the training rows.
        max_bad_rows: Skip up to this many rows that the schema cannot read.
        as_json: Print one JSON object on standard output.
    """
    options = PreprocessOptions(min_count=min_count, max_rows=max_rows, seed=seed, max_bad_rows=max_bad_rows)
    with progress_bars(f"preprocess into {out}") as progress:
        dataset = run_preprocess(logs, out, load_schema(schema), options, progress)
    _print_summary(dataset)
    if as_json:
        manifest = dataset.manifest
        print_json(
            {
                "dataset": str(out),
                "rows": {name: split.rows for name, split in manifest.splits.items()},
                "clicks": {name: split.clicks for name, split in manifest.splits.items()},
                "split_rule": manifest.split_rule,
                "num_embeddings": dataset.num_embeddings,
                "bad_rows": manifest.bad_rows.model_dump(mode="json"),
            }
        )


def _print_summary(dataset: Dataset) -> None:
    manifest = dataset.manifest
    table = Table("split", "rows", "click rate", "files")
    for column in table.columns[1:]:
        column.justify = "right"
    for name, split in manifest.splits.items():
        table.add_row(name, f"{split.rows:,}", f"{split.clicks / split.rows:.4f}", f"{len(split.files):,}")
    console.print(table)
    console.print(f"split: {manifest.split_rule}")
    console.print(
        f"tables: {len(dataset.num_embeddings)} features, {sum(dataset.num_embeddings.values()):,} rows in all, "
        f"the largest {max(dataset.num_embeddings.values()):,}"
    )
    if manifest.bad_rows.total:
        console.print(f"[yellow]bad rows skipped: {manifest.bad_rows.total:,}[/]")
        console.print(
            "\n".join(describe_bad_rows(manifest.bad_rows.counts, manifest.bad_rows.examples)),
            markup=False,
            soft_wrap=True,
        )
    console.print(f"next: dlrm inspect {dataset.path}", soft_wrap=True)
