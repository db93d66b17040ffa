"""torchdlrm: a complete Deep Learning Recommendation Model system on TorchRec.

The names below are imported when they are first used, so that `import torchdlrm` stays fast and needs no torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torchdlrm.config import Config, load_config
    from torchdlrm.data.dataset import Dataset
    from torchdlrm.data.synthetic import synthesize
    from torchdlrm.evaluation.evaluate import evaluate
    from torchdlrm.features.schema import FeatureSchema, criteo_schema, load_schema
    from torchdlrm.loader.loader import Loader
    from torchdlrm.metrics import BinaryMetrics, binary_metrics
    from torchdlrm.model.dlrm import DLRM, DLRMTrain
    from torchdlrm.preprocessing.preprocess import PreprocessOptions, preprocess
    from torchdlrm.training.job import train
    from torchdlrm.training.log import Callback, TrainingHistory
    from torchdlrm.training.run import Run

__version__ = "0.1.0"

_HOMES = {
    "torchdlrm.config": ("Config", "load_config"),
    "torchdlrm.data.dataset": ("Dataset",),
    "torchdlrm.preprocessing.preprocess": ("PreprocessOptions", "preprocess"),
    "torchdlrm.data.synthetic": ("synthesize",),
    "torchdlrm.evaluation.evaluate": ("evaluate",),
    "torchdlrm.loader.loader": ("Loader",),
    "torchdlrm.metrics": ("BinaryMetrics", "binary_metrics"),
    "torchdlrm.model.dlrm": ("DLRM", "DLRMTrain"),
    "torchdlrm.features.schema": ("FeatureSchema", "criteo_schema", "load_schema"),
    "torchdlrm.training.run": ("Run",),
    "torchdlrm.training.job": ("train",),
    "torchdlrm.training.log": ("Callback", "TrainingHistory"),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}

__all__ = [
    "DLRM",
    "BinaryMetrics",
    "Callback",
    "Config",
    "DLRMTrain",
    "Dataset",
    "FeatureSchema",
    "Loader",
    "PreprocessOptions",
    "Run",
    "TrainingHistory",
    "binary_metrics",
    "criteo_schema",
    "evaluate",
    "load_config",
    "load_schema",
    "preprocess",
    "synthesize",
    "train",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        msg = f"module {__name__!r} has no attribute {name!r}"
        raise AttributeError(msg)
    return getattr(import_module(_HOME_OF[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
