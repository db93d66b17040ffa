"""Finds the plan of a training: the given one, refused if it does not match, or else a new one."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import distributed as dist
from torch import nn
from torchrec.distributed.types import ShardingPlan

from torchdlrm.config import Config
from torchdlrm.errors import PlanError
from torchdlrm.model.architecture import ModelShape
from torchdlrm.sharding.layout import check_layout, layout_of, read_saved_plan, sharding_plan
from torchdlrm.sharding.local_machine import local_machine
from torchdlrm.sharding.machine import Machine
from torchdlrm.sharding.planner import PlanOptions, plan_sharding, tables_of
from torchdlrm.sharding.problem import Problem, Solution, solution_of, solve
from torchdlrm.sharding.tables import Table, tables_of_model
from torchdlrm.units import show_bytes

_MAX_DIM_ON_GPU = 2_048


def load_or_make_plan(
    model: nn.Module,
    config: Config,
    shape: ModelShape,
    *,
    machine: Machine,
    process_group: dist.ProcessGroup | None,
    saved_plan: Path | None,
) -> tuple[ShardingPlan, Solution]:
    """The plan to shard a model by, and what it costs.

    Rank 0 plans for all of the process group, or this process by itself without one; a saved plan every rank reads.

    Raises:
        PlanError: the tables do not fit; or the saved plan is for another model or number of ranks, or does not fit.
    """
    problem = _problem(tables_of(model), machine, config, shape)
    if saved_plan is None:
        found = plan_sharding(model, machine=machine, options=problem.searched_options, process_group=process_group)
        return found.plan, checked(solution_of(problem, layout_of(found.plan), found))
    solution = checked(_saved_solution(saved_plan, problem))
    return sharding_plan(solution.layout, model, machine), solution


def _problem(tables: Sequence[Table], machine: Machine, config: Config, shape: ModelShape) -> Problem:
    return Problem(
        tuple(tables),
        machine,
        PlanOptions.of(config),
        model=config.model,
        num_dense=shape.num_dense,
        architecture=shape.architecture,
        num_embeddings=shape.num_embeddings,
    )


def _saved_solution(path: Path, problem: Problem) -> Solution:
    """The plan in a file and its cost; refused where it is for another model, optimizer, batch or machine."""
    saved = read_saved_plan(path)
    check_layout(saved, problem.tables, problem.machine)
    solution = solution_of(problem, saved.layout, None)
    fullest = solution.fullest_rank
    needed_bytes = solution.ranks[fullest].device_bytes
    if needed_bytes > problem.usable_bytes:
        msg = (
            f"{path}: the plan does not fit this machine: rank {fullest} would need {show_bytes(needed_bytes)} for its "
            f"tables with {problem.options.optimizer.name}, and has {show_bytes(problem.usable_bytes)} "
            f"(sharding.reserved_fraction = {problem.searched_options.reserved_fraction:.4g}); plan again for this "
            "machine and optimizer"
        )
        raise PlanError(msg)
    return solution


def preview_plan(
    config: Config,
    shape: ModelShape,
    num_embeddings: Mapping[str, int],
    *,
    world_size: int,
    local_world_size: int,
    device: torch.device,
) -> Solution:
    """The plan that a training will follow, before any process of it is started.

    Raises:
        PlanError: the tables do not fit; or the given plan is for another model or number of ranks, or does not fit.
    """
    tables = tables_of_model(config.model, num_embeddings)
    machine = local_machine(config.sharding, world_size=world_size, local_world_size=local_world_size, device=device)
    problem = _problem(tables, machine, config, shape)
    path = config.sharding.plan
    return checked(solve(problem) if path is None else _saved_solution(Path(path), problem))


def checked(solution: Solution) -> Solution:
    """The solution itself, refused where FBGEMM would stop at the first step.

    Raises:
        PlanError: a rank of a GPU would hold longer rows than its kernels take.
    """
    if solution.problem.machine.kind == "cuda":
        for name, placed in solution.layout.items():
            dim = max(shard.sizes[1] for shard in placed.shards)
            if dim > _MAX_DIM_ON_GPU:
                msg = (
                    f"{name} has {dim:,} columns on a rank, and FBGEMM's kernels on GPUs take {_MAX_DIM_ON_GPU:,} at "
                    f"most; cut it (sharding.constraints = {name.removeprefix('t_')}=column_wise) or give it a smaller "
                    "model.embedding_dim"
                )
                raise PlanError(msg)
    return solution
