"""Writes one synthetic log and its truth: rows are made on all cores, files appear whole or not at all.

The truth is the best that any model can reach on the log. True logits lie on a grid: counts of clicks and of other rows
for each of its points give the exact AUC and logloss, in memory that does not grow with the rows.
"""

import gzip
import json
import math
import os
from collections import defaultdict, deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import IO, Annotated, Any

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, BeforeValidator, ValidationError

from torchdlrm.errors import LogError
from torchdlrm.files import replacing
from torchdlrm.progress import ProgressListener
from torchdlrm.ranks import auc_from_counts
from torchdlrm.records import problems
from torchdlrm.synthetic.model import NUM_LOGITS, click_thresholds
from torchdlrm.synthetic.rows import BLOCK_ROWS, RowGenerator, Rows
from torchdlrm.synthetic.shop import ShopGenerator
from torchdlrm.synthetic.values import Companions, Drift

_CHUNK_ROWS = 16 * BLOCK_ROWS  # the unit of work, of writing and of compression
_MAX_WORKERS = 4  # the interpreter's lock and the disk leave no use for more
# Chunks are members of a gzip file, without a time: the same bytes tomorrow.
_pack = partial(gzip.compress, compresslevel=1, mtime=0)

Counts = NDArray[np.int64]  # of 2 * logit + label [2 NUM_LOGITS]
# NaN where a metric is not defined; JSON has null there.
_Metric = Annotated[float, BeforeValidator(lambda value: math.nan if value is None else value)]


class Attainable(BaseModel, frozen=True):
    """What a model that knows the true probabilities reaches on some rows; NaN where the metric is not defined.

    Attributes:
        first_row: of these rows in the log, from 0.
        rows: how many.
        click_rate: fraction of them that was clicked.
        auc: exact, as `torchdlrm.metrics.auc`.
        logloss: in nats.
    """

    first_row: int
    rows: int
    click_rate: _Metric
    auc: _Metric
    logloss: _Metric

    @classmethod
    def of(cls, counts: Counts, first_row: int = 0) -> "Attainable":
        """On the counted rows."""
        others, clicks = counts.reshape(NUM_LOGITS, 2).T
        probabilities = click_thresholds() / 2.0**32
        losses = np.concatenate([clicks * -np.log(probabilities), others * -np.log1p(-probabilities)])
        rows = int(counts.sum())
        return cls(
            first_row=first_row,
            rows=rows,
            click_rate=int(clicks.sum()) / rows if rows else math.nan,
            auc=auc_from_counts(clicks, others),
            logloss=math.fsum(losses) / rows if rows else math.nan,
        )


class SyntheticTruth(BaseModel, frozen=True):
    """The content of `<log>.truth.json`.

    Attributes:
        rows: of the whole log.
        seed: given.
        preset: given; of the log of a shop, what it has.
        click_rate: fraction of all rows that was clicked.
        auc: attainable on all rows.
        logloss: attainable on all rows, in nats.
        multi_hot: given.
        drift: given, of a log of several days.
        label_delay: given, of such a log.
        late_clicks: of such a log, how many clicks its rows do not show. Everywhere else here they are clicks.
        day: in the truth about a day, which.
        splits: attainable on the rows that a split by order keeps for judging: `held_out`, the last `rows // 7`,
            its first half `val` (the larger by one where they differ) and its second half `test`.
            Of a log of several days these days, `day_00` and so on, in the truth about all of them. Of the log of a
            shop also `val.purchase` or `val.without_content` and so on, `whole.purchase` of all rows.
    """

    rows: int
    seed: int
    preset: str
    click_rate: _Metric = math.nan
    auc: _Metric = math.nan
    logloss: _Metric = math.nan
    multi_hot: Companions | None = None
    drift: Drift | None = None
    label_delay: float = 0.0
    late_clicks: int = 0
    day: int | None = None
    splits: dict[str, Attainable] = {}

    def as_dict(self) -> dict[str, Any]:
        """As it stands in the file; what is not defined is None."""
        return json.loads(self.model_dump_json())

    def as_json(self) -> bytes:
        """The content of the file."""
        return self.model_dump_json(indent=2).encode() + b"\n"

    def of(self, whole: Attainable, splits: dict[str, Attainable], late_clicks: int) -> "SyntheticTruth":
        """What is given here, with what was found about the rows."""
        found = whole.model_dump(exclude={"first_row"})
        return self.model_copy(update={**found, "splits": splits, "late_clicks": late_clicks})


def truth_path(log: Path) -> Path:
    """Where the truth about a log stands; about all days of a folder in it."""
    return log / "truth.json" if log.is_dir() else log.with_name(log.name + ".truth.json")


def read_truth(log: Path) -> SyntheticTruth:
    """The truth about a complete log, as `synthesize` gave it.

    Raises:
        LogError: there is none, or it is not what `synthesize` writes.
    """
    path = truth_path(log)
    try:
        return SyntheticTruth.model_validate_json(path.read_bytes())
    except ValidationError as error:
        why = "; ".join(line.strip() for line in problems(error))
    except OSError as error:
        why = str(error)
    msg = f"{path}: not what dlrm synthesize writes next to a log ({why}); remove the log and synthesize it again"
    raise LogError(msg)


def write_log(
    path: Path,
    generator: RowGenerator | ShopGenerator,
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
    counts: dict[str, Counts] = defaultdict(lambda: np.zeros(2 * NUM_LOGITS, np.int64))
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
                for of, outcomes in {name: rows.outcomes, **{f"{name}.{n}": o for n, o in rows.others.items()}}.items():
                    counts[of] += _counts(outcomes[start:end])
            progress.advance(len(rows.outcomes))
        splits = {name: Attainable.of(of, parts[name.partition(".")[0]][0]) for name, of in counts.items()}
        for name in [name for name in splits if ".without_" in name]:  # their logits rank rows, and are no more
            splits[name] = splits[name].model_copy(update={"logloss": math.nan})
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
    generator: RowGenerator | ShopGenerator,
    num_rows: int,
    label_delay: float = 0.0,
    *,
    pack: Callable[[bytes], bytes] | None = None,
    with_text: bool = True,
) -> Iterator[tuple[int, Rows]]:
    """First row and rows of each chunk, in order; workers are ahead by two each, which bounds the memory."""
    # With companions a block alone has 9 MB, of a shop it takes as much to make.
    is_small = isinstance(generator, RowGenerator) and not generator.values.companions
    chunk_rows = _CHUNK_ROWS if is_small else BLOCK_ROWS

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
