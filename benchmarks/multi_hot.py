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
from itertools import islice
from pathlib import Path
from typing import Any

os.environ.setdefault("GOMP_SPINCOUNT", "30000")  # as the command does; read when torch loads
os.environ.setdefault("KINETO_LOG_LEVEL", "99")

import torch
from torchrec.datasets.utils import Batch as TorchRecBatch
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from torchdlrm import Config, Dataset, Loader, load_config
from torchdlrm.bench.competitors import Case, our_pipeline, steps_of, torchrec_pipeline
from torchdlrm.bench.interleaved import Competitor, Step, choose_steps, take_turns
from torchdlrm.bench.loader import benchmark_loader
from torchdlrm.loader.batch import Batch
from torchdlrm.model.architecture import ModelShape
from torchdlrm.processor import describe_processor
from torchdlrm.progress import SILENT
from torchdlrm.tables.optimizers import check_plain_torchrec
from torchdlrm.training.compute import choose_precision
from torchdlrm.training.processes.device import rank_device
from torchdlrm.training.processes.process_group import Ranks

_MAX_BATCHES = 16


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
            "{nproc:>9} {batch_size_global:>7,} {ids_per_row:>8.1f} {rows_per_s:>9,.0f} {torchrec_rows_per_s:>9,.0f} "
            "{ratio_to_torchrec:>6.2f} {loader_rows_per_s:>13,.0f}".format(**row),
            flush=True,
        )
        found.append(row)
    if options.json:
        report = {"processor": describe_processor(), "measured": found}
        options.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


def measure(dataset: Dataset, config: Config, nproc: int, rounds: int) -> dict[str, Any]:
    """Ours and TorchRec's by turns in `nproc` processes each, then the loader."""
    precision = choose_precision(config, ModelShape.of(config.model, dataset), rank_device(0, nproc, "cpu"))
    case = Case(config, dict(dataset.num_embeddings), dtype=precision.dtype)
    competitors = {
        "ours": Competitor(our_step, dataset.path, case, nproc=nproc, device="cpu"),
        "torchrec": Competitor(torchrec_step, dataset.path, case, nproc=nproc, device="cpu"),
    }
    steps = choose_steps("multi-hot: prepare", competitors, SILENT, at_least=1)
    turns = take_turns("multi-hot", competitors, steps, rounds, SILENT)
    num_rows = config.train.batch_size_global
    batch = next(iter(Loader(dataset, "train", batch_size_global=num_rows)))
    loader = benchmark_loader(dataset, batch_size_global=num_rows, max_rows=100 * num_rows, rounds=rounds)
    return {
        "nproc": nproc,
        "batch_size_global": num_rows,
        "ids_per_row": len(batch.sparse_features.values()) / len(batch.labels),
        "rows_per_s": turns.rate("ours", num_rows),
        "torchrec_rows_per_s": turns.rate("torchrec", num_rows),
        "ratio_to_torchrec": turns.ratio("torchrec", "ours"),
        "loader_rows_per_s": loader["rows_per_s"],
        "precision": str(precision),
        "num_threads": turns.num_threads,
    }


def our_step(ranks: Ranks, dataset: Path, case: Case) -> Step:
    """What `dlrm train` does in a step."""
    return steps_of(our_pipeline(ranks, case), batches_of(Dataset.open(dataset), case.config, ranks), ranks)


def torchrec_step(ranks: Ranks, dataset: Path, case: Case) -> Step:
    """TorchRec's own model and pipeline, and batches as its examples make them of values and lengths."""
    pipeline, batches = torchrec_pipeline(ranks, case), []
    for batch in batches_of(Dataset.open(dataset), case.config, ranks):
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
