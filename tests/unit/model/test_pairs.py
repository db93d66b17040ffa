import pytest
import torch

from torchdlrm.model.dot import PairLayout


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("num_vectors", [2, 3, 4, 7, 26, 27])
def test_the_over_arch_sees_every_pair_once_and_nothing_else(num_vectors, dtype, seed):
    torch.manual_seed(seed)
    dim = 4
    layout = PairLayout(num_vectors, dim, dtype)
    # Small integers: sums and products are exact in bfloat16 too, and every number tells where it comes from.
    vectors = torch.zeros(3, layout.num_slots, dim, dtype=dtype)
    vectors[:, :num_vectors] = torch.randint(-3, 4, (3, num_vectors, dim)).to(dtype)
    first, second = torch.triu_indices(num_vectors, num_vectors, offset=1)
    weight = torch.randint(-2, 3, (5, dim + len(first))).float()
    square = torch.bmm(vectors, vectors.transpose(1, 2))
    inputs = layout.interact(vectors)
    expected = torch.cat([vectors[:, 0], square[:, first, second]], dim=1).float() @ weight.T
    assert torch.equal(inputs.float() @ layout.spread(weight).T, expected)
