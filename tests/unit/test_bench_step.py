"""The benchmark of the step: who runs beside whom, and the plain loop. Processes: `integration/test_bench.py`."""

from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from torchdlrm.bench import step
from torchdlrm.bench.competitors import Case, random_rows, torchrec_dlrm, torchrec_kjt
from torchdlrm.bench.plain_torch import PlainDLRM, plain_torch_step, update_rows
from torchdlrm.config import ModelConfig, load_config
from torchdlrm.errors import ConfigError
from torchdlrm.model.architecture import ModelShape
from torchdlrm.training.processes.process_group import Ranks


@pytest.fixture
def competitors(monkeypatch):
    """Stands in for processes: who is there, and who was there together. A row takes a millisecond."""
    alive, together = set(), []

    class Competitor:
        def __init__(self, build, case, *, nproc, device):
            del nproc, device
            self.rows = 16 if build is step.host_step else case.config.train.batch_size_global
            self.num_threads = 2
            alive.add(self)
            together.append((len(alive), build.__name__))

        def choose_threads(self):
            self.num_threads = 1

        def run(self, steps):
            return self.rows * steps * 1e-3

        def close(self):
            alive.remove(self)

    monkeypatch.setattr(step, "Competitor", Competitor)
    monkeypatch.setattr(step, "_memory_bytes", lambda _: 10_000)
    yield together
    assert not alive


CPU = torch.device("cpu")
OWN = f"{Path(__file__).parents[2]}/examples/own_interaction.py:FieldAttention"
CONFIG = load_config(None, {"train.batch_size_global": "1024", "train.precision": "float32"})


@pytest.mark.parametrize(("device", "most"), [("cuda", 1), ("cpu", 5)])
def test_on_gpus_one_is_gone_before_the_next_takes_the_memory(device, most, competitors, monkeypatch):
    monkeypatch.setattr(step, "rank_device", lambda *_: torch.device(device))
    found = step.benchmark_step(CONFIG, num_embeddings={"a": 5}, steps_per_round=2, rounds=3)
    names = ["our_step", "torchrec_step", "plain_torch_step", "floor_step", "host_step"]
    assert [name for _, name in competitors] == names
    assert max(number for number, _ in competitors) == most
    assert found["rows_per_s"] == pytest.approx(1000)
    assert found["host_ms"] == pytest.approx(16)  # of 16 rows
    assert found["ratio_to_plain_torch"] == pytest.approx(1)


BRANCHES = {f"model.projection.branch{number}_layer_sizes": "[128]" for number in (1, 2)}


@pytest.mark.parametrize(
    ("rows", "nproc", "settings"),
    [
        (6, 1, {}),
        (5, 2, {}),
        (5, 1, {"table_optimizer.name": "sgd"}),
        (5, 1, {"model.interaction": "projection", **BRANCHES}),
    ],
)
def test_the_plain_loop_needs_memory_one_process_its_optimizer_and_its_model(rows, nproc, settings, competitors):
    config = load_config(None, {"train.precision": "float32", **settings})
    found = step.benchmark_step(config, num_embeddings={"a": rows}, steps_per_round=2, rounds=1, nproc=nproc)
    assert "plain_torch_step" not in [name for _, name in competitors]
    assert found["plain_torch_rows_per_s"] is None
    assert found["ratio_to_plain_torch"] is None


def test_a_model_class_is_compared_with_itself_on_torchrecs_tables(competitors):
    step.benchmark_step(CONFIG, num_embeddings={"a": 5}, steps_per_round=2, rounds=1, model_class=OWN)
    assert [name for _, name in competitors] == ["our_step", "torchrec_step", "floor_step", "host_step"]
    sizes = {"a": 5, "b": 7}
    model = torchrec_dlrm(Case(CONFIG, sizes, OWN).shape, sizes, tables=CPU, dense=CPU)
    assert type(model.inter_arch).__name__ == "FieldAttention"
    dense, ids_FB = next(random_rows(sizes.values(), 3, np.random.default_rng(1), np.int64))
    assert model(torch.from_numpy(dense), torchrec_kjt(sizes, ids_FB)).shape == (3, 1)


@pytest.mark.usefixtures("competitors")
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"model.interaction": "dcn", "model.dcn.gated": "true"}, r"dcn.gated: TorchRec's DLRM_DCN, .*, has no gates"),
        ({"model.features.a.embedding_dim": "4"}, r"model.features: TorchRec's own model, .*, has no smaller tables"),
    ],
)
def test_what_torchrec_has_not_is_not_compared(settings, message):
    with pytest.raises(ConfigError, match=message):
        step.benchmark_step(load_config(None, settings), num_embeddings={"a": 5}, rounds=1)


@pytest.mark.usefixtures("competitors")
def test_a_turn_is_half_a_second_at_least_and_others_choose_their_threads():
    found = step.benchmark_step(CONFIG, num_embeddings={"a": 5}, rounds=1)
    assert found["steps_per_round"] == {"ours": 10, "torchrec": 10, "plain_torch": 10, "floor": 10, "host": 31}
    assert found["num_threads"] == {"ours": 2, "torchrec": 1, "plain_torch": 1, "floor": 1, "host": 2}


@pytest.mark.usefixtures("competitors")
def test_busy_processes_are_there_in_every_turn_and_gone_afterwards(monkeypatch):
    there, seen = [], []

    @contextmanager
    def busy(number):
        there.append(number)
        yield
        there.pop()

    monkeypatch.setattr(step, "busy_processes", busy)
    monkeypatch.setattr(step.Competitor, "run", lambda *_: seen.append(list(there)) or 1.0)
    found = step.benchmark_step(CONFIG, num_embeddings={"a": 5}, rounds=2, steps_per_round=1, num_busy=3)
    assert found["num_busy_processes"] == 3
    assert seen == [[3]] * 15  # five competitors, two rounds and one that warms up
    assert not there


@pytest.mark.parametrize("interaction", [{}, {"interaction": "dcn", "dcn": {"num_layers": 2, "low_rank_dim": 3}}])
def test_the_plain_loop_computes_torchrecs_model(interaction, seed):
    torch.manual_seed(seed)
    config = ModelConfig(embedding_dim=4, dense_arch_layer_sizes=[5, 4], over_arch_layer_sizes=[3, 1], **interaction)
    theirs = torchrec_dlrm(ModelShape(config, 13, 2), {"a": 9, "b": 9}, tables=CPU, dense=CPU)
    ours = PlainDLRM(config, 2)
    weights = {name: torch.randn_like(value) for name, value in theirs.state_dict().items()}
    theirs.load_state_dict(weights)
    cross = {"W_kernels.{}": "W.{}.weight", "V_kernels.{}": "V.{}.weight", "bias.{}": "W.{}.bias"}
    renamed = {
        f"interaction.{our.format(i)}": weights.pop(f"inter_arch.crossnet.{their.format(i)}")
        for i in range(config.dcn.num_layers if interaction else 0)
        for their, our in cross.items()
    }
    arches = (name for name in ours.state_dict() if "arch" in name)
    renamed |= zip(arches, (value for name, value in weights.items() if "sparse" not in name), strict=True)
    ours.load_state_dict(renamed)
    ids = KeyedJaggedTensor(["a", "b"], torch.tensor([1, 2, 3, 3]), lengths=torch.ones(4, dtype=torch.int32))
    dense = torch.rand(2, 13)
    embeddings = theirs.sparse_arch(ids)
    torch.testing.assert_close(ours(dense, embeddings), theirs(dense, ids).squeeze(1))


def test_the_plain_loop_steps_once_on_a_row_that_occurs_twice():
    table, squares = torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]]), torch.tensor([0.0, 7.0, 1.0])
    grad = torch.tensor([[1.0, 2.0], [0.5, 0.5], [3.0, 1.0]])
    update_rows(table, squares, torch.tensor([2, 0, 2]), grad, lr=0.1, eps=0.5)
    summed, square = torch.tensor([4.0, 3.0]), 1 + (16 + 9) / 2
    torch.testing.assert_close(squares, torch.tensor([0.25, 7.0, square]))
    torch.testing.assert_close(table[2], torch.tensor([5.0, 6.0]) - 0.1 * summed / (square**0.5 + 0.5))
    torch.testing.assert_close(table[0], torch.tensor([1.0, 2.0]) - 0.1 * torch.tensor([0.5, 0.5]) / (0.25**0.5 + 0.5))
    torch.testing.assert_close(table[1], torch.tensor([3.0, 4.0]))


def test_the_plain_loop_learns_its_batches():
    config = load_config("criteo-small", {"train.batch_size_global": "8"})
    loop = plain_torch_step(Ranks(0, 1, 1, torch.device("cpu")), Case(config, {"a": 500, "b": 700}))
    losses = torch.stack([loop() for _ in range(320)])  # 16 batches in turn
    assert losses[-16:].mean() < 0.5 * losses[:16].mean()
