"""Defines a problem for the planner: tables, a machine, and what else a plan depends on."""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cached_property

from torchdlrm.config import DENSE_OPTIMIZERS, Config, TableOptimizer
from torchdlrm.features.schema import NUM_CRITEO_DENSE
from torchdlrm.features.tables import features_of_sizes
from torchdlrm.model.architecture import ModelShape
from torchdlrm.sharding.machine import Machine
from torchdlrm.sharding.tables import Precision, Table, features_of

MATRIX_EFFICIENCY = 0.5
# Where the dense parts need all memory, so little is left for tables that none fit.
_MAX_RESERVED_FRACTION = 0.9999


@dataclass(frozen=True)
class DensePart:
    """What every rank does besides its tables.

    Attributes:
        compute_ms: dense arch, interaction and over arch, forward, backward and update.
        all_reduce_ms: averaging their gradients over the ranks.
        multiply_adds: of a row's forward pass.
        weight_bytes: weights, their gradients and the state of their optimizer.
        activation_bytes: what the forward pass of a step keeps for the backward, in float32.
    """

    compute_ms: float
    all_reduce_ms: float
    multiply_adds: int
    weight_bytes: int
    activation_bytes: int

    @property
    def total_bytes(self) -> int:
        """Memory of all kinds."""
        return self.weight_bytes + self.activation_bytes

    @property
    def total_ms(self) -> float:
        """One after the other."""
        return self.compute_ms + self.all_reduce_ms


@dataclass(frozen=True)
class Problem:
    """What is to be planned.

    Attributes:
        tables: of the model.
        machine: the ranks.
        shape: of the model.
        optimizer: of the tables; its state takes memory besides the weights.
        batch_size_global: rows per step over all ranks.
        asked_reserved_fraction: of each rank's memory, for what is not a table; more where the dense parts need it.
        constraints: rules as `torchdlrm.sharding.constraints` reads them.
        cache_fraction: GPUs may keep tables in host memory and cache this fraction of their rows; None: they may not.
        dense_state_per_weight: float32 values that the optimizer of the dense parts keeps for each weight.
        dense_precision: of the dense parts' matrix products, as `train.precision` has it.
        tf32: whether GPUs multiply float32 in TF32.
        precision: of the tables' weights.
        multi_valued: names of tables in which a row may look several ids up.
        measured: what the dense parts take where that was measured; by their arithmetic when None.
    """

    tables: tuple[Table, ...]
    machine: Machine
    shape: ModelShape
    optimizer: TableOptimizer
    batch_size_global: int
    asked_reserved_fraction: float
    constraints: tuple[str, ...]
    cache_fraction: float | None
    dense_state_per_weight: int
    dense_precision: str
    tf32: bool
    precision: Precision = "float32"
    multi_valued: frozenset[str] = frozenset()
    measured: DensePart | None = None

    @classmethod
    def of(
        cls, config: Config, tables: Iterable[Table], machine: Machine, shape: ModelShape | None = None
    ) -> "Problem":
        """What a training with this config plans for; without a shape, one table for each sparse feature."""
        tables = tuple(tables)
        features = features_of_sizes(features_of(tables, config.model))
        return cls(
            tables,
            machine,
            shape or ModelShape(config.model, NUM_CRITEO_DENSE, len(features), known_features=features),
            optimizer=config.table_optimizer.record,
            batch_size_global=config.train.batch_size_global,
            asked_reserved_fraction=config.sharding.reserved_fraction,
            constraints=config.sharding.constraints,
            cache_fraction=config.sharding.cache_fraction,
            dense_state_per_weight=DENSE_OPTIMIZERS[config.dense_optimizer.name].state_per_weight,
            dense_precision=config.train.precision,
            tf32=config.train.tf32,
        )

    @property
    def batch_size_per_rank(self) -> int:
        """Rows per step of a rank."""
        return -(-self.batch_size_global // self.machine.num_devices)

    @cached_property
    def dense(self) -> DensePart:
        """What every rank does and holds besides its tables, by the arithmetic of the model.

        Matrix products of this size reach about half of the machine's peak rate.
        """
        shape, machine, rows, weights = self.shape, self.machine, self.batch_size_per_rank, self.shape.num_weights
        rate = machine.product_flops_per_s(self.dense_precision, tf32=self.tf32)
        link = machine.intra_host_bytes_per_s if machine.num_hosts == 1 else machine.inter_host_bytes_per_s
        sent_bytes = 2 * 4 * weights * (machine.num_devices - 1) / machine.num_devices  # a ring
        found = DensePart(
            compute_ms=1000 * shape.step_flops(rows) / (MATRIX_EFFICIENCY * rate),
            all_reduce_ms=1000 * sent_bytes / link,
            multiply_adds=shape.multiply_adds,
            weight_bytes=4 * weights * (2 + self.dense_state_per_weight),
            activation_bytes=4 * rows * shape.num_activations,
        )
        if self.measured is None:
            return found
        return replace(found, compute_ms=self.measured.compute_ms, all_reduce_ms=self.measured.all_reduce_ms)

    @property
    def reserved_fraction(self) -> float:
        """Of each rank's memory, for what is not a table: what was asked for, or what the dense parts need."""
        needed = min(_MAX_RESERVED_FRACTION, self.dense.total_bytes / self.machine.memory_bytes)
        return max(needed, self.asked_reserved_fraction)

    @property
    def usable_bytes(self) -> int:
        """Memory of each rank for tables, where they live by default."""
        return int(self.machine.memory_bytes * (1 - self.reserved_fraction))

    @property
    def all_usable_bytes(self) -> int:
        """Memory for tables of all ranks together."""
        return self.usable_bytes * self.machine.num_devices

    @property
    def table_sizes(self) -> dict[str, int]:
        """Bytes of weights and optimizer state of each table, by name."""
        return {table.name: table.size_bytes(self.precision, self.optimizer) for table in self.tables}

    @property
    def table_bytes(self) -> int:
        """Weights and optimizer state of all tables."""
        return sum(self.table_sizes.values())
