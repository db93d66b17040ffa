"""`dlrm quickstart`: everything on a synthetic log whose attainable AUC is known."""

import json
import shlex
import time
from functools import partial
from pathlib import Path

from torchdlrm import __version__
from torchdlrm.cli.options import Flag, Json, Positive
from torchdlrm.cli.terminal import (
    drawn,
    print_json,
    print_table,
    progress_bars,
    say,
    saying_at_ctrl_c,
    warn_of_crowding,
)
from torchdlrm.config import load_config
from torchdlrm.config.text import SHIPPED_CONFIGS
from torchdlrm.errors import ConfigError
from torchdlrm.files import write_atomically

NUM_ROWS = 1_000_000
# Of --live: days, rows of each, and how many days are learnt before the first that is predicted.
NUM_DAYS, DAY_ROWS, HISTORY_DAYS = 10, 60_000, 3
# In the folder from its first moment on: it tells an interrupted quickstart from any other folder.
MARK_NAME = "quickstart.json"


def quickstart(
    *,
    out: Path = Path("quickstart"),
    live: Flag = False,
    nproc_per_node: Positive = 2,
    as_json: Json = False,
) -> None:
    """Make a synthetic click log, preprocess it, train a DLRM on it, and compare with what is attainable.

    With --live the log has days, on which values come and go and effects drift. A live model, which predicts each day
    and then learns from it, is compared with one that is retrained every day and with one that stays as it is.

    Interrupted at whatever moment, it resumes when the same command is given again.

    Args:
        out: Folder for the log, the dataset and the run; new, empty, or that of an interrupted quickstart.
        live: Show what a live model is good for, in some five minutes; a chart is written to the folder.
        nproc_per_node: Processes that train together; with --live it is always one.
    """
    _claim(out, {"days": NUM_DAYS, "rows": DAY_ROWS} if live else {"rows": NUM_ROWS})
    option = "--live " if live else ""
    with saying_at_ctrl_c(f"stopped; the same command resumes: dlrm quickstart {option}--out {shlex.quote(str(out))}"):
        if live:
            _run_live(out, as_json=as_json)
        else:
            _run(out, nproc_per_node, as_json=as_json)


def _run(out: Path, nproc_per_node: int, *, as_json: bool) -> None:
    started_s = time.monotonic()

    from torchdlrm.evaluation.evaluate import evaluate
    from torchdlrm.features.schema import criteo_schema
    from torchdlrm.preprocessing.preprocess import PreprocessOptions, preprocess
    from torchdlrm.quickstart.baseline import fit_logistic_regression
    from torchdlrm.synthetic.log import read_truth
    from torchdlrm.synthetic.synthesize import synthesize
    from torchdlrm.training.job import train
    from torchdlrm.training.processes.launch import Processes, launch
    from torchdlrm.training.run import Run

    log, run, encoded = out / "log.tsv", out / "run", out / "dataset"
    if log.exists():
        say(f"1/5 synthesize: {log} is there already")
        truth = read_truth(log)
    else:
        with progress_bars(f"1/5 synthesize: a click log of {NUM_ROWS:,} rows whose truth is known") as progress:
            truth = synthesize(log, rows=NUM_ROWS, progress=progress)
    with progress_bars("2/5 preprocess: values become ids, the last seventh of the rows is held out") as progress:
        dataset = preprocess([log], encoded, criteo_schema(), PreprocessOptions(), progress=progress)
    num_embeddings = sum(dataset.num_embeddings.values())
    say(f"3/5 train: a DLRM of {num_embeddings:,} embeddings on {nproc_per_node} process(es)")
    processes = Processes(nproc_per_node)
    warn_of_crowding(processes)
    settings = load_config(SHIPPED_CONFIGS / "quickstart.toml")
    summary = launch(drawn, partial(train, settings, dataset.path, run), processes=processes).summary
    say("4/5 evaluate: every held-out row once")
    result = launch(drawn, partial(evaluate, run, split="val+test"), processes=Processes())
    Run.open(run).write_evaluation(result["split"], result)
    say("5/5 compare: a logistic regression on the same rows")
    baseline = fit_logistic_regression(dataset, ["val", "test"])

    attainable = truth.splits["held_out"]
    rows = [
        {"": name, "AUC": f"{auc:.4f}", "logloss": f"{logloss:.4f}"}
        | {"AUC above 0.5, of attainable": f"{(auc - 0.5) / (attainable.auc - 0.5):.1%}"}
        for name, auc, logloss in (
            ("attainable", attainable.auc, attainable.logloss),
            ("DLRM", result["auc"], result["logloss"]),
            ("logistic regression", baseline.auc, baseline.logloss),
        )
    ]
    print_table(f"on {result['rows']:,} held-out rows", rows)
    seconds = time.monotonic() - started_s
    # A training that was over already has read nothing now.
    speed = f"; the training read {summary.rows_per_s:,.0f} rows/s" if summary.rows_per_s else ""
    say(
        f"done in {seconds:.0f} s{speed}. Next:\n"
        f"  dlrm inspect {out}/dataset              what the log became\n"
        f"  tensorboard --logdir {run}/tensorboard  how the training went\n"
        f"  dlrm preprocess YOUR_LOG.tsv --out dataset && "
        "dlrm train criteo-small --dataset dataset --run run"
    )
    if as_json:
        metrics = {"auc": result["auc"], "attainable_auc": attainable.auc, "logistic_regression_auc": baseline.auc}
        print_json({**metrics, "rows": result["rows"], "rows_per_s": summary.rows_per_s or None, "seconds": seconds})


def _run_live(out: Path, *, as_json: bool) -> None:
    started_s = time.monotonic()

    from torchdlrm.features.schema import criteo_schema
    from torchdlrm.html import write_page
    from torchdlrm.quickstart.story import CONSTANT_RATE, LIVE, SCRATCH, compare_models
    from torchdlrm.synthetic.synthesize import day_path, synthesize

    with progress_bars(f"1/2 synthesize: a click log of {NUM_DAYS} days, {DAY_ROWS:,} rows each") as progress:
        truth = synthesize(out / "logs", rows=DAY_ROWS, days=NUM_DAYS, progress=progress)
    with progress_bars("2/2 learn: every model predicts every day before any has learnt from it") as progress:
        comparison = compare_models(
            out,
            [day_path(out / "logs", day) for day in range(NUM_DAYS)],
            schema=criteo_schema(),
            config=load_config(SHIPPED_CONFIGS / "quickstart.toml", CONSTANT_RATE),
            history_logs=HISTORY_DAYS,
            attainable=[day.auc for day in truth.splits.values()][HISTORY_DAYS:],
            progress=progress,
        )
    page = out / "story.html"
    write_page(page, comparison.page("A model that lives"), "out")
    print_table(f"AUC on {len(comparison.days)} days that no model had learnt from", comparison.rows())
    say(comparison.result())
    fraction = comparison.seconds(LIVE) / comparison.seconds(SCRATCH)
    seconds = time.monotonic() - started_s
    say(
        f"done in {seconds:.0f} s; the live model took {fraction:.0%} of the time of retraining from scratch. Next:\n"
        f"  open {page}               the days as a chart\n"
        f"  dlrm inspect {out}/live              the life of the model\n"
        f"  dlrm serve {out}/live/current        what it is today"
    )
    if as_json:
        print_json({**comparison.as_dict(), "page": str(page), "seconds": seconds})


def _claim(out: Path, log: dict[str, int]) -> None:
    """Make the folder, or resume that of an interrupted quickstart.

    Raises:
        ConfigError: there is something else.
    """
    settings = {"torchdlrm": __version__, **log}
    mark = out / MARK_NAME
    remedy = "remove it, or give another: dlrm quickstart --out FOLDER"
    if mark.is_file():
        try:
            found = json.loads(mark.read_text(encoding="utf-8"))
        except ValueError:
            found = None
        if found != settings:
            raise ConfigError(f"--out: {out} holds a quickstart with other settings ({MARK_NAME}: {found}); {remedy}")
        return
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"--out: {out} is not an empty folder, nor that of an interrupted quickstart; {remedy}")
    out.mkdir(parents=True, exist_ok=True)
    write_atomically(mark, json.dumps(settings) + "\n")
