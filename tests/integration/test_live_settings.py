"""When a config or setting of a live model that is given, or edited, holds: from the period on, or it is refused."""

import json
import shutil

import pytest

from helpers.live_models import CONFIG, WIDE, files_of
from torchdlrm import GateSettings, LiveModel, LiveSettings, advance
from torchdlrm.config import config_toml, load_config
from torchdlrm.errors import LiveError
from torchdlrm.live.advance import _Period
from torchdlrm.live.changes import READ_BY
from torchdlrm.live.preview import preview_advance
from torchdlrm.progress import SilentProgress
from torchdlrm.training.job import train


def changed(**sections):
    """The config with other settings in some sections."""
    updates = {name: getattr(CONFIG, name).model_copy(update=update) for name, update in sections.items()}
    return CONFIG.model_copy(update=updates)


def stop(*_, **__):
    raise ZeroDivisionError


def test_a_config_that_does_not_fit_is_refused_with_its_keys_and_changes_nothing(copied, logs, dlrm, tmp_path):
    other = tmp_path / "other.toml"
    other.write_text(config_toml(changed(model={"over_arch_layer_sizes": (32, 1)})))
    before = files_of(copied)
    for log, options in ((logs[3], ()), (logs[3], ("--dry-run",)), (logs[2], ())):  # the last one is learnt already
        done = dlrm("advance", copied, log, "--config", other, *options)
        assert done.returncode == 2
        assert f"--config: {other} does not fit what period 3 has learnt; leave it out to go on with" in done.stderr
        assert "model.over_arch_layer_sizes: is [32, 1], and was [16, 1]" in done.stderr
        assert files_of(copied) == before
    # Edited, it is refused likewise; the same settings in another file are no change.
    config = copied / "config.toml"
    written = config.read_text()
    config.write_text(other.read_text())
    with pytest.raises(LiveError, match=r"config\.toml does not fit what period 3 has learnt; change these back"):
        advance(copied, logs[3])
    config.write_text(written)
    other.write_text("# the same\n" + config_toml(CONFIG))
    assert preview_advance(copied, logs[3], config=other).new_config is None


def test_a_changed_config_is_kept_when_the_period_is_complete(copied, logs, tmp_path):
    config = tmp_path / "faster.toml"
    config.write_text("# faster\n" + config_toml(changed(table_optimizer={"learning_rate": 0.1})))
    kept = (copied / "config.toml").read_text()
    with pytest.raises(ZeroDivisionError):
        advance(copied, logs[3], config=config, train_by=stop)
    assert (copied / "config.toml").read_text() == kept
    assert advance(copied, logs[3], config=config).published
    assert (copied / "config.toml").read_text() == config.read_text()
    assert load_config(copied / "days/0004/run/config.toml", is_of_run=True).table_optimizer.learning_rate == 0.1
    # Of a log that is learnt already, neither config nor settings are kept, which is said.
    before, notes = files_of(copied), []
    progress = SilentProgress()
    progress.note = notes.append
    advance(copied, logs[3], config=CONFIG, settings=LiveSettings(keep_runs=9), progress=progress)
    assert notes == ["keep_runs, config: not kept, since nothing is learnt with it; give it with the next log"]
    assert files_of(copied) == before


@pytest.mark.parametrize(
    ("done", "settings", "config", "said"),
    [
        (
            "preprocess",
            LiveSettings(hold_back=0.3),
            None,
            "`hold_back`: is 0.3, and was 0.05 when the step preprocess",
        ),
        ("learn", LiveSettings(replay_periods=2), None, "`replay_periods`: is 2, and was 1 when the step learn of"),
        (
            "learn",
            None,
            changed(table_optimizer={"learning_rate": 0.1}),
            "`config`: is table_optimizer.learning_rate = 0.1, and was ",
        ),
        ("check", LiveSettings(gate=GateSettings(calibration=(0.5, 2.0))), None, "`gate`: is "),
    ],
)
def test_what_a_complete_step_has_read_may_not_be_changed(done, settings, config, said, copied, logs, monkeypatch):
    after = {"preprocess": "learn", "learn": "_export", "check": "_publish"}[done]
    with monkeypatch.context() as patched:
        patched.setattr(_Period, after, stop)
        with pytest.raises(ZeroDivisionError):
            advance(copied, logs[3])
    before = files_of(copied)
    with pytest.raises(LiveError) as raised:
        advance(copied, logs[3], settings=settings, config=config)
    assert str(raised.value).startswith(said)
    assert "period 4" in str(raised.value)
    assert "`restart` to begin the period again" in str(raised.value)
    assert files_of(copied) == before
    assert preview_advance(copied, logs[3], settings=settings, config=config, restart=True).removed == 4
    assert advance(copied, logs[3], settings=LiveSettings(keep_runs=5)).published  # no step reads that


def test_a_step_that_is_half_done_begins_again_with_what_was_changed(copied, logs, tmp_path, monkeypatch):
    """Preprocessing that has begun, a training that has its first run: as if they had been given it at first."""
    settings, config = LiveSettings(gate=WIDE, min_count=5, replay_periods=2), changed(train={"epochs": 2})
    expected = shutil.copytree(copied, tmp_path / "expected" / "clicks", symlinks=True)
    moved = shutil.copy(logs[3], tmp_path / "moved.tsv")
    advance(expected, moved, settings=settings, config=config)
    with monkeypatch.context() as patched:
        patched.setattr("torchdlrm.preprocessing.preprocess._finish", stop)
        with pytest.raises(ZeroDivisionError):
            advance(copied, logs[3])
    assert (copied / "days/0004/.dataset.partial/journal.jsonl").stat().st_size
    with pytest.raises(ZeroDivisionError):
        advance(copied, moved, settings=settings, train_by=replay_and_stop)
    assert (copied / "days/0004/replay/0003/run").exists()
    assert preview_advance(copied, moved, config=config).begun_again == "learn"
    advance(copied, moved, config=config)
    found, wanted = files_of(copied), files_of(expected)
    assert [name for name in wanted if found.get(name) != wanted[name]] == []
    assert found.keys() == wanted.keys()


def replay_and_stop(config, dataset, run, **arguments):
    train(config, dataset, run, **arguments)
    stop()


def test_each_setting_is_read_by_a_step_or_says_what_is_kept():
    assert {*LiveSettings.model_fields} - {*READ_BY} == {"keep_runs", "keep_bundles"}
    assert {*READ_BY} - {*LiveSettings.model_fields} == {"config"}


def test_an_unfinished_period_of_an_earlier_version_is_finished(copied, logs):
    with pytest.raises(ZeroDivisionError):
        advance(copied, logs[3], train_by=stop)
    draft = copied / "days/0004/draft.json"
    content = json.loads(draft.read_text())
    draft.write_text(json.dumps({name: content[name] for name in content if name not in ("settings", "config")}))
    assert advance(copied, logs[3], settings=LiveSettings(keep_bundles=3)).published
    assert LiveModel.open(copied).current == 4
