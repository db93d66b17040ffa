"""Defines a request for a plan: which tables, on which machine. Its fields are the options of `dlrm plan`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from torchdlrm.config import TableOptimizerName
from torchdlrm.sharding.tables import Precision

# Parsed by the library and not by the command line: a negative size reaches the message that says what is wrong.
Size = Annotated[str | None, Parameter(allow_leading_hyphen=True)]


@Parameter(name="*")
@dataclass(frozen=True)
class PlanRequest:
    """Tables and machine that a plan is asked for.

    Attributes:
        dataset: Plan for the tables of this dataset.
        run: Plan for the tables of this run, with its config.
        tables: Plan for a preset (criteo-1tb, criteo-kaggle, criteo-1tb-40m, mlperf-dcnv2), or for a CSV or JSON file
            of rows, dim and pooling_factor.
        devices: Ranks, over all hosts; 8 for named tables, else 1.
        hosts: Hosts that they are spread over evenly.
        device: a100-40gb, a100-80gb, h100-80gb, h200, b200, h20, l40s, rtx-6000-ada, a10, l4, cpu, or here for this
            machine; a100-80gb for named tables, else here.
        hbm: Memory of each GPU, such as 80GB (10^9 bytes) or 79GiB (2^30).
        host_memory: Memory of each host.
        hbm_bandwidth: Bytes a second from the memory where tables live, such as 2TB.
        host_link_bandwidth: Bytes a second between host memory and GPU.
        intra_host_bandwidth: Bytes a second from a rank to others of its host.
        inter_host_bandwidth: Bytes a second from a rank to other hosts.
        optimizer: Of the tables, in place of the config's; its state takes memory too.
        precision: Of the tables' weights.
        constraints: Rules for tables, such as cat_3=row_wise or cat_0@2 (TABLE=KIND,KIND@RANK,RANK); may be repeated.
        max_embeddings: Plan as if no table had more rows.
        table_bytes: Give large tables smaller dimensions, so that weights and state of all take no more, such as 10GB.
        alpha: Of table_bytes: how fast dimensions fall with rows, as rows^-alpha; 0.3 when not given.
        model_class: The model class that will train, FILE.py:NAME or MODULE:NAME; only where it is not the DLRM itself.
        allow_changed_model_class: Take a run's model class though its file has changed since.
    """

    dataset: Path | None = None
    run: Path | None = None
    tables: str | None = None
    devices: int | None = None
    hosts: int | None = None
    device: str | None = None
    hbm: Size = None
    host_memory: Size = None
    hbm_bandwidth: Size = None
    host_link_bandwidth: Size = None
    intra_host_bandwidth: Size = None
    inter_host_bandwidth: Size = None
    optimizer: TableOptimizerName | None = None
    precision: Precision = "float32"
    constraints: Annotated[tuple[str, ...], Parameter(name="--constraint", negative="")] = ()
    max_embeddings: int | None = None
    table_bytes: Size = None
    alpha: float | None = None
    model_class: str | None = None
    allow_changed_model_class: Annotated[bool, Parameter(negative="")] = False

    @property
    def num_devices(self) -> int:
        """The number of ranks."""
        return self.devices if self.devices is not None else (8 if self.tables is not None else 1)

    @property
    def device_name(self) -> str:
        """The device, or `here`."""
        return self.device or ("a100-80gb" if self.tables is not None else "here")
