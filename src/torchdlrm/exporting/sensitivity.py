"""Chooses a precision for each table (`--precision auto`), by what it costs and what it saves.

Cost, of a table at a precision: how much the logloss is expected to rise when this table alone is served so.  If the
checkpoint's probability p is right, a row answered with q instead loses the divergence of q from p, p log(p / q) +
(1 - p) log((1 - p) / (1 - q)) nats, on average over its label.  The mean of that is never negative, adds up over tables
as long as it is small, and needs far fewer rows than the difference of two loglosses, whose noise drowns it.

Choice: all tables begin as float32; the step down that saves most bytes for its cost is taken as long as the sum of
the costs stays within what is allowed.  Steps that save next to nothing are left out: the tables of a few rows would
otherwise use up, for some kilobytes, what is left of it.  Then all choices together are tried on the same rows with
their labels, and made again with half of the allowance while it raises the logloss by more than was asked for, noise
considered.

B rows, F sparse features, D embedding dimension.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import polars as pl
from numpy.typing import NDArray

from torchdlrm.bundle import TablePrecision
from torchdlrm.bundle.check import LoglossIncrease, logloss_increase
from torchdlrm.bundle.encoded_rows import EncodedRows
from torchdlrm.bundle.precision import TABLE_PRECISIONS
from torchdlrm.exporting.checkpoint import CheckpointModel
from torchdlrm.features.schema import FeatureSchema
from torchdlrm.progress import ProgressListener

SENSITIVITY_ROWS = 20_000
_BATCH_ROWS = 2_048
_MAX_ATTEMPTS = 6
_LEAST_SAVED_FRACTION = 1e-4  # of the bytes of all tables in float32, by a step down
_DOWNWARDS = tuple(TABLE_PRECISIONS)


@dataclass(frozen=True)
class PrecisionChoice:
    """A table's costs and what was chosen.

    Attributes:
        num_embeddings: its rows.
        size_bytes: at each precision.
        logloss_increase: expected at each precision, of this table alone; 0 for float32.
        chosen: its precision.
    """

    num_embeddings: int
    size_bytes: dict[TablePrecision, int]
    logloss_increase: dict[TablePrecision, float]
    chosen: TablePrecision


@dataclass(frozen=True)
class PrecisionSearch:
    """What was chosen for all tables.

    Attributes:
        tables: by the feature that owns each.
        rows: on how many it was measured.
        max_logloss_increase: what was asked for.
        expected_increase: the sum of the tables' costs.
        measured_increase: of the logloss on the labels of these rows, all tables together.
    """

    tables: dict[str, PrecisionChoice]
    rows: int
    max_logloss_increase: float
    expected_increase: float
    measured_increase: LoglossIncrease

    @property
    def precisions(self) -> dict[str, TablePrecision]:
        """The precision of each table."""
        return {feature: table.chosen for feature, table in self.tables.items()}


def choose_precisions(
    model: CheckpointModel,
    frames: Iterable[pl.DataFrame],
    schema: FeatureSchema,
    num_embeddings: Mapping[str, int],
    *,
    max_logloss_increase: float,
    progress: ProgressListener,
) -> PrecisionSearch:
    """Measure every table at every precision, and choose.

    Args:
        model: the checkpoint.
        frames: encoded rows with label and weight that the export's own check does not use, where there are such.
        schema: of the columns.
        num_embeddings: rows of each table, by the feature that owns it.
        max_logloss_increase: what all tables together may cost, in nats.
        progress: receives the rows done.
    """
    batches = [part for frame in frames for part in frame.iter_slices(_BATCH_ROWS)]
    targets = pl.concat(batch.select(schema.target_names) for batch in batches)
    num_rows, weights = targets.height, None if schema.weight is None else targets[schema.weight.name].to_numpy()
    rows = [EncodedRows.from_frame(batch, schema) for batch in batches]
    progress.start_phase("measure tables", num_rows * len(num_embeddings))
    of_labels: dict[str, dict[TablePrecision, NDArray[np.float64]]] = {
        name: dict.fromkeys(TABLE_PRECISIONS, np.zeros(())) for name in num_embeddings
    }
    places: dict[str, list[int]] = {}
    for place, column in enumerate(schema.sparse):
        places.setdefault(column.owner, []).append(place)
    before = []
    for batch in rows:
        pooled = model.all_pooled(batch)
        logits = model.logits_of(batch, pooled)
        before.append(logits)
        for name in num_embeddings:
            for precision in _DOWNWARDS[1:]:
                served = pooled.clone()
                for feature in places[name]:
                    served[:, model.columns(feature)] = model.pooled(batch, feature, precision)
                changed = model.logits_of(batch, served)
                of_labels[name][precision] = of_labels[name][precision] + _divergence(logits, changed).sum(0) / num_rows
            progress.advance(batch.num_rows)
    # Of several labels the one that a table costs most: so what is allowed holds for each.
    costs = {name: {at: float(of.max()) for at, of in found.items()} for name, found in of_labels.items()}
    sizes = {
        name: {
            precision: sum(table.rows * stored.row_bytes(table.dim) for table in model.tables if table.feature == name)
            for precision, stored in TABLE_PRECISIONS.items()
        }
        for name in num_embeddings
    }
    allowance = max_logloss_increase
    for attempt in range(_MAX_ATTEMPTS):
        chosen = choose(costs, sizes, allowance)
        progress.start_phase(f"try the choice ({attempt + 1})", num_rows)
        after = []
        for batch in rows:
            after.append(model.logits(batch, [chosen[column.owner] for column in schema.sparse]))
            progress.advance(batch.num_rows)
        one, other = (schema.by_label(np.concatenate(logits)) for logits in (before, after))
        increases = (logloss_increase(targets[name].to_numpy(), one[name], other[name], weights) for name in one)
        measured = max(increases, key=lambda increase: increase.least)
        if measured.is_within(max_logloss_increase):
            break
        allowance /= 2
    else:
        chosen, measured = dict.fromkeys(chosen, "float32"), LoglossIncrease(0.0, 0.0)
    return PrecisionSearch(
        tables={
            name: PrecisionChoice(num_embeddings[name], sizes[name], costs[name], chosen[name])
            for name in num_embeddings
        },
        rows=num_rows,
        max_logloss_increase=max_logloss_increase,
        expected_increase=sum(costs[name][precision] for name, precision in chosen.items()),
        measured_increase=measured,
    )


def choose(
    costs: Mapping[str, Mapping[TablePrecision, float]],
    sizes: Mapping[str, Mapping[TablePrecision, int]],
    allowance: float,
) -> dict[str, TablePrecision]:
    """A precision for each table, the sum of their costs within the allowance; sizes are in bytes."""
    chosen: dict[str, TablePrecision] = dict.fromkeys(costs, "float32")
    least_saved = _LEAST_SAVED_FRACTION * sum(size["float32"] for size in sizes.values())
    while True:
        spent = sum(costs[name][precision] for name, precision in chosen.items())
        best: tuple[float, str, TablePrecision] | None = None
        for name, now in chosen.items():
            for precision in _DOWNWARDS[_DOWNWARDS.index(now) + 1 :]:
                price = costs[name][precision] - costs[name][now]
                saved = sizes[name][now] - sizes[name][precision]
                if saved > least_saved and spent + price <= allowance and (best is None or price / saved < best[0]):
                    best = (price / saved, name, precision)
        if best is None:
            return chosen
        chosen[best[1]] = best[2]


def _divergence(before: NDArray[np.float32], after: NDArray[np.float32]) -> NDArray[np.float64]:
    """KL of two Bernoulli distributions given by their log-odds: float64 [B], of several labels [B, L]."""
    x, y = before.astype(np.float64), after.astype(np.float64)
    p = 1 / (1 + np.exp(-x))
    # log p - log q = softplus(-y) - softplus(-x), and the same with other signs for 1 - p.
    return p * (np.logaddexp(0, -y) - np.logaddexp(0, -x)) + (1 - p) * (np.logaddexp(0, y) - np.logaddexp(0, x))
