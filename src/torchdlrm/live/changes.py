"""What may change from one period of a live model to the next, and while one is not complete.

In: what a call gives, the folder, the period.  Out: config and schema, and the step that is begun again; or what does
not fit.
"""

import tomllib
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import get_args

from pydantic import ValidationError

from torchdlrm.bundle.manifest import BundleManifest
from torchdlrm.config import Config, config_toml, find_config, load_config, setting_values
from torchdlrm.errors import LiveError
from torchdlrm.features.schema import PRESETS, FeatureSchema
from torchdlrm.features.schema_file import load_schema, schema_toml
from torchdlrm.live.model import CONFIG_NAME, RUN_NAME, SCHEMA_NAME, Draft, LiveModel
from torchdlrm.live.record import LogRecord, StepName
from torchdlrm.live.settings import LiveSettings
from torchdlrm.model.architecture import Architecture
from torchdlrm.model.model_class import difference_from
from torchdlrm.toml import is_preset
from torchdlrm.training.run import Run
from torchdlrm.training.source_run import unfit_settings

STEPS: tuple[StepName, ...] = get_args(StepName)
# The last step that reads each setting, and `config`; what is kept afterwards may change whenever.
READ_BY: Mapping[str, StepName] = {
    **dict.fromkeys(("hold_back", "min_count", "admit_over", "expire_after"), "preprocess"),
    **dict.fromkeys(("max_embeddings", "max_bad_rows", "seed"), "preprocess"),
    **dict.fromkeys(("replay_periods", "config"), "learn"),
    "export": "export",
    "gate": "check",
}


def choose_schema(model: LiveModel, given: FeatureSchema | str | Path | None, files: dict[str, str]) -> FeatureSchema:
    """The schema of the logs; that of a new live model is put among the files to write."""
    path = model.path / SCHEMA_NAME
    chosen = given if isinstance(given, FeatureSchema) else load_schema(path if given is None else given)
    if not model.exists:
        is_file = not isinstance(given, FeatureSchema) and given is not None and not is_preset(given, PRESETS)
        files[SCHEMA_NAME] = Path(str(given)).read_text(encoding="utf-8") if is_file else schema_toml(chosen)
    elif given is not None and chosen != load_schema(path):
        raise LiveError(
            f"`schema`: is another than {path}: what was learnt means nothing with it; leave it out, or begin another "
            "live model"
        )
    return chosen


def choose_config(model: LiveModel, given: Config | str | Path | None) -> tuple[Config, str | None]:
    """The config of the runs, and its text where it is another than that of the live model."""
    path = model.path / CONFIG_NAME
    chosen = given if isinstance(given, Config) else load_config(given or path, is_of_run=given is None)
    if given is None or (model.exists and chosen == load_config(path, is_of_run=True)):
        return chosen, None
    return chosen, config_toml(given) if isinstance(given, Config) else find_config(given).read_text(encoding="utf-8")


def require_fit(model: LiveModel, learnt: int | None, config: Config, given: Config | str | Path | None) -> None:
    """See that what a period has learnt can be learnt on with a config."""
    run = None if learnt is None else model.day(learnt) / RUN_NAME
    problems = (
        [] if run is None or not (run / CONFIG_NAME).is_file() else list(unfit_settings(Run.open(run).config, config))
    )
    if problems:
        own = model.path / CONFIG_NAME
        name = own if given is None else "the one that is given" if isinstance(given, Config) else given
        remedy = "change these back" if given is None else f"leave it out to go on with {own}"
        head = f"`config`: {name} does not fit what period {learnt} has learnt; {remedy}, or begin another live model:"
        raise LiveError("\n  ".join([head, *problems]))


def require_labels(model: LiveModel, base: int | None, labels: Sequence[str]) -> None:
    """See that the labels are those of the base, which scores and gate are about."""
    if base is None:
        return
    learnt = [label.name for label in BundleManifest.read(model.bundle(base)).feature_schema.learnt]
    if [*labels] != learnt:
        key, given, was = "train.label" if len(labels) == 1 else "train.labels", ", ".join(labels), ", ".join(learnt)
        msg = f"`config`: {key} is {given}, and the model of period {base} has learnt {was}; give it that one"
        raise LiveError(msg)


def require_class(model: LiveModel, draft: Draft, config: Config, architecture: Architecture) -> None:
    """See that the model class is the one by which the period was learnt, or else its base."""
    learnt = draft.period if "learn" in draft.done else draft.base
    difference = None if learnt is None else _other_class(model, learnt, config, architecture)
    if difference is not None:
        raise LiveError(f"{model.day(learnt or 0) / RUN_NAME}: {difference}")


def _other_class(model: LiveModel, period: int, config: Config, architecture: Architecture) -> str | None:
    run = Run(model.day(period) / RUN_NAME, config)
    return difference_from(run.model_class, architecture, "run") if run.exists else None


def begun_again(
    model: LiveModel,
    draft: Draft,
    logs: Sequence[LogRecord],
    settings: LiveSettings,
    config: Config,
    architecture: Architecture,
) -> StepName | None:
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
            raise LiveError(
                f"`{name}`: is {now}, and was {before} when the step {READ_BY[name]} of period {draft.period} read it, "
                "which is not complete; give what it was until then, or `restart` to begin the period again"
            )
    unfinished = next((step for step in STEPS[draft.base is None :] if step not in draft.done), None)
    read_by = {READ_BY[name] for name, _, _ in changed}
    if [log.path for log in logs] != [log.path for log in draft.logs]:
        read_by.add("preprocess")  # which knows its files by their place
    if _other_class(model, draft.period, config, architecture) is not None:
        read_by.add("learn")
    return unfinished if unfinished in read_by else None
