"""A checkpoint is data: whatever its files hold, nothing of it is executed."""

import hashlib
import io
import json
import os
import pickle
import shutil
import subprocess
import sys

import pytest
import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    _MEM_FORMAT_ENCODING,
    BytesStorageMetadata,
    ChunkStorageMetadata,
    MetadataIndex,
    TensorStorageMetadata,
)

from torchdlrm.config import load_config
from torchdlrm.errors import RunError
from torchdlrm.exporting.checkpoint import CheckpointModel
from torchdlrm.model.architecture import ModelShape
from torchdlrm.training.checkpoint import find_damage
from torchdlrm.training.checkpoint_reader import CheckpointReader, read_metadata
from torchdlrm.training.job import train
from torchdlrm.training.run import Run


class Call:
    """Pickles as a call of a function, of which `then` is the rest of the pickle."""

    def __init__(self, function, *args):
        self._function, self._args = function, args

    def __reduce__(self):
        return self._function, self._args


@pytest.fixture
def checkpoint(small_run, tmp_path):
    """The folder of a checkpoint of one's own, to be changed."""
    (found,) = (small_run / "checkpoints").iterdir()
    return shutil.copytree(found, tmp_path / found.name)


def with_metadata(checkpoint, change):
    """The real description, changed, with its checksum."""
    path = checkpoint / ".metadata"
    metadata = pickle.loads(path.read_bytes())
    path.write_bytes(pickle.dumps(change(metadata) or metadata))
    seal(checkpoint)


def seal(checkpoint):
    path = checkpoint / "checkpoint.json"
    record = json.loads(path.read_text())
    for name in record["sha256"].keys() - {"checkpoint.json"}:  # that is of the position
        record["sha256"][name] = hashlib.sha256((checkpoint / name).read_bytes()).hexdigest()
    path.write_text(json.dumps(record))


def refused(checkpoint, why):
    """Every reader refuses it, with the file's name."""
    for read in (read_metadata, CheckpointReader):
        with pytest.raises(RunError, match=why) as caught:
            read(checkpoint)
        assert str(checkpoint) in str(caught.value)
    assert why in find_damage(checkpoint)


def test_a_description_is_read_as_torch_reads_it(checkpoint):
    theirs, ours = pickle.loads((checkpoint / ".metadata").read_bytes()), read_metadata(checkpoint)
    assert ours.keys() == theirs.state_dict_metadata.keys()
    for name, tensor in theirs.state_dict_metadata.items():
        places = [theirs.storage_data[MetadataIndex(name, chunk.offsets)] for chunk in tensor.chunks]
        assert ours[name].dtype == tensor.properties.dtype
        assert ours[name].size == tensor.size
        assert ours[name].parts == tuple(
            (chunk.offsets, chunk.sizes, checkpoint / place.relative_path, place.offset, place.length)
            for chunk, place in zip(tensor.chunks, places, strict=True)
        )


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_what_a_description_calls_is_not_called(checkpoint, tmp_path, protocol):
    metadata = pickle.loads((checkpoint / ".metadata").read_bytes())
    metadata.planner_data = Call(os.mkdir, str(tmp_path / "called"))
    (checkpoint / ".metadata").write_bytes(pickle.dumps(metadata, protocol))
    seal(checkpoint)
    refused(checkpoint, "which no checkpoint of torchdlrm has")
    assert not (tmp_path / "called").exists()


@pytest.mark.parametrize(
    "function", [eval, setattr, torch.load, torch.hub.load, pickle.loads, type(sys.modules), io.open]
)
def test_no_function_is_on_the_list(checkpoint, function):
    with_metadata(checkpoint, lambda metadata: setattr(metadata, "planner_data", Call(function, "x")))
    refused(checkpoint, "which no checkpoint of torchdlrm has")


def test_a_description_is_read_as_python_3_11_2_writes_it(checkpoint, monkeypatch):
    """It pickles the member of an enum as a call of getattr, which is on the list, and is not called either."""
    before = read_metadata(checkpoint)
    monkeypatch.setattr(_MEM_FORMAT_ENCODING, "__reduce_ex__", lambda self, _: (getattr, (type(self), self.name)))
    with_metadata(checkpoint, lambda metadata: setattr(metadata, "planner_data", Call(getattr, "x")))
    assert b"getattr" in (checkpoint / ".metadata").read_bytes()
    assert read_metadata(checkpoint) == before


def test_a_description_cannot_change_the_classes_of_torch(checkpoint):
    # Opcodes: the class itself, then BUILD with a pair, of which the second half sets attributes.
    name = b"ctorch.distributed.checkpoint.metadata\nTensorStorageMetadata\n"
    (checkpoint / ".metadata").write_bytes(name + b"(N}VPOISON\nI1\nstb.")
    with pytest.raises(RunError, match="cannot be read"):
        read_metadata(checkpoint)
    assert not hasattr(TensorStorageMetadata, "POISON")


@pytest.mark.parametrize(
    "fields",
    [
        {"relative_path": "../../../../../../../etc/passwd"},
        {"relative_path": "/etc/passwd"},
        {"relative_path": "checkpoint.json"},
        {"relative_path": "__9_9.distcp"},
        {"relative_path": 7},
        {"offset": -1},
        {"offset": 2**62},
        {"length": 2**62},
        {"length": 1.5},
        {"transform_descriptors": ["stream.zstd"]},
    ],
    ids=str,
)
def test_a_part_that_is_not_in_the_folder_s_files_is_refused(checkpoint, fields):
    def change(metadata):
        index = next(index for index in metadata.storage_data if "over_arch" in index.fqn)
        stored = metadata.storage_data[index]
        metadata.storage_data[index] = _StorageInfo(**{"offset": 0, "length": 10, **vars(stored), **fields})

    with_metadata(checkpoint, change)
    refused(checkpoint, "metadata: cannot be read")


@pytest.mark.parametrize("kind", ["link", "fifo", "loop"])
def test_a_file_that_is_none_is_refused(checkpoint, tmp_path, kind):
    path = next(checkpoint.glob("*.distcp"))
    path.rename(tmp_path / "elsewhere")
    if kind == "fifo":
        os.mkfifo(path)
    else:
        path.symlink_to(path if kind == "loop" else tmp_path / "elsewhere")
    refused(checkpoint, path.name)


def size_of(number):
    def change(metadata):
        tensor = next(value for key, value in metadata.state_dict_metadata.items() if "over_arch" in key)
        tensor.size = torch.Size([number])

    return change


def no_chunks(metadata):
    next(value for key, value in metadata.state_dict_metadata.items() if "over_arch" in key).chunks.clear()


def one_half_twice(metadata):
    """A tensor of two parts, the same one twice: nobody would say what the other half is."""
    name = "model.model.over_arch.model.0._mlp.0._linear.weight"
    tensor = metadata.state_dict_metadata[name]
    rows, columns = tensor.size
    tensor.chunks = [ChunkStorageMetadata(torch.Size([0, 0]), torch.Size([rows // 2, columns])) for _ in range(2)]
    assert MetadataIndex(name, [0, 0]) in metadata.storage_data


def nested(depth):
    """Nothing, in so many pairs, of which all that are as deep are one."""
    pair = ()
    for _ in range(depth):
        pair = (pair, pair)
    return pair


@pytest.mark.parametrize(
    "change",
    [size_of(2**62), no_chunks, one_half_twice, lambda _: {0: 0}, lambda _: [1] * 3],
)
def test_a_description_that_contradicts_itself_is_refused(checkpoint, change):
    with_metadata(checkpoint, change)
    refused(checkpoint, "not what torchdlrm writes")


def test_a_number_of_a_size_that_is_no_number_is_told_shortly(checkpoint):
    def change(metadata):
        next(iter(metadata.state_dict_metadata.values())).size = nested(20)  # 2^20 pairs, if it is written out

    with_metadata(checkpoint, change)
    refused(checkpoint, "is not a size")
    assert "(...), (...)" in find_damage(checkpoint)


def test_memory_is_taken_for_what_a_description_holds_and_not_for_what_it_announces(checkpoint):
    """An opcode of 5 bytes numbers an object; here as the 2^29th, and Python's own reader takes 8 GB."""
    code = (
        "import resource, sys; from pathlib import Path; from torchdlrm.errors import RunError;"
        "from torchdlrm.training.checkpoint_reader import read_metadata;"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "try: read_metadata(Path(sys.argv[1]))\n"
        "except RunError as error: print(error)\n"
        "assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000"
    )
    (checkpoint / ".metadata").write_bytes(b"\x80\x04K\x01" + pickle.LONG_BINPUT + (2**29).to_bytes(4, "little") + b".")
    done = subprocess.run([sys.executable, "-c", code, checkpoint], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "int stands in the place of Metadata" in done.stdout


def test_a_tensor_of_another_shape_than_described_is_refused(checkpoint):
    def change(metadata):
        bias, weight = (f"model.model.over_arch.model.1.{name}" for name in ("bias", "weight"))
        data = metadata.storage_data
        data[MetadataIndex(weight, [0, 0])] = data[MetadataIndex(bias, [0])]

    with_metadata(checkpoint, change)
    with pytest.raises(RunError, match=r"over_arch\.model\.1\.weight is not stored in one piece"):
        CheckpointReader(checkpoint)


@pytest.mark.parametrize("kind", ["shape", "missing"])
def test_a_checkpoint_of_another_model_is_refused_by_the_names_that_differ(checkpoint, small_run, small_dataset, kind):
    config, name = Run.open(small_run).config.model, "over_arch.model.1.weight"
    CheckpointModel(CheckpointReader(checkpoint), ModelShape.of(config, small_dataset))

    def without(metadata):
        del metadata.state_dict_metadata[f"model.model.{name}"]

    if kind == "missing":
        with_metadata(checkpoint, without)
    else:
        config = config.model_copy(update={"over_arch_layer_sizes": (config.over_arch_layer_sizes[0] + 1, 1)})
        name = "over_arch.model.0._mlp.1._linear.bias"
    with pytest.raises(RunError, match="not a checkpoint of the run's model on this dataset") as caught:
        CheckpointModel(CheckpointReader(checkpoint), ModelShape.of(config, small_dataset))
    assert name in str(caught.value)


@pytest.mark.parametrize("at", [0, 0.3, 0.6, 0.999], ids=str)
def test_a_cut_description_is_refused(checkpoint, at):
    path = checkpoint / ".metadata"
    path.write_bytes(path.read_bytes()[: int(at * path.stat().st_size)])
    seal(checkpoint)
    refused(checkpoint, "metadata: cannot be read")


def test_a_value_that_is_no_tensor_is_not_read(tmp_path, checkpoint):
    """Torch's own planner unpickles those values, whatever they hold."""
    held = io.BytesIO()
    torch.save(Call(os.mkdir, str(tmp_path / "called")), held)
    (checkpoint / "__0_0.distcp").write_bytes(held.getvalue())

    def change(metadata):
        metadata.state_dict_metadata = {"key": BytesStorageMetadata()}
        metadata.storage_data = {MetadataIndex("key"): _StorageInfo("__0_0.distcp", 0, len(held.getvalue()))}

    with_metadata(checkpoint, change)
    with pytest.raises(RunError, match="holds no DLRM"):
        CheckpointReader(checkpoint, prefix="")
    assert not (tmp_path / "called").exists()


@pytest.mark.parametrize(
    "text",
    ["", "[]", "{", '{"format_version": 1}', "[" * 100_000, '{"format_version": 2}', "1" * 5_000],
    ids=lambda text: text[:25],
)
def test_a_record_that_is_none_is_damage(checkpoint, text):
    (checkpoint / "checkpoint.json").write_text(text)
    assert str(checkpoint) in find_damage(checkpoint)


@pytest.mark.parametrize("name", ["/etc/passwd", "../x", "fifo"])
def test_a_record_names_files_of_the_folder_alone(checkpoint, name):
    path = checkpoint / "checkpoint.json"
    record = json.loads(path.read_text())
    path.write_text(json.dumps(record | {"sha256": {name: "0" * 64}}))
    os.mkfifo(checkpoint / "fifo")
    (checkpoint.parent / "x").touch()
    assert "damaged" in find_damage(checkpoint)


def test_state_of_rows_of_columns_that_are_cut_otherwise_is_refused_with_what_to_do(small_run, small_dataset, tmp_path):
    run = shutil.copytree(small_run, tmp_path / "run")
    changes = {"train.epochs": "2", "sharding.constraints": '["cat_4=column_wise"]'}
    with pytest.raises(RunError, match=r"t_cat_4 was cut into other pieces of columns, .*sharding\.constraints"):
        train(load_config(run / "config.toml", changes, is_of_run=True), small_dataset, run)
