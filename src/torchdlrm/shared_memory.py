"""Memory that processes of one host share.

It has no name, so nothing is left of it when its processes have ended, however they did. It is not in /dev/shm, whose
size containers limit to some MB.
"""

import mmap
import os
import secrets
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Self

# Gives the values of all processes to all of them, by rank.
AllGather = Callable[[Any], Sequence[Any]]

# Before this is the secret.
FIRST_FREE_BYTE = 64
_SECRET_BYTES = 16


class Address(NamedTuple):
    """Where processes of the same host find a memory; the secret says that it is the one."""

    host: tuple[str, str]
    pid: int
    fd: int
    secret: bytes


def this_host() -> tuple[str, str]:
    """Tells hosts apart, and containers, which do not see each other's processes.

    Raises:
        OSError: the system does not say.
    """
    return Path("/proc/sys/kernel/random/boot_id").read_text("ascii"), str(Path("/proc/self/ns/pid").readlink())


class SharedMemory:
    """Memory of one process that others of its host have open, too.

    Attributes:
        address: where they find it.
        fd: of the memory as a file, until `close`; -1 then.
        writable: whether this process may write to it.
        map: its bytes.
    """

    def __init__(self, address: Address, fd: int, num_bytes: int, *, writable: bool) -> None:
        self.address, self.fd, self.writable = address, fd, writable  # now `__del__` closes it
        self.map = mmap.mmap(fd, num_bytes, access=mmap.ACCESS_WRITE if writable else mmap.ACCESS_READ)

    @classmethod
    def make(cls, name: str, num_bytes: int) -> Self | None:
        """New memory of zeros; None where the system does not let us."""
        try:
            host, secret = this_host(), secrets.token_bytes(_SECRET_BYTES)
            fd = os.memfd_create(name)
            os.truncate(fd, num_bytes)
            made = cls(Address(host, os.getpid(), fd, secret), fd, num_bytes, writable=True)
        except OSError:
            return None
        made.map[:_SECRET_BYTES] = secret
        return made

    @classmethod
    def open(cls, address: Address, num_bytes: int, *, writable: bool) -> Self | None:
        """The memory of a process of this host; None where it may not be opened, as where /proc hides others'."""
        mode = os.O_RDWR if writable else os.O_RDONLY
        try:
            fd = os.open(f"/proc/{address.pid}/fd/{address.fd}", mode | os.O_CLOEXEC)
            memory = cls(address, fd, num_bytes, writable=writable)
        except (OSError, ValueError):  # the latter where the file is shorter
            return None
        return memory if memory.map[:_SECRET_BYTES] == address.secret else None

    @classmethod
    def make_for_all(cls, name: str, num_bytes: int, all_gather: AllGather) -> Self | None:
        """New memory of zeros that all ranks of a group may write; every rank must call this, with the same number.

        Returns:
            None, on every rank, where one of them cannot make or open it.
        """
        mine = cls.make(name, num_bytes)
        first = all_gather(mine and mine.address)[0]
        if mine is None or first is None or first.host != mine.address.host:
            memory = None
        else:
            memory = mine if first == mine.address else cls.open(first, num_bytes, writable=True)
        return memory if all(all_gather(memory is not None)) else None

    def close(self) -> None:
        """Close the file; its bytes stay mapped while something looks at them. A second call does nothing."""
        fd, self.fd = self.fd, -1
        if fd >= 0:
            os.close(fd)

    def __del__(self) -> None:
        self.close()
