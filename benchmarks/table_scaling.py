"""How the rows per second of a training step, ours and plain TorchRec's, depend on rows and number of tables.

    python benchmarks/table_scaling.py --json table_scaling.json

Two series, with a small dense part, so that tables take much of a step:
- 26 tables of 10^4, 10^5, 10^6 and 10^7 rows each, batch 2,048. Their dimension is 8: with row-wise Adagrad the largest
  are 9.4 GB, and ours and TorchRec's are in memory together (19 GB).
- 26, 100, 250 and 500 tables of 10,000 rows each with dimension 16, batch 128. All pairs of vectors interact, so the
  dot products grow with the square of the number of tables; the milliseconds of the tables alone are printed, too.

Both are in processes of their own and take turns; medians are printed. Then our step is profiled for the tables' part.
"""

import argparse
import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

os.environ.setdefault("GOMP_SPINCOUNT", "30000")  # as the command does; read when torch loads
os.environ.setdefault("KINETO_LOG_LEVEL", "99")

from torchdlrm.bench.competitors import Case, our_step, torchrec_step
from torchdlrm.bench.interleaved import Competitor, choose_steps, take_turns
from torchdlrm.bench.step import measure_parts
from torchdlrm.config import Config, ModelConfig, TrainConfig
from torchdlrm.processor import describe_processor
from torchdlrm.progress import SILENT
from torchdlrm.training.compute import choose_precision
from torchdlrm.training.processes.device import rank_device
from torchdlrm.units import show_bytes

_MIN_STEPS = 3


def main() -> None:
    """Measure both series, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="*", default=[10**4, 10**5, 10**6, 10**7], help="rows of each of 26")
    parser.add_argument("--tables", type=int, nargs="*", default=[26, 100, 250, 500], help="tables of 10,000 rows each")
    parser.add_argument("--rounds", type=int, default=3, help="turns of each; medians are printed")
    parser.add_argument("--json", type=Path, help="write the measurements here, too")
    options = parser.parse_args()
    print(describe_processor())
    sizes = [(26, rows, 8, 2048) for rows in options.rows] + [(number, 10_000, 16, 128) for number in options.tables]
    found = []
    header = ("tables", "rows each", "dim", "batch", "memory", "ours rows/s", "TorchRec rows/s", "ratio", "tables ms")
    print(" ".join(f"{name:>15}" for name in header))
    for size in sizes:
        row = measure(*size, rounds=options.rounds)
        figures = (
            *(f"{number:,}" for number in size),
            *(show_bytes(row["table_bytes"]), f"{row['rows_per_s']:,.0f}", f"{row['torchrec_rows_per_s']:,.0f}"),
            *(f"{row['ratio_to_torchrec']:.2f}", f"{row['tables_ms']:.2f}"),
        )
        print(" ".join(f"{figure:>15}" for figure in figures), flush=True)
        found.append(row)
    if options.json:
        report = {"processor": describe_processor(), "measured": found}
        options.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


def measure(
    num_tables: int, rows_per_table: int, embedding_dim: int, batch_size: int, *, rounds: int
) -> dict[str, Any]:
    """One size: ours and TorchRec's by turns, then the parts of ours."""
    config = Config(
        model=ModelConfig(
            embedding_dim=embedding_dim,
            dense_arch_layer_sizes=(64, embedding_dim),
            over_arch_layer_sizes=(64, 1),
        ),
        train=TrainConfig(batch_size_global=batch_size, device="cpu"),
    )
    case = Case(config, {f"cat_{i}": rows_per_table for i in range(num_tables)})
    precision = choose_precision(config, case.shape, rank_device(0, 1, "cpu"))
    case = replace(case, dtype=precision.dtype)
    builds = {"ours": our_step, "torchrec": torchrec_step}
    competitors = {name: Competitor(build, case, nproc=1, device="cpu") for name, build in builds.items()}
    steps = choose_steps("prepare", competitors, SILENT, at_least=_MIN_STEPS, choosing_threads=["torchrec"])
    turns = take_turns("table scaling", competitors, steps, rounds, SILENT)
    parts_ms = measure_parts(case, num_steps=min(steps["ours"], 50), nproc=1)
    return {
        "num_tables": num_tables,
        "rows_per_table": rows_per_table,
        "embedding_dim": embedding_dim,
        "batch_size_global": batch_size,
        "table_bytes": 4 * (embedding_dim + 1) * rows_per_table * num_tables,
        "rows_per_s": turns.rate("ours", batch_size),
        "torchrec_rows_per_s": turns.rate("torchrec", batch_size),
        "ratio_to_torchrec": turns.ratio("torchrec", "ours"),
        "tables_ms": sum(ms for part, ms in parts_ms.items() if part.startswith("tables: ")),
        "precision": str(precision),
        "num_threads": turns.num_threads,
    }


if __name__ == "__main__":
    main()
