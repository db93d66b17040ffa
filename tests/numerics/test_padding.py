"""Padding of the ranks' slices counts nowhere: not in the loss, its gradient, or what is predicted."""

import pytest
import torch
from torchrec.modules.embedding_configs import EmbeddingBagConfig
from torchrec.modules.embedding_modules import EmbeddingBagCollection

from torchdlrm.errors import ConfigError
from torchdlrm.loader.loader import Loader
from torchdlrm.model.dlrm import DLRM
from torchdlrm.model.loss import DLRMTrain


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
