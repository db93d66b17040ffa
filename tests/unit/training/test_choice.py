"""Which checkpoint a name means, and which changes of a config a run can be resumed with."""

import hashlib
import json

import pytest

from torchdlrm.config import load_config
from torchdlrm.errors import RunError
from torchdlrm.training.checkpoint import find_checkpoint, list_checkpoints, read_position
from torchdlrm.training.run import Run


def save(folder, step, best_step):
    """The record of a checkpoint, as it has been written from the first version on."""
    path = folder / f"step-{step:08d}"
    path.mkdir(parents=True)
    best = {"best_auc": None if best_step is None else 0.7, "best_step": best_step, "stale_validations": 0}
    position = {"step": step, "loader": {"epoch": 0, "batches_consumed": step}} | best
    digest = hashlib.sha256(json.dumps(position, sort_keys=True).encode()).hexdigest()
    record = {"format_version": 1, "position": position, "sha256": {"checkpoint.json": digest}}
    (path / "checkpoint.json").write_text(json.dumps(record))


@pytest.fixture
def validated(tmp_path):
    """Checkpoints of the steps 10 (the best of the val split), 90 and 100."""
    folder = tmp_path / "run" / "checkpoints"
    for step in (90, 10, 100):
        save(folder, step, 10)
    return folder


def test_the_best_is_the_one_that_the_last_remembers(validated):
    assert list_checkpoints(validated) == [10, 90, 100]
    assert str(find_checkpoint(validated)) == "step 10, the best of the val split"
    assert find_checkpoint(validated).kind == "best"
    assert str(find_checkpoint(validated, "last")) == "step 100, the last"
    assert str(find_checkpoint(validated, "90")) == "step 90"
    assert find_checkpoint(validated, "10").kind == "step"
    assert read_position(validated, 90).loader == {"epoch": 0, "batches_consumed": 90}


def test_where_nothing_was_validated_the_best_is_the_last(tmp_path):
    for step in (10, 20):
        save(tmp_path, step, None)
    assert str(find_checkpoint(tmp_path)) == "step 20, the last"


@pytest.mark.parametrize("name", ["11", "newest", "", "0010", "1e1", "-10"])
def test_a_checkpoint_that_is_not_there_is_refused_with_those_that_are(name, validated):
    with pytest.raises(RunError, match=rf"`checkpoint`: .*run does not have '{name}'; give best, last.* 10, 90, 100$"):
        find_checkpoint(validated, name)


def test_a_best_checkpoint_that_is_gone_is_not_replaced_by_another(tmp_path):
    save(tmp_path, 100, 10)
    with pytest.raises(RunError, match=r"does not have the best of the val split, step 10; give last, or one .* 100$"):
        find_checkpoint(tmp_path)


def test_a_run_without_checkpoints_says_so(tmp_path):
    with pytest.raises(RunError, match="the run has no checkpoint yet; train it first"):
        find_checkpoint(tmp_path / "run" / "checkpoints", "last")


@pytest.fixture
def changed(small_dataset, tmp_path):
    """What `Run.check` says of a run that was started with the defaults: changed({"seed": "7"})."""
    Run(tmp_path / "run", load_config(None)).start(small_dataset, world_size=1).close()

    def check(overrides):
        return Run(tmp_path / "run", load_config(None, overrides)).check(small_dataset)

    return check


def test_the_same_config_has_no_differences(changed):
    assert changed({}) == []


def test_harmless_changes_are_told_each_with_both_values(changed):
    found = changed({"train.epochs": "3", "stop.target_auc": "0.8", "table_optimizer.learning_rate": "0.1"})
    assert [str(change) for change in found] == [
        "train.epochs: was 1, is 3",
        "table_optimizer.learning_rate: was 0.05, is 0.1",
        "stop.target_auc: was not set, is 0.8",
    ]


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("seed", "7"),
        ("model.over_arch_layer_sizes", "[8, 1]"),
        ("train.batch_size_global", "64"),
        ("table_optimizer.name", "adagrad"),
        ("dense_optimizer.name", "sgd"),
    ],
)
def test_a_change_with_which_the_saved_state_means_something_else_is_fatal(key, value, changed):
    with pytest.raises(RunError) as caught:
        changed({key: value, "train.epochs": "3"})
    first, *differences, remedy = str(caught.value).splitlines()
    assert first.endswith("the run in it cannot be resumed with what is asked now:")
    told = {line.strip().partition(":")[0]: line for line in differences}
    assert told.keys() == {key, "train.epochs"}
    assert told[key].endswith("; the saved state means something else with it")
    assert told["train.epochs"].endswith("was 1, is 3; would do no harm")
    assert "`restart`" in remedy
