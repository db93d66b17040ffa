"""Looks ahead: which period a log will be, from which base, and which steps are left; refuses what would be refused.

In: a live model's folder (which need not be there), a log, settings.  Out: an `AdvancePreview`.  Writes nothing.
"""

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from torchdlrm.config import Config, config_toml
from torchdlrm.errors import LiveError
from torchdlrm.features.schema import FeatureSchema
from torchdlrm.live.changes import (
    STEPS,
    begun_again,
    choose_config,
    choose_schema,
    require_class,
    require_fit,
    require_labels,
)
from torchdlrm.live.logs import PeriodLog, find_log, is_same, learnt_already, require_readable
from torchdlrm.live.model import CONFIG_NAME, DATASET_NAME, RUN_NAME, SETTINGS_NAME, Draft, LiveModel
from torchdlrm.live.record import LogRecord, PeriodRecord, StepName
from torchdlrm.live.settings import LiveSettings, changed_settings, settings_toml
from torchdlrm.model.model_class import ModelClass, architecture_of
from torchdlrm.preprocessing.preprocess import work_folder
from torchdlrm.storage.places import located
from torchdlrm.storage.reading import identity_of
from torchdlrm.training.trackers import check_trackers


@dataclass(frozen=True)
class AdvancePreview:
    """What `advance` will do.

    Attributes:
        live: the live model.
        files: its own files that are written first, by name: settings; of a new one schema and config too.
        settings: of the live model.
        config: of the runs.
        schema: of the logs.
        draft: the period, and how far it is.
        replayed: periods whose logs are learnt from again, oldest first.
        removed: an unfinished or unpublished period that is removed first.
        done: the record of the period where it is complete already, and nothing is left to do.
        new_config: what `config.toml` will be when the period is complete; None: what it is.
        begun_again: the step that is not complete, and of which nothing can be used, since what it reads was changed.
        notes: what else a user has to know, as sentences.
    """

    live: LiveModel
    files: dict[str, str]
    settings: LiveSettings
    config: Config
    schema: FeatureSchema
    draft: Draft
    replayed: tuple[PeriodRecord, ...] = ()
    removed: int | None = None
    done: PeriodRecord | None = None
    new_config: str | None = None
    begun_again: StepName | None = None
    notes: tuple[str, ...] = ()

    @property
    def steps(self) -> tuple[StepName, ...]:
        """What is left to do."""
        wanted = STEPS if self.draft.base is not None else STEPS[1:]  # no previous model, no scores
        return tuple(step for step in wanted if step not in self.draft.done)

    @property
    def is_new_config(self) -> bool:
        """Whether the config is another than so far."""
        return self.new_config is not None or CONFIG_NAME in self.files

    @property
    def warnings(self) -> tuple[str, ...]:
        """What of the config suits a single run, but costs AUC in a live model, as sentences."""
        schedule, found = self.config.schedule, []
        if schedule.warmup_steps:
            found.append(
                f"schedule.warmup_steps is {schedule.warmup_steps}: the rate rises from 0 again in every period, which "
                "costs AUC; set it to 0"
            )
        if schedule.kind == "plateau" or (schedule.kind != "constant" and schedule.decay_steps != 0):
            key = "decay_steps" if schedule.name is None else "name"
            found.append(
                f"schedule.{key} is {getattr(schedule, key)}: the rate falls again in every period, which costs AUC; "
                "leave out schedule.name, decay_start_step and decay_steps, so that it is constant"
            )
        return tuple(found)


def preview_advance(
    live: str | Path | LiveModel,
    logs: str | Path | Sequence[str | Path] | PeriodLog,
    *,
    config: Config | str | Path | None = None,
    schema: FeatureSchema | str | Path | None = None,
    settings: LiveSettings | None = None,
    model_class: ModelClass | None = None,
    allow_changed_model_class: bool = False,
    restart: bool = False,
) -> AdvancePreview:
    """Look ahead; the arguments are those of `advance`, or a live model, and a log that was found.

    Raises:
        LiveError: the folder holds something else, `current` is broken, another period has been begun, what is to be
            learnt from is no longer there, or config, schema or model class are missing or do not fit what was learnt.
        ConfigError: the config is wrong, or the model class cannot be loaded.
        SchemaError: the schema is wrong.
        LogError: a file of the log is missing or empty, or its beginning is not what the schema says.
    """
    log = logs if isinstance(logs, PeriodLog) else find_log(logs)
    model = (live if isinstance(live, LiveModel) else LiveModel(located(live))).fetch()
    model.require_ours()
    missing = [name for name, given in (("config", config), ("schema", schema)) if given is None]
    if missing and not model.exists:
        needed = " and ".join(f"`{name}`" for name in missing)
        raise LiveError(f"`live`: there is no live model in {model.path} yet, and the first period needs {needed}")
    files: dict[str, str] = {}
    columns = choose_schema(model, schema, files)
    of_runs, text = choose_config(model, config)
    chosen = changed_settings(model.path / SETTINGS_NAME, settings or LiveSettings())
    before = model.settings
    if not model.exists or chosen != before:
        files[SETTINGS_NAME] = settings_toml(chosen)
    periods = model.periods
    draft, removed, done = _next_period(model, periods, log.records, restart=restart)
    require_fit(model, draft.base if done is None else draft.period, of_runs, config)
    if done is not None:
        unused = [name for name in LiveSettings.model_fields if getattr(chosen, name) != getattr(before, name)]
        unused += [] if text is None else ["config"]
        note = f"{', '.join(unused)}: not kept, since nothing is learnt with it; give it with the next log"
        return AdvancePreview(model, {}, before, of_runs, columns, draft, done=done, notes=(note,) if unused else ())
    if "preprocess" not in draft.done:
        require_readable(log, columns, chosen.max_bad_rows)
    check_trackers(of_runs.logging.trackers)
    _require_base(model, draft)
    require_labels(model, draft.base, of_runs.train.label_names or (columns.labels[0].name,))
    architecture = architecture_of(of_runs.model, model_class, may_have_changed=allow_changed_model_class)
    require_class(model, draft, of_runs, architecture)
    step = begun_again(model, draft, log.records, chosen, of_runs, architecture)
    draft = draft.model_copy(update={"logs": log.records, "settings": chosen, "config": config_toml(of_runs)})
    if text is not None and not periods:
        files[CONFIG_NAME], text = text, None
    return AdvancePreview(
        live=model,
        files=files,
        settings=chosen,
        config=of_runs,
        schema=columns,
        draft=draft,
        replayed=() if "learn" in draft.done else _replayed(periods, draft.base, chosen),
        removed=removed,
        new_config=text,
        begun_again=step,
        notes=() if removed is None or restart else (f"period {removed} is begun again: its log was not learnt",),
    )


def _next_period(
    model: LiveModel, periods: Sequence[PeriodRecord], logs: tuple[LogRecord, ...], *, restart: bool
) -> tuple[Draft, int | None, PeriodRecord | None]:
    """The period that a log will be, one that is removed before, and its record where it is complete already."""
    newest, base = periods[-1] if periods else None, model.current
    draft = _draft_of(model, base, logs, restart=restart)
    if base is not None and base != (draft and draft.period) and base not in {record.period for record in periods}:
        msg = f"{model.day(base)}: has no record of the period that is current; put it back, or roll back to another"
        raise LiveError(msg)
    if draft is not None and base == draft.period:  # it was published, but for its record
        base = draft.base
    done = learnt_already(logs, lineage_of(periods, base))
    is_refused = newest is not None and not (draft or restart or newest.published) and newest.base == base
    if newest is not None and is_refused and is_same(newest.logs, logs):
        done = newest
    if done is not None:
        return Draft(period=done.period, base=done.base, logs=logs, done=STEPS), None, done
    if draft is not None:
        is_other = draft.base != base or not is_same(draft.logs, logs)
        # Of a log that was refused only the scores are lost; of one whose preprocessing was killed, more.
        is_lost = {*draft.done} - {"score"} or work_folder(model.day(draft.period) / DATASET_NAME).exists()
        if restart or (is_other and not is_lost):
            return Draft(period=draft.period, base=base, logs=logs), draft.period, None
        if not is_same(draft.logs, logs):
            names = ", ".join(log.path for log in draft.logs)
            raise LiveError(
                f"`logs`: period {draft.period} was begun with another log and is not complete: give that one again, "
                f"{names}, or `restart` to remove what was done and begin the period with the new one"
            )
        if draft.base != base:
            raise LiveError(
                f"`live`: period {draft.period} was begun from period {draft.base}, and the current one is {base} now; "
                "give `restart` to begin it again from that"
            )
        return draft, None, None
    period = 1 if newest is None else newest.period + 1
    if newest is not None and restart and is_same(newest.logs, logs) and not newest.published:
        period = newest.period
    left_over = period if model.day(period).exists() else None  # of this period, or of one that nothing is known of
    return Draft(period=period, base=base, logs=logs), left_over, None


def _draft_of(model: LiveModel, base: int | None, logs: tuple[LogRecord, ...], *, restart: bool) -> Draft | None:
    """The unfinished period; where it is damaged, and begun again, what has to be known of it for that."""
    try:
        return model.draft
    except LiveError:
        period = model.unfinished
        if not restart or period is None:
            raise
        if period == base:
            msg = f"`live`: period {period} is current, and damaged; roll back to the one before it first"
            raise LiveError(msg) from None
        return Draft(period=period, base=base, logs=logs)


def _require_base(model: LiveModel, draft: Draft) -> None:
    if draft.base is None or "learn" in draft.done:
        return
    for name in (RUN_NAME, DATASET_NAME):
        path = model.day(draft.base) / name
        if not path.is_dir():
            kept = [record.period for record in model.periods if (model.day(record.period) / name).is_dir()]
            raise LiveError(
                f"{path}: is not there any more, and the next period is learnt from it (keep_runs says how many are "
                f"kept); roll back to one of {', '.join(map(str, kept)) or 'none'}, or put it back"
            )


def _replayed(periods: Sequence[PeriodRecord], base: int | None, settings: LiveSettings) -> tuple[PeriodRecord, ...]:
    """The periods whose logs are learnt from again before the new one, oldest first."""
    found = lineage_of(periods, base)[: settings.replay_periods - 1][::-1]
    for record in found:
        for log in record.logs:
            with suppress(FileNotFoundError):
                if identity_of(located(log.path)).size_bytes == log.size_bytes:
                    continue
            raise LiveError(
                f"{log.path}: is not the log of period {record.period} any more, which replay_periods = "
                f"{settings.replay_periods} learns from again; put it back, or make replay_periods smaller"
            )
    return tuple(found)


def lineage_of(periods: Sequence[PeriodRecord], base: int | None) -> list[PeriodRecord]:
    """The periods that a model has learnt, one after the other, newest first."""
    known = {record.period: record for record in periods}
    found: list[PeriodRecord] = []
    while base in known:
        found.append(known[base])
        base = known[base].base
    return found
