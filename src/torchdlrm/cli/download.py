"""`dlrm download`: fetch a public click log."""

from dataclasses import replace
from pathlib import Path
from typing import Annotated, Literal

from cyclopts import Parameter

from torchdlrm.cli.terminal import Json, console, print_json, progress_bars, say_next
from torchdlrm.errors import ConfigError
from torchdlrm.logs.download import SOURCES, parse_days
from torchdlrm.logs.download import download as run_download


def download(
    log: Literal["criteo-kaggle", "criteo-1tb"],
    *,
    out: Path,
    days: str | None = None,
    source: Annotated[str | None, Parameter(name="--from")] = None,
    at_a_time: int = 4,
    as_json: Json = False,
) -> None:
    """Fetch a public click log; a download that was cut off resumes when the same command is given again.

    Args:
        log: Which log.
        out: Folder for the files.
        days: Days of criteo-1tb, such as 0-23 or 0,5,7; all by default.
        source: Another address to fetch the files from: they are at this address followed by their names.
        at_a_time: Files to fetch at a time.
        as_json: Print one JSON object on standard output.
    """
    place = SOURCES[log]
    if source is not None:
        place = replace(place, base=source if source.endswith("/") else source + "/")
    if days is not None and place.days is None:
        msg = f"--days: {log} is one file; leave the option out"
        raise ConfigError(msg)
    wanted = None if days is None or place.days is None else parse_days(days, place.days)
    with progress_bars(f"download {log} from {place.base}") as progress:
        files = run_download(place, out, wanted, at_a_time=at_a_time, progress=progress)
    total = sum(file.size_bytes for file in files)
    console.print(f"{len(files)} files, {total:,} bytes, in {out}", soft_wrap=True)
    if as_json:
        print_json({"log": log, "files": [str(file.path) for file in files], "size_bytes": total})
    elif files[0].name.endswith(".tar.gz"):
        say_next("tar -xzf {} -C {}", files[0].path, out)
    else:
        say_next("dlrm preprocess {}/* --out dataset", out)
