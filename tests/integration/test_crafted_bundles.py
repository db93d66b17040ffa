"""Whatever a bundle holds, and however right its checksums are: opening it is refused, or it predicts."""

import json
import os
from pathlib import Path

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from helpers.command_server import shared_server
from helpers.crafted import change_header, change_manifest, copy, fifo, seal, write
from torchdlrm.bundle.bundle import Bundle
from torchdlrm.errors import BundleError, DatasetError
from torchdlrm.prediction.predictor import Predictor

TABLE = "sparse_arch.embedding_bag_collection.embedding_bags.t_cat_0.weight"
LAYER = "over_arch.model.1.weight"
NUM_FUZZ = int(os.environ.get("TORCHDLRM_NUM_FUZZ", "60"))


def header(key, **fields):
    """A tensor's entry in the header of the weights, changed."""
    return lambda folder: change_header(folder, lambda header: header[key].update(fields))


def shift(key, start, end):
    """A tensor's place in the weights, moved."""

    def change(header):
        header[key]["data_offsets"] = [
            sum(pair) for pair in zip(header[key]["data_offsets"], (start, end), strict=True)
        ]

    return lambda folder: change_header(folder, change)


def raw_header(text):
    return lambda folder: change_header(folder, lambda _: text)


def weights(data):
    def craft(folder):
        write(folder / "weights.safetensors", data)
        seal(folder)

    return craft


def manifest(path, value):
    """A value of `bundle.json`, another."""

    def change(content):
        *parents, key = path.split(".")
        for parent in parents:
            content = content[parent]
        content[key] = value

    return lambda folder: change_manifest(folder, change)


def crossed(num_layers, rank):
    """The model is said to have a cross net."""
    settings = {"interaction": "dcn", "dcn_num_layers": num_layers, "dcn_low_rank_dim": rank, "dcn_gated": False}
    return lambda content: content["model"].update(settings)


def huge_table(folder):
    """2^62 rows of 64 bytes are 0 bytes, in 64 bits."""
    manifest("sparse.cat_0.num_embeddings", 2**62)(folder)
    header(TABLE, shape=[2**62, 16], data_offsets=[0, 0])(folder)


def no_padding(folder):
    """The last table ends with the file."""
    path = folder / "weights.safetensors"
    change_header(folder, lambda header: header.pop("padding") and None)
    write(path, path.read_bytes()[:-128])
    seal(folder)


def index(change, about=(), *, compression=None, name="cat_0"):
    """The columns of an index, arrays by name, and its settings, changed."""

    def craft(folder):
        path = folder / "vocabulary" / f"{name}.index"
        with pa.OSFile(str(path)) as file:
            reader = pa.ipc.open_file(file)
            batch, metadata = reader.get_batch(0), dict(reader.schema.metadata)
        columns = {field.name: column.to_numpy().copy() for field, column in zip(batch.schema, batch, strict=True)}
        columns = change(columns) or columns
        arrays = [values if isinstance(values, pa.Array) else pa.array(values) for values in columns.values()]
        new = pa.RecordBatch.from_arrays(arrays, names=list(columns))
        metadata |= {key.encode(): str(value).encode() for key, value in dict(about).items()}
        schema = new.schema.with_metadata(metadata)
        path.unlink()
        options = pa.ipc.IpcWriteOptions(compression=compression)
        with pa.OSFile(str(path), "wb") as file, pa.ipc.new_file(file, schema, options=options) as writer:
            writer.write_batch(new.cast(schema))
        seal(folder)

    return craft


def full(columns):
    """No slot is empty: a search for what is not there would not end."""
    columns["id"][:] = 1


def few_empty(columns):
    """A search for what is not there takes a walk over all slots."""
    columns["id"] = np.append(np.ones(2_000_000, np.int32), np.int32(0))
    columns["key"] = np.zeros(2_000_001, np.uint32)


def set_id(place, value):
    def change(columns):
        columns["id"][place] = value

    return change


def sample(change):
    """The sample, another frame."""

    def craft(folder):
        path = folder / "sample.parquet"
        frame = change(pl.read_parquet(path))
        path.unlink()
        frame.write_parquet(path)
        seal(folder)

    return craft


def hardly_any(frame, num_rows):
    """Nothing but predictions, which take little room in a file and as much as others when they are read."""
    return frame.clear(num_rows).with_columns(prediction=pl.lit(0.5, pl.Float32))


def many_groups(folder):
    path = folder / "sample.parquet"
    frame = pl.read_parquet(path).to_arrow()
    path.unlink()
    with pq.ParquetWriter(path, frame.schema) as writer:
        for _ in range(2_000):
            writer.write_table(frame[:0])
    seal(folder)


def linked_out(name):
    def craft(folder):
        (folder / name).rename(folder.parent / "elsewhere")
        (folder / name).symlink_to(folder.parent / "elsewhere")

    return craft


CRAFTED = {
    "a table before the file": shift(TABLE, -(10**9), -(10**9)),
    "a table behind the file": shift(TABLE, 10**9, 10**9),
    "a table across another": shift(TABLE, 64, 64),
    "a table that ends before it begins": header(TABLE, data_offsets=[900, 100]),
    "a table of 2^62 rows": huge_table,
    "a table of another type": header(TABLE, dtype="F16"),
    "a table that is missing": lambda folder: change_header(folder, lambda header: header.pop(TABLE) and None),
    "a table at the end of the file": no_padding,
    "a table of no rows": manifest("sparse.cat_0.num_embeddings", 0),
    "a table of fewer rows": manifest("sparse.cat_0.num_embeddings", 3),
    "a layer of another shape": header(LAYER, shape=[128, 1]),
    "a layer that is missing": lambda folder: change_header(folder, lambda header: header.pop(LAYER) and None),
    "a layer where no float may be": shift(LAYER, 1, 1),
    "offsets that are none": header(TABLE, data_offsets="ab"),
    "offsets of floats": header(TABLE, data_offsets=[0.0, 64.5]),
    "a shape of texts": header(TABLE, shape=["1", "2"]),
    "a header without types": raw_header(json.dumps({TABLE: {"shape": [1]}}).encode()),
    "a header of lists": raw_header(b"[1, 2]"),
    "a header that is nested": raw_header(b"[" * 100_000),
    "no header": raw_header(b"\xff\xfe"),
    "a header longer than the file": weights((2**62).to_bytes(8, "little") + b"{}"),
    "no weights": weights(b""),
    "hardly any weights": weights(b"\0" * 7),
    "weights without tensors": weights((2).to_bytes(8, "little") + b"{}"),
    "a manifest that is nested": lambda folder: write(folder / "bundle.json", b"[" * 100_000),
    "a manifest that is a number": lambda folder: write(folder / "bundle.json", b"7"),
    "a manifest that is a long number": lambda folder: write(folder / "bundle.json", b"7" * 10_000),
    "checksums that are none": manifest("block_sha256", ["xyz"]),
    "a size below zero": manifest("files", {"weights.safetensors": {"size_bytes": -1, "sha256": "0" * 64}}),
    "a dimension of 2^40": manifest("model.embedding_dim", 2**40),
    "a layer of 2^40": manifest("model.over_arch_layer_sizes", [2**40, 1]),
    "an interaction without its weights": manifest("model.interaction", "projection"),
    "a cross net that is not in the weights": lambda folder: change_manifest(folder, crossed(3, 8)),
    "a cross net of rank 2^40": lambda folder: change_manifest(folder, crossed(3, 2**40)),
    "a cross net of 2^40 layers": lambda folder: change_manifest(folder, crossed(2**40, 8)),
    "a deviation of zero": manifest("dense.int_0.deviation", 0.0),
    "features in another order": lambda folder: change_manifest(
        folder, lambda content: content["sparse"].update(cat_0=content["sparse"].pop("cat_0"))
    ),
    "an index without an empty slot": index(full),
    "an index with hardly an empty slot": index(few_empty),
    "an index with an id below zero": index(set_id(0, -5)),
    "an index with an id beyond its table": index(set_id(0, 2**31 - 1)),
    "an index without slots": index(lambda columns: {name: values[:0] for name, values in columns.items()}),
    "an index that begins beyond its end": index(lambda _: None, {"num_home_slots": 2**40}),
    "an index that begins nowhere": index(lambda _: None, {"num_home_slots": 0}),
    "an index whose missing value has no row": index(lambda _: None, {"missing_id": 10**6}),
    "an index of other keys": index(lambda columns: columns.update(key=columns["key"].astype(np.int64))),
    "an index of text keys": index(lambda columns: columns.update(key=columns["key"].astype(str))),
    "an index with nulls": index(lambda columns: columns.update(id=pa.array([None] * len(columns["id"]), pa.int32()))),
    "an index that is packed": index(few_empty, compression="zstd"),
    "a sample of 20 million rows": sample(lambda frame: pl.concat([hardly_any(frame, 100_000)] * 200)),
    "a sample in pieces": many_groups,
    "a sample without predictions": sample(lambda frame: frame.drop("prediction")),
    "a sample of texts": sample(lambda frame: frame.cast(pl.String)),
    "a sample with nulls for predictions": sample(
        lambda frame: frame.with_columns(prediction=pl.lit(None, pl.Float32))
    ),
    "a sample out of the folder": linked_out("sample.parquet"),
    "a sample that waits": fifo("sample.parquet"),
    "an index out of the folder": linked_out("vocabulary/cat_0.index"),
    "a vocabulary out of the folder": linked_out("vocabulary"),
    "a manifest out of the folder": linked_out("bundle.json"),
    "a manifest that waits": fifo("bundle.json"),
    "weights that wait": fifo("weights.safetensors"),
}


@pytest.fixture(scope="module")
def outcomes(small_bundle, tmp_path_factory):
    """What opening each of them comes to, in a process which they may crash."""
    base = tmp_path_factory.mktemp("crafted")
    folders = {}
    for number, (name, craft) in enumerate(CRAFTED.items()):
        (base / str(number)).mkdir()
        folders[name] = copy(small_bundle, base / str(number) / "bundle").rename(base / str(number) / f"b{number}")
        craft(folders[name])
    lines = run("open", *folders.values())
    by_folder = dict(line.split(" ", 1) for line in lines)
    return {name: by_folder.get(folder.name, "none: the process died there") for name, folder in folders.items()}


def run(*args):
    done = shared_server().run([Path(__file__).parents[1] / "helpers" / "crafted.py", *args], timeout_s=3_000)
    assert done.returncode == 0, f"{done.stdout[-400:]} {done.stderr[-2_000:]}"
    return done.stdout.splitlines()


@pytest.mark.parametrize("name", CRAFTED)
def test_a_crafted_bundle_is_refused(outcomes, name):
    assert outcomes[name].startswith("BundleError: "), outcomes[name]


def test_a_bundle_with_its_checksums_made_again_is_none_of_them(small_bundle, tmp_path):
    """Or the tests above would show that those who craft bundles cannot write checksums."""
    folder = copy(small_bundle, tmp_path / "bundle")
    index(lambda _: None)(folder)
    sample(lambda frame: frame)(folder)
    change_header(folder, lambda _: None)
    change_manifest(folder, lambda _: None)
    Predictor.open(folder).check_sample()


@pytest.mark.parametrize("offset", ["beyond", "falling", "not text"])
def test_an_index_whose_texts_are_none_is_refused(tmp_path, offset):
    from torchdlrm.features.value_index import ValueIndex, write_index
    from torchdlrm.features.vocabulary import Vocabulary, number_values

    counts = pl.DataFrame({"value": ["a", "bb", "ccc"], "count": np.array([3, 2, 1])})
    path = tmp_path / "f.index"
    write_index(Vocabulary("f", "string", number_values(counts)), path)
    data = path.read_bytes()
    texts = next(text for text in (b"abbccc", b"accbba", b"bbaccc", b"bbccca", b"cccabb", b"cccbba") if text in data)
    place = data.index(texts)
    if offset == "not text":
        data = data.replace(texts, b"\xff" * 6)
    else:
        ends = np.frombuffer(data[: place - place % 8], np.int64)
        last = int(np.flatnonzero(ends == 6)[-1])
        changed = ends.copy()
        changed[last] += 2**33 if offset == "beyond" else -5
        data = changed.tobytes() + data[place - place % 8 :]
    path.write_bytes(data)
    with pytest.raises(DatasetError, match=r"f\.index: the index of a vocabulary cannot be read"):
        ValueIndex.open(path, kind="string", num_ids=9)


def test_a_sample_without_a_checksum_is_not_read(small_bundle, tmp_path):
    folder = copy(small_bundle, tmp_path / "bundle")
    change_manifest(folder, lambda content: content["files"].pop("sample.parquet") and None)
    write(folder / "sample.parquet", b"anything")
    predictor = Predictor.open(folder)
    predictor.check_sample()
    frame, predictions = predictor.bundle.sample()
    assert (frame.height, len(predictions)) == (0, 0)
    assert frame.schema == Bundle.open(small_bundle).sample()[0].schema


def test_the_sample_is_what_was_checked(small_bundle, tmp_path):
    folder = copy(small_bundle, tmp_path / "bundle")
    bundle = Bundle.open(folder)
    write(folder / "sample.parquet", b"\0" * (folder / "sample.parquet").stat().st_size)
    with pytest.raises(BundleError, match=r"sample\.parquet: not a sample"):
        bundle.sample()


@pytest.mark.slow
def test_random_changes_are_refused_or_predict(small_bundle, tmp_path, seed):
    lines = run("fuzz", small_bundle, tmp_path / "bundle", str(seed), str(NUM_FUZZ))
    assert len(lines) == NUM_FUZZ
    unexpected = [line for line in lines if line.split(" ", 2)[2].split(":")[0] not in {"ok", "BundleError"}]
    assert not unexpected, unexpected
