"""Which rows go to which split; buckets and order of rows are hashes of their positions."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from torchdlrm.data import splits as shuffle
from torchdlrm.data.splits import SPLIT_NAMES, SplitBounds, criteo_split
from torchdlrm.errors import LogError
from torchdlrm.logs.files import LogFile
from torchdlrm.logs.formats.text import TEXT
from torchdlrm.storage.reading import FileIdentity


def files(*days):
    return [LogFile(Path(f"day_{day}" if day is not None else "log"), FileIdentity(1, 0), day, TEXT) for day in days]


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


def splitmix64(x: int) -> int:
    """The output function of SplitMix64, in plain Python."""
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB % 2**64
    return x ^ (x >> 31)


@pytest.mark.parametrize("seed", [0, 1, 2**63 - 1])
def test_hashes_equal_splitmix64_in_plain_python(seed):
    golden = 0x9E3779B97F4A7C15
    positions = np.array([0, 1, 2, 1000, 2**40])

    def keys(stream):
        start = splitmix64((splitmix64(seed * golden % 2**64) + stream) % 2**64)
        return [splitmix64((start + (int(p) + 1) * golden) % 2**64) for p in positions]

    assert shuffle.buckets(positions, seed, 1000).tolist() == [(key >> 32) * 1000 >> 32 for key in keys(1)]
    assert shuffle.order_in_bucket(positions, seed).tolist() == sorted(range(5), key=lambda i: keys(2)[i])


def test_buckets_are_uniform():
    sizes = np.bincount(shuffle.buckets(np.arange(1_000_000), 3, 100), minlength=100)
    chi_square = ((sizes - 10_000) ** 2 / 10_000).sum()
    assert 50 < chi_square < 160  # 99 degrees of freedom: outside with a chance below 1e-4
