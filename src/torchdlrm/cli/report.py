"""`dlrm report`: a run as one HTML page."""

from pathlib import Path

from torchdlrm.cli.terminal import Json, console, print_json


def report(run: Path, *, out: Path = Path("report.html"), as_json: Json = False) -> None:
    """Write a run's curves, evaluations, config, dataset and plan as one HTML page, to mail or to keep.

    Args:
        run: Folder written by `dlrm train`; it may still be training.
        out: The page; replaced if it is there.
        as_json: Print one JSON object on standard output.
    """
    from torchdlrm.evaluation.report import report_page
    from torchdlrm.html import write_page
    from torchdlrm.training.run import Run

    write_page(out, report_page(Run.open(run)), "out")
    console.print(f"report of {run}: {out}")
    if as_json:
        print_json({"run": str(run), "report": str(out), "bytes": out.stat().st_size})
