"""Starts `dlrm` commands, and other scripts, in processes of their own: warm ones, or those that a user starts.

Loading torch and TorchRec takes three seconds of a core, and the suite runs some hundred commands. So a server loads
them once and forks a process for each command, in which all else is as in one that a shell starts: arguments, folder,
environment, output, signals, exit code. Linux makes it a child of the test. So too the processes that `multiprocessing`
spawns; those of a command are forked by a server of its own, forked off before the command has run anything.

For other programs, such as a notebook's shell, there is a folder with a `dlrm` that asks the test for its process.

With TORCHDLRM_REAL_PROCESSES=1 there is no server: a shell's `dlrm`, and an interpreter for each spawned process.
"""

import atexit
import ctypes
import fcntl
import functools
import gc
import importlib
import inspect
import json
import multiprocessing.util
import os
import pkgutil
import runpy
import signal
import socket
import subprocess
import sys
import threading
import time
import warnings
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory, TemporaryFile

REAL_PROCESSES = os.environ.get("TORCHDLRM_REAL_PROCESSES") == "1"
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
HANDLED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)
ADOPTION_TIMEOUT_S = 10
SET_DEATH_SIGNAL, SET_NAME, SET_ADOPTING = 1, 15, 36  # of prctl
prctl = ctypes.CDLL(None).prctl
spawn_from_nothing = multiprocessing.util.spawnv_passfds


class Server:
    """A server as it is seen by the process that becomes the parent of what it forks.

    Args:
        requests: to a child of this process that calls `serve`.
    """

    def __init__(self, requests):
        self._socket, self._lock = requests, threading.Lock()

    def fork(self, descriptors, environment, **request):
        """The id of a new child.

        Args:
            descriptors: those that it has under other numbers than this process: {number there: number here}.
            environment: of the child.
            request: what it does: `args` and `cwd` of a script, or the `code` that `multiprocessing` spawns.
        """
        request |= {
            "parent": os.getpid(),
            "descriptors": [*descriptors],
            "environment": dict(environment),
            "ignored": [number for number in HANDLED if signal.getsignal(number) == signal.SIG_IGN],
            "blocked": [*signal.pthread_sigmask(signal.SIG_BLOCK, ())],
        }
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with self._lock, ours:
            prctl(SET_ADOPTING, 1)
            try:
                with theirs:
                    given = [*descriptors.values(), theirs.fileno()]
                    socket.send_fds(self._socket, [json.dumps(request).encode()], given)
                return int(ours.recv(32))
            finally:
                prctl(SET_ADOPTING, 0)

    def spawn(self, path, args, descriptors):
        """In place of `multiprocessing.util.spawnv_passfds`."""
        if SPAWNED not in str(args):
            return spawn_from_nothing(path, args, descriptors)
        return self.fork({number: number for number in sorted(set(descriptors))}, os.environ, code=args[-2])


class ForkedCommand(subprocess.Popen):
    """A script that a server has forked a process for; all else is Popen's own."""

    def __init__(self, server, args, **options):
        self._server = server
        super().__init__(args, **options)

    def _execute_child(self, *arguments):
        asked = inspect.signature(super()._execute_child).bind(*arguments).arguments
        self.pid = self._server.fork(
            {0: asked["p2cread"], 1: asked["c2pwrite"], 2: asked["errwrite"]},
            os.environ if asked["env"] is None else asked["env"],
            args=asked["args"],
            cwd=str(asked["cwd"] or Path.cwd()),
            start_new_session=asked["start_new_session"],
        )
        self._child_created = True
        names = ("p2cread", "p2cwrite", "c2pread", "c2pwrite", "errread", "errwrite")
        self._close_pipe_fds(*map(asked.get, names))


class Commands:
    """Starts commands, each a script of Python and its arguments."""

    def __init__(self):
        if REAL_PROCESSES:
            return
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        command = [sys.executable, __file__, str(theirs.fileno())]
        # As the command does, before it loads torch.
        environment = {**os.environ, "KINETO_LOG_LEVEL": "99", "TORCH_CPP_LOG_LEVEL": "ERROR"}
        with theirs:
            process = subprocess.Popen(command, pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL, env=environment)
        self._server = Server(ours)

        def close():
            ours.close()
            process.wait()

        atexit.register(close)

    def start(self, args, **options):
        """A process with text in its pipes; options are those of `subprocess.Popen`; no stream is an empty file."""
        args = [*map(str, args)]
        streams = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.DEVNULL)
        options = {"text": True, **streams, **options}
        if REAL_PROCESSES:
            return subprocess.Popen(args if args[0] == DLRM else [sys.executable, *args], **options)
        return ForkedCommand(self._server, args, **options)

    def run(self, args, *, given=b"", timeout_s=240, **options):
        """Start a script, which is given bytes, and wait; as `subprocess.run` does that captures the output."""
        with TemporaryFile() as stdin:
            stdin.write(given)
            stdin.seek(0)
            streams = {"stdin": stdin, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
            with self.start(args, **streams, **options) as process:
                try:
                    output = process.communicate(timeout=timeout_s)
                except subprocess.TimeoutExpired:
                    process.kill()
                    raise
            return subprocess.CompletedProcess(process.args, process.returncode, *output)

    def spawn(self, path, args, descriptors):
        """In place of `multiprocessing.util.spawnv_passfds` in this process."""
        return self._server.spawn(path, args, descriptors)


# A program that loads nothing: the process that it asks for has its streams, and gets the signals that end it.
ASKING = """#!{python} -IS
import json, os, signal, socket, sys
with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as asked:
    asked.connect({place!r})
    request = json.dumps([sys.argv[1:], os.getcwd(), dict(os.environ)])
    socket.send_fds(asked, [request.encode()], [0, 1, 2])
    pid = int(asked.recv(32))
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, _: os.kill(pid, number))
    code = int(asked.recv(32))
sys.exit(code if code >= 0 else 128 - code)
"""


@contextmanager
def folder_of_commands():
    """A folder with a `dlrm` for other programs, whose work is done by processes of `shared_server`."""

    def answer(asked):
        with asked:
            request, streams, _, _ = socket.recv_fds(asked, MAX_REQUEST_BYTES, 3)
            args, cwd, env = json.loads(request)
            named = dict(zip(("stdin", "stdout", "stderr"), streams, strict=True))
            process = shared_server().start([DLRM, *args], cwd=cwd, env=env, **named)
            for stream in streams:
                os.close(stream)
            asked.send(b"%d" % process.pid)
            asked.send(b"%d" % process.wait())

    def listen():
        with suppress(OSError):  # it is closed
            while True:
                threading.Thread(target=answer, args=(listener.accept()[0],)).start()

    with TemporaryDirectory() as folder, socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        listener.bind(f"{folder}/asked")
        listener.listen()
        thread = threading.Thread(target=listen)
        thread.start()
        program = Path(folder, "dlrm")
        program.write_text(ASKING.format(python=sys.executable, place=f"{folder}/asked"))
        program.chmod(0o755)
        yield Path(folder)
        listener.shutdown(socket.SHUT_RDWR)
        thread.join()


@functools.cache
def shared_server():
    """What starts the commands of this process, from when it is first needed until the process ends."""
    return Commands()


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
    """Fork a process for every request, until the other end is closed; in such a process, do what was asked and end."""
    while True:
        request, descriptors, _, _ = socket.recv_fds(requests, MAX_REQUEST_BYTES, MAX_DESCRIPTORS)
        if not request:
            return
        if os.fork() == 0:
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            requests.close()
            *given, answers = descriptors
            run = _forked(json.loads(request), given, answers)
            break
        for descriptor in descriptors:
            os.close(descriptor)
    end_after(run)


def _forked(request, descriptors, answers):
    """Become a child of the process that asked, have all that it gave, and say the process id; what is to be run."""
    if os.fork():  # whose parent is adopted from
        os._exit(0)
    deadline_s = time.monotonic() + ADOPTION_TIMEOUT_S
    with socket.socket(fileno=answers) as answer:
        while os.getppid() != request["parent"]:
            if time.monotonic() > deadline_s:  # it has ended
                os._exit(1)
            time.sleep(0.0005)
        if request.get("start_new_session"):
            os.setsid()
        signal.pthread_sigmask(signal.SIG_SETMASK, request["blocked"])
        for number in HANDLED:
            default = signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL
            signal.signal(number, signal.SIG_IGN if number in request["ignored"] else default)
        if "code" in request:
            prctl(SET_NAME, SPAWNED.encode())
        os.environ.clear()
        os.environ.update(request["environment"])
        answer.sendall(b"%d" % os.getpid())
    _renumber(dict(zip(request["descriptors"], descriptors, strict=True)))
    # The console has asked the server's environment for colours and width.
    console = sys.modules["torchdlrm.cli.terminal"].console
    vars(console).update(vars(type(console)(stderr=True, highlight=False)))
    if "code" in request:
        sys.argv = ["-c", "--multiprocessing-fork"]
        return functools.partial(exec, request["code"], {})
    sys.argv = request["args"]
    # Where GPUs are used each process loads CUDA for itself.
    may_spawn = sys.argv[0] != DLRM or SPAWNING.intersection(sys.argv)
    if may_spawn and os.environ.get("CUDA_VISIBLE_DEVICES") == "":
        _fork_a_server()
    os.chdir(request["cwd"])
    sys.path.insert(0, str(Path(sys.argv[0]).parent))
    return functools.partial(runpy.run_path, sys.argv[0], run_name="__main__")


def _renumber(descriptors):
    """Give open descriptors other numbers: {number: present number}."""
    above = max(descriptors) + 1
    moved = {number: fcntl.fcntl(descriptor, fcntl.F_DUPFD, above) for number, descriptor in descriptors.items()}
    for descriptor in descriptors.values():
        os.close(descriptor)
    for number, descriptor in moved.items():
        os.dup2(descriptor, number)
        os.close(descriptor)


def _fork_a_server():
    """Let a child of this process, which it does not outlive, fork what this process spawns."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    if os.fork():
        theirs.close()
        multiprocessing.util.spawnv_passfds = Server(ours).spawn
        return
    ours.close()
    prctl(SET_DEATH_SIGNAL, signal.SIGKILL)
    for number in (*HANDLED, signal.SIGCHLD):
        signal.signal(number, signal.SIG_IGN)
    serve(theirs)
    os._exit(0)


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
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # the kernel then reaps them
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
    serve(socket.socket(fileno=int(sys.argv[1])))
