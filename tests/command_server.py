"""Runs `dlrm` commands in processes of their own that need not load torch and TorchRec first.

Loading them takes three seconds of a core, and the suite runs some hundred commands. A server loads them once and
forks a process for each command, in which all else is as in one that a shell starts: arguments, folder, environment,
output, signals, exit code. Each command imports the project's own code, and the libraries that start threads.
"""

import importlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path

LIBRARIES = ("torch", "torch.distributed.checkpoint", "torch.distributed.launcher.api", "torchrec")
MAX_REQUEST_BYTES = 1 << 18


class CommandServer:
    """The server as a test sees it."""

    def __init__(self):
        self._socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        command = [sys.executable, __file__, str(theirs.fileno())]
        self._process = subprocess.Popen(command, pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL)
        theirs.close()

    def run(self, argv, *, cwd, environment, timeout_s):
        """Run the script argv[0] of Python with the other arguments; returns and raises as `subprocess.run` does."""
        request = json.dumps({"argv": argv, "cwd": str(cwd or Path.cwd()), "environment": environment}).encode()
        ours, theirs = socket.socketpair()
        with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err, ours:
            with theirs:
                socket.send_fds(self._socket, [request], [out.fileno(), err.fileno(), theirs.fileno()])
            answers = ours.makefile()
            process_id = int(answers.readline())
            ours.settimeout(timeout_s)
            try:
                code = int(answers.readline())
            except TimeoutError:
                os.kill(process_id, signal.SIGKILL)
                raise subprocess.TimeoutExpired(argv, timeout_s) from None
            out.seek(0)
            err.seek(0)
            return subprocess.CompletedProcess(argv, code, out.read(), err.read())

    def close(self):
        self._socket.close()
        self._process.wait()


def becomes_command(requests):
    """Fork a process for every request. True in such a process, which is ready to run; False at the server's end."""
    while True:
        request, descriptors, _, _ = socket.recv_fds(requests, MAX_REQUEST_BYTES, 3)
        if not request:
            return False
        if os.fork() == 0:
            _become_command(json.loads(request), *descriptors)
            return True
        for descriptor in descriptors:
            os.close(descriptor)


def _become_command(request, out, err, answers):
    """In the parent of a command wait for it, tell its process id and exit code, and end; return in the command."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    with socket.socket(fileno=answers) as told:
        if process_id := os.fork():
            told.sendall(b"%d\n" % process_id)
            _, status = os.waitpid(process_id, 0)
            told.sendall(b"%d\n" % os.waitstatus_to_exitcode(status))
            os._exit(0)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for descriptor, standard in ((out, 1), (err, 2)):
        os.dup2(descriptor, standard)
        os.close(descriptor)
    os.environ.clear()
    os.environ.update(request["environment"])
    os.chdir(request["cwd"])
    sys.argv = request["argv"]


if __name__ == "__main__":
    sys.path.pop(0)  # tests are not what a command can import
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a Ctrl-C is for the suite, which then closes the server
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody asks how they ended
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for library in LIBRARIES:
            importlib.import_module(library)
    with socket.socket(fileno=int(sys.argv[1])) as requests_socket:
        is_command = becomes_command(requests_socket)
    if is_command:
        from torchdlrm.cli.main import main

        main()
