"""Finds remedies when tables do not fit: how much is missing and where, and which changes help, each with its price."""

from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from itertools import islice, product
from typing import Any

from torchdlrm.planning.smaller_tables import changed_features, with_quotients, with_smaller_dims
from torchdlrm.progress import SILENT, ProgressListener
from torchdlrm.sharding.constraints import TABLE_WISE, table_constraints
from torchdlrm.sharding.problem import Problem
from torchdlrm.sharding.solution import Solution, try_solve
from torchdlrm.sharding.tables import cap_embeddings
from torchdlrm.units import show_bytes

_CACHE_FRACTIONS = (0.2, 0.1, 0.05)
_NUM_COLLISIONS = (4, 16, 64)
_MAX_DEVICES = 1_024  # beyond which a search takes minutes
_CAP_FRACTIONS = (0.98, 0.93, 0.85, 0.7, 0.5)


@dataclass(frozen=True)
class Shortfall:
    """How far a problem is from fitting.

    Attributes:
        needed_bytes: weights and optimizer state of all tables.
        usable_bytes: memory for tables of all ranks together.
        missing_bytes: their difference; 0 where the sum would fit, but not in pieces of the sizes there are.
        rank_missing_bytes: of a rank, if all were filled alike.
        largest: names and bytes of the largest tables.
        undividable: tables that are too large for a rank and must not be cut.
    """

    needed_bytes: int
    usable_bytes: int
    missing_bytes: int
    rank_missing_bytes: int
    largest: tuple[tuple[str, int], ...]
    undividable: tuple[str, ...]

    def message(self, problem: Problem) -> str:
        """Say the clear no, in one or two sentences."""
        machine = problem.machine
        head = (
            f"no: {show_bytes(self.needed_bytes)} of weights and state of {problem.optimizer.name} do not fit "
            f"on {machine.num_devices} x {machine.device}, of which {show_bytes(problem.usable_bytes)} each "
            f"({show_bytes(self.usable_bytes)} in all) are for tables: "
        )
        if self.missing_bytes:
            return head + (
                f"{show_bytes(self.missing_bytes)} are missing, {show_bytes(self.rank_missing_bytes)} on every rank"
            )
        if self.undividable:
            return head + f"{', '.join(self.undividable[:3])} must not be cut, and is larger than a rank's memory"
        return head + "the sum would fit, but the tables cannot be cut into pieces that do"

    def as_dict(self) -> dict[str, Any]:
        """Return it for JSON."""
        return {**asdict(self), "largest": [{"table": name, "bytes": size} for name, size in self.largest]}


@dataclass(frozen=True)
class Remedy:
    """A change after which the tables fit: planned again, so known to work.

    Attributes:
        change: what to change.
        settings: the change as fields of a `PlanRequest` or keys of the config, with their values.
        price: what it costs.
        solution: the plan that it leads to.
    """

    change: str
    settings: Mapping[str, object]
    price: str
    solution: Solution

    def as_dict(self) -> dict[str, Any]:
        """Return it for JSON, with the main values of its plan."""
        return {
            "change": self.change,
            "price": self.price,
            "step_ms": self.solution.step_ms,
            "rows_per_s": self.solution.rows_per_s,
            "table_bytes": self.solution.problem.table_bytes,
            "num_devices": self.solution.problem.machine.num_devices,
            "fullest_rank_memory_fraction": self.solution.memory_fraction(self.solution.fullest_rank),
        }


def shortfall(problem: Problem) -> Shortfall:
    """Find how much is missing, and where."""
    usable = problem.all_usable_bytes
    missing = max(0, problem.table_bytes - usable)
    by_size = sorted(problem.table_sizes.items(), key=lambda item: -item[1])
    constraints = table_constraints(problem)
    return Shortfall(
        needed_bytes=problem.table_bytes,
        usable_bytes=usable,
        missing_bytes=missing,
        rank_missing_bytes=-(-missing // problem.machine.num_devices),
        largest=tuple(by_size[:5]),
        undividable=tuple(
            name
            for name, size in by_size
            if size > problem.usable_bytes and constraints[name].sharding_types == [TABLE_WISE]
        ),
    )


def remedies(problem: Problem, progress: ProgressListener = SILENT) -> list[Remedy]:
    """Find everything that makes the tables fit by itself, planned again to be sure."""
    ideas: list[Callable[[Problem], Iterator[Remedy]]] = [
        _more_devices,
        _without_constraints,
        _leaner_optimizer,
        _half_precision,
        _host_memory,
        _fewer_embeddings,
        _smaller_dim,
        _smaller_dims,
        _quotients_and_remainders,
    ]
    progress.start_phase("look for remedies", len(ideas), unit="ideas")
    found: list[Remedy] = []
    for idea in ideas:
        found += islice(idea(problem), 1)
        progress.advance(1)
    return found


def _fitting(problems: Iterable[Problem | None]) -> Iterator[Solution]:
    """The plans of those of the problems that have one, the first one first; the others are planned when asked for."""
    return (solution for problem in problems if problem is not None and (solution := try_solve(problem)) is not None)


def _more_devices(problem: Problem) -> Iterator[Remedy]:
    machine = problem.machine
    per_host = machine.usual_devices_per_host
    least = max(machine.num_devices + 1, -(-problem.table_bytes // max(1, problem.usable_bytes)))
    whole_hosts = -(-max(least, per_host) // per_host) * per_host
    candidates = [*range(least, per_host), *range(whole_hosts, whole_hosts + 4 * per_host, per_host)]
    tried = candidates[:8] if least <= _MAX_DEVICES else []
    for solution in _fitting(replace(problem, machine=machine.resized(num_devices)) for num_devices in tried):
        larger = solution.problem.machine
        extra, times = larger.num_devices - machine.num_devices, larger.num_devices / machine.num_devices
        yield Remedy(
            f"{larger.num_devices} devices (the fewest that do)",
            {"devices": larger.num_devices, "hosts": larger.num_hosts},
            f"{extra} more {machine.device}: {times:.2g} times the rent",
            solution,
        )


def _without_constraints(problem: Problem) -> Iterator[Remedy]:
    for solution in _fitting([replace(problem, constraints=())] if problem.constraints else []):
        cut = [f"{name} {p.sharding_type}" for name, p in solution.layout.items() if p.sharding_type != TABLE_WISE]
        yield Remedy(
            f"no constraints, so that tables can be cut ({_some(cut) or 'all table_wise'})",
            {"constraints": ()},
            "more exchange between ranks; tables are no longer where you wanted them",
            solution,
        )


def _leaner_optimizer(problem: Problem) -> Iterator[Remedy]:
    for solution in _fitting(replace(problem, optimizer=leaner) for leaner in problem.optimizer.leaner()):
        leaner, saved = solution.problem.optimizer, problem.table_bytes - solution.problem.table_bytes
        yield Remedy(
            f"{leaner.name} in place of {problem.optimizer.name}",
            {"optimizer": leaner.name},
            f"{show_bytes(saved)} less; {leaner.trade}",
            solution,
        )


def _half_precision(problem: Problem) -> Iterator[Remedy]:
    for solution in _fitting([replace(problem, precision="float16")] if problem.precision == "float32" else []):
        yield Remedy(
            "float16 weights",
            {"precision": "float16"},
            "weights keep 11 bits, small updates are lost without stochastic rounding (needs a GPU); TorchRec has no "
            "int8 tables for training, and dlrm train keeps float32 ones",
            solution,
        )


def _host_memory(problem: Problem) -> Iterator[Remedy]:
    if problem.machine.kind != "cuda" or problem.cache_fraction is not None:
        return
    # The greedy proposers cut a table by rows before they move it to the host; asked for table-wise alone they move the
    # largest one by one, which is often faster and keeps more tables on the device.
    whole, asked = (f"*={TABLE_WISE}",), problem.constraints
    for fraction in _CACHE_FRACTIONS:
        cached = replace(problem, cache_fraction=fraction)
        solutions = [*_fitting([replace(cached, constraints=(*whole, *asked)), cached])]
        if solutions:
            solution = min(solutions, key=lambda solution: solution.step_ms)
            moved = [name for name, placed in solution.layout.items() if placed.cache_fraction is not None]
            host_bytes = sum(cost.host_bytes for cost in solution.ranks)
            rules = {"constraints": whole} if solution.problem.constraints != asked else {}
            yield Remedy(
                f"{len(moved)} tables in host memory, {fraction:.0%} of their rows cached on the GPU (UVM caching)",
                {"sharding.cache_fraction": fraction, **rules},
                f"{show_bytes(host_bytes)} of host memory; every row that is not cached crosses the host link",
                solution,
            )


def _fewer_embeddings(problem: Problem) -> Iterator[Remedy]:
    """Try the highest cap under which the sum fits, then a little less until a plan is found."""

    def capped(cap: int) -> Problem:
        return replace(problem, tables=tuple(cap_embeddings(problem.tables, max(1, cap))))

    caps = range(1, max(table.rows for table in problem.tables) + 1)
    highest = bisect_right(caps, problem.all_usable_bytes, key=lambda cap: capped(cap).table_bytes)
    for solution in _fitting(capped(int(highest * fraction)) for fraction in _CAP_FRACTIONS):
        cap = max(table.rows for table in solution.problem.tables)
        over = [table for table in problem.tables if table.rows > cap]
        lost = sum(table.rows - cap for table in over)
        yield Remedy(
            f"at most {cap:,} rows a table, as dlrm preprocess can make them: caps "
            f"{_some([table.name for table in over])}",
            {"max_embeddings": cap},
            f"{lost:,} rare ids ({lost / sum(table.rows for table in problem.tables):.0%}) become unknown",
            solution,
        )


def _smaller_dim(problem: Problem) -> Iterator[Remedy]:
    (dim, *others) = {table.dim for table in problem.tables}
    if others or dim % 8:
        return
    halved = replace(problem, tables=tuple(replace(table, dim=dim // 2) for table in problem.tables))
    for solution in _fitting([halved]):
        yield Remedy(
            f"dimension {dim // 2} in place of {dim} (model.dense_arch_layer_sizes must end with it too)",
            {"model.embedding_dim": dim // 2},
            "half the weights of every id; measure what it does to the AUC",
            solution,
        )


def _smaller_dims(problem: Problem) -> Iterator[Remedy]:
    """Try the largest dimensions whose sum fits, then a little less until a plan is found."""
    usable_bytes = problem.all_usable_bytes
    for solution in _fitting(with_smaller_dims(problem, fraction * usable_bytes) for fraction in _CAP_FRACTIONS):
        features, dim = changed_features(problem, solution.problem), problem.shape.config.embedding_dim
        yield Remedy(
            f"smaller dimensions for {len(features)} large tables, projected to {dim}",
            {f"model.features.{name}.embedding_dim": feature.embedding_dim for name, feature in features.items()},
            f"{_saved(problem, solution)}; rare values share fewer columns: measure what it does to the AUC",
            solution,
        )


def _quotients_and_remainders(problem: Problem) -> Iterator[Remedy]:
    """Try the fewest collisions, in as few tables, whose sum fits; then more."""
    usable_bytes = problem.all_usable_bytes
    tried = product(_NUM_COLLISIONS, _CAP_FRACTIONS[:3])
    for solution in _fitting(with_quotients(problem, fraction * usable_bytes, number) for number, fraction in tried):
        settings: dict[str, object] = {}
        features = changed_features(problem, solution.problem)
        for name, feature in features.items():
            settings[f"model.features.{name}.quotient_remainder"] = feature.quotient_remainder
            settings[f"model.features.{name}.num_collisions"] = number = feature.num_collisions
        yield Remedy(
            f"two tables, of quotients and of remainders by {number}, for each of the {len(features)} largest",
            settings,
            f"{_saved(problem, solution)}; {number} values have a row in common: measure what it does to the AUC",
            solution,
        )


def _saved(problem: Problem, solution: Solution) -> str:
    after = solution.problem.table_bytes
    return f"{show_bytes(problem.table_bytes - after)} less, so {show_bytes(after)} of weights and state"


def _some(names: list[str]) -> str:
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
