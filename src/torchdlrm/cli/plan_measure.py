"""`dlrm plan --measure`: time this machine with as many processes as the plan has ranks."""

from rich.table import Table

from torchdlrm.cli.terminal import console
from torchdlrm.config import Config
from torchdlrm.errors import PlanError
from torchdlrm.planning.measure import Measurement, measure
from torchdlrm.sharding.estimate import NUM_DENSE_FEATURES
from torchdlrm.sharding.problem import Problem
from torchdlrm.training.compute import useful_threads
from torchdlrm.training.launch import Processes, launch
from torchdlrm.training.process_group import join_process_group
from torchdlrm.units import show_bytes


def measured(problem: Problem, config: Config) -> Problem:
    """The problem with the machine's own rates.

    Raises:
        PlanError: the plan is for another machine than this one.
    """
    if problem.machine.num_hosts != 1 or problem.machine.device not in {"cpu", "here"} | _gpus():
        msg = f"--measure: times this machine, not {problem.machine.device}; give --device here and one host"
        raise PlanError(msg)
    found: Measurement = launch(_work, problem, config, processes=Processes(problem.machine.num_devices))
    after = found.apply(problem)
    table = Table(title="measured on this machine", title_justify="left")
    for name in ("", "ms", "moved", "rate"):
        table.add_column(name, justify="right" if name else "left")
    rate, link = after.machine.memory_bytes_per_s, after.machine.intra_host_bytes_per_s
    sent = show_bytes(found.exchange_bytes)
    table.add_row("look-ups of a rank, forward", f"{found.lookup_forward_ms:.3f}", "", f"{show_bytes(rate)}/s")
    table.add_row("the same, backward and update", f"{found.lookup_backward_ms:.3f}", "", "")
    table.add_row("exchange of embeddings", f"{found.exchange_ms:.3f}", sent, f"{show_bytes(link)}/s")
    table.add_row("dense parts, with update", f"{found.dense_ms:.3f}", "", "")
    table.add_row("all-reduce of their gradients", f"{found.all_reduce_ms:.3f}", "", "")
    console.print(table)
    return after


def _work(problem: Problem, config: Config) -> Measurement:
    import torch

    with join_process_group() as ranks:
        if ranks.device.type == "cpu":
            threads = config.train.num_threads or useful_threads(
                config, NUM_DENSE_FEATURES, len(problem.tables), ranks.world_size
            )
            torch.set_num_threads(threads)
        return measure(problem, config, ranks.device)


def _gpus() -> set[str]:
    import torch

    from torchdlrm.sharding.devices import device_of_gpu

    if not torch.cuda.is_available():
        return set()
    properties = torch.cuda.get_device_properties(0)
    return {device_of_gpu(properties.name, properties.total_memory).name}
