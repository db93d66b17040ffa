"""The planner: how long it searches and how good its plans are, and how far calibrated predictions are from the truth.

    python benchmarks/plan.py                      our search: 26 tables on 8 devices, 200 on 16, 1,000 on 64
    python benchmarks/plan.py --default-search     the same, and TorchRec's default search (minutes; not for 1,000)
    python benchmarks/plan.py --calibration        `--measure` and `dlrm bench step`, interleaved, on this machine

Prints a table and writes JSON to --out.
"""

import argparse
import json
import os
import random
import resource
import statistics
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as the command does; read when torch loads

import torch
from torchrec.distributed.planner import EmbeddingShardingPlanner
from torchrec.distributed.planner.stats import NoopEmbeddingStats
from torchrec.distributed.planner.storage_reservations import FixedPercentageStorageReservation

from torchdlrm.bench.step import benchmark_step
from torchdlrm.config import Config, ModelConfig, TableOptimizerConfig, TrainConfig
from torchdlrm.features.tables import feature_tables, features_of_sizes
from torchdlrm.model.architecture import ModelShape
from torchdlrm.planning.measure import measure
from torchdlrm.sharding.constraints import table_constraints
from torchdlrm.sharding.layout import Found, layout_of
from torchdlrm.sharding.local_machine import local_machine
from torchdlrm.sharding.machine import device_named
from torchdlrm.sharding.planner import TableSharder, meta_tables
from torchdlrm.sharding.problem import Problem
from torchdlrm.sharding.solution import Solution, shard_costs, solve
from torchdlrm.sharding.tables import Table, tables_of_model
from torchdlrm.training.compute import set_threads
from torchdlrm.training.processes.process_group import Ranks, join_process_group

SIZES = ((26, 8), (200, 16), (1000, 64))
ROWS_PER_TABLE = 20_000
CALIBRATED = {
    "paper, 26 x 128, batch 2,048": Config(),
    "paper, 26 x 128, batch 512": Config(train=TrainConfig(batch_size_global=512)),
    "small, 26 x 16, batch 4,096": Config(
        model=ModelConfig(embedding_dim=16, dense_arch_layer_sizes=(64, 16), over_arch_layer_sizes=(64, 1)),
        train=TrainConfig(batch_size_global=4096),
    ),
}


def random_problem(num_tables: int, num_devices: int) -> Problem:
    """Tables from 100 to 20 million rows, of 64 or 128 columns, some multi-hot; 4,096 rows a device and step."""
    rng = random.Random(0)  # noqa: S311 - not for secrets
    tables = [
        Table(f"t_{i}", int(10 ** rng.uniform(2, 7.3)), rng.choice([64, 128]), float(rng.choice([1, 1, 1, 2, 5, 20])))
        for i in range(num_tables)
    ]
    machine = device_named("a100-80gb").spread(num_devices)
    config = Config(
        table_optimizer=TableOptimizerConfig(name="rowwise_adagrad"),
        train=TrainConfig(batch_size_global=4096 * num_devices),
    )
    return Problem.of(config, tables, machine)


def default_search(problem: Problem) -> tuple[float, float]:
    """Seconds, and milliseconds of the slowest rank, of TorchRec's planner as it comes, for the same kinds."""
    planner = EmbeddingShardingPlanner(
        topology=problem.machine.topology(),
        batch_size=problem.batch_size_per_rank,
        storage_reservation=FixedPercentageStorageReservation(problem.asked_reserved_fraction),
        constraints=table_constraints(problem),
        stats=NoopEmbeddingStats(),
        debug=False,
    )
    started_s = time.perf_counter()
    layout = layout_of(planner.plan(meta_tables(problem), [TableSharder()]))
    seconds = time.perf_counter() - started_s
    solution = Solution(problem, Found(layout), shard_costs(problem, layout))
    return seconds, solution.ranks[solution.bottleneck_rank].total_ms


def search(*, with_default: bool) -> list[dict[str, Any]]:
    """One row a size."""
    rows = []
    for num_tables, num_devices in SIZES:
        problem = random_problem(num_tables, num_devices)
        solution = solve(problem)
        row: dict[str, Any] = {
            "tables": num_tables,
            "devices": num_devices,
            "search_s": solution.found.search_s,
            "worst_rank_ms": solution.ranks[solution.bottleneck_rank].total_ms,
            "above_lower_bound": solution.above_lower_bound,
            "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        }
        if with_default and num_tables < 1000:
            row["default_search_s"], row["default_worst_rank_ms"] = default_search(problem)
        print(json.dumps(row))
        rows.append(row)
    return rows


def predicted_ms(config: Config, num_embeddings: dict[str, int], ranks: Ranks) -> float:
    """The step time that `dlrm plan --measure` predicts."""
    machine = local_machine(config.sharding, world_size=1, local_world_size=1, device=ranks.device)
    problem = Problem.of(
        config, tables_of_model(feature_tables(config.model, features_of_sizes(num_embeddings))), machine
    )
    return solve(measure(problem, config, ranks).apply(problem)).step_ms


def calibration(rounds: int) -> list[dict[str, Any]]:
    """Predicted over measured step time; the two take turns, for the machine's pace changes."""
    rows = []
    num_embeddings = {f"cat_{i}": ROWS_PER_TABLE for i in range(26)}
    with join_process_group() as ranks:
        all_threads = torch.get_num_threads()
        for name, config in CALIBRATED.items():
            torch.set_num_threads(all_threads)
            set_threads(config, ModelShape(config.model, 13, 26), ranks)
            ratios, measured = [], []
            for _ in range(rounds):
                before_ms = predicted_ms(config, num_embeddings, ranks)
                result = benchmark_step(config, num_embeddings=num_embeddings, steps_per_round=5, rounds=1)
                after_ms = predicted_ms(config, num_embeddings, ranks)
                measured.append(1000 * config.train.batch_size_global / result["rows_per_s"])
                ratios.append((before_ms + after_ms) / 2 / measured[-1])
            row = {"model": name, "measured_ms": statistics.median(measured), "ratio": statistics.median(ratios)}
            row["ratios"] = ratios
            print(json.dumps(row))
            rows.append(row)
    return rows


def main() -> None:
    """Run what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--default-search", action="store_true")
    parser.add_argument("--calibration", action="store_true")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    result = calibration(options.rounds) if options.calibration else search(with_default=options.default_search)
    if options.out is not None:
        options.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
