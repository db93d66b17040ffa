"""A run that is started from another: what it takes over, from any number of processes to any, and what is refused."""

import json
import shutil

import pytest
import torch

from helpers.days import FROZEN, ITEM_CUT, SCHEMA, TABLE, config, last_state, write_log
from torchdlrm.data.dataset import Dataset
from torchdlrm.errors import ConfigError, RunError
from torchdlrm.evaluation.report import report_page
from torchdlrm.features.columns import SparseColumn
from torchdlrm.model.dlrm import DLRM
from torchdlrm.preprocessing.preprocess import PreprocessOptions, preprocess
from torchdlrm.training import checkpoint_state
from torchdlrm.training.checkpointer import Checkpointer
from torchdlrm.training.job import train
from torchdlrm.training.processes.launch import Processes, launch
from torchdlrm.training.processes.process_group import join_process_group
from torchdlrm.training.run import Run
from torchdlrm.training.trainer import Trainer

# With a value a row, one a weight, and what depends on the number of steps.
ADAM = {
    "table_optimizer.name": "partial_rowwise_adam",
    "table_optimizer.initial_accumulator": "0",
    "table_optimizer.weight_decay": "0.1",
    "table_optimizer.weight_decay_mode": "lazy",
    "dense_optimizer.name": "adamw",
}
SMALLER_TABLES = {
    "model.features": '{item = {quotient_remainder = "mult", num_collisions = 3}, city = {embedding_dim = 4}}'
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("warm")


@pytest.fixture(scope="module")
def monday(folder):
    log = write_log(folder / "monday.tsv", 1, 0, 150, "abc", 5, 1_000)
    return preprocess([log], folder / "monday", SCHEMA, PreprocessOptions(min_count=1))


@pytest.fixture(scope="module")
def tuesday(folder, monday):
    """More items and more cities; ids of Monday stay."""
    log = write_log(folder / "tuesday.tsv", 2, 100, 300, "abcdef", 50, 1_000)
    options = PreprocessOptions(min_count=1, vocabulary=monday.path, extend_vocabulary=True)
    dataset = preprocess([log], folder / "tuesday", SCHEMA, options)
    assert all(dataset.num_embeddings[name] > rows + 2 for name, rows in monday.num_embeddings.items())
    return dataset


@pytest.fixture(scope="module")
def first(folder, monday):
    """A run on Monday's rows."""
    train(config(), monday, folder / "run-1")
    return folder / "run-1"


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch):
    monkeypatch.setattr(checkpoint_state, "_BLOCK_ROWS", 16)


def assert_tables_are(found, source, fresh):
    """All that tables have is the source's as far as that goes, and that of a fresh model behind it."""
    names = [name for name in found if TABLE in name]
    assert names
    for name in names:
        new, old, other = (values[name] for values in (found, source, fresh))
        assert len(new) > len(old) or "item_r" in name
        assert torch.equal(new[: len(old)], old), name
        assert torch.equal(new[len(old) :], other[len(old) :]), name
        assert "momentum" in name or not torch.equal(other[: len(old)], old), name


def assert_same(found, expected, names=None):
    assert found.keys() == expected.keys()
    assert [name for name in names or found if not torch.equal(found[name], expected[name])] == []


@pytest.mark.parametrize(
    "changes",
    [{}, ADAM, SMALLER_TABLES | {"model.table_init_scale": "0.1"}],
    ids=["adagrad", "adam", "smaller_tables_of_small_rows"],
)
def test_rows_that_stayed_keep_their_bytes_and_new_ones_are_those_of_a_fresh_model(changes, monday, tuesday, tmp_path):
    first, second, fresh = (tmp_path / name for name in ("first", "second", "fresh"))
    train(config(changes, {"model.table_init_scale": "1.0"}), monday, first)
    frozen = config(changes, {"train.freeze": "tables", "train.max_steps": "2"})
    train(frozen, tuesday, second, from_run=first)
    train(frozen, tuesday, fresh)
    found, source = last_state(second, tmp_path / "a"), last_state(first, tmp_path / "b")
    assert_tables_are(found, source, last_state(fresh, tmp_path / "c"))
    dense = [name for name in found if TABLE not in name]
    assert any(not torch.equal(found[name], source[name]) for name in dense)


def test_a_second_run_on_the_same_rows_ends_with_the_bytes_of_a_second_epoch(monday, tmp_path):
    """Weights, state of both optimizers and the count of steps, on which Adam and lazy decay depend, are all of it."""
    train(config(ADAM), monday, tmp_path / "once")
    train(config(ADAM, {"train.epochs": "2"}), monday, tmp_path / "both")
    again = config(ADAM, {"warm_start.checkpoint": "last"})
    train(again, monday, tmp_path / "again", from_run=tmp_path / "once")
    train(again, monday, tmp_path / "third", from_run=tmp_path / "again")
    both = last_state(tmp_path / "both", tmp_path / "a")
    assert_same(last_state(tmp_path / "again", tmp_path / "b"), both)
    train(config(ADAM, {"train.epochs": "3"}), monday, tmp_path / "both")
    assert_same(last_state(tmp_path / "third", tmp_path / "b"), last_state(tmp_path / "both", tmp_path / "a"))


def test_a_source_whose_weights_are_not_finite_is_refused(monday, tuesday, tmp_path, monkeypatch):
    """As an older version may have left one."""
    with monkeypatch.context() as patch:
        patch.setattr(Checkpointer, "_find_not_finite", lambda *_: None)
        patch.setattr(Trainer, "_refuse_if_not_finite", lambda *_: None)
        train(config({"train.max_steps": "2", "table_optimizer.learning_rate": "1e38"}), monday, tmp_path / "source")
    with pytest.raises(
        RunError, match=r"^`from_run`: .*step-00000002: NaN or infinity in .*`warm_start.checkpoint` can"
    ):
        train(config(), tuesday, tmp_path / "run", from_run=tmp_path / "source")


def test_the_dense_optimizer_may_start_with_fresh_state(first, tuesday, tmp_path):
    kept, fresh = tmp_path / "kept", tmp_path / "fresh"
    frozen = {"train.freeze": "dense", "train.max_steps": "1"}
    train(config(frozen), tuesday, kept, from_run=first)
    train(config(frozen, {"warm_start.dense_optimizer_state": "fresh"}), tuesday, fresh, from_run=first)
    source = last_state(first, tmp_path / "a")
    dense = [name for name in source if TABLE not in name]
    found, without = last_state(kept, tmp_path / "b"), last_state(fresh, tmp_path / "c")
    assert [name for name in dense if not torch.equal(found[name], source[name])] == []
    for name in dense:
        expected = torch.zeros_like(source[name]) if name.startswith("optimizer") else source[name]
        assert torch.equal(without[name], expected), name


def several_trainings(folder, first):
    """What two processes do; they share a process group, which a training uses and leaves as it is."""
    with join_process_group():
        monday, tuesday = Dataset.open(folder / "monday"), Dataset.open(folder / "tuesday")
        train(config(), monday, folder / "first-on-2")
        train(config(ITEM_CUT), monday, folder / "first-cut")
        train(config({**FROZEN, "train.freeze": "dense"}), tuesday, folder / "dense-on-2", from_run=first)
        try:
            train(config(FROZEN), tuesday, folder / "uncut", from_run=folder / "first-cut")
        except RunError as error:
            (folder / "uncut.txt").write_text(str(error))


def test_from_any_number_of_processes_to_any(folder, first, monday, tuesday, tmp_path):
    """Tables on two processes, whole and cut: `test_warm_start_periods.py`."""
    launch(several_trainings, folder, first, processes=Processes(2))
    train(config(FROZEN), tuesday, tmp_path / "from-2-on-1", from_run=folder / "first-on-2")
    train(config(FROZEN), tuesday, tmp_path / "fresh")
    fresh = last_state(tmp_path / "fresh", tmp_path / "a")
    on_1, on_2 = last_state(first, tmp_path / "b"), last_state(folder / "first-on-2", tmp_path / "c")
    assert_tables_are(last_state(tmp_path / "from-2-on-1", tmp_path / "d"), on_2, fresh)
    assert "t_item was cut into other pieces of columns" in (folder / "uncut.txt").read_text()
    found = last_state(folder / "dense-on-2", tmp_path / "d")
    assert all(torch.equal(value, on_1[name]) for name, value in found.items() if TABLE not in name)
    assert not any(torch.equal(value, fresh[name]) for name, value in found.items() if TABLE in name)


class Killed(Exception):  # noqa: N818 - no error
    pass


class KillAt:
    """A callback that ends a training as a kill would: nothing is saved."""

    def __init__(self, step):
        self._step = step

    def __getattr__(self, name):
        def ignore(*_):
            return None

        return ignore

    def on_log(self, step, _):
        if step == self._step:
            raise Killed


def test_a_resumed_run_reads_the_source_only_before_its_first_checkpoint(first, tuesday, tmp_path):
    settings = config({"logging.every_steps": "1", "checkpoint.every_steps": "3", "checkpoint.asynchronous": "false"})
    train(settings, tuesday, tmp_path / "whole", from_run=first)
    source, run = tmp_path / "source", tmp_path / "run"
    shutil.copytree(first, source)
    with pytest.raises(Killed):
        train(settings, tuesday, run, from_run=source, callbacks=[KillAt(2)])
    assert not list((run / "checkpoints").glob("step-*"))
    with pytest.raises(RunError, match=r"was started from .*source, step \d+, got .*run-1; leave it out"):
        train(settings, tuesday, run, from_run=first)
    with pytest.raises(Killed):
        train(settings, tuesday, run, callbacks=[KillAt(5)])  # from the source again, which the run remembers
    shutil.rmtree(source)
    train(settings, tuesday, run, from_run=source)
    assert_same(last_state(run, tmp_path / "a"), last_state(tmp_path / "whole", tmp_path / "b"))


def test_a_source_that_has_changed_or_is_damaged_is_refused(first, tuesday, tmp_path):
    source, run = tmp_path / "source", tmp_path / "run"
    shutil.copytree(first, source)
    with pytest.raises(Killed):
        train(config({"logging.every_steps": "1"}), tuesday, run, from_run=source, callbacks=[KillAt(1)])
    record = next((source / "checkpoints").glob("step-*/checkpoint.json"))
    record.write_text(record.read_text() + " ")
    with pytest.raises(RunError, match=r"is another one than .* was started from"):
        train(config({"logging.every_steps": "1"}), tuesday, run)
    data = next(record.parent.glob("*.distcp"))
    data.write_bytes(data.read_bytes()[:-1] + b"?")
    with pytest.raises(RunError, match=f"`from_run`: .*{data.name}: damaged"):
        train(config(), tuesday, tmp_path / "other", from_run=source)
    assert not (tmp_path / "other").exists()


REFUSALS = {
    "dimension": (
        {"model.embedding_dim": "16", "model.dense_arch_layer_sizes": "16,16"},
        "model.embedding_dim: is 16, and was 8",
    ),
    "architecture": ({"model.interaction": "dcn"}, "model.interaction: is dcn, and was dot"),
    "smaller_table": (
        {"model.features": "{city = {embedding_dim = 4}}"},
        "model.features.city.embedding_dim: is 4, and was not set",
    ),
    "table_optimizer": (
        {"table_optimizer.name": "adagrad"},
        "table_optimizer.name: adagrad needs state of its own for rows that stay",
    ),
    "lazy_decay": (
        {"table_optimizer.weight_decay_mode": "lazy"},
        "weight_decay_mode: is lazy, which needs the last step",
    ),
    "dense_optimizer": (
        {"dense_optimizer.name": "adamw"},
        "dense_optimizer.name: is adamw, and was adagrad.*dense_optimizer_state = fresh",
    ),
    "checkpoint": (
        {"warm_start.checkpoint": "7777"},
        "warm_start.checkpoint: .* does not have '7777'; give best, last, or",
    ),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_a_run_whose_state_would_mean_something_else_is_refused(case, first, tuesday, tmp_path):
    changes, message = REFUSALS[case]
    with pytest.raises(RunError, match=message):
        train(config(changes), tuesday, tmp_path / "run", from_run=first)
    assert not (tmp_path / "run").exists()


class NumbersById(DLRM):
    def __init__(self, **arguments):
        super().__init__(**arguments)
        (items, _) = arguments["embedding_bag_collection"].embedding_bag_configs()
        self.numbers = torch.nn.Parameter(torch.zeros(items.num_embeddings))

    def forward(self, dense_features, sparse_features):
        logits = super().forward(dense_features, sparse_features)
        return logits + self.numbers[sparse_features.values()[: len(logits)]].unsqueeze(1)


def test_parameters_by_id_do_not_grow_with_a_vocabulary_and_it_says_what_to_do(monday, tuesday, tmp_path):
    one_step = config({"train.max_steps": "1"})
    train(one_step, monday, tmp_path / "first", model_class=NumbersById)
    words = r"numbers is \[\d+\] in the new run, and there \[\d+\]; where vocabularies grow, .*hash, in the schema"
    with pytest.raises(RunError, match=words):
        train(one_step, tuesday, tmp_path / "second", from_run=tmp_path / "first", model_class=NumbersById)


def test_another_dense_optimizer_is_possible_with_fresh_state_and_sgd_with_any(first, tuesday, tmp_path):
    changes = {
        "dense_optimizer.name": "adamw",
        "warm_start.dense_optimizer_state": "fresh",
        "table_optimizer.name": "sgd",
        "table_optimizer.initial_accumulator": "0",
        "train.max_steps": "1",
    }
    assert train(config(changes), tuesday, tmp_path / "run", from_run=first).summary.step == 1


def test_datasets_in_which_ids_or_values_mean_something_else_are_refused(first, folder, monday, tuesday, tmp_path):
    """Vocabularies of their own; and other columns; and the statistics of other rows."""
    own = preprocess([folder / "tuesday.tsv"], tmp_path / "own", SCHEMA, PreprocessOptions(min_count=1))
    with pytest.raises(RunError) as caught:
        train(config(), own, tmp_path / "run", from_run=first)
    theirs, ours = (dataset.vocabulary("item").table["value"] for dataset in (monday, own))
    differs = next(i for i, (a, b) in enumerate(zip(theirs, ours, strict=False)) if a != b) + 1
    assert f"feature item: id {differs} stands for another value than in {monday.path}" in str(caught.value)
    assert "dense feature price: its transform, or the statistics that it was fitted with, are others" in str(
        caught.value
    )

    columns = (*SCHEMA.columns[:2], SparseColumn(name="item", kind="hex", hash=500), SCHEMA.columns[3])
    log = folder / "monday.tsv"
    hashed = preprocess([log], tmp_path / "hashed", SCHEMA.model_copy(update={"columns": columns}), PreprocessOptions())
    with pytest.raises(RunError, match=r"feature item: hash is .*, and was not set"):
        train(config(), hashed, tmp_path / "run", from_run=first)

    columns = (*SCHEMA.columns[:3], SparseColumn(name="town", kind="string"))
    renamed = preprocess(
        [log], tmp_path / "renamed", SCHEMA.model_copy(update={"columns": columns}), PreprocessOptions()
    )
    with pytest.raises(RunError, match="sparse features: are item, town, and were item, city"):
        train(config(), renamed, tmp_path / "run", from_run=first)

    train(config({"train.max_steps": "1"}), tuesday, tmp_path / "longer", from_run=first)
    with pytest.raises(RunError, match=r"feature item: has \d+ ids, and had \d+; ids may only be added"):
        train(config(), monday, tmp_path / "run", from_run=tmp_path / "longer")
    assert not (tmp_path / "run").exists()


def test_a_run_is_not_started_from_itself_from_one_that_trains_or_from_a_second_one(first, tuesday, monday, tmp_path):
    with pytest.raises(RunError, match="was started from no other run, got"):
        train(config(), monday, first, from_run=tmp_path)
    with pytest.raises(RunError, match="is the run itself"):
        train(config(), monday, first, from_run=first, restart=True)
    held = Run(first, config()).start(monday, world_size=1)
    try:
        with pytest.raises(RunError, match="`from_run`: another process is training in"):
            train(config(), tuesday, tmp_path / "run", from_run=first)
    finally:
        held.close()


def test_the_command_says_what_it_starts_from_and_so_do_inspect_and_report(first, tuesday, dlrm, tmp_path):
    run = tmp_path / "run"
    file = tmp_path / "small.toml"
    shutil.copy(first / "config.toml", file)
    arguments = ("train", file, "--dataset", tuesday.path, "--run", run, "--from", first)
    refused = dlrm(*arguments, "--model.interaction", "dcn")
    assert refused.returncode == 2
    assert f"--from: what {first} has learnt does not fit" in refused.stderr
    without = dlrm(*arguments[:-2], "--warm-start.checkpoint", "last")
    assert without.returncode == 2
    assert "--warm-start.checkpoint: says what a run takes over from another one" in without.stderr
    assert not run.exists()
    done = dlrm(*arguments, "--freeze", "tables,over_arch", "--train.max-steps", 1, "--json")
    assert done.returncode == 0, done.stderr
    step = max(int(path.name[5:]) for path in (first / "checkpoints").glob("step-*"))
    assert f"warm start: from {first}, step {step}, the best of the val split" in done.stderr
    assert "frozen: tables, over_arch" in done.stderr
    assert json.loads((run / "environment.json").read_text())["warm_start"]["run"] == str(first)
    assert f"started from {first}, step {step}" in dlrm("inspect", run).stderr
    assert f"Started from {first}, step {step}, the best of the val split" in report_page(Run.open(run))
    with pytest.raises(RunError, match=r"train.freeze: was \['tables', 'over_arch'\], is \[\]"):
        train(config({"train.max_steps": "2"}), tuesday, run)


def test_a_part_that_is_not_there_or_all_of_them_cannot_be_frozen(monday, tmp_path):
    with pytest.raises(ConfigError, match=r"train.freeze: 'over_arc' is no feature and no module.*over_arch"):
        train(config({"train.freeze": "over_arc"}), monday, tmp_path / "run")
    with pytest.raises(ConfigError, match="tables, dense: nothing is left to learn"):
        train(config({"train.freeze": "tables,dense"}), monday, tmp_path / "run")
    assert not (tmp_path / "run").exists()
