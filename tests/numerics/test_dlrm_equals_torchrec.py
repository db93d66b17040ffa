"""Our DLRM against TorchRec's own module, with the same weights on the same rows."""

import inspect
import io
from dataclasses import replace

import pytest
import torch
from torchrec.fx import symbolic_trace
from torchrec.models import dlrm as torchrec_dlrm
from torchrec.modules.embedding_configs import EmbeddingBagConfig
from torchrec.modules.embedding_modules import EmbeddingBagCollection
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from torchdlrm.loader.batch import Batch, single_valued_kjt
from torchdlrm.model import dlrm
from torchdlrm.model.dot import InteractionArch, PairLayout
from torchdlrm.model.loss import DLRMTrain

NUM_ROWS, NUM_DENSE, NUM_FEATURES, DIM = 37, 13, 26, 16
FEATURES = [f"cat_{i}" for i in range(NUM_FEATURES)]


FAMILY = {
    "DLRM": {},
    "DLRM_DCN": {"dcn_num_layers": 3, "dcn_low_rank_dim": 5},
    "DLRM_Projection": {"interaction_branch1_layer_sizes": [20, 3 * DIM], "interaction_branch2_layer_sizes": [2 * DIM]},
}
of_the_family = pytest.mark.parametrize("kind", FAMILY)


def build(module, num_dense=NUM_DENSE, *, kind="DLRM", **settings):
    tables = [
        EmbeddingBagConfig(name=f"t_{name}", embedding_dim=DIM, num_embeddings=50, feature_names=[name])
        for name in FEATURES
    ]
    ebc = EmbeddingBagCollection(tables=tables)
    trained = DLRMTrain if module is dlrm else torchrec_dlrm.DLRMTrain
    return trained(getattr(module, kind)(ebc, num_dense, [32, DIM], [32, 8, 1], **FAMILY[kind] | settings))


@pytest.fixture
def batch(seed):
    generator = torch.Generator().manual_seed(seed)
    ids_FB = torch.randint(50, (NUM_FEATURES, NUM_ROWS), generator=generator)
    return Batch(
        dense_features=torch.rand(NUM_ROWS, NUM_DENSE, generator=generator),
        sparse_features=single_valued_kjt(FEATURES, ids_FB.numpy()),
        labels=torch.randint(2, (NUM_ROWS,), generator=generator).float(),
    )


@of_the_family
def test_logits_loss_and_gradients_equal_torchrecs(kind, batch, seed):
    torch.manual_seed(seed)
    ours, theirs = build(dlrm, kind=kind), build(torchrec_dlrm, kind=kind)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    our_loss, (_, our_logits, _) = ours(batch)
    their_loss, (_, their_logits, _) = theirs(batch)
    torch.testing.assert_close(our_logits, their_logits, atol=1e-5, rtol=0)
    torch.testing.assert_close(our_loss, their_loss, atol=1e-6, rtol=0)
    our_loss.backward()
    their_loss.backward()
    theirs_by_name = dict(theirs.named_parameters())
    for name, parameter in ours.named_parameters():
        assert parameter.grad.abs().max() > 0, name
        torch.testing.assert_close(parameter.grad, theirs_by_name[name].grad, atol=1e-5, rtol=0)


@of_the_family
def test_everything_but_the_tables_is_where_the_caller_wants_it(kind):
    """TorchRec's cross net stays on the CPU."""
    model = build(dlrm, kind=kind, dense_device=torch.device("meta")).model
    tables = [weight for name, weight in model.named_parameters() if "embedding_bags" in name]
    assert {weight.device.type for weight in tables} == {"cpu"}
    assert all(weight.is_meta for name, weight in model.named_parameters() if "embedding_bags" not in name)


@pytest.mark.filterwarnings("ignore:.*TorchScript", "ignore:.*torch.jit.*deprecated")
@pytest.mark.parametrize(("kind", "settings"), [*((kind, {}) for kind in FAMILY), ("DLRM_DCN", {"gated": True})])
def test_a_traced_model_becomes_torchscript_that_can_be_saved(kind, settings, batch, seed):
    torch.manual_seed(seed)
    model, memory = build(dlrm, kind=kind, **settings).model, io.BytesIO()
    torch.jit.save(torch.jit.script(symbolic_trace(model)), memory)
    memory.seek(0)
    loaded = torch.jit.load(memory)
    expected = model(batch.dense_features, batch.sparse_features)
    found = loaded(batch.dense_features, batch.sparse_features)
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)
    found.sum().backward()
    expected.sum().backward()
    gradients = {name: parameter.grad for name, parameter in loaded.named_parameters()}
    assert gradients.keys() == {name for name, _ in model.named_parameters()}
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(gradients[name], parameter.grad, atol=1e-4, rtol=0)


@of_the_family
def test_the_interaction_compiles_into_one_graph(kind, seed):
    torch.manual_seed(seed)
    arch, found = build(dlrm, kind=kind).model.inter_arch, []
    inputs = torch.rand(3, DIM, requires_grad=True), torch.rand(3, NUM_FEATURES, DIM, requires_grad=True)
    for forward in (arch, torch.compile(arch, backend="aot_eager", fullgraph=True)):
        out = forward(*inputs)
        found.append((out.detach(), *torch.autograd.grad(out.sum(), inputs)))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-5)


@of_the_family
def test_the_dense_path_can_be_compiled_once(kind, batch):
    model = build(dlrm, kind=kind).model
    before = model(batch.dense_features, batch.sparse_features)
    assert not model._cuda_graph_enabled
    model.compile_dense_path()
    arches = [model.dense_arch, model.inter_arch, model.over_arch]
    model.compile_dense_path("default")
    assert arches == [model.dense_arch, model.inter_arch, model.over_arch]
    assert model._cuda_graph_enabled
    assert all(isinstance(arch, torch._dynamo.OptimizedModule) for arch in arches)
    with torch.compiler.set_stance("force_eager"):  # to compile takes a GPU
        assert torch.equal(model(batch.dense_features, batch.sparse_features), before)


@pytest.mark.parametrize("make", [dlrm.SparseArch, lambda tables: dlrm.DLRM(tables, 13, [16], [8, 1])])
def test_a_collection_without_tables_is_refused(make):
    with pytest.raises(ValueError, match="the collection of tables is empty: at least one sparse feature is needed"):
        make(EmbeddingBagCollection(tables=[]))


@of_the_family
def test_autocast_to_bfloat16_rounds_about_as_much_as_torchrecs(kind, batch, seed):
    torch.manual_seed(seed)
    ours, theirs = build(dlrm, kind=kind), build(torchrec_dlrm, kind=kind)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    expected, errors = theirs(batch)[1][1], []
    for model in (ours, theirs):
        with torch.autocast("cpu", torch.bfloat16):
            loss, (_, logits, _) = model(batch)
        loss.backward()
        assert all(parameter.grad.isfinite().all() for parameter in model.parameters())
        errors.append((logits - expected).square().mean().sqrt())
    assert 0 < errors[0] <= 3 * errors[1]


def test_without_dense_features_it_equals_torchrecs_with_one_that_is_always_1(batch, seed):
    torch.manual_seed(seed)
    ours, theirs = build(dlrm, num_dense=0), build(torchrec_dlrm, num_dense=1)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    theirs.load_state_dict(ours.state_dict(), strict=True)
    our_loss, (_, our_logits, _) = ours(replace(batch, dense_features=torch.empty(NUM_ROWS, 0)))
    their_loss, (_, their_logits, _) = theirs(replace(batch, dense_features=torch.ones(NUM_ROWS, 1)))
    torch.testing.assert_close(our_logits, their_logits, atol=1e-5, rtol=0)
    our_loss.backward()
    their_loss.backward()
    their_gradients = {name: parameter.grad for name, parameter in theirs.named_parameters()}
    for name, parameter in ours.named_parameters():
        torch.testing.assert_close(parameter.grad, their_gradients[name], atol=1e-5, rtol=0)


def test_the_arguments_have_torchrecs_order():
    for name in FAMILY:
        theirs = [*inspect.signature(getattr(torchrec_dlrm, name)).parameters]
        assert [*inspect.signature(getattr(dlrm, name)).parameters][: len(theirs)] == theirs


def test_initial_weights_of_the_cross_net_are_spread_as_torchrecs(seed):
    torch.manual_seed(seed)
    ours, theirs = (build(module, kind="DLRM_DCN").model.inter_arch.state_dict() for module in (dlrm, torchrec_dlrm))
    for name, weight in ours.items():
        assert weight.shape == theirs[name].shape
        torch.testing.assert_close(weight.std(), theirs[name].std(), atol=0, rtol=0.1)


@of_the_family
def test_gradients_equal_numerical_differences(kind, seed):
    torch.manual_seed(seed)
    arch = build(dlrm, kind=kind).model.inter_arch.double()
    dense, sparse = torch.rand(3, DIM, dtype=torch.float64), torch.rand(3, NUM_FEATURES, DIM, dtype=torch.float64)
    assert torch.autograd.gradcheck(arch, (dense.requires_grad_(), sparse.requires_grad_()), fast_mode=True)


def test_embeddings_may_be_changed_in_place_behind_the_interaction(seed):
    torch.manual_seed(seed)
    dense, sparse = torch.rand(3, DIM), torch.rand(3, NUM_FEATURES, DIM, requires_grad=True)
    grads = []
    for is_changed in (False, True):
        embeddings = sparse * 1
        out = InteractionArch(NUM_FEATURES)(dense, embeddings)
        if is_changed:
            embeddings.mul_(2)
        grads += torch.autograd.grad(out.sum(), sparse)
    assert torch.equal(*grads)


@pytest.mark.parametrize(
    ("name", "sizes"), [("interaction_branch1_layer_sizes", [8, 24]), ("interaction_branch2_layer_sizes", [9])]
)
def test_a_branch_that_does_not_end_with_a_multiple_of_the_dimension_is_refused(name, sizes):
    with pytest.raises(
        ValueError, match=rf"interaction branch {name[18]} ends with {sizes[-1]}, .* multiple of D = 16"
    ):
        build(dlrm, kind="DLRM_Projection", **{name: sizes})


def test_embeddings_keep_the_order_of_the_features_when_they_come_back_in_another(batch, seed):
    torch.manual_seed(seed)
    model = build(dlrm).model
    reversed_kjt = batch.sparse_features.permute(list(reversed(range(NUM_FEATURES))))

    class Reversed(torch.nn.Module):
        """Stands for a sharded collection, which may group the tables by rank."""

        def forward(self, features):
            embeddings = ebc(features)
            by_name = embeddings.to_dict()
            order = list(reversed(FEATURES))
            return type(embeddings)(order, [DIM] * NUM_FEATURES, torch.cat([by_name[name] for name in order], dim=1))

    expected = model.sparse_arch(batch.sparse_features)
    ebc = model.sparse_arch.embedding_bag_collection
    model.sparse_arch.embedding_bag_collection = Reversed()
    torch.testing.assert_close(model.sparse_arch(reversed_kjt), expected, atol=0, rtol=0)


def test_interaction_equals_torchrecs_and_an_explicit_sum(seed):
    generator = torch.Generator().manual_seed(seed)
    dense = torch.rand(5, 4, generator=generator)
    sparse = torch.rand(5, 3, 4, generator=generator)
    out = InteractionArch(3)(dense, sparse)
    torch.testing.assert_close(out, torchrec_dlrm.InteractionArch(3)(dense, sparse), atol=1e-6, rtol=0)
    vectors = torch.cat([dense.unsqueeze(1), sparse], dim=1)
    pairs = [(vectors[:, i] * vectors[:, j]).sum(1) for i in range(4) for j in range(i + 1, 4)]
    torch.testing.assert_close(out, torch.cat([dense, torch.stack(pairs, dim=1)], dim=1), atol=1e-6, rtol=0)


def test_interaction_is_a_leaf_to_fx_tracing():
    graph = torch.fx.symbolic_trace(InteractionArch(3)).graph
    called = [node.target.__name__ for node in graph.nodes if node.op == "call_function"]
    assert called == ["pairwise_dots"]


def test_a_dense_arch_that_does_not_end_with_the_tables_dimension_is_refused():
    ebc = EmbeddingBagCollection(
        tables=[EmbeddingBagConfig(name="t", embedding_dim=8, num_embeddings=4, feature_names=["f"])]
    )
    with pytest.raises(ValueError, match=r"ends with 16, but the tables have dimension \[8\]"):
        dlrm.DLRM(ebc, 13, [32, 16], [8, 1])


def test_a_batch_of_torchrecs_gives_the_plain_mean_loss(batch):
    model = build(dlrm)
    theirs = torchrec_dlrm.DLRMTrain(model.model)
    kjt = KeyedJaggedTensor.from_lengths_sync(
        keys=FEATURES,
        values=batch.sparse_features.values(),
        lengths=torch.ones(NUM_ROWS * NUM_FEATURES, dtype=torch.int32),
    )
    plain = torchrec_dlrm.Batch(batch.dense_features, kjt, batch.labels)
    torch.testing.assert_close(model(plain)[0], theirs(plain)[0], atol=0, rtol=0)


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
