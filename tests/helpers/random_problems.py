"""Problems for the planner: tables of random sizes, and machines that need not be there."""

import random
from dataclasses import replace

from torchdlrm.config import Config, TableOptimizerConfig, TrainConfig
from torchdlrm.sharding.machine import device_named
from torchdlrm.sharding.problem import Problem
from torchdlrm.sharding.tables import Table


def problem(tables, devices=8, device="a100-80gb", hosts=None, optimizer="rowwise_adagrad", batch=65_536, **changes):
    config = Config(table_optimizer=TableOptimizerConfig(name=optimizer), train=TrainConfig(batch_size_global=batch))
    return replace(Problem.of(config, tables, device_named(device).spread(devices, hosts)), **changes)


def random_tables(num_tables, seed, top=7.3):
    rng = random.Random(seed)
    return [
        Table(f"t_{i}", int(10 ** rng.uniform(2, top)), rng.choice([64, 128]), float(rng.choice([1, 1, 1, 2, 5, 20])))
        for i in range(num_tables)
    ]
