"""Writes several runs as one self-contained HTML page: how they learnt, in what they differ, which is better.

In: the folders of runs, and perhaps how they compare on the same rows.  Out: HTML, in the style of a run's page.
"""

from collections.abc import Sequence

from torchdlrm.config import setting_values
from torchdlrm.evaluation.pictures import FOLDER, difference_rows
from torchdlrm.evaluation.report import cards, charts_of, evaluation_rows, lines_by_split, log_charts, text_of
from torchdlrm.html import Part, render
from torchdlrm.judging.comparison import Comparison
from torchdlrm.training.log import read_metrics
from torchdlrm.training.run import METRICS_NAME, Run


def runs_page(runs: Sequence[Run], comparison: Comparison | None = None) -> str:
    """Make the page of runs that stand beside each other.

    Args:
        runs: two or more.
        comparison: of the first one with the others, on the same rows.

    Raises:
        RunError: a part of a run is damaged.
    """
    short = [run.path.resolve().name for run in runs]
    named = {(name if short.count(name) == 1 else str(run.path)): run for name, run in zip(short, runs, strict=True)}
    logs = {name: lines_by_split(run) for name, run in named.items()}
    # Without the step of the best validation, which would make a column for each run.
    summaries = {
        name: {of.partition(" (")[0]: value for of, value in cards(read_metrics(run.path / METRICS_NAME))}
        for name, run in named.items()
    }
    columns = dict.fromkeys(of for summary in summaries.values() for of in summary)
    settings = {
        name: {**setting_values(run.config), "dataset": run.environment["dataset"]["path"]}
        for name, run in named.items()
    }
    keys = dict.fromkeys(key for each in settings.values() for key in each)
    differing = [key for key in keys if len({str(each.get(key)) for each in settings.values()}) > 1]
    evaluated = [(name, result) for name, run in named.items() for result in run.evaluations().values()]
    results = zip(evaluated, evaluation_rows([result for _, result in evaluated]), strict=True)
    pictures = {name: run.evaluations(FOLDER) for name, run in named.items()}
    parts = [
        Part(
            "Runs",
            rows=[{"run": name} | {of: each.get(of, "-") for of in columns} for name, each in summaries.items()],
        ),
        Part(
            "Settings that differ",
            ["None."] * (not differing),
            rows=[
                {"key": key} | {name: text_of(each.get(key)) for name, each in settings.items()} for key in differing
            ],
            wraps=True,
        ),
        *(
            Part(
                f"Learning curves, {split}",
                charts=log_charts({name: log[split] for name, log in logs.items()}, f", {split}"),
            )
            for split in ("val", "train")
        ),
        Part("Evaluations", rows=[{"run": name} | row for (name, _), row in results], left=("split",)),
        *(
            Part(
                f"How rows of {split} are predicted",
                charts=charts_of("one of the runs", {name: found.get(split, {}) for name, found in pictures.items()}),
            )
            for split in dict.fromkeys(split for found in pictures.values() for split in found)
        ),
    ]
    if comparison is not None:
        rows = difference_rows(comparison.as_json())
        parts.insert(0, Part("Comparison", [comparison.about], rows=rows, left=("metric", "verdict")))
    return render(f"{len(runs)} runs", parts, lead="" if comparison is None else f"{comparison.verdict}.")
