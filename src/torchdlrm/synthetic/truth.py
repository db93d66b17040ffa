"""The best that any model can reach on a synthetic log, and the file that says so.

True logits lie on a grid: counts of clicks and of other rows for each of its points give the exact AUC and logloss,
in memory that does not grow with the rows.
"""

import json
import math
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, BeforeValidator, ValidationError

from torchdlrm.errors import LogError
from torchdlrm.features.schema import problems
from torchdlrm.metrics import auc_from_counts
from torchdlrm.synthetic.model import NUM_LOGITS, click_thresholds
from torchdlrm.synthetic.values import Companions, Drift

Counts = NDArray[np.int64]  # of 2 * logit + label [2 NUM_LOGITS]
# NaN where a metric is not defined; JSON has null there.
_Metric = Annotated[float, BeforeValidator(lambda value: math.nan if value is None else value)]


class Attainable(BaseModel, frozen=True):
    """What a model that knows the true probabilities reaches on some rows; NaN where the metric is not defined.

    Attributes:
        first_row: of these rows in the log, from 0.
        rows: how many.
        click_rate: fraction of them that was clicked.
        auc: exact, as `torchdlrm.metrics.auc`.
        logloss: in nats.
    """

    first_row: int
    rows: int
    click_rate: _Metric
    auc: _Metric
    logloss: _Metric

    @classmethod
    def of(cls, counts: Counts, first_row: int = 0) -> "Attainable":
        """On the counted rows."""
        others, clicks = counts.reshape(NUM_LOGITS, 2).T
        probabilities = click_thresholds() / 2.0**32
        losses = np.concatenate([clicks * -np.log(probabilities), others * -np.log1p(-probabilities)])
        rows = int(counts.sum())
        return cls(
            first_row=first_row,
            rows=rows,
            click_rate=int(clicks.sum()) / rows if rows else math.nan,
            auc=auc_from_counts(clicks, others),
            logloss=math.fsum(losses) / rows if rows else math.nan,
        )


class SyntheticTruth(BaseModel, frozen=True):
    """The content of `<log>.truth.json`.

    Attributes:
        rows: of the whole log.
        seed: given.
        preset: given.
        click_rate: fraction of all rows that was clicked.
        auc: attainable on all rows.
        logloss: attainable on all rows, in nats.
        multi_hot: given.
        drift: given, of a log of several days.
        label_delay: given, of such a log.
        late_clicks: of such a log, how many clicks its rows do not show. Everywhere else here they are clicks.
        day: in the truth about a day, which.
        splits: attainable on the rows that a split by order keeps for judging: `held_out`, the last `rows // 7`,
            its first half `val` (the larger by one where they differ) and its second half `test`.
            Of a log of several days these days, `day_00` and so on, in the truth about all of them.
    """

    rows: int
    seed: int
    preset: str
    click_rate: _Metric = math.nan
    auc: _Metric = math.nan
    logloss: _Metric = math.nan
    multi_hot: Companions | None = None
    drift: Drift | None = None
    label_delay: float = 0.0
    late_clicks: int = 0
    day: int | None = None
    splits: dict[str, Attainable] = {}

    def as_dict(self) -> dict[str, Any]:
        """As it stands in the file; what is not defined is None."""
        fields: dict[str, Any] = json.loads(self.model_dump_json())
        return fields

    def as_json(self) -> bytes:
        """The content of the file."""
        return self.model_dump_json(indent=2).encode() + b"\n"

    def of(self, whole: Attainable, splits: dict[str, Attainable], late_clicks: int) -> "SyntheticTruth":
        """What is given here, with what was found about the rows."""
        found = whole.model_dump(exclude={"first_row"})
        return self.model_copy(update={**found, "splits": splits, "late_clicks": late_clicks})


def truth_path(log: Path) -> Path:
    """Where the truth about a log stands; about all days of a folder in it."""
    return log / "truth.json" if log.is_dir() else log.with_name(log.name + ".truth.json")


def read_truth(log: Path) -> SyntheticTruth:
    """The truth about a complete log, as `synthesize` gave it.

    Raises:
        LogError: there is none, or it is not what `synthesize` writes.
    """
    path = truth_path(log)
    try:
        return SyntheticTruth.model_validate_json(path.read_bytes())
    except ValidationError as error:
        why = "; ".join(line.strip() for line in problems(error))
    except OSError as error:
        why = str(error)
    msg = f"{path}: not what dlrm synthesize writes next to a log ({why}); remove the log and synthesize it again"
    raise LogError(msg)
