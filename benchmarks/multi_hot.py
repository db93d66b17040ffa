"""Rows per second of DLRM-DCNv2 with several ids in a cell: ours, and TorchRec's own on the same batches.

    dlrm synthesize --multi-hot --rows 200000 --max-embeddings 200000 --out log.tsv
    dlrm preprocess log.tsv --schema log.tsv.schema.toml --out dataset
    python benchmarks/multi_hot.py dataset --nproc 1 2 --json multi_hot.json

The model and its optimizers are those of `criteo-1tb-dcn`, the tables have the sizes of the dataset. Ours is what
`dlrm train` does in a step, in the precision that it chooses; TorchRec's is its DLRM_DCN, EmbeddingBagCollection,
fused Adagrad and TrainPipelineSparseDist in float32. Both are in processes of their own, take turns, and step through
the same batches of the dataset, which lie in memory; what the loader takes for them is measured by itself.
"""

import argparse
import json
import os
import statistics
from dataclasses import asdict, dataclass
from itertools import islice
from operator import truediv
from pathlib import Path

os.environ.setdefault("GOMP_SPINCOUNT", "30000")  # as the command does; read when torch loads
os.environ.setdefault("KINETO_LOG_LEVEL", "99")

import torch
from torchrec.datasets.utils import Batch as TorchRecBatch
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from torchdlrm import Config, Dataset, Loader, load_config
from torchdlrm.bench.interleaved import Competitor, Step, enough_steps, take_turns
from torchdlrm.bench.loader import benchmark_loader
from torchdlrm.bench.step_competitors import our_pipeline, steps_of, torchrec_pipeline
from torchdlrm.loader.batch import Batch
from torchdlrm.model.architecture import ModelShape
from torchdlrm.processor import describe_processor
from torchdlrm.progress import SILENT
from torchdlrm.tables.optimizers import check_plain_torchrec
from torchdlrm.training.compute import choose_precision
from torchdlrm.training.processes.device import rank_device
from torchdlrm.training.processes.process_group import Ranks

_MAX_BATCHES = 16


@dataclass(frozen=True)
class Measured:
    """Medians for a number of processes, and where they come from.

    Attributes:
        nproc: processes.
        batch_size_global: rows of a step.
        ids_per_row: on average.
        rows_per_s: of our step.
        torchrec_rows_per_s: of TorchRec's.
        ratio_to_torchrec: ours over TorchRec's, median of the rounds' ratios.
        loader_rows_per_s: of one process that does nothing else.
        precision: of our products.
        num_threads: of each.
    """

    nproc: int
    batch_size_global: int
    ids_per_row: float
    rows_per_s: float
    torchrec_rows_per_s: float
    ratio_to_torchrec: float
    loader_rows_per_s: float
    precision: str
    num_threads: dict[str, int]


def main() -> None:
    """Measure each number of processes, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dataset", type=Path, help="folder that dlrm preprocess wrote")
    parser.add_argument("--nproc", type=int, nargs="+", default=[1, 2], help="numbers of processes")
    parser.add_argument("--batch-size-global", type=int, default=2048, help="rows of a step over all processes")
    parser.add_argument("--config", default="criteo-1tb-dcn", help="name or file of the model and its optimizers")
    parser.add_argument("--rounds", type=int, default=5, help="turns of each; medians are printed")
    parser.add_argument("--json", type=Path, help="write the measurements here, too")
    options = parser.parse_args()
    given = {"train.batch_size_global": str(options.batch_size_global), "train.device": "cpu"}
    config, dataset = load_config(options.config, given), Dataset.open(options.dataset)
    check_plain_torchrec(config.table_optimizer, torch.device("cpu"))
    print(describe_processor())
    print(f"{'processes':>9} {'batch':>7} {'ids/row':>8} {'ours':>9} {'TorchRec':>9} {'ratio':>6} {'loader alone':>13}")
    found = []
    for nproc in options.nproc:
        row = measure(dataset, config, nproc, options.rounds)
        print(
            f"{row.nproc:>9} {row.batch_size_global:>7,} {row.ids_per_row:>8.1f} {row.rows_per_s:>9,.0f} "
            f"{row.torchrec_rows_per_s:>9,.0f} {row.ratio_to_torchrec:>6.2f} {row.loader_rows_per_s:>13,.0f}",
            flush=True,
        )
        found.append(asdict(row))
    if options.json:
        report = {"processor": describe_processor(), "measured": found}
        options.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


def measure(dataset: Dataset, config: Config, nproc: int, rounds: int) -> Measured:
    """Ours and TorchRec's by turns in so many processes each, then the loader."""
    precision = choose_precision(config, ModelShape.of(config.model, dataset), rank_device(0, nproc, "cpu"))
    competitors = {
        "ours": Competitor(our_step, dataset.path, config, precision.dtype, nproc=nproc, device="cpu"),
        "torchrec": Competitor(torchrec_step, dataset.path, config, nproc=nproc, device="cpu"),
    }
    assert all(competitor.num_threads for competitor in competitors.values())  # both are built
    num_threads = {name: competitor.num_threads for name, competitor in competitors.items()}
    steps = {name: enough_steps(competitor, at_least=1) for name, competitor in competitors.items()}
    turns = take_turns("multi-hot", competitors, steps, rounds, SILENT)
    seconds = {name: [turn_s / steps[name] for turn_s in turns[name]] for name in turns}
    num_rows = config.train.batch_size_global
    batch = next(iter(Loader(dataset, "train", batch_size_global=num_rows)))
    loader = benchmark_loader(dataset, batch_size_global=num_rows, max_rows=100 * num_rows, rounds=rounds)
    return Measured(
        nproc=nproc,
        batch_size_global=num_rows,
        ids_per_row=len(batch.sparse_features.values()) / len(batch.labels),
        rows_per_s=num_rows / statistics.median(seconds["ours"]),
        torchrec_rows_per_s=num_rows / statistics.median(seconds["torchrec"]),
        ratio_to_torchrec=statistics.median(map(truediv, seconds["torchrec"], seconds["ours"])),
        loader_rows_per_s=loader.rows_per_s,
        precision=str(precision),
        num_threads=num_threads,
    )


def our_step(ranks: Ranks, dataset: Path, config: Config, dtype: torch.dtype) -> Step:
    """What `dlrm train` does in a step."""
    opened = Dataset.open(dataset)
    pipeline = our_pipeline(ranks, config, dict(opened.num_embeddings), dtype)
    return steps_of(pipeline, batches_of(opened, config, ranks), ranks)


def torchrec_step(ranks: Ranks, dataset: Path, config: Config) -> Step:
    """TorchRec's own model and pipeline, and batches as its examples make them of values and lengths."""
    opened = Dataset.open(dataset)
    pipeline = torchrec_pipeline(ranks, config, dict(opened.num_embeddings))
    batches = []
    for batch in batches_of(opened, config, ranks):
        kjt = batch.sparse_features
        theirs = KeyedJaggedTensor.from_lengths_sync(kjt.keys(), kjt.values(), kjt.lengths())
        batches.append(TorchRecBatch(batch.dense_features, theirs, batch.labels))
    return steps_of(pipeline, batches, ranks)


def batches_of(dataset: Dataset, config: Config, ranks: Ranks) -> list[Batch]:
    """This rank's part of the first complete batches."""
    loader = Loader(
        dataset,
        "train",
        batch_size_global=config.train.batch_size_global,
        rank=ranks.rank,
        world_size=ranks.world_size,
    )
    num_complete = max(1, loader.rows // config.train.batch_size_global)
    return list(islice(loader, min(_MAX_BATCHES, num_complete)))


if __name__ == "__main__":
    main()
