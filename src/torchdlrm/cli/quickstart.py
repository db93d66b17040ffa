"""`dlrm quickstart`: everything on a synthetic log whose attainable AUC is known."""

import json
import shlex
import time
from pathlib import Path

from rich.table import Table

from torchdlrm import __version__
from torchdlrm.cli.terminal import Json, Positive, console, print_json, progress_bars, say, warn_of_crowding
from torchdlrm.config import load_config
from torchdlrm.config.text import SHIPPED_CONFIGS
from torchdlrm.errors import ConfigError, Interrupted
from torchdlrm.files import write_atomically

NUM_ROWS = 1_000_000
# In the folder from its first moment on: it distinguishes an interrupted quickstart from a folder of somebody else's.
MARK_NAME = "quickstart.json"


def quickstart(
    *,
    out: Path = Path("quickstart"),
    nproc_per_node: Positive = 2,
    as_json: Json = False,
) -> None:
    """Make a synthetic click log, preprocess it, train a DLRM on it, and compare with what is attainable.

    Interrupted at whatever moment, it resumes when the same command is given again.

    Args:
        out: Folder for the log, the dataset and the run; new, empty, or that of an interrupted quickstart.
        nproc_per_node: Processes that train together.
        as_json: Print one JSON object on standard output.
    """
    _claim(out, NUM_ROWS)
    try:
        _run(out, nproc_per_node, as_json=as_json)
    except KeyboardInterrupt as interrupt:
        msg = f"stopped; the same command resumes: dlrm quickstart --out {shlex.quote(str(out))}"
        raise Interrupted(msg) from interrupt


def _run(out: Path, nproc_per_node: int, *, as_json: bool) -> None:
    started_s = time.monotonic()

    from torchdlrm.cli import evaluate, train
    from torchdlrm.data.dataset import Dataset
    from torchdlrm.data.synthetic import synthesize
    from torchdlrm.data.synthetic_truth import read_truth
    from torchdlrm.evaluation.logistic_regression import fit_logistic_regression
    from torchdlrm.features.schema import criteo_schema
    from torchdlrm.preprocessing.preprocess import PreprocessOptions, preprocess, work_folder
    from torchdlrm.training.processes.launch import Processes, launch
    from torchdlrm.training.run import Run

    log, run, encoded = out / "log.tsv", out / "run", out / "dataset"
    if log.exists():
        say(f"1/5 synthesize: {log} is there already")
        truth = read_truth(log)
    else:
        with progress_bars(f"1/5 synthesize: a click log of {NUM_ROWS:,} rows whose truth is known") as progress:
            truth = synthesize(log, rows=NUM_ROWS, progress=progress)
    if encoded.exists() and not work_folder(encoded).exists():
        say(f"2/5 preprocess: {encoded} is there already")
        dataset = Dataset.open(encoded)
    else:
        with progress_bars("2/5 preprocess: values become ids, the last seventh of the rows is held out") as progress:
            dataset = preprocess([log], encoded, criteo_schema(), PreprocessOptions(), progress=progress)
    console.print(
        f"3/5 train: a DLRM of {sum(dataset.num_embeddings.values()):,} embeddings on {nproc_per_node} process(es)"
    )
    processes = Processes(nproc_per_node)
    warn_of_crowding(processes)
    settings = load_config(SHIPPED_CONFIGS / "quickstart.toml")
    summary = launch(train.work, settings, dataset.path, run, processes=processes)
    console.print("4/5 evaluate: every held-out row once")
    result = launch(evaluate.work, run, None, "val+test", "best", 8192, processes=Processes())
    Run.open(run).write_evaluation(result["split"], result)
    console.print("5/5 compare: a logistic regression on the same rows")
    baseline = fit_logistic_regression(dataset, ["val", "test"])

    attainable = truth.splits["held_out"]
    table = Table(title=f"on {result['rows']:,} held-out rows", title_justify="left")
    for column in ("", "AUC", "logloss", "AUC above 0.5, of attainable"):
        table.add_column(column, justify="right" if column else "left")
    for name, auc, logloss in (
        ("attainable", attainable.auc, attainable.logloss),
        ("DLRM", result["auc"], result["logloss"]),
        ("logistic regression", baseline.auc, baseline.logloss),
    ):
        table.add_row(name, f"{auc:.4f}", f"{logloss:.4f}", f"{(auc - 0.5) / (attainable.auc - 0.5):.1%}")
    console.print(table)
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


def _claim(out: Path, num_rows: int) -> None:
    """Make the folder, or resume that of an interrupted quickstart.

    Raises:
        ConfigError: there is something else.
    """
    settings = {"torchdlrm": __version__, "rows": num_rows}
    mark = out / MARK_NAME
    remedy = "remove it, or give another: dlrm quickstart --out FOLDER"
    if mark.is_file():
        try:
            found = json.loads(mark.read_text(encoding="utf-8"))
        except ValueError:
            found = None
        if found != settings:
            msg = f"--out: {out} holds a quickstart with other settings ({MARK_NAME}: {found}); {remedy}"
            raise ConfigError(msg)
        return
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        msg = f"--out: {out} is not an empty folder, nor that of an interrupted quickstart; {remedy}"
        raise ConfigError(msg)
    out.mkdir(parents=True, exist_ok=True)
    write_atomically(mark, json.dumps(settings) + "\n")
