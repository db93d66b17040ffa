"""`dlrm advance`: one period of a live model."""

import shlex
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter

from torchdlrm.cli.terminal import (
    Flag,
    Json,
    Positive,
    announce,
    print_json,
    print_table,
    progress_bars,
    say,
    say_next,
    shown_metric,
    warn,
    warn_of_crowding,
)
from torchdlrm.errors import Interrupted, TorchDLRMError
from torchdlrm.live.settings import LiveSettings
from torchdlrm.preprocessing.options import Resources

if TYPE_CHECKING:
    from torchdlrm.config import Config
    from torchdlrm.live.record import PeriodRecord
    from torchdlrm.progress import ProgressListener
    from torchdlrm.training.processes.launch import Processes


def advance(
    live: Path,
    logs: list[Path],
    *,
    config: str | None = None,
    schema: str | None = None,
    settings: Annotated[LiveSettings, Parameter(name="*")] = LiveSettings(),  # noqa: B008 - frozen
    model_class: str | None = None,
    allow_changed_model_class: Flag = False,
    restart: Flag = False,
    nproc_per_node: Positive = 1,
    resources: Resources = Resources(),  # noqa: B008 - frozen, and what the parser fills
    dry_run: Flag = False,
    as_json: Json = False,
) -> None:
    """Do one period (a day, an hour) of a live model: score its log, learn from it, check, publish.

    The model of before scores the new log, which it has not seen; then the log is learnt from, and the new model is
    published in LIVE/current if its predictions of rows that were held back are good enough. Otherwise the exit code is
    1, and the old model stays. `dlrm serve LIVE/current` follows. Whatever ends the command, the same command resumes.
    Settings are kept in LIVE/live.toml: what is given once holds for later periods. Defaults are those of a new one.

    Args:
        live: Folder of the live model; the first call makes it.
        logs: Files of the period's log, text, JSON Lines, Parquet or ORC.
        config: TOML file of the runs, or the name of one that comes with torchdlrm; needed by the first call, and kept
            in LIVE/config.toml.
        schema: What the columns are, as `dlrm preprocess` has it; needed by the first call, and kept in
            LIVE/schema.toml.
        settings: of the live model.
        model_class: A model of your own in place of the DLRM, FILE.py:NAME or MODULE:NAME; given in each call.
        allow_changed_model_class: Take the model class though its file has changed since.
        restart: Remove a period that is not complete, or whose model was not published, and begin it again.
        nproc_per_node: Processes that train.
        resources: of preprocessing.
        dry_run: Say what would be done, refuse what would be refused, and write nothing.
        as_json: Print one JSON object on standard output.
    """
    announce(f"advance {live}")

    from torchdlrm.live.preview import preview_advance

    if dry_run:
        preview = preview_advance(
            live,
            logs,
            config=config,
            schema=schema,
            settings=settings,
            model_class=model_class,
            allow_changed_model_class=allow_changed_model_class,
            restart=restart,
        )
        for line in (*preview.lines(), *preview.notes):
            say(line)
        for warning in preview.warnings:
            warn(warning)
        if as_json:
            about = {"period": preview.draft.period, "base": preview.draft.base, "steps": preview.steps}
            print_json({"live": str(live), "dry_run": True, **about, "warnings": preview.warnings})
        return

    from torchdlrm.live.advance import advance as advance_live
    from torchdlrm.live.model import LiveModel
    from torchdlrm.training.processes.launch import Processes

    processes = Processes(nproc_per_node)
    warn_of_crowding(processes)
    complete = {record.period for record in LiveModel(live).periods}
    try:
        with progress_bars("") as progress:
            record = advance_live(
                live,
                logs,
                config=config,
                schema=schema,
                settings=settings,
                model_class=model_class,
                allow_changed_model_class=allow_changed_model_class,
                restart=restart,
                resources=resources,
                train_by=_training_in(processes),
                progress=progress,
            )
    except KeyboardInterrupt as interrupt:
        raise Interrupted("interrupted; the same command resumes") from interrupt
    if record.period in complete:
        say(f"period {record.period} has this log, and is complete: nothing was left to do")
    _print_record(record)
    if as_json:
        print_json({"live": str(live), **record.model_dump(mode="json")})
    if not record.published:
        why = "; ".join(record.gate.reasons)
        rollback = f"dlrm rollback {shlex.quote(str(live))} {record.period}"
        msg = f"period {record.period} is not published: {why}. {rollback} publishes it"
        raise TorchDLRMError(msg)
    say_next("dlrm serve {}, which follows, or dlrm inspect {}", live / "current", live)


def _training_in(processes: "Processes") -> Callable[..., object]:
    """What trains as `torchdlrm.train` does, in that many processes."""
    from torchdlrm.cli.train import work
    from torchdlrm.training.job import train
    from torchdlrm.training.processes.launch import launch

    def train_in_processes(
        config: "Config",
        dataset: Path,
        run: Path,
        *,
        from_run: Path | None,
        model_class: str | None,
        allow_changed_model_class: bool,
        progress: "ProgressListener",
    ) -> object:
        progress.start_phase(f"learn in {processes.world_size} processes", None)  # the first one says how far it is
        restart = False
        return launch(
            work, config, dataset, run, model_class, restart, from_run, allow_changed_model_class, processes=processes
        )

    return train if processes.world_size == 1 else train_in_processes


def _print_record(record: "PeriodRecord") -> None:
    """Print how the log was predicted before it was learnt from, and the gate."""
    judged = (
        {}
        if record.progressive is None
        else {
            "log, old model": record.progressive.all,
            "- values known": record.progressive.known,
            "- values unknown": record.progressive.unseen,
        }
    )
    judged |= {"held back, old model": record.gate.old, "held back, new model": record.gate.new}
    rows = [
        {"": what, "rows": f"{metrics.rows:,}"}
        | {name: shown_metric(getattr(metrics, name)) for name in ("auc", "logloss", "ne", "calibration")}
        for what, metrics in judged.items()
        if metrics is not None
    ]
    print_table(f"period {record.period}: {record.rows:,} rows, {record.clicks:,} clicks", rows)
    came = sum(feature.admitted for feature in record.features.values())
    gone = sum(feature.expired for feature in record.features.values())
    say(f"values: {came:,} got an id, {gone:,} lost theirs")
