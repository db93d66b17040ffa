"""Which features a model uses, on a log whose truth is known; what its tables hold, beside NumPy."""

import json

import numpy as np
import polars as pl
import pytest
import torch

from helpers.pages import tables_of
from torchdlrm.bundle.encoded_rows import EncodedRows
from torchdlrm.bundle.served_model import ServedModel
from torchdlrm.bundle.table_lookup import TableLookup
from torchdlrm.config import load_config
from torchdlrm.data.dataset import Dataset, rows_of_split
from torchdlrm.errors import ConfigError, RunError
from torchdlrm.evaluation.report import report_page
from torchdlrm.exporting.export import export
from torchdlrm.exporting.options import ExportOptions
from torchdlrm.features.schema import criteo_schema
from torchdlrm.insight.importance import importance
from torchdlrm.insight.tables import nearest, table_uses
from torchdlrm.preprocessing.preprocess import PreprocessOptions, preprocess
from torchdlrm.progress import SILENT
from torchdlrm.synthetic.rows import RowGenerator
from torchdlrm.synthetic.synthesize import synthesize
from torchdlrm.training.job import train
from torchdlrm.training.run import Run

ROWS, SEED = 30_000, 1
UNUSED = ("int_3", "cat_7")  # their values are dealt out anew among the rows: the truth does not use them
FEATURES = [column.name for column in criteo_schema().features]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("synthetic")
    synthesize(folder / "log.tsv", rows=ROWS, seed=SEED, progress=False)
    names = ["label", *FEATURES]
    log = pl.read_csv(folder / "log.tsv", separator="\t", has_header=False, new_columns=names, infer_schema=False)
    log = log.with_columns(pl.col(name).shuffle(SEED) for name in UNUSED)
    log.write_csv(folder / "log.tsv", separator="\t", include_header=False)
    preprocess([folder / "log.tsv"], folder / "dataset", criteo_schema(), PreprocessOptions())
    train(load_config("criteo-small", {"logging.tensorboard": "false"}), folder / "dataset", folder / "run")
    return folder / "run"


@pytest.fixture(scope="module")
def bundle(run):
    return export(run, run.parent / "bundle").bundle


@pytest.fixture(scope="module")
def found(bundle):
    return importance(bundle, split="val+test", groups={"unused": UNUSED, "counts": ["int_*"]})


def test_the_truth_is_found(found):
    losses = {name.removeprefix("without "): changes["logloss"] for name, changes in found.differences.items()}
    assert losses.keys() == {*FEATURES, "unused", "counts"}
    for name in (*UNUSED, "unused"):
        low, high = losses[name].interval
        assert low < 0 < high, name
        assert losses[name].verdict != "worse"
    model = RowGenerator("criteo-kaggle", SEED).model
    spread = [
        np.sqrt(np.cov(table, aweights=of.code_fractions))
        for table, of in zip(model._main, model._columns, strict=True)
    ]
    strongest = sorted(set(FEATURES) - {*UNUSED}, key=lambda name: -spread[FEATURES.index(name)])[:5]
    assert next(iter(losses)) == "counts", "the integers say most"
    assert next(name for name in losses if name in FEATURES) in strongest
    assert all(losses[name].verdict == "worse" for name in strongest[:3])
    values = [loss.difference for loss in losses.values()]
    assert values == sorted(values, reverse=True)


def test_a_difference_is_that_of_rows_permuted_by_hand(bundle):
    dataset = Dataset.open(bundle.path.parent / "dataset")
    few = importance(bundle, features=["cat_19", "int_4"], max_rows=1_000, seed=3)
    rng = np.random.default_rng(3)
    frame = pl.concat(rows_of_split(dataset, "test"))
    frame = frame[np.sort(rng.choice(frame.height, 1_000, replace=False))]
    order, model = rng.permutation(1_000), ServedModel(bundle)

    def loss(frame):
        p = model.predict(EncodedRows.from_frame(frame, bundle.schema)).astype(float)
        clicked = frame["label"].to_numpy() == 1
        return -np.log(np.where(clicked, p, 1 - p)).mean()

    for name in ("cat_19", "int_4"):
        permuted = frame.with_columns(frame[name].gather(order))
        change = few.differences[f"without {name}"]["logloss"].difference
        assert change == pytest.approx(loss(permuted) - loss(frame), abs=1e-6)
    assert few.rows == 1_000


def test_a_run_is_judged_as_its_bundle_is(dlrm, run, bundle, found):
    done = dlrm(
        "importance", run, "--features", "int_0,cat_19", "--split", "val+test", "--groups", "counts=int_*", "--json"
    )
    assert done.returncode == 0, done.stderr
    told = {pair["name"]: pair["metrics"]["logloss"] for pair in json.loads(done.stdout)["pairs"]}
    assert told.keys() == {"without int_0", "without cat_19", "without counts"}
    for name, loss in told.items():
        assert loss["difference"] == pytest.approx(found.differences[name]["logloss"].difference, abs=1e-6)
    assert "cat_19" in done.stderr
    page = report_page(Run.open(run)).partition("<h2>What the model uses: val+test</h2>")[2]
    head, *rows = tables_of(page[page.index("<table>") : page.index("</table>") + len("</table>")])
    assert head[:6] == ["", "metric", "from 0", "difference", "from", "to"]
    assert {row[0]: row[3] for row in rows} == {name: f"{loss['difference']:+.5f}" for name, loss in told.items()}


def test_what_is_not_there_is_named(dlrm, bundle, tmp_path):
    with pytest.raises(ConfigError, match=r"`features`: the model has no feature 'cat_77'; did you mean cat_7\?"):
        importance(bundle, features=["cat_77"])
    with pytest.raises(RunError, match="is not what the run of the bundle"):
        importance(bundle, other_dataset(bundle, tmp_path))
    assert "--groups: int_0 has no name" in dlrm("importance", bundle.path, "--groups", "int_0").stderr


def other_dataset(bundle, folder):
    lines = (bundle.path.parent / "log.tsv").read_text().splitlines(keepends=True)[:500]
    (folder / "other.tsv").write_text("".join(lines))
    return preprocess([folder / "other.tsv"], folder / "other", criteo_schema(), PreprocessOptions(min_count=1))


@pytest.mark.parametrize("precision", ["float32", "int8"])
def test_what_a_table_holds(run, bundle, tmp_path, precision):
    if precision != "float32":
        bundle = export(run, tmp_path / precision, options=ExportOptions(precision=precision, check_rows=500)).bundle
    uses = {one["table"]: one for one in table_uses(bundle, SILENT)}
    assert uses.keys() == bundle.manifest.sparse.keys()
    vocabulary = pl.read_parquet(bundle.path / bundle.manifest.sparse["cat_3"].vocabulary)
    ids = np.arange(bundle.manifest.sparse["cat_3"].num_embeddings)
    rows = looked_up(bundle, "cat_3", ids)
    singular = np.linalg.svd(rows.astype(float), compute_uv=False)
    fractions = singular / singular.sum()
    use = uses["cat_3"]
    assert use["effective_rank"] == pytest.approx(np.exp(-(fractions * np.log(fractions)).sum()), rel=1e-3)
    assert (use["rows"], use["dim"], use["seen_rows"]) == (*rows.shape, vocabulary.height)
    rare = vocabulary.filter(pl.col("count").is_between(10, 99))["id"]
    wanted = np.quantile(np.linalg.norm(rows[rare], axis=1), [0.05, 0.5, 0.95])
    assert use["norms"][10] == pytest.approx(wanted, rel=1e-5)
    own, value = vocabulary.filter(pl.col("value").is_not_null()).select("id", "value").row(2)
    near = nearest(bundle, "cat_3", value, count=5)
    units = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    cosines = units @ units[own]
    order = [i for i in np.argsort(-cosines) if i not in (own, 0)][:5]
    names = dict(vocabulary.select("id", pl.col("value").fill_null("")).iter_rows())
    assert [*near] == [names[i] for i in order]
    assert [*near.values()] == pytest.approx(cosines[order], abs=1e-5)


def looked_up(bundle, feature, ids):
    """Rows of a table as the model's own lookup gives them."""
    place = [*bundle.manifest.sparse].index(feature)
    sparse = np.zeros((len(bundle.manifest.sparse), len(ids)), np.int32)
    sparse[place] = ids
    lookup = TableLookup(bundle, torch.float32, len(sparse) + 1)
    return lookup(EncodedRows(np.zeros((len(ids), 13), np.float32), sparse))[:, place + 1].numpy()


def test_the_command_shows_tables_and_neighbours(dlrm, bundle):
    value = pl.read_parquet(bundle.path / bundle.manifest.sparse["cat_19"].vocabulary)["value"].drop_nulls()[0]
    done = dlrm("inspect", bundle.path, "--tables", "--neighbours", f"cat_19={value}", "--json")
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert [one["table"] for one in told["tables"]] == [*bundle.manifest.sparse]
    assert told["neighbours"][f"cat_19={value}"] == nearest(bundle, "cat_19", value)
    assert "effective rank" in done.stderr
    for wrong, why in (("cat_19=no", "'no' has no id in the vocabulary of cat_19"), ("cat_99=1", "did you mean cat_9")):
        done = dlrm("inspect", bundle.path, "--neighbours", wrong)
        assert (done.returncode, why in done.stderr) == (2, True)
