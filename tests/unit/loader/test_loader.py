"""The loader against the Parquet files, read by DuckDB."""

import itertools
import re
import threading
from types import SimpleNamespace

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from torchdlrm.data.dataset import Dataset
from torchdlrm.errors import DatasetError
from torchdlrm.features.columns import LabelColumn, SparseColumn
from torchdlrm.features.schema import FeatureSchema, criteo_schema
from torchdlrm.loader.batch import RowGroup, batch_rows, epoch_order, num_batches, num_padding_rows, rank_rows
from torchdlrm.loader.loader import Loader
from torchdlrm.preprocessing.preprocess import PreprocessOptions, preprocess


@given(rows=st.integers(1, 5_000), batch_size=st.integers(1, 700), world_size=st.integers(1, 9))
def test_every_row_of_an_epoch_is_read_by_exactly_one_rank(rows, batch_size, world_size):
    read = []
    for batch in range(num_batches(rows, batch_size)):
        everyone = batch_rows(batch, rows=rows, batch_size_global=batch_size)
        slices = [rank_rows(everyone, rank=rank, world_size=world_size) for rank in range(world_size)]
        padding = [num_padding_rows(everyone, rank=rank, world_size=world_size) for rank in range(world_size)]
        assert set(padding) <= {0, 1}
        (rows_and_padding,) = {len(part) + count for part, count in zip(slices, padding, strict=True)}
        assert rows_and_padding == max(map(len, slices)) > 0
        read += [row for part in slices for row in part]
    assert read == list(range(rows))


def test_later_epochs_permute_the_row_groups_by_the_seed():
    groups = [RowGroup(0, index, 10) for index in range(50)]
    assert epoch_order(groups, epoch=0, seed=1) == groups
    first, other = epoch_order(groups, epoch=1, seed=1), epoch_order(groups, epoch=2, seed=1)
    assert first != groups
    assert first != other
    assert sorted(first, key=lambda group: group.group_index) == groups
    assert first == epoch_order(groups, epoch=1, seed=1)


def rows_on_disk(dataset, split):
    """Labels, dense features and ids of a split in the order of its files, as DuckDB reads them."""
    files = [str(file.path) for file in dataset.splits[split].files]
    names = [dataset.label_name, *dataset.dense_names, *dataset.sparse_names]
    columns = duckdb.sql(f"select {', '.join(names)} from read_parquet({files})").fetchnumpy()
    return np.stack([np.asarray(columns[name], dtype=np.float64) for name in names], axis=1)


def rows_of(batches):
    parts = []
    for batch in batches:
        num_rows = batch.labels.numel() - batch.num_padding
        ids_FB = batch.sparse_features.values().view(len(batch.sparse_features.keys()), num_rows)
        columns = (batch.labels[:num_rows], batch.dense_features[:num_rows], ids_FB.T)
        parts.append(np.column_stack(columns).astype(np.float64))
    return np.concatenate(parts)


def test_batches_hold_the_rows_of_the_files_in_order(many_groups):
    assert len(many_groups.splits["train"].files) > 2
    loader = Loader(many_groups, "train", batch_size_global=300)
    for batches in (list(loader), list(loader)):  # any number of times
        assert [batch.labels.numel() for batch in batches] == [300] * 14 + [86]
        np.testing.assert_array_equal(rows_of(batches), rows_on_disk(many_groups, "train"))


@pytest.mark.parametrize("world_size", [2, 3])
def test_a_batch_is_the_ranks_slices_one_after_the_other(many_groups, world_size):
    whole = list(Loader(many_groups, "train", batch_size_global=300))
    slices = [
        list(Loader(many_groups, "train", batch_size_global=300, rank=rank, world_size=world_size))
        for rank in range(world_size)
    ]
    for batch, *parts in zip(whole, *slices, strict=True):
        np.testing.assert_array_equal(rows_of([batch]), rows_of(parts))


def test_a_rank_without_a_row_of_a_batch_has_one_of_padding(many_groups):
    """In 4,286 rows of batches of 857 the last batch is one row."""
    parts = [list(Loader(many_groups, "train", batch_size_global=857, rank=rank, world_size=2)) for rank in range(2)]
    assert [[batch.labels.numel() for batch in part] for part in parts] == [[429] * 5 + [1]] * 2
    assert [[batch.num_padding for batch in part] for part in parts] == [[1] * 6, [0] * 6]
    for batch in parts[0]:
        kjt = batch.sparse_features
        lengths_FB = kjt.lengths().view(26, -1)
        assert lengths_FB[:, :-1].eq(1).all()
        assert lengths_FB[:, -1].eq(0).all()
        assert kjt.offsets().tolist() == [0, *kjt.lengths().cumsum(0).tolist()]
        assert batch.labels[-1] == 0
        assert batch.dense_features[-1].eq(0).all()


def test_a_loader_goes_on_from_another_ones_state_on_another_world_size(many_groups):
    options = {"batch_size_global": 300, "epochs": 2, "seed": 3}
    whole = [rows_of([batch]) for batch in Loader(many_groups, "train", **options)]
    assert not np.array_equal(whole[0], whole[15])
    state = {"epoch": 1, "batches_consumed": 2}
    rest = []
    for rank in range(2):
        resumed = Loader(many_groups, "train", **options, rank=rank, world_size=2)
        resumed.load_state_dict(state)
        rest.append(list(resumed))
    for index, parts in enumerate(zip(*rest, strict=True)):
        np.testing.assert_array_equal(rows_of(parts), whole[17 + index])


def test_max_rows_reads_only_the_first_rows(many_groups):
    batches = list(Loader(many_groups, "train", batch_size_global=300, max_rows=350))
    np.testing.assert_array_equal(rows_of(batches), rows_on_disk(many_groups, "train")[:350])


def test_a_split_without_rows_is_refused_by_name(many_groups):
    with pytest.raises(DatasetError, match="nothing to read in split 'tset'; the dataset has train"):
        Loader(many_groups, "tset", batch_size_global=300)


def test_a_damaged_row_group_is_an_error_that_names_the_file(small_log, tmp_path):
    preprocess([small_log], tmp_path / "dataset", criteo_schema(), PreprocessOptions())
    dataset = Dataset.open(tmp_path / "dataset")
    path = dataset.splits["train"].files[0].path
    column = pq.read_metadata(path).row_group(0).column(20)
    data = bytearray(path.read_bytes())
    middle = column.data_page_offset + column.total_compressed_size // 2
    data[middle : middle + 8] = bytes(byte ^ 0xFF for byte in data[middle : middle + 8])
    path.write_bytes(data)
    with pytest.raises(DatasetError, match=rf"{path.name}: row group 0 is damaged"):
        list(Loader(dataset, "train", batch_size_global=300))


@pytest.mark.parametrize("world_size", [1, 3])
def test_a_batch_knows_how_many_ids_each_feature_has_so_that_nobody_asks_a_gpu(many_groups, world_size):
    for batch in Loader(many_groups, "train", batch_size_global=300, world_size=world_size):
        kjt = batch.sparse_features
        per_key = kjt.lengths().view(26, -1).sum(1).tolist()
        for same in (kjt, batch.to(torch.device("meta")).sparse_features):  # whose values nobody can ask for
            assert same.length_per_key_or_none() == per_key
            assert same.offset_per_key_or_none() == [0, *itertools.accumulate(per_key)]
            permuted = same.permute([*range(13, 26), *range(13)])
            assert permuted.dist_splits([13, 13])[1] == [sum(per_key[13:]), sum(per_key[:13])]


@pytest.fixture
def pretended_gpu(monkeypatch):
    """What was pinned, and which thread has set which current device: this process has no GPU."""
    pinned, devices = [], {}
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: pinned.append(tensor) or tensor.clone())
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    monkeypatch.setattr(
        torch.cuda, "set_device", lambda device: devices.setdefault(threading.current_thread().name, device)
    )
    return SimpleNamespace(pinned=pinned, devices=devices)


def test_batches_of_a_shape_share_their_lengths_and_offsets_on_a_device_and_never_pin_them(many_groups, pretended_gpu):
    there = torch.device("meta")
    batches = list(Loader(many_groups, "train", batch_size_global=300, pin_memory=True))
    assert len(pretended_gpu.pinned) == 3 * len(batches)  # dense features, ids, labels
    assert {tensor.dtype for tensor in pretended_gpu.pinned} == {torch.float32, torch.int64}
    moved = [batch.to(there, non_blocking=True).sparse_features for batch in batches]
    assert all(kjt.device() == kjt.lengths().device == kjt.offsets().device == there for kjt in moved)
    assert all(kjt.lengths() is moved[0].lengths() and kjt.offsets() is moved[0].offsets() for kjt in moved[:-1])
    assert moved[-1].lengths().numel() == 26 * 86  # the last batch has another shape
    assert not any(kjt.values() is moved[0].values() for kjt in moved[1:])


def test_the_thread_that_pins_batches_uses_the_gpu_of_its_rank(many_groups, pretended_gpu):
    next(iter(Loader(many_groups, "train", batch_size_global=300, pin_memory=True)))
    assert pretended_gpu.devices == {"torchdlrm-loader": 3}


@pytest.mark.parametrize("wrong_id", [-1, 10_000_000])
def test_an_id_outside_its_table_is_an_error_that_names_file_row_group_feature_and_value(small_log, tmp_path, wrong_id):
    """Files with valid checksums, as another program may write them: the kernel must never see such an id."""
    preprocess([small_log], tmp_path / "dataset", criteo_schema(), PreprocessOptions())
    dataset = Dataset.open(tmp_path / "dataset")
    path = dataset.splits["train"].files[0].path
    table = pq.read_table(path)
    ids = table.column("cat_5").to_numpy().copy()
    ids[1_234] = wrong_id
    index = table.schema.get_field_index("cat_5")
    table = table.set_column(index, table.schema.field(index), pa.array(ids, type=table.schema.field(index).type))
    pq.write_table(table, path)
    rows = dataset.num_embeddings["cat_5"]
    loader = Loader(dataset, "train", batch_size_global=500)
    expected = f"{path.name}: row group 0, row 1234: cat_5 has the id {wrong_id}, but its table has {rows:,} rows"
    with pytest.raises(DatasetError, match=re.escape(expected)):
        list(loader)


def test_other_row_groups_than_the_manifest_says_are_refused(small_log, tmp_path):
    preprocess([small_log], tmp_path / "dataset", criteo_schema(), PreprocessOptions())
    dataset = Dataset.open(tmp_path / "dataset")
    path = dataset.splits["train"].files[0].path
    pq.write_table(pq.read_table(path), path, row_group_size=1_000)
    with pytest.raises(DatasetError, match=r"row group 0 has 1,000 rows, and not 4,286 as dataset.json"):
        list(Loader(dataset, "train"))


def test_an_id_outside_its_table_is_found_in_a_list_of_ids_too(tmp_path):
    (tmp_path / "log.csv").write_text("clicked,tags\n" + "\n".join(f"{row % 2},a|b" for row in range(70)) + "\n")
    schema = FeatureSchema(
        name="tags",
        separator=",",
        header=True,
        columns=(LabelColumn(name="clicked"), SparseColumn(name="tags", value_separator="|")),
    )
    preprocess([tmp_path / "log.csv"], tmp_path / "dataset", schema, PreprocessOptions(min_count=1))
    dataset = Dataset.open(tmp_path / "dataset")
    path = dataset.splits["train"].files[0].path
    table = pq.read_table(path)
    tags = table.column("tags").to_pylist()
    tags[7] = [*tags[7], 3]
    index = table.schema.get_field_index("tags")
    changed = pa.array(tags, type=table.schema.field(index).type)
    pq.write_table(table.set_column(index, table.schema.field(index), changed), path)
    with pytest.raises(DatasetError, match="row group 0, row 7: tags has the id 3, but its table has 3 rows"):
        list(Loader(dataset, "train", batch_size_global=16))
