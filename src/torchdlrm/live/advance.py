"""One period of a live model: score the log, learn from it, check, publish.

In: a live model's folder, a log.  Out: the period's `PeriodRecord`, and files:

| step | in | out |
| --- | --- | --- |
| score | log, bundle of the base | `scores.parquet`, progressive metrics |
| preprocess | log, dataset of the base | `dataset/`, whose vocabularies extend the base's |
| learn | dataset, run of the base | `run/` |
| export | run | a bundle, the candidate |
| check | held-back rows, scores, candidate | whether it is good enough |
| publish | candidate | `bundles/000N`, a delta, `current`, `period.json` |

The base is the period that `current` leads to.  A step's outcome appears when it is complete, and then the draft says
so: whatever ends the process, at whatever moment, the same call resumes, and ends with the same bytes.
"""

import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from torchdlrm.bundle.apply import DELTA_NAMES, write_delta
from torchdlrm.bundle.bundle import Bundle
from torchdlrm.bundle.manifest import MANIFEST_NAME, BundleManifest
from torchdlrm.bundle.write import complete_folder
from torchdlrm.config import Config
from torchdlrm.data.dataset import Dataset
from torchdlrm.data.manifest import SparseRecord
from torchdlrm.errors import LiveError
from torchdlrm.evaluation.predictions import SCORES_NAME
from torchdlrm.exporting.export import export
from torchdlrm.exporting.options import ExportOptions
from torchdlrm.features.columns import SparseColumn
from torchdlrm.features.schema import FeatureSchema
from torchdlrm.features.schema_file import with_split
from torchdlrm.files import publish_folder, remove_folder, sync, write_atomically
from torchdlrm.folders import kind_of
from torchdlrm.live.changes import STEPS
from torchdlrm.live.gate import judge, progressive_metrics, read_scores, require_same_rows, score_log
from torchdlrm.live.logs import find_log
from torchdlrm.live.model import CONFIG_NAME, DATASET_NAME, REPLAY_NAME, RUN_NAME, LiveModel
from torchdlrm.live.preview import AdvancePreview, lineage_of, preview_advance
from torchdlrm.live.record import FeatureRecord, PeriodRecord, StepName, StepTime, read_times, write_times
from torchdlrm.live.settings import LiveSettings
from torchdlrm.logs.files import LogFile
from torchdlrm.model.model_class import ModelClass
from torchdlrm.prediction.predictor import Predictor
from torchdlrm.preprocessing.options import PreprocessOptions, Resources
from torchdlrm.preprocessing.preprocess import preprocess, work_folder
from torchdlrm.progress import ProgressListener, watched
from torchdlrm.storage import mirror
from torchdlrm.storage.lease import HeldError
from torchdlrm.storage.places import located
from torchdlrm.training.job import train
from torchdlrm.training.run import Run

_CANDIDATE_NAME, _DELTA_NAME = "bundle", ".delta"
_LEFT_BY: Mapping[StepName | None, tuple[str, ...]] = {
    "preprocess": (DATASET_NAME, work_folder(Path(DATASET_NAME)).name),
    "learn": (RUN_NAME, REPLAY_NAME),
    "export": (_CANDIDATE_NAME,),
}


def advance(
    live: str | Path,
    logs: str | Path | Sequence[str | Path],
    *,
    config: Config | str | Path | None = None,
    schema: FeatureSchema | str | Path | None = None,
    settings: LiveSettings | None = None,
    model_class: ModelClass | None = None,
    allow_changed_model_class: bool = False,
    restart: bool = False,
    resources: Resources | None = None,
    train_by: Callable[..., object] = train,
    has_helpers: bool = False,
    progress: ProgressListener | bool = True,
) -> PeriodRecord:
    """Score a new log with the previous model, learn from it, and publish the new model if it is good enough.

    The first call makes the live model.  What was interrupted, at whatever moment, is resumed by the same call; a log
    that the current model has learnt already changes nothing.

    Args:
        live: folder of the live model, or its URL.
        logs: the file of the period's log, or its files; read again where later periods replay it.
        config: of the runs, as `train` takes it; needed by the first call, and kept in `config.toml`. One that is
            changed later is kept when the period that was learnt with it is complete.
        schema: of the logs, as `preprocess` takes it; needed by the first call, and kept in `schema.toml`.
        settings: what is to be changed in `live.toml`: the fields that are given; the others stay as they are.
        model_class: a model of one's own, as `train` takes it; given in each call.
        allow_changed_model_class: take it though its file has changed since.
        restart: remove a period that is not complete, or whose model was not published, and begin it again.
        resources: of preprocessing; change no byte.
        train_by: called as `train` is; `dlrm advance --nproc-per-node` gives one that starts processes.
        has_helpers: the same call is made on several machines, and the live model is at a URL: one of them does the
            steps, and where it trains, the others call `train_by` with the same arguments.
        progress: receives the phases of all steps, and what of a new config does not suit a live
            model; True and False as for `train`.

    Returns:
        The record of the period: `gate.reasons` say why a model was not `published`.

    Raises:
        LiveError: as `preview_advance`, or another process is changing the live model.
        UserError: a step's input is wrong, as the step's own function says.
        TrainingError: the training failed.
        Interrupted: SIGTERM or Ctrl-C.
    """
    log, model = find_log(logs), LiveModel(located(live))
    own_model: dict[str, Any] = {"model_class": model_class, "allow_changed_model_class": allow_changed_model_class}
    look = partial(preview_advance, model, log, config=config, schema=schema, settings=settings, **own_model)
    look(restart=restart)  # before anything is written
    how = (log.files, resources, train_by, own_model)
    with ExitStack() as held, watched(progress) as listener:
        joined = 0
        while True:
            try:
                held.enter_context(model.locked())
                break
            except (HeldError, LiveError):
                if not has_helpers:
                    raise
            preview = look()
            if preview.done is not None:
                return preview.done
            if "preprocess" in preview.draft.done and "learn" in preview.steps and joined < preview.draft.period:
                joined = preview.draft.period
                _Period(preview, *how, listener, is_helper=True).learn()
            time.sleep(1)
        preview = look(restart=restart)
        for name, text in sorted(preview.files.items(), key=lambda file: file[0] == "live.toml"):
            write_atomically(model.path / name, text)
        for warning in preview.warnings if preview.is_new_config else ():  # once
            listener.note(f"warning: {warning}")
        for note in preview.notes:
            listener.note(note)
        if preview.removed is not None:
            model.remove_period(preview.removed, preview.draft.base)
        record = preview.done
        if record is None:
            record = _Period(preview, *how, listener).run()
        model.tidy()
    return record


@dataclass
class _Period:
    """The steps of a period, of a log that was found as these files."""

    preview: AdvancePreview
    files: Sequence[LogFile]
    resources: Resources | None
    train: Callable[..., object]
    own_model: Mapping[str, Any]  # arguments of everything that reads or trains the model
    progress: ProgressListener
    is_helper: bool = False  # another machine does all steps but the training

    def __post_init__(self) -> None:
        self.live, self.settings, self.config = self.preview.live, self.preview.settings, self.preview.config
        self.draft = self.preview.draft
        self.schema = with_split(self.preview.schema, "random", self.settings.hold_back, 0.0)
        self.day = self.live.day(self.draft.period)
        self.candidate: Bundle | None = None  # as the export has opened it, where this process did it

    def run(self) -> PeriodRecord:
        """Do the steps that are left."""
        for name in _LEFT_BY.get(self.preview.begun_again, ()):
            remove_folder(self.day / name)
        number = mirror.fetch(self.day, [SCORES_NAME]).name
        names = (DATASET_NAME, f"{REPLAY_NAME}/*/{DATASET_NAME}", _CANDIDATE_NAME)
        for pattern in (*(f"days/{number}/{name}" for name in names), f"bundles/{number}*"):
            for folder in self.live.path.glob(pattern):
                if kind_of(folder) is None:  # it reached its bucket in part
                    remove_folder(folder)
        self.live.write_draft(self.draft)
        actions = (self._score, self._preprocess, self.learn, self._export, self._check, self._publish)
        for name in self.preview.steps:
            started_s = time.perf_counter()
            num_bytes = actions[STEPS.index(name)]()
            time_taken = StepTime(seconds=time.perf_counter() - started_s, bytes=num_bytes)
            sync(self.day)  # names too, before the draft says that they are there
            write_times(self.day, {**read_times(self.day), name: time_taken})
            self._note(done=(*self.draft.done, name))
        record = self._record()
        if self.preview.new_config is not None:
            write_atomically(self.live.path / CONFIG_NAME, self.preview.new_config)
        record.write(self.day)
        return record

    def _note(self, **changes: object) -> None:
        self.draft = self.draft.model_copy(update=changes)
        self.live.write_draft(self.draft)

    def _score(self) -> int:
        assert self.draft.base is not None, "the first period has no such step"
        scores = self.day / SCORES_NAME
        predictor = Predictor.open(self.live.bundle(self.draft.base), progress=self.progress, **self.own_model)
        unseen = score_log(
            predictor, self.files, scores, max_bad_rows=self.settings.max_bad_rows, progress=self.progress
        )
        sync(scores)
        mirror.push(scores)
        progressive = progressive_metrics(read_scores(scores, predictor.schema), predictor.schema)
        self._note(progressive=progressive, unseen_fraction=unseen)
        return scores.stat().st_size

    def _preprocess(self) -> int:
        base, settings = self.draft.base, self.settings
        options = replace(
            self._options,
            vocabulary=None if base is None else self.live.day(base) / DATASET_NAME,
            extend_vocabulary=base is not None,
            period=self.draft.period,
            admit_over=self._reach(settings.admit_over),
            expire_after=None if settings.expire_after is None else self._reach(settings.expire_after),
        )
        dataset = self._encode(self.files, self.day / DATASET_NAME, self.schema, options)
        if base is not None:
            require_same_rows(self.day / SCORES_NAME, dataset.with_labels(self.config.train.label_names))
        return _folder_bytes(dataset.path)

    def _reach(self, num_periods: int) -> int:
        """How far back this many periods go, this one included: what the model has not learnt does not count as time.

        Where it has learnt fewer, all of them are within reach, and the number that it lacks of those to come.
        """
        numbers = [record.period for record in lineage_of(self.live.periods, self.draft.base)]
        learnt = [self.draft.period, *numbers][:num_periods]
        return learnt[0] - learnt[-1] + 1 + num_periods - len(learnt)

    @property
    def _options(self) -> PreprocessOptions:
        """What all logs are encoded by, whether their values get ids or not."""
        settings = self.settings
        return PreprocessOptions(
            min_count=settings.min_count,
            max_embeddings=settings.max_embeddings,
            seed=settings.seed,
            max_bad_rows=settings.max_bad_rows,
        )

    def _encode(
        self, files: Sequence[LogFile], out: Path, schema: FeatureSchema, options: PreprocessOptions
    ) -> Dataset:
        while self.is_helper and kind_of(out) is None:
            time.sleep(1)
        if out.exists():  # it appears when it is complete
            shutil.rmtree(work_folder(out), ignore_errors=True)
            return Dataset.open(out)
        out.parent.mkdir(parents=True, exist_ok=True)
        return preprocess(files, out, schema, options, progress=self.progress, resources=self.resources)

    def learn(self) -> int:
        """Train; gives the bytes of the run."""
        base = self.draft.base
        source = None if base is None else self.live.day(base) / RUN_NAME
        dataset = self.day / DATASET_NAME
        for record in self.preview.replayed:
            log = find_log([log.path for log in record.logs])
            if {file.sha256 for file in log.records} != {file.sha256 for file in record.logs}:
                paths = ", ".join(file.path for file in record.logs)
                msg = f"{paths}: not the log of period {record.period} any more; put it back"
                raise LiveError(msg)
            folder = self.day / REPLAY_NAME / self.live.day(record.period).name
            schema = with_split(self.schema, "random", 0.0, 0.0)
            options = replace(self._options, vocabulary=dataset)
            replayed = self._encode(log.files, folder / DATASET_NAME, schema, options)
            self._train_run(replayed.path, folder / RUN_NAME, source)
            source = folder / RUN_NAME
        self._train_run(dataset, self.day / RUN_NAME, source)
        return _folder_bytes(self.day / RUN_NAME)

    def _train_run(self, dataset: Path, run: Path, source: Path | None) -> None:
        config = self.config
        if source is not None:
            # The live model's folder may have moved since.
            Run.open(source).take_place(Dataset.open(source.with_name(DATASET_NAME)))
            changes: dict[str, object] = {"checkpoint": "last"}  # the weights that were exported
            if source.parent.parent.name == REPLAY_NAME:  # once a period
                changes["accumulator_decay"] = 1.0
            config = config.model_copy(update={"warm_start": config.warm_start.model_copy(update=changes)})
        self.train(config, dataset, run, from_run=source, progress=self.progress, **self.own_model)

    def _export(self) -> int:
        out = self.day / _CANDIDATE_NAME
        if not out.exists():
            chosen = self.settings.export
            options = ExportOptions(
                **chosen.model_dump(exclude={"name"}),
                recalibrate_if_better=True,
                checkpoint="last",
                name=chosen.name or self.live.path.resolve().name,
            )
            how = {"options": options, "dataset": self.day / DATASET_NAME, **self.own_model}
            self.candidate = export(self.day / RUN_NAME, out, progress=self.progress, **how).bundle
        return _folder_bytes(out)

    def _check(self) -> int:
        candidate = self.candidate or Bundle.open(self.day / _CANDIDATE_NAME, verify="lazy", **self.own_model)
        scores = None if self.draft.base is None else self.day / SCORES_NAME
        dataset = Dataset.open(self.day / DATASET_NAME).with_labels(self.config.train.label_names)
        self._note(gate=judge(candidate, dataset, scores, self.settings.gate, self.progress))
        return 0

    def _publish(self) -> int:
        period, base = self.draft.period, self.draft.base
        candidate, bundle, delta = self.day / _CANDIDATE_NAME, self.live.bundle(period), self.live.delta(period)
        bundle.parent.mkdir(exist_ok=True)
        if not bundle.exists():
            mirror.move(candidate, bundle, MANIFEST_NAME)
        if candidate.exists():  # an object is moved by a copy
            remove_folder(candidate)
        if base is not None and not delta.exists():
            made = self.day / _DELTA_NAME
            remove_folder(made)
            with complete_folder(made, DELTA_NAMES) as folder:
                write_delta(mirror.fetch(self.live.bundle(base)), mirror.fetch(bundle), folder, self.progress)
            if 2 * _folder_bytes(made) < _folder_bytes(bundle):
                publish_folder(made, delta, DELTA_NAMES[0])
            remove_folder(made)
        sync(bundle.parent)
        assert self.draft.gate is not None, "the check comes before"
        if self.draft.gate.passed:
            self.live.switch(period)
        return _folder_bytes(delta)

    def _record(self) -> PeriodRecord:
        draft, gate = self.draft, self.draft.gate
        assert gate is not None, "the check is a step"
        dataset = Dataset.open(self.day / DATASET_NAME).with_labels(self.config.train.label_names)
        delta_bytes = _folder_bytes(self.live.delta(draft.period))
        splits = dataset.manifest.splits.values()
        recalibration = None
        if asked := self.settings.export.recalibrate:
            found = BundleManifest.read(self.live.bundle(draft.period)).recalibrations
            left_out = f"{asked}: left out, not better by more than chance"
            said = {name.name: left_out for name in dataset.schema.learnt}
            said |= {name: f"{of}: {of.verdict}" for name, of in found.items()}
            recalibration = "; ".join(f"{name}: {how}" if gate.labels else how for name, how in said.items())
        return PeriodRecord(
            format_version=4 if gate.labels else 2 if recalibration is None else 3,
            period=draft.period,
            base=draft.base,
            logs=draft.logs,
            rows=sum(split.rows for split in splits),
            clicks=sum(split.clicks_of(dataset.label_name) for split in splits),
            label=dataset.schema.first_of_several,
            progressive=draft.progressive,
            features={
                column.name: self._feature(column, dataset.manifest.sparse[column.name])
                for column in dataset.schema.sparse
            },
            gate=gate,
            published=gate.passed,
            recalibration=recalibration,
            bundle_bytes=_folder_bytes(self.live.bundle(draft.period)),
            delta_bytes=delta_bytes or None,
        )

    def _feature(self, column: SparseColumn, sparse: SparseRecord) -> FeatureRecord:
        is_owner = column.table is None  # what a vocabulary has is said once
        turnover = sparse.turnover if is_owner else None
        return FeatureRecord(
            num_embeddings=sparse.num_embeddings,
            values_in_use=sparse.num_values if is_owner and sparse.vocabulary is not None else None,
            admitted=0 if turnover is None else turnover.admitted,
            expired=0 if turnover is None else turnover.expired,
            unseen_fraction=self.draft.unseen_fraction.get(column.name),
        )


def _folder_bytes(folder: Path) -> int:
    """Of all files; 0 where the folder is not there."""
    return sum(filter(None, mirror.sizes_of(folder).values()))
