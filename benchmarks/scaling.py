"""Criteo's terabyte on paper: hours and price of each step, and what a step of the training sends, by number of hosts.

    python benchmarks/scaling.py                                      the tables of docs/scaling.md (two minutes)
    python benchmarks/scaling.py --cores 64 --core-hour 0.03 --gpu-hour 2.5      your machines and prices
    python benchmarks/scaling.py --hosts 1 2 --device cpu             only these; --json FILE writes all of it

Nothing is run.  Processor time for a row was measured (the constants say where), the bytes of a training step are those
of the plan that `dlrm train` would make, and prices are assumptions.
"""

import argparse
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torchdlrm.config import load_config
from torchdlrm.planning.plan import problem_of
from torchdlrm.planning.plan_request import PlanRequest
from torchdlrm.sharding.solution import Solution, solve

ROWS = 4_373_472_329  # days 0 to 23
DAY_ROWS = ROWS // 24
TRAIN_ROWS = ROWS - DAY_ROWS
GZIP_BYTES = 72.4  # a row of 10,000 real ones of day 0; 250 as text
DATASET_BYTES = 60.0  # a row: 42 of the same real ones, and 3 more for the longer ids of each of six large tables
TABLE_BYTES = 104.9e9  # weights and state of the tables of `criteo-1tb`
# Of 400,000 synthetic rows what `--cluster` writes and reads besides log and dataset: 916 bytes a row, less 130.
CLUSTER_BYTES = 786.0
# Processor time in microseconds a row, on two cores of an AMD EPYC (Zen 5).
PREPROCESS_CORE_US = 5.05  # docs/benchmarks.md: 10.1 s for 2,000,000 rows
TRAIN_CORE_US = 2e6 / 57_277 / 0.93  # docs/performance/step.json; `dlrm train` reaches 89 to 97 % of it
LOADER_CORE_US = 0.704  # docs/benchmarks.md: 8 ranks
EVALUATE_CORE_US = TRAIN_CORE_US  # 285,715 rows took as long as in a training, on a busy machine
PREDICT_CORE_US = 2e6 / 111_461  # docs/performance/predict.json: from text, int8
# Milliseconds of a step on the host whatever its rows: docs/performance/step.json; docs/lab/gpu.md, 8 ranks.
HOST_MS = {"cpu": 2.48, "cuda": 6.2}
GPUS_PER_HOST = 8
BYTES_PER_ID, BYTES_PER_LENGTH = 8, 4


@dataclass(frozen=True)
class Host:
    """What a machine without GPUs is and costs; one with GPUs has its cores and network, too.

    Attributes:
        cores: of it.
        core_fraction: of the measured rate, which a core reaches while all are busy.
        core_hour: dollars.
        network: bytes a second, from and to the bucket and other hosts.
    """

    cores: int = 32
    core_fraction: float = 0.7
    core_hour: float = 0.05
    network: float = 25e9 / 8

    @property
    def busy_cores(self) -> float:
        """Cores of the kind that was measured."""
        return self.cores * self.core_fraction


@dataclass(frozen=True)
class Step:
    """A command and all that it does.

    Attributes:
        name: of the command.
        core_s: processor time.
        num_bytes: from and to the bucket.
        shared_bytes: to and from the bucket besides, where several machines do it: what tasks leave for later ones.
        max_machines: on which it runs.
    """

    name: str
    core_s: float
    num_bytes: float
    shared_bytes: float = 0.0
    max_machines: int = 1_000_000


STEPS = (
    Step("preprocess", ROWS * PREPROCESS_CORE_US / 1e6, ROWS * (GZIP_BYTES + DATASET_BYTES), ROWS * CLUSTER_BYTES),
    Step("evaluate", DAY_ROWS * EVALUATE_CORE_US / 1e6, DAY_ROWS * DATASET_BYTES + TABLE_BYTES),
    Step("export", 0.0, 1.25 * TABLE_BYTES, max_machines=1),  # int8; processor time was not measured at this size
    Step("predict", DAY_ROWS * PREDICT_CORE_US / 1e6, DAY_ROWS * (GZIP_BYTES + 4) + TABLE_BYTES / 4),
)


def step_on(step: Step, machines: int, host: Host) -> dict[str, Any]:
    """Hours and dollars of a step: its processor time over all cores or its bytes over all networks, the longer one."""
    used = min(machines, step.max_machines)
    num_bytes = step.num_bytes + (step.shared_bytes if used > 1 else 0.0)
    by_cores_s, by_network_s = step.core_s / (used * host.busy_cores), num_bytes / (used * host.network)
    hours = max(by_cores_s, by_network_s) / 3600
    return {
        "step": step.name,
        "machines": used,
        "core_hours": step.core_s / host.core_fraction / 3600,
        "bytes": num_bytes,
        "hours": hours,
        "dollars": hours * used * host.cores * host.core_hour,
        "limit": "processors" if by_cores_s >= by_network_s else "network",
    }


def train_on(machines: int, batch: int, host: Host) -> dict[str, Any]:
    """The training without GPUs, as one of the steps: what its machines send each other counts, too."""
    training = training_on(machines, "cpu", batch, host)
    num_bytes = TRAIN_ROWS * DATASET_BYTES + TABLE_BYTES
    hours = training["epoch_hours"] + TABLE_BYTES / (machines * host.network) / 3600
    return {
        "step": "train",
        "machines": machines,
        "core_hours": TRAIN_ROWS * TRAIN_CORE_US / 1e6 / host.core_fraction / 3600,
        "bytes": num_bytes,
        "hours": hours,
        "dollars": hours * machines * host.cores * host.core_hour,
        "limit": {"compute": "processors"}.get(training["limit"], training["limit"]),
    }


def sent_bytes(solution: Solution) -> dict[str, float]:
    """Bytes that the busiest host sends to other hosts in a step, by what they are.

    `ids`: to the ranks that hold the tables. `embeddings`: of pooled rows, from these. `gradients`: back. `dense`: a
    ring over all ranks, of which a host sends on what one rank does. As `dlrm train` sends them: float16 and bfloat16
    on GPUs, float32 on CPU. With one host there are none.
    """
    problem, machine = solution.problem, solution.problem.machine
    ranks, local = machine.num_devices, machine.devices_per_host
    rows, others = problem.batch_size_per_rank, ranks - local
    value_bytes = 2 if machine.kind == "cuda" else 4
    ids, out, back = [0.0] * machine.num_hosts, [0.0] * machine.num_hosts, [0.0] * machine.num_hosts
    for table in problem.tables:
        placed = solution.layout[table.name]
        is_cut_by_rows = placed.sharding_type in {"row_wise", "table_row_wise", "grid_shard"}
        # Within a host partial sums are added before they leave it.
        is_added_first = placed.sharding_type in {"table_row_wise", "grid_shard"}
        for shard in placed.shards:
            if not shard.num_values:
                continue
            host = shard.rank // local
            columns = shard.sizes[1] / (local if is_added_first else 1)
            fraction = shard.sizes[0] / table.rows if is_cut_by_rows else 1.0
            id_bytes = rows * (BYTES_PER_LENGTH + BYTES_PER_ID * table.pooling_factor * fraction)
            out[host] += others * rows * columns * value_bytes
            for other in range(machine.num_hosts):
                if other != host:
                    ids[other] += local * id_bytes
                    back[other] += local * rows * columns * value_bytes
    dense = 2 * 4 * problem.shape.num_weights * (ranks - 1) / ranks if machine.num_hosts > 1 else 0.0
    busiest = max(range(machine.num_hosts), key=lambda host: ids[host] + out[host] + back[host])
    return {"ids": ids[busiest], "embeddings": out[busiest], "gradients": back[busiest], "dense": dense}


def training_on(hosts: int, device: str, batch: int, host: Host, tables: str = "criteo-1tb") -> dict[str, Any]:
    """A step of the training on this number of hosts: what is sent, its milliseconds by part, and what limits it.

    On CPU all parts take turns. On GPUs the host starts kernels while others run, so the slower of the two counts. The
    input is read ahead everywhere.
    """
    is_gpu = device != "cpu"
    ranks = hosts * (GPUS_PER_HOST if is_gpu else 1)
    request = PlanRequest(tables=tables, devices=ranks, hosts=hosts, device=device, host_memory="1TB")
    config = load_config("criteo-1tb", {"train.batch_size_global": str(batch)})
    solution = solve(problem_of(request, config))
    machine, slowest, rows = solution.problem.machine, solution.ranks[solution.bottleneck_rank], batch / hosts
    sent = sent_bytes(solution)
    network = machine.inter_host_bytes_per_s * machine.devices_per_host if is_gpu else host.network
    compute_ms = rows * TRAIN_CORE_US / host.busy_cores / 1000
    if is_gpu:
        compute_ms = slowest.forward_ms + slowest.backward_ms + solution.problem.dense.compute_ms
    ms = {
        "host": HOST_MS[machine.kind],
        "compute": compute_ms,
        "all-to-all": 1000 * (sent["ids"] + sent["embeddings"] + sent["gradients"]) / network,
        "all-reduce": 1000 * sent["dense"] / network,
    }
    input_ms = max(1000 * rows * DATASET_BYTES / host.network, rows * LOADER_CORE_US / host.busy_cores / 1000)
    on_device_ms = sum(value for name, value in ms.items() if name != "host")
    step_ms = max(ms["host"], on_device_ms, input_ms) if is_gpu else max(ms["host"] + on_device_ms, input_ms)
    # Of what takes turns the longest; on GPUs all that they do together is compared with the host.
    longest = max((name for name in ms if name != "host" or not is_gpu), key=lambda name: ms[name])
    limit = "host" if is_gpu and ms["host"] > on_device_ms else longest
    rows_per_s = 1000 * batch / step_ms
    return {
        "hosts": hosts,
        "device": device,
        "ranks": ranks,
        "batch_size_global": batch,
        "kinds": sorted({placed.sharding_type for placed in solution.layout.values()}),
        "sent_bytes": sent,
        "input_bytes": rows * DATASET_BYTES,
        "ms": ms | {"input": input_ms, "step": step_ms},
        "plan_ms": solution.step_ms,
        "rows_per_s": rows_per_s,
        "epoch_hours": TRAIN_ROWS / rows_per_s / 3600,
        "limit": "input" if input_ms == step_ms else limit,
    }


def print_table(columns: dict[str, list[str]]) -> None:
    """As Markdown, so that docs/scaling.md can have it as it is."""
    print("| " + " | ".join(columns) + " |")
    print("| --- |" + " ---: |" * (len(columns) - 1))
    for row in zip(*columns.values(), strict=True):
        print("| " + " | ".join(row) + " |")
    print()


def print_steps(rows: list[dict[str, Any]]) -> None:
    """A line for each step and number of machines."""
    print_table(
        {
            "step": [f"`dlrm {row['step']}`" for row in rows],
            "core-hours": [f"{row['core_hours']:,.1f}" for row in rows],
            "bucket": [f"{row['bytes'] / 1e9:,.0f} GB" for row in rows],
            "machines": [str(row["machines"]) for row in rows],
            "minutes": [f"{row['hours'] * 60:,.1f}" for row in rows],
            "dollars": [f"{row['dollars']:,.2f}" for row in rows],
            "limit": [row["limit"] for row in rows],
        }
    )


def print_training(rows: list[dict[str, Any]]) -> None:
    """A line for each number of hosts."""
    sizes = {"ids": "ids", "embeddings": "embeddings", "gradients": "gradients", "dense": "all-reduce"}
    names = {
        "compute": "compute",
        "all-to-all": "all-to-all",
        "all-reduce": "all-reduce",
        "host": "host",
        "input": "input",
        "step": "step",
    }
    print_table(
        {
            "hosts": [str(row["hosts"]) for row in rows],
            **{f"{name}, MB": [f"{row['sent_bytes'][key] / 1e6:,.1f}" for row in rows] for key, name in sizes.items()},
            "input, MB": [f"{row['input_bytes'] / 1e6:,.1f}" for row in rows],
            **{f"{name}, ms": [f"{row['ms'][key]:,.2f}" for row in rows] for key, name in names.items()},
            "rows/s": [f"{row['rows_per_s']:,.0f}" for row in rows],
            "an epoch": [f"{row['epoch_hours']:,.2f} h" for row in rows],
            "dollars": [f"{row['dollars']:,.2f}" for row in rows],
            "limit": [row["limit"] for row in rows],
        }
    )


def main() -> None:
    """Compute, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cores", type=int, default=Host.cores, help="of a machine")
    parser.add_argument(
        "--core-fraction", type=float, default=Host.core_fraction, help="of the measured rate of a core"
    )
    parser.add_argument("--core-hour", type=float, default=Host.core_hour, help="dollars")
    parser.add_argument("--gpu-hour", type=float, default=4.0, help="dollars, with its part of the host")
    parser.add_argument("--network", type=float, default=8 * Host.network, help="bits a second of a machine")
    parser.add_argument("--machines", type=int, nargs="*", default=[1, 10], help="for the steps")
    parser.add_argument("--hosts", type=int, nargs="*", default=[1, 2, 4, 8, 16, 32, 64], help="for the training")
    parser.add_argument("--device", nargs="*", default=["cpu", "h100-80gb"], help="of the training; GPUs by eight")
    parser.add_argument("--batch", type=int, default=65_536, help="rows of a step over all hosts")
    parser.add_argument("--json", type=Path, help="write everything here, too")
    options = parser.parse_args()
    host = Host(options.cores, options.core_fraction, options.core_hour, options.network / 8)
    steps = [
        step_on(step, machines, host)
        for step in STEPS
        for machines in sorted({min(machines, step.max_machines) for machines in options.machines})
    ]
    steps[len(options.machines) : len(options.machines)] = [
        train_on(machines, options.batch, host) for machines in options.machines
    ]
    print_steps(steps)
    report: dict[str, Any] = {"host": asdict(host), "gpu_hour": options.gpu_hour, "steps": steps, "training": []}
    for device in options.device:
        trainings = [training_on(hosts, device, options.batch, host) for hosts in options.hosts]
        host_hour = host.cores * host.core_hour if device == "cpu" else GPUS_PER_HOST * options.gpu_hour
        rows = [row | {"dollars": row["epoch_hours"] * row["hosts"] * host_hour} for row in trainings]
        print(f"{device}, {options.batch:,} rows a step over all hosts")
        print()
        print_training(rows)
        report["training"] += rows
    if options.json:
        options.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
