"""Runs the phase that counts: makes the vocabularies of all features, and gives the values of each chunk their ids.

In: the chunks of a log.  Out: the records of sparse features, and files of ids.  The tasks are those of `count`
and `vocabularies`.
"""

import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torchdlrm.data.manifest import MANIFEST_NAME, ExtendedRecord, FileRecord, SparseRecord, TurnoverRecord
from torchdlrm.data.splits import RowSplit
from torchdlrm.errors import LogError
from torchdlrm.features.columns import SparseColumn
from torchdlrm.features.vocabulary import CANDIDATE_COLUMNS, MAX_ID, PERIOD_COLUMNS, VALUE_COLUMNS
from torchdlrm.files import replacing, sha256_of
from torchdlrm.jobs.work_folder import Result
from torchdlrm.jobs.workers import Task
from torchdlrm.preprocessing.count import ValueRange, look_up_values, spread_values
from torchdlrm.preprocessing.quantiles import fit_boundaries
from torchdlrm.preprocessing.read import ChunkFile
from torchdlrm.preprocessing.sizing import BYTES_A_VALUE
from torchdlrm.preprocessing.vocabularies import assign_ids, count_values
from torchdlrm.storage.mirror import fetch

if TYPE_CHECKING:
    from torchdlrm.preprocessing.job import Job

# A value with its periods, before and after a log, takes this many times the memory of one that is counted.
_WEIGHT_WITH_PERIODS = 4


@dataclass
class VocabularyPhase:
    """The vocabularies of a job; `run` enters the boundaries of quantiles into its schema."""

    job: "Job"

    def run(
        self, split: RowSplit, chunks: Sequence[ChunkFile], read: Sequence[Result]
    ) -> tuple[dict[str, SparseRecord], dict[str, list[Path]]]:
        """The sparse features as they stand in the manifest, and the files of the ids of their values.

        `read` is what reading each of the chunks gave.
        """
        num_values = sum(
            result["num_values"][column.name]
            for result in read
            for column in self.job.schema.sparse
            if column.has_vocabulary
        )
        self.job.progress.start_phase("count", 2 * num_values, "values")
        self._fit_quantiles(split, chunks, read)
        counted = [column for column in self.job.schema.sparse if column.has_vocabulary and column.table is None]
        ranges = {column.name: self._ranges(column, read) for column in counted}
        counted_ranges = {name: self._counted_ranges(found) for name, found in ranges.items()}
        counts_anything = self.job.known is None or self.job.options.extend_vocabulary
        if self.job.known is not None:
            tasks = [task for column in counted for task in self._spread_tasks(column, counted_ranges[column.name])]
            list(self.job.workers.run(tasks, self.job.work))
        tasks = self._count_tasks(counted, counted_ranges, split, chunks) if counts_anything else []
        for done, _ in enumerate(self.job.workers.run(tasks, self.job.work)):
            self.job.progress.advance(num_values * (done + 1) // len(tasks) - num_values * done // len(tasks))
        if not tasks:
            self.job.progress.advance(num_values)
        if counts_anything:
            tasks = [self._assign_task(column, counted_ranges[column.name]) for column in counted]
            list(self.job.workers.run(tasks, self.job.work))
        looked_up = {
            column.name: [replace(values, column=column, sharing=()) for values in ranges[column.owner]]
            for column in self.job.schema.sparse
            if column.has_vocabulary
        }
        tasks = [
            Task(
                f"look-up-{values.name}",
                look_up_values,
                (values, chunks, self._table(values), self.job.work.pieces / "ids" / values.name),
            )
            for found in looked_up.values()
            for values in found
        ]
        for result in self.job.workers.run(tasks, self.job.work):
            self.job.progress.advance(result["values"])
        folder = self.job.work.pieces / "ids"
        ids = {name: [folder / values.name for values in found] for name, found in looked_up.items()}
        return {column.name: self._sparse_record(column, read) for column in self.job.schema.sparse}, ids

    def _ranges(self, column: SparseColumn, read: Sequence[Result]) -> list[ValueRange]:
        """Cut a feature's values so that a range fits the memory of a task."""
        columns = self.job.schema.sharing(column.name)
        values, value_bytes = (
            sum(result[what][each.name] for result in read for each in columns)
            for what in ("num_values", "value_bytes")
        )
        if self.job.options.extend_vocabulary and self.job.known is not None:
            known_rows = sum(file.rows for file in self._known_record(column).files)
            values, value_bytes = values + known_rows, value_bytes + 12 * known_rows
        # Numbers and their counts take 12 bytes; longer values weigh more.
        weight = values + 3 * max(0, value_bytes - 12 * values) // BYTES_A_VALUE
        if self.job.period is not None:
            weight *= _WEIGHT_WITH_PERIODS
        partitions = self.job.sizing.num_partitions
        count = min(partitions, max(1, -(-weight // self.job.sizing.values_per_task)))
        edges = [i * partitions // count for i in range(count + 1)]
        return [ValueRange(column, i, edges[i], edges[i + 1], columns[1:]) for i in range(count)]

    def _counted_ranges(self, ranges: list[ValueRange]) -> list[ValueRange]:
        """The ranges whose values are counted by themselves; equal buckets of numbers may be in all of them."""
        column = ranges[0].column
        return [ValueRange(column, 0, 0, self.job.sizing.num_partitions)] if column.needs_fit else ranges

    def _fit_quantiles(self, split: RowSplit, chunks: Sequence[ChunkFile], read: Sequence[Result]) -> None:
        """Enter the boundaries of quantiles into the schema, by the training rows or as in the known dataset."""
        boundaries: Mapping[str, Sequence[float]]
        if self.job.known is None:
            ranges = {column.name: self._ranges(column, read) for column in self.job.schema.sparse if column.needs_fit}
            boundaries = fit_boundaries(ranges, chunks, split, self.job.work, self.job.workers)
        else:
            features = self.job.known.schema.sparse
            boundaries = {feature.name: feature.buckets.boundaries or () for feature in features if feature.buckets}
        self.job.schema = self.job.schema.with_boundaries(boundaries)

    def _table(self, values: ValueRange) -> Path:
        """Value and id of the values of a range; of buckets, which are few, there is one for all ranges."""
        index = 0 if values.column.needs_fit else values.index
        return self.job.work.pieces / "counts" / f"{values.column.owner}-{index:03d}-ids"

    def _known_table(self, values: ValueRange, what: str = "known") -> Path:
        """Value and id in the known dataset of a range that it extends; or `what` else there is of it."""
        if not self.job.options.extend_vocabulary:
            return self._table(values)
        return self.job.work.pieces / "counts" / f"{values.name}-{what}"

    def _known_record(self, column: SparseColumn) -> SparseRecord:
        assert self.job.known is not None, "the options were checked"
        return self.job.known.manifest.sparse[column.name]

    def _known_file(self, record: FileRecord | None) -> Path:
        assert self.job.known is not None, "the options were checked"
        assert record is not None, "the known dataset was checked"
        return self.job.known.file(record).resolve()

    def _spread_tasks(self, column: SparseColumn, ranges: Sequence[ValueRange]) -> Iterator[Task]:
        record, partitions = self._known_record(column), self.job.sizing.num_partitions
        turns_over = self.job.period is not None and self.job.options.extend_vocabulary
        columns = PERIOD_COLUMNS if turns_over else VALUE_COLUMNS
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
            min_count = self.job.options.min_count if column.min_count is None else column.min_count
            turnover = self._known_record(column).turnover if self.job.options.extend_vocabulary else None
            has_candidates = turnover is not None and turnover.candidates is not None
            for values in ranges[column.name]:
                known = self._known_table(values) if self.job.options.extend_vocabulary else None
                candidates = self._known_table(values, "candidates") if has_candidates else None
                target = self.job.work.pieces / "counts" / values.name
                arguments = (values, chunks, split, min_count, known, candidates, self.job.period, target)
                tasks.append(Task(f"count-{values.name}", count_values, arguments))
        return tasks

    def _assign_task(self, column: SparseColumn, ranges: Sequence[ValueRange]) -> Task:
        most = self.job.options.max_embeddings if column.max_embeddings is None else column.max_embeddings
        known_rows, num_known = 1, 0
        if self.job.options.extend_vocabulary:
            record = self._known_record(column)
            known_rows, num_known = record.num_embeddings, record.num_values
        arguments = (
            column,
            [self.job.work.pieces / "counts" / values.name for values in ranges],
            known_rows,
            num_known,
            self.job.period,
            MAX_ID if most is None else most - 1,
            -(-self.job.sizing.values_per_task // (1 if self.job.period is None else _WEIGHT_WITH_PERIODS)),
            [self._table(values) for values in ranges],
            self.job.dataset_folder,
        )
        return Task(f"assign-{column.name}", assign_ids, arguments)

    def _sparse_record(self, column: SparseColumn, read: Sequence[Result]) -> SparseRecord:
        if not column.has_vocabulary:
            return SparseRecord(num_embeddings=column.hash or self._table_of_ids(column, read), vocabulary=None)
        if self.job.known is not None and not self.job.options.extend_vocabulary:
            record = self._known_record(column)
            for file in record.files if column.table is None else ():
                with replacing(self.job.dataset_folder / file.path) as copy:
                    shutil.copyfile(fetch(self._known_file(file)), copy)
            return record
        result = self.job.work.result(f"assign-{column.owner}")
        assert result is not None, "its values have ids"
        records = {what: FileRecord(**record) for what, record in result["records"].items()}
        vocabulary, turnover = records.pop("vocabulary"), None
        if self.job.period is not None:
            turnover = TurnoverRecord(admitted=result["admitted"], expired=result["expired"], **records)
        return SparseRecord(num_embeddings=result["num_embeddings"], vocabulary=vocabulary, turnover=turnover)

    def _table_of_ids(self, column: SparseColumn, read: Sequence[Result]) -> int:
        """The rows of the table of a feature whose values are ids."""
        names = [each.name for each in self.job.schema.sharing(column.owner)]
        largest = max((result["largest_ids"][name] for result in read for name in names), default=0)
        rows = column.num_embeddings or largest + 1
        if self.job.known is None:
            return rows
        known_rows = self._known_record(column).num_embeddings
        if rows > known_rows and not self.job.options.extend_vocabulary:
            raise LogError(
                f"column {column.name}: has ids for {rows:,} rows, and in {self.job.known.path} its table has "
                f"{known_rows:,}; give `extend_vocabulary`, with which tables grow"
            )
        return max(rows, known_rows)

    def about_period(self) -> dict[str, Any]:
        """What the manifest says where values come and go; of a vocabulary that is not extended, what it said there."""
        if self.job.period is None:
            return {}
        if self.job.known is not None and not self.job.options.extend_vocabulary:
            names = ("period", "expire_after", "admit_over", "extends")
            return {name: getattr(self.job.known.manifest, name) for name in names}
        extends = None
        if self.job.known is not None:
            sha256 = sha256_of(self.job.known.path / MANIFEST_NAME)
            extends = ExtendedRecord(manifest_sha256=sha256, period=self.job.known.period)
        return {
            "period": self.job.period.number,
            "expire_after": self.job.period.expire_after,
            "admit_over": self.job.period.admit_over,
            "extends": extends,
        }
