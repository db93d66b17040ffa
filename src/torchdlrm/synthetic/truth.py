"""The best that any model can reach on a synthetic log, and the files that say so."""

import json
import math
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from torchdlrm.errors import LogError
from torchdlrm.synthetic.drift import Drift
from torchdlrm.synthetic.multi_hot import Companions


@dataclass(frozen=True)
class Attainable:
    """What a model that knows the true probabilities reaches on some rows; NaN where the metric is not defined.

    Attributes:
        first_row: of these rows in the log, from 0.
        rows: how many.
        click_rate: share of them that was clicked.
        auc: exact, as `torchdlrm.metrics.auc`.
        logloss: in nats.
    """

    first_row: int
    rows: int
    click_rate: float
    auc: float
    logloss: float


@dataclass(frozen=True)
class SyntheticTruth:
    """The content of `<log>.truth.json`.

    Attributes:
        rows: of the whole log.
        seed: given.
        preset: given.
        click_rate: share of all rows that was clicked.
        auc: attainable on all rows.
        logloss: attainable on all rows, in nats.
        splits: attainable on the rows that a split by order keeps for judging: `held_out`, the last `rows // 7`,
            its first half `val` (the larger by one where they differ) and its second half `test`.
            Of a log of several days these days, `day_00` and so on, in the truth about all of them.
        multi_hot: given.
        drift: given, of a log of several days.
        label_delay: given, of such a log.
        late_clicks: of such a log, how many clicks its rows do not show. Everywhere else here they are clicks.
        day: in the truth about a day, which.
    """

    rows: int
    seed: int
    preset: str
    click_rate: float = math.nan
    auc: float = math.nan
    logloss: float = math.nan
    splits: dict[str, Attainable] = field(default_factory=dict)
    multi_hot: Companions | None = None
    drift: Drift | None = None
    label_delay: float = 0.0
    late_clicks: int = 0
    day: int | None = None

    def as_dict(self) -> dict[str, object]:
        """As it stands in the file; what is not defined is None."""
        fields = asdict(self)
        if self.drift is None:
            del fields["drift"], fields["label_delay"], fields["late_clicks"]
        if self.day is None:
            del fields["day"]
        del fields["splits"]
        return {**_without_nan(fields), "splits": self.parts()}

    def parts(self) -> dict[str, dict[str, object]]:
        """The splits as they stand in the file."""
        return {name: _without_nan(asdict(split)) for name, split in self.splits.items()}

    def as_json(self) -> bytes:
        """The content of the file."""
        return json.dumps(self.as_dict(), indent=2).encode() + b"\n"

    def as_part(self, first_row: int) -> Attainable:
        """What is attainable here, as a part of a larger log."""
        return Attainable(first_row, self.rows, self.click_rate, self.auc, self.logloss)

    def of(self, whole: Attainable, splits: dict[str, Attainable], late_clicks: int) -> "SyntheticTruth":
        """What is given here, with what was found about the rows."""
        return replace(
            self,
            rows=whole.rows,
            click_rate=whole.click_rate,
            auc=whole.auc,
            logloss=whole.logloss,
            splits=splits,
            late_clicks=late_clicks,
        )


def truth_path(log: Path) -> Path:
    """Where the truth about a log stands; about all days of a folder in it."""
    return log / "truth.json" if log.is_dir() else log.with_name(log.name + ".truth.json")


def schema_path(log: Path) -> Path:
    """Where the schema of a log with several values in a cell stands."""
    return log.with_name(log.name + ".schema.toml")


def read_truth(log: Path) -> SyntheticTruth:
    """The truth about a complete log, as `synthesize` gave it.

    Raises:
        LogError: there is none, or it is not what `synthesize` writes.
    """
    path = truth_path(log)
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
        splits = {name: Attainable(**_with_nan(split)) for name, split in fields.pop("splits").items()}
        drift = fields.pop("drift", None)
        return SyntheticTruth(**_with_nan(fields), splits=splits, drift=drift and Drift(**drift))
    except (OSError, ValueError, TypeError, AttributeError, KeyError) as error:
        msg = f"{path}: not what dlrm synthesize writes next to a log ({error}); remove the log and synthesize it again"
        raise LogError(msg) from error


def _without_nan(fields: dict[str, object]) -> dict[str, object]:
    """Replace NaN, which JSON does not have, by None."""
    return {k: None if isinstance(v, float) and math.isnan(v) else v for k, v in fields.items()}


def _with_nan(fields: dict[str, Any]) -> dict[str, Any]:
    """Replace None by NaN again."""
    return {k: math.nan if v is None else v for k, v in fields.items()}
