"""One writer at a time under a prefix: by a lease, a small object that says which process writes, and until when.

The holder puts the end off while it lives, and from a dead one the lease is taken over.  All writes are conditional: a
holder that was held up for longer finds that out when it confirms the lease, before it publishes anything.
"""

import json
import os
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from threading import Event, Lock, Thread
from uuid import uuid4

from torchdlrm.errors import StorageError
from torchdlrm.storage import objects
from torchdlrm.storage.objects import ChangedError
from torchdlrm.storage.places import url_of

LEASE_VARIABLE = "TORCHDLRM_LEASE_S"


class HeldError(StorageError):
    """Another process holds the lease."""


@contextmanager
def leased(path: Path) -> Iterator[Callable[[], None]]:
    """Hold a lease, which stands for a path; none of one on a disk.  Yields what confirms that it still holds.

    Raises:
        HeldError: another process holds it.
        StorageError: another process has taken it over, by what is yielded.
    """
    url = url_of(path)
    if url is None:
        yield lambda: None
        return
    lease = _Lease(url)
    try:
        yield lease.put_off
    finally:
        lease.end()


class _Lease:
    def __init__(self, url: str) -> None:
        self._url, self._seconds = url, float(os.environ.get(LEASE_VARIABLE) or 60)
        self._holder = {"host": socket.gethostname(), "pid": os.getpid(), "id": uuid4().hex}
        self._writing, self._ended = Lock(), Event()
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
        held = json.loads(content)
        if held["until"] <= time.time():
            return etag
        until = time.strftime("%H:%M:%S UTC", time.gmtime(held["until"]))
        msg = (
            f"{self._url.removesuffix('/.lock')}: process {held['pid']} of {held['host']} is changing it and holds the "
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

    def _keep(self) -> None:
        while not self._ended.wait(self._seconds / 3):
            with suppress(StorageError):  # said where it matters
                self.put_off()

    def end(self) -> None:
        self._seconds = 0.0
        self._ended.set()
        with suppress(StorageError):
            self.put_off()
