"""What a live model refuses, and what it says; and what changes nothing."""

import shutil

import polars as pl
import pytest

from helpers.live_models import CONFIG, SCHEMA, files_of
from torchdlrm import LiveModel, LiveSettings, advance, rollback
from torchdlrm.config import ScheduleConfig, config_toml
from torchdlrm.errors import ConfigError, LiveError, LogError
from torchdlrm.live.preview import preview_advance
from torchdlrm.progress import SilentProgress


def test_what_is_wrong_is_told_before_anything_is_written(copied, logs, tmp_path):
    other = SCHEMA.model_copy(update={"name": "other"})
    empty = tmp_path / "empty"
    for error, match, arguments in (
        (LiveError, "first period needs `config` and `schema`", {"live": empty}),
        (LiveError, "first period needs `schema`", {"live": empty, "config": CONFIG}),
        (LogError, "no such file", {"live": copied, "logs": tmp_path / "none.tsv"}),
        (LiveError, "`schema`: is another than", {"live": copied, "schema": other}),
        (ConfigError, "no such config", {"live": copied, "config": "nothing"}),
        (
            LiveError,
            r"holds log-\d.tsv and no live model",
            {"live": logs[0].parent, "config": CONFIG, "schema": SCHEMA},
        ),
    ):
        before = files_of(copied)
        with pytest.raises(error, match=match):
            advance(**{"logs": logs[3], **arguments})
        assert files_of(copied) == before
    assert not empty.exists()
    (copied / "live.toml").write_text("keep_run = 3\nhold_back = 2.0\n[gate]\ncalibration = [2.0, 1.0]\n")
    with pytest.raises(LiveError, match="keep_run: there is no such key; did you mean keep_runs") as raised:
        advance(copied, logs[3])
    assert "hold_back: " in str(raised.value)
    assert "gate: calibration must be a range from low to high" in str(raised.value)


@pytest.mark.parametrize("damage", ["nowhere", "elsewhere", "folder", "missing"])
def test_a_broken_current_is_told_with_what_helps(damage, copied, logs, dlrm):
    link = copied / "current"
    link.unlink()
    if damage == "folder":
        link.mkdir()
    elif damage != "missing":
        link.symlink_to("bundles/0009" if damage == "nowhere" else "/tmp")
    before = files_of(copied)
    with pytest.raises(LiveError, match=r"current: .*dlrm rollback .*clicks N leads it to") as raised:
        advance(copied, logs[3])
    assert damage != "missing" or "period 1, 2, 3 was published" in str(raised.value)
    shown = dlrm("inspect", copied)
    assert "3 period(s), current is none" in shown.stderr
    assert f"warning: {raised.value}" in shown.stderr
    if damage == "folder":
        assert "remove it; then dlrm rollback" in str(raised.value)
        with pytest.raises(LiveError, match=r"is a folder and no link.*remove it, and do this again"):
            rollback(copied, 3)
        assert files_of(copied) == before
        link.rmdir()
    assert rollback(copied, 3).period == 3
    assert LiveModel.open(copied).current == 3


def test_a_period_that_is_damaged_is_begun_again(copied, logs, dlrm):
    """Its file is cut off; and where that is missing, what else is there is not taken for the new log's."""
    with pytest.raises(ZeroDivisionError):
        advance(copied, logs[4], train_by=lambda *_, **__: 1 / 0)
    draft = copied / "days/0004/draft.json"
    draft.write_bytes(b"")
    with pytest.raises(LiveError, match=r"draft\.json: damaged.*give `restart` to begin the period again"):
        advance(copied, logs[3])
    assert "warning: " in dlrm("inspect", copied).stderr
    assert preview_advance(copied, logs[3], restart=True).removed == 4
    draft.unlink()
    labels = [line.partition("\t")[0] for line in logs[3].read_text().splitlines()]
    assert advance(copied, logs[3]).clicks == labels.count("1")
    assert pl.read_parquet(copied / "days/0004/scores.parquet")["label"].to_list() == list(map(int, labels))
    (copied / "days/0004/period.json").unlink()
    with pytest.raises(LiveError, match="0004: has no record of the period that is current"):
        advance(copied, logs[4])


def test_a_log_that_was_learnt_from_changes_nothing(copied, logs):
    (copied / ".git").mkdir()
    (copied / ".git/HEAD").touch()  # and what its owner keeps there stays
    before = files_of(copied)
    for day in range(3):
        assert advance(copied, logs[day]) == LiveModel.open(copied).periods[day]
    assert files_of(copied) == before
    rollback(copied, 1)
    assert preview_advance(copied, logs[0]).done is not None
    preview = preview_advance(copied, logs[2])  # not by the model of period 1
    assert (preview.done, preview.draft.period, preview.draft.base) == (None, 4, 1)


def test_a_log_that_is_still_written_is_refused(copied, logs, monkeypatch, tmp_path):
    log = shutil.copy(logs[3], tmp_path / "today.tsv")

    def write_and_open(path):
        with path.open("a") as file:
            file.write("1\n")
        return path.open("rb")

    monkeypatch.setattr("torchdlrm.live.logs.open_to_read", write_and_open)
    with pytest.raises(LogError, match=r"today\.tsv: the file changed while it was read"):
        preview_advance(copied, log)


@pytest.mark.parametrize(
    ("schedule", "warned_of"),
    [
        ({"name": "cosine", "warmup_steps": 5}, ["warmup_steps is 5", "name is cosine"]),
        ({"name": "plateau"}, ["name is plateau"]),
        ({"name": "cosine", "decay_steps": 0}, []),
    ],
)
def test_a_schedule_that_every_period_repeats_is_warned_of_once(schedule, warned_of, copied, logs):
    config = CONFIG.model_copy(update={"schedule": ScheduleConfig(**schedule)})
    for expected in (warned_of, []):
        progress = Notes()
        with pytest.raises(ZeroDivisionError):
            advance(copied, logs[3], config=config, progress=progress, train_by=lambda *_, **__: 1 / 0)
        (copied / "config.toml").write_text(config_toml(config))  # as when the period is complete
        assert len(progress.lines) == len(expected)
        for line, words in zip(progress.lines, expected, strict=True):
            assert line.startswith(f"warning: schedule.{words}: the rate ")


class Notes(SilentProgress):
    """Keeps the lines that stay."""

    def __init__(self):
        self.lines = []

    def note(self, line):
        self.lines.append(line)


def test_two_at_once_are_refused(copied, logs):
    live = LiveModel.open(copied)
    with live.locked():
        for change in (lambda: advance(copied, logs[3]), lambda: rollback(copied, 2)):
            with pytest.raises(LiveError, match="another process is advancing"):
                change()


def test_a_period_that_failed_is_resumed_with_its_log_or_begun_again_with_another(copied, logs, dlrm, tmp_path):
    bad = tmp_path / "bad.tsv"
    bad.write_text(logs[3].read_text() + "no\trow\n")
    # Where no step is done, none is lost.
    with pytest.raises(LogError, match=r"rows that cannot be read\n.*\n.* skip such rows with `max_bad_rows` N"):
        advance(copied, bad)
    with pytest.raises(ZeroDivisionError):
        advance(copied, logs[3], train_by=lambda *_, **__: 1 / 0)
    shown = dlrm("inspect", copied).stderr
    assert "3 period(s), current is 3" in shown
    assert "period 4 is not complete, learnt from 3; done: score, preprocess" in shown
    with pytest.raises(LiveError, match="period 4 was begun with another log and is not complete"):
        advance(copied, bad)
    rollback(copied, 2)
    with pytest.raises(LiveError, match="period 4 was begun from period 3, and the current one is 2 now"):
        advance(copied, logs[3])
    rollback(copied, 3)
    scores = (copied / "days/0004/scores.parquet").stat()
    moved = shutil.copy(logs[3], tmp_path / "moved.tsv")
    record = advance(copied, moved)
    assert (record.period, record.rows, record.logs[0].path) == (4, 2_000, str(moved))
    assert (copied / "days/0004/scores.parquet").stat() == scores
    with pytest.raises(ZeroDivisionError):
        advance(copied, logs[4], train_by=lambda *_, **__: 1 / 0)
    record = advance(copied, bad, settings=LiveSettings(max_bad_rows=1), restart=True)
    assert (record.period, record.rows) == (5, 2_000)
    assert record.progressive.all["rows"] == 2_000
