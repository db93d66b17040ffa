"""`dlrm plan`: will the tables fit, where does each go, how fast will a step be; no GPU and no data needed."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter

from torchdlrm.cli.overrides import Overrides, split_config
from torchdlrm.cli.plan_options import PlanRequest
from torchdlrm.cli.terminal import Json, console, print_json, progress_bars
from torchdlrm.config import load_config

if TYPE_CHECKING:
    from torchdlrm.sharding.problem import Problem

Files = Annotated[tuple[Path, ...] | None, Parameter(consume_multiple=True, negative="")]
Axes = Annotated[tuple[str, ...], Parameter(consume_multiple=True, negative="")]


def plan(
    *config: Overrides,
    ask: PlanRequest = PlanRequest(),  # noqa: B008 - frozen, and what the parser fills
    out: Path | None = None,
    html: Path | None = None,
    sweep: Axes = (),
    compare: Files = None,
    measure: Annotated[bool, Parameter(negative="")] = False,
    as_json: Json = False,
) -> None:
    """Show where every table goes on a machine, whether they fit, and how fast a step will be.

    Plans as training does. Any key of the config can be overridden, as in `--train.batch-size-global 65536`.

    Args:
        *config: TOML file of the training, every key has its default without it; then keys to override.
        ask: tables and machine.
        out: Write the plan as JSON: what `dlrm train --plan` obeys.
        html: Write the plan as one page with a picture of ranks and tables.
        sweep: Plan for several numbers of devices or batch sizes: devices=1,2,4,8 batch=8192,65536.
        compare: Two files that `--out` wrote, to set side by side.
        measure: Time this machine first, and plan with what it does.
        as_json: Print one JSON object on standard output.
    """
    from torchdlrm.cli import plan_tables as show

    if compare is not None:
        result = show.comparison(compare)
    else:
        problem = _problem(config, ask, measure=measure)
        result = show.sweep(problem, sweep, html) if sweep else _one_plan(problem, out, html, as_json=as_json)
    if as_json:
        print_json(result)


def _problem(tokens: tuple[str, ...], ask: PlanRequest, *, measure: bool) -> "Problem":
    from torchdlrm.planning import plan_request

    path, overrides = split_config(tokens)
    of_run = ask.run is not None and path is None
    settings = load_config(ask.run / "config.toml" if ask.run and of_run else path, overrides, is_of_run=of_run)
    machine = plan_request.resolve_machine(
        plan_request.MachineSpec(ask.device_name, ask.num_devices, ask.hosts, ask.sizes), settings
    )
    tables = plan_request.resolve_tables(
        settings, dataset=ask.dataset, run=ask.run, named=ask.tables, max_rows=ask.max_rows
    )
    problem = plan_request.resolve_problem(
        settings, tables, machine, optimizer=ask.optimizer, precision=ask.precision, constraints=ask.constraint
    )
    if not measure:
        return problem
    from torchdlrm.cli.plan_measure import measured

    return measured(problem, settings)


def _one_plan(problem: "Problem", out: Path | None, html: Path | None, *, as_json: bool) -> dict[str, object]:
    from torchdlrm.cli import plan_tables as show
    from torchdlrm.errors import DoesNotFitError
    from torchdlrm.planning.page import plan_page, write_page
    from torchdlrm.sharding.plan_file import plan_as_dict, write_json
    from torchdlrm.sharding.problem import try_solve

    solution = try_solve(problem)
    if solution is None:
        with progress_bars("") as progress:
            answer, message = show.does_not_fit(problem, progress)
        if as_json:
            print_json(answer)
        raise DoesNotFitError(message)
    show.solution(solution)
    result = plan_as_dict(solution)
    if out is not None:
        write_json(out, result)
        console.print(f"wrote {out}; dlrm train --plan {out} obeys it", markup=False, soft_wrap=True)
    if html is not None:
        write_page(html, plan_page(solution))
        console.print(f"wrote {html}", markup=False, soft_wrap=True)
    return result
