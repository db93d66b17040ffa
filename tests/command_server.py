"""Runs `dlrm` commands, and other scripts, in processes of their own that need not load torch and TorchRec first.

Loading them takes three seconds of a core, and the suite runs some hundred commands. A server loads them once and
forks a process for each command, in which all else is as in one that a shell starts: arguments, folder, environment,
output, signals, exit code. Each command imports the project's own code, and the libraries that start threads.
"""

import atexit
import functools
import gc
import importlib
import json
import os
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

LIBRARIES = (
    *("torch", "torch.distributed.checkpoint", "torch.distributed.launcher.api", "torch.utils.tensorboard", "torchrec"),
    *("cyclopts", "numba", "pydantic", "rich.progress"),
)
DLRM = str(Path(sys.executable).with_name("dlrm"))
MAX_REQUEST_BYTES = 1 << 18


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


class CommandServer:
    """The server as a test sees it."""

    def __init__(self):
        self._socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        command = [sys.executable, __file__, str(theirs.fileno())]
        self._process = subprocess.Popen(command, pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL)
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


def becomes_command(requests):
    """Fork a process for every request. True in such a process, which is ready to run; False at the server's end."""
    while True:
        request, descriptors, _, _ = socket.recv_fds(requests, MAX_REQUEST_BYTES, 4)
        if not request:
            return False
        if os.fork() == 0:
            *standard, answers = descriptors
            _become_command(json.loads(request), *standard, answers=answers)
            return True
        for descriptor in descriptors:
            os.close(descriptor)


def _become_command(request, *standard, answers):
    """In the parent of a command wait for it, tell its exit code, and end; in the command tell its id and return."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
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
        signal.signal(signal.SIGINT, signal.default_int_handler)
        told.sendall(b"%d" % os.getpid())
    for number, descriptor in enumerate(standard):  # each above 2, which the server has open
        os.dup2(descriptor, number)
        os.close(descriptor)
    os.environ.clear()
    os.environ.update(request["environment"])
    os.chdir(request["cwd"])
    sys.argv = request["args"]
    sys.path.insert(0, str(Path(sys.argv[0]).parent))


if __name__ == "__main__":
    sys.path.pop(0)  # tests are not what a command can import
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a Ctrl-C is for the suite, which then closes the server
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody asks how they ended
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for library in LIBRARIES:
            importlib.import_module(library)
    # No command has to look through what was loaded, which would also copy it: that took half of a short one's time.
    gc.freeze()
    with socket.socket(fileno=int(sys.argv[1])) as requests_socket:
        is_command = becomes_command(requests_socket)
    if is_command:
        runpy.run_path(sys.argv[0], run_name="__main__")
