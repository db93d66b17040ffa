r"""What attention over a list costs beside a bag of the same length, served (encoded rows, JSON, one row) or trained.

    python benchmarks/attention.py --values 50 --json attention.json
    python benchmarks/attention.py --cpu --train 256 2048

A random log has Criteo's columns, an item, and a history of exactly `--values` items. One model is trained for a few
steps with each pooling of the history, exported, and served in this process; all take turns, round by round, on the
same rows. With `--train` steps of one process are timed in place of predictions. Times are medians of rounds, ratios
medians of the rounds' ratios to the bag (`sum`).
"""

import argparse
import itertools
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("GOMP_SPINCOUNT", "30000")  # as the command does; read when torch loads

import numpy as np
import polars as pl
import torch

from behaviour import POOLINGS
from torchdlrm import ExportOptions, Predictor, export, load_config, preprocess, train
from torchdlrm.bundle import TablePrecision
from torchdlrm.bundle.bundle import Bundle
from torchdlrm.bundle.encoded_rows import EncodedRows
from torchdlrm.bundle.served_model import ServedModel
from torchdlrm.data.dataset import Dataset, rows_of_split
from torchdlrm.loader.loader import Loader
from torchdlrm.model.architecture import ModelShape
from torchdlrm.processor import describe_processor
from torchdlrm.training.pipeline import build_pipeline
from torchdlrm.training.processes.process_group import join_process_group
from torchdlrm.training.sharded import build_optimizer, build_sharded_model

_TRAIN_ROWS, _JSON_ROWS = 6_000, 256
_MIN_SECONDS = 0.2  # of a turn


def main() -> None:
    """Measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="criteo-small", help="the model")
    parser.add_argument("--values", type=int, default=50, help="items of a history")
    parser.add_argument("--items", type=int, default=100_000, help="of the log, all different")
    parser.add_argument("--batch-rows", type=int, default=4096, help="of encoded rows")
    parser.add_argument("--rounds", type=int, default=7, help="turns of each")
    parser.add_argument("--precision", nargs="+", default=["int8", "float32"], help="of the tables")
    parser.add_argument("--poolings", nargs="+", default=list(POOLINGS), choices=list(POOLINGS))
    parser.add_argument("--set", nargs="*", default=[], help="further settings of din and dot, as KEY=VALUE")
    parser.add_argument("--cpu", action="store_true", help="one thread, and its CPU time: where others use the machine")
    parser.add_argument("--train", nargs="+", type=int, default=[], help="steps on batches of these rows, not served")
    parser.add_argument("--json", type=Path, help="write the measurements here, too")
    options = parser.parse_args()
    print(describe_processor())
    if options.cpu:
        torch.set_num_threads(1)
    clock = time.process_time if options.cpu else time.perf_counter
    more = dict(text.split("=", 1) for text in options.set)
    found = []
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        dataset = random_dataset(folder, options.values, options.items)
        for rows in options.train:
            for dtype in (torch.float32, torch.bfloat16):
                steps = training_steps(dataset, options.config, options.poolings, more, rows, dtype)
                found += by_turns(steps, "train", f"{rows} rows in {dtype}", options.rounds, clock)
        for precision in () if options.train else options.precision:
            bundles = {
                name: _bundle(folder, dataset, options.config, name, precision, more) for name in options.poolings
            }
            found += measured(bundles, dataset, options.batch_rows, options.rounds, precision, clock)
    if options.json:
        report = {"processor": describe_processor(), "options": vars(options) | {"json": None}, "measured": found}
        options.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


def random_dataset(folder: Path, num_values: int, num_items: int) -> Dataset:
    """A log of Criteo's columns, an item and a history, preprocessed."""
    draw, num_rows = np.random.default_rng(0), _TRAIN_ROWS
    columns: dict[str, Any] = {"label": draw.integers(2, size=num_rows)}
    columns |= {f"int_{i}": draw.integers(1000, size=num_rows) for i in range(13)}
    columns |= {f"cat_{i}": draw.integers(num_items, size=num_rows) for i in range(26)}
    columns["item"] = draw.integers(num_items, size=num_rows)
    histories = draw.integers(num_items, size=(num_rows, num_values))
    columns["history"] = ["|".join(map(str, row)) for row in histories.tolist()]
    pl.DataFrame(columns).write_csv(folder / "log.csv")
    sizes = f'kind = "id", num_embeddings = {num_items}'
    lines = ['name = "random"', 'separator = ","', "header = true", "columns = ["]
    lines += ['{ role = "label", name = "label" },']
    lines += [f'{{ role = "dense", name = "int_{i}", kind = "int" }},' for i in range(13)]
    lines += [f'{{ role = "sparse", name = "cat_{i}", kind = "int" }},' for i in range(26)]
    lines += [f'{{ role = "sparse", name = "item", {sizes} }},']
    lines += [f'{{ role = "sparse", name = "history", {sizes}, value_separator = "|", max_values = {num_values} }},']
    lines += ["]", "[split]", 'rule = "order"']
    (folder / "schema.toml").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return preprocess(folder / "log.csv", folder / "dataset", folder / "schema.toml", progress=False)


def _bundle(
    folder: Path, dataset: Dataset, config: str, name: str, precision: TablePrecision, more: Mapping[str, str]
) -> Path:
    settings = _settings(name, more) | {"train.max_steps": "20", "logging.tensorboard": "false"}
    run = folder / f"run-{name}"
    if not run.exists():
        train(load_config(config, settings), dataset, run, progress=False)
    path = folder / f"bundle-{name}-{precision}"
    export(run, path, options=ExportOptions(precision=precision), progress=False)
    return path


def measured(
    bundles: Mapping[str, Path],
    dataset: Dataset,
    batch_rows: int,
    rounds: int,
    precision: str,
    clock: Callable[[], float],
) -> list[dict[str, Any]]:
    """Times of all bundles by turns."""
    frame = next(iter(rows_of_split(dataset, "train"))).head(batch_rows)
    rows = EncodedRows.from_frame(frame, dataset.schema)
    steps = {name: _steps(path, rows) for name, path in bundles.items()}
    found = []
    for kind in ("encoded", "JSON", "one row"):
        found += by_turns({name: step[kind] for name, step in steps.items()}, precision, kind, rounds, clock)
    return found


def by_turns(
    steps: Mapping[str, tuple[Callable[[], object], int]],
    tables: str,
    rows: str,
    rounds: int,
    clock: Callable[[], float],
) -> list[dict[str, Any]]:
    """Time what each pooling does, and say how many rows it does it to."""
    found, times = [], {name: list[float]() for name in steps}
    for _ in range(rounds + 1):  # the first one warms up
        for name, (step, _) in steps.items():
            times[name].append(_seconds(step, clock))
    print(f"{tables + ', ' + rows:32} {'us/row':>10} {'rows/s':>10} {'times the bag':>14}")
    for name, seconds in times.items():
        counted, bag = seconds[1:], times["sum"][1:]
        us_per_row = statistics.median(counted) / steps[name][1] * 1e6
        ratio = statistics.median(own / other for own, other in zip(counted, bag, strict=True))
        print(f"  {name:30} {us_per_row:10.2f} {1e6 / us_per_row:10,.0f} {ratio:14.2f}", flush=True)
        row = {"tables": tables, "rows": rows, "pooling": name}
        found.append({**row, "us_per_row": us_per_row, "times_the_bag": ratio})
    return found


def training_steps(
    dataset: Dataset, config: str, poolings: Sequence[str], more: Mapping[str, str], num_rows: int, dtype: torch.dtype
) -> dict[str, tuple[Callable[[], object], int]]:
    """A training step of each pooling, on whole batches that lie in memory."""
    found: dict[str, tuple[Callable[[], object], int]] = {}
    with join_process_group() as ranks:
        for name in poolings:
            own = load_config(config, _settings(name, more))
            num_threads, shape = torch.get_num_threads(), ModelShape.of(own.model, dataset)
            model = build_sharded_model(own, shape, dense_sample=None, ranks=ranks).module
            torch.set_num_threads(num_threads)
            pipeline = build_pipeline(model, build_optimizer(model, own.dense_optimizer), dtype=dtype, ranks=ranks)
            loader = Loader(dataset, "train", batch_size_global=num_rows, tables=shape.tables)
            batches = itertools.cycle([batch for batch in loader if len(batch.labels) == num_rows])
            found[name] = partial(pipeline.progress, batches), num_rows
    return found


def _settings(name: str, more: Mapping[str, str]) -> dict[str, str]:
    pooling = {**POOLINGS[name], **(more if POOLINGS[name].get("pooling") == "attention" else {})}
    return {f"model.features.history.{key}": value for key, value in pooling.items()}


def _steps(path: Path, rows: EncodedRows) -> dict[str, tuple[Callable[[], object], int]]:
    """What is timed of a bundle, and how many rows each predicts."""
    model, predictor, sample = ServedModel(Bundle.open(path)), Predictor.open(path), json_rows(path.parent / "log.csv")
    return {
        "encoded": (lambda: model.predict(rows), rows.num_rows),
        "JSON": (lambda: predictor.predict(sample), len(sample)),
        "one row": (lambda: predictor.predict(sample[:1]), 1),
    }


def json_rows(log: Path) -> list[dict[str, Any]]:
    """The first rows of the log as a request has them."""
    rows = pl.read_csv(log, n_rows=_JSON_ROWS).to_dicts()
    for row in rows:
        del row["label"]
        row["history"] = [int(value) for value in row["history"].split("|")]
    return rows


def _seconds(step: Callable[[], object], clock: Callable[[], float]) -> float:
    """Of a call, in the mean over those of a turn."""
    started_s, calls = clock(), 0
    while (passed_s := clock() - started_s) < _MIN_SECONDS or not calls:
        step()
        calls += 1
    return passed_s / calls


if __name__ == "__main__":
    main()
