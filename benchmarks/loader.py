"""How many rows a second the loader hands to the ranks of one host, which do nothing with them.

    python benchmarks/loader.py dataset --ranks 1 2 8 --json loader.json

Each rank is a process that takes its slice of every batch, once with all ranks decoding row groups for each other and
once with each rank decoding its own, by turns. CPU time is that of all ranks together: what is left where others use
the machine, too.
"""

import argparse
import json
import multiprocessing
import resource
import statistics
import tempfile
import time
from multiprocessing.queues import Queue
from pathlib import Path
from typing import Any

import torch
from torch import distributed as dist

from torchdlrm import Dataset, Loader
from torchdlrm.training.compute import keep_freed_memory


def main() -> None:
    """Measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dataset", type=Path, help="written by dlrm preprocess; its training split is read")
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 8], help="numbers of processes")
    parser.add_argument("--batch-size-global", type=int, default=65_536, help="rows of a batch over all ranks")
    parser.add_argument("--rows", type=int, default=4_000_000, help="that a round reads, in whole epochs")
    parser.add_argument("--rounds", type=int, default=3, help="how often each is measured; the median counts")
    parser.add_argument("--json", type=Path, help="write the measurements here, too")
    options = parser.parse_args()
    found = [row for num_ranks in options.ranks for row in measure(num_ranks, options)]
    print(f"{'ranks':>5}  {'each row group is decoded':<26} {'rows/s':>12} {'CPU ns/row':>11} {'peak RSS MB/rank':>17}")
    for row in found:
        how = "once" if row["is_shared"] else "by every rank"
        figures = f"{row['rows_per_s']:>12,.0f} {row['cpu_ns_per_row']:>11,.0f} {row['peak_rss_mb']:>17,.0f}"
        print(f"{row['num_ranks']:>5}  {how:<26} {figures}")
    if options.json:
        options.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


def measure(num_ranks: int, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Medians of a number of ranks, with sharing and without."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torchdlrm.loader.loader"])  # torch and TorchRec are imported once for all
    results: Queue[list[tuple[bool, int, float, float, float]]] = context.Queue()
    with tempfile.TemporaryDirectory() as folder:
        ranks = [
            context.Process(target=run_rank, args=(rank, num_ranks, f"{folder}/store", options, results))
            for rank in range(num_ranks)
        ]
        for process in ranks:
            process.start()
        measured = [results.get() for _ in ranks]
        for process in ranks:
            process.join()
    found = []
    for is_shared in (True, False) if num_ranks > 1 else (False,):
        rounds = [[turn for turn in turns if turn[0] == is_shared] for turns in measured]
        by_round = list(zip(*rounds, strict=True))[1:]  # the first brings the files into the page cache
        rows = by_round[0][0][1]
        found.append(
            {
                "num_ranks": num_ranks,
                "is_shared": is_shared,
                "batch_size_global": options.batch_size_global,
                "rows_per_s": rows / statistics.median(max(turn[2] for turn in turns) for turns in by_round),
                "cpu_ns_per_row": statistics.median(sum(turn[3] for turn in turns) for turns in by_round) / rows * 1e9,
                "peak_rss_mb": max(turn[4] for turns in by_round for turn in turns) / 1e3,
            }
        )
    return found


def run_rank(rank: int, num_ranks: int, store: str, options: argparse.Namespace, results: "Queue[Any]") -> None:
    """Read the training split again and again: of each round whether it was shared, rows, seconds, CPU seconds, KB."""
    torch.set_num_threads(1)
    keep_freed_memory()  # as in training
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=num_ranks)

    def all_gather(value: object) -> list[object]:
        values: list[object] = [None] * num_ranks
        dist.all_gather_object(values, value)
        return values

    dataset, turns = Dataset.open(options.dataset), []
    epochs = max(1, round(options.rows / dataset.splits["train"].rows))
    for _ in range(options.rounds + 1):
        for is_shared in (True, False):
            loader = Loader(
                dataset,
                "train",
                batch_size_global=options.batch_size_global,
                rank=rank,
                world_size=num_ranks,
                epochs=epochs,
                all_gather=all_gather if is_shared else None,
            )
            dist.barrier()
            started_s, started_cpu_s = time.perf_counter(), time.process_time()
            for _ in loader:
                pass
            seconds, cpu_s = time.perf_counter() - started_s, time.process_time() - started_cpu_s
            peak_kb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            turns.append((is_shared, loader.rows * epochs, seconds, cpu_s, peak_kb))
    results.put(turns)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
