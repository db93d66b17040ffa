"""Opens the files of a log, which may be packed, and checks whether they have changed since they were found.

In: paths (`torchdlrm.logs.find` makes `LogFile`s of them).  Out: their bytes, or their text, unpacked.
"""

import gzip
import io
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, BinaryIO, Literal, cast

import pyarrow as pa

from torchdlrm.errors import LogError
from torchdlrm.storage.objects import ChangedError
from torchdlrm.storage.reading import FileIdentity, identity_of, open_to_read

if TYPE_CHECKING:
    from torchdlrm.logs.format import LogFormat

Packing = Literal["gzip", "zstd"]


def _unpack_zstd(raw: BinaryIO) -> IO[bytes]:
    return io.BufferedReader(cast("io.RawIOBase", pa.CompressedInputStream(raw, "zstd")))


# What packed files start with, and how they are unpacked.
_PACKINGS: dict[Packing, tuple[bytes, Callable[[BinaryIO], IO[bytes]]]] = {
    "gzip": (b"\x1f\x8b", lambda raw: cast("IO[bytes]", gzip.GzipFile(fileobj=raw))),
    "zstd": (b"\x28\xb5\x2f\xfd", _unpack_zstd),
}
_TEXT_BYTES_A_PACKED_BYTE = 3.5


@dataclass(frozen=True)
class LogFile:
    """A file of a log as it was found: what is read is of this one, whatever takes its place."""

    path: Path
    identity: FileIdentity
    day: int | None
    format: "LogFormat"
    packing: Packing | None = None

    @property
    def name(self) -> str:
        """The file's name without its folder."""
        return self.path.name

    @property
    def size_bytes(self) -> int:
        """As it lies there, packed or not; 0 of a stream."""
        return self.identity.size_bytes

    def open(self) -> BinaryIO:
        """Its bytes, packed or not."""
        return open_to_read(self.path, self.identity)

    @property
    def text_bytes(self) -> int:
        """About how long the text of its rows is."""
        ratio = self.format.text_bytes_a_byte * (1 if self.packing is None else _TEXT_BYTES_A_PACKED_BYTE)
        return int(self.size_bytes * ratio)

    def check_unchanged(self) -> None:
        """See that the file is still the one that was found at first.

        Raises:
            LogError: its size or its time of modification is another.
        """
        with reading(self.path):
            # Of an object at a URL every read has seen to it.
            if self.identity.etag is None and identity_of(self.path) != self.identity:
                raise ChangedError(self.path)


def packing_of(start: bytes) -> Packing | None:
    """How a file that starts so is packed; None where it is not."""
    return next((name for name, (magic, _) in _PACKINGS.items() if start.startswith(magic)), None)


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Report what goes wrong inside as a fault of the file.

    Raises:
        LogError: it cannot be read, has changed, or its packed stream is damaged.
    """
    try:
        yield
    except ChangedError as error:
        raise LogError(f"{path}: the file changed while it was read; start again when nothing writes to it") from error
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise LogError(f"{path}: the gzip stream is damaged or cut off ({error}); fetch the file again") from error
    except OSError as error:
        what = f"cannot be read: {error.strerror}"
        if isinstance(error, FileNotFoundError):
            what = "is not there any more"
        elif error.errno is None:  # as PyArrow reports it
            what = f"the zstd stream is damaged or cut off ({error}); fetch the file again"
        raise LogError(f"{path}: {what}") from error


@contextmanager
def open_text(file: LogFile) -> Iterator[IO[bytes]]:
    """The text of a file, unpacked.

    Raises:
        LogError: as `reading`, also for what goes wrong inside.
    """
    with reading(file.path), file.open() as raw:
        yield unpacked(raw, file.packing)


def unpacked(raw: BinaryIO, packing: Packing | None) -> IO[bytes]:
    """The text of an open file."""
    return raw if packing is None else _PACKINGS[packing][1](raw)
