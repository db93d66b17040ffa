"""Which rows of a log are for training, which for validation, which for the test.

In: the log's files and the number of good rows in each.  Out: bounds in the order of the log.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from torchdlrm.data.source import LogFile
from torchdlrm.errors import LogError

SplitName = Literal["train", "val", "test"]
SPLIT_NAMES: tuple[SplitName, ...] = ("train", "val", "test")
# As the Kaggle log is cut by facebookresearch/dlrm: seven days without day marks, a remainder going to the first parts.
_NUM_PARTS = 7


@dataclass(frozen=True)
class SplitBounds:
    """Rows of each split; they follow each other in the log.  `rule` says, for people, how they were cut."""

    rule: str
    train_rows: int
    val_rows: int
    test_rows: int

    def rows_of(self, first_row: int, num_rows: int) -> dict[SplitName, slice]:
        """Where, among the rows `first_row` ... `first_row + num_rows - 1` of the log, each split's rows lie."""
        ends = (self.train_rows, self.train_rows + self.val_rows, self.train_rows + self.val_rows + self.test_rows)
        starts = (0, *ends[:2])
        return {
            name: slice(*(min(max(edge - first_row, 0), num_rows) for edge in (start, end)))
            for name, start, end in zip(SPLIT_NAMES, starts, ends, strict=True)
        }


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
        msg = (
            f"the log is too short to split: of {rows:,} good rows, {split.train_rows:,} are for training, "
            f"{split.val_rows:,} for val and {split.test_rows:,} for test; each needs at least 1 "
            f"({2 * _NUM_PARTS} rows in all, without day files)"
        )
        raise LogError(msg)
    return split
