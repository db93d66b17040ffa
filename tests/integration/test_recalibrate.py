"""A model that is sure beyond reason is recalibrated, and everything that predicts says the same probabilities."""

import json
import urllib.request

import numpy as np
import onnxruntime
import polars as pl
import pytest
import torch

from helpers.live_models import files_of
from torchdlrm import (
    ExportOptions,
    ExportSettings,
    LiveModel,
    LiveSettings,
    Predictor,
    advance,
    apply_delta,
    export,
    export_as,
    import_weights,
    onnx_inputs,
    verify,
)
from torchdlrm.bundle.bundle import Bundle
from torchdlrm.bundle.delta import Delta
from torchdlrm.bundle.manifest import BundleManifest
from torchdlrm.bundle.patched_bundle import PatchedBundle
from torchdlrm.errors import BundleError, ConfigError
from torchdlrm.judging.recalibration import Recalibration, Verdict

SURER = 4.0


@pytest.fixture(scope="module")
def sure_run(small_run, small_dataset, tmp_path_factory):
    """`small_run`, whose logits are all four times what they were."""
    folder = tmp_path_factory.mktemp("sure")
    export_as(small_run, folder / "model.pt", "torchrec")
    weights = torch.load(folder / "model.pt")
    for name in ("over_arch.model.1.weight", "over_arch.model.1.bias"):
        weights[name] *= SURER
    return import_weights(weights, small_dataset, folder / "run").path


@pytest.fixture(scope="module")
def bundles(sure_run, tmp_path_factory):
    """The bundle as it is, and recalibrated by each method; by platt also apart for the values of a column."""
    folder = tmp_path_factory.mktemp("bundles")
    ways = {"none": {}, "by": {"recalibrate": "platt", "recalibrate_by": "cat_5"}}
    ways |= {method: {"recalibrate": method} for method in ("platt", "isotonic")}
    for name, options in ways.items():
        export(sure_run, folder / name, options=ExportOptions(name="clicks", **options), progress=False)
    return {name: folder / name for name in ways}


def test_probabilities_come_true_and_the_order_of_rows_stays(bundles):
    raw = Predictor.open(bundles["none"])
    frame, _ = raw.bundle.sample()
    logits = raw.predict_encoded(raw.encode(frame)).logits
    for name in ("platt", "isotonic", "by"):
        predictor = Predictor.open(bundles[name])
        predictor.check_sample()
        recalibration = predictor.bundle.manifest.recalibration
        verdict, slope = recalibration.verdict, recalibration.map.slope
        assert verdict.is_better
        error, by_chance = np.array(verdict.calibration_error) - verdict.by_chance, verdict.by_chance
        assert error[1] < error[0] / 2, by_chance  # which is most of it: the rows are few
        found = predictor.predict_encoded(predictor.encode(frame)).logits
        ids = predictor.encode(frame).sparse[5]
        np.testing.assert_array_equal(found, recalibration.apply(logits, ids))
        if name == "platt":
            assert 0 < slope < 0.5
            np.testing.assert_allclose(found, slope * logits + recalibration.map.values[0], rtol=1e-6, atol=1e-6)
        if name != "by":
            assert (np.diff(found[np.argsort(logits, kind="stable")]) >= 0).all()


def test_checkpoint_bundle_and_server_agree_and_metadata_tell(bundles, sure_run, small_dataset, small_log, serve):
    server = serve(bundles["by"])
    found = verify(
        bundles["by"], small_dataset, [small_log], run=sure_run, url=server.url, max_rows=300, progress=False
    )
    assert found.agrees
    assert [path.name for path in found.paths] == ["checkpoint", "bundle", "server"]
    assert max(path.agreement.largest_difference for path in found.paths) < 1e-6
    with urllib.request.urlopen(f"{server.url}/v2/models/clicks") as answer:
        assert json.load(answer)["recalibration"].startswith("platt by cat_5 (")


def test_a_bundle_without_one_is_of_the_older_format_and_a_delta_carries_one(bundles, sure_run, tmp_path):
    text = (bundles["none"] / "bundle.json").read_text()
    assert "recalibration" not in text
    assert BundleManifest.read(bundles["none"]).format_version == 2
    assert BundleManifest.read(bundles["platt"]).format_version == 8
    options = ExportOptions(recalibrate="platt")
    export(sure_run, tmp_path / "delta", delta_to=bundles["none"], options=options, progress=False)
    made = apply_delta(bundles["none"], tmp_path / "delta", tmp_path / "applied", progress=False)
    assert files_of(tmp_path / "applied") == files_of(bundles["platt"])
    patched = PatchedBundle(Bundle.open(bundles["none"]), Delta.open(tmp_path / "delta"))
    frame, _ = made.sample()
    np.testing.assert_array_equal(Predictor(patched).predict(frame), Predictor(made).predict(frame))
    Predictor(patched).check_sample()


def test_the_command_tells_repeats_itself_and_refuses(bundles, sure_run, small_run, dlrm, tmp_path):
    again = dlrm("export", sure_run, "--out", bundles["platt"], "--name", "clicks", "--recalibrate", "platt", "--json")
    assert again.returncode == 0, again.stderr
    assert "nothing was left to do" in again.stderr
    assert "recalibrated after that, platt: on " in again.stderr
    assert json.loads(again.stdout)["recalibration"]["method"] == "platt"
    other = dlrm("export", sure_run, "--out", bundles["platt"], "--name", "clicks")
    assert other.returncode == 2
    assert "recalibrated: was ('platt', None), is (None, None)" in other.stderr
    with pytest.raises(ConfigError, match=r"`recalibrate_by`: colour is none of cat_0, "):
        export(sure_run, tmp_path / "b", options=ExportOptions(recalibrate="platt", recalibrate_by="colour"))
    with pytest.raises(ConfigError, match="needs `recalibrate`"):
        export(sure_run, tmp_path / "b", options=ExportOptions(recalibrate_by="cat_5"))


def test_what_is_not_better_by_more_than_chance_is_refused_with_the_numbers(sure_run, tmp_path, monkeypatch):
    monkeypatch.setattr(Verdict, "is_better", False)
    numbers = r"platt is not better by more than chance: on \d+ rows of test .* the logloss goes from \d"
    with pytest.raises(BundleError, match=numbers):
        export(sure_run, tmp_path / "b", options=ExportOptions(recalibrate="platt"), progress=False)
    assert not [*tmp_path.iterdir()]


def test_a_graph_has_platts_two_operations_and_refuses_others(bundles, tmp_path):
    export_as(bundles["platt"], tmp_path / "model.onnx", "onnx")
    predictor = Predictor.open(bundles["platt"])
    frame, expected = predictor.bundle.sample()
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    found = session.run(None, onnx_inputs(predictor.bundle, predictor.encode(frame)))[0][:, 0]
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-6)
    for name in ("isotonic", "by"):
        with pytest.raises(BundleError, match="a graph knows platt alone"):
            export_as(bundles[name], tmp_path / "other.onnx", "onnx")


def test_a_live_model_recalibrates_where_that_helps_and_its_gate_judges_other_rows(copied, logs, monkeypatch):
    asked = LiveSettings(export=ExportSettings(recalibrate="platt"))
    monkeypatch.setattr(Verdict, "is_better", True)
    record = advance(copied, logs[3], settings=asked, progress=False)
    assert record.recalibration.startswith("platt: on the other half of ")
    live = LiveModel.open(copied)
    assert Bundle.open(live.bundle(4)).manifest.recalibration.method == "platt"
    held_back = pl.read_parquet(next(live.day(4).glob("dataset/val/*.parquet"))).height
    assert record.gate.rows == held_back // 2
    assert live.periods[-1] == record
    monkeypatch.setattr(Verdict, "is_better", False)
    record = advance(copied, logs[4], progress=False)
    assert record.recalibration == "platt: left out, not better by more than chance"
    assert Bundle.open(live.bundle(5)).manifest.recalibration is None
    assert json.loads((live.day(5) / "period.json").read_text())["format_version"] == 3
    assert "recalibration" not in (live.day(3) / "period.json").read_text()


def test_a_recalibration_by_what_is_no_feature_is_refused(bundles, tmp_path):
    manifest = BundleManifest.read(bundles["platt"])
    wrong = Recalibration.model_validate(manifest.recalibration.model_dump() | {"by": "colour"})
    manifest.model_copy(update={"recalibration": wrong}).write(tmp_path)
    with pytest.raises(BundleError, match="by colour, which is no sparse feature"):
        BundleManifest.read(tmp_path)
