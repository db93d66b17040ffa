"""What an architecture says of itself before it is built."""

from dataclasses import replace
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from torchrec.modules.embedding_modules import EmbeddingBagCollection

from helpers.interactions import INTERACTIONS
from torchdlrm.config import ModelConfig
from torchdlrm.config.model import FeatureConfig
from torchdlrm.errors import ConfigError
from torchdlrm.features.tables import Feature, features_of_sizes
from torchdlrm.model.architecture import ModelShape, built_in
from torchdlrm.model.dlrm import DLRM
from torchdlrm.model.eager import EagerModel, trace_products
from torchdlrm.model.model_class import architecture_of, difference_from, record_of

CONFIG = ModelConfig(embedding_dim=8, dense_arch_layer_sizes=(12, 8), over_arch_layer_sizes=(10, 6, 1))


class SumDLRM(DLRM):
    """Over arch on the sum of all vectors."""

    def make_interaction(self, num_sparse_features, embedding_dim):  # noqa: ARG002
        class Sum(torch.nn.Module):
            def forward(self, dense_features, sparse_features):
                return dense_features + sparse_features.sum(dim=1)

        return Sum(), embedding_dim


class WithoutTables(torch.nn.Module):
    def __init__(self, **_):
        super().__init__()


class Sum(torch.nn.Module):
    """An interaction arch alone: the sum of all vectors, twice."""

    def __init__(self, num_sparse_features, embedding_dim, times=2):
        super().__init__()
        assert num_sparse_features == 3
        self.output_size, self.times = times * embedding_dim, times

    def forward(self, dense_features, sparse_features):
        return (dense_features + sparse_features.sum(dim=1)).repeat(1, self.times)


class WithoutSize(torch.nn.Module):
    def __init__(self, num_sparse_features, embedding_dim):  # noqa: ARG002
        super().__init__()


class WithSettings(Sum):
    settings: ClassVar = {"times": 2, "scale": 1.0, "names": ["a"]}

    def __init__(self, num_sparse_features, embedding_dim, times, scale, names, features):
        super().__init__(num_sparse_features, embedding_dim, times)
        self.scale, self.names, self.features = scale, names, features


class OfAnotherSize(Sum):
    def forward(self, dense_features, sparse_features):
        return super().forward(dense_features, sparse_features)[:, 1:]


class OfNoTensor(Sum):
    def forward(self, dense_features, sparse_features):
        return [dense_features, sparse_features]


class WithTorchsBatchNorm(DLRM):
    def __init__(self, **arguments):
        super().__init__(**arguments)
        self.dense_arch.norm = torch.nn.BatchNorm1d(8)


class WithAnInteger(DLRM):
    def __init__(self, **arguments):
        super().__init__(**arguments)
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64))


class WithTablesOfItsOwn(DLRM):
    def __init__(self, **arguments):
        super().__init__(**arguments)
        configs = arguments["embedding_bag_collection"].embedding_bag_configs()
        tables = [replace(table, name=f"wide_{table.name}", embedding_dim=4) for table in configs]
        self.wide = EmbeddingBagCollection(tables=tables, device=torch.device("meta"))


class OfAList(DLRM):
    settings: ClassVar = ["depth"]


class OfAModule(DLRM):
    settings: ClassVar = {"depth": torch.nn.ReLU()}


class NeedsMore(torch.nn.Module):
    def __init__(self, num_sparse_features, embedding_dim, depth):  # noqa: ARG002
        super().__init__()


def make_dlrm(**arguments):
    return DLRM(**arguments)


def make_nothing(**_):
    return None


def counted_flops(shape, rows):
    model = EagerModel(shape)
    ids = torch.zeros(shape.num_sparse * rows, dtype=torch.int64)
    pooled = torch.rand(rows, shape.num_sparse, shape.config.embedding_dim)
    with FlopCounterMode(display=False) as counter:
        model.logits(torch.rand(rows, shape.num_dense), ids, torch.ones_like(ids), pooled)
    return counter.get_total_flops()


@pytest.mark.parametrize("interaction", INTERACTIONS)
@pytest.mark.parametrize(("num_dense", "num_sparse"), [(13, 26), (5, 1), (0, 3)])
def test_the_products_that_an_architecture_names_are_those_that_run(interaction, num_dense, num_sparse):
    shape = ModelShape(CONFIG.model_copy(update=INTERACTIONS[interaction]), num_dense, num_sparse)
    named = [(p.rows, p.inputs, p.outputs, p.has_weight) for p in shape.products]
    assert named == [(p.rows, p.inputs, p.outputs, p.has_weight) for p in trace_products(shape)]
    assert 2 * 7 * shape.multiply_adds == counted_flops(shape, rows=7)


def test_to_find_products_leaves_the_random_numbers_as_they_were(seed):
    torch.manual_seed(seed)
    expected = torch.rand(3)
    torch.manual_seed(seed)
    trace_products(ModelShape(CONFIG, 4, 3))
    assert torch.equal(torch.rand(3), expected)


def test_no_model_class_is_what_the_config_says():
    assert architecture_of(CONFIG) is built_in("dot")
    assert record_of(built_in("dot")) is None
    crossed = CONFIG.model_copy(update=INTERACTIONS["dcn"])
    assert architecture_of(crossed) is built_in("dcn")
    with pytest.raises(ConfigError, match=r"model.interaction: is dcn, but a model class of its own"):
        architecture_of(crossed, SumDLRM)


def test_a_model_class_is_known_by_its_file_and_what_is_in_it(tmp_path, monkeypatch):
    file = tmp_path / "my_models.py"
    file.write_text("from torchdlrm.model.dlrm import DLRM\n\nclass Mine(DLRM):\n    pass\n")
    mine = architecture_of(CONFIG, f"{file}:Mine")
    assert record_of(mine).name == "my_models.py:Mine"
    again = architecture_of(CONFIG, f"{file}:Mine")
    assert difference_from(record_of(mine), again, "run") is None
    assert "has changed since the run" in difference_from(
        record_of(mine).model_copy(update={"sha256": "0" * 64}), again, "run"
    )
    file.write_text(file.read_text() + "    size = 3\n")
    changed = architecture_of(CONFIG, f"{file}:Mine")
    assert changed.make.size == 3  # what runs is what was hashed
    assert "has changed since the run" in difference_from(record_of(mine), changed, "run")
    allowed = architecture_of(CONFIG, f"{file}:Mine", may_have_changed=True)
    assert difference_from(record_of(mine), allowed, "run") is None
    assert "got my_models.py:Mine" in difference_from(
        record_of(mine).model_copy(update={"name": "my_models.py:Other"}), allowed, "run"
    )
    assert "give `model_class` my_models.py:Mine" in difference_from(record_of(mine), built_in("dot"), "bundle")
    assert "leave it out" in difference_from(None, mine, "bundle")
    assert "got test_model_class.py:SumDLRM" in difference_from(
        record_of(mine), architecture_of(CONFIG, SumDLRM), "bundle"
    )


@pytest.mark.parametrize(
    ("model_class", "message"),
    [
        ("my_models.py", "not of the form"),
        ("nowhere.py:Mine", "cannot be imported"),
        ("torchdlrm.nowhere:Mine", "cannot be imported"),
        ("torchdlrm.model.dlrm:Nothing", "there is no Nothing in torchdlrm.model.dlrm"),
        (lambda **_: None, "no class or function with a name"),
        (
            NeedsMore,
            r"takes \(num_sparse_features, embedding_dim, depth\): an interaction arch takes num_sparse_features",
        ),
        ("torchdlrm.model.dlrm:DLMR", r"there is no DLMR in torchdlrm.model.dlrm; did you mean DLRM\?"),
        (7, "no class or function with a name"),
        (OfAList, r"`settings` of .*OfAList must be numbers, texts, .* got \['depth'\]"),
        (OfAModule, r"`settings` of .*OfAModule must be numbers, texts, .* got {'depth': ReLU\(\)}"),
    ],
)
def test_what_is_no_model_class_is_refused(model_class, message):
    with pytest.raises(ConfigError, match=message):
        architecture_of(CONFIG, model_class)


@pytest.mark.parametrize(
    ("model_class", "message"),
    [
        (WithoutTables, "must hold the tables"),
        (make_nothing, "no torch.nn.Module"),
        (WithoutSize, "must have an output_size, how many numbers it gives, got None"),
        (OfAnotherSize, r"must map \[2, 8\] and \[2, 3, 8\] to \[2, 16\], as its output_size says, got \[2, 15\]"),
        (OfNoTensor, r"to \[2, 16\], as its output_size says, got list"),
        (WithTorchsBatchNorm, r"dense_arch.norm of .* is a torch.nn.BatchNorm1d, .* take torchdlrm.GlobalBatchNorm1d"),
        (WithTablesOfItsOwn, "wide of .* is another EmbeddingBagCollection; the tables are those that it is given"),
        (WithAnInteger, "seen of .* is torch.int64; weights and buffers must be float32"),
    ],
)
def test_what_a_model_class_makes_must_be_a_model(model_class, message):
    shape = ModelShape(CONFIG, 4, 3, architecture_of(CONFIG, model_class))
    with pytest.raises(ConfigError, match=message):
        EagerModel(shape)


class FailsToBeMade(torch.nn.Module):
    def __init__(self, num_sparse_features, embedding_dim):  # noqa: ARG002
        super().__init__()
        self.sizes = embedding_dim["D"]


class FailsToRun(Sum):
    def forward(self, dense_features, sparse_features):
        return dense_features @ sparse_features


class LooksUpOtherIds(DLRM):
    def forward(self, dense_features, sparse_features):
        return super().forward(dense_features, sparse_features.permute([2, 1, 0]))


@pytest.mark.parametrize(
    ("model_class", "message"),
    [
        (FailsToBeMade, r"FailsToBeMade fails \(line \d+\): TypeError: 'int' object is not subscriptable"),
        (FailsToRun, r"FailsToRun fails \(line \d+\): RuntimeError: "),
        (LooksUpOtherIds, r"OtherIds fails \(line \d+\): ValueError: tables give the embeddings of the ids that the"),
    ],
)
def test_what_fails_in_a_model_class_is_reported_with_its_line(model_class, message):
    shape = ModelShape(CONFIG, 4, 3, architecture_of(CONFIG, model_class))
    with pytest.raises(ConfigError, match=message):
        _ = shape.products


class Cosines(Sum):
    """Of a row of zeros it makes 0 / 0; with an epsilon, 0."""

    epsilon = 0.0

    def __init__(self, num_sparse_features, embedding_dim):
        super().__init__(num_sparse_features, embedding_dim)
        self.turn = torch.nn.Linear(embedding_dim, embedding_dim, bias=False)

    def forward(self, dense_features, sparse_features):  # noqa: ARG002
        vectors = self.turn(sparse_features.sum(dim=1))
        vectors = vectors / (vectors.norm(dim=1, keepdim=True) + self.epsilon)
        return vectors.repeat(1, self.times)


class SafeCosines(Cosines):
    epsilon = 1e-6


class Lengths(Cosines):
    """Of a row of zeros it makes 0, whose gradient is infinite."""

    def forward(self, dense_features, sparse_features):
        return dense_features.repeat(1, 2) + self.turn(sparse_features.sum(dim=1)).square().sum(1, keepdim=True).sqrt()


class NeedsIds(DLRM):
    def forward(self, dense_features, sparse_features):
        ids = sparse_features.values().view(3, len(dense_features))
        return super().forward(dense_features, sparse_features) + ids[:1].T


class FailsInTraining(DLRM):
    def forward(self, dense_features, sparse_features):
        logits = super().forward(dense_features, sparse_features)
        return (logits, logits.square()) if self.training else logits


class Named(DLRM):
    def forward(self, dense_features, sparse_features):
        return {"logits": super().forward(dense_features, sparse_features)}


class OfNumbers(DLRM):
    def forward(self, dense_features, sparse_features):
        logits = super().forward(dense_features, sparse_features)
        return (logits, 0.1) if self.training else logits


class Nan(DLRM):
    def forward(self, dense_features, sparse_features):
        return super().forward(dense_features, sparse_features) * float("nan")


class NanInEvaluation(DLRM):
    def forward(self, dense_features, sparse_features):
        logits = super().forward(dense_features, sparse_features)
        return logits if self.training else logits * float("nan")


class LooksAtOtherRows(DLRM):
    def forward(self, dense_features, sparse_features):
        logits = super().forward(dense_features, sparse_features)
        return logits + torch.softmax(logits, dim=0)


class OfTuples(DLRM):
    @classmethod
    def tables(cls, features):  # noqa: ARG003
        return [("item", 4, "wide")]


class OfNoGroup(DLRM):
    def forward(self, dense_features, sparse_features):
        wide = self.sparse_arch.group("wide", sparse_features)
        return super().forward(dense_features, sparse_features) + wide.sum(dim=1)


@pytest.mark.parametrize(
    ("model_class", "message"),
    [
        (Named, r"forward must give logits \[rows, 1\], got dict"),
        (OfNumbers, r"an auxiliary loss \[rows\], got \[3, 1\] and float"),
        (Nan, r"Nan fails \(line \d+\): ArithmeticError: the loss or gradient of rows of random numbers is nan"),
        (NanInEvaluation, r"in evaluation a row's logit must be finite, and .* three have \[nan, nan, nan\]"),
        (
            LooksAtOtherRows,
            r"OtherRows fails: ArithmeticError: in evaluation a row's logit must .* depend on no other row",
        ),
        (OfTuples, r"`tables` of .*OfTuples must give torchdlrm.Tables, and has \('item', 4, 'wide'\)"),
        (OfNoGroup, r"OfNoGroup fails \(line \d+\): ValueError: no feature here has a table of a group 'wide'"),
    ],
)
def test_what_would_fail_or_predict_otherwise_later_is_refused_before_it_is_trained(model_class, message):
    shape = ModelShape(CONFIG, 4, 3, architecture_of(CONFIG, model_class))
    with pytest.raises(ConfigError, match=message):
        shape.architecture.check(shape)


class ReadsSequences(Sum):
    def forward(self, dense_features, sparse_features, sequences):
        self.given = sparse_features, sequences
        return super().forward(dense_features, sparse_features)


def test_an_interaction_reads_vectors_and_sequences_of_one_look_at_the_tables():
    config = CONFIG.with_features({"seen": FeatureConfig(pooling="last")})
    features = (Feature("a", 5), Feature("b", 6), Feature("seen", 7, is_multi_valued=True, max_values=3))
    shape = ModelShape(config, 4, 3, architecture_of(config, ReadsSequences), known_features=features)
    model, looks = EagerModel(shape), []
    model.module.sparse_arch.embedding_bag_collection.register_forward_hook(lambda *_: looks.append(1))
    pooled = torch.rand(2, 3, 8)
    model.logits(torch.rand(2, 4), torch.zeros(5, dtype=torch.int64), torch.tensor([1, 1, 1, 1, 0, 1]), pooled)
    vectors, sequences = model.module.inter_arch.given
    assert looks == [1]
    assert torch.equal(vectors, pooled)
    assert torch.equal(sequences["seen"][0], pooled[:, 2:])
    assert sequences["seen"][1].tolist() == [[False], [True]]


PADDING = "ArithmeticError: the gradient of a row of padding .* is nan or infinite.*: add an epsilon where it divides"


@pytest.mark.parametrize(
    ("model_class", "line", "message"),
    [
        (Cosines, "vectors = vectors / (", PADDING),
        (Lengths, "keepdim=True).sqrt()", PADDING),
        (NeedsIds, ".view(3, len(dense_features))", "RuntimeError: shape '.*' is invalid for input of size 6"),
    ],
)
def test_what_would_fail_on_several_processes_alone_is_refused_with_its_line(model_class, line, message):
    number = 1 + next(i for i, text in enumerate(Path(__file__).read_text().splitlines()) if line in text)
    shape = ModelShape(CONFIG, 4, 3, architecture_of(CONFIG, model_class))
    _ = shape.products
    with pytest.raises(ConfigError, match=rf"{model_class.__name__} fails \(line {number}\): {message}"):
        shape.architecture.check(shape)
    shape = ModelShape(CONFIG, 4, 3, architecture_of(CONFIG, FailsInTraining))
    with pytest.raises(ConfigError, match=r"an auxiliary loss \[rows\], got \[3, 1\] and \[3, 1\]"):
        shape.architecture.check(shape)


@pytest.mark.parametrize("model_class", [Sum, SumDLRM, SafeCosines])
def test_a_trial_changes_nothing(model_class, seed):
    shape = ModelShape(CONFIG, 4, 3, architecture_of(CONFIG, model_class), is_weighted=True)
    torch.manual_seed(seed)
    expected = torch.rand(3)
    torch.manual_seed(seed)
    shape.architecture.check(shape)
    assert torch.equal(torch.rand(3), expected)


def test_a_file_that_fails_is_reported_with_its_line(tmp_path):
    file = tmp_path / "broken.py"
    file.write_text("import torch\n\nsize = num_features\n")
    with pytest.raises(ConfigError, match=r"broken.py fails \(line 3\): NameError: name 'num_features' is not defined"):
        architecture_of(CONFIG, f"{file}:Mine")
    file.write_text("import torch\n\nclass Mine(\n")
    with pytest.raises(ConfigError, match=r"broken.py fails: SyntaxError: '\(' was never closed \(broken.py, line 3\)"):
        architecture_of(CONFIG, f"{file}:Mine")


def test_an_interaction_arch_stands_between_the_arches_of_the_dlrm():
    shape = ModelShape(CONFIG, 4, 3, architecture_of(CONFIG, Sum))
    assert [(p.inputs, p.outputs) for p in shape.products] == [(4, 12), (12, 8), (16, 10), (10, 6), (6, 1)]
    module = EagerModel(shape).module
    assert isinstance(module, DLRM)
    assert isinstance(module.inter_arch, Sum)
    assert module.train().inter_arch.training


def test_a_function_may_make_the_model_whose_products_are_those_that_run():
    shape = ModelShape(CONFIG, 4, 3, architecture_of(CONFIG, make_dlrm))
    assert shape.multiply_adds == ModelShape(CONFIG, 4, 3).multiply_adds
    assert 2 * 5 * shape.multiply_adds == counted_flops(shape, rows=5)


def test_a_class_is_given_its_settings_and_the_features():
    config = CONFIG.model_copy(update={"settings": {"times": 3, "scale": 2}})
    architecture = architecture_of(config, WithSettings)
    shape = ModelShape(config, 4, 3, architecture, known_features=features_of_sizes({"a": 5, "b": 6, "c": 7}, {"b"}))
    built = EagerModel(shape).module.inter_arch
    assert (built.times, built.scale, built.names) == (3, 2, ("a",))
    assert [(one.name, one.num_ids, one.is_multi_valued) for one in built.features] == [
        ("a", 5, False),
        ("b", 6, True),
        ("c", 7, False),
    ]
    assert ModelConfig.model_validate(config.model_dump(mode="json")) == config
    assert "settings" not in CONFIG.model_dump()


@pytest.mark.parametrize(
    ("settings", "model_class", "message"),
    [
        ({"time": 3}, WithSettings, "model.settings.time: .*WithSettings has no such setting.*did you mean times"),
        ({"times": 2.5}, WithSettings, "model.settings.times: must be of the type of 2, got 2.5"),
        ({"times": True}, WithSettings, "model.settings.times: must be of the type of 2, got True"),
        ({"times": 3}, Sum, "model.settings.times: .*Sum has no such setting"),
        ({"times": 3}, None, "model.settings: only a model class of its own reads them"),
    ],
)
def test_settings_that_nothing_reads_are_refused(settings, model_class, message):
    with pytest.raises(ConfigError, match=message):
        architecture_of(CONFIG.model_copy(update={"settings": settings}), model_class)
