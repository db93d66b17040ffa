"""Settings of a live model: `live.toml`, and options of `dlrm advance`.

In: the file, and what is to be changed in it.  Out: `LiveSettings`.  Reads no torch: the command line needs the options
before anything else.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError

from torchdlrm.bundle import DensePrecision, TablePrecision
from torchdlrm.errors import LiveError
from torchdlrm.features.vocabulary import DEFAULT_MIN_COUNT
from torchdlrm.judging import RecalibrationMethod
from torchdlrm.records import Record
from torchdlrm.toml import did_you_mean, explain, read_toml, toml_text

_Positive = Annotated[int, Field(ge=1)]
_NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class GateSettings(Record):
    """When a new model is good enough to be published; it is judged on rows of the new log that it has not learnt.

    What is outside a limit by less than two standard errors may be chance, and is no reason to refuse it.
    """

    max_logloss_increase: _NonNegative = Field(
        0.01, description="Refuse a model whose logloss on the held-back rows is surely above the old one's by more."
    )
    calibration: tuple[float, float] = Field(
        (0.8, 1.25),
        description="Refuse a model whose calibration (predictions by clicks) there is surely outside this range.",
    )

    def _contradictions(self) -> Iterator[str]:
        low, high = self.calibration
        if not 0 <= low < high:
            yield f"calibration must be a range from low to high, got {low:g} to {high:g}"


class ExportSettings(Record):
    """How each period's model is exported, as `dlrm export` has it."""

    name: str | None = Field(None, description="Name of the model; that of the live model's folder when not given.")
    precision: TablePrecision | Literal["auto"] = Field("float32", description="Of the tables.")
    dense_precision: DensePrecision | Literal["auto"] = Field("auto", description="Of the matrix products.")
    max_logloss_increase: _NonNegative | None = Field(None, description="What a lower precision may cost in nats.")
    check_rows: _Positive = Field(100_000, description="Most held-back rows to predict to check the bundle.")
    recalibrate: RecalibrationMethod | None = Field(
        None,
        description="Make probabilities that come true, by half of the held-back rows, where that helps on the others.",
    )
    recalibrate_by: str | None = Field(None, description="Do so apart for each frequent value of this column.")


class LiveSettings(Record):
    """What is done in each period."""

    hold_back: Annotated[float, Field(gt=0, lt=1)] = Field(
        0.05, description="Fraction of each log that is not learnt from: the new model is judged on it."
    )
    replay_periods: _Positive = Field(
        1, description="Learn from the logs of this many periods, the newest last: 1 is the new log alone."
    )
    min_count: _Positive = Field(
        DEFAULT_MIN_COUNT, description="A categorical value in fewer rows than this gets no id of its own."
    )
    admit_over: _Positive = Field(
        1, description="Count a value's rows over this many periods, the new one included, until they are min_count."
    )
    expire_after: _Positive | None = Field(
        None,
        description="A value that is not seen in this many periods, the new one included, loses its id to a new one.",
    )
    max_embeddings: Annotated[int, Field(ge=2)] | None = Field(
        None,
        description="Most rows that the embedding table of a feature may have: values seen least recently lose theirs.",
    )
    max_bad_rows: Annotated[int, Field(ge=0)] = Field(
        0, description="Skip up to this many rows of a log that the schema cannot read."
    )
    seed: Annotated[int, Field(ge=0, lt=2**63)] = Field(
        0, description="Seed of the order of the rows, and of which are held back."
    )
    keep_runs: _Positive = Field(
        3, description="Periods whose run and dataset are kept; those of the current model always are."
    )
    keep_bundles: _Positive = Field(7, description="Periods whose bundles are kept; the current one always is.")
    gate: GateSettings = GateSettings()
    export: ExportSettings = ExportSettings()


def changed_settings(path: Path, changes: LiveSettings) -> LiveSettings:
    """The settings of a file, and in their place those that `changes` sets.

    Args:
        path: of `live.toml`; without it, the defaults are changed.
        changes: its fields that were given count, and not those that have their defaults.

    Raises:
        LiveError: the file cannot be read, or is wrong; every problem in one message.
    """
    try:
        raw = read_toml(path, LiveError) if path.exists() else {}
        LiveSettings.model_validate(raw)
        return LiveSettings.model_validate(_merged(raw, changes.model_dump(exclude_unset=True)))
    except OSError as error:
        raise LiveError(f"{path}: cannot be read: {error.strerror}") from error
    except ValidationError as error:
        lines = [f"  {_described(item)}" for item in error.errors(include_url=False)]
        raise LiveError("\n".join([f"{path}: the settings are wrong:", *lines])) from error


def settings_toml(settings: LiveSettings) -> str:
    """Write settings as the text of `live.toml`; what is not set is left out."""
    return toml_text(settings.model_dump(mode="json", exclude_none=True))


def _merged(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, Any]:
    sections = {key: _merged(old.get(key, {}), value) for key, value in new.items() if isinstance(value, dict)}
    return {**old, **new, **sections}


def _described(item: Any) -> str:
    """A problem as a line: key, what is wrong, what was perhaps meant."""
    *sections, leaf = map(str, item["loc"]) if item["loc"] else ("",)
    key = ".".join([*sections, leaf])
    if item["type"] != "extra_forbidden":
        return f"{key}: {explain(item)}"
    section: Any = LiveSettings
    for name in sections:
        section = section.model_fields[name].annotation
    return f"{key}: there is no such key{did_you_mean(leaf, section.model_fields)}"
