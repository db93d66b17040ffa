"""`dlrm report`: a dataset, a run, a live model, or several runs beside each other, as one HTML page."""

from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter

from torchdlrm.cli.options import Json, refuse_mistyped
from torchdlrm.cli.terminal import print_json, progress_bars, say
from torchdlrm.errors import UserError
from torchdlrm.folders import expect, found_in


def report(
    folders: list[Path],
    *,
    out: Annotated[Path, Parameter(name=["--out", "--html"])] = Path("report.html"),
    split: str | None = None,
    as_json: Json = False,
) -> None:
    """Write a dataset, a run, a live model, or several runs beside each other as one HTML page, to mail or to keep.

    Of a dataset: click rate over the log, drift, unknown and missing values, frequencies. Of a run: its curves,
    evaluations with their pictures, config, dataset and plan. Of several runs: curves over one another, the
    settings that differ and, with --split, how they compare. Of a live model: how well each log was predicted before it
    was learnt from, the gate, values that came and went, time and size.

    Args:
        folders: Written by `dlrm preprocess`, by `dlrm train`, which may still be training, or by `dlrm advance`;
            several are runs.
        out: The page; replaced if it is there.
        split: Of several runs: compare the others with the first one on this split, as dlrm compare does.
    """
    refuse_mistyped(folders, "report")
    name = found_in(folders[0]).name if len(folders) == 1 else "run"
    if split is not None and len(folders) == 1:
        raise UserError(
            f"`split`: compares several runs on it; what `dlrm evaluate {folders[0]}` has judged is on the page of one"
        )
    about: dict[str, Any] = {name.split()[0]: str(folders[0])}
    if name == "dataset":
        from torchdlrm.data.dataset import Dataset
        from torchdlrm.data.page import dataset_page

        page = dataset_page(Dataset.open(folders[0]))
    elif name == "live model":
        from torchdlrm.live.model import LiveModel
        from torchdlrm.live.record import read_times
        from torchdlrm.live.report import report_page as live_page

        live = LiveModel.open(folders[0])
        times = {record.period: read_times(live.day(record.period)) for record in live.periods}
        page = live_page(f"Live model {folders[0].resolve().name}", live.periods, times, live.current)
    else:
        expect("run", *folders)
        from torchdlrm.evaluation.report import report_page, runs_page
        from torchdlrm.training.run import Run

        runs = [Run.open(folder) for folder in folders]
        about = about if len(runs) == 1 else {"runs": [str(folder) for folder in folders]}
        with progress_bars("") as progress:
            page = report_page(runs[0]) if len(runs) == 1 else runs_page(runs, split, progress)

    from torchdlrm.html import write_page

    write_page(out, page, "out")
    say(f"report of {', '.join(map(str, folders))}: {out}")
    if as_json:
        print_json(about | {"report": str(out), "bytes": out.stat().st_size})
