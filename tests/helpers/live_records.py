"""Made-up records of a live model's periods."""

import numpy as np

from torchdlrm.live.record import (
    FeatureRecord,
    GateRecord,
    LogRecord,
    PeriodRecord,
    ProgressiveMetrics,
    StepTime,
)

STEPS = {"score": 3.0, "preprocess": 8.0, "learn": 20.0, "export": 5.0, "check": 1.5, "publish": 0.1}


def metrics(rows, auc, error, calibration):
    return {
        "rows": rows,
        "clicks": rows // 4,
        "auc": auc,
        "auc_low": auc - error,
        "auc_high": auc + error,
        "logloss": 0.9 - 0.55 * auc,
        "ne": 1.6 - auc,
        "calibration": calibration,
    }


def made_up(num_periods, failing=()):
    """Records of so many periods, and what their steps took."""
    rng = np.random.default_rng(3)
    periods, times, base = [], {}, None
    for period in range(1, num_periods + 1):
        auc = 0.74 + 0.03 * (1 - np.exp(-period / 5)) + 0.004 * rng.normal()
        judged = ProgressiveMetrics(
            all=metrics(200_000, auc, 0.002, 1 + 0.03 * rng.normal()),
            known=metrics(150_000, auc + 0.01, 0.003, 1 + 0.03 * rng.normal()),
            unseen=metrics(50_000, auc - 0.03, 0.005, 1.05 + 0.03 * rng.normal()),
        )
        passed = period not in failing
        reasons = () if passed else ("logloss rose by 0.2", "it is <worse>")
        gate = GateRecord(
            rows=10_000,
            old=None if base is None else metrics(10_000, auc, 0.01, 1.0),
            new=metrics(10_000, auc + 0.003 if passed else auc - 0.02, 0.01, 1.0),
            calibration_standard_error=0.02,
            logloss_increase=None if base is None else -0.002 if passed else 0.011,
            logloss_increase_standard_error=None if base is None else 0.001,
            passed=passed,
            reasons=reasons,
        )
        features = {
            f"cat_{i}": FeatureRecord(
                num_embeddings=1_000 * (4 - i) + 10 * min(period, 30),
                values_in_use=1_000 * (4 - i) + 7 * min(period, 30),
                admitted=int(rng.integers(20, 90)) if base else 1_000 * (4 - i),
                expired=int(rng.integers(10, 80)) if period > 4 else 0,
                unseen_fraction=None if base is None else (0.09, 0.03)[i],
            )
            for i in range(2)
        }
        periods.append(
            PeriodRecord(
                period=period,
                base=base,
                logs=(LogRecord(path=f"/logs/day_{period - 1:02d}.tsv", size_bytes=1, sha256="ab" * 32),),
                rows=200_000,
                clicks=50_000,
                progressive=None if base is None else judged,
                features=features,
                gate=gate,
                published=passed,
                bundle_bytes=40_000_000 + 100_000 * period,
                delta_bytes=None if base is None else 900_000,
            )
        )
        times[period] = {
            name: StepTime(seconds=seconds * (1 + 0.1 * rng.random()), bytes=int(1e6 * seconds))
            for name, seconds in STEPS.items()
        }
        base = period if passed else base
    return periods, times
