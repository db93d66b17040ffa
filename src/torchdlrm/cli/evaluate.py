"""`dlrm evaluate`: a run and a split -> exact metrics."""

from functools import partial
from pathlib import Path
from typing import Any

from cyclopts import App

from torchdlrm.cli.options import Json, Machines, Overrides, OwnModel, Positive, split_config
from torchdlrm.cli.terminal import (
    announce,
    drawn,
    print_json,
    print_table,
    say_undefined,
    warn,
    warn_of_crowding,
)
from torchdlrm.config import Config, DeviceChoice, load_config
from torchdlrm.errors import ConfigError
from torchdlrm.folders import expect
from torchdlrm.toml import did_you_mean
from torchdlrm.units import show_number


def evaluate(
    run: Path,
    *sharding: Overrides,
    split: str = "test",
    checkpoint: str = "best",
    dataset: Path | None = None,
    own_model: OwnModel = OwnModel(),  # noqa: B008 - frozen, and what the parser fills
    batch_size_global: Positive = 8192,
    device: DeviceChoice = "auto",
    machines: Machines = Machines(),  # noqa: B008 - likewise
    as_json: Json = False,
) -> None:
    """Measure a trained run on every row of a split; the result is also written to RUN/evaluation/.

    The machine need not be the one that trained: its constraints, plan and memory sizes do not count here. Keys of the
    config's section `sharding` can be given for this evaluation, as in `--sharding.cache-fraction 0.2`.

    Args:
        run: Folder written by `dlrm train`.
        sharding: Keys of the section `sharding`, with values.
        split: train, val or test; several joined by + are judged together, as in val+test.
        checkpoint: best (the highest AUC of the val split; the last where nothing was validated), last, or a step.
        dataset: Where the dataset is now, if it has moved since the training.
        batch_size_global: Rows per forward pass over all processes; the result does not depend on it.
        device: auto, cuda or cpu: where to compute (as train.device), whatever the run was trained on.
    """
    own = _sharding_keys(sharding)
    if machines.nnodes == 1:  # else the other machines are to hear of it, see `refusing_everywhere`
        expect("run", run)
        expect("dataset", dataset)
    announce(f"evaluate {run} on {split}")

    from torchdlrm.evaluation.evaluate import evaluate as evaluate_run
    from torchdlrm.evaluation.evaluate import sharding_elsewhere
    from torchdlrm.training.checkpoint import ChosenCheckpoint
    from torchdlrm.training.processes.launch import launch, refusing_everywhere
    from torchdlrm.training.run import Run

    processes = machines.processes()
    with refusing_everywhere(processes):
        trained = Run.open(run)
        trained.shape(trained.open_dataset(dataset), **vars(own_model))
    warn_of_crowding(processes)
    job = partial(
        evaluate_run,
        run,
        dataset,
        split,
        checkpoint=checkpoint,
        batch_size_global=batch_size_global,
        device=device,
        sharding=sharding_elsewhere(trained.config).model_copy(update=own),
        **vars(own_model),
    )
    result: dict[str, Any] | None = launch(drawn, job, processes=processes)
    if result is None:  # another machine has rank 0
        return
    try:
        trained.write_evaluation(result["split"], result)
    except OSError as error:  # a run may lie where it can only be read
        warn(f"not kept in {run / 'evaluation'}: {error.strerror}")
    title = f"{run} at {ChosenCheckpoint(result['step'], result['checkpoint'])}: split {result['split']}"
    values = {name: value for name, value in result.items() if name not in {"split", "label", "step", "checkpoint"}}
    shown = {name: f"{v:,}" if isinstance(v, int) else show_number(v) for name, v in values.items()}
    print_table(f"{title}, label {result['label']}", [shown])
    say_undefined(result)
    if as_json:
        print_json(result)


def _sharding_keys(tokens: tuple[str, ...]) -> dict[str, Any]:
    """The keys of `sharding` on the command line, and their values; all other keys are of the training alone."""
    more, overrides = split_config(tokens)
    problems = [] if more is None else [f"{more}: is one argument too many; dlrm evaluate takes one run"]
    for name in overrides:
        if "." not in name:
            options = [argument.name for argument in App(default_command=evaluate).assemble_argument_collection()]
            hint = did_you_mean(f"--{name}", options) or "; dlrm evaluate --help shows all"
            problems.append(f"--{name}: dlrm evaluate has no such option{hint}")
        elif not name.startswith("sharding."):
            problems.append(f"--{name}: dlrm evaluate overrides sharding.* alone; the run keeps its config")
    if problems:
        raise ConfigError("\n".join(problems))
    given: Config = load_config(None, overrides)
    return {name: getattr(given.sharding, name) for name in given.sharding.model_fields_set}
