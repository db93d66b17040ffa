"""`dlrm rollback`: an earlier period of a live model becomes the current one."""

from pathlib import Path

from torchdlrm.cli.terminal import Json, print_json, say, warn
from torchdlrm.folders import expect


def rollback(live: Path, period: int, *, as_json: Json = False) -> None:
    """Publish the model of an earlier period, or of one that was not good enough; the next period is learnt from it.

    Only LIVE/current is led elsewhere: nothing is removed, and a later period can be published again.

    Args:
        live: Folder of the live model.
        period: Number of the period; `dlrm inspect LIVE` lists them.
        as_json: Print one JSON object on standard output.
    """
    expect("live model", live)
    from torchdlrm.live.model import RUN_NAME, LiveModel
    from torchdlrm.live.model import rollback as roll_back

    record = roll_back(live, period)
    say(f"{live}/current is period {record.period} now; the next period is learnt from it")
    if not (LiveModel(live).day(period) / RUN_NAME).is_dir():
        warn(f"the run of period {period} was removed (keep_runs), so that no period can be learnt from it")
    if as_json:
        print_json({"live": str(live), "current": record.period})
