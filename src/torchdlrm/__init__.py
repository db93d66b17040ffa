"""torchdlrm: a complete Deep Learning Recommendation Model system on TorchRec.

The names below are imported when they are first used, so that `import torchdlrm` stays fast and needs no torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torchdlrm.bundle.apply import apply_delta as apply_delta
    from torchdlrm.bundle.bundle import Bundle as Bundle
    from torchdlrm.config import Config as Config
    from torchdlrm.config import load_config as load_config
    from torchdlrm.data.dataset import Dataset as Dataset
    from torchdlrm.evaluation.compare import compare as compare
    from torchdlrm.evaluation.evaluate import evaluate as evaluate
    from torchdlrm.exporting.export import export as export
    from torchdlrm.exporting.formats import export_as as export_as
    from torchdlrm.exporting.onnx_file import onnx_inputs as onnx_inputs
    from torchdlrm.exporting.options import ExportOptions as ExportOptions
    from torchdlrm.exporting.verify import verify as verify
    from torchdlrm.exporting.weights import import_weights as import_weights
    from torchdlrm.features.schema import FeatureSchema as FeatureSchema
    from torchdlrm.features.schema import criteo_schema as criteo_schema
    from torchdlrm.features.schema_file import load_schema as load_schema
    from torchdlrm.features.tables import Feature as Feature
    from torchdlrm.features.tables import Table as Table
    from torchdlrm.insight.importance import importance as importance
    from torchdlrm.judged import Judged as Judged
    from torchdlrm.judging.comparison import Comparison as Comparison
    from torchdlrm.judging.reliability import reliability as reliability
    from torchdlrm.judging.slices import Slice as Slice
    from torchdlrm.judging.slices import slices as slices
    from torchdlrm.live.advance import advance as advance
    from torchdlrm.live.model import LiveModel as LiveModel
    from torchdlrm.live.model import rollback as rollback
    from torchdlrm.live.preview import preview_advance as preview_advance
    from torchdlrm.live.settings import ExportSettings as ExportSettings
    from torchdlrm.live.settings import GateSettings as GateSettings
    from torchdlrm.live.settings import LiveSettings as LiveSettings
    from torchdlrm.loader.loader import Loader as Loader
    from torchdlrm.metrics import BinaryMetrics as BinaryMetrics
    from torchdlrm.metrics import binary_metrics as binary_metrics
    from torchdlrm.model.batch_norm import GlobalBatchNorm1d as GlobalBatchNorm1d
    from torchdlrm.model.batch_norm import global_mean as global_mean
    from torchdlrm.model.dlrm import DLRM as DLRM
    from torchdlrm.model.dlrm import DLRM_DCN as DLRM_DCN
    from torchdlrm.model.dlrm import DLRM_Projection as DLRM_Projection
    from torchdlrm.model.dot import InteractionArch as InteractionArch
    from torchdlrm.model.dropout import DroppedActivation as DroppedActivation
    from torchdlrm.model.loss import DLRMTrain as DLRMTrain
    from torchdlrm.model.sparse_arch import SparseArch as SparseArch
    from torchdlrm.planning.plan import plan as plan
    from torchdlrm.planning.plan_request import PlanRequest as PlanRequest
    from torchdlrm.prediction.predictor import Predictor as Predictor
    from torchdlrm.preprocessing.options import PreprocessOptions as PreprocessOptions
    from torchdlrm.preprocessing.preprocess import preprocess as preprocess
    from torchdlrm.serving.options import ServeOptions as ServeOptions
    from torchdlrm.serving.server import serve as serve
    from torchdlrm.sweeping.sweep import sweep as sweep
    from torchdlrm.synthetic.synthesize import synthesize as synthesize
    from torchdlrm.training.job import train as train
    from torchdlrm.training.log import Callback as Callback
    from torchdlrm.training.log import TrainingHistory as TrainingHistory
    from torchdlrm.training.run import Run as Run

__version__ = "0.2.0"

_NAMES_OF = {
    "bundle.apply": ("apply_delta",),
    "bundle.bundle": ("Bundle",),
    "config": ("Config", "load_config"),
    "data.dataset": ("Dataset",),
    "evaluation.compare": ("compare",),
    "evaluation.evaluate": ("evaluate",),
    "exporting.export": ("export",),
    "exporting.formats": ("export_as",),
    "exporting.onnx_file": ("onnx_inputs",),
    "exporting.options": ("ExportOptions",),
    "exporting.verify": ("verify",),
    "exporting.weights": ("import_weights",),
    "features.schema": ("FeatureSchema", "criteo_schema"),
    "features.schema_file": ("load_schema",),
    "features.tables": ("Feature", "Table"),
    "insight.importance": ("importance",),
    "judged": ("Judged",),
    "judging.comparison": ("Comparison",),
    "judging.reliability": ("reliability",),
    "judging.slices": ("Slice", "slices"),
    "live.advance": ("advance",),
    "live.model": ("LiveModel", "rollback"),
    "live.preview": ("preview_advance",),
    "live.settings": ("ExportSettings", "GateSettings", "LiveSettings"),
    "loader.loader": ("Loader",),
    "metrics": ("BinaryMetrics", "binary_metrics"),
    "model.batch_norm": ("GlobalBatchNorm1d", "global_mean"),
    "model.dlrm": ("DLRM", "DLRM_DCN", "DLRM_Projection"),
    "model.dropout": ("DroppedActivation",),
    "model.dot": ("InteractionArch",),
    "model.loss": ("DLRMTrain",),
    "model.sparse_arch": ("SparseArch",),
    "planning.plan": ("plan",),
    "planning.plan_request": ("PlanRequest",),
    "prediction.predictor": ("Predictor",),
    "preprocessing.options": ("PreprocessOptions",),
    "preprocessing.preprocess": ("preprocess",),
    "serving.options": ("ServeOptions",),
    "serving.server": ("serve",),
    "sweeping.sweep": ("sweep",),
    "synthetic.synthesize": ("synthesize",),
    "training.job": ("train",),
    "training.log": ("Callback", "TrainingHistory"),
    "training.run": ("Run",),
}
_HOME_OF = {name: f"{__name__}.{module}" for module, names in _NAMES_OF.items() for name in names}
__all__ = [*_HOME_OF]  # noqa: PLE0604 - strings, all of them


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import_module(f"{__name__}.driverless").stand_in_for_driver()
    try:
        return getattr(import_module(_HOME_OF[name]), name)
    except ModuleNotFoundError as error:
        explained = import_module(f"{__name__}.errors").missing_package(error)
        if explained is None:
            raise
        raise explained from None


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
