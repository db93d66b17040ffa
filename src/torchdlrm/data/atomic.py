"""Files that are whole or absent."""

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from uuid import uuid4


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A name beside `path` to write to, which is renamed to `path` when all went well and removed otherwise.

    Raises:
        OSError: it cannot be written; names `path`.
    """
    beside = path.with_name(f".{path.name}.{uuid4().hex[:8]}")
    try:
        yield beside
        beside.replace(path)
    except OSError as error:
        if error.filename in {None, str(beside)}:  # what ends a write names no file, and nobody knows the temporary one
            error.filename = str(path)
        raise
    finally:
        with suppress(OSError):  # on a read-only file system even what is not there cannot be removed
            beside.unlink(missing_ok=True)


def sync(path: Path) -> None:
    """Wait until a file or folder is on the disk itself."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
