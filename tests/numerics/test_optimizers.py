"""Every optimizer against arithmetic of its own, and taken up where it stopped."""

import math
from functools import partial

import numpy as np
import pytest
import torch
from fbgemm_gpu.split_table_batched_embeddings_ops_training import SplitTableBatchedEmbeddingBagsCodegen
from torchrec.optim.keyed import CombinedOptimizer

from helpers.trainings import state
from torchdlrm.config import TABLE_OPTIMIZERS, DenseOptimizerConfig, TableOptimizerConfig, load_config
from torchdlrm.errors import ConfigError
from torchdlrm.model.architecture import ModelShape
from torchdlrm.model.build import build_model
from torchdlrm.tables.optimizers import check_plain_torchrec, check_table_optimizer, table_kernels
from torchdlrm.training.job import train
from torchdlrm.training.processes.process_group import join_process_group
from torchdlrm.training.sharded import StepCounters, build_optimizer, build_sharded_model

SMALL = {
    "model.embedding_dim": "8",
    "model.dense_arch_layer_sizes": "16,8",
    "model.over_arch_layer_sizes": "16,1",
    "train.batch_size_global": "256",
    "checkpoint.every_minutes": "0",
    "logging.tensorboard": "false",
}
CASES = {
    "rowwise_adagrad, adagrad": {
        "table_optimizer.initial_accumulator": "0.1",
        "dense_optimizer.initial_accumulator": "0.1",
        "dense_optimizer.weight_decay": "0.01",
        "dense_optimizer.clip_norm": "0.05",
    },
    "adagrad, adamw": {"dense_optimizer.weight_decay": "0.1", "schedule.name": "cosine", "schedule.decay_steps": "6"},
    "sgd, sgd": {"dense_optimizer.momentum": "0.9", "train.dropout": "0.3", "schedule.warmup_steps": "4"},
    "adam, adagrad": {"table_optimizer.weight_decay": "0.1", "table_optimizer.weight_decay_mode": "lazy"},
    "partial_rowwise_lamb, adagrad": {"table_optimizer.weight_decay": "0.1", "schedule.warmup_steps": "4"},
}


@pytest.mark.parametrize("case", CASES)
def test_a_resumed_run_has_the_bytes_of_an_uninterrupted_one(case, small_dataset, tmp_path):
    table, dense = case.split(", ")
    names = {"table_optimizer.name": table, "dense_optimizer.name": dense, "validation.every_steps": "2"}
    options = {**SMALL, **names, **CASES[case]}

    def trained(run, max_steps):
        train(load_config(None, {**options, "train.max_steps": str(max_steps)}), small_dataset.path, tmp_path / run)
        return {name: torch.as_tensor(leaf) for name, leaf in state(tmp_path / run, tmp_path, max_steps).items()}

    whole, half, parts = trained("whole", 6), trained("parts", 3), trained("parts", 6)
    assert whole.keys() == parts.keys()
    assert [name for name in whole if not torch.equal(whole[name], parts[name])] == []
    assert [name for name in whole if torch.equal(whole[name], half[name])] == []  # everything moves


def dense_parameters(config, steps, seed):
    """Parameters of the dense part before and after steps with known gradients, and these gradients."""
    torch.manual_seed(seed)
    shape = ModelShape(load_config(None, SMALL).model, 3, 1)
    model = build_model(shape, torch.device("cpu")).model.over_arch
    model.fused_optimizer = CombinedOptimizer([])
    optimizer = build_optimizer(model, config)
    before = [parameter.detach().double().numpy().copy() for parameter in model.parameters()]
    grads = []
    for _ in range(steps):
        for parameter in model.parameters():
            parameter.grad = torch.randn_like(parameter)
        grads.append([parameter.grad.double().numpy().copy() for parameter in model.parameters()])
        optimizer.step()
    return before, [parameter.detach().double().numpy() for parameter in model.parameters()], grads


def clipped(grads, norm):
    length = math.sqrt(sum(float((grad**2).sum()) for grad in grads))
    return [grad * min(1.0, norm / length) for grad in grads]


def test_gradients_of_the_dense_part_are_clipped_together(seed):
    config = DenseOptimizerConfig(name="sgd", learning_rate=0.5, clip_norm=2.0)
    before, after, grads = dense_parameters(config, 1, seed)
    for was, now, grad in zip(before, after, clipped(grads[0], 2.0), strict=True):
        np.testing.assert_allclose(now, was - 0.5 * grad, atol=1e-5)
    loose = DenseOptimizerConfig(name="sgd", learning_rate=0.5, clip_norm=1e6)
    before, after, grads = dense_parameters(loose, 1, seed)
    np.testing.assert_allclose(after[0], before[0] - 0.5 * grads[0][0], atol=1e-5)


def test_adamw_and_momentum_follow_their_formulas(seed):
    config = DenseOptimizerConfig(name="adamw", learning_rate=0.1, beta1=0.8, beta2=0.9, eps=1e-4, weight_decay=0.5)
    before, after, grads = dense_parameters(config, 3, seed)
    for index, weight in enumerate(before):
        mean = square = 0.0
        for step in range(1, 4):
            grad = grads[step - 1][index]
            mean, square = 0.8 * mean + 0.2 * grad, 0.9 * square + 0.1 * grad**2
            weight = weight - 0.1 * 0.5 * weight  # noqa: PLW2901 - the weight moves
            weight -= 0.1 * (mean / (1 - 0.8**step)) / (np.sqrt(square / (1 - 0.9**step)) + 1e-4)  # noqa: PLW2901
        np.testing.assert_allclose(after[index], weight, atol=1e-5)
    config = DenseOptimizerConfig(name="sgd", learning_rate=0.1, momentum=0.9, weight_decay=0.5)
    before, after, grads = dense_parameters(config, 3, seed)
    for index, weight in enumerate(before):
        velocity = 0.0
        for step in range(3):
            velocity = 0.9 * velocity + grads[step][index] + 0.5 * weight
            weight = weight - 0.1 * velocity  # noqa: PLW2901
        np.testing.assert_allclose(after[index], weight, atol=1e-5)


def test_fbgemms_counter_is_the_step_whatever_was_forwarded_before(small_dataset):
    """Adam's bias correction in FBGEMM counts forward passes, also those of a validation, from when it was built."""
    config = load_config(None, SMALL)
    with join_process_group() as ranks:
        shape = ModelShape.of(config.model, small_dataset)
        model = build_sharded_model(config, shape, dense_sample=None, ranks=ranks).module
    kernel = next(table_kernels(model))
    forward = partial(SplitTableBatchedEmbeddingBagsCodegen.forward, kernel)  # FBGEMM's, as on GPUs
    offsets = torch.zeros(len(kernel.embedding_specs) + 1, dtype=torch.int64)
    for _ in range(3):
        forward(torch.empty(0, dtype=torch.int64), offsets)
    assert (int(kernel.iter), int(kernel.iter_cpu)) == (3, 3)
    StepCounters(model, seed=0, rank=0).begin(41)
    forward(torch.empty(0, dtype=torch.int64), offsets)
    assert (int(kernel.iter), int(kernel.iter_cpu)) == (41, 41)


@pytest.mark.parametrize("mode", ["decoupled", "lazy", "l2"])
@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("record", TABLE_OPTIMIZERS.values(), ids=list(TABLE_OPTIMIZERS))
def test_each_device_has_the_modes_of_weight_decay_that_its_record_says(record, device, mode):
    config = TableOptimizerConfig(name=record.name, weight_decay=0.1, weight_decay_mode=mode)
    modes = record.decays(on_cpu=device == "cpu")
    if mode in modes:
        check_table_optimizer(config, torch.device(device))
        return
    with pytest.raises(ConfigError) as caught:
        check_table_optimizer(config, torch.device(device))
    message = str(caught.value)
    key = "weight_decay_mode" if modes or mode == "lazy" else "weight_decay"
    assert message.startswith(f"table_optimizer.{key}: {record.name} has no")
    assert all(word in message for word in modes)
    assert ("train.device = cpu" in message) == (device == "cuda" and mode in record.decays_on_cpu)
    if mode != "lazy" and record.momentum != "lamb":  # the first has state, whatever the decay
        check_table_optimizer(config.model_copy(update={"weight_decay": 0.0}), torch.device(device))


def test_plain_torchrec_is_not_timed_with_what_it_does_not_have():
    on_cpu, lazy = torch.device("cpu"), {"weight_decay_mode": "lazy"}
    for settings in ({"name": "adam"}, {"weight_decay": 0.1}, {"name": "sgd", **lazy}):
        with pytest.raises(ConfigError, match=f"plain TorchRec has no {settings.get('name', 'rowwise_adagrad')} with"):
            check_plain_torchrec(TableOptimizerConfig(**settings), on_cpu)
    check_plain_torchrec(TableOptimizerConfig(name="adam", weight_decay=0.1), torch.device("cuda"))
    check_plain_torchrec(TableOptimizerConfig(name="adagrad"), on_cpu)
