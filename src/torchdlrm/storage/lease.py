"""One writer at a time under a prefix: by a lease, a small object that says which process writes, and until when.

The holder puts the end off while it lives, and from a dead one the lease is taken over.  All writes are conditional: a
holder that was held up for longer finds that out when it confirms the lease, before it publishes anything.  Processes
of a host are kept apart by a lock of that host: its holder takes a lease over at once that was last written from there.
"""

import fcntl
import json
import os
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from threading import Event, Lock, Thread
from uuid import uuid4

from torchdlrm.errors import StorageError, TorchDLRMError
from torchdlrm.storage import objects
from torchdlrm.storage.objects import ChangedError
from torchdlrm.storage.places import url_of
from torchdlrm.storage.stamps import stamp_path

LEASE_VARIABLE = "TORCHDLRM_LEASE_S"


class HeldError(StorageError):
    """Another process holds the lease."""


@contextmanager
def held(
    path: Path, in_use: TorchDLRMError, waiting: Callable[[str], None] | None = None
) -> Iterator[Callable[[], None]]:
    """Lock a file of this host, and at a URL hold a lease.  Yields what confirms that it still holds.

    Args:
        path: of the file, which is made.
        in_use: what is raised where another process of this host has locked it.
        waiting: is given a sentence where another host has the lease, whose end is waited for, once: it may be dead.

    Raises:
        HeldError: another host holds the lease.
        StorageError: another process has taken it over, by what is yielded.
    """
    with path.open("a", encoding="utf-8") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise in_use from error
        url = url_of(path)
        if url is None:
            yield lambda: None
            return
        lease = _Lease(path, url, waiting)
        try:
            yield lease.put_off
        finally:
            lease.end()


class _Lease:
    def __init__(self, path: Path, url: str, waiting: Callable[[str], None] | None) -> None:
        self._url, self._seconds = url, float(os.environ.get(LEASE_VARIABLE) or 60)
        self._tag = stamp_path(path)  # of the lease, when this host last wrote it
        self._tag.parent.mkdir(parents=True, exist_ok=True)
        self._holder = {"host": socket.gethostname(), "pid": os.getpid(), "id": uuid4().hex}
        self._writing, self._ended = Lock(), Event()
        try:
            self._etag = self._free()
        except HeldError as error:
            if waiting is None:
                raise
            waiting(f"{error}; if it was killed, this goes on then")
            time.sleep(self._seconds_left + 1)
            self._etag = self._free()
        try:
            self.put_off()
        except StorageError:
            self._free()  # another process was faster, and is named
            raise
        Thread(target=self._keep, daemon=True, name="lease").start()

    def _free(self) -> str | None:
        """The tag of a lease that no process holds; None where there is none yet."""
        try:
            content, etag = objects.read_if_changed(self._url, None) or (b"", "")
        except FileNotFoundError:
            return None
        by = json.loads(content)
        self._seconds_left = by["until"] - time.time()
        if self._seconds_left <= 0 or (self._tag.exists() and self._tag.read_text(encoding="utf-8") == etag):
            return etag
        until = time.strftime("%H:%M:%S UTC", time.gmtime(by["until"]))
        msg = (
            f"{self._url.removesuffix('/.lock')}: process {by['pid']} of {by['host']} is changing it and holds the "
            f"lease until {until}, longer if it goes on; wait for it"
        )
        raise HeldError(msg)

    def put_off(self) -> None:
        with self._writing:
            text = json.dumps(self._holder | {"until": time.time() + self._seconds})
            try:
                self._etag = objects.write(self._url, text.encode(), replacing=self._etag, create=self._etag is None)
            except ChangedError as error:
                msg = f"{self._url}: another process has taken the lease over, since this one was held up for too long"
                raise StorageError(msg) from error
            self._tag.write_text(self._etag, encoding="utf-8")

    def _keep(self) -> None:
        while not self._ended.wait(self._seconds / 3):
            with suppress(StorageError, OSError):  # said where it matters
                self.put_off()

    def end(self) -> None:
        self._seconds = 0.0
        self._ended.set()
        with suppress(StorageError, OSError):
            self.put_off()
