"""Files of a folder that came from somewhere else, and that others may write to."""

import os
from collections.abc import Sequence
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


class OpenFiles:
    """Files that are in use, and whether somebody has written to them since.

    Args:
        paths: of the files.
    """

    def __init__(self, paths: Sequence[Path]) -> None:
        self._paths, self._handles = paths, []
        for path in paths:
            self._handles.append(os.open(path, os.O_RDONLY | os.O_CLOEXEC))
        self.identity = self._look()

    def __del__(self) -> None:
        for handle in self._handles:
            os.close(handle)

    def changed(self) -> Path | None:
        """A file that has been written to since it was opened, whatever lies at its path by now."""
        now = self._look()
        if now == self.identity:
            return None
        return next(path for path, was, found in zip(self._paths, self.identity, now, strict=True) if was != found)

    def _look(self) -> list[tuple[int, int, int, int]]:
        found = map(os.fstat, self._handles)
        return [(stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns) for stat in found]
