"""Evaluates a trained run on a split: exact metrics that count every row once, or as often as it weighs.

The machine need not be the one that trained, nor one that could: no state of an optimizer is kept, nothing is rounded
to send or multiply it faster, and the tables are planned again for the processes that are there.
"""

from pathlib import Path
from typing import Any

from torchdlrm.config import Config, DeviceChoice, ShardingConfig
from torchdlrm.data.dataset import Dataset
from torchdlrm.errors import ConfigError
from torchdlrm.loader.loader import Loader
from torchdlrm.metrics import binary_metrics
from torchdlrm.model.model_class import ModelClass
from torchdlrm.progress import SILENT, ProgressListener, watched
from torchdlrm.training.checkpoint import ChosenCheckpoint, find_checkpoint
from torchdlrm.training.checkpointer import Checkpointer
from torchdlrm.training.pipeline import Predictions, predict_loaders
from torchdlrm.training.processes.agreement import Setting, Settings, settings_of
from torchdlrm.training.processes.process_group import join_process_group
from torchdlrm.training.run import Run
from torchdlrm.training.sharded import build_empty_model


def evaluate(
    run: Run | str | Path,
    dataset: Dataset | str | Path | None = None,
    split: str = "test",
    *,
    model_class: ModelClass | None = None,
    allow_changed_model_class: bool = False,
    checkpoint: str = "best",
    batch_size_global: int = 8192,
    device: DeviceChoice = "auto",
    sharding: ShardingConfig | None = None,
    progress: ProgressListener | bool = True,
) -> dict[str, Any] | None:
    """Metrics of a run's weights over the rows of one split, or of several together.

    Works in this process and all others that torch's launcher has started with it. A process group that exists is used;
    where there is none, one is joined and left again. Process-wide settings are afterwards what they were.

    Args:
        run: a run or its folder; trained on any number of ranks.
        dataset: what it was trained on, or its folder; None where it is still where it was.
        split: `train`, `val` or `test`; several joined by + are judged together, as in `val+test`.
        model_class: that the run was trained with, where it is not the DLRM.
        allow_changed_model_class: take it though its file has changed since.
        checkpoint: `best` of the val split (the last where nothing was validated), `last`, or a step.
        batch_size_global: rows per forward pass over all ranks; does not change the result.
        device: where to compute, as `train.device` has it, whatever the run was trained on.
        sharding: how to spread the tables over the processes of this evaluation; `sharding_elsewhere` of the run's
            config when not given.
        progress: receives the rows done on rank 0; True and False as for `train`.

    Returns:
        On rank 0 `split`, `label`, `step`, `checkpoint` (`best`, `last` or `step`: what it was chosen for), `rows`,
        `auc`, `logloss`, `ne`, `calibration`, `accuracy` (None where not defined, as the AUC of rows of one label);
        elsewhere None.

    Raises:
        RunError: there is no such run, it is of another dataset or model class, or it lacks an undamaged checkpoint.
        DatasetError: the dataset or a split is not there, or is empty.
        ConfigError: the GPUs that `device` demands are not there, or the machines of the evaluation were started with
            different arguments.
        PlanError: the tables do not fit the machine, or `sharding` asks for what it does not have.
    """
    trained = run if isinstance(run, Run) else Run.open(Path(run))
    encoded = trained.open_dataset(dataset)
    with watched(progress) as listener:
        chosen, predictions = predict_split(
            trained,
            encoded,
            split,
            model_class=model_class,
            allow_changed_model_class=allow_changed_model_class,
            checkpoint=checkpoint,
            batch_size_global=batch_size_global,
            device=device,
            sharding=sharding,
            progress=listener,
        )
    about = {"split": split, "label": encoded.label_name, "step": chosen.step, "checkpoint": chosen.kind}
    return None if predictions is None else about | binary_metrics(*predictions).as_json()


def predict_split(
    run: Run,
    dataset: Dataset,
    split: str,
    *,
    model_class: ModelClass | None = None,
    allow_changed_model_class: bool = False,
    checkpoint: str = "best",
    batch_size_global: int = 8192,
    device: DeviceChoice = "auto",
    sharding: ShardingConfig | None = None,
    progress: ProgressListener = SILENT,
) -> tuple[ChosenCheckpoint, Predictions | None]:
    """The checkpoint that was chosen, and on rank 0 the labels, logits and weights of a split; all as for `evaluate`.

    The order of the rows depends on the number of ranks and on the batch size alone.
    """
    names = split.split("+")
    if len(set(names)) < len(names):
        msg = f"`split`: {split} names a split twice, and each row counts once; name each once"
        raise ConfigError(msg)
    shape = run.shape(dataset, model_class, allow_changed_model_class=allow_changed_model_class)
    config = run.config.model_copy(update={"sharding": sharding or sharding_elsewhere(run.config)})

    def describe() -> Settings:
        asked = {"`split`": split, "`checkpoint`": checkpoint, "`batch_size_global`": str(batch_size_global)}
        ours = {name: Setting(value, value) for name, value in asked.items()}
        return {**settings_of(config, dataset, shape.architecture, restart=False), **ours}

    with join_process_group(config.train.timeout_s, describe, device=device, setting="`device`") as ranks:
        model = build_empty_model(config, shape, num_embeddings=dataset.num_embeddings, ranks=ranks)
        chosen = find_checkpoint(run.checkpoints, checkpoint)
        Checkpointer(run.checkpoints, model, None, ranks).load(chosen.step)
        loaders = [
            Loader(
                dataset,
                name,
                batch_size_global=batch_size_global,
                rank=ranks.rank,
                world_size=ranks.world_size,
                model=config.model,
                pin_memory=ranks.device.type == "cuda",
                all_gather=ranks.all_gather,
            )
            for name in names
        ]
        listener = progress if ranks.is_first else SILENT
        listener.start_phase("evaluate", sum(loader.rows for loader in loaders))
        return chosen, predict_loaders(model, loaders, ranks, listener).take(ranks)


def sharding_elsewhere(config: Config) -> ShardingConfig:
    """How to spread a run's tables over another machine than the one that trained: without its rules, plan and sizes.

    What is kept says how much of a device is not for tables, and whether some may stay in host memory.
    """
    trained = config.sharding
    return ShardingConfig(reserved_fraction=trained.reserved_fraction, cache_fraction=trained.cache_fraction)
