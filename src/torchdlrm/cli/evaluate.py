"""`dlrm evaluate`: predicted rows -> exact metrics, each with its interval."""

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from cyclopts import App

from torchdlrm.cli.options import Json, Judging, Machines, Overrides, OwnModel, Positive, split_config
from torchdlrm.cli.terminal import (
    announce,
    drawn,
    look_at,
    print_json,
    print_slices,
    print_table,
    say,
    say_undefined,
    warn,
    warn_of_crowding,
)
from torchdlrm.config import Config, load_config
from torchdlrm.errors import ConfigError
from torchdlrm.folders import expect
from torchdlrm.toml import did_you_mean
from torchdlrm.units import show_number


def evaluate(
    source: Path,
    *sharding: Overrides,
    checkpoint: str = "best",
    predictions: Path | None = None,
    columns: str = "",
    against: str | None = None,
    judging: Judging = Judging(),  # noqa: B008 - frozen, and what the parser fills
    own_model: OwnModel = OwnModel(),  # noqa: B008 - likewise
    batch_size_global: Positive = 8192,
    machines: Machines = Machines(),  # noqa: B008 - likewise
    as_json: Json = False,
) -> None:
    """Measure a model on every row of a split, with intervals of 95 %; of a run also written to RUN/evaluation/.

    The machine need not be the one that trained: its constraints, plan and memory sizes do not count here. Keys of the
    config's section `sharding` can be given for this evaluation, as in `--sharding.cache-fraction 0.2`.

    Args:
        source: A run, a bundle, the folder of a period of a live model, or a file of predictions (.parquet, .csv,
            .csv.gz), as --predictions or `dlrm predict --columns` writes them.
        sharding: Of a run: keys of the section `sharding`, with values.
        checkpoint: Of a run: best (the highest AUC of the val split; the last where nothing was validated), last, or a
            step.
        predictions: File to write the rows to: .parquet, .csv or .csv.gz.
        columns: Columns of the log to write with them, with commas between, as in cat_3,int_2.
        against: Of a run or a bundle, with --by: another split; which slices are predicted worse than there.
        batch_size_global: Rows per forward pass over all processes; the result does not depend on it.
    """
    from torchdlrm.evaluation.evaluate import evaluate as evaluate_rows
    from torchdlrm.evaluation.predictions import Asked, kind_of_source
    from torchdlrm.judging.slices import columns_of

    own, names = _sharding_keys(sharding), [name.strip() for name in columns.split(",") if name.strip()]
    named = [*names, *(columns_of(judging.by) if judging.by else ())]
    is_run = machines.nnodes > 1 or kind_of_source(source) == "run"
    if machines.nnodes == 1:  # else the other machines are to hear of it, see `refusing_everywhere`
        expect("dataset", judging.dataset)
    if not is_run and (own or machines.nproc_per_node > 1):
        msg = f"{source}: is no run, which alone is spread over processes; leave out --nproc-per-node and --sharding.*"
        raise ConfigError(msg)
    announce(f"evaluate {source}")
    job = partial(
        evaluate_rows,
        source,
        predictions=predictions,
        columns=names,
        against=against,
        checkpoint=checkpoint,
        batch_size_global=batch_size_global,
        **vars(judging) | vars(own_model),
    )
    if not is_run:
        judged: Any = drawn(job)
        _print_evaluation(judged, source, as_json=as_json)
        return

    from torchdlrm.evaluation.pictures import FOLDER
    from torchdlrm.evaluation.split_rows import check_columns, sharding_elsewhere
    from torchdlrm.training.processes.launch import launch, refusing_everywhere
    from torchdlrm.training.run import Run

    processes = machines.processes()
    with refusing_everywhere(processes):
        trained = Run.open(source)
        encoded = trained.open_dataset(judging.dataset)
        trained.shape(encoded, **vars(own_model))
        check_columns(encoded, Asked(split=judging.split, columns=named, group=judging.group))
    warn_of_crowding(processes)
    job = partial(job, sharding=sharding_elsewhere(trained.config).model_copy(update=own), pictures=True)
    result: dict[str, Any] | None = launch(drawn, job, processes=processes)
    if result is None:  # another machine has rank 0
        return
    pictures = result.pop("pictures")
    try:
        name = result["split"] + (f".{result['label']}" if result["label"] != encoded.label_name else "")
        trained.write_evaluation(name, result)
        trained.write_evaluation(f"{FOLDER}/{name}", pictures)
    except OSError as error:  # a run may lie where it can only be read
        warn(f"not kept in {source / 'evaluation'}: {error.strerror}")
    _print_evaluation(result, source, as_json=as_json)


def _print_evaluation(result: Mapping[str, Any], source: Path, *, as_json: bool) -> None:
    """Print each metric with its interval, and what is to be said of them."""
    from torchdlrm.data.judgements import few_clicks
    from torchdlrm.metrics import BEST, metrics_of_any

    where, counts = f"{source}", f"{result['rows']:,} rows, {result['clicks']:,} clicks"
    if "step" in result:
        from torchdlrm.training.checkpoint import ChosenCheckpoint

        where += f" at {ChosenCheckpoint(result['step'], result['checkpoint'])}: split {result['split']}"
    if "groups" in result:
        counts += f", {result['groups']:,} groups"
    say(f"{where}, label {result['label']}: {counts}")
    for label, of in {result["label"]: result, **result.get("labels", {})}.items():
        rows = [
            {
                "metric": metric.name,
                "value": show_number(of[metric.name]),
                "95 % interval": " to ".join(map(show_number, of["intervals"][metric.name] or [None])),
            }
            for metric in metrics_of_any([of])
        ]
        print_table("" if of is result else f"label {label}: {of['clicks']:,} clicks", rows)
    if "slices" in result:
        print_slices(result["slices"], f"label {result['label']}: " if "labels" in result else "")
    say_undefined(result)
    if (best := result["intervals"][BEST]) is not None:
        doubt = few_clicks(result.get("split", source.name), result["rows"], result["clicks"], max(best) - result[BEST])
        look_at([doubt] if doubt else [])
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
