"""A run on disk: its folder, its config, the log of its metrics and its weights.

run/
  config.toml  plan.json  environment.json  metrics.jsonl  tensorboard/  checkpoints/step-00001000/  evaluation/
"""

import hashlib
import json
import math
import os
import platform
import shutil
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Self

import torch
from torch import nn
from torch.distributed.checkpoint.state_dict_loader import load as load_distributed
from torch.distributed.checkpoint.state_dict_saver import save as save_distributed

from torchdlrm import __version__
from torchdlrm.config import Config, config_toml, load_config
from torchdlrm.data.dataset import Dataset
from torchdlrm.errors import RunError

CONFIG_NAME, PLAN_NAME, ENVIRONMENT_NAME, METRICS_NAME = "config.toml", "plan.json", "environment.json", "metrics.jsonl"


class Run:
    """The folder of a run.

    Args:
        path: the folder.
        config: what the run was started with.
    """

    def __init__(self, path: Path, config: Config) -> None:
        self.path = path
        self.config = config

    @classmethod
    def create(cls, path: Path, config: Config, dataset: Dataset, *, world_size: int) -> Self:
        """Make the folder and write down what the run starts from.

        Raises:
            RunError: something is there already, or the folder cannot be made.
        """
        try:
            path.mkdir(parents=True, exist_ok=True)
            if any(path.iterdir()):
                msg = f"--run: {path} is not empty; give another folder, or remove it"
                raise RunError(msg)
            (path / CONFIG_NAME).write_text(config_toml(config), encoding="utf-8")
            environment = _environment(dataset, world_size)
            (path / ENVIRONMENT_NAME).write_text(json.dumps(environment, indent=1) + "\n", encoding="utf-8")
        except OSError as error:
            msg = f"--run: cannot write to {path}: {error.strerror}"
            raise RunError(msg) from error
        return cls(path, config)

    @classmethod
    def open(cls, path: Path) -> Self:
        """A run that was started before.

        Raises:
            RunError: there is none.
        """
        if not (path / CONFIG_NAME).is_file():
            msg = f"{path}: there is no run here (no {CONFIG_NAME}); dlrm train makes one"
            raise RunError(msg)
        return cls(path, load_config(path / CONFIG_NAME))

    @property
    def environment(self) -> dict[str, Any]:
        """Versions, machine and dataset that the run started with."""
        environment: dict[str, Any] = json.loads((self.path / ENVIRONMENT_NAME).read_text(encoding="utf-8"))
        return environment

    def open_dataset(self, path: Path | None = None) -> Dataset:
        """The dataset that the run was trained on, found where it was then or at `path`.

        Raises:
            DatasetError: it is not there.
            RunError: another dataset is there.
        """
        trained_on = self.environment["dataset"]
        dataset = Dataset.open(path or Path(trained_on["path"]))
        if _manifest_sha256(dataset) != trained_on["manifest_sha256"]:
            msg = (
                f"{dataset.path}: not the dataset that {self.path} was trained on (its dataset.json differs), so the "
                "ids do not mean the same; say with --dataset where that one is"
            )
            raise RunError(msg)
        return dataset

    def save_weights(self, model: nn.Module, step: int) -> Path:
        """Write all weights with torch.distributed.checkpoint, whole or not at all; every rank must call this."""
        final = self.path / "checkpoints" / f"step-{step:08d}"
        partial = final.with_name(f".{final.name}.partial")
        if torch.distributed.get_rank() == 0:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
        torch.distributed.barrier()
        save_distributed({"model": model.state_dict()}, checkpoint_id=partial)
        if torch.distributed.get_rank() == 0:
            partial.rename(final)
        torch.distributed.barrier()
        return final

    def load_weights(self, model: nn.Module) -> int:
        """Load the newest weights into a model that may be sharded over another number of ranks.

        Returns:
            The step at which they were saved.

        Raises:
            RunError: the run has no weights.
        """
        saved = sorted((self.path / "checkpoints").glob("step-*"))
        if not saved:
            msg = f"{self.path}: the run has no weights yet; train it to the end first"
            raise RunError(msg)
        state = {"model": model.state_dict()}
        load_distributed(state, checkpoint_id=saved[-1])
        model.load_state_dict(state["model"])
        return int(saved[-1].name.removeprefix("step-"))

    def write_evaluation(self, name: str, result: Mapping[str, object]) -> Path:
        """Write a result under evaluation/, whole or not at all."""
        path = self.path / "evaluation" / f"{name}.json"
        path.parent.mkdir(exist_ok=True)
        beside = path.with_suffix(".partial")
        beside.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        beside.rename(path)
        return path


class MetricsLog:
    """Appends lines to metrics.jsonl and, when asked, scalars to TensorBoard.

    Args:
        run: where to write.
        tensorboard: whether to write event files too.
    """

    def __init__(self, run: Run, *, tensorboard: bool) -> None:
        self._file = (run.path / METRICS_NAME).open("a", encoding="utf-8")
        self._writer: Any = None
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter  # noqa: PLC0415 - half a second, and optional

            self._writer = SummaryWriter(run.path / "tensorboard")

    def write(self, line: Mapping[str, Any]) -> None:
        """Append one line; it holds `step` and `split`. NaN becomes null, which JSON knows."""
        clean = {key: None if isinstance(value, float) and math.isnan(value) else value for key, value in line.items()}
        self._file.write(json.dumps({**clean, "time": time.time()}) + "\n")
        self._file.flush()
        if self._writer is not None:
            for key, value in clean.items():
                if key not in {"step", "split", "rows"} and value is not None:
                    self._writer.add_scalar(f"{line['split']}/{key}", value, line["step"])

    def close(self) -> None:
        """Write out what is buffered."""
        self._file.close()
        if self._writer is not None:
            self._writer.close()


def _environment(dataset: Dataset, world_size: int) -> dict[str, Any]:
    import fbgemm_gpu  # noqa: PLC0415 - only its version
    import torchrec  # noqa: PLC0415 - only its version

    processor = ""
    with suppress(OSError), open("/proc/cpuinfo", encoding="utf-8") as file:  # noqa: PTH123
        processor = next((line.partition(":")[2].strip() for line in file if line.startswith("model name")), "")
    return {
        "torchdlrm": __version__,
        "torch": torch.__version__,
        "torchrec": torchrec.__version__,
        "fbgemm_gpu": fbgemm_gpu.__version__,
        "python": platform.python_version(),
        "processor": processor,
        "num_cores": len(os.sched_getaffinity(0)),
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "world_size": world_size,
        "dataset": {"path": str(dataset.path.resolve()), "manifest_sha256": _manifest_sha256(dataset)},
    }


def _manifest_sha256(dataset: Dataset) -> str:
    return hashlib.sha256((dataset.path / "dataset.json").read_bytes()).hexdigest()
