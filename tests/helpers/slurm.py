"""A SLURM of two nodes on this machine, where its programs are installed and this is root; else the test is skipped.

with slurm(folder) as environment:                 for `sbatch`, `squeue`, `scontrol`
    job = submit(script, environment)
"""

import os
import re
import shutil
import signal
import socket
import subprocess
import time
from contextlib import contextmanager

import pytest

PROGRAMS = ("slurmctld", "slurmd", "sbatch", "srun", "scontrol")
# Nothing signs what the daemons say to each other, no database, and no containers: this machine alone.
SETTINGS = """
ClusterName=test
SlurmctldHost=localhost(127.0.0.1)
SlurmctldPort={ports[0]}
AuthType=auth/none
CredType=cred/none
ProctrackType=proctrack/linuxproc
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmUser=root
SlurmdUser=root
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/%n.pid
KillWait=20
SlurmdParameters=config_overrides
SchedulerParameters=sched_interval=1,batch_sched_delay=0
NodeName=n[1-2] NodeAddr=127.0.0.1 NodeHostname={host} Port=[{ports[1]}-{ports[2]}] CPUs=2 RealMemory=99999
PartitionName=all Nodes=ALL Default=YES State=UP
"""


def _three_ports():
    """Free ports of which the last two follow each other."""
    while True:
        with socket.socket() as first, socket.socket() as second, socket.socket() as third:
            first.bind(("127.0.0.1", 0))
            second.bind(("127.0.0.1", 0))
            port = second.getsockname()[1]
            try:
                third.bind(("127.0.0.1", port + 1))
            except OSError:
                continue
            return first.getsockname()[1], port, port + 1


@contextmanager
def slurm(folder):
    """The environment of this process with a SLURM of its own; `folder` keeps what the daemons say."""
    missing = [name for name in PROGRAMS if shutil.which(name) is None]
    if missing or os.geteuid():
        pytest.skip(f"needs root and SLURM's {', '.join(missing) or 'daemons'}: apt-get install slurm-wlm")
    (folder / "state").mkdir()
    host = socket.gethostname().partition(".")[0]
    settings = folder / "slurm.conf"
    settings.write_text(SETTINGS.format(folder=folder, host=host, ports=_three_ports()))
    environment = {**os.environ, "SLURM_CONF": str(settings)}
    commands = [["slurmctld", "-D"], *(["slurmd", "-D", "-N", node] for node in ("n1", "n2"))]
    with (folder / "daemons.log").open("w") as log:
        options = {"env": environment, "stdout": log, "stderr": log, "start_new_session": True}
        daemons = [subprocess.Popen([*command, "-f", str(settings)], **options) for command in commands]
        try:
            wait_for(lambda: said(environment, "sinfo", "--noheader", "--format=%T %D").strip() == "idle 2")
            yield environment
        finally:
            said(environment, "scancel", "--full", "--user", "root")
            for daemon in reversed(daemons):
                daemon.send_signal(signal.SIGTERM)
            for daemon in daemons:
                daemon.wait(timeout=30)


def said(environment, *command):
    """What a command prints."""
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)
    return done.stdout


def wait_for(is_true, timeout_s=120):
    """Look ten times a second, until it is so."""
    until = time.monotonic() + timeout_s
    while not is_true():
        assert time.monotonic() < until, "it does not become so"
        time.sleep(0.1)


def submit(script, environment):
    """Give a script to SLURM: the number of the job, whose output is in `SCRIPT.out`."""
    answer = said(environment, "sbatch", "--parsable", f"--output={script}.out", str(script))
    assert answer.strip().isdigit(), answer
    return answer.strip()


def state(job, environment):
    """A job's state in one word, such as COMPLETED, and how often it has started again."""
    text = said(environment, "scontrol", "show", "job", job)
    return re.search(r"JobState=(\S+)", text)[1], int(re.search(r"Restarts=(\d+)", text)[1])
