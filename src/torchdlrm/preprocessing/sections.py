"""Files of named Arrow tables: what a task leaves for later tasks, each table read without the others.

In: tables.  Out: one file, whole or absent.  Nothing is compressed, so that a table is mapped into memory and only the
pages that are used are read.

    table | table | ... | JSON: name -> [offset, length] | length of the JSON, 8 bytes
"""

import json
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Self

import pyarrow as pa

from torchdlrm.files import replacing

_LENGTH_BYTES = 8


def write_sections(path: Path, tables: Mapping[str, pa.Table]) -> None:
    """Write tables under their names; the file appears when it is whole."""
    places: dict[str, tuple[int, int]] = {}
    with replacing(path) as beside, pa.OSFile(str(beside), "wb") as file:
        for name, table in tables.items():
            start = file.tell()
            with pa.ipc.new_stream(file, table.schema) as stream:
                stream.write_table(table)
            places[name] = (start, file.tell() - start)
        footer = json.dumps(places).encode()
        file.write(footer)
        file.write(len(footer).to_bytes(_LENGTH_BYTES, "little"))


class Sections:
    """Reads what `write_sections` wrote; a context manager."""

    def __init__(self, path: Path) -> None:
        self._file = pa.memory_map(str(path), "r")
        size_bytes = self._file.size()
        length = int.from_bytes(self._file.read_at(_LENGTH_BYTES, size_bytes - _LENGTH_BYTES), "little")
        self._places = json.loads(self._file.read_at(length, size_bytes - _LENGTH_BYTES - length))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()

    def __contains__(self, name: str) -> bool:
        return name in self._places

    def table(self, name: str) -> pa.Table:
        """The table of that name, in mapped memory."""
        start, length = self._places[name]
        self._file.seek(start)
        return pa.ipc.open_stream(pa.BufferReader(self._file.read_buffer(length))).read_all()
