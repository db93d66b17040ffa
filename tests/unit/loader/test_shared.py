"""Ranks that share what they decode, each a thread of this process, next to ranks that do not."""

import gc
import itertools
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from torchdlrm.data.dataset import Dataset
from torchdlrm.errors import DatasetError
from torchdlrm.features.columns import DenseColumn, LabelColumn, SparseColumn, WeightColumn
from torchdlrm.features.schema import FeatureSchema
from torchdlrm.loader import shared
from torchdlrm.loader.loader import Loader
from torchdlrm.loader.row_groups import RowGroupReader
from torchdlrm.preprocessing.preprocess import PreprocessOptions, preprocess


@pytest.fixture
def read(monkeypatch):
    """What was decoded: (epoch, place in its order), by whom."""
    found = []
    plain_read = RowGroupReader.read

    def noted(reader, epoch, index):
        found.append((epoch, index))
        return plain_read(reader, epoch, index)

    monkeypatch.setattr(RowGroupReader, "read", noted)
    return found


def unchanged(_, value):
    return value


def start(dataset, world_size, change=unchanged, **options):
    """An iterator for each rank, all of which have found each other; `change` is what a rank tells the others."""
    barrier, told = threading.Barrier(world_size), [None] * world_size

    def begin(rank):
        def all_gather(value):
            told[rank] = change(rank, value)
            barrier.wait()
            everybody = list(told)
            barrier.wait()
            return everybody

        loader = Loader(dataset, "train", rank=rank, world_size=world_size, all_gather=all_gather, **options)
        loader.load_state_dict(STATE)
        return iter(loader)

    with ThreadPoolExecutor(world_size) as pool:
        return list(pool.map(begin, range(world_size)))


def in_step(iterators):
    """The batches of all ranks, which take each at the same time, as in training."""
    with ThreadPoolExecutor(len(iterators)) as pool:
        while all(batches := list(pool.map(next, iterators, itertools.repeat(None)))):
            yield batches
    assert batches == [None] * len(iterators)


STATE = {"epoch": 0, "batches_consumed": 1}


def alone(dataset, rank, world_size, **options):
    loader = Loader(dataset, "train", rank=rank, world_size=world_size, **options)
    loader.load_state_dict(STATE)
    return loader


def same(found, expected):
    return all(
        np.array_equal(left, right)
        for left, right in [
            (found.sparse_features.weights_or_none(), expected.sparse_features.weights_or_none()),
            (found.row_weights, expected.row_weights),
            (found.labels, expected.labels),
            (found.dense_features, expected.dense_features),
            (found.sparse_features.values(), expected.sparse_features.values()),
            (found.sparse_features.lengths(), expected.sparse_features.lengths()),
        ]
    )


@pytest.mark.parametrize(("world_size", "batch_size"), [(2, 300), (3, 100), (3, 2_000)])
def test_shared_row_groups_make_the_same_batches_and_each_is_decoded_once(many_groups, world_size, batch_size, read):
    """Two epochs, resumed after the first batch; slices that are parts of a row group, and that span several."""
    options = {"batch_size_global": batch_size, "epochs": 2, "seed": 3}
    expected = [list(alone(many_groups, rank, world_size, **options)) for rank in range(world_size)]
    needed = set(read)
    assert len(read) > len(needed) > 10
    read.clear()
    num_batches = 0
    for index, batches in enumerate(in_step(start(many_groups, world_size, **options))):
        num_batches += 1
        assert all(same(batch, expected[rank][index]) for rank, batch in enumerate(batches))
    assert num_batches == len(expected[0])
    assert sorted(read) == sorted(needed)


def test_lists_of_ids_and_weights_of_rows_are_shared_too(tmp_path, seed):
    rng = np.random.default_rng(seed)
    lines = (
        f"{rng.integers(2)},{rng.random():.3f},{rng.random():.3f},u{rng.integers(9)},{tags(rng)}\n"
        for _ in range(1_500)
    )
    (tmp_path / "log.csv").write_text("clicked,w,price,user,tags\n" + "".join(lines))
    columns = (
        LabelColumn(name="clicked"),
        WeightColumn(name="w"),
        DenseColumn(name="price", transform="none"),
        SparseColumn(name="user"),
        SparseColumn(name="tags", value_separator="|", weight_separator=":"),
    )
    schema = FeatureSchema(name="tags", separator=",", header=True, columns=columns)
    preprocess([tmp_path / "log.csv"], tmp_path / "dataset", schema, PreprocessOptions(min_count=1, part_rows=200))
    dataset = Dataset.open(tmp_path / "dataset")
    expected = [list(alone(dataset, rank, 2, batch_size_global=300)) for rank in range(2)]
    for index, batches in enumerate(in_step(start(dataset, 2, batch_size_global=300))):
        assert all(same(batch, expected[rank][index]) for rank, batch in enumerate(batches))
        assert len(set(batches[0].sparse_features.lengths().tolist())) > 2
        assert len(set(batches[0].row_weights.tolist())) > 20
    assert index == len(expected[0]) - 1 > 1


def tags(rng):
    return "|".join(f"t{tag}:{rng.normal():.3f}" for tag in rng.integers(7, size=rng.integers(1, 5)))


def test_shared_memory_has_no_name_is_of_two_row_groups_a_rank_and_goes_with_its_last_user(many_groups):
    def mapped_bytes():
        lines = [line for line in Path("/proc/self/maps").read_text().splitlines() if "torchdlrm-loader" in line]
        assert all(line.endswith("(deleted)") for line in lines)
        bounds = [line.split()[0].split("-") for line in lines]
        return sum(int(end, 16) - int(begin, 16) for begin, end in bounds)

    before = mapped_bytes()
    iterators = start(many_groups, 2, batch_size_global=300)
    next(in_step(iterators))
    largest = max(pq.read_metadata(file.path).num_rows for file in many_groups.splits["train"].files)
    row_bytes = 4 * (1 + 13 + 26)
    # Each of the two ranks maps the memory of both, which begins with a page and ends in the middle of one.
    assert 0 < mapped_bytes() - before < 2 * 2 * (2 * largest * row_bytes * 1.1 + 2 * 4096)
    for iterator in iterators:
        iterator.close()
    del iterators, iterator
    gc.collect()
    assert mapped_bytes() == before


def test_a_memory_is_closed_once_and_never_writes_to_a_file_that_has_its_number_by_then(tmp_path):
    memory = shared._Memory.make("torchdlrm-loader", 4096)
    header_of_others = shared._Memory.open(memory.address, 4096, writable=False)
    number = memory.fd
    memory.close()
    assert header_of_others.has_stopped
    assert header_of_others.position == shared._FINISHED
    with (tmp_path / "other").open("wb") as other:
        assert other.fileno() == number
        memory.close()
        del memory
        gc.collect()
    assert (tmp_path / "other").read_bytes() == b""


def test_a_damaged_row_group_is_the_same_error_on_every_rank(many_groups, monkeypatch):
    plain_read = RowGroupReader.read

    def damaged(reader, epoch, index):
        if index == 4:
            raise DatasetError("row group 4 is damaged")
        return plain_read(reader, epoch, index)

    monkeypatch.setattr(RowGroupReader, "read", damaged)
    iterators = start(many_groups, 2, batch_size_global=300)

    def read_all(iterator):
        good = []
        with pytest.raises(DatasetError, match="row group 4 is damaged"):
            good.extend(iterator)  # keeps what came before the error
        return len(good)

    with ThreadPoolExecutor(2) as pool:
        before = list(pool.map(read_all, iterators))
    assert before[0] == before[1] > 0


def test_a_rank_that_stops_early_costs_the_others_time_and_no_row(many_groups):
    options = {"batch_size_global": 300}
    stopping, staying = start(many_groups, 2, **options)
    with closing(stopping):
        found = [next(in_step([stopping, staying]))[1]]
    expected = list(alone(many_groups, 1, 2, **options))
    assert all(itertools.starmap(same, zip([*found, *staying], expected, strict=True)))


def test_a_rank_that_never_takes_its_first_batch_holds_nobody_up(many_groups, monkeypatch):
    monkeypatch.setattr(shared, "_PATIENCE_S", 5.0)
    options = {"batch_size_global": 300}
    iterators = start(many_groups, 2, **options)
    del iterators[0]
    started_s = time.monotonic()
    assert all(itertools.starmap(same, zip(iterators[0], alone(many_groups, 1, 2, **options), strict=True)))
    assert time.monotonic() - started_s < 5


def test_a_rank_that_is_late_is_not_waited_for(many_groups, monkeypatch):
    """The decoder of rank 0 hangs: as a process does that is stopped."""
    monkeypatch.setattr(shared, "_PATIENCE_S", 0.01)
    go_on, plain_fill = threading.Event(), shared._Slot.fill
    hung = []

    def fill(slot, columns):
        if not hung:
            hung.append(True)
            go_on.wait(60)
        plain_fill(slot, columns)

    monkeypatch.setattr(shared._Slot, "fill", fill)
    options = {"batch_size_global": 2_000}
    iterators = start(many_groups, 2, **options)
    expected = [list(alone(many_groups, rank, 2, **options)) for rank in range(2)]
    for index, batches in enumerate(in_step(iterators)):
        assert all(same(batch, expected[rank][index]) for rank, batch in enumerate(batches))
        if index == len(expected[0]) - 1:
            go_on.set()
    assert hung


@pytest.mark.parametrize("reason", ["no such process", "another file", "another host"])
def test_ranks_that_cannot_open_each_others_memory_decode_for_themselves(many_groups, reason):
    def change(rank, value):
        if rank or isinstance(value, bool):
            return value
        if reason == "no such process":
            return value._replace(pid=2**22 + 1)
        return value._replace(secret=bytes(16)) if reason == "another file" else value._replace(host=("elsewhere", ""))

    iterators = start(many_groups, 2, change, batch_size_global=300)
    expected = [alone(many_groups, rank, 2, batch_size_global=300) for rank in range(2)]
    for found, wanted in zip(iterators, expected, strict=True):
        assert all(itertools.starmap(same, zip(found, wanted, strict=True)))
