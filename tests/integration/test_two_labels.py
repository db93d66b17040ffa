"""A model of two labels after its training: a live model, a delta, what is judged by label, and what is refused."""

import json
import shutil

import numpy as np
import polars as pl
import pytest
from sklearn.metrics import log_loss, roc_auc_score

from helpers import two_labels
from helpers.live_models import WIDE
from torchdlrm import ExportSettings, LiveModel, LiveSettings, Predictor, advance, compare, evaluate, export, importance
from torchdlrm.bundle.apply import DELTA_NAMES, apply_delta, write_delta
from torchdlrm.bundle.bundle import Bundle
from torchdlrm.bundle.delta import Delta
from torchdlrm.bundle.encoded_rows import EncodedRows
from torchdlrm.bundle.patched_bundle import PatchedBundle
from torchdlrm.bundle.served_model import ServedModel
from torchdlrm.bundle.write import complete_folder
from torchdlrm.data.dataset import Dataset, rows_of_split
from torchdlrm.errors import ConfigError, LiveError, RunError
from torchdlrm.exporting.formats import export_as
from torchdlrm.judging.recalibration import Verdict
from torchdlrm.live.gate import judge
from torchdlrm.live.preview import preview_advance
from torchdlrm.live.record import PeriodRecord
from torchdlrm.live.report import report_page
from torchdlrm.progress import SILENT


@pytest.fixture(scope="module")
def live(tmp_path_factory):
    """Two periods."""
    folder = tmp_path_factory.mktemp("shop") / "live"
    how = {"schema": two_labels.SCHEMA, "settings": LiveSettings(gate=WIDE), "progress": False}
    for day in (1, 2):
        log = two_labels.write_log(folder.with_name(f"{day}.tsv"), seed=day, num_rows=800)
        advance(folder, log, config=two_labels.config(**two_labels.HEADS["after"]), **how)
    return folder


def test_a_period_scores_every_label_and_is_judged_by_each(live, dlrm):
    record, scores = PeriodRecord.read(live / "days/0002"), pl.read_parquet(live / "days/0002/scores.parquet")
    assert record.published
    assert record.format_version == 4
    assert (record.label, record.clicks) == ("click", scores["click"].sum())
    for name, end, metrics in (
        ("click", "", record.progressive.all),
        ("purchase", "_purchase", record.progressive.labels["purchase"]),
    ):
        logit = scores[f"logit{end}"].to_numpy().astype(float)
        np.testing.assert_allclose(1 / (1 + np.exp(-logit)), scores[f"prediction{end}"], atol=1e-6)
        assert metrics["auc"] == pytest.approx(roc_auc_score(scores[name], logit))
        assert metrics["logloss"] == pytest.approx(log_loss(scores[name], 1 / (1 + np.exp(-logit))))
        asked = evaluate(live / "days/0002", label=name, progress=False)
        assert (asked["label"], asked["auc"]) == (name, pytest.approx(metrics["auc"]))
    _, period = json.loads(dlrm("inspect", live, "--json").stdout)["periods"]
    assert (period["label"], period["labels"]["purchase"]) == ("click", record.progressive.labels["purchase"])
    assert "each log, by the previous model, click" in dlrm("inspect", live).stderr
    whole = evaluate(live / "bundles/0002", live / "days/0002/dataset", "val", progress=False)
    assert whole["auc"] == pytest.approx(record.gate.new["auc"])
    purchase = record.gate.labels["purchase"]
    assert whole["labels"]["purchase"]["auc"] == pytest.approx(purchase.new["auc"])
    assert purchase.logloss_increase == pytest.approx(purchase.new["logloss"] - purchase.old["logloss"])
    page = report_page("shop", [PeriodRecord.read(live / "days/0001"), record], {}, 2)
    assert all(f"of the rows held back, {label}<" in page for label in two_labels.LABELS)
    assert "by period, click</h2>" in page


@pytest.mark.parametrize("gone_wrong", [None, "click", "purchase"])
def test_a_model_that_is_surely_worse_by_any_label_is_refused(live, tmp_path, gone_wrong):
    day, scores = live / "days/0002", pl.read_parquet(live / "days/0002/scores.parquet")
    if gone_wrong:  # the model before has known all
        logit = two_labels.SCHEMA.label_columns("logit")[0] + ("" if gone_wrong == "click" else f"_{gone_wrong}")
        scores = scores.with_columns((8.0 * pl.col(gone_wrong) - 4.0).cast(pl.Float32).alias(logit))
    scores.write_parquet(tmp_path / "scores.parquet")
    dataset = Dataset.open(day / "dataset").with_labels(two_labels.LABELS)
    settings = WIDE.model_copy(update={"max_logloss_increase": 0.1})
    gate = judge(Bundle.open(live / "bundles/0002"), dataset, tmp_path / "scores.parquet", settings, SILENT)
    assert gate.passed is (gone_wrong is None)
    assert [f"rows (label {gone_wrong}) is" in text for text in gate.reasons] == [True] * (gone_wrong is not None)


def test_a_delta_brings_every_label(live, tmp_path):
    base, full = (live / "bundles" / number for number in ("0001", "0002"))
    with complete_folder(tmp_path / "delta", DELTA_NAMES) as folder:
        write_delta(base, full, folder, SILENT)
    apply_delta(base, tmp_path / "delta", tmp_path / "applied")
    assert (tmp_path / "applied/bundle.json").read_bytes() == (full / "bundle.json").read_bytes()
    rows = [{"price": 4.5, "item": "7", "city": "Ulm"}, {"item": "ffff"}]
    patched = Predictor(PatchedBundle(Bundle.open(base), Delta.open(tmp_path / "delta")))
    np.testing.assert_array_equal(patched.predict(rows), Predictor.open(full).predict(rows))
    patched.check_sample()


def test_what_a_model_of_several_labels_cannot(live, tmp_path):
    run, dataset = live / "days/0002/run", live / "days/0002/dataset"
    with pytest.raises(ConfigError, match="buy was not learnt; there is click, purchase"):
        importance(live / "bundles/0002", dataset, "val", label="buy")
    with pytest.raises(RunError, match="has several labels"):
        export_as(run, tmp_path / "m.pt", "torchrec", dataset=dataset)
    other = two_labels.config(**{"train.labels": "purchase,click"}, **two_labels.HEADS["after"])
    with pytest.raises(LiveError, match=r"train.labels: is \['purchase', 'click'\]"):
        preview_advance(live, two_labels.write_log(tmp_path / "log.tsv", seed=3), config=other)


def is_rare(verdict):
    return verdict.loss[0] < 0.45  # that of purchases


def test_a_period_recalibrates_the_labels_that_gain(live, tmp_path, monkeypatch):
    shutil.copytree(live, tmp_path / "live", symlinks=True)
    monkeypatch.setattr(Verdict, "is_better", property(is_rare))
    log = two_labels.write_log(tmp_path / "3.tsv", seed=3, num_rows=800)
    asked = LiveSettings(gate=WIDE, export=ExportSettings(recalibrate="platt"))
    record = advance(tmp_path / "live", log, settings=asked, progress=False)
    assert record.recalibration.startswith(
        "click: platt: left out, not better by more than chance; purchase: platt: on "
    )
    assert (record.format_version, record.gate.labels["purchase"].rows) == (4, record.gate.rows)
    dataset = Dataset.open(tmp_path / "live/days/0003/dataset")
    assert record.gate.rows == dataset.splits["val"].rows // 2
    page = report_page("shop", LiveModel.open(tmp_path / "live").periods, {}, 3)
    assert "Recalibration in period 3: purchase: platt: on " in page
    run = tmp_path / "live/days/0003/run"
    plain = export(run, tmp_path / "plain", dataset=dataset.path, progress=False).bundle
    found = Bundle.open(tmp_path / "live/bundles/0003")
    assert [*found.manifest.recalibration] == ["purchase"]
    frame, _ = found.sample()
    before, after = (Predictor(of).predict(frame) for of in (plain, found))
    np.testing.assert_array_equal(before[:, 0], after[:, 0])
    assert abs(after[:, 1] - before[:, 1]).max() > 1e-4
    compared = compare(plain, found, dataset=dataset, split="val", label="purchase", progress=False)
    assert compared.about.endswith("intervals of 95 %, label purchase")
    assert compare(plain, found, dataset=dataset, split="val", progress=False).as_json()["label"] == "click"


def test_importance_is_of_the_label_that_is_asked_for(live):
    bundle, dataset = Bundle.open(live / "bundles/0002"), live / "days/0002/dataset"
    frame = pl.concat(rows_of_split(Dataset.open(dataset), "val"))
    rng = np.random.default_rng(0)
    rng.choice(frame.height, frame.height, replace=False)
    permuted = frame.with_columns(frame["city"].gather(rng.permutation(frame.height)))
    for place, label in enumerate(two_labels.LABELS):
        found = importance(bundle, dataset, "val", features=["city"], label=label)
        losses = [
            log_loss(of[label], ServedModel(bundle).predict(EncodedRows.from_frame(of, bundle.schema))[:, place])
            for of in (frame, permuted)
        ]
        change = found.differences["without city"]["logloss"].difference
        assert (found.label, change) == (label, pytest.approx(losses[1] - losses[0], abs=1e-6))


def test_files_of_predictions_are_judged_by_the_label_that_is_asked_for(live, tmp_path):
    scores = pl.read_parquet(live / "days/0002/scores.parquet").select("click", "purchase", r"^prediction.*$")
    scores.write_parquet(tmp_path / "joined.parquet")
    for name, column in (("click", "prediction"), ("purchase", "prediction_purchase")):
        found = evaluate(tmp_path / "joined.parquet", label=name, progress=False)
        assert found["auc"] == pytest.approx(roc_auc_score(scores[name], scores[column]))
