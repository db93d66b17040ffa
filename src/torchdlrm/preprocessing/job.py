"""Runs the phases of a job one after the other, each as a number of tasks.

    read     chunks of the log -> chunk files; bad rows
    count    values of the training rows -> vocabularies -> ids of all values met
    encode   groups of chunks -> their rows, dealt out to the parts
    write    the rows of each part -> its file

Every task's result is in the work folder's journal, and what a task needs of others it takes from there and from
their files: so a job resumes wherever it was interrupted.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torchdlrm.data.dataset import (
    MANIFEST_NAME,
    ROW_GROUP_ROWS,
    BadRowsRecord,
    Dataset,
    ExtendedRecord,
    FileRecord,
    Manifest,
    SourceRecord,
    SparseRecord,
    TurnoverRecord,
    file_record,
    oldest_version,
)
from torchdlrm.data.log.cut import Chunk, plan_chunks
from torchdlrm.data.log.files import LogFile
from torchdlrm.data.log.names import extra_columns, schema_of_file
from torchdlrm.data.log.parquet import plan_row_groups
from torchdlrm.data.splits import SPLIT_NAMES, RowSplit
from torchdlrm.features.bad_rows import BadRows
from torchdlrm.features.columns import SparseColumn
from torchdlrm.features.schema import FeatureSchema
from torchdlrm.features.transforms import TRANSFORMS, DenseTransform, Moments
from torchdlrm.features.vocabulary import CANDIDATE_COLUMNS, MAX_ID, PERIOD_COLUMNS
from torchdlrm.files import sha256_of
from torchdlrm.preprocessing.count import (
    ValueRange,
    add_moments,
    count_values,
    look_up_values,
    rank_values,
    spread_values,
    sum_moments,
)
from torchdlrm.preprocessing.encode import Encoding, Parts, encode_group, write_rows
from torchdlrm.preprocessing.executors import Task, Workers
from torchdlrm.preprocessing.options import BASE_BYTES, PreprocessOptions
from torchdlrm.preprocessing.periods import Known, Period, assign_ids, update_values
from torchdlrm.preprocessing.place import place_chunks
from torchdlrm.preprocessing.quantiles import fit_boundaries
from torchdlrm.preprocessing.read import ChunkFile, ReadTask, read_chunk, unpack
from torchdlrm.preprocessing.sizing import BYTES_A_VALUE, bytes_a_row, part_memory_bytes
from torchdlrm.preprocessing.tally import Tally
from torchdlrm.preprocessing.work_folder import Result, WorkFolder
from torchdlrm.progress import ProgressListener

# A piece of a part that is smaller than this costs more to find than to read.
_MIN_ROWS_A_PIECE = 4096


@dataclass
class Job:
    """A preprocessing job at work in its folder."""

    files: Sequence[LogFile]
    schema: FeatureSchema
    options: PreprocessOptions
    work: WorkFolder
    workers: Workers
    memory_bytes: int
    progress: ProgressListener
    known: Dataset | None
    # Where values come and go.
    period: Period | None = None
    bad_rows: BadRows = field(default_factory=BadRows)
    # The schema with its columns in the order of each file.
    layouts: Sequence[FeatureSchema] = ()

    @property
    def dataset_folder(self) -> Path:
        """The folder in which the dataset grows."""
        return self.work.path / "dataset"

    def run(self) -> Manifest:
        """All phases.

        Raises:
            LogError: the log cannot be read, or has too many bad rows, or too few good ones.
        """
        self.layouts = [schema_of_file(file, self.schema) for file in self.files]
        folders = ("vocabulary", *(() if self.period is None else ("reset", "candidates")), *SPLIT_NAMES)
        for name in folders:
            (self.dataset_folder / name).mkdir(exist_ok=True)
        rows_of_files, read = self._read()
        split, chunks = place_chunks(
            self.files, rows_of_files, [(path, result["rows"]) for path, result in read], self.schema, self.options.seed
        )
        sparse, ids = self._count(split, chunks, [result for _, result in read])
        dense = self._fit_dense(split, chunks)
        rows_of_split = tuple(sum(chunk.rows_of_split[i] for chunk in chunks) for i in range(len(SPLIT_NAMES)))
        parts = Parts(self.options.part_rows, self.options.seed, rows_of_split)  # type: ignore[arg-type]
        num_embeddings = {name: record.num_embeddings for name, record in sparse.items()}
        encoding = Encoding(self.schema, dense, ids, num_embeddings, split, parts)
        tallies, groups_of_parts = self._encode(encoding, chunks)
        files = self._write(encoding, groups_of_parts)
        return Manifest(
            format_version=oldest_version(self.schema, has_period=self.period is not None),
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
            **self._about_period(),
        )

    def _about_period(self) -> dict[str, Any]:
        """What the manifest says where values come and go; of a vocabulary that is not extended, what it said there."""
        if self.period is None:
            return {}
        if self.known is not None and not self.options.extend_vocabulary:
            names = ("period", "expire_after", "admit_over", "extends")
            return {name: getattr(self.known.manifest, name) for name in names}
        extends = None
        if self.known is not None:
            sha256 = sha256_of(self.known.path / MANIFEST_NAME)
            extends = ExtendedRecord(manifest_sha256=sha256, period=self.known.period)
        return {
            "period": self.period.number,
            "expire_after": self.period.expire_after,
            "admit_over": self.period.admit_over,
            "extends": extends,
        }

    # -- read

    def _read(self) -> tuple[list[int], list[tuple[Path, Result]]]:
        """The rows of each file, and for each chunk its file and what reading it gave."""
        total = sum(file.size_bytes * (2 if file.format == "gzip" else 1) for file in self.files)
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
        """The chunks of some files; gzipped ones are unpacked."""
        tasks = []
        for number in numbers:
            file = self.files[number]
            arguments: tuple[Any, ...] = (file, self.schema, self.work.sizing.chunk_bytes)
            if file.format == "gzip":
                tasks.append(Task(f"unpack-{number}", unpack, (*arguments, self.work.path / "text", f"{number:05d}")))
            else:
                tasks.append(Task(f"plan-{number}", plan_file, arguments))
        plans = []
        for number, result in zip(numbers, self.workers.run(tasks, self.work), strict=True):
            if self.files[number].format == "gzip":
                ends = [sum(result["sizes"][: i + 1]) for i in range(len(result["sizes"]))]
                plans.append([Chunk(end - size, end) for end, size in zip(ends, result["sizes"], strict=True)])
                self.progress.advance(self.files[number].size_bytes)
            else:
                plans.append([Chunk(start, end) for start, end in result["chunks"]])
        return plans

    def _read_file(self, number: int, chunks: Sequence[Chunk]) -> list[tuple[Path, Result]]:
        file = self.files[number]
        texts = [self.work.path / "text" / f"{number:05d}-{i:05d}" for i in range(len(chunks))]
        targets = [self.work.path / "chunks" / f"{number:05d}-{i:05d}" for i in range(len(chunks))]

        def tasks() -> Iterator[Task]:
            for i, chunk in enumerate(chunks):
                text = texts[i] if file.format == "gzip" else None
                num_partitions = self.work.sizing.num_partitions
                task = ReadTask(file, chunk, text, self.schema, self.layouts[number], num_partitions, targets[i])
                yield Task(f"read-{number}-{i}", read_chunk, (task,))

        results = []
        num_lines = int(self.schema.header and file.format != "parquet")
        total = chunks[-1].end if chunks else 1
        done_bytes = 0
        for i, result in enumerate(self.workers.run(tasks(), self.work)):
            self.bad_rows.add_chunk(BadRows.from_json(result["bad_rows"]), file.name, num_lines)
            self.bad_rows.check(self.options.max_bad_rows)
            num_lines += result["lines"]
            results.append((targets[i], result))
            texts[i].unlink(missing_ok=True)
            now = file.size_bytes * chunks[i].end // total
            self.progress.advance(now - done_bytes)
            done_bytes = now
        self.progress.advance(file.size_bytes - done_bytes)
        return results

    # -- count

    def _count(
        self, split: RowSplit, chunks: Sequence[ChunkFile], read: Sequence[Result]
    ) -> tuple[dict[str, SparseRecord], dict[str, list[Path]]]:
        """The sparse features as they stand in the manifest, and the files of the ids of their values."""
        num_values = sum(
            result["num_values"][column.name] for result in read for column in self.schema.sparse if column.hash is None
        )
        self.progress.start_phase("count", 2 * num_values, "values")
        self._fit_quantiles(split, chunks, read)
        counted = [column for column in self.schema.sparse if column.hash is None]
        ranges = {column.name: self._ranges(column, read) for column in counted}
        counted_ranges = {name: self._counted_ranges(found) for name, found in ranges.items()}
        counts_anything = self.known is None or self.options.extend_vocabulary
        if self.known is not None:
            tasks = [task for column in counted for task in self._spread_tasks(column, counted_ranges[column.name])]
            list(self.workers.run(tasks, self.work))
        tasks = self._count_tasks(counted, counted_ranges, split, chunks) if counts_anything else []
        for done, _ in enumerate(self.workers.run(tasks, self.work)):
            self.progress.advance(num_values * (done + 1) // len(tasks) - num_values * done // len(tasks))
        if not tasks:
            self.progress.advance(num_values)
        if counts_anything:
            tasks = [self._rank_task(column, counted_ranges[column.name]) for column in counted]
            list(self.workers.run(tasks, self.work))
        tasks = [
            Task(
                f"look-up-{values.name}",
                look_up_values,
                (values, chunks, self._table(values), self.work.path / "ids" / values.name),
            )
            for column in counted
            for values in ranges[column.name]
        ]
        for result in self.workers.run(tasks, self.work):
            self.progress.advance(result["values"])
        ids = {name: [self.work.path / "ids" / values.name for values in found] for name, found in ranges.items()}
        return {column.name: self._sparse_record(column) for column in self.schema.sparse}, ids

    def _ranges(self, column: SparseColumn, read: Sequence[Result]) -> list[ValueRange]:
        """Cut a feature's values so that a range fits the memory of a task."""
        values = sum(result["num_values"][column.name] for result in read)
        value_bytes = sum(result["value_bytes"][column.name] for result in read)
        if self.options.extend_vocabulary and self.known is not None:
            known_rows = sum(file.rows for file in self._known_record(column).files)
            values, value_bytes = values + known_rows, value_bytes + 12 * known_rows
        # Numbers and their counts take 12 bytes; longer values weigh more.
        weight = values + 3 * max(0, value_bytes - 12 * values) // BYTES_A_VALUE
        partitions = self.work.sizing.num_partitions
        count = min(partitions, max(1, -(-weight // self.work.sizing.values_per_task)))
        edges = [i * partitions // count for i in range(count + 1)]
        return [ValueRange(column, i, edges[i], edges[i + 1]) for i in range(count)]

    def _counted_ranges(self, ranges: list[ValueRange]) -> list[ValueRange]:
        """The ranges whose values are counted by themselves; equal buckets of numbers may be in all of them."""
        column = ranges[0].column
        return [ValueRange(column, 0, 0, self.work.sizing.num_partitions)] if column.needs_fit else ranges

    def _fit_quantiles(self, split: RowSplit, chunks: Sequence[ChunkFile], read: Sequence[Result]) -> None:
        """Enter the boundaries of quantiles into the schema, by the training rows or as in the known dataset."""
        boundaries: Mapping[str, Sequence[float]]
        if self.known is None:
            ranges = {column.name: self._ranges(column, read) for column in self.schema.sparse if column.needs_fit}
            boundaries = fit_boundaries(ranges, chunks, split, self.work, self.workers)
        else:
            features = self.known.schema.sparse
            boundaries = {feature.name: feature.buckets.boundaries or () for feature in features if feature.buckets}
        self.schema = self.schema.with_boundaries(boundaries)

    def _table(self, values: ValueRange) -> Path:
        """Value and id of the values of a range; of buckets, which are few, there is one for all ranges."""
        first = replace(values, index=0) if values.column.needs_fit else values
        return self.work.path / "counts" / f"{first.name}-ids"

    def _known_table(self, values: ValueRange, what: str = "known") -> Path:
        """Value and id in the known dataset of a range that it extends; or `what` else there is of it."""
        if not self.options.extend_vocabulary:
            return self._table(values)
        return self.work.path / "counts" / f"{values.name}-{what}"

    def _known_record(self, column: SparseColumn) -> SparseRecord:
        assert self.known is not None, "the options were checked"
        return self.known.manifest.sparse[column.name]

    def _known_file(self, record: FileRecord | None) -> Path:
        assert self.known is not None, "the options were checked"
        assert record is not None, "the known dataset was checked"
        return (self.known.path / record.path).resolve()

    def _spread_tasks(self, column: SparseColumn, ranges: Sequence[ValueRange]) -> Iterator[Task]:
        record, partitions = self._known_record(column), self.work.sizing.num_partitions
        turns_over = self.period is not None and self.options.extend_vocabulary
        columns: Sequence[str] = PERIOD_COLUMNS if turns_over else ("value", "id")
        files = [(record.vocabulary, columns, "ids", "known")]
        if turns_over and record.turnover is not None and record.turnover.candidates is not None:
            files.append((record.turnover.candidates, CANDIDATE_COLUMNS, "counts", "candidates"))
        for file, columns, section, what in files:
            targets = [self._known_table(values, what) for values in ranges]
            arguments = (column, self._known_file(file), columns, section, ranges, targets, partitions)
            yield Task(f"spread-{what}-{column.name}", spread_values, arguments)

    def _count_tasks(
        self,
        counted: Sequence[SparseColumn],
        ranges: dict[str, list[ValueRange]],
        split: RowSplit,
        chunks: Sequence[ChunkFile],
    ) -> list[Task]:
        tasks = []
        for column in counted:
            min_count = self.options.min_count if column.min_count is None else column.min_count
            for values in ranges[column.name]:
                extends = self.options.extend_vocabulary
                known = self._known_table(values) if extends else None
                target = self.work.path / "counts" / values.name
                arguments: tuple[Any, ...] = (values, chunks, split, min_count, known)
                if self.period is not None:
                    turnover = self._known_record(column).turnover if extends else None
                    has_candidates = turnover is not None and turnover.candidates is not None
                    arguments += (self._known_table(values, "candidates") if has_candidates else None, self.period)
                task = count_values if self.period is None else update_values
                tasks.append(Task(f"count-{values.name}", task, (*arguments, target)))
        return tasks

    def _rank_task(self, column: SparseColumn, ranges: Sequence[ValueRange]) -> Task:
        most = self.options.max_embeddings if column.max_embeddings is None else column.max_embeddings
        extends = self.options.extend_vocabulary
        counts = [self.work.path / "counts" / values.name for values in ranges]
        sizes = (MAX_ID if most is None else most - 1, self.work.sizing.values_per_task)
        tables = [self._table(values) for values in ranges]
        if self.period is not None:
            known = self._known_record(column) if extends else None
            before = Known() if known is None else Known(known.num_embeddings, known.num_values)
            arguments: tuple[Any, ...] = (column, counts, before, self.period, *sizes, tables, self.dataset_folder)
            return Task(f"rank-{column.name}", assign_ids, arguments)
        arguments = (
            *(column, counts, *sizes),
            [self._known_table(values) for values in ranges] if extends else None,
            self._known_file(self._known_record(column).vocabulary) if extends else None,
            *(tables, self.dataset_folder / "vocabulary" / f"{column.name}.parquet"),
        )
        return Task(f"rank-{column.name}", rank_values, arguments)

    def _sparse_record(self, column: SparseColumn) -> SparseRecord:
        if column.hash is not None:
            return SparseRecord(num_embeddings=column.hash, vocabulary=None)
        if self.known is not None and not self.options.extend_vocabulary:
            record = self._known_record(column)
            for file in record.files:
                (self.dataset_folder / file.path).write_bytes(self._known_file(file).read_bytes())
            return record
        result = self.work.result(f"rank-{column.name}")
        assert result is not None, "the feature was ranked"

        def record_of(what: str, rows: int) -> FileRecord:
            return file_record(self.dataset_folder, f"{what}/{column.name}.parquet", rows)

        if self.period is None:
            num_ids = result["num_ids"]
            return SparseRecord(num_embeddings=num_ids + 1, vocabulary=record_of("vocabulary", num_ids))
        turnover = TurnoverRecord(
            admitted=result["admitted"],
            expired=result["expired"],
            **{name: record_of(name, result[name]) for name in ("reset", "candidates") if result[name]},
        )
        vocabulary = record_of("vocabulary", result["num_values"])
        return SparseRecord(num_embeddings=result["num_embeddings"], vocabulary=vocabulary, turnover=turnover)

    def _fit_dense(self, split: RowSplit, chunks: Sequence[ChunkFile]) -> dict[str, DenseTransform]:
        """The transform of each dense column with its constants, of the training rows where it needs any."""
        if self.known is not None:
            return {column.name: self.known.manifest.dense[column.name] for column in self.schema.dense}
        transforms = {column.name: TRANSFORMS[column.transform] for column in self.schema.dense}
        moments = {name: Moments() for name, transform in transforms.items() if transform.needs_moments}
        if moments:
            names = list(moments)
            tasks = (Task(f"moments-{i}", sum_moments, (chunk, split, names)) for i, chunk in enumerate(chunks))
            for result in self.workers.run(tasks, self.work):
                add_moments(moments, result)
        return {name: transform.fit(moments.get(name)) for name, transform in transforms.items()}

    # -- encode and write

    def _encode(
        self, encoding: Encoding, chunks: Sequence[ChunkFile]
    ) -> tuple[list[Tally], dict[int, list[tuple[Path, int]]]]:
        """What was counted in each split, and for each part the groups' files with the number of its batch."""
        self.progress.start_phase("encode", sum(chunk.num_rows for chunk in chunks))
        groups = self._groups(encoding, chunks)
        targets = [self.work.path / "groups" / f"{i:05d}" for i in range(len(groups))]
        tasks = (
            Task(f"encode-{i}", encode_group, (encoding, [(n, chunks[n]) for n in group], targets[i]))
            for i, group in enumerate(groups)
        )
        tallies = [Tally() for _ in SPLIT_NAMES]
        groups_of_parts: dict[int, list[tuple[Path, int]]] = {}
        for i, result in enumerate(self.workers.run(tasks, self.work)):
            for total, more in zip(tallies, result["tallies"], strict=True):
                total.add(Tally.from_json(more))
            for batch, part in enumerate(result["parts"]):
                groups_of_parts.setdefault(part, []).append((targets[i], batch))
            for number in groups[i]:
                chunks[number].path.unlink(missing_ok=True)
            self.progress.advance(sum(chunks[number].num_rows for number in groups[i]))
        return tallies, groups_of_parts

    def _groups(self, encoding: Encoding, chunks: Sequence[ChunkFile]) -> list[list[int]]:
        """Numbers of chunks that are encoded together: few groups make large pieces of parts, memory sets a limit."""
        sizing = self.work.sizing
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
        self, encoding: Encoding, groups_of_parts: dict[int, list[tuple[Path, int]]]
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


def plan_file(file: LogFile, schema: FeatureSchema, chunk_bytes: int) -> Result:
    """Task: find where a file may be cut."""
    plan = plan_row_groups if file.format == "parquet" else plan_chunks
    return {"chunks": [[chunk.start, chunk.end] for chunk in plan(file, schema, chunk_bytes)]}
