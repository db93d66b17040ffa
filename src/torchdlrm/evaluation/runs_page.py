"""Writes several runs as one self-contained HTML page: how they learnt, and in what they differ.

In: the folders of runs.  Out: HTML, in the style of a run's page.
"""

from collections.abc import Sequence

from torchdlrm.config import setting_values
from torchdlrm.evaluation.pictures import FOLDER
from torchdlrm.evaluation.report import cards, charts_of, evaluation_rows, lines_by_split, log_charts, text_of
from torchdlrm.html import Part, render
from torchdlrm.training.log import read_metrics
from torchdlrm.training.run import METRICS_NAME, Run


def runs_page(runs: Sequence[Run]) -> str:
    """Make the page of runs that stand beside each other.

    Args:
        runs: two or more.

    Raises:
        RunError: a part of a run is damaged.
    """
    short_names = [run.path.resolve().name for run in runs]
    names = short_names if len({*short_names}) == len(runs) else [str(run.path) for run in runs]
    logs = [lines_by_split(run) for run in runs]
    values = [setting_values(run.config) | {"dataset": run.environment["dataset"]["path"]} for run in runs]
    differing = [key for key in values[0] if len({str(each.get(key)) for each in values}) > 1]
    summaries = [
        {name.partition(" (")[0]: value for name, value in cards(read_metrics(run.path / METRICS_NAME))} for run in runs
    ]
    columns = dict.fromkeys(name for summary in summaries for name in summary)
    evaluated = [(name, result) for name, run in zip(names, runs, strict=True) for result in run.evaluations().values()]
    pictures = {name: run.evaluations(FOLDER) for name, run in zip(names, runs, strict=True)}
    splits = dict.fromkeys(split for found in pictures.values() for split in found)
    parts = [
        Part(
            "Runs",
            rows=[
                {"run": name} | {column: summary.get(column, "-") for column in columns}
                for name, summary in zip(names, summaries, strict=True)
            ],
        ),
        Part(
            "Settings that differ",
            [] if differing else ["None: runs of the same settings and seed are the same run."],
            rows=[
                {"key": key} | {name: text_of(each.get(key)) for name, each in zip(names, values, strict=True)}
                for key in differing
            ],
            wraps=True,
        ),
        *(
            Part(
                f"Learning curves, {split}",
                charts=log_charts({name: log[split] for name, log in zip(names, logs, strict=True)}, f", {split}"),
            )
            for split in ("val", "train")
        ),
        Part(
            "Evaluations",
            rows=[
                {"run": name} | row
                for (name, _), row in zip(evaluated, evaluation_rows([result for _, result in evaluated]), strict=True)
            ],
            left=("split",),
        ),
        *(
            Part(
                f"How rows of {split} are predicted",
                charts=charts_of(
                    "one of the runs", {name: found[split] for name, found in pictures.items() if split in found}
                ),
            )
            for split in splits
        ),
    ]
    return render(f"{len(runs)} runs", parts)
