"""What is said of each optimizer, against what it is said for."""

import inspect
import re
from pathlib import Path
from typing import get_args

import pytest
import torch

from torchdlrm.config import (
    DENSE_OPTIMIZERS,
    TABLE_OPTIMIZERS,
    Config,
    DenseOptimizerConfig,
    TableOptimizerName,
    load_config,
)
from torchdlrm.config.optimizers import DenseOptimizerName
from torchdlrm.errors import ConfigError
from torchdlrm.tables.optimizers import fused_params
from torchdlrm.training.sharded import dense_optimizer

TRAINING = Path(__file__).parents[2] / "docs" / "training.md"


def test_every_name_has_a_record_of_that_name():
    assert tuple(TABLE_OPTIMIZERS) == get_args(TableOptimizerName)
    assert set(DENSE_OPTIMIZERS) == set(get_args(DenseOptimizerName))
    assert all(record.name == name for name, record in {**TABLE_OPTIMIZERS, **DENSE_OPTIMIZERS}.items())


def test_every_setting_that_is_read_is_a_setting():
    for records, section in ((TABLE_OPTIMIZERS, "table_optimizer"), (DENSE_OPTIMIZERS, "dense_optimizer")):
        known = Config.model_fields[section].annotation.model_fields
        assert {name for record in records.values() for name in record.settings} <= set(known)


@pytest.mark.parametrize(
    ("section", "name"),
    [
        *(("table_optimizer", name) for name in TABLE_OPTIMIZERS),
        *(("dense_optimizer", name) for name in DENSE_OPTIMIZERS),
    ],
)
def test_a_setting_that_the_optimizer_does_not_read_is_refused(section, name):
    records = TABLE_OPTIMIZERS if section == "table_optimizer" else DENSE_OPTIMIZERS
    fields = Config.model_fields[section].annotation.model_fields
    values = dict.fromkeys(fields, "0.25") | {"name": name, "weight_decay_mode": "l2"}
    for leaf in fields:
        overrides = {f"{section}.name": name, f"{section}.{leaf}": values[leaf]}
        if leaf in records[name].settings | {"name", "learning_rate", "clip_norm"}:
            load_config(None, overrides)
        else:
            with pytest.raises(ConfigError, match=rf"{section}\.{leaf}: {section}\.name = {name} has no such thing"):
                load_config(None, overrides)


def test_a_run_that_was_trained_when_eps_of_sgd_was_accepted_is_read(tmp_path):
    path = tmp_path / "config.toml"
    path.write_text('[table_optimizer]\nname = "sgd"\neps = 0.5\n')
    assert load_config(path, is_of_run=True).table_optimizer.name == "sgd"


@pytest.mark.parametrize("record", DENSE_OPTIMIZERS.values(), ids=list(DENSE_OPTIMIZERS))
def test_what_a_dense_optimizer_reads_is_what_torch_has_for_it(record):
    parameters = inspect.signature(getattr(torch.optim, record.torch_name)).parameters
    in_torch = {"betas": {"beta1", "beta2"}, "initial_accumulator_value": {"initial_accumulator"}}
    known = set().union(*(in_torch.get(name, {name}) for name in parameters))
    ours = {"eps", "beta1", "beta2", "momentum", "weight_decay", "initial_accumulator"}
    assert record.settings == known & ours


@pytest.mark.parametrize("record", TABLE_OPTIMIZERS.values(), ids=list(TABLE_OPTIMIZERS))
def test_tables_are_given_the_settings_that_their_optimizer_reads(record):
    values = {"eps": 0.5, "beta1": 0.25, "beta2": 0.75, "weight_decay": 0.125}
    told = {name: value for name, value in values.items() if name in record.settings}
    params = fused_params(Config().table_optimizer.model_copy(update={"name": record.name, **told}))
    assert {name: params[name] for name in values if name in params} == told
    assert params["learning_rate"] == Config().table_optimizer.learning_rate


def test_leaner_optimizers_are_proposed_from_the_most_state_to_the_least():
    assert {name: [other.name for other in record.leaner()] for name, record in TABLE_OPTIMIZERS.items()} == {
        "adam": ["partial_rowwise_adam", "adagrad", "rowwise_adagrad", "sgd"],
        "lamb": ["partial_rowwise_lamb", "adagrad", "rowwise_adagrad", "sgd"],
        "partial_rowwise_adam": ["rowwise_adagrad", "sgd"],
        "partial_rowwise_lamb": ["rowwise_adagrad", "sgd"],
        "adagrad": ["rowwise_adagrad", "sgd"],
        "rowwise_adagrad": ["sgd"],
        "sgd": [],
    }
    assert all(other.trade for record in TABLE_OPTIMIZERS.values() for other in record.leaner())


def test_the_table_of_docs_training_is_that_of_the_records():
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in TRAINING.read_text().splitlines()]
    first = next(i for i, row in enumerate(rows) if row[0] == "`table_optimizer.name`")
    states = {"none": (0, 0), "a value a row": (0, 1), "a value a weight": (1, 0), "two values a weight": (2, 0)}
    states["a value a weight and one a row"] = (1, 1)
    found = {}
    for name, state, on_cpu, on_gpu, accumulator in rows[first + 2 : first + 2 + len(TABLE_OPTIMIZERS)]:
        modes = [set(re.findall(r"`(\w+)`", cell)) for cell in (on_cpu, on_gpu)]
        found[name.strip("`")] = (states[state], *modes, accumulator == "yes")
    assert found == {
        name: (
            (record.state_per_weight, record.state_per_row),
            record.decays_on_cpu,
            record.decays_on_gpu,
            "initial_accumulator" in record.settings,
        )
        for name, record in TABLE_OPTIMIZERS.items()
    }


def test_what_is_leaner_than_an_optimizer_with_lazy_decay_has_it_too():
    lazy = TABLE_OPTIMIZERS["adam"].with_lazy_decay()
    assert lazy.state_per_row == 1
    assert [(other.name, other.state_per_row) for other in lazy.leaner()] == [
        ("partial_rowwise_adam", 2),
        ("adagrad", 1),
        ("rowwise_adagrad", 2),
        ("sgd", 1),
    ]


@pytest.mark.parametrize(("name", "momentum"), [("adagrad", 0.0), ("sgd", 0.9), ("adamw", 0.0)])
def test_the_state_of_the_dense_optimizer_is_where_its_parameter_is(name, momentum):
    """With parameters on the meta device in place of those on a GPU."""
    param = torch.nn.Parameter(torch.empty(3, 2, device="meta"))
    optimizer = dense_optimizer(DenseOptimizerConfig(name=name, momentum=momentum), [param])
    assert {value.device.type for value in optimizer.state[param].values()} == {"meta"}
