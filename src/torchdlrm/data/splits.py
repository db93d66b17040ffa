"""Decides which rows of a log are for train, val and test, and where shuffled training rows go.

In: the log's files, the number of good rows in each, and the schema's rule.  Out: a `RowSplit`, which gives the split
of any row by its position among the good rows of the log, or by its time.

| rule | held out |
| --- | --- |
| criteo | the last day, where files are named by day, else the last seventh of the rows; its first half is `val` |
| folder | the files in folders named `val`, `valid` or `validation`, and `test`; those in `train` are for training |
| order | the last rows of the log, `val` before `test` |
| random | rows chosen by a hash of their position and the seed |
| time | the rows of the latest times, `val` before `test`; rows of one time stay together |

Training rows are shuffled: the bucket (part file) of a row and its place there are hashes of its position in the log
and a seed, so any number of workers can shuffle the whole split, in any order, with the same result.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal, Protocol

import numpy as np
import numpy.typing as npt

from torchdlrm.errors import LogError
from torchdlrm.features.columns import TimeColumn
from torchdlrm.features.schema import SplitRule
from torchdlrm.features.value_hash import splitmix
from torchdlrm.logs.files import LogFile

SplitName = Literal["train", "val", "test"]
SPLIT_NAMES: tuple[SplitName, ...] = ("train", "val", "test")
# As the Kaggle log is cut by facebookresearch/dlrm: seven days without day marks, a remainder going to the first parts.
_NUM_PARTS = 7

_BUCKET_STREAM, _ORDER_STREAM, _SPLIT_STREAM = 1, 2, 3  # 4 is that of raw values

_FOLDERS: Mapping[str, SplitName] = {
    "train": "train",
    "val": "val",
    "valid": "val",
    "validation": "val",
    "test": "test",
}

SplitCodes = npt.NDArray[np.uint8]  # positions in SPLIT_NAMES


class RowSplit(Protocol):
    """Gives the split of rows; can be sent to another process.  `rule` says, for people, how they were split."""

    @property
    def rule(self) -> str:
        """How the rows were split, in words."""

    def split_of_rows(self, first_row: int, num_rows: int, times: npt.NDArray[np.int64] | None) -> SplitCodes:
        """The split of B rows that follow each other in the log: uint8 [B].

        Args:
            first_row: the position of the first among the good rows of the log.
            num_rows: B.
            times: int64 [B], as `cells` orders them; None where the log has no time.
        """


@dataclass(frozen=True)
class SplitBounds:
    """Rows of each split; they follow each other in the log.  `rule` says, for people, how they were cut."""

    rule: str
    train_rows: int
    val_rows: int
    test_rows: int

    def split_of_rows(self, first_row: int, num_rows: int, times: npt.NDArray[np.int64] | None) -> SplitCodes:  # noqa: ARG002
        """The split of B rows that follow each other in the log: uint8 [B]."""
        ends = np.clip([self.train_rows - first_row, self.train_rows + self.val_rows - first_row], 0, num_rows)
        return np.repeat(np.arange(3, dtype=np.uint8), np.diff([0, *ends, num_rows]))


def criteo_split(files: Sequence[LogFile], rows_of_files: Sequence[int]) -> SplitBounds:
    """Hold out the last day where files are named by day, else the last seventh; its first half is `val`.

    Raises:
        LogError: the log is too short to hold anything out, or to train on.
    """
    rows = sum(rows_of_files)
    days = {file.day for file in files}
    if len(days) > 1 and None not in days:
        last_day = files[-1].day
        held_out = sum(n for file, n in zip(files, rows_of_files, strict=True) if file.day == last_day)
        rule = f"criteo: the last day (day_{last_day}) is held out, its first half val, its second half test"
    else:
        held_out = rows // _NUM_PARTS
        rule = "criteo: the last seventh of the rows is held out, its first half val, its second half test"
    val_rows = (held_out + 1) // 2
    split = SplitBounds(rule, rows - held_out, val_rows, held_out - val_rows)
    if not (split.train_rows and split.val_rows and split.test_rows):
        raise LogError(
            f"the log is too short to split: of {rows:,} good rows, {split.train_rows:,} are for training, "
            f"{split.val_rows:,} for val and {split.test_rows:,} for test; each needs at least 1 "
            f"({2 * _NUM_PARTS} rows in all, without day files)"
        )
    return split


def split_of_folder(path: Path) -> SplitName | None:
    """The split that the innermost folder of a file which is named as one is; None where none is."""
    return next((_FOLDERS[part] for part in reversed(path.parent.parts) if part in _FOLDERS), None)


def folder_split(files: Sequence[LogFile], rows_of_files: Sequence[int]) -> SplitBounds:
    """Split files by the folders that they lie in.

    Raises:
        LogError: a file lies in none that is named as a split, or the files are not in the order of the splits.
    """
    rows = dict.fromkeys(SPLIT_NAMES, 0)
    place = 0
    for file, num_rows in zip(files, rows_of_files, strict=True):
        name = split_of_folder(file.path)
        if name is None:
            msg = f"{file.path}: lies in no folder named {', '.join(_FOLDERS)}, by which the schema splits the log"
            raise LogError(msg)
        if SPLIT_NAMES.index(name) < place:
            raise LogError(f"{file.path}: give the files of train first, then those of val and of test")
        place = SPLIT_NAMES.index(name)
        rows[name] += num_rows
    return SplitBounds("as the files were split", *rows.values())


def order_split(num_rows: int, rule: SplitRule) -> SplitBounds:
    """Hold out the last rows of a log of `num_rows`."""
    val_rows, test_rows = round(num_rows * rule.val), round(num_rows * rule.test)
    words = f"order: the last rows are held out, {rule.val:g} of all for val, then {rule.test:g} for test"
    return SplitBounds(words, num_rows - val_rows - test_rows, val_rows, test_rows)


@dataclass(frozen=True)
class RandomSplit:
    """Each row by itself, by a hash of its position and the seed."""

    val: float
    test: float
    seed: int

    @property
    def rule(self) -> str:
        """How the rows were split, in words."""
        return f"random: {self.val:g} of the rows for val and {self.test:g} for test, by a hash of position and seed"

    def split_of_rows(self, first_row: int, num_rows: int, times: npt.NDArray[np.int64] | None) -> SplitCodes:  # noqa: ARG002
        """The split of B rows that follow each other in the log: uint8 [B]."""
        # A number of each row, uniform from 0 to 2^32 - 1.
        draws = splitmix(np.arange(first_row, first_row + num_rows), self.seed, _SPLIT_STREAM) >> np.uint64(32)
        edges = np.array([round(self.val * 2**32), round((self.val + self.test) * 2**32)], np.uint64)
        # 0 below the first edge is val, then test, then train.
        return np.array([1, 2, 0], np.uint8)[np.searchsorted(edges, draws, side="right")]


@dataclass(frozen=True)
class TimeSplit:
    """By a time column: from `val_from` on `val`, from `test_from` on `test`; None: no row."""

    column: TimeColumn
    val_from: int | None
    test_from: int | None

    @property
    def rule(self) -> str:
        """How the rows were split, in words."""
        parts = [
            f"{name} from {_time_in_words(start, self.column)} on"
            for name, start in (("val", self.val_from), ("test", self.test_from))
            if start is not None
        ]
        return f"time: by {self.column.name}, {', '.join(parts) or 'nothing is held out'}"

    def split_of_rows(self, first_row: int, num_rows: int, times: npt.NDArray[np.int64] | None) -> SplitCodes:  # noqa: ARG002
        """The split of B rows that follow each other in the log: uint8 [B]."""
        assert times is not None, "a log that is split by time has times"
        codes = np.zeros(num_rows, np.uint8)
        for code, start in ((1, self.val_from), (2, self.test_from)):
            if start is not None:
                codes[times >= start] = code
        return codes


def _time_in_words(time: int, column: TimeColumn) -> str:
    if column.kind == "datetime":
        return datetime.fromtimestamp(time / 1e6, UTC).isoformat()
    if column.kind == "int":
        return str(time)
    bits = time if time >= 0 else time ^ (2**63 - 1)
    return repr(float(np.array([bits], np.int64).view(np.float64)[0]))


def check_split(rule: SplitRule, rows: Sequence[int]) -> None:
    """See that no split that was asked for is empty; `rows` of train, val and test.

    Raises:
        LogError: one is.
    """
    remedy = "give more rows, or other fractions for val and test"
    if rule.rule == "folder":
        asked, remedy = (True, False, False), "give the files of the folder train too"
    else:
        asked = (True, rule.rule == "criteo" or rule.val > 0, rule.rule == "criteo" or rule.test > 0)
    empty = [name for name, wanted, count in zip(SPLIT_NAMES, asked, rows, strict=True) if wanted and not count]
    if empty:
        raise LogError(
            f"the log cannot be split by the rule {rule.rule!r}: of {sum(rows):,} good rows none is left for "
            f"{' and '.join(empty)}; {remedy}"
        )


def buckets(positions: npt.NDArray[np.int64], seed: int, num_buckets: int) -> npt.NDArray[np.int64]:
    """The bucket of each row, uniform: int64 [B]."""
    high = splitmix(positions, seed, _BUCKET_STREAM) >> np.uint64(32)
    return ((high * np.uint64(num_buckets)) >> np.uint64(32)).astype(np.int64)


def order_in_bucket(positions: npt.NDArray[np.int64], seed: int) -> npt.NDArray[np.int64]:
    """The permutation of a bucket's rows, given in the order of the log: int64 [B]."""
    return np.argsort(splitmix(positions, seed, _ORDER_STREAM), kind="stable")
