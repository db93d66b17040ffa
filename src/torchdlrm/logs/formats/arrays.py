"""Reads the arrays that upstream's preprocessing writes: a file for each kind of column, of the same rows.

| the log is | next to it |
| --- | --- |
| `day_N_sparse.npy`, (n, 26), of `torchrec.datasets.criteo` | `day_N_dense.npy` (n, 13), `day_N_labels.npy` (n, 1) |
| `day_N_sparse_multi_hot.npz` of MLPerf, members `0.npy` to `25.npy`, (n, k) | the same |
| `label.bin`, float32, of TorchRec's `nvt_dataloader` | `numerical.bin`, float32 n x 13; `cat_0.bin` ..., int32 |

Columns have the names of the preset `criteo`: `label`, `int_0`, ..., `cat_0`, ...  Rows are read in blocks of 65,536
out of mapped memory.
"""

import zipfile
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa
from numpy.lib import format as npy_format
from numpy.typing import NDArray

from torchdlrm.errors import LogError
from torchdlrm.features.schema import NUM_CRITEO_DENSE, NUM_CRITEO_SPARSE
from torchdlrm.logs.tables import TableFile, TableFormat

DENSE_NAMES = tuple(f"int_{i}" for i in range(NUM_CRITEO_DENSE))
SPARSE_NAMES = tuple(f"cat_{i}" for i in range(NUM_CRITEO_SPARSE))
_BLOCK_ROWS = 1 << 16
_Array = NDArray[Any]


class _Arrays(TableFormat):
    """Arrays of the same rows in several files."""

    text_bytes_a_byte: ClassVar[float] = 3.0

    @abstractmethod
    def arrays(self, path: Path) -> Mapping[str, tuple[Path, _Array]]:
        """Each column, (n,) or (n, k), and the file that it stands in; the label is the first.

        Raises:
            LogError: a file is missing, or has another shape or type.
        """

    def describe(self, path: Path) -> TableFile:
        """The columns; a group is a block of rows."""
        arrays = self.arrays(path)
        fields = [(name, _arrow(array[:0]).type) for name, (_, array) in arrays.items()]
        num_rows = len(next(iter(arrays.values()))[1])
        rows = [min(_BLOCK_ROWS, num_rows - start) for start in range(0, num_rows, _BLOCK_ROWS)]
        row_bytes = sum(array.itemsize * (array.shape[1] if array.ndim > 1 else 1) for _, array in arrays.values())
        return TableFile(pa.schema(fields), [count * row_bytes for count in rows], rows)

    def table(self, path: Path, groups: range, names: Sequence[str]) -> pa.Table:
        """Columns of blocks of rows; a number that is not finite is refused, since encoded rows lack none."""
        arrays = self.arrays(path)
        start, end = groups.start * _BLOCK_ROWS, groups.stop * _BLOCK_ROWS
        columns = {}
        for name in names:
            file, array = arrays[name]
            values = np.asarray(array[start:end])
            if values.dtype.kind == "f" and len(bad := np.flatnonzero(~np.isfinite(values))):
                row = start + int(bad[0])
                msg = f"{file}, row {row + 1:,}, column {name}: {values[bad[0]]} is not a finite number"
                raise LogError(msg)
            columns[name] = _arrow(values)
        return pa.table(columns)


class NpyFormat(_Arrays):
    """The arrays of `torchrec.datasets.criteo`, of one value a cell."""

    name: ClassVar[str] = "NumPy"
    ending: ClassVar[str] = "_sparse.npy"

    def recognises(self, start: bytes, path: Path) -> bool:  # noqa: ARG002
        """By its name: a file of another content is a damaged one."""
        return path.name.endswith(self.ending)

    def arrays(self, path: Path) -> Mapping[str, tuple[Path, _Array]]:
        """The columns of the arrays of a day."""
        stem = path.name.removesuffix(self.ending)
        files = {kind: path.with_name(f"{stem}_{kind}.npy") for kind in ("labels", "dense")}
        labels, dense = (_load(file) for file in files.values())
        num_rows = len(labels)
        _expect(files["labels"], labels, (num_rows, 1)[: max(1, labels.ndim)])
        _expect(files["dense"], dense, (num_rows, NUM_CRITEO_DENSE))
        columns = {"label": (files["labels"], labels.reshape(num_rows))}
        columns |= {name: (files["dense"], dense[:, i]) for i, name in enumerate(DENSE_NAMES)}
        return columns | {name: (path, ids) for name, ids in zip(SPARSE_NAMES, self._ids(path, num_rows), strict=True)}

    def _ids(self, path: Path, num_rows: int) -> Sequence[_Array]:
        ids = _load(path)
        _expect(path, ids, (num_rows, NUM_CRITEO_SPARSE))
        return [ids[:, i] for i in range(NUM_CRITEO_SPARSE)]


class MultiHotFormat(NpyFormat):
    """The arrays of MLPerf's DLRM-DCNv2, of several values a cell."""

    name: ClassVar[str] = "multi-hot NumPy"
    ending: ClassVar[str] = "_sparse_multi_hot.npz"

    def _ids(self, path: Path, num_rows: int) -> Sequence[_Array]:
        """The members of an uncompressed npz, mapped into memory where they lie in the file."""
        arrays: list[_Array] = []
        try:
            with zipfile.ZipFile(path) as archive, path.open("rb") as raw:
                for i in range(NUM_CRITEO_SPARSE):
                    info = archive.getinfo(f"{i}.npy")
                    if info.compress_type != zipfile.ZIP_STORED:
                        msg = f"member {i}.npy is compressed, and upstream writes them uncompressed"
                        raise ValueError(msg)
                    # The local header is 30 bytes, then the name and the extra field, whose lengths it holds.
                    raw.seek(info.header_offset + 26)
                    lengths = np.frombuffer(raw.read(4), "<u2")
                    raw.seek(info.header_offset + 30 + int(lengths.sum()))
                    version = npy_format.read_magic(raw)
                    header = npy_format.read_array_header_1_0 if version == (1, 0) else npy_format.read_array_header_2_0
                    shape, fortran, dtype = header(raw)
                    if fortran or dtype.hasobject:
                        msg = f"member {i}.npy is not an array of numbers in C order"
                        raise ValueError(msg)
                    arrays.append(np.memmap(path, dtype, "r", raw.tell(), shape))
        except (KeyError, ValueError, zipfile.BadZipFile) as error:
            msg = f"{path}: not upstream's multi-hot file ({error})"
            raise LogError(msg) from error
        for i, array in enumerate(arrays):
            _expect(Path(f"{path}/{i}.npy"), array, (num_rows, array.shape[1] if array.ndim == 2 else -1))
        return arrays


class NvtFormat(_Arrays):
    """The binary files of TorchRec's `nvt_dataloader` example."""

    name: ClassVar[str] = "label.bin"
    text_bytes_a_byte: ClassVar[float] = 100.0  # the other columns lie next to it

    def recognises(self, start: bytes, path: Path) -> bool:  # noqa: ARG002
        """By its name."""
        return path.name == "label.bin"

    def arrays(self, path: Path) -> Mapping[str, tuple[Path, _Array]]:
        """The columns of the files of a folder."""
        num_rows = path.stat().st_size // 4
        label, numerical = (
            _mapped(path.with_name(f"{name}.bin"), np.float32, width, num_rows)
            for name, width in (("label", 1), ("numerical", NUM_CRITEO_DENSE))
        )
        columns = {"label": (path, label[:, 0])}
        columns |= {name: (path.with_name("numerical.bin"), numerical[:, i]) for i, name in enumerate(DENSE_NAMES)}
        files = {name: path.with_name(f"{name}.bin") for name in SPARSE_NAMES}
        return columns | {name: (file, _mapped(file, np.int32, 1, num_rows)[:, 0]) for name, file in files.items()}


def _arrow(values: _Array) -> pa.Array:
    """A column of Arrow: numbers, or lists of as many numbers in each row."""
    if values.ndim == 1:
        return pa.array(np.ascontiguousarray(values))
    return pa.FixedSizeListArray.from_arrays(pa.array(np.ascontiguousarray(values).reshape(-1)), values.shape[1])


def _load(path: Path) -> _Array:
    try:
        array: _Array = np.load(path, mmap_mode="r", allow_pickle=False)
    except FileNotFoundError as error:
        msg = f"{path}: there is no such file; upstream writes dense, sparse and labels together"
        raise LogError(msg) from error
    except (EOFError, ValueError) as error:
        msg = f"{path}: not a NumPy file ({error})"
        raise LogError(msg) from error
    return array


def _expect(path: Path, array: _Array, shape: Sequence[int]) -> None:
    if array.ndim != len(shape) or tuple(array.shape) != tuple(shape):
        msg = f"{path}: has shape {tuple(array.shape)}, expected {tuple(shape)}"
        raise LogError(msg)


def _mapped(path: Path, dtype: type[np.generic], width: int, num_rows: int) -> _Array:
    try:
        size = path.stat().st_size
    except OSError as error:
        msg = f"{path}: there is no such file"
        raise LogError(msg) from error
    if size != 4 * width * num_rows:
        msg = f"{path}: has {size:,} bytes, expected {4 * width * num_rows:,} for the {num_rows:,} labels"
        raise LogError(msg)
    return np.memmap(path, dtype, "r", shape=(num_rows, width))
