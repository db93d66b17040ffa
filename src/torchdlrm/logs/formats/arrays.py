"""Reads the arrays that upstream's preprocessing writes: a file for each kind of column, of the same rows.

| the log is | next to it |
| --- | --- |
| `day_N_sparse.npy`, (n, 26), of `torchrec.datasets.criteo` | `day_N_dense.npy` (n, 13), `day_N_labels.npy` (n, 1) |
| `day_N_sparse_multi_hot.npz` of MLPerf, members `0.npy` to `25.npy`, (n, k) | the same |
| `label.bin`, float32, of TorchRec's `nvt_dataloader` | `numerical.bin`, float32 n x 13; `cat_0.bin` ..., int32 |

Columns have the names of the preset `criteo`: `label`, `int_0`, ..., `cat_0`, ...  Rows are read in blocks of 65,536.
"""

import math
import os
import zipfile
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, ClassVar

import numpy as np
import pyarrow as pa
from numpy.lib import format as npy_format
from numpy.typing import NDArray

from torchdlrm.errors import LogError
from torchdlrm.features.schema import NUM_CRITEO_DENSE, NUM_CRITEO_SPARSE
from torchdlrm.logs.files import LogFile
from torchdlrm.logs.tables import TableFile, TableFormat
from torchdlrm.storage.reading import identity_of, open_to_read

DENSE_NAMES = tuple(f"int_{i}" for i in range(NUM_CRITEO_DENSE))
SPARSE_NAMES = tuple(f"cat_{i}" for i in range(NUM_CRITEO_SPARSE))
_BLOCK_ROWS = 1 << 16
_Array = NDArray[Any]


@dataclass(frozen=True)
class _Stored:
    """An array in a file from a byte on, row after row, or column after column (Fortran order)."""

    path: Path
    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    first_byte: int = 0
    is_by_column: bool = False

    @classmethod
    def after_header(cls, path: Path, raw: BinaryIO) -> "_Stored":
        """That of a NumPy file, or of a member of an archive, which begins where `raw` stands."""
        version = npy_format.read_magic(raw)
        header = npy_format.read_array_header_1_0 if version == (1, 0) else npy_format.read_array_header_2_0
        shape, is_by_column, dtype = header(raw)
        first_byte = raw.tell()
        if dtype.hasobject:
            raise ValueError("it is no array of numbers")
        if raw.seek(0, os.SEEK_END) < first_byte + math.prod(shape) * dtype.itemsize:
            raise ValueError("it is cut off")
        return cls(path, dtype, shape, first_byte, is_by_column and len(shape) == 2)

    @property
    def row_bytes(self) -> int:
        return math.prod(self.shape[1:]) * self.dtype.itemsize

    def rows(self, start: int, end: int) -> _Array:
        end = max(start, min(end, self.shape[0]))
        width = math.prod(self.shape[1:])
        # Of an array by columns a piece of each, else one piece.
        pieces = [(column * self.shape[0] + start, end - start) for column in range(width)]
        pieces = pieces if self.is_by_column else [(start * width, (end - start) * width)]
        content = b""
        if end > start:
            with open_to_read(self.path) as raw:
                for first, count in pieces:
                    raw.seek(self.first_byte + first * self.dtype.itemsize)
                    content += raw.read(count * self.dtype.itemsize)
        values = np.frombuffer(content, self.dtype)
        return values.reshape(width, -1).T if self.is_by_column else values.reshape(-1, width)


class _Arrays(TableFormat):
    """Arrays of the same rows in several files."""

    text_bytes_a_byte: ClassVar[float] = 3.0

    @abstractmethod
    def arrays(self, path: Path) -> Mapping[str, tuple[_Stored, int | slice]]:
        """Each column: the array that it stands in, and at which place.  The label is the first.

        Raises:
            LogError: a file is missing, or has another shape or type.
        """

    def describe(self, file: LogFile) -> TableFile:
        """The columns; a group is a block of rows."""
        arrays = self.arrays(file.path)
        fields = [(name, _arrow(array.rows(0, 0)[:, at]).type) for name, (array, at) in arrays.items()]
        num_rows = arrays["label"][0].shape[0]
        rows = [min(_BLOCK_ROWS, num_rows - start) for start in range(0, num_rows, _BLOCK_ROWS)]
        row_bytes = sum(array.row_bytes for array in {array for array, _ in arrays.values()})
        return TableFile(pa.schema(fields), [count * row_bytes for count in rows], rows)

    def table(self, file: LogFile, groups: range, names: Sequence[str]) -> pa.Table:
        """Columns of blocks of rows; a number that is not finite is refused, since encoded rows lack none."""
        arrays = self.arrays(file.path)
        start, end = groups.start * _BLOCK_ROWS, groups.stop * _BLOCK_ROWS
        read = {array: array.rows(start, end) for array in {arrays[name][0] for name in names}}
        columns = {}
        for name in names:
            array, at = arrays[name]
            values = read[array][:, at]
            if values.dtype.kind == "f" and len(bad := np.flatnonzero(~np.isfinite(values))):
                row = start + int(bad[0])
                raise LogError(f"{array.path}, row {row + 1:,}, column {name}: {values[bad[0]]} is not a finite number")
            columns[name] = _arrow(values)
        return pa.table(columns)


class NpyFormat(_Arrays):
    """The arrays of `torchrec.datasets.criteo`, of one value a cell."""

    name: ClassVar[str] = "NumPy"
    ending: ClassVar[str] = "_sparse.npy"

    def recognises(self, start: bytes, path: Path) -> bool:  # noqa: ARG002
        """By its name: a file of another content is a damaged one."""
        return path.name.endswith(self.ending)

    def arrays(self, path: Path) -> Mapping[str, tuple[_Stored, int | slice]]:
        """The columns of the arrays of a day."""
        stem = path.name.removesuffix(self.ending)
        files = {kind: path.with_name(f"{stem}_{kind}.npy") for kind in ("labels", "dense")}
        labels, dense = (_load(file) for file in files.values())
        num_rows = labels.shape[0] if labels.shape else 0
        _expect(files["labels"], labels, (num_rows, 1)[: max(1, len(labels.shape))])
        _expect(files["dense"], dense, (num_rows, NUM_CRITEO_DENSE))
        columns: dict[str, tuple[_Stored, int | slice]] = {"label": (labels, 0)}
        columns |= {name: (dense, i) for i, name in enumerate(DENSE_NAMES)}
        return columns | dict(zip(SPARSE_NAMES, self._ids(path, num_rows), strict=True))

    def _ids(self, path: Path, num_rows: int) -> Sequence[tuple[_Stored, int | slice]]:
        ids = _load(path)
        _expect(path, ids, (num_rows, NUM_CRITEO_SPARSE))
        return [(ids, i) for i in range(NUM_CRITEO_SPARSE)]


class MultiHotFormat(NpyFormat):
    """The arrays of MLPerf's DLRM-DCNv2, of several values a cell."""

    name: ClassVar[str] = "multi-hot NumPy"
    ending: ClassVar[str] = "_sparse_multi_hot.npz"

    def _ids(self, path: Path, num_rows: int) -> Sequence[tuple[_Stored, int | slice]]:
        """The members of an uncompressed npz."""
        arrays = []
        try:
            with open_to_read(path) as raw, zipfile.ZipFile(raw) as archive:
                for i in range(NUM_CRITEO_SPARSE):
                    info = archive.getinfo(f"{i}.npy")
                    if info.compress_type != zipfile.ZIP_STORED:
                        raise ValueError(f"member {i}.npy is compressed, and upstream writes them uncompressed")
                    # The local header is 30 bytes, then the name and the extra field, whose lengths it holds.
                    raw.seek(info.header_offset + 26)
                    lengths = np.frombuffer(raw.read(4), "<u2")
                    raw.seek(info.header_offset + 30 + int(lengths.sum()))
                    arrays.append(_Stored.after_header(path, raw))
        except (KeyError, ValueError, zipfile.BadZipFile) as error:
            raise LogError(f"{path}: not upstream's multi-hot file ({error})") from error
        for i, array in enumerate(arrays):
            _expect(Path(f"{path}/{i}.npy"), array, (num_rows, array.shape[1] if len(array.shape) == 2 else -1))
        return [(array, slice(None)) for array in arrays]


class NvtFormat(_Arrays):
    """The binary files of TorchRec's `nvt_dataloader` example."""

    name: ClassVar[str] = "label.bin"
    text_bytes_a_byte: ClassVar[float] = 100.0  # the other columns lie next to it

    def recognises(self, start: bytes, path: Path) -> bool:  # noqa: ARG002
        """By its name."""
        return path.name == "label.bin"

    def arrays(self, path: Path) -> Mapping[str, tuple[_Stored, int | slice]]:
        """The columns of the files of a folder."""
        num_rows = identity_of(path).size_bytes // 4

        def array(name: str, dtype: type[np.generic], width: int = 1) -> _Stored:
            return _of_bytes(path.with_name(f"{name}.bin"), np.dtype(dtype), (num_rows, width))

        numerical = array("numerical", np.float32, NUM_CRITEO_DENSE)
        columns: dict[str, tuple[_Stored, int | slice]] = {"label": (array("label", np.float32), 0)}
        columns |= {name: (numerical, i) for i, name in enumerate(DENSE_NAMES)}
        return columns | {name: (array(name, np.int32), 0) for name in SPARSE_NAMES}


def _arrow(values: _Array) -> pa.Array:
    """A column of Arrow: numbers, or lists of as many numbers in each row."""
    if values.ndim == 1:
        return pa.array(np.ascontiguousarray(values))
    return pa.FixedSizeListArray.from_arrays(pa.array(np.ascontiguousarray(values).reshape(-1)), values.shape[1])


def _load(path: Path) -> _Stored:
    try:
        with open_to_read(path) as raw:
            return _Stored.after_header(path, raw)
    except FileNotFoundError as error:
        raise LogError(f"{path}: there is no such file; upstream writes dense, sparse and labels together") from error
    except (EOFError, ValueError) as error:
        raise LogError(f"{path}: not a NumPy file ({error})") from error


def _expect(path: Path, array: _Stored, shape: Sequence[int]) -> None:
    if array.shape != tuple(shape):
        raise LogError(f"{path}: has shape {array.shape}, expected {tuple(shape)}")


def _of_bytes(path: Path, dtype: np.dtype[Any], shape: tuple[int, int]) -> _Stored:
    size_bytes = identity_of(path).size_bytes
    expected_bytes = math.prod(shape) * dtype.itemsize
    if size_bytes != expected_bytes:
        raise LogError(f"{path}: has {size_bytes:,} bytes, expected {expected_bytes:,} for the {shape[0]:,} labels")
    return _Stored(path, dtype, shape)
