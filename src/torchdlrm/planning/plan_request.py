"""What a user asks on the command line -> a `Problem`: which tables, which machine, which options."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from torchdlrm.config import Config
from torchdlrm.data.dataset import Dataset
from torchdlrm.errors import PlanError
from torchdlrm.sharding.devices import device_named
from torchdlrm.sharding.layout import read_plan
from torchdlrm.sharding.planner import PlanOptions
from torchdlrm.sharding.problem import Problem
from torchdlrm.sharding.tables import (
    PRESETS,
    Optimizer,
    Precision,
    Table,
    cap_rows,
    check_tables,
    feature_tables,
    preset_tables,
    read_tables,
)
from torchdlrm.sharding.topology import Machine, local_machine, machine_of
from torchdlrm.units import parse_bytes

THIS_MACHINE = "here"
_RATES = {
    "hbm_bandwidth": "memory_bytes_per_s",
    "host_link_bandwidth": "host_link_bytes_per_s",
    "intra_host_bandwidth": "intra_host_bytes_per_s",
    "inter_host_bandwidth": "inter_host_bytes_per_s",
}


@dataclass(frozen=True)
class MachineSpec:
    """The machine as it was asked for.

    Attributes:
        device: a name of `torchdlrm.sharding.devices`, or `here`.
        num_devices: ranks.
        num_hosts: hosts; None: as many as the device's usual machine makes of them.
        sizes: such as `hbm`, with their text.
    """

    device: str
    num_devices: int
    num_hosts: int | None
    sizes: Mapping[str, str]


def resolve_machine(asked: MachineSpec, config: Config) -> Machine:
    """The machine to plan for.

    Raises:
        PlanError: the device is unknown, or a size is wrong.
    """
    if asked.num_devices < 1:
        msg = f"--devices: must be at least 1, got {asked.num_devices}"
        raise PlanError(msg)
    if asked.num_hosts is not None and (asked.num_hosts < 1 or asked.num_devices % asked.num_hosts):
        msg = f"--hosts: {asked.num_devices} devices cannot be spread evenly over {asked.num_hosts} hosts"
        raise PlanError(msg)
    if asked.device == THIS_MACHINE:
        hosts = asked.num_hosts or 1
        on_gpu = torch.cuda.is_available() and torch.cuda.device_count() >= asked.num_devices // hosts
        machine = local_machine(
            config.sharding,
            world_size=asked.num_devices,
            local_world_size=asked.num_devices // hosts,
            device=torch.device("cuda", 0) if on_gpu else torch.device("cpu"),
        )
    else:
        machine = machine_of(device_named(asked.device), num_devices=asked.num_devices, num_hosts=asked.num_hosts)
        machine = replace(
            machine,
            hbm_bytes=(config.sharding.hbm_bytes or machine.hbm_bytes) if machine.kind == "cuda" else 0,
            host_memory_bytes=config.sharding.host_memory_bytes or machine.host_memory_bytes,
        )
    return _with_sizes(machine, asked.sizes)


def _with_sizes(machine: Machine, sizes: Mapping[str, str]) -> Machine:
    parsed = {option: parse_bytes(text, option) for option, text in sizes.items()}
    if "hbm" in parsed and machine.kind != "cuda":
        msg = f"--hbm: {machine.device} has no memory of its own; --host-memory says what its host has"
        raise PlanError(msg)
    changes: dict[str, float] = {field: parsed[option] for option, field in _RATES.items() if option in parsed}
    return replace(
        machine,
        hbm_bytes=parsed.get("hbm", machine.hbm_bytes),
        host_memory_bytes=parsed["host_memory"] // machine.devices_per_host
        if "host_memory" in parsed
        else machine.host_memory_bytes,
        **changes,  # type: ignore[arg-type]  # all of them rates
    )


def resolve_tables(
    config: Config, *, dataset: Path | None, run: Path | None, named: str | None, max_rows: int | None
) -> tuple[Table, ...]:
    """The tables to plan for.

    Args:
        config: gives the dimension.
        dataset: folder written by `dlrm preprocess`.
        run: folder written by `dlrm train`.
        named: a preset or a file.
        max_rows: cap for every table.

    Raises:
        PlanError: none or several of them are given, or the tables are wrong.
        DatasetError: the dataset is not whole.
    """
    given = [name for name, value in (("--dataset", dataset), ("--run", run), ("--tables", named)) if value is not None]
    if len(given) != 1:
        msg = (
            f"{' and '.join(given) or 'no tables'}: give one of --dataset, --run and --tables "
            f"({', '.join(PRESETS)}, or a CSV or JSON file of rows, dim, pooling_factor)"
        )
        raise PlanError(msg)
    dim = config.model.embedding_dim
    if dataset is not None:
        tables = feature_tables(Dataset.open(dataset).num_embeddings, dim)
    elif run is not None:
        tables = [
            Table(name, placed["rows"], placed["dim"], placed["pooling_factor"])
            for name, placed in read_plan(run / "plan.json")["tables"].items()
        ]
    else:
        assert named is not None
        path = Path(named)
        tables = read_tables(path, dim) if path.is_file() else preset_tables(named, dim)
    if max_rows is not None:
        if max_rows < 1:
            msg = f"--max-rows: must be at least 1, got {max_rows}"
            raise PlanError(msg)
        tables = cap_rows(tables, max_rows)
    check_tables(tables, "the model")
    return tuple(tables)


def resolve_problem(
    config: Config,
    tables: tuple[Table, ...],
    machine: Machine,
    *,
    optimizer: Optimizer | None,
    precision: Precision,
    constraints: tuple[str, ...],
) -> Problem:
    """The problem, with options from the config and from the command line.

    Args:
        config: of the training.
        tables: of the model.
        machine: the ranks.
        optimizer: in place of the config's, also one that only plans know.
        precision: of the weights.
        constraints: rules beside the config's; later ones count.
    """
    options = PlanOptions.of(config)
    options = replace(
        options, optimizer=optimizer or options.optimizer, constraints=(*options.constraints, *constraints)
    )
    return Problem(tables, machine, options, precision, config.model)
