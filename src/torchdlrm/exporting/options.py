"""Defines the options of an export: those of `dlrm export`, and what `export` takes in Python.

A file of its own, because the command line reads it before torch is loaded.
"""

from dataclasses import dataclass
from typing import Annotated, Literal

from cyclopts import Parameter
from cyclopts.validators import Number

from torchdlrm.bundle import DensePrecision, TablePrecision
from torchdlrm.judging import RecalibrationMethod


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class ExportOptions:
    """How a run is exported.

    Attributes:
        precision: Of the tables; auto measures what each table would cost at each precision, and chooses.
        dense_precision: Of the matrix products; auto takes bfloat16 where the tables are not float32 and the model is
            large enough.
        max_logloss_increase: What a lower precision may cost in nats, in the choice of auto (0.0001 when not given) and
            in the check at the end (when not given: what the precision usually explains).
        checkpoint: best (the highest AUC of the val split; the last where nothing was validated), last, or a step.
        name: Name of the model, shown by the server; the folder's name when not given.
        check_rows: Predict at most this many held-out rows by checkpoint and by bundle.
        recalibrate: Make probabilities that come true: fitted on the val split, refused where it is not better on the
            test split by more than chance.
        recalibrate_by: Do so apart for each frequent value of this categorical column, and for all others.
        recalibrate_if_better: Leave it out where it is not better, instead of refusing it; in Python alone.
    """

    precision: TablePrecision | Literal["auto"] = "float32"
    dense_precision: DensePrecision | Literal["auto"] = "auto"
    max_logloss_increase: Annotated[float | None, Parameter(validator=Number(gte=0))] = None
    checkpoint: str = "best"
    name: str | None = None
    check_rows: Annotated[int, Parameter(validator=Number(gte=1))] = 100_000
    recalibrate: RecalibrationMethod | None = None
    recalibrate_by: str | None = None
    recalibrate_if_better: Annotated[bool, Parameter(parse=False)] = False
