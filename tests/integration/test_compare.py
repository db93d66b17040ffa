"""`dlrm compare` and `torchdlrm.compare`: what candidates may be, and what is refused."""

import json
import re
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from scipy import stats
from sklearn.metrics import log_loss

from torchdlrm import Bundle, ExportOptions, Run, compare, evaluate, export
from torchdlrm.errors import ConfigError, DatasetError
from torchdlrm.evaluation.compare import named_sources


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Predictions of the same 2,000 rows: a base model, three seeds of a wide one; and of other rows."""
    folder, rng = tmp_path_factory.mktemp("files"), np.random.default_rng(1)
    truth = rng.normal(-1, 1.2, 2000)
    label = (rng.random(2000) < 1 / (1 + np.exp(-truth))).astype(int)
    for name, noise in {"base": 1.5, "wide-0": 0.4, "wide-1": 0.5, "wide-2": 0.6}.items():
        logit = truth + rng.normal(0, noise, 2000)
        frame = pl.DataFrame({"label": label, "prediction": 1 / (1 + np.exp(-logit)), "user": np.arange(2000) % 300})
        frame.write_csv(folder / f"{name}.csv")
    frame.with_columns(label=1 - pl.col("label")).write_csv(folder / "other.csv")
    frame.head(1000).write_csv(folder / "short.csv")
    return folder


def test_files_of_predictions_are_compared_by_seeds_and_groups(files, dlrm):
    done = dlrm("compare", "base.csv", "wide=wide-*.csv", "--group", "user", "--power", "0.0005", "--json", cwd=files)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["verdict"].startswith("the recipe wide (3 seeds) is better than the model base.csv: AUC +0.")
    assert result["verdict"] in " ".join(done.stderr.split())
    assert (result["rows"], result["groups"], len(result["values"]["wide"]["gauc"])) == (2000, 300, 3)
    (pair,) = result["pairs"]
    assert {name: one["verdict"] for name, one in pair["metrics"].items()}["logloss"] == "better"
    low, high = pair["metrics"]["auc"]["interval"]
    assert 0 < low < pair["metrics"]["auc"]["difference"] < high
    assert {*result["power"]} == {"difference", "wide"}
    assert "wide: a difference of 0.0005 in AUC would be seen, 4 times in 5, with" in done.stderr


def test_slices_on_which_the_others_lost_are_those_of_their_first_models(files, tmp_path, dlrm):
    for name in ("base", "wide-0", "wide-1"):
        frame = pl.read_csv(files / f"{name}.csv").with_columns(city=pl.int_range(2000) % 3)
        wrong = (pl.col("city") == 2) & (pl.lit(name) != "base")
        prediction = pl.when(wrong).then(1 - pl.col("prediction")).otherwise("prediction")
        frame.with_columns(prediction=prediction).write_csv(tmp_path / f"{name}.csv")
    done = dlrm("compare", "base.csv", "wide=wide-*.csv", "--by", "city", "--json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    (pair,) = json.loads(done.stdout)["pairs"]
    worst, *others = pair["slices"]
    base, wide = (pl.read_csv(tmp_path / f"{name}.csv") for name in ("base", "wide-0"))
    assert (worst["name"], worst["worst"], worst["is_worse"], len(others)) == ("city = 2", "ne", True, 2)
    rows = base["city"] == 2
    losses = [log_loss(of.filter(rows)["label"], of.filter(rows)["prediction"]) for of in (base, wide)]
    assert worst["logloss"] == pytest.approx(losses[1] - losses[0])
    assert worst["intervals"]["logloss"][0] > 0 > others[0]["logloss"]
    assert re.search(
        r"wide, differences from base.csv: 3 slices, worst first; 1 worse .*city = 2", done.stderr, re.DOTALL
    )


def test_a_single_file_pair_is_a_paired_test_whatever_the_metric(files):
    losses = []
    for name in ("base", "wide-0"):
        frame = pl.read_csv(files / f"{name}.csv")
        losses.append(-np.log(np.where(frame["label"] == 1, frame["prediction"], 1 - frame["prediction"])))
    found = compare(files / "base.csv", f"wide={files}/wide-0.csv", metric="logloss", progress=False)
    expected = stats.ttest_rel(losses[1], losses[0])
    difference = found.differences["wide"]["logloss"]
    assert difference.p_value == pytest.approx(expected.pvalue, rel=1e-3)
    assert difference.interval == pytest.approx([*expected.confidence_interval()], rel=1e-3)


def test_a_run_its_bundles_and_their_files_are_judged_on_the_same_rows(
    small_run, small_bundle, small_dataset, tmp_path, dlrm
):
    int8 = export(small_run, tmp_path / "int8", options=ExportOptions(precision="int8")).bundle.path
    found = compare(
        Run.open(small_run), Bundle.open(int8), f"same={small_bundle}", dataset=small_dataset, progress=False
    )
    assert found.values[str(small_run)]["auc"] == pytest.approx([evaluate(small_run, progress=False)["auc"]], abs=1e-9)
    same, rounded = (found.differences[name]["auc"] for name in ("same", str(int8)))
    assert abs(same.difference) < 1e-5
    assert 0 < abs(rounded.difference) < 0.01
    done = dlrm("evaluate", small_run, "--predictions", tmp_path / "p.parquet")
    assert done.returncode == 0, done.stderr
    again = compare(small_run, tmp_path / "p.parquet", progress=False)
    assert again.differences[str(tmp_path / "p.parquet")]["logloss"].difference == pytest.approx(0, abs=1e-9)
    with pytest.raises(DatasetError, match=r"judged on different rows .*, so .* the same split"):
        compare(small_run, tmp_path / "p.parquet", split="val", progress=False)


def test_other_rows_are_refused_in_one_sentence(files, dlrm):
    done = dlrm("compare", "base.csv", "short.csv", cwd=files)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == (
        "error: base.csv and short.csv were judged on different rows (2,000 and 1,000), so a difference would say "
        "nothing about the models; let both predict the same split of the same dataset, or the same log\n"
    )
    with pytest.raises(DatasetError, match=r"\(their labels or weights differ\)"):
        compare(files / "base.csv", files / "other.csv", progress=False)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("base.csv", "CANDIDATES: two or more that differ are compared, and base.csv is there alone"),
        ("wide-*.csv", "and wide-*.csv is one recipe with 3 seeds"),
        ("base.csv deep=deep-*.csv", "CANDIDATES: nothing matches deep-*.csv"),
        ("base.csv base2.csv", "base2.csv: there is no such file; did you mean base.csv?"),
        ("base.csv wide-0.csv --metric acu", "--metric: must be one of auc, "),
        ("base.csv wide-0.csv --metric gauc", "--metric: gauc is of rows in groups; --group names the column"),
        ("base.csv wide-0.csv --power 0", 'Invalid value "0.0" for --power. Must be > 0.'),
        ("base.csv wide-0.csv --pover 1", "--pover"),
        ("base.csv base.csv", "CANDIDATES: two or more that differ are compared, and base.csv is there alone"),
    ],
)
def test_mistakes_are_answered(words, message, files, dlrm):
    done = dlrm("compare", *words.split(), cwd=files)
    assert (done.returncode, done.stdout) == (2, "")
    assert message in done.stderr


def test_candidates_are_called_as_they_are_given_or_named(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("a/wide-8", "a/wide-9", "a=b/c", "plain"):
        (tmp_path / name).mkdir(parents=True)
    found = named_sources(["plain/", Path("a/wide-8"), "a/wide-*", "deep=a/wide-9", "a=b/c"])
    assert {name: [*map(str, of)] for name, of in found.items()} == {
        "plain": ["plain/"],
        "a/wide-8": ["a/wide-8"],
        "a/wide-*": ["a/wide-8", "a/wide-9"],
        "deep": ["a/wide-9"],
        "a=b/c": ["a=b/c"],
    }
    with pytest.raises(ConfigError, match="plain is there alone"):
        named_sources(["plain", "plain/"])


def test_a_period_of_a_live_model_is_compared_with_a_file(three_days, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    scores = three_days / "days" / "0003" / "scores.parquet"
    frame = pl.read_parquet(scores).with_columns(logit=pl.col("logit") * 0.5)
    frame.write_parquet(tmp_path / "half.parquet")
    found = compare(three_days / "days" / "0003", "half=half.parquet", metric="logloss", progress=False)
    assert found.differences["half"]["auc"].difference == 0
    assert found.differences["half"]["logloss"].p_value < 1
