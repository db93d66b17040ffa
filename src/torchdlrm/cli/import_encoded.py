"""`dlrm import`: data that others have encoded becomes a dataset."""

import json
from pathlib import Path

from torchdlrm.cli.terminal import Json, console, print_json, progress_bars, say_next
from torchdlrm.errors import ConfigError, Interrupted
from torchdlrm.preprocessing.encoded import EncodedFormat, encoded_log, with_table_sizes
from torchdlrm.preprocessing.preprocess import PreprocessOptions, preprocess, work_folder


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
        as_json: Print one JSON object on standard output.
    """
    files, schema = encoded_log(source, format, label)
    schema = with_table_sizes(schema, _table_sizes(table_sizes, [column.name for column in schema.sparse]))
    try:
        with progress_bars(f"import {source} into {out}") as progress:
            dataset = preprocess(files, out, schema, PreprocessOptions(seed=seed, min_count=1), progress)
    except KeyboardInterrupt as interrupt:
        msg = f"stopped; what is done is kept in {work_folder(out)}: the same command resumes it"
        raise Interrupted(msg) from interrupt
    rows = {name: split.rows for name, split in dataset.manifest.splits.items()}
    console.print(", ".join(f"{name} {count:,} rows" for name, count in rows.items()))
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
        msg = (
            f"--table-sizes: expected a positive whole number for each of the {len(names)} features, got "
            f"{len(content)} numbers{', wrong: ' + ', '.join(wrong) if wrong else ''}"
        )
        raise ConfigError(msg)
    return sizes
