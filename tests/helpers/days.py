"""Runs that are started from others: a schema, a small model, logs of some days, and the tensors of a run."""

import random

from helpers.trainings import state
from torchdlrm.config import load_config
from torchdlrm.features.columns import DenseColumn, LabelColumn, SparseColumn
from torchdlrm.features.schema import FeatureSchema

SCHEMA = FeatureSchema(
    name="days",
    columns=(
        LabelColumn(name="label"),
        DenseColumn(name="price", kind="float", transform="standardize"),
        SparseColumn(name="item", kind="hex"),
        SparseColumn(name="city", kind="string"),
    ),
)
SMALL = {
    "train.batch_size_global": "128",
    "model.embedding_dim": "8",
    "model.dense_arch_layer_sizes": "16,8",
    "model.over_arch_layer_sizes": "16,1",
    "table_optimizer.initial_accumulator": "0.25",
    "logging.tensorboard": "false",
    "validation.max_rows": "64",
}
TABLE = "embedding_bags.t_"
ITEM_CUT = {"sharding.constraints": '["item=column_wise"]', "model.embedding_dim": "8"}
FROZEN = {"train.freeze": "tables", "train.max_steps": "1"}


def config(*changes, **named):
    """The small model's config, with changes from left to right."""
    overrides = dict(SMALL)
    for change in (*changes, named):
        overrides |= change
    return load_config("criteo-small", overrides)


def write_log(path, seed, first, last, cities, price=5, num_rows=600):
    """Rows of items from `first` to before `last`, and of cities."""
    rng = random.Random(seed)
    rows = [
        (rng.choice("01"), rng.gauss(price, 1), rng.randrange(first, last), rng.choice(cities)) for _ in range(num_rows)
    ]
    path.write_text("".join(f"{label}\t{cost:.4f}\t{item:x}\t{city}\n" for label, cost, item, city in rows))
    return path


def last_state(run, tmp_path):
    """Every tensor of a run's last checkpoint, read by torch; param_groups, which are settings, left out."""
    tmp_path.mkdir(exist_ok=True)
    step = max(int(path.name[5:]) for path in (run / "checkpoints").glob("step-*"))
    return {name: value for name, value in state(run, tmp_path, step).items() if "param_groups" not in name}
