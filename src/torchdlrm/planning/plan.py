"""Turns a request for a plan into a `Problem` and its `Solution`: what `dlrm plan` does, as one function."""

from dataclasses import replace
from pathlib import Path

from torchdlrm.config import Config, load_config
from torchdlrm.data.dataset import Dataset
from torchdlrm.errors import ConfigError, PlanError
from torchdlrm.features.schema import NUM_CRITEO_DENSE
from torchdlrm.features.tables import check_features, feature_tables, features_of_sizes, sparse_features
from torchdlrm.model.architecture import Architecture, ModelShape
from torchdlrm.model.model_class import architecture_of
from torchdlrm.planning.measure import measured
from torchdlrm.planning.plan_request import PlanRequest
from torchdlrm.planning.smaller_tables import ALPHA, with_smaller_dims
from torchdlrm.sharding.local_machine import local_machine
from torchdlrm.sharding.machine import Machine, device_named
from torchdlrm.sharding.plan_json import read_plan
from torchdlrm.sharding.problem import Problem
from torchdlrm.sharding.solution import Solution, solve
from torchdlrm.sharding.tables import (
    PRESETS,
    Table,
    cap_embeddings,
    check_tables,
    feature_of,
    features_of,
    preset_tables,
    read_tables,
    tables_of_model,
    with_features,
)
from torchdlrm.toml import is_preset
from torchdlrm.training.processes.device import rank_device
from torchdlrm.training.processes.library_noise import silenced_libraries
from torchdlrm.training.run import Run, fetch_run
from torchdlrm.units import parse_bytes, show_bytes

THIS_MACHINE = "here"
_SIZES = {
    "hbm": "hbm_bytes",
    "host_memory": "host_memory_bytes",
    "hbm_bandwidth": "memory_bytes_per_s",
    "host_link_bandwidth": "host_link_bytes_per_s",
    "intra_host_bandwidth": "intra_host_bytes_per_s",
    "inter_host_bandwidth": "inter_host_bytes_per_s",
}


def plan(request: PlanRequest, config: Config | None = None, *, measure: bool = False) -> Solution:
    """Place tables on a machine that need not be there, by the function that training plans with.

        >>> solution = plan(PlanRequest(tables="criteo-1tb-40m", devices=8))
        >>> solution.layout["t_cat_0"].sharding_type, solution.layout["t_cat_0"].ranks
        ('table_wise', [0])
        >>> f"{solution.memory_fraction(solution.fullest_rank):.0%}"
        '84%'

    Args:
        request: tables and machine.
        config: of the training; that of the run where the request names one, else the defaults.
        measure: time this machine first, in as many processes as there are ranks, and plan with what it does.

    Raises:
        DoesNotFitError: the tables do not fit; `torchdlrm.planning.remedies` says what would make them fit.
        PlanError: the request is wrong, or contradicts itself.
    """
    if config is None:
        config = Run.open(request.run).config if request.run else load_config(None)
    problem = problem_of(request, config)
    return solve(measured(problem, config)[0] if measure else problem)


@silenced_libraries()
def problem_of(request: PlanRequest, config: Config) -> Problem:
    """Make the problem that a request and a config describe.

    Raises:
        PlanError: the request is wrong, or contradicts itself.
        DatasetError: the dataset is damaged.
        ConfigError: there is no such label or model class, or the class fails in a step on a few rows.
        RunError: the run was trained with another model class.
    """
    if request.alpha is not None and request.table_bytes is None:
        raise PlanError("`alpha`: says how fast dimensions fall under `table_bytes`; give that too")
    if request.alpha is not None and not 0 <= request.alpha <= 10:
        raise PlanError(f"`alpha`: must be from 0 to 10, got {request.alpha:g}")
    machine = _machine(request, config)
    dataset = None if request.dataset is None else Dataset.open(request.dataset).with_labels(config.train.label_names)
    tables, model = _tables(request, config, dataset), config.model
    sizes = features_of(tables, model)
    if dataset is not None:
        named = sparse_features(dataset.schema, dataset.num_embeddings)
        features = tuple(replace(feature, num_ids=sizes[feature.table or feature.name]) for feature in named)
    else:
        features = features_of_sizes(sizes, {feature_of(table) for table in tables if table.pooling_factor > 1})
    if request.run is None:
        check_features(model, features)
    shape = ModelShape(
        model,
        # Tables alone do not say; of a run or a list of tables it is taken to be Criteo's.
        NUM_CRITEO_DENSE if dataset is None else len(dataset.dense_names),
        len(features) + (0 if dataset is None else len(dataset.schema.content)),
        _architecture(request, config),
        is_weighted=dataset is not None and dataset.schema.has_value_weights,
        known_features=features,
        content=() if dataset is None else dataset.schema.content,
        labels=config.train.label_names,
    )
    shape.architecture.check(shape)
    multi_valued = {feature.name for feature in features if feature.is_multi_valued}
    # Tables of a run may be smaller already: then nothing changes.
    problem = Problem.of(config, with_features(tables, model), machine, shape)
    optimizer = config.table_optimizer
    problem = replace(
        problem,
        optimizer=optimizer.model_copy(update={"name": request.optimizer or optimizer.name}).record,
        constraints=(*problem.constraints, *request.constraints),  # of rules for the same table the last one counts
        precision=request.precision,
        multi_valued=frozenset(table.name for table in shape.tables if table.feature in multi_valued),
    )
    return problem if request.table_bytes is None else _smaller(problem, request)


def _smaller(problem: Problem, request: PlanRequest) -> Problem:
    """The problem with the dimensions that a number of bytes allows."""
    assert request.table_bytes is not None
    max_bytes = parse_bytes(request.table_bytes, "table_bytes")
    found = with_smaller_dims(problem, max_bytes, ALPHA if request.alpha is None else request.alpha)
    if found is None:
        raise PlanError(
            f"`table_bytes`: even with dimension 4 the tables take more than {show_bytes(max_bytes)} with state of "
            f"{problem.optimizer.name}; allow more, or fewer rows (`max_embeddings`)"
        )
    return found


def _architecture(request: PlanRequest, config: Config) -> Architecture:
    """That of the model class; of a run the one that it was trained with."""
    architecture = architecture_of(
        config.model, request.model_class, may_have_changed=request.allow_changed_model_class
    )
    if request.run is not None:
        Run.open(request.run).require(architecture)
    return architecture


def _machine(request: PlanRequest, config: Config) -> Machine:
    devices, hosts, sharding = request.num_devices, request.hosts, config.sharding
    if devices < 1:
        raise PlanError(f"`devices`: must be at least 1, got {devices}")
    if hosts is not None and (hosts < 1 or devices % hosts):
        raise PlanError(f"`hosts`: {devices} devices cannot be spread evenly over {hosts} hosts")
    if request.device_name == THIS_MACHINE:
        local_world_size = devices // (hosts or 1)
        try:
            device = rank_device(0, local_world_size, config.train.device)
        except ConfigError as error:
            raise PlanError(f"{error}; or name a machine that need not be here (`device`)") from error
        machine = local_machine(sharding, world_size=devices, local_world_size=local_world_size, device=device)
    else:
        machine = device_named(request.device_name).spread(devices, hosts)
        machine = replace(
            machine,
            hbm_bytes=(sharding.hbm_bytes or machine.hbm_bytes) if machine.kind == "cuda" else 0,
            host_memory_bytes=sharding.host_memory_bytes or machine.host_memory_bytes,
        )
    return _with_sizes(machine, request)


def _with_sizes(machine: Machine, request: PlanRequest) -> Machine:
    """Return the machine with the memory and the rates that the request gives."""
    given = ((name, getattr(request, name)) for name in _SIZES)
    sizes = {_SIZES[name]: parse_bytes(text, name) for name, text in given if text is not None}
    if "hbm_bytes" in sizes and machine.kind != "cuda":
        raise PlanError(f"`hbm`: {machine.device} has no memory of its own; `host_memory` says what its host has")
    if "host_memory_bytes" in sizes:
        sizes["host_memory_bytes"] //= machine.devices_per_host
    return replace(machine, **sizes)  # type: ignore[arg-type]  # none is a name


def _tables(request: PlanRequest, config: Config, dataset: Dataset | None) -> list[Table]:
    """The tables that are asked for, with one of dimension D for each feature but where a run has other ones."""
    dim = config.model.embedding_dim
    given = [name for name in ("dataset", "run", "tables") if getattr(request, name) is not None]
    if len(given) != 1:
        raise PlanError(
            f"{' and '.join(f'`{name}`' for name in given) or 'no tables'}: give one of `dataset`, `run` and `tables` "
            f"({', '.join(PRESETS)}, or a CSV or JSON file of rows, dim, pooling_factor)"
        )
    if dataset is not None:
        features = sparse_features(dataset.schema, dataset.num_embeddings)
        extra = _architecture(request, config).tables(features)
        tables = tables_of_model(feature_tables(config.model.with_features({}), features, extra))
    elif request.run is not None:
        tables = [
            Table(name, placed["rows"], placed["dim"], placed["pooling_factor"])
            for name, placed in read_plan(fetch_run(request.run) / "plan.json")["tables"].items()
        ]
    else:
        assert request.tables is not None
        path = Path(request.tables)
        is_file = not is_preset(request.tables, PRESETS) and path.is_file()
        tables = read_tables(path, dim) if is_file else preset_tables(request.tables, dim)
    if request.max_embeddings is not None:
        if request.max_embeddings < 1:
            raise PlanError(f"`max_embeddings`: must be at least 1, got {request.max_embeddings}")
        tables = cap_embeddings(tables, request.max_embeddings)
    check_tables(tables, "the model")
    return tables
