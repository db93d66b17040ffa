"""Makes the rows of a synthetic log on all cores, counts their true logits, and writes files whole or not at all."""

import math
import os
import zlib
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import numpy as np
from numpy.typing import NDArray

from torchdlrm.errors import LogError
from torchdlrm.files import replacing
from torchdlrm.metrics import auc_from_counts
from torchdlrm.progress import ProgressListener
from torchdlrm.synthetic.model import NUM_LOGITS, click_thresholds
from torchdlrm.synthetic.rows import BLOCK_ROWS, RowGenerator
from torchdlrm.synthetic.truth import Attainable, SyntheticTruth, schema_path, truth_path

_CHUNK_ROWS = 16 * BLOCK_ROWS  # the unit of work, of writing and of compression
_MAX_WORKERS = 4  # the interpreter's lock and the disk leave no use for more
_GZIP_LEVEL = 1
# Magic, deflate, no flags, no time (the same bytes tomorrow), fastest, Unix.
_GZIP_HEADER = bytes([0x1F, 0x8B, 8, 0, 0, 0, 0, 0, 4, 3])


def write_log(
    path: Path,
    generator: RowGenerator,
    rows: int,
    truth: SyntheticTruth,
    progress: ProgressListener,
    *,
    schema: str | None = None,
    late_path: Path | None = None,
) -> tuple[SyntheticTruth, "LogitCounts"]:
    """Write a log and what stands next to it.

    Args:
        path: of the log; it is compressed when it ends in `.gz`.
        generator: of the rows.
        rows: how many.
        truth: what is given of it; the rest is computed.
        progress: is told of the rows written.
        schema: of the log, to write next to it.
        late_path: gets the rows whose clicks the log does not show yet, with their clicks.

    Returns:
        The truth, and the counts of the whole log.
    """
    ranges = _ranges(rows)
    counts = [LogitCounts(first, num) for first, num in ranges.values()]
    late_clicks = 0
    with ExitStack() as files:
        # The log takes its name last: one that is there is never without what stands next to it.
        log_file, truth_file = files.enter_context(writing(path)), files.enter_context(writing(truth_path(path)))
        late_file = files.enter_context(writing(late_path)) if late_path else None
        if schema is not None:
            files.enter_context(writing(schema_path(path))).write(schema.encode())
        compressed = _GzipFile(log_file) if path.name.endswith(".gz") else None
        for chunk in _chunks(generator, rows, truth.label_delay, compress=compressed is not None):
            if compressed:
                compressed.write(chunk)
            else:
                log_file.write(chunk.text)
            if late_file:
                late_file.write(chunk.late_text)
            for part in counts:
                part.add(chunk)
            late_clicks += chunk.late_clicks
            progress.advance(chunk.rows)
        if compressed:
            compressed.finish()
        splits = dict(zip(ranges, (part.attainable() for part in counts), strict=True))
        truth = truth.of(splits.pop("whole"), splits, late_clicks)
        truth_file.write(truth.as_json())
    return truth, counts[0]


def count_rows(generator: RowGenerator, rows: int, progress: ProgressListener) -> "LogitCounts":
    """Count the logits of a log that is written already."""
    counts = LogitCounts(0, rows)
    for chunk in _chunks(generator, rows, with_text=False):
        counts.add(chunk)
        progress.advance(chunk.rows)
    return counts


def _ranges(rows: int) -> dict[str, tuple[int, int]]:
    """First row and number of rows of what the truth is told about."""
    held_out = rows // 7
    test = held_out // 2
    return {
        "whole": (0, rows),
        "held_out": (rows - held_out, held_out),
        "val": (rows - held_out, held_out - test),
        "test": (rows - test, test),
    }


@dataclass(frozen=True)
class _Chunk:
    """Consecutive rows of a log."""

    first_row: int
    rows: int
    text: bytes
    deflated: bytes
    outcomes: NDArray[np.int64]  # 2 * logit + label [rows]
    late_text: bytes
    late_clicks: int


def _chunks(
    generator: RowGenerator, rows: int, label_delay: float = 0.0, *, compress: bool = False, with_text: bool = True
) -> Iterator[_Chunk]:
    """All chunks in order; workers are ahead by two each, which bounds the memory."""
    # With companions a block alone has 9 MB.
    chunk_rows = BLOCK_ROWS if generator.has_companions else _CHUNK_ROWS

    def make(first_row: int) -> _Chunk:
        end_row = min(first_row + chunk_rows, rows)
        blocks = [
            generator.block(
                row // BLOCK_ROWS, min(BLOCK_ROWS, end_row - row), label_delay=label_delay, with_text=with_text
            )
            for row in range(first_row, end_row, BLOCK_ROWS)
        ]
        text = b"".join(block.text for block in blocks)
        return _Chunk(
            first_row,
            end_row - first_row,
            text,
            _deflate(text) if compress else b"",
            np.concatenate([block.logits * np.int64(2) + block.labels for block in blocks]),
            b"".join(block.late_text for block in blocks),
            sum(block.late_clicks for block in blocks),
        )

    num_workers = min(_MAX_WORKERS, len(os.sched_getaffinity(0)))
    with ThreadPoolExecutor(num_workers, thread_name_prefix="synthesize") as workers:
        ahead: deque[Future[_Chunk]] = deque()
        try:
            for first_row in range(0, rows, chunk_rows):
                ahead.append(workers.submit(make, first_row))
                if len(ahead) > 2 * num_workers:
                    yield ahead.popleft().result()
            while ahead:
                yield ahead.popleft().result()
        finally:
            for future in ahead:
                future.cancel()


class LogitCounts:
    """Counts, for some rows of the log, clicks and other rows at each point of the grid of true logits."""

    def __init__(self, first_row: int, num_rows: int) -> None:
        self._first_row = first_row
        self._num_rows = num_rows
        self._counts = np.zeros(2 * NUM_LOGITS, np.int64)

    def add(self, chunk: _Chunk) -> None:
        """Count those of its rows that are of this part of the log."""
        start = max(self._first_row - chunk.first_row, 0)
        end = max(self._first_row + self._num_rows - chunk.first_row, 0)
        self._counts += np.bincount(chunk.outcomes[start:end], minlength=2 * NUM_LOGITS)

    def extend(self, other: "LogitCounts") -> None:
        """Count the rows that another has counted, which follow those that were counted."""
        self._num_rows += other._num_rows
        self._counts += other._counts

    def attainable(self) -> Attainable:
        """What can be reached on the counted rows."""
        others, clicks = self._counts.reshape(NUM_LOGITS, 2).T
        probabilities = click_thresholds() / 2.0**32
        losses = np.concatenate([clicks * -np.log(probabilities), others * -np.log1p(-probabilities)])
        rows = int(self._counts.sum())
        assert rows == self._num_rows
        return Attainable(
            first_row=self._first_row,
            rows=rows,
            click_rate=int(clicks.sum()) / rows if rows else math.nan,
            auc=auc_from_counts(clicks, others),
            logloss=math.fsum(losses) / rows if rows else math.nan,
        )


class _GzipFile:
    """One gzip member, whose chunks were deflated on their own: other readers than gzip's stop at a second member."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self._crc = 0
        self._num_bytes = 0
        file.write(_GZIP_HEADER)

    def write(self, chunk: _Chunk) -> None:
        self._crc = zlib.crc32(chunk.text, self._crc)
        self._num_bytes += len(chunk.text)
        self._file.write(chunk.deflated)

    def finish(self) -> None:
        self._file.write(zlib.compressobj(_GZIP_LEVEL, zlib.DEFLATED, -zlib.MAX_WBITS).flush())
        self._file.write(self._crc.to_bytes(4, "little") + (self._num_bytes % 2**32).to_bytes(4, "little"))


def _deflate(text: bytes) -> bytes:
    """A part of a deflate stream that ends at a byte and refers to nothing before itself."""
    stream = zlib.compressobj(_GZIP_LEVEL, zlib.DEFLATED, -zlib.MAX_WBITS)
    return stream.compress(text) + stream.flush(zlib.Z_FULL_FLUSH)


@contextmanager
def writing(path: Path) -> Iterator[IO[bytes]]:
    """A file that takes the name `path` when the block ends well, and leaves nothing behind when it does not."""
    try:
        with replacing(path) as temporary, temporary.open("wb") as file:
            yield file
    except OSError as error:
        msg = f"{path}: cannot be written ({error.strerror}); choose a folder that exists, may be written and has room"
        raise LogError(msg) from error
