"""Writes a synthetic click log in the Criteo layout, and computes the best that any model can reach on it.

In: rows, seed, preset.  Out: `log.tsv` (or `log.tsv.gz`) and `log.tsv.truth.json`; of a log with several values in a
cell also `log.tsv.schema.toml`.

| stage | input | output | where |
| --- | --- | --- | --- |
| shapes | numbers measured on the real logs | a table of equally likely cells for each column | synthetic_shapes.py |
| model | seed | effects of values and of pairs of values | synthetic_model.py |
| rows | seed, number of a block | lines, labels, true logits | synthetic_rows.py |
| companions | ranks of values | ranks of the other values of their cells | synthetic_multi_hot.py |
| job | rows | the files | here |

The bytes depend on rows, seed and preset alone, and the first rows of a longer log are those of a shorter one. Memory
does not grow with the rows: true logits lie on a grid, so that counts of clicks for each of its points give the exact
AUC and logloss. Cost on one core: 2 us a row as plain text.
"""

import json
import math
import os
import zlib
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from torchdlrm.data.synthetic_model import NUM_LOGITS, click_thresholds
from torchdlrm.data.synthetic_multi_hot import COMPANIONS, Companions, multi_hot_schema
from torchdlrm.data.synthetic_rows import BLOCK_ROWS, RowGenerator
from torchdlrm.data.synthetic_shapes import PRESETS
from torchdlrm.errors import ConfigError, LogError
from torchdlrm.files import replacing
from torchdlrm.metrics import auc_from_counts
from torchdlrm.progress import SILENT, ProgressListener

_CHUNK_ROWS = 16 * BLOCK_ROWS  # the unit of work, of writing and of compression
_MAX_WORKERS = 4  # the interpreter's lock and the disk leave no use for more
_GZIP_LEVEL = 1
# Magic, deflate, no flags, no time (the same bytes tomorrow), fastest, Unix.
_GZIP_HEADER = bytes([0x1F, 0x8B, 8, 0, 0, 0, 0, 0, 4, 3])


@dataclass(frozen=True)
class Attainable:
    """What a model that knows the true probabilities reaches on some rows; NaN where the metric is not defined.

    Attributes:
        first_row: of these rows in the log, from 0.
        rows: how many.
        click_rate: share of them that was clicked.
        auc: exact, as `torchdlrm.metrics.auc`.
        logloss: in nats.
    """

    first_row: int
    rows: int
    click_rate: float
    auc: float
    logloss: float


@dataclass(frozen=True)
class SyntheticTruth:
    """The content of `<log>.truth.json`.

    Attributes:
        rows: of the whole log.
        seed: given.
        preset: given.
        click_rate: share of all rows that was clicked.
        auc: attainable on all rows.
        logloss: attainable on all rows, in nats.
        splits: attainable on the rows that a split by order keeps for judging: `held_out`, the last `rows // 7`,
            its first half `val` (the larger by one where they differ) and its second half `test`.
        multi_hot: given.
    """

    rows: int
    seed: int
    preset: str
    click_rate: float
    auc: float
    logloss: float
    splits: dict[str, Attainable]
    multi_hot: Companions | None = None

    def as_dict(self) -> dict[str, object]:
        """As it stands in the file; what is not defined is None."""
        fields = asdict(self)
        splits = {name: _without_nan(split) for name, split in fields.pop("splits").items()}
        return {**_without_nan(fields), "splits": splits}


def truth_path(log: Path) -> Path:
    """Where the truth about a log stands."""
    return log.with_name(log.name + ".truth.json")


def schema_path(log: Path) -> Path:
    """Where the schema of a log with several values in a cell stands."""
    return log.with_name(log.name + ".schema.toml")


def read_truth(log: Path) -> SyntheticTruth:
    """The truth about a complete log, as `synthesize` gave it.

    Raises:
        LogError: there is none, or it is not what `synthesize` writes.
    """
    path = truth_path(log)
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
        splits = {name: Attainable(**_with_nan(split)) for name, split in fields.pop("splits").items()}
        return SyntheticTruth(**_with_nan(fields), splits=splits)
    except (OSError, ValueError, TypeError, AttributeError, KeyError) as error:
        msg = f"{path}: not what dlrm synthesize writes next to a log ({error}); remove the log and synthesize it again"
        raise LogError(msg) from error


def synthesize(
    path: str | Path,
    *,
    rows: int,
    seed: int = 0,
    preset: str = "criteo-kaggle",
    multi_hot: Companions | None = None,
    max_embeddings: int | None = None,
    progress: ProgressListener = SILENT,
) -> SyntheticTruth:
    """Write a click log and its truth; all files appear under their names only when they are complete.

    Args:
        path: of the log, compressed with gzip when it ends in `.gz`; a file that is there is replaced.
        rows: of the log, at least 1.
        seed: of everything: hidden model, features, labels; not negative.
        preset: `criteo-kaggle` or `criteo-1tb`, which says how columns are distributed and how often rows are clicked.
        multi_hot: with it cells hold as many values as in MLPerf's DLRM-DCNv2 benchmark, 214 a row: behind each value
            stand its companions, `uniform` or `pareto`, which are the same wherever the value is. The schema of such a
            log is written too. Labels and first values, and so the truth, are those of the log without companions; a
            missing value is a value like others.
        max_embeddings: the schema cuts tables to so many rows; only with `multi_hot`.
        progress: shows the rows written.

    Raises:
        ConfigError: an argument is none of the above.
        LogError: a file cannot be written.
    """
    path = Path(path)
    _check(rows, seed, preset, multi_hot, max_embeddings)
    generator = RowGenerator(preset, seed, multi_hot)
    counts = [_LogitCounts(first, num) for first, num in _ranges(rows).values()]
    with ExitStack() as files:
        # The log takes its name last: one that is there is never without what stands next to it.
        log_file, truth_file = files.enter_context(_writing(path)), files.enter_context(_writing(truth_path(path)))
        if multi_hot:
            schema = multi_hot_schema(generator.shape, max_embeddings)
            files.enter_context(_writing(schema_path(path))).write(schema.encode())
        compressed = _GzipFile(log_file) if path.name.endswith(".gz") else None
        progress.start_phase("write rows", rows)
        # With companions a block alone has 9 MB.
        chunk_rows = BLOCK_ROWS if multi_hot else _CHUNK_ROWS
        for chunk in _chunks(generator, rows, chunk_rows, compress=compressed is not None):
            if compressed:
                compressed.write(chunk)
            else:
                log_file.write(chunk.text)
            for part in counts:
                part.add(chunk)
            progress.advance(chunk.rows)
        if compressed:
            compressed.finish()
        whole, *splits = [part.attainable() for part in counts]
        truth = SyntheticTruth(
            rows=rows,
            seed=seed,
            preset=preset,
            click_rate=whole.click_rate,
            auc=whole.auc,
            logloss=whole.logloss,
            splits=dict(zip(list(_ranges(rows))[1:], splits, strict=True)),
            multi_hot=multi_hot,
        )
        truth_file.write(json.dumps(truth.as_dict(), indent=2).encode() + b"\n")
    return truth


def _check(rows: int, seed: int, preset: str, multi_hot: str | None, max_embeddings: int | None) -> None:
    if rows < 1:
        msg = f"rows: {rows} is too few; ask for at least 1"
        raise ConfigError(msg)
    if seed < 0:
        msg = f"seed: {seed} is negative; give 0 or more"
        raise ConfigError(msg)
    if preset not in PRESETS:
        msg = f"preset: there is no {preset!r}; choose {' or '.join(PRESETS)}"
        raise ConfigError(msg)
    if multi_hot is not None and multi_hot not in COMPANIONS:
        msg = f"`multi_hot`: there is no {multi_hot!r}; choose {' or '.join(COMPANIONS)}"
        raise ConfigError(msg)
    if max_embeddings is not None and multi_hot is None:
        msg = "`max_embeddings`: is for the schema of a log with several values in a cell; give `multi_hot` too"
        raise ConfigError(msg)
    if max_embeddings is not None and max_embeddings < 1:
        msg = f"`max_embeddings`: {max_embeddings} is too few; ask for at least 1"
        raise ConfigError(msg)


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
    first_row: int
    rows: int
    text: bytes
    deflated: bytes
    outcomes: NDArray[np.int64]  # 2 * logit + label [rows]


def _chunks(generator: RowGenerator, rows: int, chunk_rows: int, *, compress: bool) -> Iterator[_Chunk]:
    """All chunks in order; workers are ahead by two each, which bounds the memory."""

    def make(first_row: int) -> _Chunk:
        end_row = min(first_row + chunk_rows, rows)
        blocks = [
            generator.block(row // BLOCK_ROWS, min(BLOCK_ROWS, end_row - row))
            for row in range(first_row, end_row, BLOCK_ROWS)
        ]
        text = b"".join(block.text for block in blocks)
        outcomes = np.concatenate([block.logits * np.int64(2) + block.labels for block in blocks])
        return _Chunk(first_row, end_row - first_row, text, _deflate(text) if compress else b"", outcomes)

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


class _LogitCounts:
    """Counts, for some rows of the log, clicks and other rows at each point of the grid of true logits."""

    def __init__(self, first_row: int, num_rows: int) -> None:
        self._first_row = first_row
        self._num_rows = num_rows
        self._counts = np.zeros(2 * NUM_LOGITS, np.int64)

    def add(self, chunk: _Chunk) -> None:
        start = max(self._first_row - chunk.first_row, 0)
        end = max(self._first_row + self._num_rows - chunk.first_row, 0)
        self._counts += np.bincount(chunk.outcomes[start:end], minlength=2 * NUM_LOGITS)

    def attainable(self) -> Attainable:
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
def _writing(path: Path) -> Iterator[IO[bytes]]:
    """A file that takes the name `path` when the block ends well, and leaves nothing behind when it does not."""
    try:
        with replacing(path) as temporary, temporary.open("wb") as file:
            yield file
    except OSError as error:
        msg = f"{path}: cannot be written ({error.strerror}); choose a folder that exists, may be written and has room"
        raise LogError(msg) from error


def _without_nan(fields: dict[str, object]) -> dict[str, object]:
    """Replace NaN, which JSON does not have, by None."""
    return {k: None if isinstance(v, float) and math.isnan(v) else v for k, v in fields.items()}


def _with_nan(fields: dict[str, Any]) -> dict[str, Any]:
    """Replace None by NaN again."""
    return {k: math.nan if v is None else v for k, v in fields.items()}
