"""Verifies checksums of a bundle's files: all at once, or block by block while the weights are already in use."""

import hashlib
import os
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from torchdlrm.bundle.weights_file import BLOCK_BYTES
from torchdlrm.errors import BundleError
from torchdlrm.progress import SILENT, ProgressListener


class BlockVerifier:
    """Knows which blocks of a weights file have been checked, and checks the others.

    Blocks are read from the file and not through the mapping, so that checking 100 GB does not make them resident in
    this process; both see the same pages of the page cache.

    Args:
        path: the weights file.
        block_sha256: of each block.
        in_pages: whether what is not in the page cache yet is brought there in single pages.  That takes longer than in
            pieces of megabytes; but the cache maps a piece as a whole, so that a lookup makes all of it resident.

    Attributes:
        is_done: whether all blocks have been found good.
        damage: a block that was not, if any.
    """

    def __init__(self, path: Path, block_sha256: Sequence[str], *, in_pages: bool) -> None:
        self._path = path
        self._digests = [bytes.fromhex(digest) for digest in block_sha256]
        self._good: NDArray[np.bool_] = np.zeros(len(block_sha256), np.bool_)
        self._file = os.open(path, os.O_RDONLY)
        if in_pages:
            os.posix_fadvise(self._file, 0, 0, os.POSIX_FADV_RANDOM)
        self.damage: BundleError | None = None
        self.is_done = False
        self._thread: threading.Thread | None = None

    def __del__(self) -> None:
        os.close(self._file)

    @property
    def num_blocks(self) -> int:
        """Blocks of the file."""
        return len(self._digests)

    def require(self, touched: NDArray[np.bool_], progress: ProgressListener = SILENT) -> None:
        """Check those of the touched blocks, bool [num_blocks], that are not checked yet.

        Raises:
            BundleError: one of them is damaged, or another block was found to be.
        """
        if self.damage is not None:
            raise self.damage
        wanted = np.flatnonzero(touched & ~self._good).tolist()
        if len(wanted) == 1:
            self._check(wanted[0])
        elif wanted:
            with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
                for num_bytes in pool.map(self._check, wanted):
                    progress.advance(num_bytes)

    def check_all(self, progress: ProgressListener) -> None:
        """Check every block; raises as `require`."""
        self.require(np.ones(self.num_blocks, np.bool_), progress)
        self.is_done = True

    def check_all_in_background(self) -> None:
        """Let a thread check every block; what it finds is raised by the next `require`."""
        self._thread = threading.Thread(target=self._check_quietly, name="torchdlrm-verify", daemon=True)
        self._thread.start()

    def wait(self) -> None:
        """Wait until the thread has checked every block, or found a damaged one."""
        if self._thread is not None:
            self._thread.join()

    def _check_quietly(self) -> None:
        try:
            # From the end, since `require` checks many blocks from the start: the two meet in the middle.
            for block in reversed(range(self.num_blocks)):
                self._check(block)
        except BundleError:
            return  # kept in `damage`
        self.is_done = True

    def _check(self, block: int) -> int:
        """Read a block, if it is not known to be good; returns its bytes."""
        if self._good[block]:
            return 0
        data = os.pread(self._file, BLOCK_BYTES, block * BLOCK_BYTES)
        if hashlib.sha256(data).digest() != self._digests[block]:
            msg = (
                f"{self._path}: damaged: the sha256 of block {block} (from byte {block * BLOCK_BYTES:,}) is not what "
                "was written; copy or export the bundle again"
            )
            self.damage = BundleError(msg)
            raise self.damage
        self._good[block] = True
        return len(data)
