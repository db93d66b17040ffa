"""Two processes and one, given the same global batches, train the same model."""

import json

import pytest
import torch
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

from helpers.trainings import losses

STEPS = 20

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def runs(small_dataset, dlrm, tmp_path_factory):
    """The same config trained for 20 steps by one process and by two; batch 301 cannot be halved.

    The dense parts learn by SGD.  Where the input of a ReLU is within rounding of 0, it may be on or off, and the first
    step of Adagrad has the size of the learning rate however small the gradient: on some processors that alone was
    1e-3 in a weight after the 14th step, where the losses had agreed to 1e-8 until then.
    """
    folder = tmp_path_factory.mktemp("runs")
    made = {}
    for name, nproc, communication in ((1, 1, "auto"), (2, 2, "auto"), ("float16", 2, "float16")):
        made[name] = folder / f"run-{name}"
        done = dlrm(
            *("train", "configs/criteo-small.toml", "--dataset", small_dataset.path, "--run", made[name]),
            # Else the processor at hand decides, and bfloat16 rounds rank by rank.
            *("--train.communication", communication, "--train.precision", "float32"),
            *("--dense-optimizer.name", "sgd", "--dense-optimizer.learning-rate", 0.05),
            *("--nproc-per-node", nproc, "--train.batch-size-global", 301, "--train.epochs", 2),
            *("--train.max-steps", STEPS, "--logging.every-steps", 1, "--validation.every-steps", 7, "--json"),
        )
        assert done.returncode == 0, done.stderr
    return made


def weights(run, tmp_path):
    dcp_to_torch_save(run / "checkpoints" / f"step-{STEPS:08d}", tmp_path / "weights.pt")
    return torch.load(tmp_path / "weights.pt", weights_only=True)["model"]


def test_every_step_has_the_same_loss(runs):
    assert len(losses(runs[1])) == STEPS
    assert losses(runs[2]) == pytest.approx(losses(runs[1]), abs=1e-5)
    assert losses(runs[1])[-1] != pytest.approx(losses(runs[1])[0], abs=1e-3)  # something was learnt


def test_validations_between_the_steps_have_the_same_loss(runs):
    assert len(losses(runs[1], "val")) == 3  # after 7, 14 and 20 steps
    assert losses(runs[2], "val") == pytest.approx(losses(runs[1], "val"), abs=1e-5)


def test_embeddings_sent_as_float16_train_nearly_the_same(runs):
    assert losses(runs["float16"]) == pytest.approx(losses(runs[2]), abs=5e-3)
    assert losses(runs["float16"]) != losses(runs[2])  # they were rounded


def test_the_weights_are_the_same(runs, tmp_path):
    one, two = weights(runs[1], tmp_path), weights(runs[2], tmp_path)
    assert one.keys() == two.keys()
    assert len([name for name in one if "embedding_bags" in name]) == 26
    for name in one:
        torch.testing.assert_close(two[name], one[name], atol=1e-4, rtol=0, msg=name)


def test_two_processes_share_the_tables(runs):
    plan = json.loads((runs[2] / "plan.json").read_text())
    ranks = {shard["rank"] for table in plan["tables"].values() for shard in table["shards"]}
    assert ranks == {0, 1}


def test_a_run_evaluates_to_the_same_on_any_world_size_and_batch_size(runs, dlrm):
    results = []
    for nproc, batch_size in ((1, 8192), (2, 77)):
        done = dlrm(
            *("evaluate", runs[2], "--split", "val+test", "--json"),
            *("--nproc-per-node", nproc, "--batch-size-global", batch_size),
        )
        assert done.returncode == 0, done.stderr
        results.append(json.loads(done.stdout))
    for result in results[1:]:
        assert result["rows"] == results[0]["rows"] == 714
        for name in ("auc", "logloss", "ne", "calibration", "accuracy"):
            assert result[name] == pytest.approx(results[0][name], abs=1e-6)
