"""Runs the phases of a job one after the other, each as a number of tasks.

    read     chunks of the log -> chunk files; bad rows
    count    values of the training rows -> vocabularies -> ids of all values met
    encode   groups of chunks -> their rows, dealt out to the parts
    write    the rows of each part -> its file

Every task's result is in the work folder's journal, and what a task needs of others it takes from there and from
their files: so a job resumes wherever it was interrupted.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torchdlrm.data.dataset import Dataset
from torchdlrm.data.manifest import (
    MANIFEST_NAME,
    BadRowsRecord,
    FileRecord,
    Manifest,
    SourceRecord,
    VocabularyOfRecord,
    oldest_version,
)
from torchdlrm.data.splits import SPLIT_NAMES, RowSplit
from torchdlrm.features.bad_rows import BadRows
from torchdlrm.features.schema import FeatureSchema
from torchdlrm.features.transforms import TRANSFORMS, DenseTransform, Moments
from torchdlrm.files import sha256_of
from torchdlrm.jobs.work_folder import Result, WorkFolder
from torchdlrm.jobs.workers import Task, Workers
from torchdlrm.logs.files import LogFile
from torchdlrm.logs.format import Chunk, extra_columns
from torchdlrm.preprocessing.count import add_moments, sum_moments
from torchdlrm.preprocessing.encode import ROW_GROUP_ROWS, Encoding, Parts, encode_group, write_rows
from torchdlrm.preprocessing.options import BASE_BYTES, PreprocessOptions
from torchdlrm.preprocessing.place import place_chunks
from torchdlrm.preprocessing.read import ChunkFile, read_chunk, unpack
from torchdlrm.preprocessing.sizing import JobSizing, bytes_a_row, part_memory_bytes
from torchdlrm.preprocessing.tally import Tally
from torchdlrm.preprocessing.vocabularies import Period
from torchdlrm.preprocessing.vocabulary_phase import VocabularyPhase
from torchdlrm.progress import ProgressListener
from torchdlrm.storage.mirror import remove_files

# A piece of a part that is smaller than this costs more to find than to read.
_MIN_ROWS_A_PIECE = 4096


@dataclass
class Job:
    """A preprocessing job at work in its folder."""

    files: Sequence[LogFile]
    # The schema with its columns in the order of each file.
    layouts: Sequence[FeatureSchema]
    schema: FeatureSchema
    options: PreprocessOptions
    work: WorkFolder
    sizing: JobSizing
    workers: Workers
    memory_bytes: int
    progress: ProgressListener
    known: Dataset | None
    # Where values come and go.
    period: Period | None = None
    bad_rows: BadRows = field(default_factory=BadRows)

    @property
    def dataset_folder(self) -> Path:
        """The folder in which the dataset grows."""
        return self.work.pieces / "dataset"

    def run(self) -> Manifest:
        """All phases.

        Raises:
            LogError: the log cannot be read, or has too many bad rows, or too few good ones.
        """
        folders = ("vocabulary", *(() if self.period is None else ("reset", "candidates")), *SPLIT_NAMES)
        for name in folders:
            (self.dataset_folder / name).mkdir(parents=True, exist_ok=True)
        rows_of_files, read = self._read()
        split, chunks = place_chunks(
            self.files, rows_of_files, [(path, result["rows"]) for path, result in read], self.schema, self.options.seed
        )
        vocabularies = VocabularyPhase(self)
        sparse, ids = vocabularies.run(split, chunks, [result for _, result in read])
        dense = self._fit_dense(split, chunks)
        rows_of_split = tuple(sum(chunk.rows_of_split[i] for chunk in chunks) for i in range(len(SPLIT_NAMES)))
        parts = Parts(self.options.part_rows, self.options.seed, rows_of_split)  # type: ignore[arg-type]
        num_embeddings = {name: record.num_embeddings for name, record in sparse.items()}
        encoding = Encoding(self.schema, dense, ids, num_embeddings, split, parts)
        tallies, groups_of_parts = self._encode(encoding, chunks)
        files = self._write(encoding, groups_of_parts)
        vocabulary_of = self._vocabulary_of()
        return Manifest(
            format_version=oldest_version(
                self.schema,
                has_period=self.period is not None,
                has_vocabulary_of=vocabulary_of is not None,
                has_never_missing=any(fitted.never_missing for fitted in dense.values()),
            ),
            feature_schema=self.schema,
            split_rule=split.rule,
            seed=self.options.seed,
            min_count=self.options.min_count,
            max_embeddings=self.options.max_embeddings,
            row_group_rows=ROW_GROUP_ROWS,
            part_rows=self.options.part_rows,
            dense=dense,
            sparse=sparse,
            splits={
                name: tally.record(parts_of_split, tallies[0], self.schema.labels)
                for name, tally, parts_of_split in zip(SPLIT_NAMES, tallies, files, strict=True)
            },
            source=tuple(
                SourceRecord(
                    name=file.name, size_bytes=file.size_bytes, rows=num_rows, extra_columns=extra_columns(layout)
                )
                for file, num_rows, layout in zip(self.files, rows_of_files, self.layouts, strict=True)
            ),
            bad_rows=BadRowsRecord.of(self.bad_rows),
            vocabulary_of=vocabulary_of,
            **vocabularies.about_period(),
        )

    def _vocabulary_of(self) -> VocabularyOfRecord | None:
        """Whose vocabularies these are, where no period says it: what the same options would make is known by it."""
        extended = self.options.extend_vocabulary
        if self.known is None or (extended and self.period is not None):
            return None
        return VocabularyOfRecord(manifest_sha256=sha256_of(self.known.path / MANIFEST_NAME), extended=extended)

    # -- read

    def _read(self) -> tuple[list[int], list[tuple[Path, Result]]]:
        """The rows of each file, and for each chunk its file and what reading it gave."""
        total = sum(file.size_bytes * (1 if file.packing is None else 2) for file in self.files)
        self.progress.start_phase("read", total, "bytes")
        rows_of_files, read = [], []
        at_a_time = self.workers.tasks_at_a_time
        for start in range(0, len(self.files), at_a_time):
            numbers = range(start, min(start + at_a_time, len(self.files)))
            plans = dict(zip(numbers, self._plan(numbers), strict=True))
            for number in numbers:
                results = self._read_file(number, plans[number])
                rows_of_files.append(sum(result["rows"] for _, result in results))
                read += results
        return rows_of_files, read

    def _plan(self, numbers: range) -> list[list[Chunk]]:
        """The chunks of some files; packed ones are unpacked."""
        tasks = []
        for number in numbers:
            file = self.files[number]
            arguments: tuple[Any, ...] = (file, self.layouts[number], self.sizing.chunk_bytes)
            if file.packing is not None:
                tasks.append(Task(f"unpack-{number}", unpack, (*arguments, self.work.pieces / "text", f"{number:05d}")))
            else:
                tasks.append(Task(f"plan-{number}", plan_file, arguments))
        plans = []
        for number, result in zip(numbers, self.workers.run(tasks, self.work), strict=True):
            if self.files[number].packing is not None:
                self.progress.advance(self.files[number].size_bytes)
            plans.append([Chunk(start, end) for start, end in result["chunks"]])
        return plans

    def _read_file(self, number: int, chunks: Sequence[Chunk]) -> list[tuple[Path, Result]]:
        file = self.files[number]
        texts = [self.work.pieces / "text" / f"{number:05d}-{i:05d}" for i in range(len(chunks))]
        targets = [self.work.pieces / "chunks" / f"{number:05d}-{i:05d}" for i in range(len(chunks))]

        def tasks() -> Iterator[Task]:
            for i, chunk in enumerate(chunks):
                text = None if file.packing is None else texts[i]
                num_partitions = self.sizing.num_partitions
                arguments = (file, chunk, text, self.schema, self.layouts[number], num_partitions, targets[i])
                yield Task(f"read-{number}-{i}", read_chunk, arguments)

        results = []
        num_lines = int(self.layouts[number].header)
        total = chunks[-1].end if chunks else 1
        done_bytes = 0
        for i, result in enumerate(self.workers.run(tasks(), self.work)):
            self.bad_rows.add_chunk(BadRows.from_json(result["bad_rows"]), file.name, num_lines)
            self.bad_rows.check(self.options.max_bad_rows)
            num_lines += result["lines"]
            results.append((targets[i], result))
            if file.packing is not None:
                remove_files([texts[i]])
            now = file.size_bytes * chunks[i].end // total
            self.progress.advance(now - done_bytes)
            done_bytes = now
        self.progress.advance(file.size_bytes - done_bytes)
        return results

    # -- dense columns

    def _fit_dense(self, split: RowSplit, chunks: Sequence[ChunkFile]) -> dict[str, DenseTransform]:
        """The transform of each dense column with its constants, of the training rows where it needs any."""
        known: dict[str, DenseTransform] = {}
        if self.known is not None:
            known = {column.name: self.known.manifest.dense[column.name] for column in self.schema.dense}
        transforms = {
            column.name: TRANSFORMS[column.transform]
            for column in self.schema.dense
            if column.name not in known or known[column.name].never_missing
        }
        moments = {name: Moments() for name in transforms}
        if moments:
            tasks = (Task(f"dense-{i}", sum_moments, (chunk, split, transforms)) for i, chunk in enumerate(chunks))
            for result in self.workers.run(tasks, self.work):
                add_moments(moments, result)
        # What stands for a missing value goes on to, also where from now on rows are trained that lack it.
        known |= {
            name: fitted.model_copy(update={"never_missing": not moments[name].num_missing})
            for name, fitted in known.items()
            if fitted.never_missing
        }
        return known or {name: transform.fit(moments[name]) for name, transform in transforms.items()}

    # -- encode and write

    def _encode(
        self, encoding: Encoding, chunks: Sequence[ChunkFile]
    ) -> tuple[list[Tally], dict[int, list[tuple[Path, tuple[int, int]]]]]:
        """What was counted in each split, and for each part the groups' files with its place in each."""
        self.progress.start_phase("encode", sum(chunk.num_rows for chunk in chunks))
        groups = self._groups(encoding, chunks)
        targets = [self.work.pieces / "groups" / f"{i:05d}" for i in range(len(groups))]
        tasks = (
            Task(f"encode-{i}", encode_group, (encoding, [(n, chunks[n]) for n in group], targets[i]))
            for i, group in enumerate(groups)
        )
        tallies = [Tally() for _ in SPLIT_NAMES]
        groups_of_parts: dict[int, list[tuple[Path, tuple[int, int]]]] = {}
        for i, result in enumerate(self.workers.run(tasks, self.work)):
            for total, more in zip(tallies, result["tallies"], strict=True):
                total.add(Tally.from_json(more))
            for part, place in result["parts"]:
                groups_of_parts.setdefault(part, []).append((targets[i], place))
            remove_files([chunks[number].path for number in groups[i]])
            self.progress.advance(sum(chunks[number].num_rows for number in groups[i]))
        return tallies, groups_of_parts

    def _groups(self, encoding: Encoding, chunks: Sequence[ChunkFile]) -> list[list[int]]:
        """Numbers of chunks that are encoded together: few groups make large pieces of parts, memory sets a limit."""
        sizing = self.sizing
        fitting = sizing.group_bytes // bytes_a_row(self.schema)
        wanted = max(_MIN_ROWS_A_PIECE * sum(encoding.parts.num_parts), 1)
        groups: list[list[int]] = []
        rows = 0
        for number, chunk in enumerate(chunks):
            if not groups or rows >= wanted or rows + chunk.num_rows > fitting:
                groups.append([])
                rows = 0
            groups[-1].append(number)
            rows += chunk.num_rows
        return groups

    def _write(
        self, encoding: Encoding, groups_of_parts: dict[int, list[tuple[Path, tuple[int, int]]]]
    ) -> list[tuple[FileRecord, ...]]:
        """Write all parts; returns the files of each split."""
        parts = encoding.parts
        self.progress.start_phase("write", sum(parts.rows_of_split))
        tasks = (
            Task(
                f"write-{part}",
                write_rows,
                (
                    groups_of_parts.get(part, []),
                    self.options.seed if split == 0 else None,
                    self.schema,
                    encoding.num_embeddings,
                    self.dataset_folder,
                    name,
                ),
            )
            for part, (split, name) in enumerate(parts.files)
        )
        rows = min(self.options.part_rows, max(parts.rows_of_split))
        at_a_time = (self.memory_bytes - BASE_BYTES) // part_memory_bytes(rows, self.schema)
        files: list[list[FileRecord]] = [[] for _ in SPLIT_NAMES]
        at_a_time = max(1, at_a_time * self.workers.capacity // self.workers.tasks_in_memory)
        for (split, _), result in zip(parts.files, self.workers.run(tasks, self.work, at_a_time), strict=True):
            files[split].append(FileRecord(**result))
            self.progress.advance(result["rows"])
        return [tuple(found) for found in files]


def plan_file(file: LogFile, layout: FeatureSchema, chunk_bytes: int) -> Result:
    """Task: find where a file may be cut."""
    return {"chunks": [[chunk.start, chunk.end] for chunk in file.format.chunks(file, layout, chunk_bytes)]}
