"""`dlrm plan`: will the tables fit, where does each go, how fast will a step be; no GPU and no data needed."""

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter

from torchdlrm.cli.options import Flag, Json, Overrides, split_config
from torchdlrm.cli.terminal import print_json, print_table, progress_bars, say
from torchdlrm.config import about_config, load_config
from torchdlrm.errors import ConfigError, DoesNotFitError
from torchdlrm.folders import expect
from torchdlrm.planning.plan_request import PlanRequest
from torchdlrm.storage import mirror
from torchdlrm.toml import toml_text
from torchdlrm.units import show_bytes

if TYPE_CHECKING:
    from torchdlrm.planning.measure import Measurement
    from torchdlrm.sharding.problem import Problem
    from torchdlrm.sharding.solution import Solution

Files = Annotated[tuple[Path, ...] | None, Parameter(consume_multiple=True, negative="")]
Axes = Annotated[tuple[str, ...], Parameter(consume_multiple=True, negative="")]


def plan(
    *config: Overrides,
    request: PlanRequest = PlanRequest(),  # noqa: B008 - frozen, and what the parser fills
    out: Path | None = None,
    html: Path | None = None,
    sweep: Axes = (),
    compare: Files = None,
    measure: Flag = False,
    as_json: Json = False,
) -> None:
    """Show where every table goes on a machine, whether they fit, and how fast a step will be.

    Plans as training does. Any key of the config can be overridden, as in `--train.batch-size-global 65536`.

    Args:
        config: TOML file of the training, every key has its default without it; then keys to override.
        out: Write the plan as JSON: what `dlrm train --plan` follows.
        html: Write the plan as one page with a picture of ranks and tables.
        sweep: Plan for several numbers of devices or batch sizes: devices=1,2,4,8 batch=8192,65536.
        compare: Two files that `--out` wrote, to set side by side.
        measure: Time this machine first, and plan with what it does.
    """
    if compare is not None:
        result = _compare(compare)
    else:
        problem = _problem(config, request, measure=measure)
        result = (
            _sweep(problem, sweep, html)
            if sweep
            else _solve(problem, out, html, show_dims=request.table_bytes is not None, as_json=as_json)
        )
    if as_json:
        print_json(result)


def _problem(tokens: tuple[str, ...], request: PlanRequest, *, measure: bool) -> "Problem":
    expect("dataset", request.dataset)
    expect("run", request.run)
    from torchdlrm.planning.measure import measured
    from torchdlrm.planning.plan import problem_of

    path, overrides = split_config(tokens)
    if {"max-rows", "max_rows"} & overrides.keys():
        raise ConfigError("--max-rows: is called --max-embeddings now")
    if request.run is not None and path is None:
        config = load_config(mirror.fetch(request.run, ["config.toml"]) / "config.toml", overrides, is_of_run=True)
    else:
        config = load_config(path, overrides)
        if path is not None:
            say(about_config(path, overrides))
    problem = problem_of(request, config)
    if measure:
        problem, found = measured(problem, config)
        _show_measurement(problem, found)
    return problem


def _solve(
    problem: "Problem", out: Path | None, html: Path | None, *, show_dims: bool, as_json: bool
) -> dict[str, Any]:
    from torchdlrm.planning.page import plan_page
    from torchdlrm.sharding.plan_file import features_as_dict, plan_as_dict, write_plan
    from torchdlrm.sharding.solution import try_solve

    solution = try_solve(problem)
    if solution is None:
        answer, message = _does_not_fit(problem)
        if as_json:
            print_json(answer)
        raise DoesNotFitError(message)
    _show_solution(solution)
    if show_dims:
        say("smaller tables, for the config of the training:")
        for line in toml_text({"model": {"features": features_as_dict(problem.shape.config)}}).splitlines():
            say(line)
    if out is not None:
        write_plan(out, solution)
        say(f"wrote {out}; dlrm train --plan {out} follows it")
    if html is not None:
        _write_page(html, plan_page(solution))
    return plan_as_dict(solution)


def _show_solution(solution: "Solution") -> None:
    """Show a plan: ranks with bars, tables, totals, how far to trust it."""
    from torchdlrm.planning import report

    say(report.headline(solution))
    ranks = report.rank_rows(solution)
    _print("ranks: memory", [*ranks, report.total_row(solution)], report.MEMORY_COLUMNS)
    _print("ranks: time of a step", ranks, report.TIME_COLUMNS)
    _print("tables (bytes of weights and optimizer state)", report.table_rows(solution))
    for line in report.summary_lines(solution):
        say(line)
    if solution.problem.measured is None:
        say("--measure times the machine at hand")


def _does_not_fit(problem: "Problem") -> tuple[dict[str, Any], str]:
    """Show how much is missing and what helps; return that for JSON, and the message to end with."""
    from torchdlrm.planning import report
    from torchdlrm.planning.remedies import remedies, shortfall
    from torchdlrm.sharding.plan_file import problem_as_dict

    missing = shortfall(problem)
    with progress_bars("") as progress:
        found = remedies(problem, progress)
    _print("largest tables", report.largest_rows(missing))
    if found:
        say("what would make it fit (each planned again to be sure):")
    for number, remedy in enumerate(found, start=1):
        solution = remedy.solution
        full = f"{solution.memory_fraction(solution.fullest_rank):.1%} of the fullest rank"
        say(f"{number}. {remedy.change}")
        say(f"     say    {_as_options(remedy.settings)}")
        say(f"     price  {remedy.price}")
        say(f"     then   {full}, {solution.step_ms:.2f} ms a step, {solution.rows_per_s:,.0f} rows/s")
    answer = problem_as_dict(problem) | {
        "fits": False,
        "shortfall": missing.as_dict(),
        "remedies": [remedy.as_dict() | {"options": _as_options(remedy.settings)} for remedy in found],
    }
    return answer, missing.message(problem)


def _as_options(settings: Mapping[str, object]) -> str:
    """Write settings as they are given to `dlrm plan`."""
    options = []
    for name, value in settings.items():
        option = "--constraint" if name == "constraints" else f"--{name.replace('_', '-')}"
        values = value if isinstance(value, tuple) else (value,)
        options += [f"{option} {shlex.quote(str(part))}" for part in values] or [f"leave out {option}"]
    return " ".join(options)


def _sweep(problem: "Problem", axes: Sequence[str], html: Path | None) -> dict[str, Any]:
    """Show a table and a plot over devices and batch sizes."""
    from torchdlrm.planning import report
    from torchdlrm.planning.page import sweep_page
    from torchdlrm.planning.side_by_side import sweep
    from torchdlrm.sharding.plan_file import problem_as_dict

    points = sweep(problem, axes)
    _print("sweep", report.sweep_rows(points))
    if html is not None:
        _write_page(html, sweep_page(problem, points))
    return {**problem_as_dict(problem), "sweep": points}


def _write_page(path: Path, page: str) -> None:
    from torchdlrm.html import write_page

    write_page(path, page, "html")
    say(f"wrote {path}")


def _compare(paths: Sequence[Path]) -> dict[str, Any]:
    """Show two plans side by side."""
    from torchdlrm.planning.side_by_side import compare_plans, compared_rows

    found = compare_plans(paths)
    values, tables = compared_rows(found, [*map(str, paths)])
    print_table("plans", values)
    print_table("tables that differ", tables)
    if not tables:
        say("every table is in the same place")
    return found


def _show_measurement(problem: "Problem", found: "Measurement") -> None:
    rate, link = problem.machine.memory_bytes_per_s, problem.machine.intra_host_bytes_per_s
    rows = [
        ("look-ups of a rank, forward", found.lookup_forward_ms, "", f"{show_bytes(rate)}/s"),
        ("the same, backward and update", found.lookup_backward_ms, "", ""),
        ("exchange of embeddings", found.exchange_ms, show_bytes(found.exchange_bytes), f"{show_bytes(link)}/s"),
        ("dense parts, with update", found.dense_ms, "", ""),
        ("all-reduce of their gradients", found.all_reduce_ms, "", ""),
    ]
    print_table(
        "measured on this machine",
        [{"": name, "ms": f"{ms:.3f}", "moved": moved, "rate": rate} for name, ms, moved, rate in rows],
    )


def _print(title: str, rows: Sequence[Mapping[str, str]], columns: Sequence[str] = ()) -> None:
    from torchdlrm.planning import report

    print_table(title, rows, columns, left_aligned=report.LEFT_ALIGNED, droppable=report.PICTURES)
