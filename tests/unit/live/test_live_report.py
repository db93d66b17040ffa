"""The page of a live model says what the records of its periods say, whatever they lack."""

import re

from helpers.live_records import made_up
from helpers.pages import tables_of
from torchdlrm.live.report import report_page

NOTHING = dict.fromkeys(("auc", "auc_low", "auc_high", "ne", "calibration")) | {"rows": 9, "clicks": 0, "logloss": 0.1}


def page_of(periods, times, current=None):
    return report_page("Live model ads", periods, times, periods[-1].period if current is None else current)


def test_the_page_tells_what_is_in_the_records():
    periods, times = made_up(9)
    page = page_of(periods, times)
    rows = tables_of(page)
    newest = periods[-1]
    assert [row[0] for row in rows[-9:]] == [str(number) for number in range(9, 0, -1)]
    line = dict(zip(rows[-10], rows[-9], strict=True))
    judged = newest.progressive.all
    assert line["published"] == "current"
    assert line["log"] == "day_08.tsv"
    assert [line["AUC"], line["from"], line["to"]] == [f"{judged[name]:.4f}" for name in ("auc", "auc_low", "auc_high")]
    assert line["unknown %"] == "6.00", "the mean of 9 % and 3 %"
    assert line["gate: before"] == f"{newest.gate.old['logloss']:.4f}"
    assert line["seconds"] == f"{sum(step.seconds for step in times[9].values()):.1f}"
    admitted = sum(record.features["cat_0"].admitted for record in periods)
    features = dict(zip(rows[0], rows[1], strict=True))
    assert features["feature"] == "cat_0"
    assert features["admitted in all"] == f"{admitted:,}"
    mean = sum(record.progressive.all["auc"] for record in periods[-7:]) / 7
    assert f"<b>{mean:.4f}</b><span>mean AUC of the last 7 periods</span>" in page
    assert "<b>9</b><span>current" in page
    assert "All periods passed." in page
    for caption in ("AUC", "normalised entropy", "calibration: ", "logloss, nats", "unknown values", "size of all"):
        assert f"<figcaption>{caption}" in page
    assert f"all rows: {judged['ne']:.5g} in period 9" in page


def test_the_interval_is_drawn_around_the_auc_of_all_rows_alone():
    page = page_of(*made_up(5))
    bands = re.findall(r'<polygon points="([^"]+)"', page)
    assert len(bands) == 1
    points = [tuple(map(float, point.split(","))) for point in bands[0].split()]
    assert len(points) == 2 * 4, "the first period has none"
    assert all(low[1] > high[1] for low, high in zip(points[:4], points[:3:-1], strict=True)), "pixels grow downward"


def test_a_calibration_of_1_is_marked_and_the_axis_says_how_far_it_is():
    periods, times = made_up(2)
    figure = page_of(periods, times).partition("<figcaption>calibration: ")[2].partition("</figure>")[0]
    assert figure.count('class="mark"') == 1
    shown = re.findall(r'text-anchor="end">([^<]+)<', figure)
    assert len(set(shown)) == len(shown) >= 4, "values of the axis differ"
    assert min(map(float, shown)) <= 0.95
    assert max(map(float, shown)) >= 1.05


def test_a_model_of_one_period_has_no_metrics_yet_and_one_of_none_has_a_page():
    assert "No period is complete yet." in report_page("Live model ads", [], {}, None)
    page = page_of(*made_up(1))
    rows = tables_of(page)
    assert "Nothing yet: the first period has no model before it." in page
    line = dict(zip(rows[-2], rows[-1], strict=True))
    assert [line[name] for name in ("base", "AUC", "NE", "unknown %", "gate: before")] == ["-"] * 5
    assert "values that came and went" not in page


def test_a_period_that_did_not_pass_is_told_with_the_reasons():
    periods, times = made_up(4, failing={3})
    page = page_of(periods, times)
    assert "Period 3 did not pass: logloss rose by 0.2; it is &lt;worse&gt;." in page
    assert "<b>1</b><span>periods that did not pass the gate</span>" in page
    lines = {row[0]: row[2] for row in tables_of(page)[-4:]}
    assert lines == {"4": "current", "3": "no", "2": "yes", "1": "yes"}


def test_metrics_may_be_undefined_and_features_without_vocabularies():
    periods, _ = made_up(3)
    hashed = {"num_embeddings": 100, "values_in_use": None, "admitted": 0, "expired": 0, "unseen_fraction": None}
    periods = [
        record.model_copy(
            update={
                "features": {"h": type(record.features["cat_0"])(**hashed)},
                "progressive": record.progressive and record.progressive.model_copy(update={"all": NOTHING}),
            }
        )
        for record in periods
    ]
    page = page_of(periods, {})
    tables_of(page)
    assert "size of all vocabularies" not in page
    assert "seconds of each step" not in page
    assert "<b>-</b><span>AUC of period 3" in page


def test_a_year_of_periods_is_a_page_of_moderate_size():
    periods, times = made_up(400)
    page = page_of(periods, times)
    rows = tables_of(page)
    assert rows[-1][0] == "1"
    assert len(rows) > 400
    assert len(page) < 800_000
    assert "seconds of each step, last 60 periods" in page


def test_the_page_needs_nothing_but_itself():
    page = report_page("<b>live", *made_up(2), current=2)
    assert re.findall(r"<script|<link|\b(?:src|href)=|url\(|@import", page) == []
    assert "<b>live" not in page
