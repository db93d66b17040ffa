"""Plans the same tables for several numbers of devices and several batch sizes."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from torchdlrm.errors import PlanError
from torchdlrm.planning.remedies import shortfall
from torchdlrm.sharding.problem import Problem, Solution, try_solve


@dataclass(frozen=True)
class SweepPoint:
    """One of the machines of a sweep, and the plan for it.

    Attributes:
        num_devices: ranks.
        batch_size_global: rows per step.
        solution: the plan; None where the tables do not fit.
        missing_bytes: what is missing where they do not.
    """

    num_devices: int
    batch_size_global: int
    solution: Solution | None
    missing_bytes: int

    @property
    def rows_per_device_hour(self) -> float | None:
        """Rows for an hour of one device: what the rent buys."""
        return 3600 * self.solution.rows_per_s / self.num_devices if self.solution else None

    def as_dict(self) -> dict[str, Any]:
        """Return it for JSON."""
        point: dict[str, Any] = {"num_devices": self.num_devices, "batch_size_global": self.batch_size_global}
        if self.solution is None:
            return point | {"fits": False, "missing_bytes": self.missing_bytes}
        return point | {
            "fits": True,
            "fullest_rank_memory_fraction": self.solution.memory_fraction(self.solution.fullest_rank),
            "step_ms": self.solution.step_ms,
            "rows_per_s": self.solution.rows_per_s,
            "rows_per_device_hour": self.rows_per_device_hour,
        }


def parse_sweep(axes: Sequence[str]) -> dict[str, list[int]]:
    """Read axes such as `devices=1,2,4` and `batch=8192,65536`.

    Raises:
        PlanError: an axis is none of these.
    """
    parsed: dict[str, list[int]] = {}
    for axis in axes:
        name, _, values = axis.partition("=")
        try:
            numbers = [int(value) for value in values.split(",")]
        except ValueError:
            numbers = []
        if name not in {"devices", "batch"} or not numbers or min(numbers) < 1:
            msg = f"`sweep`: {axis!r}: expected devices=1,2,4,8 or batch=8192,65536 with numbers above zero"
            raise PlanError(msg)
        parsed[name] = numbers
    return parsed


def run_sweep(problem: Problem, axes: dict[str, list[int]]) -> list[SweepPoint]:
    """Plan for every pair of a number of devices and a batch size.

    Raises:
        PlanError: a number of devices cannot be spread evenly over hosts.
    """
    return [
        _point(replace(problem, machine=problem.machine.resized(num_devices)).with_options(batch_size_global=batch))
        for batch in axes.get("batch", [problem.options.batch_size_global])
        for num_devices in axes.get("devices", [problem.machine.num_devices])
    ]


def _point(problem: Problem) -> SweepPoint:
    solution = try_solve(problem)
    missing_bytes = 0 if solution else shortfall(problem).missing_bytes
    return SweepPoint(problem.machine.num_devices, problem.options.batch_size_global, solution, missing_bytes)
