"""Says what each feature of a row adds to its logit: that of the row less that of the row without the feature.

Leave-one-out needs no gradients, so it holds for any model in any precision.  What two features add only together
counts for both: contributions do not add up to the logit.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from torchdlrm.features.schema import FeatureSchema
from torchdlrm.prediction.json_rows import Row, RowNames

METHOD = "leave-one-out"


@dataclass(frozen=True)
class Explanation:
    """The probability of a click of a row, its log-odds, and what each feature that the row has adds to these.

    Contributions are by the features' names, the largest in size first.
    """

    prediction: float
    logit: float
    contributions: dict[str, float]


class LeftOut:
    """What is to be predicted to explain rows that can be read: `rows`, these, then each without one feature."""

    def __init__(self, rows: Sequence[Row], schema: FeatureSchema) -> None:
        names = RowNames(schema)
        features = {key: column.name for column in schema.features for key in names.keys(column)}
        self._num_rows = len(rows)
        missing = (None, "")
        left_out = [
            (i, key) for i, row in enumerate(rows) for key in row if key in features and row[key] not in missing
        ]
        self._cells = [(i, features[key]) for i, key in left_out]
        self.rows = [*rows, *({other: rows[i][other] for other in rows[i] if other != key} for i, key in left_out)]

    def explained(self, predicted: Iterable[tuple[NDArray[np.float32], NDArray[np.float32]]]) -> list[Explanation]:
        """The explanations, given the probabilities and the logits of all `rows`, in one part or several."""
        pairs = [pair for part in predicted for pair in zip(*(of.tolist() for of in part), strict=True)]
        found = [Explanation(prediction, logit, {}) for prediction, logit in pairs[: self._num_rows]]
        for (i, name), (_, without) in zip(self._cells, pairs[self._num_rows :], strict=True):
            found[i].contributions[name] = found[i].logit - without
        adds = (sorted(one.contributions.items(), key=lambda item: -abs(item[1])) for one in found)
        return [replace(one, contributions=dict(ordered)) for one, ordered in zip(found, adds, strict=True)]
