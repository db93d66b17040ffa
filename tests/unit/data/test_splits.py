"""Which rows go to which split."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from torchdlrm.data.splits import SPLIT_NAMES, SplitBounds, criteo_split
from torchdlrm.errors import LogError
from torchdlrm.logs.files import LogFile
from torchdlrm.logs.formats.text import TEXT


def files(*days):
    return [LogFile(Path(f"day_{day}" if day is not None else "log"), 1, day, TEXT) for day in days]


def test_the_kaggle_log_is_cut_as_facebookresearch_dlrm_cuts_it():
    split = criteo_split(files(None), [45_840_617])
    assert (split.train_rows, split.val_rows, split.test_rows) == (39_291_958, 3_274_330, 3_274_329)


def test_the_terabyte_log_is_cut_as_torchrec_and_mlperf_cut_it():
    split = criteo_split(files(*range(24)), [1000] * 23 + [178_274_637])
    assert (split.train_rows, split.val_rows, split.test_rows) == (23_000, 89_137_319, 89_137_318)


def test_all_files_of_the_last_day_are_held_out():
    split = criteo_split(files(0, 1, 1), [10, 3, 5])
    assert (split.train_rows, split.val_rows, split.test_rows) == (10, 4, 4)


def test_one_day_alone_is_cut_by_sevenths():
    assert criteo_split(files(23), [70]).train_rows == 60


@pytest.mark.parametrize(("days", "rows"), [((None,), [13]), ((0, 1), [100, 1]), ((0, 1), [0, 10])])
def test_a_split_without_rows_is_reported(days, rows):
    with pytest.raises(LogError, match="too short to split"):
        criteo_split(files(*days), rows)


@given(sizes=st.tuples(*[st.integers(0, 20)] * 3), first_row=st.integers(0, 60), num_rows=st.integers(0, 60))
def test_rows_of_a_chunk_go_where_their_position_in_the_log_says(sizes, first_row, num_rows):
    log = [name for name, size in zip(("train", "val", "test"), sizes, strict=True) for _ in range(size)]
    chunk = log[first_row : first_row + num_rows]
    found = SplitBounds("", *sizes).split_of_rows(first_row, len(chunk), None)
    assert [SPLIT_NAMES[code] for code in found] == chunk
