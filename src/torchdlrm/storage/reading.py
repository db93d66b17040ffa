"""Opens a file to read, on a disk or at a URL, where it is read by ranges and ahead.

In: a path.  Out: a binary file with `seek`, whose bytes are all of one object: one that has changed since is refused.
"""

import io
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from mmap import ACCESS_READ, mmap
from pathlib import Path
from typing import BinaryIO, TypeVar, cast

from torchdlrm.storage import objects
from torchdlrm.storage.places import published_url, url_of

RANGE_BYTES = 8 << 20
_AHEAD = 3
_ITEMS_AHEAD = 8
_KEPT = 6
_Item = TypeVar("_Item")
_Result = TypeVar("_Result")
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
        found = path.stat()
        return FileIdentity(found.st_size, found.st_mtime_ns)
    at = objects.stat(url)
    return FileIdentity(at.size_bytes, 0, at.etag)


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
    return cast("BinaryIO", io.BufferedReader(_Ranges(url, found), 1 << 20))


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


def read_each(items: Iterable[_Item], read: Callable[[_Item], _Result]) -> Iterator[_Result]:
    """What is read of each item, in order; some are read ahead, as the answer of a bucket is long in coming."""
    waiting: deque[Future[_Result]] = deque()
    for item in items:
        waiting.append(_threads.submit(read, item))
        if len(waiting) > _ITEMS_AHEAD:
            yield waiting.popleft().result()
    yield from (future.result() for future in waiting)


class _Ranges(io.RawIOBase):
    """An object as a file: the range that is read, and some ahead of it where one range follows another."""

    def __init__(self, url: str, identity: FileIdentity) -> None:
        super().__init__()
        self._url, self._identity = url, identity
        self._position, self._last = 0, -2
        self._ranges: OrderedDict[int, Future[bytes]] = OrderedDict()

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._identity.size_bytes}[whence]
        self._position = max(0, start + offset)
        return self._position

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]  # narrower than any buffer
        if self._position >= self._identity.size_bytes:
            return 0
        number, at = divmod(self._position, RANGE_BYTES)
        ahead = _AHEAD if number in {self._last, self._last + 1} else 0
        for wanted in range(number, number + 1 + ahead):
            self._ask(wanted)
        self._last = number
        data = self._ranges[number].result()[at : at + len(buffer)]
        buffer[: len(data)] = data
        self._position += len(data)
        return len(data)

    def close(self) -> None:
        for future in self._ranges.values():
            future.cancel()
        self._ranges.clear()
        super().close()

    def _ask(self, number: int) -> None:
        start = number * RANGE_BYTES
        if number in self._ranges:
            self._ranges.move_to_end(number)
        elif start < self._identity.size_bytes:
            end = min(start + RANGE_BYTES, self._identity.size_bytes)
            self._ranges[number] = _threads.submit(objects.read, self._url, start, end, etag=self._identity.etag)
            if len(self._ranges) > _KEPT:
                self._ranges.popitem(last=False)[1].cancel()
