"""What makes one small model better on a real log: settings and over arches, each beside today's, by paired seeds.

    python benchmarks/better.py train.txt --folder better --seeds 10

A training is judged on the rows that follow it (val and test of the schema's rule, a seventh). With --blocks 4 the log
is also cut to its first six sevenths, three times: four blocks of rows are judged then, and none twice. Every variant
trains `criteo-small` on each cut with the same seeds, with numbers as they are (`plain`) and also as categories
(`bucketed`). The table has a seed's mean AUC over the blocks, and that of the last block alone, before which there are
most rows. Differences from the first variant are paired by seed; their intervals are of Student's t over the seeds.

    python benchmarks/better.py train.txt --folder better --price

measures what four and five members cost beside `criteo-small`, by turns on one thread, in a few minutes: the time of a
training, and the latency over HTTP of 1, 8 and 64 rows, the last column five with `--dense-precision bfloat16`.

Each training appends a line to runs.jsonl in the folder; those that are there already are not repeated.
"""

import argparse
import gzip
import http.client
import itertools
import json
import os
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

os.environ.setdefault("GOMP_SPINCOUNT", "30000")  # as the command does; read when torch loads

import numpy as np
from scipy import stats

from serve import read_rows
from torchdlrm import Dataset, ExportOptions, binary_metrics, evaluate, export, load_config, preprocess, train
from torchdlrm.bundle.encoded_rows import EncodedRows
from torchdlrm.data.dataset import rows_of_split
from torchdlrm.exporting.checkpoint import CheckpointModel
from torchdlrm.model.architecture import ModelShape
from torchdlrm.model.model_class import architecture_of
from torchdlrm.training.checkpoint import checkpoint_path, list_checkpoints
from torchdlrm.training.checkpoint_reader import CheckpointReader
from torchdlrm.training.run import Run

SCHEMAS = {"plain": "criteo", "bucketed": "criteo-bucketed"}
LINES = "runs.jsonl"
ZOO = Path(__file__).parents[1] / "examples" / "zoo"
AVERAGED = 8  # checkpoints, over the last 30 % of the steps


class Variant(NamedTuple):
    """What differs from criteo-small; `is_averaged`: predictions are of the mean of checkpoints' weights."""

    settings: Mapping[str, Any] = {}
    model_class: str | None = None
    is_averaged: bool = False

    def __or__(self, other: "Variant") -> "Variant":
        """Both together."""
        both = {**self.settings, **other.settings}
        return Variant(both, other.model_class or self.model_class, self.is_averaged or other.is_averaged)


def decay(rate: float) -> Variant:
    """Lazy decay of the tables."""
    return Variant({"table_optimizer.weight_decay": rate, "table_optimizer.weight_decay_mode": "lazy"})


def ensemble(num_members: int) -> Variant:
    """Members of the size of criteo-small."""
    dim = 16 * num_members
    sizes = {"model.embedding_dim": dim, "model.dense_arch_layer_sizes": f"256,64,{dim}"}
    return Variant({"model.settings.num_members": num_members, **sizes}, f"{ZOO / 'ensemble.py'}:Ensemble")


FLAT = Variant({}, f"{ZOO / 'pnn.py'}:PNN")
FRESH = Variant({"train.epochs": 2, "train.fresh_tables": "true"})
VARIANTS = {
    "dot": Variant(),
    "fresh tables": FRESH,
    "fresh tables + decay 0.03": FRESH | decay(0.03),
    "ensemble of 4 + decay 0.03": ensemble(4) | decay(0.03),
    "ensemble of 5 + decay 0.03": ensemble(5) | decay(0.03),
    "flat": FLAT,
    "flat + fresh tables + decay 0.03": FLAT | FRESH | decay(0.03),
    "gdcn + fresh tables + decay 0.03": Variant({}, f"{ZOO / 'gdcn.py'}:GDCN") | FRESH | decay(0.03),
    "tabm flat": Variant({"model.settings.reads_vectors": "true"}, f"{ZOO / 'tabm.py'}:TabM"),
    "rate": Variant({"dense_optimizer.learning_rate": 0.005}),
    **{f"decay {rate:g}": decay(rate) for rate in (0.003, 0.03, 0.3)},
    **{f"scale {scale:g}": Variant({"model.table_init_scale": scale}) for scale in (0.5, 0.1)},
    "average": Variant({}, None, is_averaged=True),
}


def main(variants: Mapping[str, Variant] = VARIANTS, description: str | None = __doc__) -> None:
    """Train what is not there yet, print."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("log", type=Path, help="a log in Criteo's layout")
    parser.add_argument("--folder", type=Path, default=Path("better"), help="for datasets and runs.jsonl")
    parser.add_argument("--seeds", type=int, default=10, help="trainings of each variant, dataset and cut")
    parser.add_argument("--variants", nargs="+", default=[*variants], choices=[*variants], metavar="VARIANT")
    parser.add_argument("--blocks", type=int, default=4, help="blocks of rows that are judged")
    parser.add_argument("--jobs", type=int, default=1, help="trainings at a time, each in a thread of its own")
    parser.add_argument("--json", type=Path, help="write the table here, too")
    parser.add_argument("--price", action="store_true", help="measure training time and latency of members")
    options = parser.parse_args()
    make_datasets(options.log, options.folder, 1 if options.price else options.blocks)
    if options.price:
        print_prices(options.folder)
        return
    lines, asked = options.folder / LINES, set(tasks(options.variants, options.blocks, options.seeds))
    done = {task_of(run) for run in read(lines)}
    left = sorted(asked - done, key=lambda task: task[3])  # all of a seed, then all of the next one
    with ProcessPoolExecutor(options.jobs, mp_context=get_context("spawn")) as pool:
        futures = [pool.submit(one_run, options.folder, variants[task[0]], *task) for task in left]
        try:
            for future in as_completed(futures):
                future.result()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
    table = [*rows_of([run for run in read(lines) if task_of(run) in asked], options.variants, options.blocks)]
    print_table(table)
    if options.json:
        options.json.write_text(json.dumps(table, indent=1) + "\n")


def tasks(variants: Sequence[str], blocks: int, seeds: int) -> Iterator[tuple[str, str, int, int]]:
    """Variant, dataset, cut and seed of each training."""
    yield from itertools.product(variants, SCHEMAS, range(blocks), range(seeds))


def task_of(run: Mapping[str, Any]) -> tuple[str, str, int, int]:
    """Which of the trainings a line is of."""
    return run["variant"], run["dataset"], run["cut"], run["seed"]


def read(path: Path) -> list[dict[str, Any]]:
    """The lines that are complete."""
    found = path.read_text().splitlines() if path.exists() else []
    return [json.loads(line) for line in found if line.endswith("}")]


def make_datasets(log: Path, folder: Path, blocks: int) -> None:
    """The datasets of each cut: 0 is the whole log."""
    folder.mkdir(parents=True, exist_ok=True)
    with gzip.open(log, "rt") if log.suffix == ".gz" else log.open() as file:
        rows = file.readlines()
    for cut in range(blocks):
        part = folder / f"{cut}.tsv"
        if not part.exists():
            part.write_text("".join(rows))
        for name, schema in SCHEMAS.items():
            preprocess([part], folder / f"{name}-{cut}", schema, progress=False)
        rows = rows[: len(rows) * 6 // 7]


def one_run(folder: Path, variant: Variant, name: str, dataset: str, cut: int, seed: int) -> None:
    """Train once, and add a line with what the rows that follow say."""
    path = folder / f"{dataset}-{cut}"
    settings = {"seed": seed, "logging.tensorboard": "false", "train.num_threads": 1, **variant.settings}
    with TemporaryDirectory() as place:
        run = Path(place) / "run"
        if variant.is_averaged:
            steps = Dataset.open(path).splits["train"].rows // 64
            every_steps = max(1, steps * 3 // 10 // AVERAGED)
            settings |= {"checkpoint.every_steps": every_steps, "checkpoint.keep_last": AVERAGED}
        config = load_config("criteo-small", {key: str(value) for key, value in settings.items()})
        history = train(config, path, run, model_class=variant.model_class, progress=False)
        assert history is not None
        if variant.is_averaged:
            found = averaged_metrics(run, path, variant)
        else:
            found = evaluate(run, split="val+test", model_class=variant.model_class, progress=False) or {}
    task = {"variant": name, "dataset": dataset, "cut": cut, "seed": seed}
    figures = {"auc": found["auc"], "logloss": found["logloss"], "rows_per_s": history.summary.rows_per_s}
    with (folder / LINES).open("a") as file:
        file.write(json.dumps({**task, **figures}) + "\n")


def print_prices(folder: Path, rounds: int = 7) -> None:
    """What four and five members cost, medians of turns."""
    priced = {"dot": Variant(), "four": ensemble(4) | decay(0.03), "five": ensemble(5) | decay(0.03)}
    with TemporaryDirectory() as place:

        def trained(name: str, dataset: str, turn: int) -> tuple[float, float]:
            of, run = priced[name], Path(place) / f"{name}-{dataset}-{turn}"
            settings = {"logging.tensorboard": "false", "train.num_threads": 1, **of.settings}
            config = load_config("criteo-small", {key: str(value) for key, value in settings.items()})
            began_s, began_cpu_s = time.perf_counter(), time.process_time()
            train(config, folder / f"{dataset}-0", run, model_class=of.model_class, progress=False)
            return time.process_time() - began_cpu_s, time.perf_counter() - began_s

        for dataset in SCHEMAS:
            turns = [{name: trained(name, dataset, turn) for name in priced} for turn in range(rounds + 1)][1:]
            for kind, of in (("CPU", 0), ("wall", 1)):
                print_ratio(f"training, {dataset}, {kind} s", {n: [t[n][of] for t in turns] for n in priced})
        for dataset in SCHEMAS:
            bundles: dict[Path, str | None] = {}  # and their model classes
            rounded = ExportOptions(dense_precision="bfloat16")
            kinds = dict.fromkeys(priced, ExportOptions()) | {"five 16": rounded}
            for kind, how in kinds.items():
                name, bundle = kind.split()[0], Path(place) / f"{kind}-{dataset}"
                model_class = priced[name].model_class
                export(
                    Path(place) / f"{name}-{dataset}-0", bundle, options=how, model_class=model_class, progress=False
                )
                bundles[bundle] = model_class
            print_latencies(folder / "0.tsv", bundles, dataset)


def print_latencies(log: Path, bundles: Mapping[Path, str | None], dataset: str) -> None:
    """Of servers that are asked by turns."""
    rows = read_rows(log, 64)
    servers, connections = [], {}
    try:
        for bundle, model_class in bundles.items():
            with socket.socket() as free:
                free.bind(("127.0.0.1", 0))
                port = free.getsockname()[1]
            command = [sys.executable, "-m", "torchdlrm", "serve", str(bundle), "--port", str(port)]
            command += ["--model-class", model_class] if model_class else []
            servers.append(subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL))
            connections[bundle] = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
            for _ in range(600):
                try:
                    connections[bundle].connect()
                    break
                except OSError:
                    time.sleep(0.1)
        for num_rows, turns in ((1, 600), (8, 600), (64, 300)):
            body = json.dumps(rows[:num_rows])
            times_ms: dict[Path, list[float]] = {bundle: [] for bundle in bundles}
            for _, bundle in itertools.product(range(turns), bundles):
                began_s = time.perf_counter()
                connections[bundle].request("POST", "/predict", body)
                answer = connections[bundle].getresponse()
                assert answer.read(), answer.status
                assert answer.status == http.client.OK, answer.status
                times_ms[bundle].append(1000 * (time.perf_counter() - began_s))
            print_ratio(f"latency, {dataset}, {num_rows} rows, ms", times_ms)
    finally:
        for server in servers:
            server.terminate()
            server.wait()


def print_ratio(what: str, values: Mapping[Any, Sequence[float]]) -> None:
    """Medians, and their ratios to the first one."""
    first, *others = (statistics.median(of) for of in values.values())
    print(f"{what:32} {first:8.2f}", *(f"{other:8.2f} x{other / first:.2f}" for other in others), flush=True)


def averaged_metrics(folder: Path, path: Path, variant: Variant) -> dict[str, Any]:
    """Metrics of the mean weights of the checkpoints that a run has kept."""

    class Mean(CheckpointReader):
        """Stands for all of them."""

        def tensor(self, name: str) -> Any:
            tensors = [reader.part(name, [0] * len(self.shapes[name]), self.shapes[name]) for reader in readers]
            return sum(tensors) / len(tensors)

        def gather(self, name: str, ids: Any) -> Any:
            return sum(reader.rows(name, 0, self.shapes[name][0])[ids] for reader in readers) / len(readers)

    run, dataset = Run.open(folder), Dataset.open(path)
    paths = [checkpoint_path(run.checkpoints, step) for step in list_checkpoints(run.checkpoints)]
    readers = [CheckpointReader(path) for path in paths]
    shape = ModelShape.of(run.config.model, dataset, architecture_of(run.config.model, variant.model_class))
    model = CheckpointModel(Mean(paths[-1]), shape)
    frames = [frame for split in ("val", "test") for frame in rows_of_split(dataset, split)]
    logits = [model.logits(EncodedRows.from_frame(frame, dataset.schema)) for frame in frames]
    labels = np.concatenate([frame[dataset.schema.label.name].to_numpy() for frame in frames])
    found = binary_metrics(labels, np.concatenate(logits))
    return {"auc": found.auc, "logloss": found.logloss}


def rows_of(runs: Sequence[Mapping[str, Any]], variants: Sequence[str], blocks: int) -> Iterator[dict[str, Any]]:
    """A row of the table for each dataset and variant: of seeds whose cuts are all there."""
    for dataset in SCHEMAS:
        baseline: dict[str, dict[int, float]] = {}
        for variant in variants:
            mine = [run for run in runs if (run["variant"], run["dataset"]) == (variant, dataset)]
            row: dict[str, Any] = {"dataset": dataset, "variant": variant}
            for judged, cuts in (("all", range(blocks)), ("last", range(1))):
                aucs = {
                    seed: statistics.mean(run["auc"] for run in mine if run["seed"] == seed and run["cut"] in cuts)
                    for seed in sorted({run["seed"] for run in mine})
                    if {run["cut"] for run in mine if run["seed"] == seed} >= set(cuts)
                }
                if not aucs:
                    continue
                baseline.setdefault(judged, aucs)
                row[judged] = summary(aucs, baseline[judged])
            row["rows_per_s"] = statistics.median(run["rows_per_s"] for run in mine) if mine else None
            yield row


def summary(aucs: Mapping[int, float], baseline: Mapping[int, float]) -> dict[str, Any]:
    """Mean and spread over the seeds, and the difference from the baseline over those that both have."""
    values = [*aucs.values()]
    found = {"seeds": len(values), "mean": statistics.mean(values), "spread": max(values) - min(values)}
    found["deviation"] = statistics.stdev(values) if len(values) > 1 else 0.0
    differences = np.array([auc - baseline[seed] for seed, auc in aucs.items() if seed in baseline])
    if len(differences) > 1 and differences.any():
        error = differences.std(ddof=1) / len(differences) ** 0.5
        half = float(stats.t.ppf(0.975, len(differences) - 1) * error)
        found |= {"difference": float(differences.mean()), "half_interval": half}
        found["p"] = float(stats.ttest_1samp(differences, 0.0).pvalue)
    return found


def print_table(table: Sequence[Mapping[str, Any]]) -> None:
    """Both ways of judging side by side."""
    head = f"{'mean':>7} {'sd':>6} {'spread':>6} {'difference, 95 %':>19} {'p':>6}"
    print(f"{'':27} seeds |  all blocks: {head[13:]} | last block: {head[12:]}   rows/s")
    for row in table:
        texts = []
        for judged in ("all", "last"):
            one = row.get(judged)
            if one is None:
                texts.append("-")
                continue
            text = f"{one['mean']:7.4f} {one['deviation']:6.4f} {one['spread']:6.4f}"
            if "difference" in one:
                text += f" {one['difference']:+9.4f} +- {one['half_interval']:.4f} {one['p']:6.3f}"
            texts.append(f"{text:48}")
        seeds, speed = row.get("all", {}).get("seeds", 0), row["rows_per_s"] or 0
        print(f"{row['dataset']:9} {row['variant']:17} {seeds:5} | {texts[0]} | {texts[1]} {speed:8,.0f}")


if __name__ == "__main__":
    main()
