"""Bundles of ten periods of a small model with random weights, the deltas between them, and rows to ask for."""

import numpy as np

import random_periods
from torchdlrm.config import ModelConfig

CONFIG = ModelConfig(embedding_dim=8, dense_arch_layer_sizes=(8,), over_arch_layer_sizes=(8, 1))
SIZES = {"cat_0": 400, "cat_1": 60}
NUM_PERIODS = 10


def write_periods(folder, num_periods=NUM_PERIODS, precision="int8"):
    """`0001`, `0002`, ... and `0002.delta`, ..."""
    changes = {"changed_fraction": 0.1, "num_values": 2}
    random_periods.write_periods(folder, SIZES, CONFIG, precision, num_periods=num_periods, **changes)


def rows_of(num_rows):
    """Raw rows, of values that vocabularies have and some that they have not."""
    chance = np.random.default_rng(0)

    def value(num_embeddings):
        return f"{int(chance.integers(1, num_embeddings)) * 0x9E3779B1 % 2**32:08x}"

    return [
        {
            "int_0": int(chance.integers(100)),
            "cat_0": value(2 * SIZES["cat_0"]) if i % 9 else None,
            "cat_1": value(SIZES["cat_1"]),
        }
        for i in range(num_rows)
    ]
