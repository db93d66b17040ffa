"""`dlrm report`: a run or a live model as one HTML page."""

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from torchdlrm.cli.options import Json
from torchdlrm.cli.terminal import print_json, say
from torchdlrm.folders import expect, kind_of


def report(
    folder: Path,
    *,
    out: Annotated[Path, Parameter(name=["--out", "--html"])] = Path("report.html"),
    as_json: Json = False,
) -> None:
    """Write a run or a live model as one HTML page, to mail or to keep.

    Of a run: its curves, evaluations, config, dataset and plan. Of a live model: how well each log was predicted before
    it was learnt from, the gate, values that came and went, time and size.

    Args:
        folder: Written by `dlrm train`, which may still be training, or by `dlrm advance`.
        out: The page; replaced if it is there.
    """
    kind = kind_of(folder)
    is_live = kind is not None and kind.name == "live model"
    if not is_live:
        expect("run", folder)

    from torchdlrm.html import write_page

    write_page(out, _live_page(folder) if is_live else _run_page(folder), "out")
    say(f"report of {folder}: {out}")
    if as_json:
        print_json({"live" if is_live else "run": str(folder), "report": str(out), "bytes": out.stat().st_size})


def _run_page(folder: Path) -> str:
    from torchdlrm.evaluation.report import report_page
    from torchdlrm.training.run import Run

    return report_page(Run.open(folder))


def _live_page(folder: Path) -> str:
    from torchdlrm.live.model import LiveModel
    from torchdlrm.live.record import read_times
    from torchdlrm.live.report import report_page

    live = LiveModel.open(folder)
    periods = live.periods
    times = {record.period: read_times(live.day(record.period)) for record in periods}
    return report_page(f"Live model {folder.resolve().name}", periods, times, live.current)
