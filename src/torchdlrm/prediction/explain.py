"""Says what each feature of a row adds to its logit: that of the row less that of the row without the feature.

Leave-one-out needs no gradients, so it holds for any model in any precision.  What two features add only together
counts for both: contributions do not add up to the logit.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from torchdlrm.errors import RowError
from torchdlrm.features.schema import FeatureSchema
from torchdlrm.prediction.json_rows import Row, RowNames

METHOD = "leave-one-out"


@dataclass(frozen=True)
class Explanation:
    """The probability of a click of a row, its log-odds, and what each feature that the row has adds to these.

    Contributions are by the features' names, the largest in size first. `labels` has the probability of each label, of
    which `label` is explained.
    """

    prediction: float
    logit: float
    contributions: dict[str, float]
    labels: dict[str, float]
    label: str

    def as_dict(self) -> dict[str, Any]:
        """As JSON has it."""
        return {name: of for name, of in vars(self).items() if not name.startswith("label") or len(self.labels) > 1}


class LeftOut:
    """What is to be predicted to explain rows that can be read: `rows`, these, then each without one feature.

    Raises:
        RowError: the model has no such label.
    """

    def __init__(self, rows: Sequence[Row], schema: FeatureSchema, label: str | None = None) -> None:
        labels = [column.name for column in schema.learnt]
        if label is not None and label not in labels:
            raise RowError(f"`label`: the model predicts {', '.join(labels)}, and no {label!r}")
        self._label, self._by_label = label or labels[0], schema.by_label
        names = RowNames(schema)
        features = {key: column.name for column in schema.features for key in names.keys(column)}
        self._num_rows = len(rows)
        missing = (None, "")
        left_out = [
            (i, key) for i, row in enumerate(rows) for key in row if key in features and row[key] not in missing
        ]
        self._cells = [(i, features[key]) for i, key in left_out]
        self.rows = [*rows, *({other: rows[i][other] for other in rows[i] if other != key} for i, key in left_out)]

    def explained(self, probabilities: NDArray[np.float32], logits: NDArray[np.float32]) -> list[Explanation]:
        """The explanations, given what is predicted of all `rows`: [rows], or of several labels [rows, labels]."""
        of_labels = {name: of[: self._num_rows].tolist() for name, of in self._by_label(probabilities).items()}
        logit = self._by_label(logits)[self._label].tolist()
        found = [
            Explanation(
                of_labels[self._label][i], logit[i], {}, {name: of[i] for name, of in of_labels.items()}, self._label
            )
            for i in range(self._num_rows)
        ]
        for (i, name), without in zip(self._cells, logit[self._num_rows :], strict=True):
            found[i].contributions[name] = found[i].logit - without
        adds = (sorted(one.contributions.items(), key=lambda item: -abs(item[1])) for one in found)
        return [replace(one, contributions=dict(ordered)) for one, ordered in zip(found, adds, strict=True)]
