"""The gate objects to what is surely outside a limit, and not to what may be chance."""

import numpy as np
import pytest

from torchdlrm.judged import Judged
from torchdlrm.live.gate import judged_label, objections, period_metrics
from torchdlrm.live.record import JudgedLabel
from torchdlrm.live.settings import GateSettings
from torchdlrm.metrics import METRICS

OPEN = GateSettings(max_logloss_increase=1e9, calibration=(0.0, 1e9))


def judged(calibration, calibration_error, increase=None, increase_error=None, clicks=240):
    """What a model is judged by whose metrics are these."""
    metrics = period_metrics(Judged.of(np.array([0, 1]), np.array([-1.0, 1.0])))
    return JudgedLabel(
        rows=972,
        old=None if increase is None else metrics,
        new=metrics | {"calibration": calibration, "clicks": clicks},
        calibration_standard_error=calibration_error,
        logloss_increase=increase,
        logloss_increase_standard_error=increase_error,
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
    found = list(objections({"click": gate}, GateSettings()))
    assert len(found) == (said is not None)
    assert said is None or said in found[0]
    named = [text.replace("held-back rows", "held-back rows (label click)") for text in found]
    assert list(objections({"click": gate, "purchase": judged(1.0, 0.1)}, GateSettings())) == named
    if gate.new["clicks"] == 240:
        named = [text.replace("click)", "purchase)") for text in named]
        assert list(objections({"click": judged(1.0, 0.1), "purchase": gate}, GateSettings())) == named


@pytest.mark.parametrize("by_old", [True, False])
@pytest.mark.parametrize("clicks", [0, 1_000])
def test_rows_of_one_class_are_no_objection_by_a_rare_label_where_they_may_be_chance(clicks, by_old):
    """Of 1,000 rows with 0.6 % each, 6 are expected, and with the highest calibration that is allowed 4.8."""
    click = judged(1.0, 0.05)
    for rate, said in ((0.004, ""), (0.006, "and at least 4.8 clicks were expected"), (0.02, "at least 16.2")):
        labels, sure = np.full(1_000, clicks // 1_000), np.full(1_000, 9.0 if clicks else -9.0)
        likely = np.full(1_000, np.log((1 - rate) / rate if clicks else rate / (1 - rate)))
        old, new = (Judged.of(labels, logits) for logits in ((likely, sure) if by_old else (sure, likely)))
        found = [*objections({"click": click, "purchase": judged_label(old, new)}, GateSettings())]
        of_class = [text for text in found if "of the 1,000 held-back rows (label purchase) were clicked" in text]
        assert len(of_class) == bool(said)
        assert said.replace("clicks", "others" if clicks else "clicks") in "".join(of_class)
        assert len([*objections({"purchase": judged_label(old, new)}, GateSettings())]) >= 1, "the first label"
        assert not [*objections({"click": click, "purchase": judged_label(None, new)}, OPEN)]


def test_a_log_that_lacks_its_clicks_is_told_from_one_with_few_rows():
    """Where one click is left, the calibration is as uncertain as it is large."""
    for num_rows, num_objections in ((1_000, 1), (8, 0)):
        labels, logits = np.eye(1, num_rows)[0], np.full(num_rows, -1.0)
        metrics, error = (
            period_metrics(Judged.of(labels, logits)),
            METRICS["calibration"].estimate(Judged.of(labels, logits)).standard_error,
        )
        assert error > 0.9 * metrics["calibration"]
        assert len(list(objections({"click": judged(metrics["calibration"], error)}, GateSettings()))) == num_objections
