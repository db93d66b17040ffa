"""`dlrm advance` and `dlrm rollback`: one period of a live model, and an earlier one again."""

import shlex
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter

from torchdlrm.cli.options import Flag, Json, Machines, OwnModel
from torchdlrm.cli.terminal import (
    announce,
    drawn,
    metric_cells,
    print_json,
    print_table,
    progress_bars,
    say,
    say_next,
    saying_at_ctrl_c,
    warn,
    warn_of_crowding,
)
from torchdlrm.errors import TorchDLRMError, UserError
from torchdlrm.folders import expect
from torchdlrm.live.settings import LiveSettings
from torchdlrm.preprocessing.options import Resources
from torchdlrm.units import show_bytes, show_number

if TYPE_CHECKING:
    from torchdlrm.live.preview import AdvancePreview
    from torchdlrm.live.record import PeriodMetrics, PeriodRecord
    from torchdlrm.progress import ProgressListener
    from torchdlrm.training.processes.launch import Processes


def advance(
    live: Path,
    logs: Annotated[list[Path], Parameter(show_default=False)] = [],  # noqa: B006 - it is only read
    *,
    watch: Path | None = None,
    config: str | None = None,
    schema: str | None = None,
    settings: Annotated[LiveSettings, Parameter(name="*")] = LiveSettings(),  # noqa: B008 - frozen
    own_model: OwnModel = OwnModel(),  # noqa: B008 - likewise
    restart: Flag = False,
    machines: Machines = Machines(),  # noqa: B008 - likewise
    resources: Resources = Resources(),  # noqa: B008 - likewise
    dry_run: Flag = False,
    as_json: Json = False,
) -> None:
    """Do one period (a day, an hour) of a live model: score its log, learn from it, check, publish.

    The previous model scores the new log, which it has not seen; then the log is learnt from, and the new model is
    published in LIVE/current if its predictions of rows that were held back are good enough. Otherwise the exit code is
    1, and the old model stays. `dlrm serve LIVE/current` follows. Whatever ends the command, the same command resumes.
    Settings are kept in LIVE/live.toml: what is given once holds for later periods. Defaults are those of a new one.

    Args:
        live: Folder of the live model; the first call makes it.
        logs: Files of the period's log, text, JSON Lines, Parquet or ORC.
        watch: In place of LOGS a folder of them: does a period for each folder of files in it, an hour or a day, in the
            order of names, once it has a file _SUCCESS or a later one has begun; waits for more.
        config: TOML file of the runs, or the name of one that comes with torchdlrm; needed by the first call, and kept
            in LIVE/config.toml.
        schema: What the columns are, as `dlrm preprocess` has it; needed by the first call, and kept in
            LIVE/schema.toml.
        restart: Remove a period that is not complete, or whose model was not published, and begin it again.
        dry_run: Say what would be done, refuse what would be refused, and write nothing.
    """
    announce(f"advance {live}")

    if bool(logs) == bool(watch) or (watch and dry_run):
        raise UserError("`logs`: give the files of a period's log, or in place of them `watch`, which has no dry run")
    given: dict[str, Any] = {"config": config, "schema": schema, "settings": settings, "restart": restart}
    given |= vars(own_model)
    if dry_run:
        _preview(live, logs, given, as_json=as_json)
        return

    from torchdlrm.live.advance import advance as advance_live
    from torchdlrm.live.logs import watched_logs
    from torchdlrm.live.model import LiveModel

    processes = machines.processes()
    warn_of_crowding(processes)
    given |= {"resources": resources, "train_by": _training_in(processes), "has_helpers": machines.nnodes > 1}
    before = LiveModel(live).fetch()
    complete = before.complete
    with saying_at_ctrl_c("interrupted; the same command resumes"):
        for log in watched_logs(watch, before.periods) if watch else [logs]:
            with progress_bars("") as progress:
                record = advance_live(live, log, progress=progress, **given)
            if record.period in complete:
                say(f"period {record.period} has this log, and is complete: nothing was left to do")
            _print_record(record)
            if as_json:
                print_json({"live": str(live), **record.model_dump(mode="json")})
            if not record.published:
                why = "; ".join(record.gate.reasons)
                again = f"dlrm rollback {shlex.quote(str(live))} {record.period}"
                msg = f"period {record.period} is not published: {why}. {again} publishes it"
                if watch is None:
                    raise TorchDLRMError(msg)
                warn(msg)
    say_next("dlrm serve {}, which follows, or dlrm inspect {}", live / "current", live)


def _preview(live: Path, logs: list[Path], given: Mapping[str, Any], *, as_json: bool) -> None:
    """Say what would be done, and write nothing."""
    from torchdlrm.live.preview import preview_advance

    preview = preview_advance(live, logs, **given)
    for line in (*_steps_in_words(preview), *preview.notes):
        say(line)
    for warning in preview.warnings:
        warn(warning)
    if as_json:
        about = {"period": preview.draft.period, "base": preview.draft.base, "steps": preview.steps}
        print_json({"live": str(live), "dry_run": True, **about, "warnings": preview.warnings})


def _steps_in_words(preview: "AdvancePreview") -> Iterator[str]:
    draft = preview.draft
    base = "from nothing" if draft.base is None else f"from the model of period {draft.base}"
    size_bytes = sum(log.size_bytes for log in draft.logs)
    yield f"period {draft.period}, learnt {base}; its log: {len(draft.logs)} file(s), {show_bytes(size_bytes)}"
    if preview.removed is not None:
        yield f"period {preview.removed} is begun again: what was done of it is removed"
    if preview.done is not None:
        yield "it is complete: nothing is left to do"
        return
    if preview.begun_again is not None:
        yield f"{preview.begun_again} is begun again: what it reads was changed"
    if preview.replayed:
        yield f"before it the logs of period {', '.join(str(old.period) for old in preview.replayed)} again"
    done = f"; done: {', '.join(draft.done)}" if draft.done else ""
    yield f"steps: {', '.join(preview.steps)}{done}"


def _training_in(processes: "Processes") -> Callable[..., object]:
    """What trains as `torchdlrm.train` does, in that many processes."""
    from torchdlrm.training.job import train
    from torchdlrm.training.processes.launch import launch

    def train_in_processes(*args: Any, progress: "ProgressListener", **options: Any) -> object:
        progress.start_phase(f"learn in {processes.world_size} processes", None)  # rank 0 shows progress
        run: Path = args[2]
        named = replace(processes, rdzv_id="-".join([processes.rdzv_id, *run.parts[-4:]]))  # a rendezvous for each run
        return launch(drawn, partial(train, *args, **options), processes=named)

    return train if processes.world_size == 1 else train_in_processes


def _print_record(record: "PeriodRecord") -> None:
    """Print how the log was predicted before it was learnt from, and the gate."""
    judged: dict[str, PeriodMetrics | None] = {}
    if record.progressive is not None:
        judged[f"log, old model{record.label and f', {record.label}'}"] = record.progressive.all
        judged["- values known"] = record.progressive.known
        judged["- values unknown"] = record.progressive.unseen
        judged |= {f"log, old model, {label}": metrics for label, metrics in record.progressive.labels.items()}
    for label, gate in {record.label: record.gate, **record.gate.labels}.items():
        whose = label and f", {label}"
        judged |= {f"held back, old model{whose}": gate.old, f"held back, new model{whose}": gate.new}
    rows = [
        {"": what, "rows": show_number(metrics["rows"], 0)} | metric_cells(metrics)
        for what, metrics in judged.items()
        if metrics is not None
    ]
    print_table(f"period {record.period}: {record.rows:,} rows, {record.clicks:,} clicks", rows)
    came = sum(feature.admitted for feature in record.features.values())
    gone = sum(feature.expired for feature in record.features.values())
    say(f"values: {came:,} got an id, {gone:,} lost theirs")


def rollback(live: Path, period: int, *, as_json: Json = False) -> None:
    """Publish the model of an earlier period, or of one that was not good enough; the next period is learnt from it.

    Only LIVE/current is led elsewhere: nothing is removed, and a later period can be published again.

    Args:
        live: Folder of the live model.
        period: Number of the period; `dlrm inspect LIVE` lists them.
    """
    expect("live model", live)
    from torchdlrm.live.model import RUN_NAME, LiveModel
    from torchdlrm.live.model import rollback as roll_back

    record = roll_back(live, period)
    say(f"{live}/current is period {record.period} now; the next period is learnt from it")
    if not (LiveModel(live).day(period) / RUN_NAME).is_dir():
        warn(f"the run of period {period} was removed (keep_runs), so that no period can be learnt from it")
    if as_json:
        print_json({"live": str(live), "current": record.period})
