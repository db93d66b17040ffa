"""The log of a shop: its bytes, its columns, and the truth about its labels and inputs against the rows themselves."""

import hashlib

import numpy as np
import polars as pl
import pytest
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score

from torchdlrm import preprocess
from torchdlrm.errors import ConfigError
from torchdlrm.synthetic import log as synthetic_log
from torchdlrm.synthetic.log import schema_path
from torchdlrm.synthetic.rows import BLOCK_ROWS
from torchdlrm.synthetic.synthesize import synthesize

NUM_ROWS = 50_001


@pytest.fixture(scope="module", params=[("purchase",), ("content", "purchase"), ("history",)], ids="-".join)
def made(request, tmp_path_factory):
    path = tmp_path_factory.mktemp("shop") / "log.tsv"
    truth = synthesize(path, rows=NUM_ROWS, seed=2, extras=request.param)
    return path, truth, pl.read_csv(path, separator="\t")


def test_bytes_are_those_of_the_seed_whatever_the_chunks_and_a_shorter_log_begins_alike(made, tmp_path, monkeypatch):
    path, truth, log = made
    extras = truth.preset.removeprefix("shop with ").split(" and ")
    monkeypatch.setattr(synthetic_log, "BLOCK_ROWS", 3 * BLOCK_ROWS)
    again = synthesize(tmp_path / "again.tsv", rows=NUM_ROWS, seed=2, extras=extras)
    assert again == truth
    digests = [hashlib.sha256(file.read_bytes()).hexdigest() for file in (path, tmp_path / "again.tsv")]
    assert digests[0] == digests[1]
    synthesize(tmp_path / "short.tsv", rows=5_000, seed=2, extras=extras)
    assert path.read_bytes().startswith((tmp_path / "short.tsv").read_bytes())
    assert log.columns == [
        "click",
        *(["purchase"] * ("purchase" in extras)),
        *log.columns[1 + ("purchase" in extras) :],
    ]


def test_a_purchase_follows_a_click_and_is_rare(made):
    _, truth, log = made
    assert truth.click_rate == log["click"].mean() == pytest.approx(0.25, abs=0.02)
    if "purchase" in log.columns:
        assert log.filter(pl.col("purchase") > pl.col("click")).is_empty()
        of_purchase = truth.splits["whole.purchase"]
        assert of_purchase.click_rate == log["purchase"].mean() == pytest.approx(0.03, abs=0.005)
        assert 0.8 < of_purchase.auc < 0.92
        assert of_purchase.logloss < 0.12


def test_content_says_who_clicks_on_items_that_are_new_and_the_item_says_nothing(made):
    _, truth, log = made
    if "content" not in log.columns:
        return
    train = NUM_ROWS - NUM_ROWS // 7
    new = set(log["item"][train:]) - set(log["item"][:train])
    assert len(new) > 0.8 * log["item"][train:].n_unique()
    vectors = np.array([[*map(float, cell.split(","))] for cell in log["content"]])
    assert np.linalg.norm(vectors, axis=1) == pytest.approx(1)
    model = LogisticRegression().fit(vectors[:train], log["click"][:train])
    reached = roc_auc_score(log["click"][train:], model.decision_function(vectors[train:]))
    assert truth.splits["held_out.without_content"].auc == 0.5
    assert 0.65 < reached < truth.splits["held_out"].auc  # without the tastes of groups


def test_a_history_with_a_similar_item_is_clicked_more(made):
    _, truth, log = made
    if "history" not in log.columns:
        return
    lists = log["history"].str.split(",").cast(pl.List(pl.Int64)).fill_null([])
    assert lists.list.len().max() == 20
    has_the_same = pl.DataFrame({"h": lists, "i": log["item"]}).select(pl.col("h").list.contains(pl.col("i")))["h"]
    assert log["click"].filter(has_the_same).mean() > log["click"].filter(~has_the_same).mean() + 0.15
    assert truth.splits["test.without_history"].auc < truth.splits["test"].auc - 0.07


def test_a_dataset_is_made_of_it(tmp_path):
    synthesize(tmp_path / "log.tsv", rows=3_000, extras=["purchase"])
    dataset = preprocess(tmp_path / "log.tsv", tmp_path / "dataset", schema_path(tmp_path / "log.tsv"))
    assert [column.name for column in dataset.schema.labels] == ["click", "purchase"]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"extras": ["content", "history"]}, "choose one; new items"),
        ({"extras": ["taste"]}, "Got taste"),
        ({"extras": ["content"], "days": 2}, "are not for a log with two"),
        ({"extras": ["content"], "preset": "criteo-1tb"}, "are not for a log with two"),
    ],
)
def test_options_that_do_not_combine_are_refused(tmp_path, options, words):
    with pytest.raises(ConfigError, match=words):
        synthesize(tmp_path / "log.tsv", rows=10, **options)
    assert not list(tmp_path.iterdir())
