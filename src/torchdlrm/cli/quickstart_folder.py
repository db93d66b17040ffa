"""Whose folder it is that a quickstart is to work in."""

import json
from pathlib import Path

from torchdlrm import __version__
from torchdlrm.errors import ConfigError
from torchdlrm.files import replacing

# In the folder from its first moment on, by which an interrupted quickstart is told from a folder of somebody's.
MARK_NAME = "quickstart.json"


def claim(out: Path, num_rows: int) -> None:
    """Make the folder, or take up that of an interrupted quickstart.

    Raises:
        ConfigError: there is something else.
    """
    settings = {"torchdlrm": __version__, "rows": num_rows}
    mark = out / MARK_NAME
    remedy = "remove it, or give another: dlrm quickstart --out FOLDER"
    if mark.is_file():
        try:
            found = json.loads(mark.read_text(encoding="utf-8"))
        except ValueError:
            found = None
        if found != settings:
            msg = f"--out: {out} holds a quickstart with other settings ({MARK_NAME}: {found}); {remedy}"
            raise ConfigError(msg)
        return
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        msg = f"--out: {out} is not an empty folder, nor that of an interrupted quickstart; {remedy}"
        raise ConfigError(msg)
    out.mkdir(parents=True, exist_ok=True)
    with replacing(mark) as beside:
        beside.write_text(json.dumps(settings) + "\n", encoding="utf-8")
