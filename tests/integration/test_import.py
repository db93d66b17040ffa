"""Data that others have encoded becomes a dataset: the same ids and floats, shuffled, checked."""

import json
import re

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from helpers.command_server import DLRM, shared_server
from torchdlrm.data.dataset import Dataset
from torchdlrm.errors import LogError
from torchdlrm.features.schema_file import load_schema
from torchdlrm.logs.formats.text import parse_chunk
from torchdlrm.preprocessing.encoded import encoded_log
from torchdlrm.preprocessing.preprocess import PreprocessOptions, preprocess
from torchdlrm.storage import objects
from torchdlrm.storage.places import located

DENSE, SPARSE = [f"int_{i}" for i in range(13)], [f"cat_{i}" for i in range(26)]


def dlrm(*arguments):
    return shared_server().run([DLRM, "import", *arguments])


def import_ok(source, out, kind, *options):
    done = dlrm(source, "--out", out, "--format", kind, "--json", *options)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["dataset"] == str(out)
    dataset = Dataset.open(out)
    dataset.verify()
    return dataset


def rows(dataset, split):
    files = dataset.splits[split].files
    return pl.concat(pl.read_parquet(file.path) for file in files) if files else None


def random_rows(num_rows, seed):
    """int_0 numbers the rows, so that a shuffled row is known again."""
    rng = np.random.default_rng(seed)
    dense = rng.normal(size=(num_rows, 13)).astype(np.float32)
    dense[:, 0] = np.arange(num_rows) + 1000 * seed
    return rng.integers(0, 2, (num_rows, 1), np.int32), dense, rng.integers(2, 40 + seed, (num_rows, 26))


def write_days(folder, dtype=np.int32):
    folder.mkdir()
    days = [random_rows(500, seed) for seed in range(3)]
    for day, (labels, dense, sparse) in enumerate(days):
        np.save(folder / f"day_{day}_labels.npy", labels)
        np.save(folder / f"day_{day}_dense.npy", dense)
        by_column = np.asfortranarray(sparse.astype(dtype))  # as NumPy saves a transposed array
        np.save(folder / f"day_{day}_sparse.npy", by_column if day else sparse.astype(dtype))
    return days


def check(found, expected_labels, expected_dense, expected_sparse, *, in_order):
    order = np.arange(len(found)) if in_order else np.argsort(found["int_0"].to_numpy(), kind="stable")
    assert in_order or not np.array_equal(order, np.arange(len(found)))
    np.testing.assert_array_equal(found["label"].to_numpy()[order], expected_labels.reshape(-1))
    np.testing.assert_array_equal(found.select(DENSE).to_numpy()[order], expected_dense)
    np.testing.assert_array_equal(found.select(SPARSE).to_numpy()[order], expected_sparse)


def test_the_files_of_a_folder_in_a_bucket_are_found_as_on_a_disk(bucket, tmp_path):
    write_days(tmp_path / "npy")
    for path in (tmp_path / "npy").iterdir():
        objects.write(f"{bucket}/npy/{path.name}", path)
    expected, found = (encoded_log(source, "npy") for source in (tmp_path / "npy", located(f"{bucket}/npy")))
    assert [file.name for file in found[0]] == [file.name for file in expected[0]]
    assert found[1] == expected[1]
    preprocess(found[0], tmp_path / "out", found[1], PreprocessOptions(min_count=1), progress=False)


@pytest.mark.parametrize("dtype", [np.int32, np.int64])
def test_upstreams_npy_files_keep_their_values_and_the_last_day_is_held_out(tmp_path, dtype):
    days = write_days(tmp_path / "npy", dtype)
    dataset = import_ok(tmp_path / "npy", tmp_path / "dataset", "npy")
    assert {name: split.rows for name, split in dataset.splits.items()} == {"train": 1000, "val": 250, "test": 250}
    check(rows(dataset, "train"), *(np.concatenate(parts) for parts in zip(*days[:2], strict=True)), in_order=False)
    check(rows(dataset, "val"), *(part[:250] for part in days[2]), in_order=True)
    check(rows(dataset, "test"), *(part[250:] for part in days[2]), in_order=True)
    largest = np.concatenate([day[2] for day in days]).max(axis=0)
    assert list(dataset.num_embeddings.values()) == (largest + 1).tolist()
    assert dataset.manifest.splits["val"].clicks == days[2][0][:250].sum()


def test_upstreams_multi_hot_files_become_lists(tmp_path):
    days = write_days(tmp_path / "npy")
    rng = np.random.default_rng(0)
    hot = [[rng.integers(0, 90, (500, 1 + i % 4), np.int32) for i in range(26)] for _ in days]
    for day, arrays in enumerate(hot):
        np.savez(tmp_path / "npy" / f"day_{day}_sparse_multi_hot.npz", **{str(i): a for i, a in enumerate(arrays)})
    dataset = import_ok(tmp_path / "npy", tmp_path / "dataset", "multi-hot", "--table-sizes", ",".join(["90"] * 26))
    found = rows(dataset, "val")
    for i, name in enumerate(SPARSE):
        assert found[name].to_list() == hot[2][i][:250].tolist()
    assert dataset.manifest.splits["train"].values["cat_3"] == 4 * 1000
    assert set(dataset.num_embeddings.values()) == {90}


def test_the_binary_files_of_nvt_dataloader_keep_their_splits(tmp_path):
    splits = {"train": "train", "validation": "val", "test": "test"}
    parts = {}
    for seed, folder in enumerate(splits):
        (tmp_path / "nvt" / folder).mkdir(parents=True)
        parts[folder] = random_rows(300, seed)
        labels, dense, sparse = parts[folder]
        labels.astype(np.float32).tofile(tmp_path / "nvt" / folder / "label.bin")
        dense.tofile(tmp_path / "nvt" / folder / "numerical.bin")
        for i in range(26):
            sparse[:, i].astype(np.int32).tofile(tmp_path / "nvt" / folder / f"cat_{i}.bin")
    dataset = import_ok(tmp_path / "nvt", tmp_path / "dataset", "nvt")
    for folder, split in splits.items():
        check(rows(dataset, split), *parts[folder], in_order=split != "train")
    (tmp_path / "nvt" / "test" / "cat_5.bin").write_bytes(b"123")
    done = dlrm(tmp_path / "nvt", "--out", tmp_path / "no", "--format", "nvt")
    assert done.returncode == 2
    assert "cat_5.bin: has 3 bytes, expected 1,200 for the 300 labels" in done.stderr


def test_encoded_parquet_keeps_columns_and_lists(tmp_path):
    rng = np.random.default_rng(4)
    for folder, count in (("train", 700), ("valid", 100)):
        (tmp_path / "in" / folder).mkdir(parents=True)
        table = pa.table(
            {
                "user": pa.array(rng.integers(0, 50, count), pa.int64()),
                "genres": pa.array([list(range(i % 4)) for i in range(count)], pa.list_(pa.int64())),
                "age": pa.array(rng.normal(size=count)),
                "click": pa.array(rng.integers(0, 2, count).astype(np.float32)),
            }
        )
        pq.write_table(table, tmp_path / "in" / folder / "part_0.parquet", row_group_size=99)
    dataset = import_ok(tmp_path / "in", tmp_path / "dataset", "parquet")
    found = rows(dataset, "val")
    expected = pl.DataFrame(table)
    assert found["user"].to_list() == expected["user"].to_list()
    assert found["genres"].to_list() == expected["genres"].to_list()
    assert found["age"].to_list() == expected["age"].cast(pl.Float32).to_list()
    assert found["label"].to_list() == expected["click"].cast(pl.Int8).to_list()
    assert dataset.splits["test"].rows == 0


SCHEMA = """
name = "ids"
separator = ","
split = { rule = "folder" }
columns = [
    { role = "label", name = "label" },
    { role = "sparse", name = "user", kind = "id" },
    { role = "sparse", name = "tags", kind = "id", value_separator = ";", num_embeddings = 9 },
]
"""


def folders(folder, **texts):
    """A log of text in a folder for each split, and the options by which it is read."""
    (folder / "schema.toml").write_text(SCHEMA)
    for name, text in texts.items():
        (folder / name).mkdir()
        (folder / name / "log.csv").write_text(text)
    return [folder / name / "log.csv" for name in texts], load_schema(folder / "schema.toml")


def test_ids_of_text_are_rows_of_their_table_and_folders_are_splits(tmp_path):
    files, schema = folders(tmp_path, train="0,3,1;2\n1,0,\n" * 5, validation="1,7,8\n", test="0,1,0\n")
    dataset = preprocess(files, tmp_path / "dataset", schema)
    assert dataset.num_embeddings == {"user": 8, "tags": 9}
    assert dataset.manifest.format_version == 6
    assert {name: split.rows for name, split in dataset.splits.items()} == {"train": 10, "val": 1, "test": 1}
    assert sorted(rows(dataset, "train").rows()) == [(0, 3, [1, 2])] * 5 + [(1, 0, [])] * 5
    assert rows(dataset, "val").rows() == [(1, 7, [8])]
    (tmp_path / "train" / "more.csv").write_text("0,9,1\n")
    log = [tmp_path / "train" / "more.csv"]
    with pytest.raises(LogError, match=r"column user: has ids for 10 rows, and in .*dataset its table has 8; give"):
        preprocess(log, tmp_path / "known", schema, PreprocessOptions(vocabulary=dataset.path))
    options = PreprocessOptions(vocabulary=dataset.path, extend_vocabulary=True)
    assert preprocess(log, tmp_path / "grown", schema, options).num_embeddings == {"user": 10, "tags": 9}
    with pytest.raises(LogError, match="give the files of train first"):
        preprocess(files[::-1], tmp_path / "no", schema)


@pytest.mark.parametrize(
    ("cells", "column"), [("-1,1", "user"), (",1", "user"), ("1,9", "tags"), ("2147483647,", "user")]
)
def test_a_row_with_another_id_is_bad_and_in_rows_to_predict_it_is_unknown(tmp_path, cells, column):
    files, schema = folders(tmp_path, train=f"0,3,1\n1,{cells}\n")
    with pytest.raises(LogError, match=f"line 2, column {column}: the cell is not an id"):
        preprocess(files, tmp_path / "no", schema)
    chunk = parse_chunk(f"1,{cells}\n".encode(), schema, is_label_optional=True)
    assert not chunk.bad_rows.total


def spoil(array, row, column, value):
    changed = array.copy()
    changed[row, column] = value
    return changed


@pytest.mark.parametrize(
    ("kind", "row", "column", "value", "message"),
    [
        ("sparse", 7, 3, -1, "day_1_sparse.npy, line 8, column cat_3: the cell is not an id, .* table: '-1'"),
        ("sparse", 7, 3, 40, "line 8, column cat_3: the cell is not an id, .* table: '40' .*table.sizes"),
        ("dense", 2, 12, np.nan, "day_1_dense.npy, row 3, column int_12: nan is not a finite number"),
        ("labels", 5, 0, 2, "day_1_sparse.npy, line 6, column label: the label means neither 0 nor 1: '2'"),
    ],
)
def test_what_is_wrong_is_named_by_file_row_column_and_value(tmp_path, kind, row, column, value, message):
    days = write_days(tmp_path / "npy")
    path = tmp_path / "npy" / f"day_1_{kind}.npy"
    for day, (_, _, sparse) in enumerate(days):
        np.save(tmp_path / "npy" / f"day_{day}_sparse.npy", np.minimum(sparse, 39))
    np.save(path, spoil(np.load(path), row, column, value))
    sizes = ",".join(["40"] * 26)
    done = dlrm(tmp_path / "npy", "--out", tmp_path / "no", "--format", "npy", "--table-sizes", sizes)
    assert done.returncode == 2
    assert re.search(message, " ".join(done.stderr.split()))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["npy"]


def test_files_that_do_not_belong_together_are_named(tmp_path):
    write_days(tmp_path / "npy")
    np.save(tmp_path / "npy" / "day_1_sparse.npy", np.zeros((500, 25), np.int32))
    done = dlrm(tmp_path / "npy", "--out", tmp_path / "no", "--format", "npy")
    assert done.returncode == 2
    assert "day_1_sparse.npy: has shape (500, 25), expected (500, 26)" in done.stderr
    (tmp_path / "npy" / "day_1_sparse.npy").unlink()
    done = dlrm(tmp_path / "npy", "--out", tmp_path / "no", "--format", "npy")
    assert "day_1_sparse.npy: there is no such file" in done.stderr
    np.save(tmp_path / "npy" / "day_1_sparse.npy", np.zeros((500, 26), np.int32))
    done = dlrm(tmp_path / "npy", "--out", tmp_path / "no", "--format", "npy", "--table-sizes", "3,4")
    assert "expected a positive whole number for each of the 26 features, got 2" in " ".join(done.stderr.split())


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("day_1_sparse.npy", b"no array", "not a NumPy file"),
        ("day_1_dense.npy", b"", "not a NumPy file"),
        ("day_1_labels.npy", np.zeros((500, 2), np.int32), r"has shape \(500, 2\), expected \(500, 1\)"),
    ],
)
def test_a_damaged_file_is_named(tmp_path, name, content, message):
    write_days(tmp_path / "npy")
    path = tmp_path / "npy" / name
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        np.save(path, content)
    with pytest.raises(LogError, match=f"{name}: {message}"):
        preprocess(*from_encoded(tmp_path / "npy", "npy", tmp_path / "no"))


def test_a_damaged_parquet_file_and_a_lack_of_training_rows_are_named(tmp_path):
    (tmp_path / "in" / "test").mkdir(parents=True)
    rows = pl.DataFrame({"click": [0, 1], "age": [0.5, None], "user": [3, 4]})
    rows.write_parquet(tmp_path / "in" / "test" / "a.parquet")
    with pytest.raises(LogError, match="none is left for train; give the files of the folder train too"):
        preprocess(*from_encoded(tmp_path / "in", "parquet", tmp_path / "no"))
    (tmp_path / "in" / "test" / "b.parquet").write_bytes(b"PAR1")
    with pytest.raises(LogError, match=r"test/b\.parquet: the Parquet file cannot be read"):
        encoded_log(tmp_path / "in", "parquet")


def from_encoded(source, written_as, out):
    """The arguments of `preprocess` that import encoded data."""
    files, schema = encoded_log(source, written_as)
    return files, out, schema
