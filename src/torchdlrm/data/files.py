"""Files of a folder that came from somewhere else."""

from pathlib import Path
from stat import S_ISREG


def regular_file(folder: Path, name: str) -> Path:
    """The path of a file that is what it seems: a regular file, inside the folder also where links lead to it.

    Opening anything else may wait forever (a FIFO), read what is not the folder's (a link out of it), or do harm (a
    device).

    Args:
        folder: may itself be reached through links.
        name: relative to it.

    Raises:
        OSError: it is missing, of another kind, or outside.
    """
    path = folder / name
    if not S_ISREG(path.stat().st_mode):
        msg = f"{path}: not a regular file"
        raise OSError(msg)
    if not path.resolve().is_relative_to(folder.resolve()):
        msg = f"{path}: leads out of {folder}"
        raise OSError(msg)
    return path
