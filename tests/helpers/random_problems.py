"""Problems for the planner: tables of random sizes, and machines that need not be there."""

import random

from torchdlrm.config import TABLE_OPTIMIZERS
from torchdlrm.sharding.machine import device_named
from torchdlrm.sharding.planner import PlanOptions
from torchdlrm.sharding.problem import Problem
from torchdlrm.sharding.tables import Table


def problem(tables, devices=8, device="a100-80gb", hosts=None, optimizer="rowwise_adagrad", batch=65_536, **options):
    machine = device_named(device).spread(devices, hosts)
    return Problem(tuple(tables), machine, PlanOptions(TABLE_OPTIMIZERS[optimizer], batch, 0.15, **options))


def random_tables(num_tables, seed, top=7.3):
    rng = random.Random(seed)
    return [
        Table(f"t_{i}", int(10 ** rng.uniform(2, top)), rng.choice([64, 128]), float(rng.choice([1, 1, 1, 2, 5, 20])))
        for i in range(num_tables)
    ]
