"""What every process of a training does, from joining the others to the summary."""

from pathlib import Path

from torchdlrm.config import Config
from torchdlrm.data.dataset import Dataset
from torchdlrm.errors import UserError
from torchdlrm.progress import SILENT, ProgressListener
from torchdlrm.tables.optimizers import check_table_optimizer
from torchdlrm.training.agenda import Agenda, check_early_stopping
from torchdlrm.training.agreement import Settings, settings_of
from torchdlrm.training.allocator import keep_freed_memory
from torchdlrm.training.communication import allow_tf32
from torchdlrm.training.process_group import Ranks, join_process_group
from torchdlrm.training.run import Run
from torchdlrm.training.summary import TrainingSummary
from torchdlrm.training.trackers import check_trackers
from torchdlrm.training.trainer import Trainer


def train(
    config: Config, dataset: Path, run: Path, *, restart: bool = False, progress: ProgressListener = SILENT
) -> TrainingSummary | None:
    """Train in this process and all others that torch's launcher has started with it.

    A run that is in the folder already goes on from its newest checkpoint, also on another number of processes.

    Args:
        config: of the run.
        dataset: folder of an encoded dataset.
        run: folder of the run.
        restart: remove what is in it and begin anew.
        progress: is told of every step.

    Returns:
        How it ended on rank 0, None elsewhere.

    Raises:
        ConfigError: early stopping could never act, the device lacks the tables' optimizer, a tracker's package is
            missing, or the machines of the training were started with different settings.
        RunError: the folder is in use, holds something else, or a run that cannot go on with this config.
        PlanError: the tables do not fit the machine.
        DatasetError: the dataset is missing, damaged, or has no training rows.
        TrainingError: the loss is not finite, or another process does not answer.
        Interrupted: SIGTERM or Ctrl-C; the run is saved.
    """

    def describe() -> Settings:
        return settings_of(config, Dataset.open(dataset), restart=restart)

    with join_process_group(config.train.timeout_s, describe) as ranks:
        keep_freed_memory()
        allow_tf32(config.train, ranks.device)
        check_table_optimizer(config.table_optimizer, ranks.device)
        check_trackers(config.logging.trackers)
        encoded = Dataset.open(dataset)
        agenda = Agenda.of(config, encoded.splits["train"].rows)
        check_early_stopping(config, agenda, validation_rows=encoded.splits["val"].rows)
        resumed = _start_run(config, encoded, run, ranks, restart=restart)
        try:
            summary = Trainer(config, encoded, resumed, ranks, progress if ranks.is_first else SILENT).fit()
        finally:
            resumed.close()
        return summary if ranks.is_first else None


def _start_run(config: Config, dataset: Dataset, path: Path, ranks: Ranks, *, restart: bool) -> Run:
    """Rank 0 takes the folder; when it may not, no rank goes on."""
    run, problem = Run(path, config), None
    if ranks.is_first:
        try:
            run = Run.start(path, config, dataset, world_size=ranks.world_size, restart=restart)
        except UserError as error:
            problem = error
    problem = ranks.from_first(problem)
    if problem is not None:
        problem.is_everywhere = True
        raise problem
    return run
