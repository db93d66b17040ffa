"""What is said of a dataset that a person should not trust as it is, and of one that is as it should be: nothing."""

import random

import pytest

from torchdlrm.cli.preprocess import about_constant_label
from torchdlrm.data.judgements import calibration, few_clicks, judge_dataset, judge_validation
from torchdlrm.features.schema import FeatureSchema, LabelColumn, SparseColumn
from torchdlrm.features.schema_file import with_split
from torchdlrm.preprocessing.preprocess import PreprocessOptions, preprocess

ROWS = 6_000
NAMES = ("user", "movie", "title", "session", "shop", "word")
SCHEMA = FeatureSchema(
    name="films", columns=(LabelColumn(name="label"), *(SparseColumn(name=name, kind="string") for name in NAMES))
)


@pytest.fixture(scope="module")
def log(tmp_path_factory):
    """Users come one after the other; each movie has a title; sessions are never met again; most words neither."""
    rng, path = random.Random(7), tmp_path_factory.mktemp("films") / "log.tsv"
    lines = []
    for row in range(ROWS):
        movie, shop = rng.randrange(80), rng.randrange(30)
        word = rng.choice(("a", "b", "c")) if rng.random() < 0.4 else f"w{rng.randrange(10**6)}"
        cells = (rng.randrange(2), f"u{row // 40}", movie, f"title {movie}", f"s{row}", shop, word)
        lines.append("\t".join(map(str, cells)))
    path.write_text("\n".join(lines) + "\n")
    return path


def judged(log, path, schema):
    return judge_dataset(preprocess([log], path, schema, PreprocessOptions(min_count=2)))


def test_each_judgement_names_the_column_its_figure_and_what_to_do(log, tmp_path):
    found = {
        line.split()[0].strip(":"): line for line in judged(log, tmp_path / "d", with_split(SCHEMA, "order", 0.1, 0.1))
    }
    assert found.keys() == {"val", "test", "user", "word", "session", "title"}
    for split in ("val", "test"):
        assert "clicks in 600 rows: its AUC is known to about +-0.02" in found[split]
    assert found["user"].startswith("user (100.0%): most values in val are new")
    assert 'rule = "random"' in found["user"]
    assert "most training values are too rare for an id; lower min_count" in found["word"]
    assert found["session"].startswith("session (100.0%): nearly every training row has a value of its own")
    assert found["title"].startswith("title: repeats movie, value for value")


def test_nothing_is_said_of_a_log_that_is_as_it_should_be(log, tmp_path):
    """Users are in all splits where rows are held out by chance, and there are rows enough."""
    wanted = [column for column in SCHEMA.columns if column.name not in {"title", "session", "word"}]
    ignored = [{"role": "ignore", "name": name} for name in ("title", "session", "word")]
    columns = [*(column.model_dump(exclude_none=True) for column in wanted), *ignored]
    order = {name: place for place, name in enumerate(("label", *NAMES))}
    columns.sort(key=lambda column: order[column["name"]])
    schema = FeatureSchema.model_validate({"name": "films", "columns": columns})
    assert judged(log, tmp_path / "d", with_split(schema, "random", 0.2, 0.2)) == []


def test_few_clicks_and_no_clicks_are_told_apart():
    assert few_clicks("val", 100_000, 5_000) == ""
    assert few_clicks("val", 100_000, 99_990).startswith("val has 99,990 clicks in 100,000 rows: its AUC is known to")
    assert "so no AUC" in few_clicks("val", 100, 0)


@pytest.mark.parametrize(
    ("value", "clicks", "said"),
    [
        (1.05, 10_000, ""),
        (1.5, 10_000, "the mean prediction is 50% too high"),
        (0.6, None, "the mean prediction is 40% too low"),
        (1.5, 20, ""),  # may be chance
        (None, 0, ""),
    ],
)
def test_a_calibration_that_chance_does_not_explain_is_told(value, clicks, said):
    line = calibration("val", {"calibration": value}, clicks)
    assert said in line
    assert bool(line) == bool(said)


def test_a_validation_is_judged_by_the_rows_that_it_had(log, tmp_path):
    dataset = preprocess([log], tmp_path / "d", with_split(SCHEMA, "random", 0.2, 0.2), PreprocessOptions(min_count=2))
    metrics = {"rows": 300, "calibration": 1.9}
    few, bad, *_ = judge_validation(dataset, metrics)
    assert few.startswith("val has 1")
    assert "in 300 rows" in few
    assert bad.startswith("calibration on val is 1.90")


def manifest_with(small_dataset, clicks):
    """A manifest whose splits have this share of clicks."""
    splits = small_dataset.manifest.splits
    changed = {
        name: part.model_copy(update={"clicks": round(part.rows * clicks.get(name, 0.25))})
        for name, part in splits.items()
    }
    return small_dataset.manifest.model_copy(update={"splits": changed})


@pytest.mark.parametrize(
    ("clicks", "told"),
    [
        ({"val": 0}, "the label 'label' is 0 in all rows of val: AUC and normalised entropy are undefined there;"),
        (
            {"train": 0, "val": 1, "test": 1},
            "the label 'label' is 0 in all rows of train, 1 in all rows of val and test: nothing can be learnt,",
        ),
    ],
)
def test_a_split_with_one_label_is_told_with_what_follows(clicks, told, small_dataset):
    assert about_constant_label(manifest_with(small_dataset, clicks)).startswith(told)


def test_splits_with_both_labels_or_without_rows_are_not_told_of(small_dataset):
    manifest = manifest_with(small_dataset, {})
    assert about_constant_label(manifest) == ""
    empty = manifest.splits["test"].model_copy(update={"rows": 0, "clicks": 0})
    assert about_constant_label(manifest.model_copy(update={"splits": manifest.splits | {"test": empty}})) == ""
