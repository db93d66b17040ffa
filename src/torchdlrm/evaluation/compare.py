"""Compares models on the same rows: how much better one predicts than another, and how sure that is.

In: two runs, or labels [N], the logits [N] of both models and perhaps weights [N] of the rows.  Out: a `Difference`,
with standard errors of paired differences: rows that are hard for both models say nothing about which is better, and
drop out.

N rows, P of them clicked, Q = N - P not.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from torchdlrm.config import DeviceChoice, ShardingConfig
from torchdlrm.data.dataset import Dataset
from torchdlrm.errors import DatasetError
from torchdlrm.evaluation.split_rows import predict_split
from torchdlrm.judged import NORMAL_95, Judged
from torchdlrm.metrics import BEST, LOSS, METRICS
from torchdlrm.model.model_class import ModelClass
from torchdlrm.notebook import notebook_view
from torchdlrm.progress import ProgressListener, watched
from torchdlrm.ranks import Labels, Scores, Weights
from torchdlrm.training.run import Run


@dataclass(frozen=True)
class Difference:
    """What the second model's metrics are above the first one's, each with its standard error.

    Attributes:
        auc: difference of the AUC; above 0 the second model is better. NaN when the labels hold one class only.
        auc_standard_error: by DeLong, DeLong and Clarke-Pearson (1988); NaN with fewer than two rows of a class.
        logloss: difference of the logloss in nats; below 0 the second model is better.
        logloss_standard_error: of the mean of the rows' differences; NaN with fewer than two rows.

    Where rows have weights, differences and means are weighted, and standard errors are those of weighted means of
    independent rows: weights say how much a row matters, and not how often it was seen.
    """

    auc: float
    auc_standard_error: float
    logloss: float
    logloss_standard_error: float

    def _repr_html_(self) -> str:
        """What a notebook shows: each difference, with the interval that holds the true one 19 times in 20."""
        both = {"AUC": (self.auc, self.auc_standard_error), "logloss": (self.logloss, self.logloss_standard_error)}
        rows = [
            {
                "metric": name,
                "difference": f"{value:+.5f}",
                "from": f"{value - NORMAL_95 * error:+.5f}",
                "to": f"{value + NORMAL_95 * error:+.5f}",
            }
            for name, (value, error) in both.items()
        ]
        return notebook_view("second model, above the first one", {"interval": "95 %"}, rows)


def compare(
    first: Run | str | Path,
    second: Run | str | Path,
    dataset: Dataset | str | Path | None = None,
    split: str = "test",
    *,
    model_classes: tuple[ModelClass | None, ModelClass | None] = (None, None),
    batch_size_global: int = 8192,
    device: DeviceChoice = "auto",
    sharding: ShardingConfig | None = None,
    progress: ProgressListener | bool = True,
) -> Difference | None:
    """Compare two runs that were trained on the same dataset, each by its best checkpoint.

    Works in this process and all others that torch's launcher has started with it, as `evaluate` does.

    Args:
        first: the run to compare with, or its folder.
        second: the other run, or its folder.
        dataset: what both were trained on, or its folder; None where it is still where it was.
        split: `train`, `val` or `test`; several joined by + are judged together.
        model_classes: of each run, where it was trained with a model class of the user.
        batch_size_global: rows per forward pass over all ranks; does not change the result.
        device: where to compute, as for `evaluate`.
        sharding: of both runs' tables, as for `evaluate`.
        progress: receives the rows done on rank 0; True and False as for `train`.

    Returns:
        On rank 0 what the second run's metrics are above the first one's; None elsewhere.

    Raises:
        RunError: as `evaluate`.
        DatasetError: as `evaluate`, or the runs were trained on different rows or labels.
    """
    runs = [run if isinstance(run, Run) else Run.open(Path(run)) for run in (first, second)]
    datasets = [run.open_dataset(dataset) for run in runs]
    labels = [encoded.label_name for encoded in datasets]
    if labels[0] != labels[1]:
        msg = f"the runs predict different labels, {labels[0]} and {labels[1]}: they cannot be compared"
        raise DatasetError(msg)
    with watched(progress) as listener:
        (_, taken), (_, other) = (
            predict_split(
                run,
                encoded,
                split,
                model_class=model_class,
                batch_size_global=batch_size_global,
                device=device,
                sharding=sharding,
                progress=listener,
            )
            for run, encoded, model_class in zip(runs, datasets, model_classes, strict=True)
        )
    if taken is None or other is None:
        return None
    if not np.array_equal(taken.labels, other.labels):
        msg = f"the runs were trained on different datasets: the labels of their {split} splits are not the same"
        raise DatasetError(msg)
    return paired_difference(taken.labels, taken.logits, other.logits, taken.weights)


def paired_difference(labels: Labels, first: Scores, second: Scores, weights: Weights = None) -> Difference:
    """Compare two models on the same rows.

    Args:
        labels: 0 or 1 [N].
        first: logits of the model to compare with [N].
        second: logits of the other model [N].
        weights: of the rows [N].
    """
    before, after = (Judged.of(labels, logits, weights) for logits in (first, second))
    area, loss = (METRICS[name].difference(before, after) for name in (BEST, LOSS))
    return Difference(area.value, area.standard_error, loss.value, loss.standard_error)
