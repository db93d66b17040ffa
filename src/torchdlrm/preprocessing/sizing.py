"""Computes how much memory and disk a job needs, and cuts it into tasks that stay within them.

In: the log's files, the schema, what may be used.  Out: a `JobSizing`.  The numbers are measured, with some room.
"""

import errno
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from torchdlrm.errors import ConfigError, DatasetError
from torchdlrm.features.schema import FeatureSchema
from torchdlrm.logs.files import LogFile
from torchdlrm.logs.lines import CHUNK_BYTES
from torchdlrm.preprocessing.options import BASE_BYTES, PreprocessOptions
from torchdlrm.units import show_bytes

BYTES_A_VALUE = 100
_MEMORY_A_TEXT_BYTE = 10
_MEMORY_A_PART_BYTE, _PART_BYTES = 2.6, 256 << 20  # the latter of parts with vectors
_MEMORY_A_GROUP_BYTE = 2.6
# What the work folder and the dataset hold at their largest, as a fraction of the text.
_DISK_A_TEXT_BYTE = 1.0
_DISK_A_PACKED_BYTE = 0.6
_MIN_CHUNK_BYTES, _MAX_CHUNK_BYTES = 1 << 20, 2 * CHUNK_BYTES
_MAX_PARTITIONS = 4096


@dataclass(frozen=True)
class JobSizing:
    """How the job is cut into tasks; chosen when it starts, and kept when it is resumed.

    `chunk_bytes` of text are read at a time; values are dealt out to `num_partitions` by a hash; `group_bytes` of
    encoded rows are dealt out to the parts at a time; `values_per_task` are counted at a time.  These fit the memory
    with `tasks_in_memory` tasks at a time.
    """

    chunk_bytes: int
    num_partitions: int
    group_bytes: int
    values_per_task: int
    tasks_in_memory: int


def bytes_a_row(schema: FeatureSchema) -> int:
    """What an encoded row takes in memory, lists counted as 8 values."""
    num_values = sum(8 if column.is_multi_valued else 1 for column in schema.sparse)
    num_values += sum((column.size or 0) for column in schema.content)
    return 16 + 4 * (len(schema.dense) + num_values)


def part_rows(schema: FeatureSchema, most: int) -> int:
    """Most rows of a part: fewer where vectors make rows wide, whatever the memory."""
    return min(most, _PART_BYTES // bytes_a_row(schema)) if schema.content else most


def choose_sizing(
    files: Sequence[LogFile],
    schema: FeatureSchema,
    options: PreprocessOptions,
    memory_bytes: int,
    tasks_in_memory: int,
    known_rows: int = 0,
) -> JobSizing:
    """Cut a job so that `tasks_in_memory` tasks at a time keep to `memory_bytes`.

    `known_rows` is the length of the longest vocabulary that is extended.

    Raises:
        ConfigError: it is too little for one task.
    """
    text_bytes = sum(file.text_bytes for file in files)
    most_rows = text_bytes // len(schema.columns) + 1
    needed = BASE_BYTES + part_memory_bytes(min(options.part_rows, most_rows), schema)
    if memory_bytes < needed:
        raise ConfigError(
            f"`memory_bytes`: {show_bytes(memory_bytes)} is too little: one part of the dataset and the program itself "
            f"take {show_bytes(needed)}"
        )
    bytes_a_task = (memory_bytes - BASE_BYTES) // tasks_in_memory
    chunk_bytes = min(_MAX_CHUNK_BYTES, bytes_a_task // _MEMORY_A_TEXT_BYTE)
    chunk_bytes = max(_MIN_CHUNK_BYTES, min(chunk_bytes, text_bytes // (4 * tasks_in_memory)))
    values_per_task = bytes_a_task // (BYTES_A_VALUE + BYTES_A_VALUE // 4)
    likely_rows = max(text_bytes // (4 * len(schema.columns)) + 1, known_rows)
    partitions = 1
    while likely_rows > values_per_task and partitions < min(_MAX_PARTITIONS, 4 * likely_rows / values_per_task):
        partitions *= 2
    group_bytes = int(bytes_a_task / _MEMORY_A_GROUP_BYTE)
    return JobSizing(chunk_bytes, partitions, group_bytes, values_per_task, tasks_in_memory)


def tasks_that_fit(sizing: JobSizing, memory_bytes: int) -> int:
    """How many tasks of a sizing, which an earlier run may have chosen, this memory holds at a time; at least one."""
    largest = max(
        sizing.chunk_bytes * _MEMORY_A_TEXT_BYTE,
        int(sizing.group_bytes * _MEMORY_A_GROUP_BYTE),
        sizing.values_per_task * (BYTES_A_VALUE + BYTES_A_VALUE // 4),
    )
    return max(1, (memory_bytes - BASE_BYTES) // largest)


def part_memory_bytes(rows: int, schema: FeatureSchema) -> int:
    """What writing a part with this number of rows takes."""
    return int(_MEMORY_A_PART_BYTE * rows * bytes_a_row(schema)) + (8 << 20)


def check_disk(files: Sequence[LogFile], folder: Path) -> None:
    """See that the disk has room for what the job will write, some of which may be there from before.

    Raises:
        DatasetError: it has not.
    """
    needed = 0
    for file in files:
        needed += int(file.text_bytes * _DISK_A_TEXT_BYTE)
        if file.packing is not None:
            needed += int(file.text_bytes * _DISK_A_PACKED_BYTE)
    used = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    free = shutil.disk_usage(folder).free + used
    if free < needed:
        raise DatasetError(
            f"{folder}: the disk has {show_bytes(free)} free, and the job needs up to {show_bytes(needed)} there "
            "while it runs; make room, or choose an `out` on another disk"
        ) from OSError(errno.ENOSPC, "it would be full")
