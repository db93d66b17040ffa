"""Finds the plan of a training: the given one, refused if it does not match, or else a new one."""

from collections.abc import Iterable
from pathlib import Path

from torch import distributed as dist

from torchdlrm.config import Config
from torchdlrm.errors import PlanError
from torchdlrm.model.architecture import ModelShape
from torchdlrm.sharding.layout import Found
from torchdlrm.sharding.machine import Machine
from torchdlrm.sharding.plan_file import read_layout
from torchdlrm.sharding.problem import Problem
from torchdlrm.sharding.solution import Solution, shard_costs, solve
from torchdlrm.sharding.tables import Table
from torchdlrm.storage.mirror import fetch
from torchdlrm.storage.places import located
from torchdlrm.units import show_bytes

_MAX_DIM_ON_GPU = 2_048


def plan_of_training(
    config: Config,
    shape: ModelShape,
    tables: Iterable[Table],
    machine: Machine,
    process_group: dist.ProcessGroup | None = None,
) -> Solution:
    """The plan that a training follows, `sharding.plan` or a new one, and what it costs.

    Args:
        config: of the training.
        shape: of the model.
        tables: of the model.
        machine: the ranks.
        process_group: rank 0 plans for all of it, and every rank reads a saved plan; None: before any is started.

    Raises:
        PlanError: the tables do not fit; or the saved plan is for another model or number of ranks, or does not fit.
    """
    problem = Problem.of(config, tables, machine, shape)
    plan = config.sharding.plan
    return checked(solve(problem, process_group) if plan is None else _saved_solution(fetch(located(plan)), problem))


def _saved_solution(path: Path, problem: Problem) -> Solution:
    """The plan in a file and its cost; refused where it is for another model, optimizer, batch or machine."""
    layout = read_layout(path, problem.tables, problem.machine)
    solution = Solution(problem, Found(layout), shard_costs(problem, layout))
    fullest = solution.fullest_rank
    needed_bytes = solution.ranks[fullest].device_bytes
    if needed_bytes > problem.usable_bytes:
        raise PlanError(
            f"{path}: the plan does not fit this machine: rank {fullest} would need {show_bytes(needed_bytes)} for its "
            f"tables with {problem.optimizer.name}, and has {show_bytes(problem.usable_bytes)} "
            f"(sharding.reserved_fraction = {problem.reserved_fraction:.4g}); plan again for this "
            "machine and optimizer"
        )
    return solution


def checked(solution: Solution) -> Solution:
    """The solution itself, refused where FBGEMM would stop at the first step.

    Raises:
        PlanError: a rank of a GPU would hold longer rows than its kernels take.
    """
    if solution.problem.machine.kind == "cuda":
        for name, placed in solution.layout.items():
            dim = max(shard.sizes[1] for shard in placed.shards)
            if dim > _MAX_DIM_ON_GPU:
                raise PlanError(
                    f"{name} has {dim:,} columns on a rank, and FBGEMM's kernels on GPUs take {_MAX_DIM_ON_GPU:,} at "
                    f"most; cut it (sharding.constraints = {name.removeprefix('t_')}=column_wise) or give it a smaller "
                    "model.embedding_dim"
                )
    return solution
