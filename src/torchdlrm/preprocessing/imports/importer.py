"""Writes encoded blocks as a dataset, like one that `preprocess` wrote but without vocabularies.

In: `Blocks` and the columns.  Out: a `Dataset`: training rows shuffled by the seed, val and test in their order.
Two passes: one that deals the rows out to the parts and checks them, one that writes the parts.
"""

import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import polars as pl

from torchdlrm.data.dataset import (
    MANIFEST_NAME,
    ROW_GROUP_ROWS,
    BadRowsRecord,
    Dataset,
    FileRecord,
    Manifest,
    SourceRecord,
    SparseRecord,
)
from torchdlrm.data.splits import SPLIT_NAMES, criteo_split
from torchdlrm.errors import DatasetError, LogError
from torchdlrm.features.schema import FeatureSchema
from torchdlrm.features.transforms import Unchanged
from torchdlrm.files import claim_folder, clear_folder, publish_folder
from torchdlrm.logs.files import LogFile
from torchdlrm.logs.formats.parquet import ParquetFormat
from torchdlrm.preprocessing.encode import POSITION, Parts, write_batches, write_rows
from torchdlrm.preprocessing.imports.blocks import Blocks
from torchdlrm.preprocessing.options import PART_ROWS
from torchdlrm.preprocessing.tally import Tally, dense_bins
from torchdlrm.progress import ProgressListener, SilentProgress

_GROUP_ROWS = 1 << 20


@dataclass(frozen=True)
class _Place:
    """Where a stretch of rows goes: a split, the row's rank among its rows, and where it starts among all rows."""

    split: int
    first_of_split: int
    first_row: int


def import_blocks(
    blocks: Sequence[Blocks],
    schema: FeatureSchema,
    out: Path,
    *,
    table_sizes: Mapping[str, int] | None = None,
    seed: int = 0,
    part_rows: int = PART_ROWS,
    progress: ProgressListener | None = None,
) -> Dataset:
    """Write encoded rows as a dataset in the new folder `out`.

    Args:
        blocks: the rows, in the order of time.
        schema: their columns.
        out: the folder to make; until it is complete, its content grows next to it under another name.
        table_sizes: rows of the features' tables; by default the largest id that is met, + 1.
        seed: seed of the order of the training rows.
        part_rows: training rows a part, on average at most.
        progress: shows the phases.

    Raises:
        LogError: a value is not what it should be, or there are too few rows.
        DatasetError: `out` exists, or cannot be written.
    """
    if out.exists():
        msg = f"{out}: exists; choose another `out`, or remove it first"
        raise DatasetError(msg)
    partial = out.parent / f".{out.name}.importing"
    try:
        folder = claim_folder(partial, ("groups", "dataset"))
        try:
            clear_folder(folder)
            for name in ("groups", "dataset", *(f"dataset/{split}" for split in SPLIT_NAMES)):
                (partial / name).mkdir(parents=True)
            manifest = _write(
                blocks, schema, partial, dict(table_sizes or {}), seed, part_rows, progress or SilentProgress()
            )
            (partial / "dataset" / MANIFEST_NAME).write_text(manifest.to_json(), encoding="utf-8")
            publish_folder(partial / "dataset", out, MANIFEST_NAME)
        finally:
            os.close(folder)
            shutil.rmtree(partial, ignore_errors=True)
    except OSError as error:
        msg = f"{out}: cannot be written: {error.strerror or error}"
        raise DatasetError(msg) from error
    return Dataset.open(out)


def _write(
    blocks: Sequence[Blocks],
    schema: FeatureSchema,
    folder: Path,
    table_sizes: dict[str, int],
    seed: int,
    part_rows: int,
    progress: ProgressListener,
) -> Manifest:
    places, rows_of_split, rule = _place(blocks)
    if not rows_of_split[0]:
        msg = "there are no rows for training; give the files of the training split too"
        raise LogError(msg)
    parts = Parts(part_rows, seed, (rows_of_split[0], rows_of_split[1], rows_of_split[2]))
    tallies = [Tally() for _ in SPLIT_NAMES]
    largest = dict.fromkeys((column.name for column in schema.sparse), 0)
    progress.start_phase("read", sum(rows_of_split))
    batches: dict[int, list[tuple[Path, int]]] = {}
    pieces = _pieces(blocks, places)
    for number, (frame, place) in enumerate(pieces):
        _tally(tallies[place.split], frame, schema, largest)
        before = (place.first_of_split,) * 3  # all rows of a piece are of one split
        part_of_rows = parts.part_of_rows(place.first_row, before, np.full(frame.height, place.split, np.uint8))
        order = np.argsort(part_of_rows, kind="stable")
        positions = pl.Series(POSITION, np.arange(place.first_row, place.first_row + frame.height))
        columns = {s.name: s.gather(order).rechunk().to_arrow() for s in (positions, *frame.iter_columns())}
        target = folder / "groups" / f"{number:05d}"
        bounds = np.cumsum(np.bincount(part_of_rows, minlength=sum(parts.num_parts)))
        for batch, part in enumerate(write_batches(columns, bounds, target)):
            batches.setdefault(part, []).append((target, batch))
        progress.advance(frame.height)
    sizes = {name: table_sizes.get(name, most + 1) for name, most in largest.items()}
    files = _write_parts(parts, batches, schema, sizes, folder, progress)
    return Manifest(
        feature_schema=schema,
        split_rule=rule,
        seed=seed,
        min_count=1,
        max_embeddings=None,
        row_group_rows=ROW_GROUP_ROWS,
        part_rows=part_rows,
        dense={column.name: Unchanged() for column in schema.dense},
        sparse={name: SparseRecord(num_embeddings=size, vocabulary=None) for name, size in sizes.items()},
        splits={
            name: tally.record(tuple(parts_of_split), tallies[0], schema.labels)
            for name, tally, parts_of_split in zip(SPLIT_NAMES, tallies, files, strict=True)
        },
        source=tuple(
            SourceRecord(name=path.name, size_bytes=path.stat().st_size, rows=group.num_rows)
            for group in blocks
            for path in group.files
        ),
        bad_rows=BadRowsRecord(total=0, counts={}, examples={}),
    )


def _place(blocks: Sequence[Blocks]) -> tuple[list[list[_Place]], list[int], str]:
    """For each group of blocks the stretches of its rows; the rows of each split; and the rule in words."""
    if all(group.split is None for group in blocks):
        files = [
            LogFile(group.files[0], 1, day if len(blocks) > 1 else None, ParquetFormat())
            for day, group in enumerate(blocks)
        ]
        bounds = criteo_split(files, [group.num_rows for group in blocks])
    else:
        bounds = None
    places: list[list[_Place]] = []
    first_row, seen = 0, [0, 0, 0]
    for group in blocks:
        slices = {group.split or "train": slice(0, group.num_rows)}
        if bounds is not None:
            slices = bounds.rows_of(first_row, group.num_rows)
        stretches: list[_Place] = []
        for name, rows in slices.items():
            if rows.stop > rows.start:
                split = SPLIT_NAMES.index(name)
                stretches.append(_Place(split, seen[split], first_row + rows.start))
                seen[split] += rows.stop - rows.start
        places.append(stretches)
        first_row += group.num_rows
    return places, seen, bounds.rule if bounds else "as the files were split"


def _pieces(blocks: Sequence[Blocks], places: Sequence[Sequence[_Place]]) -> Iterator[tuple[pl.DataFrame, _Place]]:
    """The rows of all blocks in pieces of one split each."""
    for group, stretches in zip(blocks, places, strict=True):
        starts = [place.first_row for place in stretches]
        row = starts[0] if starts else 0
        gathered: list[pl.DataFrame] = []
        start = row
        for block in group.read():
            rest = block
            while rest.height:
                current = max(i for i, first in enumerate(starts) if first <= row)
                stop = starts[current + 1] if current + 1 < len(starts) else row + rest.height
                taken = rest.head(stop - row)
                gathered.append(taken)
                row += taken.height
                rest = rest.slice(taken.height)
                if row - start >= _GROUP_ROWS or row in starts:
                    yield _piece(gathered, stretches[current], start)
                    gathered, start = [], row
        if gathered:
            yield _piece(gathered, stretches[-1], start)


def _piece(gathered: Sequence[pl.DataFrame], stretch: _Place, start: int) -> tuple[pl.DataFrame, _Place]:
    return pl.concat(gathered), _Place(stretch.split, stretch.first_of_split + start - stretch.first_row, start)


def _tally(tally: Tally, frame: pl.DataFrame, schema: FeatureSchema, largest: dict[str, int]) -> None:
    tally.add_labels(frame[schema.label.name].to_numpy())
    for column in schema.dense:
        tally.add_dense(column.name, dense_bins(frame[column.name].to_numpy()), num_missing=0)
    for about in schema.sparse:
        values, num_empty = frame[about.name], 0
        if about.is_multi_valued:
            num_empty = int((values.list.len() == 0).sum())
            values = values.explode(empty_as_null=False)
        ids, counts = np.unique(values.to_numpy(), return_counts=True)
        tally.add_sparse(about, ids, counts, num_empty)
        largest[about.name] = max(largest[about.name], int(ids.max(initial=0)))


def _write_parts(
    parts: Parts,
    batches: Mapping[int, list[tuple[Path, int]]],
    schema: FeatureSchema,
    sizes: Mapping[str, int],
    folder: Path,
    progress: ProgressListener,
) -> list[list[FileRecord]]:
    progress.start_phase("write", sum(parts.rows_of_split))
    files: list[list[FileRecord]] = [[] for _ in SPLIT_NAMES]
    files_of_parts = parts.files

    def write(part: int) -> FileRecord:
        split, name = files_of_parts[part]
        seed = parts.seed if split == 0 else None
        return FileRecord(**write_rows(batches.get(part, []), seed, schema, sizes, folder / "dataset", name))

    with ThreadPoolExecutor(2) as threads:
        for (split, _), record in zip(files_of_parts, threads.map(write, range(len(files_of_parts))), strict=True):
            files[split].append(record)
            progress.advance(record.rows)
    return files
