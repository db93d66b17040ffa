"""Reads every setting of a run, from a TOML file and the command line, into a checked `Config`."""

from torchdlrm.config.model import INTERACTION_SETTINGS, FeatureConfig, InteractionName, ModelConfig
from torchdlrm.config.optimizers import DENSE_OPTIMIZERS, TABLE_OPTIMIZERS, TableOptimizer, TableOptimizerName
from torchdlrm.config.sections import (
    CheckpointConfig,
    Config,
    DenseOptimizerConfig,
    DeviceChoice,
    LoaderConfig,
    LoggingConfig,
    ScheduleConfig,
    ShardingConfig,
    StopConfig,
    TableOptimizerConfig,
    TrainConfig,
    ValidationConfig,
    setting_values,
    settings,
)
from torchdlrm.config.text import (
    about_config,
    config_toml,
    configuration_markdown,
    find_config,
    load_config,
    shipped_config_names,
)

__all__ = [
    "DENSE_OPTIMIZERS",
    "INTERACTION_SETTINGS",
    "TABLE_OPTIMIZERS",
    "CheckpointConfig",
    "Config",
    "DenseOptimizerConfig",
    "DeviceChoice",
    "FeatureConfig",
    "InteractionName",
    "LoaderConfig",
    "LoggingConfig",
    "ModelConfig",
    "ScheduleConfig",
    "ShardingConfig",
    "StopConfig",
    "TableOptimizer",
    "TableOptimizerConfig",
    "TableOptimizerName",
    "TrainConfig",
    "ValidationConfig",
    "about_config",
    "config_toml",
    "configuration_markdown",
    "find_config",
    "load_config",
    "setting_values",
    "settings",
    "shipped_config_names",
]
