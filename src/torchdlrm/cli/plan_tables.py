"""How `dlrm plan` shows its answers in the terminal."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table

from torchdlrm.cli.terminal import console
from torchdlrm.errors import PlanError
from torchdlrm.planning import report
from torchdlrm.planning.compare import compare_plans
from torchdlrm.planning.page import sweep_page, write_page
from torchdlrm.planning.remedies import remedies, shortfall, shortfall_as_dict
from torchdlrm.planning.sweep import parse_sweep, run_sweep
from torchdlrm.progress import ProgressListener
from torchdlrm.sharding.layout import read_plan
from torchdlrm.sharding.plan_file import problem_as_dict
from torchdlrm.sharding.problem import Problem, Solution


def solution(found: Solution) -> None:
    """A plan: ranks with bars, tables, totals, how far to trust it."""
    console.print(report.headline(found), markup=False, soft_wrap=True)
    ranks = report.rank_rows(found)
    print_table("ranks: memory", *report.pick(report.MEMORY_COLUMNS, *ranks))
    print_table("ranks: time of a step", *report.pick(report.TIME_COLUMNS, *ranks))
    print_table("tables (bytes of weights and optimizer state)", *report.table_rows(found))
    for line in report.summary_lines(found):
        console.print(line, markup=False, soft_wrap=True)


def does_not_fit(problem: Problem, progress: ProgressListener) -> tuple[dict[str, object], str]:
    """How much is missing and what helps; the JSON of it, and the message to end with."""
    missing = shortfall(problem)
    helps = remedies(problem, progress)
    print_table("largest tables", *report.largest_rows(missing))
    if helps:
        console.print("what would make it fit (each planned again to be sure):")
        console.print("\n".join(report.remedy_lines(helps)), markup=False, soft_wrap=True)
    answer = problem_as_dict(problem) | {
        "fits": False,
        "shortfall": shortfall_as_dict(missing),
        "remedies": [remedy.as_dict() for remedy in helps],
    }
    return answer, missing.message(problem)


def sweep(problem: Problem, axes: Sequence[str], html: Path | None) -> dict[str, object]:
    """A table and a plot over devices and batch sizes."""
    points = run_sweep(problem, parse_sweep(axes))
    print_table("sweep", *report.sweep_rows(points))
    if html is not None:
        write_page(html, sweep_page(problem, points))
        console.print(f"wrote {html}", markup=False, soft_wrap=True)
    return {**problem_as_dict(problem), "sweep": [point.as_dict() for point in points]}


def comparison(paths: Sequence[Path]) -> dict[str, object]:
    """Two plans side by side."""
    if len(paths) != 2:
        msg = f"--compare: expected two files that dlrm plan --out wrote, got {len(paths)}"
        raise PlanError(msg)
    compared = compare_plans(*(read_plan(path) for path in paths))
    print_table("plans", ["", str(paths[0]), str(paths[1]), "b / a"], compared.figures)
    print_table("tables that differ", ["table", str(paths[0]), str(paths[1])], compared.tables)
    if not compared.tables:
        console.print("every table is in the same place")
    return compared.as_dict()


def print_table(title: str, head: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    """A table with numbers to the right; nothing without rows, and no bars where the terminal is too narrow."""
    if not rows:
        return
    table = _table(title, head, rows, range(len(head)))
    if console.measure(table, options=console.options.update(max_width=1000)).maximum > console.width:
        table = _table(title, head, rows, [i for i, name in enumerate(head) if name not in report.PICTURES])
    console.print(table)


def _table(title: str, head: Sequence[str], rows: Sequence[Sequence[Any]], shown: Sequence[int]) -> Table:
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    for index in shown:
        is_number = index > 0 and head[index] not in report.LEFT_ALIGNED
        # The first column says which row it is: it does not give way either.
        table.add_column(head[index], justify="right" if is_number else "left", no_wrap=is_number or index == 0)
    for row in rows:
        table.add_row(*(str(row[index]) for index in shown if index < len(row)))
    return table
