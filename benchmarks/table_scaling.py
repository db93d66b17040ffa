"""How the rows per second of a training step, ours and plain TorchRec's, depend on rows and number of tables.

    python benchmarks/table_scaling.py --json table_scaling.json

Two series, with a small dense part, so that the tables' share of a step is large:
- 26 tables of 10^4, 10^5, 10^6 and 10^7 rows each, batch 2,048. Their dimension is 8: with row-wise Adagrad the largest
  are 9.4 GB, and ours and TorchRec's are in memory together (19 GB).
- 26, 100, 250 and 500 tables of 10,000 rows each with dimension 16, batch 128. All pairs of vectors interact, so the
  dot products grow with the square of the number of tables; the milliseconds of the tables alone are told, too.

Both are in processes of their own and take turns; medians are printed. Then our step is profiled for the tables' part.
"""

import argparse
import json
import os
import statistics
from dataclasses import asdict, dataclass
from operator import truediv
from pathlib import Path

os.environ.setdefault("GOMP_SPINCOUNT", "30000")  # as the command does; read when torch loads
os.environ.setdefault("KINETO_LOG_LEVEL", "99")

from torchdlrm.bench.interleaved import Competitor, enough_steps, take_turns
from torchdlrm.bench.parts import measure_parts
from torchdlrm.bench.step_competitors import our_step, shape_of, torchrec_step
from torchdlrm.config import Config, ModelConfig, TrainConfig
from torchdlrm.processor import describe_processor
from torchdlrm.progress import SILENT
from torchdlrm.training.compute import choose_precision
from torchdlrm.training.processes.device import rank_device
from torchdlrm.units import show_bytes

_MIN_STEPS = 3


@dataclass(frozen=True)
class Measured:
    """Medians of one size, and where they come from.

    Attributes:
        num_tables: how many.
        rows_per_table: rows of each.
        embedding_dim: of all.
        batch_size_global: rows of a step.
        table_bytes: weights and state of row-wise Adagrad.
        rows_per_s: of our step.
        torchrec_rows_per_s: of plain TorchRec's.
        ratio_to_torchrec: ours over TorchRec's, median of the rounds' ratios.
        tables_ms: of a step of ours, looking up and updating.
        precision: of our products.
        num_threads: of each.
    """

    num_tables: int
    rows_per_table: int
    embedding_dim: int
    batch_size_global: int
    table_bytes: int
    rows_per_s: float
    torchrec_rows_per_s: float
    ratio_to_torchrec: float
    tables_ms: float
    precision: str
    num_threads: dict[str, int]


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
            *(f"{row.num_tables}", f"{row.rows_per_table:,}", f"{row.embedding_dim}", f"{row.batch_size_global:,}"),
            *(show_bytes(row.table_bytes), f"{row.rows_per_s:,.0f}", f"{row.torchrec_rows_per_s:,.0f}"),
            *(f"{row.ratio_to_torchrec:.2f}", f"{row.tables_ms:.2f}"),
        )
        print(" ".join(f"{figure:>15}" for figure in figures), flush=True)
        found.append(asdict(row))
    if options.json:
        report = {"processor": describe_processor(), "measured": found}
        options.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


def measure(num_tables: int, rows_per_table: int, embedding_dim: int, batch_size: int, *, rounds: int) -> Measured:
    """One size: ours and TorchRec's by turns, then the parts of ours."""
    config = Config(
        model=ModelConfig(
            embedding_dim=embedding_dim,
            dense_arch_layer_sizes=(64, embedding_dim),
            over_arch_layer_sizes=(64, 1),
        ),
        train=TrainConfig(batch_size_global=batch_size, device="cpu"),
    )
    num_embeddings = {f"cat_{i}": rows_per_table for i in range(num_tables)}
    precision = choose_precision(config, shape_of(config, num_embeddings), rank_device(0, 1, "cpu"))
    competitors = {
        "ours": Competitor(our_step, config, num_embeddings, precision.dtype, nproc=1, device="cpu"),
        "torchrec": Competitor(torchrec_step, config, num_embeddings, nproc=1, device="cpu"),
    }
    assert all(competitor.num_threads for competitor in competitors.values())  # both are built
    competitors["torchrec"].choose_threads()
    num_threads = {name: competitor.num_threads for name, competitor in competitors.items()}
    steps = {name: enough_steps(competitor, at_least=_MIN_STEPS) for name, competitor in competitors.items()}
    turns = take_turns("table scaling", competitors, steps, rounds, SILENT)
    seconds = {name: [turn_s / steps[name] for turn_s in turns[name]] for name in turns}
    parts_ms = measure_parts(config, num_embeddings, precision.dtype, num_steps=min(steps["ours"], 50), nproc=1)
    return Measured(
        num_tables=num_tables,
        rows_per_table=rows_per_table,
        embedding_dim=embedding_dim,
        batch_size_global=batch_size,
        table_bytes=4 * (embedding_dim + 1) * rows_per_table * num_tables,
        rows_per_s=batch_size / statistics.median(seconds["ours"]),
        torchrec_rows_per_s=batch_size / statistics.median(seconds["torchrec"]),
        ratio_to_torchrec=statistics.median(map(truediv, seconds["torchrec"], seconds["ours"])),
        tables_ms=sum(ms for part, ms in parts_ms.items() if part.startswith("tables: ")),
        precision=str(precision),
        num_threads=num_threads,
    )


if __name__ == "__main__":
    main()
