"""`dlrm train` says first what it is going to do; with --dry-run that is all."""

import json

import pytest

from torchdlrm.cli.train import preview_lines
from torchdlrm.config import load_config
from torchdlrm.errors import UserError
from torchdlrm.training.job import preview_training

CONFIG = "criteo-small"


@pytest.fixture(scope="module")
def foretold(small_dataset, dlrm, tmp_path_factory):
    folder = tmp_path_factory.mktemp("dry")
    before = sorted(small_dataset.path.rglob("*"))
    done = dlrm(
        *("train", CONFIG, "--dataset", small_dataset.path, "--run", folder / "run", "--dry-run", "--json"),
        *("--nproc-per-node", 2, "--train.epochs", 2, "--validation.every-rows", 1000),
    )
    assert done.returncode == 0, done.stderr
    assert list(folder.iterdir()) == []
    assert sorted(small_dataset.path.rglob("*")) == before
    return done


def test_a_dry_run_tells_rows_steps_tables_and_bytes_and_writes_nothing(foretold, small_dataset):
    said = json.loads(foretold.stdout)
    assert (said["rows_per_epoch"], said["steps_per_epoch"], said["num_steps"], said["num_rows"]) == (
        *(4286, -(-4286 // 64), 2 * -(-4286 // 64)),
        2 * 4286,
    )
    weight_bytes = sum(small_dataset.num_embeddings.values()) * 16 * 4
    assert sum(rank["weight_bytes"] for rank in said["plan"]["ranks"]) == weight_bytes
    assert {shard["rank"] for table in said["plan"]["tables"].values() for shard in table["shards"]} == {0, 1}
    for text in ("ranks", "largest tables", "an epoch: 4,286 rows, 67 steps of 64 rows, the last one 62"):
        assert text in foretold.stderr
    assert "validation: 357 rows, every 1,000 training rows, at the end" in foretold.stderr


@pytest.mark.slow
def test_the_training_does_what_was_foretold_also_by_plan(foretold, small_dataset, dlrm, tmp_path):
    run = tmp_path / "run"
    arguments = ("train", CONFIG, "--dataset", small_dataset.path, "--run", run, "--json", "--train.epochs", 2)
    done = dlrm(*arguments, "--nproc-per-node", 2, "--validation.every-rows", 1000)
    assert done.returncode == 0, done.stderr
    said, summary = json.loads(foretold.stdout), json.loads(done.stdout)
    assert (summary["step"], summary["rows"]) == (said["num_steps"], said["num_rows"])
    obeyed = json.loads((run / "plan.json").read_text())["tables"]
    assert {name: table["shards"] for name, table in obeyed.items()} == {
        name: table["shards"] for name, table in said["plan"]["tables"].items()
    }
    for asked in (("--run", run), (CONFIG, "--dataset", small_dataset.path)):
        planned = dlrm("plan", *asked, "--devices", 2, "--json")
        assert planned.returncode == 0, planned.stderr
        tables = json.loads(planned.stdout)["tables"]
        assert {name: table["shards"] for name, table in tables.items()} == {
            name: table["shards"] for name, table in obeyed.items()
        }
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    validated = [line["rows"] for line in lines if line["split"] == "val"]
    # The first step that reaches each thousand, where the last batch of an epoch has 62 rows; and the end.
    rows = [4286 * epoch + min(64 * step, 4286) for epoch in range(2) for step in range(1, 68)]
    assert validated == [min(r for r in rows if r >= 1000 * n) for n in range(1, 9)] + [2 * 4286]

    before = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    again = dlrm(*arguments, "--dry-run", "--train.epochs", 3)
    assert again.returncode == 0, again.stderr
    assert f"the run: 201 steps, 12,858 rows, resuming after step {summary['step']}" in again.stderr
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*")} == before


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"sharding.host_memory_bytes": "1000"}, "the tables do not fit on 1 rank"),
        (
            {"table_optimizer.name": "lamb", "table_optimizer.weight_decay_mode": "lazy"},
            "weight_decay_mode: lamb has no lazy weight decay on CPU; choose decoupled or l2, or another",
        ),
        ({"sharding.constraints": "t_cat_9=diagonal"}, "diagonal"),
        ({"sharding.plan": "nowhere.json"}, "nowhere.json"),
    ],
)
def test_what_would_be_refused_is_refused_before_anything_is_written(options, expected, small_dataset, tmp_path):
    config = load_config(CONFIG, options)
    with pytest.raises(UserError, match=expected):
        preview_training(config, small_dataset, tmp_path / "run", world_size=1, local_world_size=1, restart=False)
    assert not (tmp_path / "run").exists()


def test_a_checkpoint_is_written_at_once_where_the_memory_has_no_room_for_a_copy(small_dataset, tmp_path, monkeypatch):
    """A plan that fits would else end with the first checkpoint, by the memory killer."""
    from torchdlrm.training.checkpointer import Checkpointer
    from torchdlrm.training.job import train

    waited = []
    save = Checkpointer.save

    def watched(checkpointer, position, *, wait, loss):
        waited.append(wait)
        return save(checkpointer, position, wait=wait, loss=loss)

    monkeypatch.setattr(Checkpointer, "save", watched)
    options = {"train.max_steps": "4", "checkpoint.every_steps": "1", "logging.tensorboard": "false"}
    memory_bytes = 10_000_000
    for name in ("roomy", "narrow"):
        config = load_config(CONFIG, {**options, "sharding.host_memory_bytes": str(memory_bytes)})
        about = preview_training(
            config, small_dataset, tmp_path / name, world_size=1, local_world_size=1, restart=False
        )
        (rank,) = about.solution.ranks
        half_a_copy = (rank.weight_bytes + rank.state_bytes) / 2
        memory_bytes = int(rank.total_bytes + half_a_copy + about.solution.problem.dense.total_bytes)
        assert ("checkpoints: the steps wait" in "\n".join(preview_lines(about))) == (name == "narrow")
        train(config, small_dataset.path, tmp_path / name)
        assert waited == [*[name == "narrow"] * 3, True]  # the last is waited for in any case
        waited.clear()
