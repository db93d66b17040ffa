"""How many rows a second the loader hands to the ranks of one host, which do nothing with them.

    python benchmarks/loader.py dataset --ranks 2 8 --json loader.json

Each rank is a process that takes its slice of every batch, once with all ranks decoding row groups for each other and
once with each rank decoding its own, by turns. CPU time is that of all ranks together: what is left where others use
the machine, too. Of one rank the rows per second are what `dlrm bench loader dataset` measures.
"""

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

import psutil
import torch

from torchdlrm import Dataset, Loader
from torchdlrm.bench.interleaved import Competitor, Step
from torchdlrm.training.compute import keep_freed_memory
from torchdlrm.training.processes.process_group import Ranks


def main() -> None:
    """Measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dataset", type=Path, help="written by dlrm preprocess; its training split is read")
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 8], help="numbers of processes")
    parser.add_argument("--batch-size-global", type=int, default=65_536, help="rows of a batch over all ranks")
    parser.add_argument("--rows", type=int, default=4_000_000, help="that a round reads, in whole epochs")
    parser.add_argument("--rounds", type=int, default=3, help="how often each is measured; the median counts")
    parser.add_argument("--json", type=Path, help="write the measurements here, too")
    options = parser.parse_args()
    found = [row for num_ranks in options.ranks for row in measure(num_ranks, options)]
    print(f"{'ranks':>5}  {'each row group is decoded':<26} {'rows/s':>12} {'CPU ns/row':>11} {'RSS MB/rank':>12}")
    for row in found:
        how = "once" if row["is_shared"] else "by every rank"
        figures = f"{row['rows_per_s']:>12,.0f} {row['cpu_ns_per_row']:>11,.0f} {row['rss_mb']:>12,.0f}"
        print(f"{row['num_ranks']:>5}  {how:<26} {figures}")
    if options.json:
        options.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


def measure(num_ranks: int, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Medians of a number of ranks, with sharing and without."""
    rows = Dataset.open(options.dataset).splits["train"].rows
    epochs = max(1, round(options.rows / rows))
    arguments = (options.dataset, options.batch_size_global, epochs)
    competitors = {
        is_shared: Competitor(read_step, *arguments, is_shared, nproc=num_ranks, device="cpu")
        for is_shared in (True, False)
    }
    turns: dict[bool, list[tuple[float, float, float]]] = {True: [], False: []}
    for _ in range(options.rounds + 1):
        for is_shared, competitor in competitors.items():
            ranks = [psutil.Process(pid) for pid in competitor.pids]
            before_s = sum(sum(rank.cpu_times()[:2]) for rank in ranks)
            seconds = competitor.run(1)
            cpu_s = sum(sum(rank.cpu_times()[:2]) for rank in ranks) - before_s
            turns[is_shared].append((seconds, cpu_s, max(rank.memory_info().rss for rank in ranks)))
    for competitor in competitors.values():
        competitor.close()
    found = []
    for is_shared, measured in turns.items():
        times_s, cpu_times_s, rss_bytes = zip(*measured[1:], strict=True)  # the first fills the page cache
        found.append(
            {
                "num_ranks": num_ranks,
                "is_shared": is_shared,
                "batch_size_global": options.batch_size_global,
                "rows_per_s": rows * epochs / statistics.median(times_s),
                "cpu_ns_per_row": statistics.median(cpu_times_s) / (rows * epochs) * 1e9,
                "rss_mb": max(rss_bytes) / 1e6,
            }
        )
    return found


def read_step(ranks: Ranks, path: Path, batch_size_global: int, epochs: int, is_shared: bool) -> Step:  # noqa: FBT001
    """Read the training split from its beginning to its end."""
    torch.set_num_threads(1)
    keep_freed_memory()  # as in training
    dataset = Dataset.open(path)

    def step() -> None:
        loader = Loader(
            dataset,
            "train",
            batch_size_global=batch_size_global,
            rank=ranks.rank,
            world_size=ranks.world_size,
            epochs=epochs,
            all_gather=ranks.all_gather if is_shared else None,
        )
        for _ in loader:
            pass

    return step


if __name__ == "__main__":
    main()
