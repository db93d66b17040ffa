"""The commands of the recipes in deploy/ do what they are for: with small data, on one machine, against an S3 server.

That the files are what Kubernetes, Kubeflow, KServe and SLURM read is tested in tests/unit/test_deployment.py.
"""

import datetime
import gzip
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from helpers.buckets import bytes_of
from helpers.command_server import folder_of_commands
from helpers.slurm import said, slurm, state, submit, wait_for
from torchdlrm.storage import objects

yaml = pytest.importorskip("yaml")
DEPLOY = Path(__file__).parents[2] / "deploy"
SMALL = ["--train.batch-size-global=128", "--logging.tensorboard=false"]


def arguments(manifest, kind):
    """Of the one container of an object, or of a TrainJob, what `dlrm` is given."""
    (found,) = (
        document for document in yaml.safe_load_all((DEPLOY / manifest).read_text()) if document["kind"] == kind
    )
    pod = found["spec"]
    for key in ("jobTemplate", "spec", "template", "spec"):
        pod = pod.get(key, pod)
    trainer = pod.get("trainer") or pod["containers"][0]
    return trainer["args"]


def here(texts, bucket, **others):
    """Texts with the test's bucket and sizes in place of the recipe's."""
    others = {"criteo-1tb": "criteo-small"} | others
    texts = [re.sub(r"s3://(?=(models|clicks)/)", f"{bucket}/", text) for text in texts]
    for there, replaced in others.items():
        texts = [text.replace(there, str(replaced)) for text in texts]
    return texts


@pytest.fixture
def days(bucket, small_log):
    """The log of two days in the bucket, as Criteo's are called."""
    lines = small_log.read_bytes().splitlines(keepends=True)
    for day in range(2):
        objects.write(f"{bucket}/clicks/criteo/day_{day}.tsv", b"".join(lines[day::2]))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # Dask's own
def test_the_commands_for_kubernetes_preprocess_and_train(days, bucket, dlrm, tmp_path):
    from distributed import LocalCluster

    options = {"n_workers": 1, "threads_per_worker": 2, "processes": False, "dashboard_address": None}
    with LocalCluster(protocol="tcp://", local_directory=tmp_path, **options) as cluster:
        address = {"tcp://dask-scheduler:8786": cluster.scheduler_address}
        preprocess = arguments("preprocess.yaml", "Job")
        done = dlrm(*here(preprocess, bucket, **address, **{"*.gz": "*.tsv", "48GB": "1GB"}), "--min-count=2")
        assert done.returncode == 0, done.stderr
    alone = {"$(PET_NNODES)": 1, "$(PET_MASTER_ADDR):$(PET_MASTER_PORT)": "localhost:0", "node=8": "node=1"}
    done = dlrm(*here(arguments("train.yaml", "TrainJob"), bucket, **alone), *SMALL)
    assert done.returncode == 0, done.stderr
    assert "plan.json" in objects.listed(f"{bucket}/models/run")


@pytest.mark.slow
def test_the_nightly_job_learns_the_log_of_yesterday_and_the_server_follows_it(bucket, small_log, serve):
    yesterday = datetime.datetime.now(datetime.UTC).date() - datetime.timedelta(days=1)
    objects.write(f"{bucket}/clicks/{yesterday}.tsv.gz", gzip.compress(small_log.read_bytes()))
    (shell,) = here(arguments("live.yaml", "CronJob"), bucket)
    with folder_of_commands() as commands:
        environment = {**os.environ, "PATH": f"{commands}:{os.environ['PATH']}"}
        done = subprocess.run(["sh", "-c", shell], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    given = [argument for argument in here(arguments("serve.yaml", "Deployment"), bucket) if "port" not in argument]
    server = serve(*given)
    assert server.period == 1


def script(name, folder, bucket, commands, **others):
    """A copy of a batch script for the SLURM of the test: two machines of two cores."""
    text = (DEPLOY / name).read_text()
    text = re.sub(r"#SBATCH --(gpus-per-node|mem)=.*\n", "", text)
    text = re.sub(r"(--nodes=)\d+", r"\g<1>2", re.sub(r"(--cpus-per-task=)\d+", r"\g<1>1", text))
    text = text.replace("/opt/torchdlrm/bin", f"{commands}:{Path(sys.executable).parent}")
    text = text.replace("/tmp/torchdlrm-$USER", f"{folder}/batch").replace("srun ", f"srun {folder}/on-node ")
    on_node = folder / "on-node"  # each machine has a disk of its own
    on_node.write_text(f'#!/bin/sh\nTORCHDLRM_CACHE={folder}/$SLURMD_NODENAME exec "$@"\n')
    on_node.chmod(0o755)
    (text,) = here([text], bucket, **others)
    path = folder / name
    path.write_text(text)
    return path


@pytest.mark.slow
def test_slurm_runs_the_scripts_and_starts_a_training_again_that_it_has_interrupted(days, bucket, tmp_path):
    """On two nodes without a folder in common; the job is asked to stop as before the end of its time."""
    (tmp_path / "slurm").mkdir()
    with folder_of_commands() as commands, slurm(tmp_path / "slurm") as environment:
        small = {
            "*.gz": "*.tsv",
            "48GB": "1GB",
            "--max-embeddings 40000000": "--min-count 2",
            "--nproc-per-node 8": " ".join(SMALL),
        }
        job = submit(script("preprocess.sbatch", tmp_path, bucket, commands, **small), environment)
        wait_for(lambda: state(job, environment)[0] not in {"PENDING", "RUNNING", "COMPLETING"})
        said_there = (tmp_path / "preprocess.sbatch.out").read_text()
        assert state(job, environment) == ("COMPLETED", 0), said_there
        assert said_there.count("Registered to") >= 2
        small["criteo-1tb"] = "criteo-small --train.epochs 15 --logging.every-steps 1"
        job = submit(script("train.sbatch", tmp_path, bucket, commands, **small), environment)
        wait_for(lambda: any(tmp_path.glob("n*/s3/**/metrics.jsonl")))
        said(environment, "scancel", "--signal=TERM", job)
        wait_for(lambda: state(job, environment) == ("PENDING", 1))
        # SLURM waits two minutes; at once, the nodes would take the end of the first start for that of the second.
        said(environment, "scontrol", "update", f"JobId={job}", "StartTime=now+5seconds")
        wait_for(lambda: state(job, environment)[0] not in {"PENDING", "RUNNING", "COMPLETING"})
        said_there = (tmp_path / "train.sbatch.out").read_text()
        assert state(job, environment) == ("COMPLETED", 1), said_there
        assert "resuming after step" in said_there
    assert "bundle.json" in bytes_of(f"{bucket}/models/bundle")
