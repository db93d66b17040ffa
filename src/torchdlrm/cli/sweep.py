"""`dlrm sweep`: a config and values to try -> trials, the best of them repeated and judged."""

from pathlib import Path

from torchdlrm.cli.options import Json, Overrides, split_config
from torchdlrm.cli.terminal import announce, drawn, print_json, print_table, say, say_facts, say_next, saying_at_ctrl_c
from torchdlrm.config import about_config, load_config, shipped_config_names
from torchdlrm.errors import ConfigError
from torchdlrm.folders import expect


def sweep(*config: Overrides, space: Path, dataset: Path, out: Path, as_json: Json = False) -> None:
    """Search better values for keys of a config (tuning), and say whether they are better by more than chance.

    Each trial is a run. The best are repeated with other seeds, and compared with the config as it was on the test
    split. Whatever ends the command, the same command goes on; start it twice, and two processes share the trials.

    Args:
        config: TOML file, or the name of one that comes with torchdlrm, to start from; then keys to override.
        space: TOML file of the keys, the values to try and the number of trials (docs/judging.md).
        dataset: Folder written by `dlrm preprocess`.
        out: Folder to write: runs, best.toml and report.html.
    """
    path, overrides = split_config(config)
    if path is None:
        raise ConfigError(f"CONFIG is missing: name a TOML file, or one of {', '.join(shipped_config_names())}")
    settings = load_config(path, overrides)
    expect("dataset", dataset)
    announce(f"sweep {path} over {space} on {dataset}")
    say(about_config(path, overrides))

    from torchdlrm.sweeping.page import repeated_rows, trial_cells
    from torchdlrm.sweeping.sweep import sweep as search

    with saying_at_ctrl_c("interrupted; the same command goes on"):
        found = drawn(lambda progress: search(settings, space, dataset, out, progress=progress))
    print_table("the best trials and the config as it was, with other seeds", repeated_rows(found))
    best = trial_cells(found["trials"][found["best"]])
    say_facts(f"the best is in {out / 'best.toml'}, all trials in {out / 'report.html'}", best)
    say(found["verdict"])
    say_next("dlrm train {} --dataset {} --run RUN", out / "best.toml", dataset)
    if as_json:
        print_json(found)
