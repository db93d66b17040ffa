"""The benchmark of the step: who runs beside whom, and the plain loop. Processes: `integration/test_bench.py`."""

from contextlib import contextmanager

import pytest
import torch
from torchrec.models.dlrm import DLRM
from torchrec.modules.embedding_configs import EmbeddingBagConfig
from torchrec.modules.embedding_modules import EmbeddingBagCollection
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from torchdlrm.bench import step
from torchdlrm.bench.plain_torch import PlainDLRM, plain_torch_step, update_rows
from torchdlrm.config import load_config
from torchdlrm.training.processes.process_group import Ranks


@pytest.fixture
def competitors(monkeypatch):
    """Stands in for processes: who is there, and who was there together. A row takes a millisecond."""
    alive, together = set(), []

    class Competitor:
        def __init__(self, build, config, *arguments, nproc, device):
            del arguments, nproc, device
            self.rows = 16 if build is step.host_step else config.train.batch_size_global
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


CONFIG = load_config(None, {"train.batch_size_global": "1024", "train.precision": "float32"})


@pytest.mark.parametrize(("device", "most"), [("cuda", 1), ("cpu", 5)])
def test_on_gpus_one_is_gone_before_the_next_takes_the_memory(device, most, competitors, monkeypatch):
    monkeypatch.setattr(step, "rank_device", lambda *_: torch.device(device))
    found = step.benchmark_step(CONFIG, num_embeddings={"a": 5}, steps_per_round=2, rounds=3)
    names = ["our_step", "torchrec_step", "plain_torch_step", "floor_step", "host_step"]
    assert [name for _, name in competitors] == names
    assert max(number for number, _ in competitors) == most
    assert found.rows_per_s == pytest.approx(1000)
    assert found.host_ms == pytest.approx(16)  # of 16 rows
    assert found.ratio_to_plain_torch == pytest.approx(1)


@pytest.mark.parametrize(
    ("rows", "nproc", "optimizer"), [(6, 1, "rowwise_adagrad"), (5, 2, "rowwise_adagrad"), (5, 1, "sgd")]
)
def test_the_plain_loop_needs_memory_one_process_and_its_optimizer(rows, nproc, optimizer, competitors):
    config = load_config(None, {"train.precision": "float32", "table_optimizer.name": optimizer})
    found = step.benchmark_step(config, num_embeddings={"a": rows}, steps_per_round=2, rounds=1, nproc=nproc)
    assert "plain_torch_step" not in [name for _, name in competitors]
    assert found.plain_torch_rows_per_s is None
    assert found.ratio_to_plain_torch is None


@pytest.mark.usefixtures("competitors")
def test_a_turn_is_half_a_second_at_least_and_others_choose_their_threads():
    found = step.benchmark_step(CONFIG, num_embeddings={"a": 5}, rounds=1)
    assert found.steps_per_round == {"ours": 10, "torchrec": 10, "plain_torch": 10, "floor": 10, "host": 31}
    assert found.num_threads == {"ours": 2, "torchrec": 1, "plain_torch": 1, "floor": 1, "host": 2}


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
    assert found.num_busy_processes == 3
    assert seen == [[3]] * 15  # five competitors, two rounds and one that warms up
    assert not there


def test_the_plain_loop_computes_torchrecs_model():
    torch.manual_seed(0)
    tables = [
        EmbeddingBagConfig(name=name, embedding_dim=4, num_embeddings=9, feature_names=[name]) for name in ("a", "b")
    ]
    theirs, ours = DLRM(EmbeddingBagCollection(tables=tables), 13, [5, 4], [3, 1]), PlainDLRM([5, 4], [3, 1], 2)
    ours.load_state_dict(
        dict(
            zip(
                [name for name in ours.state_dict() if name != "pairs_P"],
                [value for name, value in theirs.state_dict().items() if "arch" in name and "sparse" not in name],
                strict=True,
            )
        )
        | {"pairs_P": ours.pairs_P}
    )
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
    loop = plain_torch_step(Ranks(0, 1, 1, torch.device("cpu")), config, {"a": 500, "b": 700})
    losses = torch.stack([loop() for _ in range(320)])  # 16 batches in turn
    assert losses[-16:].mean() < 0.5 * losses[:16].mean()
