"""Checks that all machines were started with the same settings, before their processes talk to each other.

In: what each machine was started with, as name -> value, through the launcher's store.  Out: nothing, or the same
refusal in every process, with each setting that differs, its values and the machines that have them. The processes of
one machine have their settings from one command, so each machine reports once. Learning rates, seeds or optimizers that
differ would otherwise train together silently, and batch sizes or intervals fail with an obscure gloo error.
"""

import json
import os
import socket
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import distributed as dist

from torchdlrm.config import Config, setting_values
from torchdlrm.data.dataset import Dataset
from torchdlrm.errors import ConfigError, LostProcessError, UserError
from torchdlrm.files import sha256_of
from torchdlrm.model.architecture import Architecture
from torchdlrm.model.model_class import record_of
from torchdlrm.storage.mirror import fetch
from torchdlrm.storage.places import located
from torchdlrm.training.changes import shown
from torchdlrm.training.environment import versions

# Machines import torch at different speeds, which a short `train.timeout_s` must not call a lost process.
_LEAST_WAIT_S = 60.0
# The arguments of `launch`; torch's launcher lets a node that asks for three into a group of two.
NNODES_VARIABLE = "TORCHDLRM_NNODES"
# Names the call of `launch` on this machine that has started a process, and starts it again after another has died.
LAUNCHER_VARIABLE = "TORCHDLRM_LAUNCHER"


class Setting(NamedTuple):
    """What must be the same everywhere, and how a message shows it; a path may differ where its content does not."""

    compared: str
    shown: str


Settings = Mapping[str, Setting]


def settings_of(
    config: Config, dataset: Dataset, architecture: Architecture, *, restart: bool, from_run: str | Path | None = None
) -> Settings:
    """What a training was started with: every key of the config, the content of dataset, plan and model class."""
    found = {name: _plain(value) for name, value in setting_values(config).items()}
    if config.sharding.plan is not None:
        found["sharding.plan"] = _content(fetch(located(config.sharding.plan)))
    record = record_of(architecture)
    if record is not None:
        found["`model_class`"] = Setting(f"{record.name} {record.sha256}", f"{record.name} (sha256 {record.sha256})")
    if from_run is not None:
        found["`from_run`"] = Setting("a run", str(from_run))  # whose checkpoint rank 0 chooses and all verify
    return found | {"`dataset`": _content(dataset.path / "dataset.json"), "`restart`": _plain(restart)}


def agree(
    store: "dist.Store",  # type: ignore[name-defined]
    describe: Callable[[], Settings],
    *,
    device: torch.device,
    timeout_s: float,
) -> None:
    """Return once every machine was found to have the same settings, else raise in every process of every machine.

    Args:
        store: of this start of the job alone.
        describe: gives this machine's settings; a UserError that it raises is reported on all machines.
        device: where this process computes.
        timeout_s: how long to wait for the other machines.

    Raises:
        UserError: settings differ, or a machine cannot take part.
        LostProcessError: a machine does not come.
    """
    node, num_nodes = _node()
    mine: dict[str, Any] = {"host": socket.gethostname()}
    problem: UserError | None = None
    try:
        mine["settings"] = {**describe(), **_of_this_process(device)}
    except UserError as error:
        problem, mine["problem"] = error, str(error)
    if os.environ["LOCAL_RANK"] == "0":
        store.set(str(node), json.dumps(mine))
    names = [str(other) for other in range(num_nodes)]
    try:
        store.wait(names, timedelta(seconds=max(timeout_s, _LEAST_WAIT_S)))
    except RuntimeError as error:
        missing = ", ".join(name for name in names if not store.check([name]))
        msg = f"node {missing} of {num_nodes} has joined the job and then said nothing for {timeout_s:g} s"
        raise LostProcessError(msg) from error
    if problem is None:
        found = find_problems([json.loads(store.get(name)) for name in names], node)
        problem = ConfigError("\n  ".join(found)) if found else None
    if problem is not None:
        raise problem.everywhere()


def find_problems(records: Sequence[Mapping[str, Any]], this_node: int) -> list[str]:
    """What keeps machines from training together, in lines; none where they can.

    Args:
        records: of each machine in order of its number: `host`, and either `settings` or the `problem` that it has.
        this_node: the number of the machine that the lines are for.
    """
    called = [
        f"node {node} ({record['host']}{', this one' if node == this_node else ''})"
        for node, record in enumerate(records)
    ]
    lines = [f"{called[node]}: {record['problem']}" for node, record in enumerate(records) if "problem" in record]
    if lines:
        return ["another machine of this training cannot start:", *lines]
    for name in dict.fromkeys(name for record in records for name in record["settings"]):
        nodes_by_value: dict[str, list[str]] = {}
        shown_by_value: dict[str, str] = {}
        for node, record in enumerate(records):
            compared, shown = record["settings"].get(name, ("missing", "missing"))
            nodes_by_value.setdefault(compared, []).append(called[node])
            shown_by_value.setdefault(compared, shown)
        if len(nodes_by_value) > 1:
            lines.append(f"{name}: " + "; ".join(_who(shown_by_value[k], nodes) for k, nodes in nodes_by_value.items()))
    start = "the machines of this training were started with different settings:"
    return [start, *lines, "start the same command on each, with the same versions"] if lines else []


def _who(shown: str, nodes: Sequence[str]) -> str:
    named = ", ".join(nodes[:3])
    return f"{shown} on {named}" + (f" and {len(nodes) - 3} more" if len(nodes) > 3 else "")


def _node() -> tuple[int, int]:
    """Which machine this is, and of how many; launchers other than torch's (Slurm, MPI) only number the processes."""
    rank, world_size, local = (int(os.environ[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"))
    return int(os.environ.get("GROUP_RANK", rank // local)), int(
        os.environ.get("GROUP_WORLD_SIZE", world_size // local)
    )


def _of_this_process(device: torch.device) -> Settings:
    """What the launcher has set, and the versions that compute."""
    found = {f"version of {name}": text for name, text in versions().items()}
    found["version of python"] = found["version of python"].rpartition(".")[0]  # patches of Python compute alike
    found |= {"`nproc_per_node`": os.environ["LOCAL_WORLD_SIZE"], "device": device.type}
    found |= {"`nnodes`": os.environ.get(NNODES_VARIABLE, str(_node()[1]))}
    found |= {"`max_restarts`": os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0")}
    return {name: _plain(value) for name, value in found.items()}


def _plain(value: object) -> Setting:
    return Setting(str(shown(value)), str(shown(value)))


def _content(path: Path) -> Setting:
    """A file, compared by its bytes."""
    try:
        digest = sha256_of(path)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from error
    return Setting(digest, f"{path} (sha256 {digest[:12]})")
