"""Logs of two labels, of which one comes after the other, and a small model for them."""

import random

from torchdlrm.config import load_config
from torchdlrm.features.columns import DenseColumn, LabelColumn, SparseColumn
from torchdlrm.features.schema import FeatureSchema

LABELS = ["click", "purchase"]
SCHEMA = FeatureSchema(
    name="shop",
    columns=(
        LabelColumn(name="purchase"),
        LabelColumn(name="click"),
        DenseColumn(name="price", kind="float", transform="standardize"),
        SparseColumn(name="item", kind="hex"),
        SparseColumn(name="city", kind="string"),
    ),
)
_EXPERTS = {"model.heads.num_experts": "2", "model.heads.expert_layer_sizes": "12,8"}
HEADS = {
    "shared": {},
    "mmoe": {"model.heads.kind": "mmoe", **_EXPERTS},
    "ple": {"model.heads.kind": "ple", "model.heads.num_shared_experts": "1", **_EXPERTS},
    "after": {"model.heads.after.purchase": "click"},
}


def config(**named):
    """A small model of both labels."""
    small = {
        "train.labels": "click,purchase",
        "train.batch_size_global": "128",
        "model.embedding_dim": "8",
        "model.dense_arch_layer_sizes": "16,8",
        "model.over_arch_layer_sizes": "16,1",
        "logging.tensorboard": "false",
    }
    return load_config("criteo-small", small | named)


def write_log(path, seed=0, num_rows=600):
    """A fifth of those who click buy."""
    rng, lines = random.Random(seed), []
    for _ in range(num_rows):
        item, city = rng.randrange(40), rng.choice(("Ulm", "Bonn", "Jena"))
        click = rng.random() < (0.6 if item % 3 == 0 else 0.2)
        purchase = click and rng.random() < (0.5 if city == "Ulm" else 0.1)
        lines.append(f"{int(purchase)}\t{int(click)}\t{rng.gauss(5, 1):.6f}\t{item:x}\t{city}\n")
    path.write_text("".join(lines))
    return path
