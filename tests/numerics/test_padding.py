"""Padding of the ranks' slices counts nowhere: not in the loss, its gradient, or what is predicted."""

import pytest
import torch
from torchrec.modules.embedding_configs import EmbeddingBagConfig
from torchrec.modules.embedding_modules import EmbeddingBagCollection

from torchdlrm.loader.loader import Loader
from torchdlrm.model.dlrm import DLRM, DLRMTrain


@pytest.fixture
def model(small_dataset, seed):
    torch.manual_seed(seed)
    tables = [
        EmbeddingBagConfig(name=f"t_{name}", embedding_dim=8, num_embeddings=rows, feature_names=[name])
        for name, rows in small_dataset.num_embeddings.items()
    ]
    return DLRM(EmbeddingBagCollection(tables=tables), len(small_dataset.dense_names), [16, 8], [16, 1])


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
