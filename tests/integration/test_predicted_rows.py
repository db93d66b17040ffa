"""Predicted rows come from a run, a bundle, a period of a live model or a file, in one order and with their columns."""

import json
import re
from dataclasses import replace

import numpy as np
import polars as pl
import pytest
from sklearn.metrics import log_loss, roc_auc_score

from helpers.raw_logs import read_criteo
from torchdlrm import evaluate
from torchdlrm.cli.evaluate import evaluate as evaluate_command
from torchdlrm.cli.options import Judging
from torchdlrm.data.dataset import Dataset
from torchdlrm.errors import ConfigError, DatasetError, LiveError, RunError, UserError
from torchdlrm.evaluation.predictions import Asked, predicted_rows, write_predictions
from torchdlrm.evaluation.split_rows import UNKNOWN_VALUE
from torchdlrm.judging.slices import slices


@pytest.fixture(scope="module")
def rows(small_run):
    return predicted_rows(small_run, Asked(split="val+test", columns=["cat_0", "int_0", "label"]))


@pytest.fixture(scope="module")
def held_out(small_log):
    """The rows of val and test as the log has them."""
    return read_criteo(small_log).tail(714)


def test_they_are_in_the_order_of_the_log_with_its_values(rows, held_out):
    labels, logits = rows.judged.labels, rows.judged.logits
    assert (labels.dtype, logits.dtype, rows.judged.weights, rows.judged.groups) == (np.uint8, np.float32, None, None)
    np.testing.assert_array_equal(labels, held_out["label"])
    found = rows.columns
    assert found.columns == ["cat_0", "int_0", "label"]
    np.testing.assert_array_equal(found["label"], held_out["label"])
    assert found["int_0"].equals(held_out["int_0"].fill_null(0))
    is_known = found["cat_0"].ne_missing(UNKNOWN_VALUE)
    assert 0.5 < is_known.mean() < 1
    assert found["cat_0"].filter(is_known).equals(held_out["cat_0"].filter(is_known), null_equal=True)
    assert rows.name == "run"
    assert rows.about == {"split": "val+test", "label": "label", "step": 67, "checkpoint": "best"}


def test_a_bundle_has_the_same_rows_found_by_itself(rows, small_bundle, small_run, small_dataset, tmp_path):
    with pytest.raises(RunError, match="made of a run called 'run', which is neither beside it nor here"):
        predicted_rows(small_bundle)
    beside = tmp_path / "bundle"
    beside.symlink_to(small_bundle)
    found = predicted_rows(small_bundle, Asked(dataset=small_dataset, split="val+test"))
    np.testing.assert_allclose(found.judged.logits, rows.judged.logits, atol=1e-5)
    assert (found.rows, found.about) == (rows.rows, rows.about)
    assert predicted_rows(small_run).rows != rows.rows


@pytest.mark.parametrize("name", ["p.parquet", "p.csv", "p.csv.gz"])
def test_what_is_written_is_read_as_it_was(rows, tmp_path, name):
    own = replace(rows, columns=rows.columns.drop("label"))
    write_predictions(own, tmp_path / name)
    found = predicted_rows(tmp_path / name, Asked(columns=["cat_0", "int_0"], group="int_0"))
    np.testing.assert_array_equal(found.judged.labels, rows.judged.labels)
    np.testing.assert_array_equal(found.judged.logits, rows.judged.logits)
    assert (found.rows, found.name, found.about) == (rows.rows, name, {"label": "label"})
    assert found.columns["int_0"].equals(rows.columns["int_0"])
    groups = pl.DataFrame({"code": found.judged.groups, "value": rows.columns["int_0"]})
    assert groups.unique().height == groups["code"].n_unique() == groups["value"].n_unique()


def test_a_file_of_another_program_needs_a_label_and_a_probability_alone(tmp_path):
    rng = np.random.default_rng(3)
    p, w = rng.random(200), rng.choice([0.0, 0.5, 2.0], 200)
    clicked = rng.random(200) < p
    frame = pl.DataFrame({"clicked": clicked, "prediction": p, "w": w, "user": rng.integers(0, 20, 200)})
    # A row without a label or a prediction is not judged.
    frame = pl.concat([frame, pl.DataFrame({"prediction": [0.5, None], "clicked": [None, True]})], how="diagonal")
    frame.write_csv(tmp_path / "p.csv")
    found = evaluate(tmp_path / "p.csv", label="clicked", weight="w", group="user")
    assert (found["rows"], found["groups"], found["label"]) == (200, 20, "clicked")
    assert found["auc"] == pytest.approx(roc_auc_score(clicked, p, sample_weight=w), abs=1e-6)
    assert found["logloss"] == pytest.approx(log_loss(clicked, p, sample_weight=w), abs=1e-6)
    for name, (low, high) in found["intervals"].items():
        assert low < found[name] < high, name
    for options, message in (
        ({}, "`label`: .*p.csv has no column 'label'; it has clicked, prediction, w, user"),
        ({"label": "user"}, r"p.csv, row \d: user is \d+, prediction is 0.\d+; a label is 0 or 1"),
        ({"label": "clicked", "group": "usr"}, "`group`: .* has no column 'usr'"),
        ({"label": "clicked", "columns": ["x"]}, "has no column 'x'"),
        ({"label": "clicked", "columns": ["row"]}, "`columns`: row is what a column of the predictions' own is called"),
        ({"label": "clicked", "split": "val"}, "`split`: is not for a file"),
    ):
        with pytest.raises(UserError, match=message):
            evaluate(tmp_path / "p.csv", **options)
    frame.with_columns(pl.when(pl.int_range(pl.len()) > 10).then("user").alias("user")).write_csv(tmp_path / "p.csv")
    with pytest.raises(UserError, match="`group`: user is missing in 11 of 200 rows, which are no group"):
        evaluate(tmp_path / "p.csv", label="clicked", group="user")
    frame.with_columns(prediction=pl.col("prediction") - 0.5).write_parquet(tmp_path / "q.parquet")
    with pytest.raises(UserError, match=r"q\.parquet, row 0: clicked is False, prediction is -0"):
        evaluate(tmp_path / "q.parquet", label="clicked")
    with pytest.raises(UserError, match=r"r.parquet: there is no such file; did you mean q.parquet\?"):
        evaluate(tmp_path / "r.parquet")
    (tmp_path / "r.parquet").write_text("not Parquet")
    with pytest.raises(UserError, match=r"r\.parquet: "):
        evaluate(tmp_path / "r.parquet")


def test_a_period_of_a_live_model_is_its_log_before_it_was_learnt(copied):
    from torchdlrm import LiveModel

    days = copied / "days"
    found = evaluate(days / "0003")
    expected = LiveModel.open(copied).periods[2].progressive.all
    assert found["rows"] == expected["rows"] == 2_000
    assert found["auc"] == pytest.approx(expected["auc"], abs=1e-12)
    assert found["intervals"]["auc"] == pytest.approx([expected["auc_low"], expected["auc_high"]], abs=1e-12)
    with pytest.raises(LiveError, match="0001: is the first period of a live model"):
        evaluate(days / "0001")
    with pytest.raises(RunError, match="is a live model, not a run"):
        evaluate(copied)
    assert evaluate(copied / "current", split="val")["rows"] > 0, "its dataset is found"


def test_groups_of_a_dataset_are_its_ids_unless_they_are_none(small_run, small_dataset, tmp_path, monkeypatch):
    for group, message in (
        ("cat_0", r"`group`: cat_0 has no id for \d+.\d% of its values in test, which are no group"),
        (
            "user_id",
            "`group`: user_id is not in .*, which has label, int_0, .*`dlrm predict BUNDLE LOG --columns label,user_id",
        ),
    ):
        with pytest.raises(DatasetError, match=message):
            predicted_rows(small_run, Asked(group=group))
    with pytest.raises(ConfigError, match="`label`: click was not learnt; there is label"):
        predicted_rows(small_run, Asked(label="click"))
    columns = small_dataset.schema.columns
    hashed = [column.model_copy(update={"hash": 50}) if column.name == "cat_1" else column for column in columns]
    with monkeypatch.context() as patched:
        patched.setattr(Dataset, "schema", small_dataset.schema.with_columns(hashed))
        with pytest.raises(DatasetError, match="`group`: cat_1 was hashed, so that values share an id"):
            predicted_rows(small_run, Asked(group="cat_1"))
        with pytest.raises(DatasetError, match="column cat_1 was hashed"):
            predicted_rows(small_run, Asked(columns=["cat_1"]))


def test_the_command_shows_intervals_and_writes_what_it_judged(small_run, dlrm, tmp_path):
    out = tmp_path / "p.parquet"
    done = dlrm("evaluate", small_run, "--predictions", out, "--columns", "cat_3,int_2", "--json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert json.loads((small_run / "evaluation" / "test.json").read_text()) == told
    low, high = told["intervals"]["auc"]
    assert f"{told['auc']:.5f}" in done.stderr
    assert f"{low:.5f} to {high:.5f}" in done.stderr
    assert "its AUC is known to about +-0.0" in done.stderr
    assert f"evaluated test: AUC {told['auc']:.4f} ({low:.4f} to {high:.4f})" in dlrm("inspect", small_run).stderr
    frame = pl.read_parquet(out)
    assert frame.columns == ["row", "cat_3", "int_2", "label", "prediction", "logit"]
    again = dlrm("evaluate", out, "--json", "--group", "int_2", cwd=tmp_path)
    assert again.returncode == 0, again.stderr
    found = json.loads(again.stdout)
    assert {name: found[name] for name in ("auc", "logloss", "rows", "clicks")} == pytest.approx(
        {name: told[name] for name in ("auc", "logloss", "rows", "clicks")}
    )
    assert found["groups"] == frame["int_2"].n_unique()
    assert "gauc" in again.stderr
    wrong = dlrm("evaluate", out, "--nproc-per-node", 2, cwd=tmp_path)
    assert (wrong.returncode, "is no run, which alone is spread over processes" in wrong.stderr) == (2, True)


def test_slices_are_those_of_the_rows_and_of_two_splits(rows, small_run, tmp_path, capsys):
    found = evaluate(small_run, split="val+test", by="cat_0, int_0*cat_1")["slices"]
    columns = predicted_rows(small_run, Asked(split="val+test", columns=["cat_0", "int_0", "cat_1"])).columns
    assert found == [part.as_json() for part in slices(rows.judged, columns, "cat_0,int_0*cat_1")]
    assert {part["name"] for part in found} >= {"cat_0 = others", "int_0*cat_1 = others"}
    evaluate_command(small_run, judging=Judging(by="cat_0"), against="val", as_json=True)
    out, err = capsys.readouterr()
    ours, *others = json.loads(out)["slices"]
    assert ours["before"]["rows"] + sum(part["before"]["rows"] for part in others) == 357
    assert f"{len(others) + 1} slices, worst first; 0 worse by more than chance explains" in err
    assert re.search(r"cat_0 = others .* \d\.\d{3} → \d\.\d{3}", err)
    path = tmp_path / "p.parquet"
    write_predictions(replace(rows, columns=rows.columns.drop("label")), path)
    (own, *_) = evaluate(path, by="cat_0")["slices"]
    assert own in evaluate(small_run, split="val+test", by="cat_0")["slices"]
    for options, message in (
        ({"against": "val"}, "`against`: compares slices; say with `by` which"),
        ({"by": "cat_0,cat_77"}, "column cat_77 is not in"),
        ({"predictions": "p.txt"}, r"`predictions`: p\.txt must end in \.parquet, \.csv or \.csv\.gz$"),
    ):
        with pytest.raises(UserError, match=message):
            evaluate(small_run, **options)
