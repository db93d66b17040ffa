"""Writes a run's checkpoint as a bundle, a block of rows at a time.

In: a run, the dataset it was trained on.  Out: a folder, written atomically.  Memory: one block of rows in
float32 and quantised, whatever the size of the tables and the number of ranks that trained them.

Rows are quantised by the kernels of FBGEMM, in the layout (`torchdlrm.bundle.precision`) that is read by its
`IntNBitTableBatchedEmbeddingBagsCodegen`, the module under TorchRec's quantised EmbeddingBagCollection.
"""

import errno
import fcntl
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

import fbgemm_gpu  # noqa: F401 - registers the kernel
import torch
from torch import Tensor

from torchdlrm.bundle import TablePrecision
from torchdlrm.bundle.manifest import MANIFEST_NAME, SAMPLE_NAME, WEIGHTS_NAME, StoredFile
from torchdlrm.bundle.precision import SCALE_BIAS_BYTES, TABLE_PRECISIONS
from torchdlrm.bundle.weights_file import PADDING_BYTES, PADDING_NAME, TensorRecord, WeightsWriter
from torchdlrm.data.dataset import Dataset
from torchdlrm.errors import BundleError, DatasetError
from torchdlrm.features.value_index import write_index
from torchdlrm.files import claim_folder, clear_folder, publish_folder, sha256_of
from torchdlrm.folders import kind_of
from torchdlrm.model import table_weight
from torchdlrm.progress import ProgressListener
from torchdlrm.storage import mirror
from torchdlrm.units import show_bytes

_BLOCK_BYTES = 32 * 2**20
_FLOATS = {32: torch.float32, 16: torch.float16}
_VOCABULARY_FOLDER = "vocabulary"
_BUNDLE_NAMES = (MANIFEST_NAME, WEIGHTS_NAME, SAMPLE_NAME, _VOCABULARY_FOLDER)


@contextmanager
def complete_folder(path: Path, names: Sequence[str] = _BUNDLE_NAMES, *, overwrite: bool = False) -> Iterator[Path]:
    """A temporary folder to write to, renamed to `path` when all went well and removed otherwise.

    Args:
        path: the folder that is to be.
        names: what is going to be in it, its manifest first; of a job that was killed, such remains are removed.
        overwrite: take the place of a bundle or a delta.

    Raises:
        BundleError: something is at `path`, or another process is writing it.
    """
    # A link that leads nowhere is something too; what a link leads to is in use under its other name.
    found = None if path.is_symlink() else kind_of(path)
    is_ours = found is not None and found.error is BundleError
    mirror.settle(path, names[0])
    if os.path.lexists(path) and not (overwrite and is_ours):
        no_one = " and is no folder of a bundle or a delta" if overwrite else ""
        raise BundleError(f"`out`: {path} is there already{no_one}; give another name, or remove it first")
    partial = path.with_name(f".{path.name}.partial")
    try:
        folder = claim_folder(partial, names)
    except OSError as error:
        raise BundleError(f"`out`: cannot write to {path}: {error.strerror}") from error
    try:
        fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if not os.path.samestat(os.fstat(folder), partial.lstat()):
            raise BlockingIOError  # has just been finished by another process, and is its bundle
    except (BlockingIOError, FileNotFoundError) as error:
        os.close(folder)
        raise BundleError(f"`out`: another process is writing {path}; wait for it, or give another name") from error
    try:
        clear_folder(folder)  # of what an export that was killed left
        yield partial
        publish_folder(partial, path, names[0], overwrite=overwrite)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        os.close(folder)


class WeightSource(Protocol):
    """Gives the weights of a model: a `CheckpointReader`, or whatever has them."""

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """The shape of each tensor, by the names of TorchRec's DLRM."""

    def tensor(self, name: str) -> Tensor:
        """A whole tensor, float32."""

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Rows of a table, float32 [stop - start, D]."""


def weights_bytes(checkpoint: WeightSource, precisions: Mapping[str, TablePrecision]) -> int:
    """How large the weights file gets, but for its header."""
    return sum(record.size_bytes for record in _records(checkpoint, precisions))


def require_space(folder: Path, needed_bytes: int) -> None:
    """See that so much fits on the disk.

    Raises:
        BundleError: it does not.
    """
    free_bytes = shutil.disk_usage(folder).free
    if free_bytes < needed_bytes:
        raise BundleError(
            f"`out`: the bundle needs {show_bytes(needed_bytes)}, and {show_bytes(free_bytes)} are free at {folder}; "
            "free some, give another place, or export with a smaller `precision`"
        ) from OSError(errno.ENOSPC, "it would be full")


def write_weights(
    checkpoint: WeightSource,
    precisions: Mapping[str, TablePrecision],
    path: Path,
    progress: ProgressListener,
) -> tuple[StoredFile, tuple[str, ...]]:
    """Write `weights.safetensors`: dense and over arch in float32, then the tables as they are served.

    Args:
        checkpoint: the weights.
        precisions: of each table by its key, in schema order.
        path: the file.
        progress: receives the bytes written.

    Returns:
        The file, and the checksums of its blocks.
    """
    records = _records(checkpoint, precisions)
    tables = {table_weight(feature): precision for feature, precision in precisions.items()}
    progress.start_phase("write weights", sum(record.size_bytes for record in records), unit="bytes")
    with WeightsWriter(path, records) as writer:
        for record in records[:-1]:
            if record.name not in tables:
                writer.append(checkpoint.tensor(record.name))
                progress.advance(record.size_bytes)
                continue
            num_rows, dim = checkpoint.shapes[record.name]
            block_rows = max(1, _BLOCK_BYTES // (4 * dim))
            for start in range(0, num_rows, block_rows):
                rows = checkpoint.rows(record.name, start, min(start + block_rows, num_rows))
                quantized = quantize_rows(rows, tables[record.name])
                writer.append(quantized)
                progress.advance(quantized.nbytes)
        writer.append(torch.zeros(records[-1].shape, dtype=torch.uint8))
    return StoredFile(size_bytes=path.stat().st_size, sha256=writer.sha256), tuple(writer.block_sha256)


def quantize_rows(rows: Tensor, precision: TablePrecision) -> Tensor:
    """Rows of a table, float32 [R, D], as they are served: uint8 [R, row_bytes]; for float32 a view."""
    assert rows.dtype == torch.float32, rows.dtype
    record = TABLE_PRECISIONS[precision]
    if not record.is_quantized:
        return rows.contiguous().to(_FLOATS[record.bits]).view(torch.uint8)
    # Scale and bias are rounded to float16 before the numbers are, so that their rounding is made up for: as TorchRec
    # does it, and nearer than FBGEMM's kernel for 8 bits alone. The two are written behind, and wanted in front.
    fused = torch.ops.fbgemm.FloatToFusedNBitRowwiseQuantizedSBHalf(rows, record.bits)
    return torch.cat([fused[:, -SCALE_BIAS_BYTES:], fused[:, :-SCALE_BIAS_BYTES]], dim=1)


def dequantize_rows(quantized: Tensor, precision: TablePrecision, dim: int) -> Tensor:
    """What the lookup makes of rows, uint8 [R, row_bytes], contiguous: float32 [R, D]."""
    record = TABLE_PRECISIONS[precision]
    if not record.is_quantized:
        return quantized.view(_FLOATS[record.bits]).float()
    scale, bias = quantized[:, :SCALE_BIAS_BYTES].contiguous().view(torch.float16).float().split(1, dim=1)
    numbers = quantized[:, SCALE_BIAS_BYTES:]
    if record.bits < 8:
        shifts = range(0, 8, record.bits)
        parts = [numbers >> shift & (1 << record.bits) - 1 for shift in shifts]
        numbers = torch.stack(parts, dim=2).view(len(quantized), dim)
    return scale * numbers.float() + bias


def as_looked_up(rows: Tensor, precision: TablePrecision) -> Tensor:
    """What a lookup at that precision gives of rows of a table: float32 [R, D]."""
    return dequantize_rows(quantize_rows(rows, precision), precision, rows.shape[1])


def _records(checkpoint: WeightSource, precisions: Mapping[str, TablePrecision]) -> list[TensorRecord]:
    """The tensors in the order of the file: wide types first, so that every tensor lies as its type wants it."""
    tables = {table_weight(feature) for feature in precisions}
    dense = [name for name in checkpoint.shapes if name not in tables]
    records = [TensorRecord(name, "F32", checkpoint.shapes[name]) for name in sorted(dense, key=_natural)]
    for precision, stored in TABLE_PRECISIONS.items():
        for feature, chosen in precisions.items():
            if chosen == precision:
                num_rows, dim = checkpoint.shapes[table_weight(feature)]
                dtype, width = stored.stored_rows(dim)
                records.append(TensorRecord(table_weight(feature), dtype, (num_rows, width)))
    return [*records, TensorRecord(PADDING_NAME, "U8", (PADDING_BYTES,))]


def _natural(name: str) -> list[tuple[int, str]]:
    """Sorts layer 2 before layer 10."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in name.split(".")]


def copy_vocabularies(dataset: Dataset, folder: Path) -> dict[str, tuple[str, str]]:
    """Copy the vocabularies of a dataset to `folder`/vocabulary, and write an index of each.

    Features that share a table have one, by the name of its owner.

    Where values come and go only values and ids are copied: counts and periods change whenever a value is seen, and
    would be most of a delta.

    Returns:
        The paths within `folder` of each feature's vocabulary and index; features without a vocabulary have none.
    """
    (folder / _VOCABULARY_FOLDER).mkdir()
    paths = {}
    for column in dataset.schema.sparse:
        feature, sparse = column.name, dataset.manifest.sparse[column.owner]
        if column.table is None and sparse.vocabulary is not None:
            table, index = f"{_VOCABULARY_FOLDER}/{feature}.parquet", f"{_VOCABULARY_FOLDER}/{feature}.index"
            shutil.copyfile(dataset.file(sparse.vocabulary), folder / table)
            if sha256_of(folder / table) != sparse.vocabulary.sha256:
                msg = f"{dataset.path / sparse.vocabulary.path}: damaged; copy or preprocess the dataset again"
                raise DatasetError(msg)
            vocabulary = dataset.vocabulary(feature)
            if dataset.period is not None:
                vocabulary.write(folder / table, ("value", "id"))
            write_index(vocabulary, folder / index)
            paths[feature] = (table, index)
    shared = {column.name: column.table for column in dataset.schema.sparse if column.table in paths}
    return paths | {name: paths[owner] for name, owner in shared.items()}
