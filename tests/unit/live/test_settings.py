import pytest

from torchdlrm.errors import LiveError
from torchdlrm.live.settings import ExportSettings, GateSettings, LiveSettings, changed_settings, settings_toml


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
