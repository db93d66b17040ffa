"""Runs `dlrm` commands, and other scripts, in processes of their own that need not load torch and TorchRec first.

Loading them takes three seconds of a core, and the suite runs some hundred commands. A server loads them once and
forks a process for each command, in which all else is as in one that a shell starts: arguments, folder, environment,
output, signals, exit code.

So too the processes that `multiprocessing` spawns. Those of a command are forked by a server of its own, which is
forked off before the command has run anything, and Linux makes them children of the command.
"""

import atexit
import ctypes
import fcntl
import functools
import gc
import importlib
import json
import multiprocessing.util
import os
import pkgutil
import runpy
import select
import signal
import socket
import subprocess
import sys
import threading
import time
import warnings
from contextlib import ExitStack, suppress
from pathlib import Path
from tempfile import TemporaryFile

# The last ones start threads, but none that a fork needs: those that compute start with the first work.
LIBRARIES = (
    *("torch", "torch.distributed.checkpoint", "torch.distributed.launcher.api", "torch.utils.tensorboard", "torchrec"),
    *("cyclopts", "numba", "pydantic", "rich.progress", "polars", "pyarrow.dataset", "pyarrow.parquet"),
)
DLRM = str(Path(sys.executable).with_name("dlrm"))
MAX_REQUEST_BYTES = 1 << 18
MAX_DESCRIPTORS = 64
# Arguments of commands that spawn processes; of other scripts, any may.
SPAWNING = {"--nproc-per-node", "--nnodes", "--max-restarts", "--workers", "bench", "quickstart"}
SPAWNED = "spawn_main"  # what `multiprocessing` calls, and our name for the process
ADOPTION_TIMEOUT_S = 10
SET_DEATH_SIGNAL, SET_NAME, SET_ADOPTING = 1, 15, 36  # of prctl
prctl = ctypes.CDLL(None).prctl
spawn_from_nothing = multiprocessing.util.spawnv_passfds


class Command:
    """A command that was started: as much of a `subprocess.Popen` as tests use, with text in its pipes."""

    def __init__(self, args, answers, stdin=None, stdout=None, stderr=None):
        self.args, self.stdin, self.stdout, self.stderr = args, stdin, stdout, stderr
        self.returncode = None
        self._answers = answers
        self.pid = int(answers.recv(32))

    def wait(self, timeout=None):
        if self.returncode is None:
            if not select.select([self._answers], [], [], timeout)[0]:
                raise subprocess.TimeoutExpired(self.args, timeout)
            with self._answers:
                self.returncode = int(self._answers.recv(32))
        return self.returncode

    def poll(self):
        with suppress(subprocess.TimeoutExpired):
            self.wait(timeout=0)
        return self.returncode

    def send_signal(self, number):
        if self.poll() is None:
            os.kill(self.pid, number)

    def terminate(self):
        self.send_signal(signal.SIGTERM)

    def kill(self):
        self.send_signal(signal.SIGKILL)

    def communicate(self, timeout=None):
        """What is left in the pipes: all of it when it has ended, and every other process that writes there."""
        deadline_s = time.monotonic() + (threading.TIMEOUT_MAX if timeout is None else timeout)
        told = {pipe: "" for pipe in (self.stdout, self.stderr) if pipe}

        def read(pipe):
            told[pipe] = pipe.read()
            pipe.close()

        readers = [threading.Thread(target=read, args=(pipe,), daemon=True) for pipe in told]
        for reader in readers:
            reader.start()
        for reader in readers:
            reader.join(max(0, deadline_s - time.monotonic()))
            if reader.is_alive():
                raise subprocess.TimeoutExpired(self.args, timeout)
        self.wait(None if timeout is None else max(0, deadline_s - time.monotonic()))
        return told.get(self.stdout), told.get(self.stderr)


class Spawner:
    """What starts processes for `multiprocessing` by a server.

    Args:
        requests: to a server that a child of this process has become.
    """

    def __init__(self, requests):
        self._socket = requests

    def spawn(self, path, args, descriptors):
        """In place of `multiprocessing.util.spawnv_passfds`."""
        if SPAWNED not in str(args):
            return spawn_from_nothing(path, args, descriptors)
        descriptors = sorted(set(descriptors))
        handled = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)
        request = {
            "code": args[-2],
            "parent": os.getpid(),
            "descriptors": descriptors,
            "environment": dict(os.environ),
            "ignored": [number for number in handled if signal.getsignal(number) == signal.SIG_IGN],
            "blocked": list(signal.pthread_sigmask(signal.SIG_BLOCK, ())),
        }
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        prctl(SET_ADOPTING, 1)
        try:
            with ours:
                with theirs:
                    socket.send_fds(self._socket, [json.dumps(request).encode()], [*descriptors, theirs.fileno()])
                return int(ours.recv(32))
        finally:
            prctl(SET_ADOPTING, 0)


class CommandServer(Spawner):
    """The server as a test sees it."""

    def __init__(self):
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        super().__init__(ours)
        command = [sys.executable, __file__, str(theirs.fileno())]
        # As the command does, before it loads torch.
        environment = {**os.environ, "KINETO_LOG_LEVEL": "99", "TORCH_CPP_LOG_LEVEL": "ERROR"}
        self._process = subprocess.Popen(command, pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL, env=environment)
        theirs.close()

    def start(self, args, *, stdin=None, stdout=None, stderr=None, cwd=None, env=None, start_new_session=False):
        """Start the script args[0] of Python; all as `subprocess.Popen` has it, but that None is an empty file."""
        args = list(map(str, args))
        request = {
            "args": args,
            "cwd": str(cwd or Path.cwd()),
            "environment": dict(os.environ if env is None else env),
            "start_new_session": start_new_session,
        }
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with ExitStack() as given:
            files, pipes = [], []
            for asked, mode in ((stdin, "r"), (stdout, "w"), (stderr, "w")):
                file, pipe = _opened(asked, mode, files, given)
                files.append(file)
                pipes.append(pipe)
            files.append(given.enter_context(theirs))
            socket.send_fds(self._socket, [json.dumps(request).encode()], [file.fileno() for file in files])
        return Command(args, ours, *pipes)

    def run(self, args, *, given=b"", timeout_s=240, **options):
        """Start a script, which is given bytes, and wait; as `subprocess.run` does that captures the output."""
        with TemporaryFile() as stdin, TemporaryFile("w+") as stdout, TemporaryFile("w+") as stderr:
            stdin.write(given)
            stdin.seek(0)
            command = self.start(args, stdin=stdin, stdout=stdout, stderr=stderr, **options)
            try:
                command.wait(timeout_s)
            except subprocess.TimeoutExpired:
                command.kill()
                raise
            stdout.seek(0)
            stderr.seek(0)
            return subprocess.CompletedProcess(command.args, command.returncode, stdout.read(), stderr.read())

    def close(self):
        self._socket.close()
        self._process.wait()


def _opened(file, mode, before, given):
    """What a command is to have as a standard stream, open until `given` ends; and our end, if that is a pipe."""
    if file is None:
        return given.enter_context(Path(os.devnull).open(mode)), None
    if file == subprocess.STDOUT:
        return before[-1], None
    if file != subprocess.PIPE:
        return file, None
    read, write = os.pipe()
    theirs, ours = (read, write) if mode == "r" else (write, read)
    return given.enter_context(os.fdopen(theirs, mode)), os.fdopen(ours, "w" if mode == "r" else "r")


@functools.cache
def shared_server():
    """The one server of this process, from when it is first needed until the process ends."""
    server = CommandServer()
    atexit.register(server.close)
    return server


def spawned_by(process_id):
    """Process ids of the children that `multiprocessing` has spawned; none when the process has ended."""
    found = []
    for listed in Path(f"/proc/{process_id}/task").glob("*/children"):
        with suppress(FileNotFoundError, ProcessLookupError):  # it, or a thread of it, has ended
            for child in listed.read_text().split():
                with suppress(FileNotFoundError, ProcessLookupError):
                    names = [Path(f"/proc/{child}/{name}").read_text() for name in ("comm", "cmdline")]
                    found += [int(child)] if any(SPAWNED in name for name in names) else []
    return found


def serve(requests):
    """Fork a process for every request.

    Returns:
        In such a process what it is to call; at the server's end None.
    """
    while True:
        request, descriptors, _, _ = socket.recv_fds(requests, MAX_REQUEST_BYTES, MAX_DESCRIPTORS)
        if not request:
            return None
        if os.fork() == 0:
            *given, answers = descriptors
            request = json.loads(request)
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            return (_spawned if "code" in request else _command)(request, *given, answers=answers)
        for descriptor in descriptors:
            os.close(descriptor)


def _command(request, *standard, answers):
    """In the parent of a command wait for it, tell its exit code, and end; in the command tell its id."""
    with socket.socket(fileno=answers) as told:
        if process_id := os.fork():
            for descriptor in standard:
                os.close(descriptor)
            _, status = os.waitpid(process_id, 0)
            with suppress(BrokenPipeError):  # nobody waits for it any more
                told.sendall(b"%d" % os.waitstatus_to_exitcode(status))
            os._exit(0)
        if request["start_new_session"]:
            os.setsid()
        told.sendall(b"%d" % os.getpid())
    for number, descriptor in enumerate(standard):  # each above 2, which the server has open
        os.dup2(descriptor, number)
        os.close(descriptor)
    _live_in(request["environment"])
    # Where GPUs are used each process loads CUDA for itself.
    may_spawn = request["args"][0] != DLRM or SPAWNING.intersection(request["args"])
    if may_spawn and os.environ.get("CUDA_VISIBLE_DEVICES") == "":
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        if os.fork() == 0:
            ours.close()
            prctl(SET_DEATH_SIGNAL, signal.SIGKILL)
            for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT):
                signal.signal(number, signal.SIG_IGN)
            signal.signal(signal.SIGCHLD, signal.SIG_IGN)
            with theirs:
                return serve(theirs)
        theirs.close()
        multiprocessing.util.spawnv_passfds = Spawner(ours).spawn
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.chdir(request["cwd"])
    sys.argv = request["args"]
    sys.path.insert(0, str(Path(sys.argv[0]).parent))
    return functools.partial(runpy.run_path, sys.argv[0], run_name="__main__")


def _live_in(environment):
    """Take an environment, which the console has asked for colours and width when it was made."""
    os.environ.clear()
    os.environ.update(environment)
    console = sys.modules["torchdlrm.cli.terminal"].console
    vars(console).update(vars(type(console)(stderr=True, highlight=False)))


def _spawned(request, *descriptors, answers):
    """In a process whose parent ends at once wait until it is a child of the one that asked for it, and tell its id."""
    if os.fork():
        os._exit(0)
    deadline_s = time.monotonic() + ADOPTION_TIMEOUT_S
    with socket.socket(fileno=answers) as told:
        while os.getppid() != request["parent"]:
            if time.monotonic() > deadline_s:  # it has ended
                os._exit(1)
            time.sleep(0.0005)
        prctl(SET_NAME, SPAWNED.encode())
        signal.pthread_sigmask(signal.SIG_SETMASK, request["blocked"])
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT):
            default = signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL
            signal.signal(number, signal.SIG_IGN if number in request["ignored"] else default)
        _live_in(request["environment"])
        told.sendall(b"%d" % os.getpid())
    return functools.partial(_run_spawned, request["code"], dict(zip(request["descriptors"], descriptors, strict=True)))


def _run_spawned(code, descriptors):
    """Run what `multiprocessing` gives to an interpreter, with descriptors under their numbers in the other process."""
    above = max(descriptors) + 1
    moved = {number: fcntl.fcntl(descriptor, fcntl.F_DUPFD, above) for number, descriptor in descriptors.items()}
    for descriptor in descriptors.values():
        os.close(descriptor)
    for number, descriptor in moved.items():
        os.dup2(descriptor, number)
        os.close(descriptor)
    sys.argv = ["-c", "--multiprocessing-fork"]
    exec(code, {})


def end_after(run):
    """Call it and end as Python does, but without taking all modules apart.

    That writes to every page which the process shares with the server: 0.4 s of a core, more than most commands take.
    """
    try:
        run()
        code = 0
    except SystemExit as end:
        if not isinstance(end.code, int | None):
            raise
        code = end.code or 0
    threading._shutdown()
    atexit._run_exitfuncs()
    with suppress(OSError):  # of a stream that cannot be written to: Python says so below
        for stream in (sys.stdout, sys.stderr):
            if stream and not stream.closed:
                stream.flush()
        os._exit(code & 0xFF)
    sys.exit(code)


if __name__ == "__main__":
    sys.path.pop(0)  # tests are not what a command can import
    signal.pthread_sigmask(signal.SIG_SETMASK, ())  # the first command may be asked for where signals are blocked
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a Ctrl-C is for the suite, which then closes the server
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody asks how they ended
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for library in LIBRARIES:
            importlib.import_module(library)
        for module in pkgutil.walk_packages(importlib.import_module("torchdlrm").__path__, "torchdlrm."):
            importlib.import_module(module.name)
        # What Numba looks through before it loads the first function.
        registry = importlib.import_module("numba.core.registry")
        registry.cpu_target.typing_context.refresh()
        registry.cpu_target.target_context.refresh()
    # So says Python 3.12; those threads are of libraries that know of forks.
    warnings.filterwarnings("ignore", "This process .* is multi-threaded", DeprecationWarning)
    # No command has to look through what was loaded, which would also copy it: that took half of a short one's time.
    gc.freeze()
    with socket.socket(fileno=int(sys.argv[1])) as requests_socket:
        run = serve(requests_socket)
    if run:
        end_after(run)
