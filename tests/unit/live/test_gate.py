"""The gate objects to what is surely outside a limit, and not to what may be chance."""

import numpy as np
import pytest

from torchdlrm.judged import Judged
from torchdlrm.live.gate import objections, period_metrics
from torchdlrm.live.record import GateRecord
from torchdlrm.live.settings import GateSettings
from torchdlrm.metrics import METRICS


def judged(calibration, calibration_error, increase=None, increase_error=None, clicks=240):
    """The record of a gate whose metrics were these."""
    metrics = period_metrics(np.array([0, 1]), np.array([-1.0, 1.0]))
    return GateRecord(
        rows=972,
        old=None if increase is None else metrics,
        new=metrics | {"calibration": calibration, "clicks": clicks},
        calibration_standard_error=calibration_error,
        logloss_increase=increase,
        logloss_increase_standard_error=increase_error,
        passed=True,
        reasons=(),
    )


@pytest.mark.parametrize(
    ("gate", "said"),
    [
        (judged(1.35, 0.06), None),
        (judged(1.35, 0.03), "the calibration on 972 held-back rows is 1.3500 (standard error 0.0300), outside 0.8 to"),
        (judged(0.75, 0.04), None),
        (judged(0.75, 0.02), "is 0.7500 (standard error 0.0200), outside 0.8 to 1.25"),
        (judged(1.3, None), "is 1.3000 (standard error 0.0000), outside"),
        (judged(0.0, 0.0), "is 0.0000"),
        (judged(None, None, clicks=0), "none of the 972 held-back rows were clicked"),
        (judged(1.0, 0.0, -1.7, 0.1, clicks=972), "all of the 972 held-back rows were clicked"),
        (judged(None, None), "the clicks of the 972 held-back rows have no weight"),
        (judged(1.0, 0.05, 0.02, 0.006), None),
        (judged(1.0, 0.05, 0.02, 0.004), "0.02000 (standard error 0.00400) above the old model's; 0.01 is allowed"),
        (judged(1.0, 0.05, 0.009, 0.0), None),
    ],
)
def test_what_is_outside_a_limit_by_two_standard_errors_is_objected_to(gate, said):
    found = objections(gate, GateSettings())
    assert len(found) == (said is not None)
    assert said is None or said in found[0]
    named = [text.replace("held-back rows", "held-back rows (label click)") for text in found]
    assert objections(gate, GateSettings(), "click") == named


def test_a_log_that_lacks_its_clicks_is_told_from_one_with_few_rows():
    """Where one click is left, the calibration is as uncertain as it is large."""
    for num_rows, num_objections in ((1_000, 1), (8, 0)):
        labels, logits = np.eye(1, num_rows)[0], np.full(num_rows, -1.0)
        metrics, error = (
            period_metrics(labels, logits),
            METRICS["calibration"].estimate(Judged.of(labels, logits)).standard_error,
        )
        assert error > 0.9 * metrics["calibration"]
        assert len(objections(judged(metrics["calibration"], error), GateSettings())) == num_objections
