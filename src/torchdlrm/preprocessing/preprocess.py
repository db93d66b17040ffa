"""Turns a raw log into a dataset.

In: log files, a schema, thresholds, a seed.  Out: a `Dataset`, written atomically.  Memory is bounded, every task that
is done is kept, and the bytes depend on neither; `torchdlrm.preprocessing.job` has the phases.
"""

import errno
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from torchdlrm import __version__
from torchdlrm.data.dataset import Dataset
from torchdlrm.data.manifest import MANIFEST_NAME, Manifest
from torchdlrm.errors import ConfigError, DatasetError, LogError, differences
from torchdlrm.features.columns import SparseColumn
from torchdlrm.features.schema import FeatureSchema
from torchdlrm.features.schema_file import load_schema
from torchdlrm.files import publish_folder, sha256_of
from torchdlrm.jobs.work_folder import WorkFolder, holds_job, pieces_of, remove_work, work_folder
from torchdlrm.jobs.workers import start_workers
from torchdlrm.logs.files import LogFile
from torchdlrm.logs.find import find_files
from torchdlrm.preprocessing.job import Job
from torchdlrm.preprocessing.options import PART_ROWS, PreprocessOptions, Resources
from torchdlrm.preprocessing.sizing import JobSizing, check_disk, choose_sizing, part_rows, tasks_that_fit
from torchdlrm.preprocessing.vocabularies import Period
from torchdlrm.progress import ProgressListener, watched
from torchdlrm.storage import mirror
from torchdlrm.storage.places import located, shown
from torchdlrm.storage.reading import identity_of

__all__ = ["PART_ROWS", "PreprocessOptions", "Resources", "preprocess", "work_folder"]

# What is read within a minute is not kept when the log turns out to be wrong: a corrected schema starts again at once.
_KEPT_LOG_BYTES = 1 << 30
# Of what tasks leave for later ones: a job that was begun by tasks of another version is not resumed.
WORK_VERSION = 3
FOLDERS = ("text", "chunks", "counts", "ids", "groups", "dataset")


def preprocess(
    logs: str | Path | Sequence[str | Path | LogFile],
    out: str | Path,
    schema: FeatureSchema | str | Path = "criteo",
    options: PreprocessOptions | None = None,
    progress: ProgressListener | bool | None = True,  # noqa: FBT001, FBT002 - it has always had this place
    chunk_bytes: int | None = None,
    *,
    resources: Resources | None = None,
    restart: bool = False,
    overwrite: bool = False,
) -> Dataset:
    """Turn a raw log into a dataset in the folder `out`.

    A job that was interrupted, at whatever moment, is resumed when it is started again with the same arguments. Where
    the dataset of this log, schema and options is complete, nothing is left to do.

    Args:
        logs: the file of the log, or its files; a `LogFile` must still be as it was found.
        out: the folder to make; until it is complete, its content grows in `work_folder(out)`. Of a dataset that is
            there, names and sizes of the log's files are compared, and that none was written to since.
        schema: the log's columns, or what `load_schema` makes them of.
        options: thresholds and seed.
        progress: receives the phases. True draws a bar on a terminal, and writes lines in a notebook; False is silent.
        chunk_bytes: text that is read at a time, by default chosen by the memory; changes no byte of the dataset.
        resources: memory and workers; change no byte of the dataset.
        restart: forget what an interrupted job has done.
        overwrite: preprocess also where a dataset is there; it is replaced when the new one is complete.

    Raises:
        LogError: a file of the log is missing, damaged or empty, or has more bad rows than allowed.
        DatasetError: `out` is of something else or cannot be written, or an interrupted job had other settings.
        ConfigError: the memory is too little, or the period is not after that of the vocabulary.
    """
    options, resources = options or PreprocessOptions(), resources or Resources()
    out = located(out)
    schema = schema if isinstance(schema, FeatureSchema) else load_schema(schema)
    options = replace(options, part_rows=part_rows(schema, options.part_rows))
    given = [logs] if isinstance(logs, str | Path) else logs
    paths = [log if isinstance(log, LogFile) else located(log) for log in given]
    files = tuple(replace(file, path=file.path.resolve()) for file in find_files(paths))
    layouts = [file.format.layout(file, schema, options.max_bad_rows) for file in files]
    known = None if options.vocabulary is None else _open_known(options.vocabulary, schema)
    period = _period(options, known)
    settings = _settings(files, schema, options, known, period)
    partial = work_folder(out)
    mirror.settle(out, MANIFEST_NAME)
    is_done = holds_job(partial, settings) and not (pieces_of(partial) / "dataset").exists()
    overwrite &= not is_done
    if out.exists() and (done := _found(out, files, schema, options, settings, overwrite=overwrite)) is not None:
        if holds_job(partial, settings):  # it was killed before it had tidied up
            remove_work(partial)
        return done
    try:
        with watched(progress) as listener, start_workers(resources.num_workers, resources.cluster) as workers:
            known_rows = 0 if known is None or not options.extend_vocabulary else _longest_vocabulary(known)
            sizing = choose_sizing(files, schema, options, resources.memory_bytes, workers.tasks_in_memory, known_rows)
            if chunk_bytes is not None:
                sizing = replace(sizing, chunk_bytes=chunk_bytes)
            is_shared = workers.cluster is not None
            work = WorkFolder.open(partial, settings, asdict(sizing), FOLDERS, is_shared=is_shared, restart=restart)
            sizing = JobSizing(**work.layout)
            try:
                workers.require_to_see([work.pieces, *(file.path for file in files), *([known.path] if known else [])])
                if work.pieces == partial:
                    check_disk(files, partial)
                fitting = tasks_that_fit(sizing, resources.memory_bytes)
                if fitting < workers.tasks_in_memory:
                    workers.tasks_at_a_time = max(1, workers.capacity * fitting // workers.tasks_in_memory)
                memory_bytes = resources.memory_bytes
                job = Job(files, layouts, schema, options, work, sizing, workers, memory_bytes, listener, known, period)
                _finish(job.run(), job.dataset_folder, out, overwrite=overwrite)
                workers.forget(work)
            except LogError:
                if work.is_fresh or sum(file.size_bytes for file in files) < _KEPT_LOG_BYTES:
                    remove_work(partial)
                raise
            finally:
                work.close()
    except OSError as error:
        raise DatasetError(_cannot_write(out, error)) from error
    remove_work(partial)
    return Dataset.open(out)


def _finish(manifest: Manifest, folder: Path, out: Path, *, overwrite: bool) -> None:
    """Write the manifest, and give the dataset its name."""
    named = {record.path for record in manifest.files}
    for path in folder.rglob("*"):
        # Left behind by tasks that were killed while they wrote.
        if path.is_file() and path.relative_to(folder).as_posix() not in named:
            path.unlink()
    (folder / MANIFEST_NAME).write_text(manifest.to_json(), encoding="utf-8")
    publish_folder(folder, out, MANIFEST_NAME, overwrite=overwrite)


def _found(
    out: Path,
    files: Sequence[LogFile],
    schema: FeatureSchema,
    options: PreprocessOptions,
    settings: Mapping[str, Any],
    *,
    overwrite: bool,
) -> Dataset | None:
    """The dataset that is there, if it is what would be made; None where it is to be replaced.

    Raises:
        DatasetError: it is neither, or something else is there.
    """
    if out.is_symlink() or not (out / MANIFEST_NAME).is_file():
        raise DatasetError(f"{out}: exists and is no dataset; choose another `out`, or remove it first")
    if overwrite:
        return None
    dataset = Dataset.open(out)
    manifest = dataset.manifest
    known, extended = manifest.vocabulary_of, manifest.extends
    made: dict[str, Any] = {name: getattr(manifest, name) for name in settings if hasattr(manifest, name)} | {
        "schema": _as_asked(manifest.feature_schema),
        "log": [(source.name, source.size_bytes) for source in manifest.source],
        "vocabulary": known.manifest_sha256 if known else extended.manifest_sha256 if extended else None,
        "extend_vocabulary": known.extended if known else extended is not None,
    }
    asked = {"schema": _as_asked(schema), "log": [(file.name, file.size_bytes) for file in files]}
    differing = differences(made, {name: asked.get(name, settings[name]) for name in made})
    made_ns = identity_of(out / MANIFEST_NAME).modified_ns
    differing += [f"  log: {file.path} was written to since" for file in files if file.identity.modified_ns > made_ns]
    if manifest.bad_rows.total > options.max_bad_rows:
        differing.append(f"  max_bad_rows: {manifest.bad_rows.total:,} were skipped, {options.max_bad_rows:,} may be")
    if differing:
        lines = [f"{out}: exists, and is of another log, schema or options:", *differing]
        raise DatasetError("\n".join([*lines, "Choose another `out`, or give `overwrite` to replace it."]))
    return dataset


def _as_asked(schema: FeatureSchema) -> str:
    """The schema as one gives it: a dataset has the boundaries of its quantiles."""
    content = schema.model_dump(mode="json", by_alias=True, exclude_none=True)
    for column in content["columns"]:
        if isinstance(column.get("buckets"), dict):
            column["buckets"] = column["buckets"]["quantiles"]
    return json.dumps(content)


def _settings(
    files: Sequence[LogFile],
    schema: FeatureSchema,
    options: PreprocessOptions,
    known: Dataset | None,
    period: Period | None,
) -> dict[str, Any]:
    """All that the bytes of the dataset depend on, by the names that a user knows."""
    return {
        "torchdlrm": __version__,
        "work_folder": WORK_VERSION,
        "log": [[shown(file.path), file.size_bytes, file.identity.etag or file.identity.modified_ns] for file in files],
        "schema": schema.model_dump(mode="json", by_alias=True, exclude_none=True),
        **{name: value for name, value in vars(options).items() if name != "max_bad_rows"},
        "vocabulary": None if known is None else sha256_of(known.path / MANIFEST_NAME),
        "period": None if period is None else period.number,
    }


def _period(options: PreprocessOptions, known: Dataset | None) -> Period | None:
    """The period of the log, where values come and go, by the options or the dataset whose vocabularies are used.

    Raises:
        ConfigError: it is not after that of the dataset.
    """
    before = None if known is None else known.period
    if known is not None and not options.extend_vocabulary:
        return None if before is None else Period(before, None, 1)
    number = options.period
    if number is None and (before is not None or options.expire_after is not None or options.admit_over > 1):
        number = 1 if before is None else before + 1
    if number is None:
        return None
    if before is not None and number <= before:
        raise ConfigError(
            f"`period`: {number} is not after {before}, the period of `vocabulary`; give all logs of a period together"
        )
    return Period(number, options.expire_after, options.admit_over)


def _longest_vocabulary(known: Dataset) -> int:
    """The most rows that a feature's vocabulary has, with what is too rare so far."""
    return max((sum(file.rows for file in record.files) for record in known.manifest.sparse.values()), default=0)


def _open_known(path: Path, schema: FeatureSchema) -> Dataset:
    """The dataset whose vocabularies are used.

    Raises:
        DatasetError: it is not complete, or its columns are others.
    """
    known = Dataset.open(located(path))
    problems = []
    for column in schema.sparse:
        theirs = next((other for other in known.schema.sparse if other.name == column.name), None)
        if theirs is None:
            problems.append(f"  it has no sparse column {column.name}")
        elif _numbering(theirs) != _numbering(column):
            there, here = _described(theirs), _described(column)
            problems.append(f"  column {column.name}: there {there}; here {here}")
        elif column.has_vocabulary and known.manifest.sparse[column.name].vocabulary is None:
            problems.append(f"  column {column.name} came as ids, without a vocabulary")
    problems += [
        f"  dense column {column.name}: there {getattr(known.manifest.dense.get(column.name), 'transform', 'none')}, "
        f"here {column.transform}"
        for column in schema.dense
        if column.name not in known.manifest.dense or known.manifest.dense[column.name].transform != column.transform
    ]
    if problems:
        lines = [f"`vocabulary`: {path} has other columns than the schema {schema.name!r}:", *problems]
        raise DatasetError("\n".join([*lines, "Give the schema that it was made with, or another dataset."]))
    return known


def _numbering(column: SparseColumn) -> tuple[object, ...]:
    """What the values that get ids are, whether by a hash, and whose ids they are."""
    return column.kind, column.hash, column.table, None if column.buckets is None else column.buckets.asked


def _described(column: SparseColumn) -> str:
    buckets = "" if column.buckets is None else f", buckets {column.buckets}"
    table = "" if column.table is None else f", table {column.table}"
    return f"kind {column.kind}, hash {column.hash}{table}{buckets}"


def _cannot_write(out: Path, error: OSError) -> str:
    if error.errno == errno.ENOSPC or "No space left" in str(error):
        return (
            f"{out}: the disk is full; make room and give the same command again: it resumes with what is kept in "
            f"{work_folder(out)}"
        )
    return f"{out}: cannot be written: {error.strerror or error}"
