"""What a run is trained with and on: versions, machine, dataset. In environment.json, and compared between machines."""

import hashlib
import json
import os
import platform
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from pydantic import TypeAdapter, ValidationError
from typing_extensions import TypedDict

from torchdlrm import __version__
from torchdlrm.data.dataset import Dataset
from torchdlrm.errors import RunError
from torchdlrm.features.schema import problems


class _DatasetRecord(TypedDict):
    path: str
    manifest_sha256: str


class Environment(TypedDict):
    """What environment.json holds."""

    torchdlrm: str
    torch: str
    torchrec: str
    fbgemm_gpu: str
    python: str
    processor: str
    num_cores: int
    gpus: list[str]
    world_size: int
    dataset: _DatasetRecord


def versions() -> dict[str, str]:
    """Of what computes."""
    import fbgemm_gpu  # noqa: PLC0415 - only its version
    import torchrec  # noqa: PLC0415 - only its version

    return {
        "torchdlrm": __version__,
        "torch": torch.__version__,
        "torchrec": torchrec.__version__,
        "fbgemm_gpu": fbgemm_gpu.__version__,
        "python": platform.python_version(),
    }


def environment_now(dataset: Dataset, world_size: int) -> dict[str, Any]:
    """For environment.json."""
    processor = ""
    with suppress(OSError), open("/proc/cpuinfo", encoding="utf-8") as file:  # noqa: PTH123
        processor = next((line.partition(":")[2].strip() for line in file if line.startswith("model name")), "")
    return {
        **versions(),
        "processor": processor,
        "num_cores": len(os.sched_getaffinity(0)),
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "world_size": world_size,
        "dataset": {"path": str(dataset.path.resolve()), "manifest_sha256": manifest_sha256(dataset)},
    }


def read_environment(path: Path) -> Environment:
    """What an environment.json holds.

    Raises:
        RunError: it is damaged or missing.
    """
    try:
        return TypeAdapter(Environment).validate_python(json.loads(path.read_text(encoding="utf-8")))
    except OSError as error:
        why = error.strerror or str(error)
    except ValidationError as error:
        why = "; ".join(["damaged", *(line.strip() for line in problems(error))])
    except (ValueError, RecursionError) as error:
        why = f"damaged: {error}"
    msg = (
        f"{path}: {why}. It says which dataset the run belongs to: put it back from a copy, or from another run on the "
        "same dataset"
    )
    raise RunError(msg)


def manifest_sha256(dataset: Dataset) -> str:
    """What tells one dataset from another: its manifest holds the checksums of its files."""
    return hashlib.sha256((dataset.path / "dataset.json").read_bytes()).hexdigest()
