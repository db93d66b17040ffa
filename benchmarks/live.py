"""How well and how fast a live model follows a log, compared with one retrained every day, and with a frozen one.

    python benchmarks/live.py --json live.json                    # 14 synthetic days that drift
    python benchmarks/live.py --drift 0 0 0                       # the same without drift, to see what it takes away
    python benchmarks/live.py --log train.txt --schema criteo --config criteo-small --history 1

Every model predicts every day before any has learnt from it (`torchdlrm.quickstart.story` says which there are). A log
that is given is cut into stretches of as many rows, which are its days. All models have the same config and learn in
this process, by turns. Seconds are those of preprocessing, training, export and prediction, and of the live models also
those of the gate and of publishing. The first model of each is not counted: all have it.
"""

import argparse
import gzip
import json
import os
from pathlib import Path
from tempfile import TemporaryDirectory

os.environ.setdefault("GOMP_SPINCOUNT", "30000")  # as the command does; read when torch loads

from torchdlrm import load_config, load_schema, synthesize
from torchdlrm.live.settings import LiveSettings
from torchdlrm.processor import describe_processor
from torchdlrm.quickstart.story import CONSTANT_RATE, LIVE, SCRATCH, compare_models
from torchdlrm.synthetic.synthesize import day_path
from torchdlrm.synthetic.values import Drift


def main() -> None:
    """Compare, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--log", type=Path, help="a log in the order of time, plain or gzipped text without a header")
    parser.add_argument("--days", type=int, help="of the synthetic log, 14; or stretches to cut the log into, 5")
    parser.add_argument("--rows", type=int, default=100_000, help="of each synthetic day")
    parser.add_argument("--drift", type=float, nargs=3, help="values, popularity, effects: of `dlrm synthesize`")
    parser.add_argument("--history", type=int, default=3, help="days learnt before the first that is predicted")
    parser.add_argument("--expire-after", type=int, default=3, help="days until a value is forgotten; 0: never")
    parser.add_argument("--schema", default="criteo", help="of the log")
    parser.add_argument("--config", default="quickstart", help="of all models")
    parser.add_argument("--set", nargs="*", default=[], help="KEY=VALUE of the config; the rate is constant otherwise")
    parser.add_argument("--live", nargs="*", default=[], help="KEY=VALUE of the live models' settings")
    parser.add_argument("--folder", type=Path, help="keep everything here: the same command resumes")
    parser.add_argument("--json", type=Path, help="write the comparison here, too")
    options = parser.parse_args()
    changes = dict(setting.split("=", 1) for setting in options.set)
    config = load_config(options.config, {**CONSTANT_RATE, **changes})
    given = dict(setting.split("=", 1) for setting in options.live)
    live = {LIVE: LiveSettings.model_validate(given)}
    if options.expire_after:
        live["live, with expiry"] = LiveSettings.model_validate({**given, "expire_after": options.expire_after})
    print(describe_processor())
    with TemporaryDirectory() as temporary:
        folder = options.folder or Path(temporary)
        if options.log is None:
            drift = None if options.drift is None else Drift(*options.drift)
            truth = synthesize(folder / "logs", rows=options.rows, days=options.days or 14, drift=drift)
            logs = [day_path(folder / "logs", day) for day in range(len(truth.splits))]
            attainable = [part.auc for part in truth.splits.values()][options.history :]
        else:
            logs, attainable = cut(options.log, folder / "logs", options.days or 5), []
        comparison = compare_models(
            folder,
            logs,
            schema=load_schema(options.schema),
            config=config,
            history_logs=options.history,
            live=live,
            attainable=attainable,
            progress=Notes(),
        )
    rows = comparison.rows()
    for row in [{name: name for name in rows[0]}, *rows]:
        print("| " + " | ".join(row.values()) + " |")
    print(f"live: {comparison.seconds(LIVE) / comparison.seconds(SCRATCH):.3f} of the time from scratch")
    if options.json:
        options.json.write_text(json.dumps(comparison.as_dict(), indent=2) + "\n")


class Notes:
    """Prints what is worth a line."""

    def start_phase(self, name: str, total: int | None, unit: str = "rows", done: int = 0) -> None:
        """Not worth one."""

    def advance(self, amount: int, **values: str) -> None:
        """Not worth one."""

    def note(self, line: str) -> None:
        """A day is over."""
        print(line, flush=True)


def cut(log: Path, folder: Path, parts: int) -> list[Path]:
    """Write stretches of a log, of as many rows each."""
    folder.mkdir(parents=True, exist_ok=True)
    with gzip.open(log, "rb") if log.suffix == ".gz" else log.open("rb") as file:
        lines = file.readlines()
    edges = [len(lines) * part // parts for part in range(parts + 1)]
    logs = [folder / f"stretch_{part}.tsv" for part in range(parts)]
    for path, start, end in zip(logs, edges, edges[1:], strict=False):
        if not path.exists():  # a log that was written again would be another
            path.write_bytes(b"".join(lines[start:end]))
    return logs


if __name__ == "__main__":
    main()
