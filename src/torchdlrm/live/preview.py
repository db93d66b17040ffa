"""Looks ahead: which period a log will be, from which base, and which steps are left; refuses what would be refused.

In: a live model's folder (which need not be there), a log, settings.  Out: an `AdvancePreview`.  Writes nothing.
"""

import tomllib
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

from pydantic import ValidationError

from torchdlrm.bundle.manifest import BundleManifest
from torchdlrm.config import Config, config_toml, find_config, load_config, setting_values
from torchdlrm.errors import LiveError
from torchdlrm.features.schema import PRESETS, FeatureSchema
from torchdlrm.features.schema_file import load_schema, schema_toml
from torchdlrm.live.logs import PeriodLog, find_log, is_same, learnt_already, require_readable
from torchdlrm.live.model import (
    CONFIG_NAME,
    DATASET_NAME,
    RUN_NAME,
    SCHEMA_NAME,
    SETTINGS_NAME,
    Draft,
    LiveModel,
)
from torchdlrm.live.record import LogRecord, PeriodRecord, StepName
from torchdlrm.live.settings import LiveSettings, changed_settings, settings_toml
from torchdlrm.toml import is_preset
from torchdlrm.training.run import Run
from torchdlrm.training.source_run import unfit_settings
from torchdlrm.units import show_bytes

STEPS: tuple[StepName, ...] = get_args(StepName)
# The last step that reads each setting, and `config`; what is kept afterwards may change whenever.
READ_BY: Mapping[str, StepName] = {
    **dict.fromkeys(("hold_back", "min_count", "admit_over", "expire_after"), "preprocess"),
    **dict.fromkeys(("max_embeddings", "max_bad_rows", "seed"), "preprocess"),
    **dict.fromkeys(("replay_periods", "config"), "learn"),
    "export": "export",
    "gate": "check",
}


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
        unused: what was given and is not kept, where nothing is left to do.
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
    unused: tuple[str, ...] = ()

    @property
    def steps(self) -> tuple[StepName, ...]:
        """What is left to do."""
        wanted = STEPS if self.draft.base is not None else STEPS[1:]  # no model of before, no scores
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

    @property
    def notes(self) -> tuple[str, ...]:
        """What of the arguments has no effect, as sentences."""
        if not self.unused:
            return ()
        return (f"{', '.join(self.unused)}: not kept, since nothing is learnt with it; give it with the next log",)

    def lines(self) -> list[str]:
        """The period, its log and its steps in words."""
        draft = self.draft
        base = "from nothing" if draft.base is None else f"from the model of period {draft.base}"
        size_bytes = sum(log.size_bytes for log in draft.logs)
        lines = [f"period {draft.period}, learnt {base}; its log: {len(draft.logs)} file(s), {show_bytes(size_bytes)}"]
        if self.removed is not None:
            lines.append(f"period {self.removed} is begun again: what was done of it is removed")
        if self.done is not None:
            return [*lines, "it is complete: nothing is left to do", *self.notes]
        if self.begun_again is not None:
            lines.append(f"{self.begun_again} is begun again: what it reads was changed")
        if self.replayed:
            lines.append(f"before it the logs of period {', '.join(str(old.period) for old in self.replayed)} again")
        done = f"; done: {', '.join(draft.done)}" if draft.done else ""
        return [*lines, f"steps: {', '.join(self.steps)}{done}"]


def preview_advance(
    live: str | Path,
    logs: str | Path | Sequence[str | Path],
    *,
    config: Config | str | Path | None = None,
    schema: FeatureSchema | str | Path | None = None,
    settings: LiveSettings | None = None,
    restart: bool = False,
) -> AdvancePreview:
    """Look ahead; the arguments are those of `advance`.

    Raises:
        LiveError: the folder holds something else, `current` is broken, another period has been begun, what is to be
            learnt from is no longer there, or config or schema are missing or do not fit what was learnt.
        ConfigError: the config is wrong.
        SchemaError: the schema is wrong.
        LogError: a file of the log is missing or empty, or its beginning is not what the schema says.
    """
    return look_ahead(live, find_log(logs), config, schema, settings, restart=restart)


def look_ahead(
    live: str | Path,
    log: PeriodLog,
    config: Config | str | Path | None,
    schema: FeatureSchema | str | Path | None,
    settings: LiveSettings | None,
    *,
    restart: bool,
) -> AdvancePreview:
    """As `preview_advance`, of a log that is known."""
    model = LiveModel(Path(live))
    model.require_ours()
    missing = [name for name, given in (("config", config), ("schema", schema)) if given is None]
    if missing and not model.exists:
        needed = " and ".join(f"`{name}`" for name in missing)
        msg = f"`live`: there is no live model in {live} yet, and the first period needs {needed}"
        raise LiveError(msg)
    files: dict[str, str] = {}
    columns = _choose_schema(model, schema, files)
    of_runs, text = _choose_config(model, config)
    chosen = changed_settings(model.path / SETTINGS_NAME, settings or LiveSettings())
    before = model.settings
    if not model.exists or chosen != before:
        files[SETTINGS_NAME] = settings_toml(chosen)
    periods = model.periods
    draft, removed, done = _next_period(model, periods, log.records, restart=restart)
    _require_fit(model, draft.base if done is None else draft.period, of_runs, config)
    if done is not None:
        unused = [name for name in LiveSettings.model_fields if getattr(chosen, name) != getattr(before, name)]
        unused += [] if text is None else ["config"]
        return AdvancePreview(model, {}, before, of_runs, columns, draft, done=done, unused=tuple(unused))
    if "preprocess" not in draft.done:
        require_readable(log, columns, chosen.max_bad_rows)
    _require_base(model, draft)
    _require_label(model, draft.base, of_runs.train.label or columns.labels[0].name)
    begun_again = _begun_again(draft, log.records, chosen, of_runs)
    draft = draft.model_copy(update={"logs": log.records, "settings": chosen, "config": config_toml(of_runs)})
    if text is not None and not periods:
        files[CONFIG_NAME], text = text, None
    replayed = () if "learn" in draft.done else _replayed(periods, draft.base, chosen)
    return AdvancePreview(
        model, files, chosen, of_runs, columns, draft, replayed, removed, new_config=text, begun_again=begun_again
    )


def _choose_schema(model: LiveModel, given: FeatureSchema | str | Path | None, files: dict[str, str]) -> FeatureSchema:
    """The schema of the logs; that of a new live model is put among the files to write."""
    path = model.path / SCHEMA_NAME
    chosen = given if isinstance(given, FeatureSchema) else load_schema(path if given is None else given)
    if not model.exists:
        is_file = not isinstance(given, FeatureSchema) and given is not None and not is_preset(given, PRESETS)
        files[SCHEMA_NAME] = Path(str(given)).read_text(encoding="utf-8") if is_file else schema_toml(chosen)
    elif given is not None and chosen != load_schema(path):
        msg = (
            f"`schema`: is another than {path}: what was learnt means nothing with it; leave it out, or begin another "
            "live model"
        )
        raise LiveError(msg)
    return chosen


def _choose_config(model: LiveModel, given: Config | str | Path | None) -> tuple[Config, str | None]:
    """The config of the runs, and its text where it is another than that of the live model."""
    path = model.path / CONFIG_NAME
    chosen = given if isinstance(given, Config) else load_config(path if given is None else given)
    if given is None or (model.exists and chosen == load_config(path)):
        return chosen, None
    return chosen, config_toml(given) if isinstance(given, Config) else find_config(given).read_text(encoding="utf-8")


def _require_fit(model: LiveModel, learnt: int | None, config: Config, given: Config | str | Path | None) -> None:
    """See that what a period has learnt can be learnt on with a config."""
    run = None if learnt is None else model.day(learnt) / RUN_NAME
    problems = [] if run is None or not run.is_dir() else list(unfit_settings(Run.open(run).config, config))
    if problems:
        own = model.path / CONFIG_NAME
        name = own if given is None else "the one that is given" if isinstance(given, Config) else given
        remedy = "change these back" if given is None else f"leave it out to go on with {own}"
        head = f"`config`: {name} does not fit what period {learnt} has learnt; {remedy}, or begin another live model:"
        raise LiveError("\n  ".join([head, *problems]))


def _begun_again(draft: Draft, logs: Sequence[LogRecord], settings: LiveSettings, config: Config) -> StepName | None:
    """The step that may be half done, if it reads what was changed since the period was begun.

    Raises:
        LiveError: a step that is complete has read it.
    """
    changed = []
    if draft.settings is not None:
        now, before = (given.model_dump(include={*READ_BY}) for given in (settings, draft.settings))
        changed = [(name, now[name], before[name]) for name in now if now[name] != before[name]]
    with suppress(ValidationError):  # an earlier version has written it, which had other keys
        values = setting_values(config)
        old = values if draft.config is None else setting_values(Config.model_validate(tomllib.loads(draft.config)))
        names = [name for name in {**values, **old} if values.get(name) != old.get(name)]
        changed += [("config", f"{name} = {values.get(name)}", old.get(name)) for name in names]
    for name, now, before in changed:
        if READ_BY[name] in draft.done:
            msg = (
                f"`{name}`: is {now}, and was {before} when the step {READ_BY[name]} of period {draft.period} read it, "
                "which is not complete; give what it was until then, or `restart` to begin the period again"
            )
            raise LiveError(msg)
    unfinished = next((step for step in STEPS[draft.base is None :] if step not in draft.done), None)
    read_by = {READ_BY[name] for name, _, _ in changed}
    if [log.path for log in logs] != [log.path for log in draft.logs]:
        read_by.add("preprocess")  # which knows its files by their place
    return unfinished if unfinished in read_by else None


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
        if restart or (is_other and not {*draft.done} - {"score"}):  # no more than the scores of the other log is lost
            return Draft(period=draft.period, base=base, logs=logs), draft.period, None
        if not is_same(draft.logs, logs):
            names = ", ".join(log.path for log in draft.logs)
            msg = (
                f"`logs`: period {draft.period} was begun with another log and is not complete: give that one again, "
                f"{names}, or `restart` to remove what was done and begin the period with the new one"
            )
            raise LiveError(msg)
        if draft.base != base:
            msg = (
                f"`live`: period {draft.period} was begun from period {draft.base}, and the current one is {base} now; "
                "give `restart` to begin it again from that"
            )
            raise LiveError(msg)
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
            msg = (
                f"{path}: is not there any more, and the next period is learnt from it (keep_runs says how many are "
                f"kept); roll back to one of {', '.join(map(str, kept)) or 'none'}, or put it back"
            )
            raise LiveError(msg)


def _require_label(model: LiveModel, base: int | None, label: str) -> None:
    """See that the label is the one of the base, which scores and gate are about."""
    learnt = label if base is None else BundleManifest.read(model.bundle(base)).feature_schema.label.name
    if label != learnt:
        msg = f"`config`: train.label is {label}, and the model of period {base} has learnt {learnt}; give it that one"
        raise LiveError(msg)


def _replayed(periods: Sequence[PeriodRecord], base: int | None, settings: LiveSettings) -> tuple[PeriodRecord, ...]:
    """The periods whose logs are learnt from again before the new one, oldest first."""
    found = lineage_of(periods, base)[: settings.replay_periods - 1][::-1]
    for record in found:
        for log in record.logs:
            path = Path(log.path)
            if not path.is_file() or path.stat().st_size != log.size_bytes:
                msg = (
                    f"{path}: is not the log of period {record.period} any more, which replay_periods = "
                    f"{settings.replay_periods} learns from again; put it back, or make replay_periods smaller"
                )
                raise LiveError(msg)
    return tuple(found)


def lineage_of(periods: Sequence[PeriodRecord], base: int | None) -> list[PeriodRecord]:
    """The periods that a model has learnt, one after the other, newest first."""
    known = {record.period: record for record in periods}
    found: list[PeriodRecord] = []
    while base in known:
        found.append(known[base])
        base = known[base].base
    return found
