"""Describes what a run was started with besides its config: versions, machine, dataset, command (environment.json)."""

import os
import platform
import shlex
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NotRequired

import torch
from typing_extensions import TypedDict

from torchdlrm import __version__
from torchdlrm.data.dataset import Dataset
from torchdlrm.data.manifest import MANIFEST_NAME
from torchdlrm.files import sha256_of
from torchdlrm.model.architecture import Architecture
from torchdlrm.model.model_class import ModelClassRecord, record_of
from torchdlrm.processor import processor_name
from torchdlrm.storage.places import shown
from torchdlrm.tables.huge_pages import huge_pages_policy
from torchdlrm.training.checkpoint import CheckpointKind


class _DatasetRecord(TypedDict):
    path: str
    manifest_sha256: str


class WarmStartRecord(TypedDict):
    """The checkpoint that a run was started from: its run, its step, why that one, sha256 of its checkpoint.json."""

    run: str
    step: int
    checkpoint: CheckpointKind
    sha256: str


class Environment(TypedDict):
    """What environment.json holds."""

    torchdlrm: str
    torch: str
    torchrec: str
    fbgemm_gpu: str
    python: str
    processor: str
    num_cores: int
    huge_pages: NotRequired[str]
    gpus: list[str]
    world_size: int
    started: NotRequired[str]  # ISO 8601, UTC
    command: NotRequired[str]  # as a shell would take it
    dataset: _DatasetRecord
    model_class: NotRequired[ModelClassRecord]
    warm_start: NotRequired[WarmStartRecord]
    init_tables: NotRequired[dict[str, dict[str, Any]]]  # by table: file, sha256, how many values it knew and did not


def versions() -> dict[str, str]:
    """The versions of what computes."""
    import fbgemm_gpu  # noqa: PLC0415 - only its version
    import torchrec  # noqa: PLC0415 - only its version

    return {
        "torchdlrm": __version__,
        "torch": torch.__version__,
        "torchrec": torchrec.__version__,
        "fbgemm_gpu": fbgemm_gpu.__version__,
        "python": platform.python_version(),
    }


def environment_now(dataset: Dataset, world_size: int, architecture: Architecture | None) -> dict[str, Any]:
    """What environment.json says of a run that starts now."""
    record = record_of(architecture)
    return {
        **versions(),
        "processor": processor_name(),
        "num_cores": len(os.sched_getaffinity(0)),
        "huge_pages": huge_pages_policy(),
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "world_size": world_size,
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "dataset": {"path": shown(dataset.path.resolve()), "manifest_sha256": manifest_sha256(dataset)},
        **({} if record is None else {"model_class": record}),
    }


def manifest_sha256(dataset: Dataset) -> str:
    """Identify a dataset by its manifest, which holds the checksums of its files."""
    return sha256_of(dataset.path / MANIFEST_NAME)
