"""Writes one synthetic log and its truth: rows are made on all cores, files appear whole or not at all."""

import gzip
import os
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import IO

import numpy as np
from numpy.typing import NDArray

from torchdlrm.errors import LogError
from torchdlrm.files import replacing
from torchdlrm.progress import ProgressListener
from torchdlrm.synthetic.model import NUM_LOGITS
from torchdlrm.synthetic.rows import BLOCK_ROWS, RowGenerator, Rows
from torchdlrm.synthetic.truth import Attainable, Counts, SyntheticTruth, truth_path

_CHUNK_ROWS = 16 * BLOCK_ROWS  # the unit of work, of writing and of compression
_MAX_WORKERS = 4  # the interpreter's lock and the disk leave no use for more
# Chunks are members of a gzip file, without a time: the same bytes tomorrow.
_pack = partial(gzip.compress, compresslevel=1, mtime=0)


def write_log(
    path: Path,
    generator: RowGenerator,
    given: SyntheticTruth,
    progress: ProgressListener,
    *,
    schema: str | None = None,
    late_path: Path | None = None,
) -> tuple[SyntheticTruth, Counts]:
    """Write a log and what stands next to it.

    Args:
        path: of the log; it is compressed when it ends in `.gz`.
        generator: of the rows.
        given: of the truth; the rest is computed.
        progress: receives the rows written.
        schema: of the log, to write next to it.
        late_path: gets the rows whose clicks the log does not show yet, with their clicks.

    Returns:
        The truth, and the counts of the whole log.
    """
    parts = _parts(given.rows)
    counts = {name: np.zeros(2 * NUM_LOGITS, np.int64) for name in parts}
    late_clicks = 0
    with ExitStack() as files:
        # The log takes its name last: one that is there is never without what stands next to it.
        log_file, truth_file = files.enter_context(writing(path)), files.enter_context(writing(truth_path(path)))
        late_file = files.enter_context(writing(late_path)) if late_path else None
        if schema is not None:
            files.enter_context(writing(schema_path(path))).write(schema.encode())
        pack = _pack if path.name.endswith(".gz") else None
        for first_row, rows in _chunks(generator, given.rows, given.label_delay, pack=pack):
            log_file.write(rows.text)
            if late_file:
                late_file.write(rows.late_text)
            late_clicks += rows.late_text.count(b"\n")
            for name, bounds in parts.items():
                start, end = (max(row - first_row, 0) for row in bounds)
                counts[name] += _counts(rows.outcomes[start:end])
            progress.advance(len(rows.outcomes))
        splits = {name: Attainable.of(counts[name], start) for name, (start, _) in parts.items()}
        truth = given.of(splits.pop("whole"), splits, late_clicks)
        truth_file.write(truth.as_json())
    return truth, counts["whole"]


def count_rows(generator: RowGenerator, rows: int, progress: ProgressListener) -> Counts:
    """The counts of a log that is written already."""
    counts = np.zeros(2 * NUM_LOGITS, np.int64)
    for _, chunk in _chunks(generator, rows, with_text=False):
        counts += _counts(chunk.outcomes)
        progress.advance(len(chunk.outcomes))
    return counts


def schema_path(log: Path) -> Path:
    """Where the schema of a log with several values in a cell stands."""
    return log.with_name(log.name + ".schema.toml")


@contextmanager
def writing(path: Path) -> Iterator[IO[bytes]]:
    """A file that takes the name `path` when the block ends well, and leaves nothing behind when it does not."""
    try:
        with replacing(path) as temporary, temporary.open("wb") as file:
            yield file
    except OSError as error:
        msg = f"{path}: cannot be written ({error.strerror}); choose a folder that exists, may be written and has room"
        raise LogError(msg) from error


def _parts(rows: int) -> dict[str, tuple[int, int]]:
    """First row and end of each part of a log that the truth is about."""
    held_out = rows // 7
    middle = rows - held_out // 2
    return {
        "whole": (0, rows),
        "held_out": (rows - held_out, rows),
        "val": (rows - held_out, middle),
        "test": (middle, rows),
    }


def _counts(outcomes: NDArray[np.int32]) -> Counts:
    return np.bincount(outcomes, minlength=2 * NUM_LOGITS)


def _chunks(
    generator: RowGenerator,
    num_rows: int,
    label_delay: float = 0.0,
    *,
    pack: Callable[[bytes], bytes] | None = None,
    with_text: bool = True,
) -> Iterator[tuple[int, Rows]]:
    """First row and rows of each chunk, in order; workers are ahead by two each, which bounds the memory."""
    # With companions a block alone has 9 MB.
    chunk_rows = BLOCK_ROWS if generator.values.companions else _CHUNK_ROWS

    def make(start: int) -> tuple[int, Rows]:
        end = min(start + chunk_rows, num_rows)
        rows = generator.rows(start, end, label_delay=label_delay, with_text=with_text)
        return start, replace(rows, text=pack(rows.text)) if pack else rows

    num_workers = min(_MAX_WORKERS, len(os.sched_getaffinity(0)))
    with ThreadPoolExecutor(num_workers, thread_name_prefix="synthesize") as workers:
        ahead: deque[Future[tuple[int, Rows]]] = deque()
        try:
            for start in range(0, num_rows, chunk_rows):
                ahead.append(workers.submit(make, start))
                if len(ahead) > 2 * num_workers:
                    yield ahead.popleft().result()
            while ahead:
                yield ahead.popleft().result()
        finally:
            for future in ahead:
                future.cancel()
