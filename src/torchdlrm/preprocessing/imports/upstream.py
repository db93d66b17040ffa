"""Reads files of `torchrec.datasets.criteo` and of its nvt_dataloader example, in blocks.

- `day_N_dense.npy` float32 (n, 13), `day_N_sparse.npy` int32 or int64 (n, 26), `day_N_labels.npy` int32 (n, 1)
- multi-hot: `day_N_sparse_multi_hot.npz` next to them, uncompressed, members `0.npy` ... `25.npy`, int32 (n, k)
- nvt_dataloader: `label.bin` float32, `numerical.bin` float32 n x 13, `cat_0.bin` ... int32, in `train`, `validation`
  and `test`, or in one folder
"""

import re
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import polars as pl
import pyarrow as pa
from numpy.lib import format as npy_format

from torchdlrm.data.splits import SplitName
from torchdlrm.errors import LogError
from torchdlrm.features.schema import NUM_CRITEO_DENSE, NUM_CRITEO_SPARSE
from torchdlrm.preprocessing.imports.blocks import BLOCK_ROWS, Blocks, as_dense, as_ids, as_labels

DENSE_NAMES = tuple(f"int_{i}" for i in range(NUM_CRITEO_DENSE))
SPARSE_NAMES = tuple(f"cat_{i}" for i in range(NUM_CRITEO_SPARSE))
_LABELS = re.compile(r"(.+)_labels\.npy")
_NVT_FOLDERS: Mapping[str, SplitName] = {"train": "train", "validation": "val", "val": "val", "test": "test"}


def find_npy_days(folder: Path, table_sizes: Mapping[str, int], *, multi_hot: bool) -> list[Blocks]:
    """The days of upstream's npy files in a folder, in their order.

    Raises:
        LogError: a file is missing, or has another shape or type.
    """
    found = [(path, match[1]) for path in folder.iterdir() if (match := _LABELS.fullmatch(path.name))]
    if not found:
        msg = f"{folder}: holds no *_labels.npy; give the folder that upstream's preprocessing wrote"
        raise LogError(msg)
    found.sort(key=lambda item: _day_order(item[1]))
    return [_npy_day(folder, stem, table_sizes, multi_hot=multi_hot) for _, stem in found]


def _day_order(stem: str) -> tuple[int, str]:
    number = re.search(r"(\d+)$", stem)
    return (int(number[1]) if number else -1), stem


def _npy_day(folder: Path, stem: str, table_sizes: Mapping[str, int], *, multi_hot: bool) -> Blocks:
    paths = {kind: folder / f"{stem}_{kind}.npy" for kind in ("labels", "dense")}
    sparse_path = folder / (f"{stem}_sparse_multi_hot.npz" if multi_hot else f"{stem}_sparse.npy")
    labels, dense = _load(paths["labels"]), _load(paths["dense"])
    num_rows = len(labels)
    _expect(paths["dense"], dense, (num_rows, NUM_CRITEO_DENSE))
    if multi_hot:
        sparse = _load_multi_hot(sparse_path)
        for i, array in enumerate(sparse):
            _expect(Path(f"{sparse_path}/{i}.npy"), array, (num_rows, array.shape[1] if array.ndim == 2 else -1))
    else:
        together = _load(sparse_path)
        _expect(sparse_path, together, (num_rows, NUM_CRITEO_SPARSE))
        sparse = [together[:, i] for i in range(NUM_CRITEO_SPARSE)]
    files = [(sparse_path, array) for array in sparse]
    return Blocks(
        stem,
        num_rows,
        (*paths.values(), sparse_path),
        None,
        lambda: _read((paths["labels"], labels), (paths["dense"], dense), files, table_sizes),
    )


def _read(
    labels: tuple[Path, np.ndarray],
    dense: tuple[Path, np.ndarray],
    sparse: Sequence[tuple[Path, np.ndarray]],
    table_sizes: Mapping[str, int],
) -> Iterator[pl.DataFrame]:
    """The rows of mapped arrays, each with its file; the ids of a feature are (n,), or (n, k) where it is multi-hot."""
    for start in range(0, len(labels[1]), BLOCK_ROWS):
        rows = slice(start, start + BLOCK_ROWS)
        columns = [as_labels(np.asarray(labels[1][rows]), str(labels[0]), start)]
        block = np.asarray(dense[1][rows])
        columns += [as_dense(block[:, i], name, str(dense[0]), start) for i, name in enumerate(DENSE_NAMES)]
        for name, (path, array) in zip(SPARSE_NAMES, sparse, strict=True):
            ids = as_ids(np.asarray(array[rows]), name, str(path), start, table_sizes.get(name))
            columns.append(pl.Series(name, ids) if ids.ndim == 1 else _lists(name, ids))
        yield pl.DataFrame(columns)


def _lists(name: str, ids: np.ndarray) -> pl.Series:
    num_rows, hot = ids.shape
    offsets = pa.array(np.arange(0, num_rows * hot + 1, hot, dtype=np.int64))
    return pl.Series(name, pa.LargeListArray.from_arrays(offsets, pa.array(ids.reshape(-1))))


def _load(path: Path) -> np.ndarray:
    try:
        return np.load(path, mmap_mode="r", allow_pickle=False)
    except FileNotFoundError as error:
        msg = f"{path}: there is no such file; upstream writes dense, sparse and labels together"
        raise LogError(msg) from error
    except (OSError, ValueError) as error:
        msg = f"{path}: not a NumPy file ({error})"
        raise LogError(msg) from error


def _load_multi_hot(path: Path) -> list[np.ndarray]:
    """The members of an uncompressed npz, mapped into memory where they lie in the file."""
    try:
        with zipfile.ZipFile(path) as archive, path.open("rb") as raw:
            arrays: list[np.ndarray] = []
            for i in range(NUM_CRITEO_SPARSE):
                info = archive.getinfo(f"{i}.npy")
                if info.compress_type != zipfile.ZIP_STORED:
                    msg = f"{path}: member {i}.npy is compressed; upstream writes them uncompressed"
                    raise LogError(msg)
                # The local header is 30 bytes, then the name and the extra field, whose lengths it holds.
                raw.seek(info.header_offset + 26)
                lengths = np.frombuffer(raw.read(4), "<u2")
                raw.seek(info.header_offset + 30 + int(lengths.sum()))
                version = npy_format.read_magic(raw)
                read_header = (
                    npy_format.read_array_header_1_0 if version == (1, 0) else npy_format.read_array_header_2_0
                )
                shape, fortran, dtype = read_header(raw)
                if fortran or dtype.hasobject:
                    msg = f"{path}: member {i}.npy is not an array of numbers in C order"
                    raise LogError(msg)
                arrays.append(np.memmap(path, dtype, "r", raw.tell(), shape))
            return arrays
    except (OSError, KeyError, ValueError, zipfile.BadZipFile) as error:
        if isinstance(error, LogError):
            raise
        msg = f"{path}: not upstream's multi-hot file ({error})"
        raise LogError(msg) from error


def _expect(path: Path, array: np.ndarray, shape: Sequence[int]) -> None:
    if array.ndim != len(shape) or tuple(array.shape) != tuple(shape):
        msg = f"{path}: has shape {tuple(array.shape)}, expected {tuple(shape)}"
        raise LogError(msg)


def find_nvt_folders(folder: Path, table_sizes: Mapping[str, int]) -> list[Blocks]:
    """The binary files of TorchRec's nvt_dataloader example: a folder for each split, or one.

    Raises:
        LogError: a file is missing, or has another size.
    """
    parts = [(folder / name, split) for name, split in _NVT_FOLDERS.items() if (folder / name / "label.bin").is_file()]
    found: list[tuple[Path, SplitName | None]] = list(parts)
    if not found and (folder / "label.bin").is_file():
        found = [(folder, None)]
    if not found:
        msg = f"{folder}: holds no label.bin, nor do train, validation or test in it"
        raise LogError(msg)
    return [_nvt_part(path, split, table_sizes) for path, split in found]


def _nvt_part(folder: Path, split: SplitName | None, table_sizes: Mapping[str, int]) -> Blocks:
    num_rows = _size(folder / "label.bin") // 4
    paths = {"label": folder / "label.bin", "numerical": folder / "numerical.bin"}
    paths |= {name: folder / f"{name}.bin" for name in SPARSE_NAMES}
    arrays = {}
    for name, path in paths.items():
        width = NUM_CRITEO_DENSE if name == "numerical" else 1
        if _size(path) != 4 * width * num_rows:
            msg = f"{path}: has {_size(path):,} bytes, expected {4 * width * num_rows:,} for the {num_rows:,} labels"
            raise LogError(msg)
        dtype = np.int32 if name in SPARSE_NAMES else np.float32
        arrays[name] = np.memmap(path, dtype, "r", shape=(num_rows, width) if width > 1 else (num_rows,))

    labels, dense, *sparse = ((path, arrays[name]) for name, path in paths.items())
    return Blocks(
        folder.name, num_rows, tuple(paths.values()), split, lambda: _read(labels, dense, sparse, table_sizes)
    )


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError as error:
        msg = f"{path}: there is no such file"
        raise LogError(msg) from error
