"""Values that come and go: vocabularies from period to period, against a computation in plain Python."""

import json
import random

import polars as pl
import pyarrow.parquet as pq
import pytest

from helpers.period_reference import Vocabulary, next_period
from helpers.raw_logs import checksums
from torchdlrm.cli.main import app
from torchdlrm.data.manifest import oldest_version
from torchdlrm.data.summary import summarize
from torchdlrm.errors import ConfigError
from torchdlrm.features.columns import DenseColumn, LabelColumn, SparseColumn
from torchdlrm.features.schema import FeatureSchema
from torchdlrm.features.schema_file import with_split
from torchdlrm.files import sha256_of
from torchdlrm.preprocessing import preprocess as module
from torchdlrm.preprocessing.preprocess import PreprocessOptions, Resources, preprocess
from torchdlrm.preprocessing.sizing import JobSizing
from torchdlrm.progress import SilentProgress

SCHEMA = FeatureSchema(
    name="days",
    columns=(
        LabelColumn(name="label"),
        DenseColumn(name="price", kind="float", transform="standardize", buckets={"quantiles": 5}),
        SparseColumn(name="item", kind="int"),
        SparseColumn(name="seen", kind="int", value_separator="|", max_values=2, keep="last", table="item"),
        SparseColumn(name="tags", kind="string", value_separator="|", min_count=4, max_embeddings=14),
    ),
)
NO_HOLD_OUT = with_split(SCHEMA, "order", 0.0, 0.0)
ALONE = NO_HOLD_OUT.with_columns([column for column in SCHEMA.columns if column.name != "seen"])
RULES = {"min_count": 3, "expire_after": 2, "admit_over": 3, "max_embeddings": 60}
PERIODS = range(5, 10)


def read(line):
    _, _, item, seen, tags = line.rstrip("\n").split("\t")
    items = [int(item) if item else None, *map(int, seen.split("|")[-2:] if seen else [])]
    return items, tags.split("|") if tags else []


@pytest.fixture(scope="module")
def logs(tmp_path_factory):
    """Five days whose items and tags drift; of the items some were seen on the day before."""
    folder, found = tmp_path_factory.mktemp("logs"), {}
    for period in PERIODS:
        rng = random.Random(period)
        lines = []
        for _ in range(400):
            item = rng.choice(["", str(15 * period + min(int(rng.expovariate(0.03)), 400))])
            seen = "|".join(str(15 * period - rng.randrange(40)) for _ in range(max(0, rng.randrange(-9, 4))))
            tags = "|".join(f"t{2 * period + int(rng.expovariate(0.1))}" for _ in range(rng.randrange(3)))
            lines.append(f"{rng.choice('01')}\t{rng.gauss(5, 1):.4f}\t{item}\t{seen}\t{tags}\n")
        found[period] = folder / f"day{period}.tsv"
        found[period].write_text("".join(lines))
    return found


def options(period, before, **changes):
    rules = {**RULES, **changes}
    if before is None:
        return PreprocessOptions(**rules, period=period)
    return PreprocessOptions(**rules, vocabulary=before.path, extend_vocabulary=True)


@pytest.fixture(scope="module")
def days(logs, tmp_path_factory):
    folder, found = tmp_path_factory.mktemp("days"), {}
    for period in PERIODS:
        rules = options(period, found.get(period - 1))
        found[period] = preprocess([logs[period]], folder / f"day{period}", NO_HOLD_OUT, rules)
    return found


@pytest.fixture(scope="module")
def expected(logs):
    """Of both features, what plain Python makes of the days."""
    rules = {"item": RULES, "tags": {**RULES, "min_count": 4, "max_embeddings": 14}}
    found, now = {}, {"item": Vocabulary(), "tags": Vocabulary()}
    for period in PERIODS:
        rows = [read(line) for line in logs[period].read_text().splitlines()]
        values = {
            "item": [item for items, _ in rows for item in items],
            "tags": [tag for _, tags in rows for tag in tags],
        }
        now = {name: next_period(now[name], values[name], period, **rules[name]) for name in values}
        found[period] = now
    return found


def candidates(dataset, name):
    record = dataset.manifest.sparse[name].turnover.candidates
    return [] if record is None else pl.DataFrame(pq.read_table(dataset.path / record.path)).rows()


def test_values_come_and_go_as_plain_python_says(days, expected):
    for period, dataset in days.items():
        assert dataset.period == period
        for name, wanted in expected[period].items():
            record = dataset.manifest.sparse[name]
            assert dataset.vocabulary(name).table.rows() == wanted.table
            assert dataset.num_embeddings[name] == wanted.num_embeddings
            assert dataset.reset_ids(name).tolist() == wanted.reset
            assert (record.turnover.admitted, record.turnover.expired) == (wanted.admitted, wanted.expired)
            assert candidates(dataset, name) == wanted.asked
    last = expected[PERIODS[-1]]
    assert all(days[period].reset_ids(name).size for period in (8, 9) for name in last), "ids are given again"
    assert all(wanted.candidates for wanted in last.values())
    assert last["item"].num_embeddings == RULES["max_embeddings"]


class StopAt(SilentProgress):
    def __init__(self, phase):
        self._phase = phase

    def start_phase(self, name, *_):
        if name == self._phase:
            raise KeyboardInterrupt


def test_five_periods_in_pieces_and_with_interruptions_have_the_same_bytes(logs, days, tmp_path, monkeypatch):
    """Each day extends that of the day before, which was made in the same way."""
    before = None
    for period in PERIODS:
        sizing = JobSizing(3_000, 8 if period % 2 else 2, 20_000, 9, 2)
        monkeypatch.setattr(module, "choose_sizing", lambda *_, sizing=sizing: sizing)
        arguments = ([logs[period]], tmp_path / f"day{period}", NO_HOLD_OUT, options(period, before))
        with pytest.raises(KeyboardInterrupt):
            preprocess(*arguments, StopAt(("count", "encode", "write")[period % 3]))
        before = preprocess(*arguments, resources=Resources(workers=1 + period % 2))
        assert checksums(before.path) == checksums(days[period].path)


def test_an_older_log_is_encoded_with_todays_ids_and_is_of_todays_period(logs, days, tmp_path):
    today = days[9]
    replayed = preprocess([logs[7]], tmp_path / "again", NO_HOLD_OUT, PreprocessOptions(vocabulary=today.path))
    for key in ("period", "extends", "sparse", "expire_after", "admit_over"):
        assert getattr(replayed.manifest, key) == getattr(today.manifest, key)
    assert oldest_version(ALONE, has_period=True, has_vocabulary_of=True) == 4
    of = replayed.manifest.vocabulary_of
    assert (of.manifest_sha256, of.extended) == (sha256_of(today.path / "dataset.json"), False)
    assert today.manifest.extends.period == 8
    assert today.manifest.extends.manifest_sha256 == sha256_of(days[8].path / "dataset.json")
    assert replayed.reset_ids("item").tolist() == today.reset_ids("item").tolist()
    replayed.verify()
    ids = {value: row[1] for value, row in _rows(today, "item").items()}
    items = [read(line)[0][0] for line in logs[7].read_text().splitlines()]
    found = pl.concat(pl.read_parquet(file.path) for file in replayed.splits["train"].files)["item"]
    assert sorted(found) == sorted(ids.get(item, 0) for item in items)


def test_what_stands_for_a_missing_number_stays_the_same_also_once_rows_lack_it(logs, days, tmp_path):
    before = days[9].manifest.dense["price"]
    assert before == days[5].manifest.dense["price"]
    assert before.never_missing
    lines = logs[9].read_text().splitlines(keepends=True)
    label, _, *others = lines[3].split("\t")
    for period, text in ((10, "".join([*lines[:3], "\t".join([label, "", *others])])), (11, "".join(lines))):
        (tmp_path / "log.tsv").write_text(text)
        rules = options(period, days[period - 1])
        days = {**days, period: preprocess([tmp_path / "log.tsv"], tmp_path / f"{period}", NO_HOLD_OUT, rules)}
        now = days[period].manifest.dense["price"]
        assert (now.missing, now.never_missing) == (before.missing, False)
        assert now.continues(before)
    price = pl.read_parquet(days[10].splits["train"].files[0].path)["price"]
    assert (price == 0.0).sum() == 1  # the mean, standardised


def _rows(dataset, name):
    return {value: row for value, *row in dataset.vocabulary(name).table.iter_rows()}


def test_values_of_a_dataset_without_periods_count_as_seen_in_the_one_before(logs, tmp_path):
    old = preprocess([logs[5]], tmp_path / "old", NO_HOLD_OUT)
    assert "period" not in (old.path / "dataset.json").read_text()
    assert oldest_version(ALONE) == 2
    rules = {"vocabulary": old.path, "extend_vocabulary": True, "period": 8}
    new = preprocess([logs[6]], tmp_path / "new", NO_HOLD_OUT, PreprocessOptions(**rules, expire_after=2))
    seen = {item for line in logs[6].read_text().splitlines() for item in read(line)[0]}
    table = _rows(new, "item")
    for value, (_, number, *_) in _rows(old, "item").items():
        assert table[value][1:] == [number, 7, 8 if value in seen else 7]
    assert (oldest_version(ALONE, has_period=True), new.manifest.extends.period) == (3, None)
    new = preprocess([logs[6]], tmp_path / "soon", NO_HOLD_OUT, PreprocessOptions(**rules, expire_after=1))
    assert {*_rows(new, "item")} <= seen


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"period": 9}, "`period`: 9 is not after 9, the period of `vocabulary`"),
        ({"extend_vocabulary": False, "period": 10}, "`period`: a `vocabulary` that is not extended stays as it is"),
        ({"extend_vocabulary": False, "expire_after": 3}, "`expire_after`: a `vocabulary` that is not extended"),
        ({"expire_after": 0}, "`expire_after`: must be at least 1, got 0"),
        ({"admit_over": 0}, "`admit_over`: must be at least 1, got 0"),
        ({"period": 2**31}, "`period`: must be at most 2147483646"),
    ],
)
def test_what_makes_no_sense_is_refused(given, message, logs, days, tmp_path):
    with pytest.raises(ConfigError, match=message):
        preprocess(
            [logs[9]],
            tmp_path / "new",
            NO_HOLD_OUT,
            PreprocessOptions(**{"vocabulary": days[9].path, "extend_vocabulary": True, **given}),
        )


def test_the_commands_tell_what_came_and_went(logs, days, tmp_path, capsys):
    """By default the period after that of the vocabulary."""
    schema = tmp_path / "schema.toml"
    columns = [column.model_dump(exclude_none=True, exclude_defaults=True) for column in SCHEMA.columns]
    roles = ("label", "dense", *["sparse"] * 3)
    lines = (
        ", ".join(f"{key} = {json.dumps(value)}" for key, value in {"role": role, **column}.items())
        for role, column in zip(roles, columns, strict=True)
    )
    schema.write_text("\n".join(['name = "days"', "columns = [", *(f"  {{ {line} }}," for line in lines), "]", ""]))
    out = tmp_path / "new"
    rules = ("--expire-after", "1", "--admit-over", "2", "--split", "order", "--val", "0", "--test", "0")
    command = ("preprocess", str(logs[9]), "--schema", str(schema), "--vocabulary", str(days[9].path))
    app([*command, "--extend-vocabulary", "--out", str(out), *rules, "--json"])
    told = capsys.readouterr()
    assert json.loads(told.out)["period"] == 10
    assert "period 10: " in told.err
    app(["inspect", str(out)])
    about = capsys.readouterr()
    assert "period 10; extends period 9; a value that is not seen in 1 loses its id" in about.out + about.err
    summary = summarize(days[9], 2).sparse["item"]
    table = days[9].vocabulary("item").table
    assert [value.share for value in summary.most_frequent] == [
        count / table["count"].sum() for count in table["count"].sort(descending=True)[:2]
    ]
    assert summary.turnover.reset == len(days[9].reset_ids("item"))
