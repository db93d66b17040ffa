"""The loss: padding of the ranks' slices counts nowhere, and with rows without a click weighted down, predictions stay
the probabilities that they were.
"""

import json
import math

import numpy as np
import pytest
import torch
from torchrec.modules.embedding_configs import EmbeddingBagConfig
from torchrec.modules.embedding_modules import EmbeddingBagCollection

from torchdlrm.errors import ConfigError
from torchdlrm.loader.loader import Loader
from torchdlrm.model.dlrm import DLRM
from torchdlrm.model.loss import DLRMTrain, batch_loss


class WithAuxiliaryLoss(DLRM):
    """Wants small logits while it is trained."""

    def forward(self, dense_features, sparse_features):
        logits = super().forward(dense_features, sparse_features)
        return (logits, logits.squeeze(1).square()) if self.training else logits


@pytest.fixture(params=[DLRM, WithAuxiliaryLoss])
def model(request, small_dataset, seed):
    torch.manual_seed(seed)
    tables = [
        EmbeddingBagConfig(name=f"t_{name}", embedding_dim=8, num_embeddings=rows, feature_names=[name])
        for name, rows in small_dataset.num_embeddings.items()
    ]
    return request.param(EmbeddingBagCollection(tables=tables), len(small_dataset.dense_names), [16, 8], [16, 1])


@pytest.mark.parametrize("negative_weight", [1.0, 0.3])
@pytest.mark.parametrize(("world_size", "last_rows"), [(2, 1), (3, 2), (5, 2), (5, 299)])
def test_the_mean_over_the_ranks_is_the_loss_and_the_gradient_of_one_process(
    model, small_dataset, world_size, last_rows, negative_weight
):
    """Two batches; the last has fewer rows than there are ranks, or one too few."""
    train = DLRMTrain(model, negative_weight)
    options = {"batch_size_global": 301, "max_rows": 301 + last_rows}
    ranks = [Loader(small_dataset, "train", rank=rank, world_size=world_size, **options) for rank in range(world_size)]
    num_padding = 0
    for whole, *parts in zip(Loader(small_dataset, "train", **options), *ranks, strict=True):
        model.zero_grad()
        loss, (_, logits, labels) = train(whole)
        loss.backward()
        expected = {name: weight.grad.clone() for name, weight in model.named_parameters()}
        model.zero_grad()
        losses, found = [], []
        for part in parts:
            part_loss, (_, *logits_and_labels) = train(part)
            (part_loss / world_size).backward()
            losses.append(part_loss.item())
            found.append(logits_and_labels)
            num_padding += part.num_padding
        assert sum(losses) / world_size == pytest.approx(loss.item(), abs=1e-6)
        torch.testing.assert_close(torch.cat([part[0] for part in found]), logits, atol=1e-6, rtol=1e-5)
        assert torch.equal(torch.cat([part[1] for part in found]), labels)
        for name, weight in model.named_parameters():
            torch.testing.assert_close(weight.grad, expected[name], atol=1e-6, rtol=1e-5, msg=name)
    assert num_padding > 0


@pytest.mark.parametrize("negative_weight", [1.0, 0.3])
def test_an_auxiliary_loss_is_added_to_that_of_each_row(model, small_dataset, negative_weight):
    batch = next(iter(Loader(small_dataset, "train", batch_size_global=40)))
    loss, (told, logits, labels) = DLRMTrain(model, negative_weight)(batch)
    probabilities = torch.sigmoid(logits.double() - torch.tensor(negative_weight, dtype=torch.float64).log())
    of_rows = -torch.log(torch.where(labels > 0, probabilities, 1 - probabilities))
    if isinstance(model, WithAuxiliaryLoss):
        of_rows += logits.double().square()
    expected = (of_rows * torch.where(labels > 0, 1.0, negative_weight)).mean().item()
    assert loss.item() == pytest.approx(expected, abs=1e-6)
    assert told.item() == loss.item()


class WithAnotherOutput(torch.nn.Module):
    def __init__(self, output):
        super().__init__()
        self.output = output

    def forward(self, *_):
        return self.output


@pytest.mark.parametrize(
    ("output", "got"),
    [
        (torch.zeros(40), r"logits \[rows, 1\], got \[40\]"),
        (torch.zeros(40, 2), r"logits \[rows, 1\], got \[40, 2\]"),
        ((torch.zeros(40, 1), torch.zeros(())), r"auxiliary loss \[rows\], got \[40, 1\] and \[\]"),
        ((torch.zeros(40, 1), torch.zeros(40, 1)), r"auxiliary loss \[rows\], got \[40, 1\] and \[40, 1\]"),
    ],
)
def test_outputs_of_other_shapes_are_refused(output, got, small_dataset):
    batch = next(iter(Loader(small_dataset, "train", batch_size_global=40)))
    with pytest.raises(ConfigError, match=got):
        DLRMTrain(WithAnotherOutput(output))(batch)


CONFIG = "criteo-small"


def best_logit(labels, weight):
    """The constant logit that minimises the loss, by bisection of its gradient."""
    low, high = -10.0, 10.0
    for _ in range(60):
        middle = torch.tensor((low + high) / 2, dtype=torch.float64, requires_grad=True)
        batch_loss(middle.expand(len(labels)), labels, None, weight).backward()
        low, high = (middle.item(), high) if middle.grad < 0 else (low, middle.item())
    return low


@pytest.mark.parametrize("weight", [0.01, 0.2, 1.0, 3.0])
def test_what_minimises_the_loss_is_the_logit_of_the_click_rate(weight, seed):
    labels = torch.from_numpy((np.random.default_rng(seed).random(4_000) < 0.13).astype(np.float64))
    rate = float(labels.mean())
    assert best_logit(labels, weight) == pytest.approx(math.log(rate / (1 - rate)), abs=1e-6)


@pytest.mark.parametrize("weight", [0.1, 0.5])
def test_the_loss_is_the_weighted_one_of_the_prediction_before_he_et_als_correction(weight, seed):
    generator = np.random.default_rng(seed)
    logits, labels = generator.normal(size=200), (generator.random(200) < 0.3).astype(float)
    corrected = 1 / (1 + np.exp(-logits))
    # q = p / (p + (1 - p) / w), solved for p
    raw = corrected / (corrected + (1 - corrected) * weight)
    np.testing.assert_allclose(raw / (raw + (1 - raw) / weight), corrected)
    expected = -np.mean(labels * np.log(raw) + weight * (1 - labels) * np.log(1 - raw))
    found = batch_loss(torch.from_numpy(logits), torch.from_numpy(labels), None, weight)
    assert float(found) == pytest.approx(expected, abs=1e-9)


def test_a_trained_model_stays_calibrated(small_dataset, dlrm, tmp_path):
    """Without the correction a weight of 0.2 would give 5 times the odds: more than twice the click rate."""
    run = tmp_path / "run"
    options = ("--train.negative-weight", 0.2, "--schedule.name", "cosine", "--logging.tensorboard", "false")
    done = dlrm("train", CONFIG, "--dataset", small_dataset.path, "--run", run, *options)
    assert done.returncode == 0, done.stderr
    result = json.loads(dlrm("evaluate", run, "--split", "train", "--json").stdout)
    assert result["calibration"] == pytest.approx(1.0, abs=0.1)
    assert result["auc"] > 0.65
