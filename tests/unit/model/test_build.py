"""Initial weights: the same on every device."""

import torch
from torch import nn

from torchdlrm.config import ModelConfig
from torchdlrm.model.architecture import ModelShape
from torchdlrm.model.build import build_model
from torchdlrm.model.dot import DotArchitecture

SIZES = ModelConfig(embedding_dim=4, dense_arch_layer_sizes=(8, 4), over_arch_layer_sizes=(8, 1))


class OfTwoGenerators(DotArchitecture):
    """Stands for a GPU, which draws other numbers: in memory of the CPU, so that the test needs none."""

    def build(self, shape, embedding_bag_collection, device):
        model = DotArchitecture().build(shape, embedding_bag_collection, torch.device("cpu"))
        if device.type == "cuda":
            for parameter in (*model.dense_arch.parameters(), *model.over_arch.parameters()):
                nn.init.uniform_(parameter)
        return model


def test_a_gpu_starts_with_the_weights_of_the_cpu(seed):
    built = []
    for device in ("cpu", "cuda"):
        torch.manual_seed(seed)
        shape = ModelShape(SIZES, num_dense=3, num_sparse=2, given_architecture=OfTwoGenerators())
        built.append(build_model(shape, torch.device(device), dropout=0.5))
    on_cpu, on_gpu = (dict(model.named_parameters()) for model in built)
    assert on_cpu.keys() == on_gpu.keys()
    compared = [name for name, weight in on_cpu.items() if not weight.is_meta and torch.equal(weight, on_gpu[name])]
    assert len(compared) == 8  # weight and bias of four layers
