"""`dlrm preprocess`: a raw click log becomes a dataset; `dlrm import`: so does data that others have encoded."""

import json
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Annotated, Any, Literal

from cyclopts import Parameter

from torchdlrm.cli.options import Flag, Json
from torchdlrm.cli.terminal import (
    print_json,
    print_table,
    progress_bars,
    say,
    say_next,
    saying_at_ctrl_c,
    warn,
)
from torchdlrm.data.dataset import Dataset
from torchdlrm.data.manifest import Manifest
from torchdlrm.errors import ConfigError
from torchdlrm.features.bad_rows import describe_bad_rows
from torchdlrm.features.schema_file import load_schema, with_split
from torchdlrm.preprocessing.encoded import EncodedFormat, encoded_log, with_table_sizes
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
    restart: Flag = False,
    overwrite: Flag = False,
    max_rows: Annotated[str | None, Parameter(show=False)] = None,
    as_json: Annotated[
        Json, Parameter(help="Print one JSON object on standard output, and a JSON line a phase on standard error.")
    ] = False,
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
        split: How rows are split, if not as the schema says.
        val: Fraction of the rows for val, if not as the schema says; not for the split `criteo`.
        test: Fraction of the rows for test, likewise.
        restart: Forget what an interrupted job has done, and start again.
        overwrite: Preprocess also where a dataset is there; it is replaced when the new one is complete.
        max_rows: What `--max-embeddings` was called.
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

    with _resumable(out), progress_bars(f"preprocess into {out}", note_phase) as progress:
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


def _resumable(out: Path) -> AbstractContextManager[None]:
    return saying_at_ctrl_c(f"stopped; what is done is kept in {work_folder(out)}: the same command resumes it")


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
    rows = [
        {"split": name, "rows": f"{part.rows:,}"}
        | {rate: f"{part.clicks_of(of) / part.rows:.4f}" for rate, of in zip(rates, labels, strict=True) if part.rows}
        | {"files": f"{len(part.files):,}"}
        for name, part in manifest.splits.items()
    ]
    print_table("", rows, ("split", "rows", *rates, "files"))
    say(f"split: {manifest.split_rule}")
    say(
        f"tables: {len(dataset.num_embeddings)} features, {sum(dataset.table_rows.values()):,} rows in all, "
        f"the largest {max(dataset.num_embeddings.values()):,}"
    )
    if turnovers := [found for name in dataset.table_rows if (found := manifest.sparse[name].turnover) is not None]:
        admitted, expired = sum(found.admitted for found in turnovers), sum(found.expired for found in turnovers)
        say(f"period {manifest.period}: {admitted:,} values got ids, {expired:,} lost theirs")
    seconds = sum(phase["seconds"] for phase in phases)
    num_rows = sum(part.rows for part in manifest.splits.values())
    if seconds:
        parts = ", ".join(f"{phase['name']} {phase['seconds']:.1f} s" for phase in phases)
        say(f"time: {parts}; {num_rows / seconds:,.0f} rows/s")
    extra = dict.fromkeys(repr(name) for source in manifest.source for name in source.extra_columns or ())
    if extra:
        say(f"columns that the schema does not name, not read: {', '.join(extra)}")
    if warning := about_constant_label(manifest):
        warn(warning)
    if manifest.bad_rows.total:
        warn(f"bad rows skipped: {manifest.bad_rows.total:,}")
        say("\n".join(describe_bad_rows(manifest.bad_rows.counts, manifest.bad_rows.examples)))
    say_next("dlrm inspect {}", dataset.path)


def import_encoded(
    source: Path,
    *,
    out: Path,
    format: EncodedFormat,  # noqa: A002 - the name of the option
    table_sizes: str | None = None,
    label: str | None = None,
    seed: int = 0,
    as_json: Json = False,
) -> None:
    """Turn data that is encoded already into a dataset: ids and floats stay as they are, and are checked.

    It is `dlrm preprocess` with the schema that such files have: sparse columns of kind `id`, dense ones as they are.

    Args:
        source: The folder that holds the files; for `parquet` also a file.
        out: Folder to write the dataset to; nothing else may be there.
        format: `npy`: day_N_dense.npy, _sparse.npy and _labels.npy of torchrec.datasets.criteo; `multi-hot`: likewise
            with _sparse_multi_hot.npz; `nvt`: label.bin, numerical.bin, cat_0.bin ... of TorchRec's nvt_dataloader
            example; `parquet`: what NVTabular, Spark or others wrote.
        table_sizes: Rows of the embedding tables, in the order of the features: 100,200,... or a JSON file of a list or
            of name and size. By default the largest id + 1.
        label: The label's column in Parquet; by default label, click, clicked or target.
        seed: Seed of the order of the training rows.
    """
    files, schema = encoded_log(source, format, label)
    schema = with_table_sizes(schema, _table_sizes(table_sizes, [column.name for column in schema.sparse]))
    with _resumable(out), progress_bars(f"import {source} into {out}") as progress:
        dataset = run_preprocess(files, out, schema, PreprocessOptions(seed=seed, min_count=1), progress)
    rows = {name: split.rows for name, split in dataset.manifest.splits.items()}
    say(", ".join(f"{name} {count:,} rows" for name, count in rows.items()))
    say_next("dlrm inspect {}", out)
    if as_json:
        print_json({"dataset": str(out), "rows": rows, "num_embeddings": dataset.num_embeddings})


def _table_sizes(text: str | None, names: list[str]) -> dict[str, int]:
    if text is None:
        return {}
    try:
        is_file = Path(text).is_file()
        content = json.loads(Path(text).read_text(encoding="utf-8") if is_file else f"[{text}]")
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        msg = f"--table-sizes: expected numbers such as 100,200 or a JSON file, got {text!r} ({error})"
        raise ConfigError(msg) from error
    sizes = content if isinstance(content, dict) else dict(zip(names, content, strict=False))
    wrong = [name for name, size in sizes.items() if name not in names or not isinstance(size, int) or size < 1]
    if wrong or (isinstance(content, list) and len(content) != len(names)):
        raise ConfigError(
            f"--table-sizes: expected a positive whole number for each of the {len(names)} features, got "
            f"{len(content)} numbers{', wrong: ' + ', '.join(wrong) if wrong else ''}"
        )
    return sizes
