"""Comparisons against SciPy's tests, against definitions pair by pair, and against how often they may be wrong."""

import json
import math
import weakref

import numpy as np
import pytest
from scipy import stats
from sklearn.metrics import log_loss, roc_auc_score

from torchdlrm.errors import ConfigError
from torchdlrm.judged import Judged
from torchdlrm.judging.comparison import Difference, Seeds, Verdict
from torchdlrm.judging.paired import compare_rows, holm
from torchdlrm.metrics import METRICS


def models(rng, num_rows, *noises):
    """Labels, and logits of models, the noisier the worse, with ties."""
    truth = rng.normal(size=num_rows)
    labels = (rng.random(num_rows) < 1 / (1 + np.exp(-truth))).astype(np.uint8)
    return labels, [(truth + rng.normal(0, noise, num_rows)).round(2).astype(np.float32) for noise in noises]


def compared(labels, *candidates, weights=None, groups=None, metric="auc"):
    """Each candidate is the logits of a model, or a list of those of several."""
    every = [one if isinstance(one, list) else [one] for one in candidates]
    return compare_rows(
        [(f"m{i}", [Judged.of(labels, x, weights, groups) for x in of]) for i, of in enumerate(every)], metric
    )


def losses(labels, logits):
    margins = np.where(labels == 1, logits, -logits.astype(np.float64))
    return np.logaddexp(0, -margins)


def test_the_standard_error_of_the_auc_is_delongs(seed):
    """From the matrix of all pairs, as the paper defines it: variances of the means over its rows and columns."""
    labels, (first, second) = models(np.random.default_rng(seed), 120, 1.0, 0.5)

    def pairs(logits):
        positives, negatives = logits[labels == 1], logits[labels == 0]
        return (positives[:, None] > negatives) + 0.5 * (positives[:, None] == negatives)

    kernel = pairs(second) - pairs(first)
    by_positive, by_negative = kernel.mean(axis=1), kernel.mean(axis=0)
    variance = by_positive.var(ddof=1) / by_positive.size + by_negative.var(ddof=1) / by_negative.size
    found = compared(labels, first, second).differences["m1"]["auc"]
    assert found.difference == pytest.approx(kernel.mean(), abs=1e-12)
    assert found.rows_error == pytest.approx(math.sqrt(variance), rel=1e-6)


def test_the_loglosses_of_two_models_are_compared_as_by_a_paired_t_test(seed):
    labels, (first, second) = models(np.random.default_rng(seed), 50, 1.0, 0.5)
    expected = stats.ttest_rel(losses(labels, second), losses(labels, first))
    found = compared(labels, first, second).differences["m1"]["logloss"]
    assert found.difference == pytest.approx(log_loss(labels, _p(second)) - log_loss(labels, _p(first)), abs=1e-9)
    assert found.p_value == pytest.approx(expected.pvalue, rel=1e-5)
    assert found.interval == pytest.approx([*expected.confidence_interval()], rel=1e-5)


def _p(logits):
    return 1 / (1 + np.exp(-logits.astype(np.float64)))


def test_recipes_whose_rows_do_not_scatter_are_compared_as_by_welchs_test(seed):
    rng, labels = np.random.default_rng(seed), np.ones(40)
    every = [[np.full(40, logit) for logit in rng.normal(0, scale, number)] for scale, number in ((1, 3), (0.3, 6))]
    found = compared(labels, *every, metric="logloss")
    values = [[losses(labels, logits).mean() for logits in of] for of in every]
    expected = stats.ttest_ind(values[1], values[0], equal_var=False)
    difference = found.differences["m1"]["logloss"]
    assert difference.p_value == pytest.approx(expected.pvalue, rel=1e-9)
    assert difference.interval == pytest.approx([*expected.confidence_interval()], rel=1e-9)
    assert difference.rows_error < 1e-15
    assert "the recipe m1 (6 seeds)" in found.verdict
    assert found.differences["m1"]["auc"].verdict == Verdict.UNDEFINED
    assert "seeds ±" in found.table()[0]


def test_the_variance_of_seeds_is_told_from_that_of_rows(seed):
    """Logloss is a mean, so that both can be had from the matrix of losses by model and row."""
    rng = np.random.default_rng(seed)
    labels, logits = models(rng, 400, *[0.5] * 6)
    scales = np.repeat([1.0, 3.0, 0.5], 2)  # models that differ on any rows
    loss = np.array([losses(labels, x * scale) for x, scale in zip(logits, scales, strict=True)])
    scaled = [(x * scale).astype(np.float32) for x, scale in zip(logits, scales, strict=True)]
    found = compared(labels, scaled[::2], scaled[1::2]).differences["m1"]["logloss"]
    second, first = loss[1::2], loss[::2]
    assert found.rows_error**2 == pytest.approx((second - first).mean(axis=0).var(ddof=1) / 400, rel=1e-5)
    for of, seeds in zip((second, first), found.seeds, strict=True):
        by_rows = (of - of.mean(axis=0)).var(axis=1, ddof=1).sum() / 2 / 400
        assert seeds.by_rows == pytest.approx(by_rows, rel=1e-5)
        assert seeds.own == pytest.approx(of.mean(axis=1).var(ddof=1) - by_rows, rel=1e-5)
    assert found.seeds_error**2 == pytest.approx(sum(one.own for one in found.seeds) / 3)


@pytest.mark.parametrize("weigh", [False, True])
def test_differences_are_those_of_the_metrics_and_their_errors_too(weigh, seed):
    rng = np.random.default_rng(seed)
    labels, (first, second) = models(rng, 300, 1.0, 0.5)
    weights = rng.choice([0.0, 0.3, 1.0, 4.0], 300).astype(np.float32) if weigh else None
    groups = rng.integers(0, 60, 300)
    judged = [Judged.of(labels, x, weights, groups) for x in (first + 1, second + 2)]
    found = compare_rows([("a", judged[:1]), ("b", judged[1:])])
    assert [*found.values["a"]] == [*METRICS]
    for name, metric in METRICS.items():
        expected, difference = metric.difference(*judged), found.differences["b"][name]
        # Also of calibrations: both are above 1, so that they differ as their distances from it do.
        assert difference.difference == pytest.approx(expected.value, abs=1e-12)
        assert difference.rows_error == pytest.approx(expected.standard_error, rel=1e-5)
    area = [roc_auc_score(labels, x, sample_weight=weights) for x in (first, second)]
    assert found.differences["b"]["auc"].difference == pytest.approx(area[1] - area[0], abs=1e-12)
    if weigh:
        doubled = [Judged.of(labels, x, 2 * weights, groups) for x in (first + 1, second + 2)]
        again = compare_rows([("a", doubled[:1]), ("b", doubled[1:])])
        assert again.differences["b"]["auc"].p_value == pytest.approx(found.differences["b"]["auc"].p_value, rel=1e-5)


def test_rows_that_were_copied_say_no_more_where_they_are_one_group(seed):
    labels, (first, second) = models(np.random.default_rng(seed), 200, 1.0, 0.5)
    once = compared(labels, first, second).differences["m1"]["logloss"]
    three = [np.repeat(x, 3) for x in (labels, first, second)]
    grouped = compared(*three, groups=np.repeat(np.arange(200), 3))
    assert grouped.differences["m1"]["logloss"].p_value == pytest.approx(once.p_value, rel=1e-5)
    assert compared(*three).differences["m1"]["logloss"].p_value < once.p_value / 2
    assert "600 rows in 200 groups" in str(grouped)


def test_calibrations_are_compared_by_their_distance_from_one(seed):
    labels, (logits, _) = models(np.random.default_rng(seed), 5000, 0.0, 0.0)
    found = compared(labels, logits - 1, logits, logits + 1, metric="calibration")
    low, right, high = (found.values[name]["calibration"][0] for name in ("m0", "m1", "m2"))
    assert low < right < high
    better, other = (found.differences[name]["calibration"] for name in ("m1", "m2"))
    assert better.difference == pytest.approx(abs(right - 1) - (1 - low))
    assert other.difference == pytest.approx((high - 1) - (1 - low))
    assert better.verdict == Verdict.BETTER
    assert found.differences["m1"]["logloss"].verdict == Verdict.BETTER


def test_verdicts_say_which_is_better_that_neither_is_or_what_it_takes(seed):
    labels, (worse, better) = models(np.random.default_rng(seed), 3000, 1.5, 0.1)
    found = compared(labels, worse, better, worse, (worse + better) / 2)
    assert [one["auc"].verdict for one in found.differences.values()] == [
        "better",
        "no difference that matters",
        "better",
    ]
    assert found.verdict.startswith("the model m1 is better than the model m0: AUC +0.")
    assert "; no difference in AUC larger than 0.00000 between the model m2 and the model m0" in found.verdict
    same = found.differences["m2"]["auc"]
    assert (same.difference, same.rows_error, same.p_value) == (0, 0, 1)
    assert compared(labels, better, worse, metric="logloss").verdict.startswith("the model m1 is worse than")
    few = compared(labels[:100], better[:100], better[:100] + worse[:100] / 20)
    assert few.verdict.startswith("too few rows to tell the model m1 from the model m0: AUC ")
    assert few.verdict.endswith(" rows with these models")
    assert "a difference of 0.001 would be seen" in few.verdict
    one_class = compared(np.ones(9), worse[:9], better[:9])
    assert one_class.verdict == "AUC of the model m1 and the model m0 is not defined on these rows"
    assert math.isnan(one_class.differences["m1"]["auc"].p_value_corrected)


def test_it_is_shown_with_intervals_as_text_and_as_json(seed):
    labels, (first, second) = models(np.random.default_rng(seed), 500, 1.0, 0.5)
    found = compared(labels, first, second)
    auc = found.differences["m1"]["auc"]
    lines = str(found).splitlines()
    assert lines[0] == "500 rows; m1 against m0, intervals of 95 %"
    assert f"from {auc.interval[0]:+.4f} to {auc.interval[1]:+.4f}" in lines[-1]
    assert [f"{end:+.4f}" in lines[2] for end in auc.interval] == [True, True]
    assert f"{auc.interval[1]:+.4f}" in found._repr_html_()
    result = json.loads(json.dumps(found.as_json()))
    (pair,) = result["pairs"]
    assert result["verdict"] == pair["verdict"] == found.verdict
    assert pair["metrics"]["auc"]["interval"] == [*auc.interval]
    assert {"difference", "p_value", "p_value_corrected", "verdict"} <= {*pair["metrics"]["logloss"]}


def test_p_values_are_corrected_by_holm():
    assert holm([0.04, 0.01, math.nan, 0.03]) == pytest.approx([0.06, 0.03, math.nan, 0.06], nan_ok=True)
    assert holm([0.9, 0.8]) == [1.0, 1.0]


def test_what_is_needed_shows_a_difference_with_a_power_of_80_percent():
    found = Difference(0.0, (0, 0), 0.002, 0.0, 1, 1, Verdict.TOO_FEW, 10_000, (Seeds(1), Seeds(1)))
    for comparisons in (1, 9):
        rows, seeds = found.needed(0.001, comparisons)
        z = 0.001 / (0.002 * math.sqrt(10_000 / rows))
        assert stats.norm.sf(stats.norm.isf(0.025 / comparisons) - z) == pytest.approx(0.8, abs=1e-3)
        assert seeds is None
    seeds = (Seeds(3, 4e-6, 1e-6), Seeds(3, 4e-6, 1e-6))
    found = Difference(0.0, (0, 0), 0.001, math.sqrt(8e-6 / 3), 1, 1, Verdict.TOO_FEW, 10_000, seeds)
    needed = found.needed(0.003)
    assert math.isinf(needed.rows), "however many rows there are, three seeds scatter too much"
    shared = 1e-6 - 2e-6 / 3
    free = 2 * (needed.seeds - 1)
    power = stats.nct.sf(stats.t.isf(0.025, free), free, 0.003 / math.sqrt(shared + 1e-5 / needed.seeds))
    assert 0.79 < power < 0.87
    assert str(needed) == f"no number of rows with these models or {needed.seeds} seeds of each on these rows"
    assert math.isinf(found.needed(0.0005).seeds)


def test_each_model_is_asked_for_when_the_one_before_is_done_with(seed):
    labels, logits = models(np.random.default_rng(seed), 100, 1, 1, 1, 1)
    alive = []

    def read(scores):
        assert [one for one in alive if one() is not None] == []
        judged = Judged.of(labels, scores)
        alive.append(weakref.ref(judged))
        return judged

    found = compare_rows((name, map(read, of)) for name, of in (("a", logits[:2]), ("b", logits[2:])))
    assert len(alive) == 4
    assert len(found.values["b"]["auc"]) == 2


def test_metrics_that_are_not_there_are_refused(seed):
    labels, every = models(np.random.default_rng(seed), 20, 1, 1)
    with pytest.raises(ConfigError, match=r"`metric`: must be one of auc, .*not 'acu'; did you mean auc"):
        compared(labels, *every, metric="acu")
    with pytest.raises(ConfigError, match="`metric`: gauc is of rows in groups"):
        compared(labels, *every, metric="gauc")


def test_models_that_do_not_differ_are_told_apart_once_in_twenty(seed):
    """A small version of benchmarks/interval_coverage.py: 300 pairs, of 5 % some 15 are, and 4 to 30 with certainty."""
    rng = np.random.default_rng(seed)
    found = [compared(labels, *every) for labels, every in (models(rng, 300, 1, 1) for _ in range(300))]
    for name in ("auc", "logloss", "ne"):
        told = sum(one.differences["m1"][name].verdict in {"better", "worse"} for one in found)
        assert 4 <= told <= 30, name
