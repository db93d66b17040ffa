"""What a live model keeps of its periods and of its settings is read as it was written, or told what is wrong."""

import json

import pytest

from torchdlrm.errors import LiveError
from torchdlrm.live.record import (
    FeatureRecord,
    GateRecord,
    JudgedLabel,
    LogRecord,
    PeriodRecord,
    ProgressiveMetrics,
    StepTime,
    read_times,
    write_times,
)
from torchdlrm.live.settings import ExportSettings, GateSettings, LiveSettings, changed_settings, settings_toml

METRICS = {"rows": 100, "clicks": 20, "auc": 0.7, "auc_low": 0.6, "auc_high": 1.0, "logloss": 0.4, "ne": None}
RECORD = PeriodRecord(
    period=2,
    base=1,
    logs=(LogRecord(path="/logs/day_1.tsv", size_bytes=12, sha256="ab" * 32),),
    rows=100,
    clicks=20,
    progressive=ProgressiveMetrics(all=METRICS, known=None, unseen=METRICS),
    features={"cat_0": FeatureRecord(num_embeddings=9, values_in_use=7, admitted=1, expired=2, unseen_fraction=0.1)},
    gate=GateRecord(
        rows=5,
        old=METRICS,
        new=METRICS,
        calibration_standard_error=0.1,
        logloss_increase=0.0,
        logloss_increase_standard_error=None,
        passed=False,
        reasons=("worse",),
    ),
    published=False,
    bundle_bytes=1_000,
    delta_bytes=None,
)


def test_a_record_is_read_as_it_was_written(tmp_path):
    RECORD.write(tmp_path)
    assert PeriodRecord.read(tmp_path) == RECORD


def test_the_last_format_is_read_and_a_metric_of_a_later_version_is_kept(tmp_path):
    RECORD.write(tmp_path)
    path = tmp_path / "period.json"
    text = path.read_text().replace('"format_version": 2', '"format_version": 1').replace('"ne"', '"of_tomorrow"')
    path.write_text(text)
    record = PeriodRecord.read(tmp_path)
    assert "of_tomorrow" in record.progressive.all
    record.write(tmp_path)
    assert path.read_text() == text


def test_a_label_that_an_older_gate_did_not_judge_has_its_metrics(tmp_path):
    first = RECORD.gate.model_dump(exclude={"passed", "reasons", "labels"})
    gate = RECORD.gate.model_copy(update={"labels": {"purchase": JudgedLabel(**first)}})
    RECORD.model_copy(update={"format_version": 4, "label": "click", "gate": gate}).write(tmp_path)
    assert PeriodRecord.read(tmp_path).gate == gate
    path = tmp_path / "period.json"
    record = json.loads(path.read_text())
    record["gate"]["labels"]["purchase"] = METRICS
    del record["label"]
    path.write_text(json.dumps(record))
    old = PeriodRecord.read(tmp_path)
    assert (old.label, old.gate.labels["purchase"].new, old.gate.labels["purchase"].old) == ("", METRICS, None)
    old.write(tmp_path)
    assert PeriodRecord.read(tmp_path) == old


def test_a_damaged_record_is_told_with_its_file_and_key(tmp_path):
    RECORD.write(tmp_path)
    path = tmp_path / "period.json"
    path.write_text(path.read_text().replace('"rows": 100', '"rows": "many"', 1))
    with pytest.raises(LiveError, match=r"period\.json: not what .*\n.*rows.*many"):
        PeriodRecord.read(tmp_path)
    path.write_text("{")
    with pytest.raises(LiveError, match=r"period\.json"):
        PeriodRecord.read(tmp_path)
    path.unlink()
    with pytest.raises(LiveError, match=r"period\.json: cannot be read"):
        PeriodRecord.read(tmp_path)


def test_times_are_read_in_the_order_of_the_steps(tmp_path):
    assert read_times(tmp_path) == {}
    times = {"score": StepTime(seconds=1.5, bytes=10), "preprocess": StepTime(seconds=0.5, bytes=20)}
    write_times(tmp_path, times)
    assert list(read_times(tmp_path).items()) == list(times.items())


def test_what_is_given_changes_the_file_and_the_rest_stays(tmp_path):
    path = tmp_path / "live.toml"
    assert changed_settings(path, LiveSettings()) == LiveSettings()
    path.write_text(settings_toml(LiveSettings(keep_runs=9, gate=GateSettings(max_logloss_increase=0.5))))
    changes = LiveSettings(
        min_count=1, gate=GateSettings(calibration=(0.5, 2.0)), export=ExportSettings(precision="int8")
    )
    changed = changed_settings(path, changes)
    assert (changed.keep_runs, changed.min_count, changed.export.precision) == (9, 1, "int8")
    assert changed.gate == GateSettings(max_logloss_increase=0.5, calibration=(0.5, 2.0))
    path.write_text(settings_toml(changed))
    assert changed_settings(path, LiveSettings()) == changed


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("keep_runs = 0", "keep_runs: must be greater than or equal to 1, got 0"),
        ("[gate]\ncalibration = [1.0]", "gate.calibration.1: is missing"),
        ("[gate]\nlimit = 1", "gate.limit: there is no such key"),
        ("[export]\nprecison = 'int8'", "export.precison: there is no such key; did you mean precision?"),
        ("gate = 3", "gate: must be a table"),
        ("keep_runs", "not a TOML file"),
    ],
)
def test_what_is_wrong_in_the_file_is_told_with_its_key(tmp_path, text, message):
    path = tmp_path / "live.toml"
    path.write_text(text)
    with pytest.raises(LiveError) as raised:
        changed_settings(path, LiveSettings(keep_bundles=2))
    assert message in str(raised.value)
    assert "live.toml" in str(raised.value)
