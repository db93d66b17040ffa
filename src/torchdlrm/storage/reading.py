"""Opens a file to read, on a disk or at a URL, where it is read by ranges and ahead.

In: a path.  Out: a binary file with `seek`, whose bytes are all of one object: one that has changed since is refused.
"""

import io
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextvars import ContextVar
from dataclasses import dataclass
from mmap import ACCESS_READ, mmap
from pathlib import Path
from threading import Semaphore
from typing import Any, BinaryIO, TypeVar, cast

from torchdlrm.storage import objects
from torchdlrm.storage.places import published_url, url_of

RANGE_BYTES = 8 << 20
# What is asked for ahead of a reader that goes on: little at first, so that a look at a place costs little.
_FIRST_AHEAD_BYTES, _MOST_AHEAD_BYTES = 256 << 10, 32 << 20
_BUFFER_BYTES = 64 << 10
_ITEMS_AHEAD = 8
_Result = TypeVar("_Result")
# In which a thread computes; another thread takes its place while it waits for an object.
place: ContextVar[Semaphore] = ContextVar("place")
_threads = ThreadPoolExecutor(16, thread_name_prefix="storage-read")


@dataclass(frozen=True)
class FileIdentity:
    """What says whether a file is still the same: its size, and when it was written, or the tag of its object."""

    size_bytes: int
    modified_ns: int
    etag: str | None = None


def identity_of(path: Path) -> FileIdentity:
    """What identifies a file, on a disk or at a URL.

    Raises:
        FileNotFoundError: there is none.
        StorageError: the bucket cannot be read.
    """
    url = url_of(path)
    if url is None:
        if not path.is_file():
            raise FileNotFoundError(path)
        found = path.stat()
        return FileIdentity(found.st_size, found.st_mtime_ns)
    at = objects.stat(url)
    return FileIdentity(at.size_bytes, at.modified_ns, at.etag)


def open_to_read(path: Path, identity: FileIdentity | None = None) -> BinaryIO:
    """A file to read; `identity` of one at a URL that was looked at before.

    Raises:
        OSError: it cannot be opened.
        StorageError: the bucket cannot be read.
    """
    url = url_of(path)
    if url is None:
        return path.open("rb")
    found = identity or identity_of(path)
    return cast("BinaryIO", io.BufferedReader(_Ranges(url, found), _BUFFER_BYTES))


def parts_of(path: Path, *, whole: bool = False) -> Callable[[int, int | None], memoryview]:
    """Reads a file that does not change from a place to another, as a slice does; what is on this host is mapped.

    Of an object each part is a request; where it is wanted `whole`, there is one for all of it.
    """
    try:
        with path.open("rb") as file:
            content = memoryview(mmap(file.fileno(), 0, access=ACCESS_READ))
    except FileNotFoundError:
        url = published_url(path)
        if url is None:
            raise
        if not whole:
            return lambda start, end: memoryview(objects.read(url, start, end))
        content = memoryview(objects.read(url))
    return lambda start, end: content[start:end]


def read_each(items: Iterable[Any], read: Callable[[Any], _Result]) -> Iterator[_Result]:
    """What is read of each item, in order; some are read ahead, as the answer of a bucket is long in coming."""
    waiting: deque[Future[_Result]] = deque()
    for item in items:
        waiting.append(_threads.submit(read, item))
        if len(waiting) > _ITEMS_AHEAD:
            yield waiting.popleft().result()
    yield from (future.result() for future in waiting)


class Seekable(io.RawIOBase):
    """A file of a known size, for reading; subclasses say how, by `readinto`, which moves the `position`."""

    def __init__(self, size_bytes: int) -> None:
        super().__init__()
        self.size_bytes, self.position = size_bytes, 0

    def readable(self) -> bool:
        """It is."""
        return True

    def seekable(self) -> bool:
        """It is."""
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Move to a place, at the least 0; which it is."""
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self.position, io.SEEK_END: self.size_bytes}[whence]
        self.position = max(0, start + offset)
        return self.position


class _Ranges(Seekable):
    """An object as a file: what is read is asked for at once, in ranges, and some ahead of a reader that goes on."""

    def __init__(self, url: str, identity: FileIdentity) -> None:
        super().__init__(identity.size_bytes)
        self._url, self._identity = url, identity
        self._asked, self._ahead_bytes = 0, 0
        self._ranges: deque[tuple[int, Future[bytes]]] = deque()  # where each ends; they follow each other

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        before, position = self.position, super().seek(offset, whence)
        if position != before:
            self._drop()
            self._asked = position
        return position

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]  # narrower than any buffer
        start, end = self.position, min(self.position + len(buffer), self.size_bytes)
        # A buffer reads a block behind what is wanted.
        self._ask(min(end + (len(buffer) > _BUFFER_BYTES) * _BUFFER_BYTES, self.size_bytes))
        if self._asked - end <= self._ahead_bytes // 2:
            self._ask(min(end + self._ahead_bytes, self.size_bytes))
            self._ahead_bytes = min(max(4 * self._ahead_bytes, _FIRST_AHEAD_BYTES), _MOST_AHEAD_BYTES)
        while self.position < end:
            range_end, future = self._ranges[0]
            if (lent := place.get(None)) is not None and not future.done():
                lent.release()
                wait([future])
                lent.acquire()
            data = future.result()
            at = self.position - (range_end - len(data))
            piece = memoryview(data)[at : at + end - self.position]
            buffer[self.position - start : self.position - start + len(piece)] = piece
            self.position += len(piece)
            if self.position == range_end:
                self._ranges.popleft()
        return max(0, end - start)

    def close(self) -> None:
        self._drop()
        super().close()

    def _ask(self, end: int) -> None:
        """Ask for all up to `end`, in ranges."""
        while self._asked < end:
            start, self._asked = self._asked, min(self._asked + RANGE_BYTES, end)
            future = _threads.submit(objects.read, self._url, start, self._asked, etag=self._identity.etag)
            self._ranges.append((self._asked, future))

    def _drop(self) -> None:
        for _, future in self._ranges:
            future.cancel()
        self._ranges.clear()
        self._ahead_bytes = 0
