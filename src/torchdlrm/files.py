"""Writes files and folders atomically, even in shared folders, and notices if files change while in use.

What has become complete at a path that stands for a URL is in its bucket, too, before a function here returns.
"""

import errno
import hashlib
import os
import shutil
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from stat import S_ISDIR, S_ISREG
from tempfile import TemporaryDirectory
from uuid import uuid4

from torchdlrm.storage import mirror
from torchdlrm.storage.places import url_of


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary name next to `path`, which is renamed to `path` when all went well and removed otherwise.

    Raises:
        OSError: it cannot be written; names `path`.
    """
    beside = path.with_name(f".{path.name}.{uuid4().hex[:8]}")
    try:
        if url_of(path) is not None:  # in a bucket there are no folders that could be missing
            path.parent.mkdir(parents=True, exist_ok=True)
        yield beside
        beside.replace(path)
        mirror.push(path)
    except OSError as error:
        if error.filename in {None, str(beside)}:  # a failed write names no file, or the temporary one
            error.filename = str(path)
        raise
    finally:
        with suppress(OSError):  # on a read-only file system even what is not there cannot be removed
            beside.unlink(missing_ok=True)


@contextmanager
def replacing_durably(path: Path) -> Iterator[Path]:
    """As `replacing`; and the file is on the disk itself before it has its name, and its name before this returns."""
    with replacing(path) as temporary:
        yield temporary
        sync(temporary)
    sync(path.parent)


def write_atomically(path: Path, text: str) -> None:
    """Write a file that is complete or absent, whatever ends this process or the machine.

    Raises:
        OSError: it cannot be written; names `path`.
    """
    with replacing_durably(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def publish_folder(
    folder: Path, path: Path, manifest: str, *, overwrite: bool = False, others: Collection[str] = ()
) -> None:
    """Give a complete folder its name, once all that is in it is on the disk itself.

    Args:
        folder: where it was written.
        path: its name, on the same file system; nothing is there, unless it is to be overwritten.
        manifest: the file in it without which it is no such folder; it gets on the disk after all others.
        overwrite: take the place of the folder at `path`, which is removed.
        others: files that other hosts have put into the bucket, there where the folder will be.

    Raises:
        OSError: the disk is full or failing, or something is at `path`.
    """
    for place, _, names in os.walk(folder, topdown=False):
        for name in names:
            if Path(place, name) != folder / manifest:
                sync(Path(place, name))
        if Path(place) != folder:
            sync(Path(place))
    sync(folder / manifest)
    sync(folder)
    old = path.with_name(f".{path.name}.removed")
    if overwrite:
        mirror.remove(path)
        shutil.rmtree(old, ignore_errors=True)  # of a process that was killed
        with suppress(FileNotFoundError):
            path.rename(old)
    mirror.move(folder, path, manifest, others)
    sync(path.absolute().parent)
    if overwrite:
        shutil.rmtree(old, ignore_errors=True)


def claim_folder(path: Path, names: Collection[str]) -> int:
    """Make a folder for unfinished work, or take the one that a job of ours has left when it was killed.

    Its name is known beforehand, so another user may have put something else there, for us to write into or to remove.

    Args:
        path: of the folder.
        names: what such a job leaves in it, besides temporary files of these names.

    Returns:
        The folder, open: what is removed by means of it is in that folder, whatever takes its place meanwhile.

    Raises:
        OSError: it cannot be made, or there is something else: a link, a file, another user's folder, other content.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        path.mkdir()
        is_new = True
    except FileExistsError:
        is_new = False
        if not S_ISDIR(path.lstat().st_mode):
            raise _not_ours(path, "it is not a folder") from None
    folder = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        if not is_new:
            with TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as mine:  # some file systems map users
                if os.fstat(folder).st_uid != Path(mine).stat().st_uid:
                    raise _not_ours(path, "it belongs to another user")
            for name in _names(folder):
                if name not in names and not any(name.startswith(f".{known}.") for known in names):
                    raise _not_ours(path, f"it holds {name}")
    except OSError:
        os.close(folder)
        raise
    return folder


def clear_folder(folder: int, *, keep: Collection[str] = ()) -> None:
    """Remove what is in a folder that `claim_folder` has opened; of links, what they are and not where they lead."""
    for name in {*_names(folder)} - {*keep}:
        if S_ISDIR(os.lstat(name, dir_fd=folder).st_mode):
            shutil.rmtree(name, dir_fd=folder)
        else:
            os.unlink(name, dir_fd=folder)


def remove_folder(path: Path) -> None:
    """Remove a folder with all that is in it, if it is there; whatever ends this process, it is complete or absent."""
    mirror.remove(path)
    leaving = path.with_name(f".{path.name}.removed")
    shutil.rmtree(leaving, ignore_errors=True)  # what a process that was killed has left
    with suppress(FileNotFoundError):
        path.rename(leaving)
        shutil.rmtree(leaving)


def _names(folder: int) -> list[str]:
    with os.scandir(folder) as entries:
        return [entry.name for entry in entries]


def _not_ours(path: Path, why: str) -> OSError:
    return OSError(
        errno.EEXIST, f"{path} is not what an interrupted job leaves there: {why}; remove it, or give another name"
    )


def sync(path: Path) -> None:
    """Wait until a file or folder is on the disk itself."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sha256_of(path: Path) -> str:
    """The SHA-256 of a file's bytes, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


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
        raise OSError(f"{path}: not a regular file")
    if not path.resolve().is_relative_to(folder.resolve()):
        raise OSError(f"{path}: leads out of {folder}")
    return path


class OpenFiles:
    """Files that are in use, and whether they were written to since."""

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
