"""The space of a sweep is checked before anything is trained: every problem in one message."""

import pytest

from torchdlrm.config import load_config
from torchdlrm.errors import ConfigError
from torchdlrm.sweeping.space import load_space, with_params

CONFIG = load_config("criteo-small")


def space_of(tmp_path, text):
    (tmp_path / "space.toml").write_text(text)
    return load_space(tmp_path / "space.toml", CONFIG)


def test_every_problem_of_a_space_is_in_one_message(tmp_path):
    with pytest.raises(ConfigError) as caught:
        space_of(
            tmp_path,
            """
            "optimizer.learning_rate" = { low = 1e-4, high = 1e-1, log = true }
            "dense_optimizer.lr" = { low = 1e-4, high = 1e-1, log = true }
            "train.dropout" = { low = 0.0, high = 1.5 }
            "train.epochs" = { low = 3, high = 1 }
            "table_optimizer.eps" = { low = 0.0, high = 1.0, log = true }
            "model.embedding_dim" = { choices = [16, 32] }
            "model.interaction" = { choices = ["dot", "dnc"] }
            "train.device" = { choice = ["cpu"] }
            "train.freeze" = { choices = [] }
            "seed" = { low = 0, high = 3 }
            train.num_threads = { low = 1, high = 2 }

            [sweep]
            trials = 0
            metric = "auk"
            pruners = "MedianPruner"
            """,
        )
    lines = str(caught.value).splitlines()
    assert lines[0] == f"{tmp_path}/space.toml: the space is wrong:"
    for text in (
        "sweep.trials: must be greater than or equal to 1, got 0",
        "sweep.metric: must be one of 'auc', 'logloss', 'ne', not 'auk'; did you mean auc?",
        "sweep.pruners: there is no such key; did you mean pruner?",
        "optimizer.learning_rate: there is no such key; did you mean table_optimizer?",
        "dense_optimizer.lr: there is no such key; did you mean table_optimizer.learning_rate or",
        "train.dropout: must be less than 1, got 1.5",
        "train.epochs: `low <= high` must hold, but got (low=3, high=1)",
        "table_optimizer.eps: ",
        "model.embedding_dim = 32: model.dense_arch_layer_sizes: ends with 16, but must end with model.embedding_dim",
        "model.interaction: must be one of 'dot', 'dcn', 'projection', not 'dnc'",
        "train.device: needs",
        "train.freeze: ",
        "seed: is the same for all trials",
        'train: needs "A.KEY" = ',
    ):
        assert any(line.strip().startswith(text) for line in lines), text
    assert len(lines) == 15


@pytest.mark.parametrize(
    ("text", "message"), [("[sweep]\n", "names no key to search"), ("= 3", "cannot be read"), (None, "No such file")]
)
def test_what_is_no_space_is_refused(text, message, tmp_path):
    with pytest.raises(ConfigError, match=message):
        load_space(tmp_path / "none.toml", CONFIG) if text is None else space_of(tmp_path, text)


def test_a_choice_of_a_section_changes_the_keys_that_it_names(tmp_path):
    space = space_of(
        tmp_path,
        """
        "model" = { choices = [{ embedding_dim = 32, dense_arch_layer_sizes = [64, 32] }] }
        "train.batch_size_global" = { low = 32, high = 96, step = 32 }
        "train.dropout" = { low = 0.0, high = 0.5 }
        "table_optimizer.name" = { choices = ["adam"] }
        """,
    )
    (both,), (name,) = (space.values[key].choices for key in ("model", "table_optimizer.name"))
    params = {"model": both, "train.batch_size_global": 64, "train.dropout": 0.25, "table_optimizer.name": name}
    model = CONFIG.model.model_copy(update={"embedding_dim": 32, "dense_arch_layer_sizes": (64, 32)})
    expected = CONFIG.model_copy(
        update={
            "model": model,
            "train": CONFIG.train.model_copy(update={"batch_size_global": 64, "dropout": 0.25}),
            "table_optimizer": CONFIG.table_optimizer.model_copy(update={"name": "adam"}),
        }
    )
    assert with_params(CONFIG, params) == expected
    assert with_params(CONFIG, {}) == CONFIG
    assert {type(space.values[key]).__name__ for key in ("train.batch_size_global", "train.dropout")} == {
        "IntDistribution",
        "FloatDistribution",
    }
