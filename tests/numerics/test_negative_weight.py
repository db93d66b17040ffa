"""With rows without a click weighted down, predictions stay the probabilities that they were."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from torchdlrm.model.loss import batch_loss

CONFIG = Path(__file__).parents[2] / "configs" / "criteo-small.toml"


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
