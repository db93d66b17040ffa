"""Writes and reads what tasks leave for later ones: files of named tables, each of which is read without the others.

Nothing is compressed, so that a table is mapped into memory and only the pages that are used are read.

    table | table | ... | JSON: name -> [offset, length] | length of the JSON, 8 bytes
"""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from torchdlrm.files import replacing
from torchdlrm.storage.reading import parts_of

_LENGTH_BYTES = 8
_TAIL_BYTES = 16 << 10  # has the names of most files


def write_sections(path: Path, tables: Iterable[tuple[str, pa.Table | npt.NDArray[Any]]]) -> dict[str, tuple[int, int]]:
    """Write tables, or numbers alone, under their names, atomically; where each starts, and how long it is."""
    places: dict[str, tuple[int, int]] = {}
    with replacing(path) as temporary, pa.OSFile(str(temporary), "wb") as file:
        for name, table in tables:
            start = file.tell()
            if isinstance(table, pa.Table):
                with pa.ipc.new_stream(file, table.schema) as stream:
                    stream.write_table(table)
            else:
                file.write(table)
            places[name] = (start, file.tell() - start)
        footer = json.dumps(places).encode()
        file.write(footer)
        file.write(len(footer).to_bytes(_LENGTH_BYTES, "little"))
    return places


class Sections:
    """Reads what `write_sections` wrote; where all of it is wanted, `whole`, a bucket is asked once."""

    def __init__(self, path: Path, *, whole: bool = False) -> None:
        self._read = parts_of(path, whole=whole)
        tail = self._read(-_TAIL_BYTES, None)
        length = int.from_bytes(tail[-_LENGTH_BYTES:], "little")
        if length + _LENGTH_BYTES > len(tail):
            tail = self._read(-length - _LENGTH_BYTES, None)
        self._places = json.loads(bytes(tail[-length - _LENGTH_BYTES : -_LENGTH_BYTES]))

    def __contains__(self, name: str) -> bool:
        return name in self._places

    def table(self, name: str) -> pa.Table:
        """Return the table of that name, in mapped memory where the file is on a disk."""
        start, length = self._places[name]
        return as_table(self._read(start, start + length))

    def numbers(self, name: str, dtype: npt.DTypeLike, start: int, end: int) -> npt.NDArray[Any]:
        """The numbers of that name, of this type, from one place to another."""
        at, size_bytes = self._places[name][0], np.dtype(dtype).itemsize
        return np.frombuffer(self._read(at + start * size_bytes, at + end * size_bytes), dtype)


def as_table(content: memoryview) -> pa.Table:
    """The table that a file has at the place that `write_sections` returned."""
    return pa.ipc.open_stream(pa.py_buffer(content)).read_all()
