"""The `dlrm` command: its subcommands, and what happens to an exception.

Subcommands are named as strings: a module is imported when its command runs, so that `--help` answers at once.
"""

import atexit
import errno
import gc
import os
import signal
import sys
from collections.abc import Sequence
from types import FrameType
from typing import Literal, NoReturn

from cyclopts import App, Parameter
from cyclopts.exceptions import CycloptsError

from torchdlrm import __version__
from torchdlrm.cli.options import describe_mistake, in_options
from torchdlrm.cli.terminal import console
from torchdlrm.driverless import stand_in_for_driver
from torchdlrm.errors import ConfigError, Interrupted, TorchDLRMError, UserError, missing_package
from torchdlrm.storage.places import with_paths
from torchdlrm.toml import did_you_mean

_INTERRUPTED = 130  # as a shell has it: 128 + SIGINT

app = App(
    name="dlrm",
    version=__version__,
    version_flags=("--version", "-V"),
    help="From a raw click log to click probabilities, with DLRM on TorchRec.",
    help_on_error=False,
    print_error=False,
    result_action="return_value",
    default_parameter=Parameter(negative_iterable=""),  # no --empty-logs for a list of files
    suppress_keyboard_interrupt=False,  # it is reported below, like everything else
)
app.command("torchdlrm.cli.quickstart:quickstart", help="Synthesize, preprocess, train and evaluate, in minutes.")
app.command("torchdlrm.cli.logs:synthesize", help="Write a click log whose truth is known.")
app.command("torchdlrm.cli.logs:download", help="Fetch a public click log.")
app.command("torchdlrm.cli.logs:schema", help="Propose a schema file for a log of your own.")
app.command("torchdlrm.cli.preprocess:preprocess", help="Turn a raw click log into a dataset.")
app.command("torchdlrm.cli.preprocess:import_encoded", name="import", help="Take in data encoded elsewhere.")
app.command("torchdlrm.cli.train:import_weights", help="Make a run of the weights of upstream's DLRM or TorchRec's.")
app.command("torchdlrm.cli.about:config", help="List the keys of a config, or print one to start from.")
app.command("torchdlrm.cli.plan:plan", help="Show where tables go on a machine, before renting it.")
app.command(
    "torchdlrm.cli.train:train",
    help="Train a DLRM on a dataset.",
    usage="Usage: dlrm train CONFIG --dataset PATH --run PATH [--KEY VALUE] [OPTIONS]",
)
app.command(
    "torchdlrm.cli.sweep:sweep",
    help="Search better values for keys of a config, by many trainings.",
    usage="Usage: dlrm sweep CONFIG --space PATH --dataset PATH --out PATH [--KEY VALUE] [OPTIONS]",
)
app.command(
    "torchdlrm.cli.evaluate:evaluate",
    help="Measure a trained run on every row of a split.",
    usage="Usage: dlrm evaluate RUN [--sharding.KEY VALUE] [OPTIONS]",
)
app.command("torchdlrm.cli.compare:compare", help="Compare models on the same rows: is a difference more than noise?")
app.command("torchdlrm.cli.report:report", help="Write a dataset, runs or a live model as one HTML page.")
app.command(
    "torchdlrm.cli.bundles:export", help="Turn a run into a bundle that predicts from raw rows, or into other formats."
)
app.command("torchdlrm.cli.bundles:apply", help="Make a bundle of another one and a delta to it.")
app.command("torchdlrm.cli.predict:predict", help="Predict every row of a raw log.")
app.command("torchdlrm.cli.explain:importance", help="Show which features a model uses, and how much.")
app.command("torchdlrm.cli.explain:explain", help="Show what each feature adds to the prediction of a row.")
app.command("torchdlrm.cli.predict:verify", help="Compare checkpoint, bundle and server on the same raw rows.")
app.command("torchdlrm.cli.serve:serve", help="Serve a bundle over HTTP and gRPC.")
app.command(
    "torchdlrm.cli.live:advance", help="Score a new log, learn from it, and publish: one period of a live model."
)
app.command("torchdlrm.cli.live:rollback", help="Publish the model of an earlier period of a live model.")
app.command("torchdlrm.cli.bench:bench", name="bench", help="Time the hot paths on this machine.")
app.command("torchdlrm.cli.about:doctor", help="Show what this machine has, and try whether it works.")
app.command(
    "torchdlrm.cli.inspect:inspect", help="Show what a dataset, a run, a bundle, a delta or a live model holds."
)


@app.command(name="help")
def show_help(*command: str) -> None:
    """Show what a command does and its options; without one, all commands.

    Args:
        command: Its name, as in `dlrm help bench step`.
    """
    chain, apps, unknown = app.parse_commands(command)
    if unknown:
        hint = did_you_mean(unknown[0], [name for name in apps[-1] if not name.startswith("-")])
        raise ConfigError(f"{' '.join(['dlrm', *chain, unknown[0]])}: there is no such command{hint}")
    _describe([*command, "--help"])
    app.help_print(command)


@app.command
def completion(shell: Literal["bash", "zsh", "fish"]) -> None:
    """Print what completes commands and options in a shell, as in `source <(dlrm completion bash)`.

    Args:
        shell: Which one; for good, put the line into what it reads at its start, such as ~/.bashrc.
    """
    sys.stdout.write(app.generate_completion(shell=shell))


def main() -> None:
    """Run what the command line says; exit code 0 done, 2 the input is wrong, 130 interrupted, 1 anything else."""
    # Idle OpenMP threads spin for a tenth of a millisecond and then sleep. By default they spin ten times as long, and
    # when other programs need the cores a step took ten times as long (docs/lab/training-step.md). Torch reads this
    # when it loads.
    os.environ.setdefault("GOMP_SPINCOUNT", "30000")
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # torch's profiler would tell people when it starts and stops
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # C++ stack traces where another machine's store is gone
    stand_in_for_driver()
    # At its end Python would look through all that torch and TorchRec have loaded, for half a second and more.
    atexit.register(gc.freeze)
    # As after Ctrl-C, what was begun is removed; commands that can save, or drain, have handlers of their own.
    for number in (signal.SIGINT, signal.SIGTERM):
        if number == signal.SIGTERM or signal.getsignal(number) == signal.default_int_handler:
            signal.signal(number, _interrupt)
    if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # under nohup the end of the terminal is no reason to stop
        signal.signal(signal.SIGHUP, _interrupt)
    try:
        _describe(sys.argv[1:])
        app([with_paths(token) for token in sys.argv[1:]], exit_on_error=False)
    except UserError as error:
        is_input = not (isinstance(error.__cause__, OSError) and error.__cause__.errno in _OF_THE_MACHINE)
        _end(*_KINDS[is_input], in_options(str(error), app, sys.argv[1:]))
    except Interrupted as interruption:
        _end(_INTERRUPTED, "", str(interruption))
    except CycloptsError as mistake:
        _end(2, "error", describe_mistake(mistake))
    except TorchDLRMError as error:
        notes = getattr(error, "__notes__", [])  # the traceback of a process that failed unexpectedly
        _end(1, "failed", "\n".join([in_options(str(error), app, sys.argv[1:]), *notes]))
    except ModuleNotFoundError as error:
        explained = missing_package(error)
        if explained is None:
            raise
        _end(2, "error", str(explained))
    except OSError as error:
        if "fbgemm_gpu" in str(error):
            _end(1, "failed", f"{error}: {error.__cause__}; {_WHY_FBGEMM_FAILS}")
        _end(*_KINDS[error.errno not in {None, *_OF_THE_MACHINE}], _what_the_system_said(error))
    except KeyboardInterrupt:
        _end(_INTERRUPTED, "", "interrupted")


def _describe(tokens: Sequence[str]) -> None:
    """Let the help of a command say all of its docstring, where the list of commands has a line of its own."""
    if {"--help", "-h"}.isdisjoint(tokens):
        return
    for command in app.parse_commands([token for token in tokens if not token.startswith("-")])[1]:
        if command.default_command is not None:
            command.help = command.default_command.__doc__ or ""


def _interrupt(number: int, frame: FrameType | None) -> None:
    """Raise KeyboardInterrupt, or end at once while a module is imported.

    torch's modules are C++ that calls Python and lets no exception through: it would end the process by an abort.
    """
    while frame is not None and not frame.f_code.co_filename.startswith("<frozen importlib"):
        frame = frame.f_back
    if frame is None:
        signal.default_int_handler(number, None)
    os.write(2, b"interrupted\n")
    os._exit(_INTERRUPTED)


def _end(exit_code: int, kind: str, message: str) -> NoReturn:
    """Say why the command ends, in a line of standard error, and end it."""
    if kind:
        console.print(f"[red bold]{kind}[/]:", end=" ")
    console.print(message, markup=False, soft_wrap=True)
    sys.exit(exit_code)


_WHY_FBGEMM_FAILS = (
    "dlrm doctor shows which packages are here and whether they fit together; make install in a new venv "
    "(docs/faq.md#fbgemm-does-not-load)"
)
# A full or failing disk is not the user's input; a path that is missing, read-only or too long is.
_OF_THE_MACHINE = {errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EPIPE}
_KINDS = {True: (2, "error"), False: (1, "failed")}  # by whether the input is wrong


def _what_the_system_said(error: OSError) -> str:
    """Which file, what happened, and what helps."""
    where = "" if error.filename is None else f"{error.filename}: "
    remedy = "; free some space and start the same command again" if error.errno in {errno.ENOSPC, errno.EDQUOT} else ""
    return f"{where}{os.strerror(error.errno) if error.errno else error}{remedy}"
