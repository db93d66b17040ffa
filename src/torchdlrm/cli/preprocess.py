"""`dlrm preprocess`: a raw click log becomes a dataset."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from cyclopts import Parameter
from rich.table import Table

from torchdlrm.cli.terminal import Flag, Json, console, print_json, progress_bars, say, say_next, warn
from torchdlrm.data.dataset import Dataset, Manifest
from torchdlrm.errors import ConfigError, Interrupted
from torchdlrm.features.bad_rows import describe_bad_rows
from torchdlrm.features.schema_file import load_schema, with_split
from torchdlrm.preprocessing.preprocess import PreprocessOptions, Resources, work_folder
from torchdlrm.preprocessing.preprocess import preprocess as run_preprocess
from torchdlrm.progress.meter import Meter


def preprocess(
    logs: list[Path],
    *,
    out: Path,
    schema: str = "criteo",
    options: PreprocessOptions = PreprocessOptions(),  # noqa: B008 - frozen, and what the parser fills
    split: Literal["criteo", "order", "random", "time", "folder"] | None = None,
    val: float | None = None,
    test: float | None = None,
    resources: Resources = Resources(),  # noqa: B008 - likewise
    restart: Annotated[bool, Parameter(negative="")] = False,
    overwrite: Flag = False,
    max_rows: Annotated[str | None, Parameter(show=False)] = None,
    as_json: Json = False,
) -> None:
    """Turn a raw click log into a dataset that can be trained on.

    A job that is interrupted, by whatever, is resumed when the same command is given again; of one that is complete
    nothing is left to do.

    Args:
        logs: Files of the log, text, JSON Lines, Parquet or ORC, in the order of time (files named day_N are put in
            order).
        out: Folder to write the dataset to; nothing else may be there.
        schema: What the columns are: the preset `criteo` or `criteo-bucketed`, or a TOML file; `dlrm schema LOG`
            proposes one.
        options: what the dataset depends on.
        split: How rows are split, if not as the schema says.
        val: Fraction of the rows for val, if not as the schema says; not for the split `criteo`.
        test: Fraction of the rows for test, likewise.
        resources: of the machine.
        restart: Forget what an interrupted job has done, and start again.
        overwrite: Preprocess also where a dataset is there; it is replaced when the new one is complete.
        max_rows: What `--max-embeddings` was called.
        as_json: Print one JSON object on standard output, and a JSON line a phase on standard error.
    """
    if max_rows is not None:
        raise ConfigError("--max-rows: is called --max-embeddings now")
    columns = with_split(load_schema(schema), split, val, test)
    phases: list[dict[str, Any]] = []

    def note_phase(phase: Meter, seconds: float) -> None:
        per_s = phase.done / seconds if seconds else 0.0
        phases.append(
            {"name": phase.name, "amount": phase.done, "unit": phase.unit, "seconds": seconds, "per_s": per_s}
        )
        if as_json:
            say(json.dumps({"phase": phase.name, **phases[-1]}))

    try:
        with progress_bars(f"preprocess into {out}", note_phase) as progress:
            dataset = run_preprocess(
                logs,
                out,
                columns,
                options,
                progress=progress,
                resources=resources,
                restart=restart,
                overwrite=overwrite,
            )
    except KeyboardInterrupt as interrupt:
        msg = f"stopped; what is done is kept in {work_folder(out)}: the same command resumes it"
        raise Interrupted(msg) from interrupt
    if not phases:
        say(f"{out} is complete: nothing was left to do")
    _print_summary(dataset, phases)
    if as_json:
        manifest = dataset.manifest
        print_json(
            {
                "dataset": str(out),
                "rows": {name: part.rows for name, part in manifest.splits.items()},
                "clicks": {name: part.clicks for name, part in manifest.splits.items()},
                "other_clicks": {name: part.other_clicks for name, part in manifest.splits.items()},
                "split_rule": manifest.split_rule,
                "num_embeddings": dataset.num_embeddings,
                "period": dataset.period,
                "bad_rows": manifest.bad_rows.model_dump(mode="json"),
                "phases": phases,
            }
        )


def about_constant_label(manifest: Manifest) -> str:
    """What to say where a split has rows of one label only; empty where each has both."""
    lines = (_about_constant(manifest, column.name) for column in manifest.feature_schema.labels)
    return "\n".join(line for line in lines if line)


def _about_constant(manifest: Manifest, label: str) -> str:
    constant = {
        name: int(part.clicks_of(label) > 0)
        for name, part in manifest.splits.items()
        if part.rows and part.clicks_of(label) in {0, part.rows}
    }
    if not constant:
        return ""
    splits_of = {value: [name for name in constant if constant[name] == value] for value in (0, 1)}
    found = ", ".join(f"{value} in all rows of {' and '.join(names)}" for value, names in splits_of.items() if names)
    learnt = "nothing can be learnt, and " if "train" in constant else ""
    what = "AUC and normalised entropy are undefined there"
    return f"the label {label!r} is {found}: {learnt}{what}; positive or threshold in the schema say what a click is"


def _print_summary(dataset: Dataset, phases: Sequence[Mapping[str, Any]]) -> None:
    """Say what was made, how long it took and what to type next."""
    manifest = dataset.manifest
    labels = [column.name for column in manifest.feature_schema.labels]
    rates = ["click rate"] if len(labels) == 1 else [f"rate of {name}" for name in labels]
    table = Table("split", "rows", *rates, "files")
    for column in table.columns[1:]:
        column.justify = "right"
    for name, part in manifest.splits.items():
        shown = (f"{part.clicks_of(label) / part.rows:.4f}" if part.rows else "" for label in labels)
        table.add_row(name, f"{part.rows:,}", *shown, f"{len(part.files):,}")
    console.print(table)
    console.print(f"split: {manifest.split_rule}", soft_wrap=True)
    console.print(
        f"tables: {len(dataset.num_embeddings)} features, {sum(dataset.num_embeddings.values()):,} rows in all, "
        f"the largest {max(dataset.num_embeddings.values()):,}"
    )
    if turnovers := [record.turnover for record in manifest.sparse.values() if record.turnover is not None]:
        admitted, expired = sum(found.admitted for found in turnovers), sum(found.expired for found in turnovers)
        console.print(f"period {manifest.period}: {admitted:,} values got ids, {expired:,} lost theirs")
    seconds = sum(phase["seconds"] for phase in phases)
    rows = sum(part.rows for part in manifest.splits.values())
    if seconds:
        parts = ", ".join(f"{phase['name']} {phase['seconds']:.1f} s" for phase in phases)
        console.print(f"time: {parts}; {rows / seconds:,.0f} rows/s", soft_wrap=True)
    extra = dict.fromkeys(repr(name) for source in manifest.source for name in source.extra_columns or ())
    if extra:
        say(f"columns that the schema does not name, not read: {', '.join(extra)}")
    if warning := about_constant_label(manifest):
        warn(warning)
    if manifest.bad_rows.total:
        console.print(f"[yellow]bad rows skipped: {manifest.bad_rows.total:,}[/]")
        say("\n".join(describe_bad_rows(manifest.bad_rows.counts, manifest.bad_rows.examples)))
    say_next("dlrm inspect {}", dataset.path)
