"""Trainings on several machines (two launchers on loopback), and launchers that are killed."""

import socket

import pytest
from test_resume import OPTIONS, Process, checkpoints


def two_nodes(*arguments, first=(), second=()):
    """Two `dlrm train` of one job, with arguments of both and of each."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    shared = (*arguments, "--nnodes", 2, "--rdzv-endpoint", f"127.0.0.1:{port}")
    return [Process(*shared, *first), Process(*shared, *second)]


@pytest.mark.slow
def test_machines_that_were_started_with_different_settings_refuse_alike(small_dataset, tmp_path):
    arguments = ("--dataset", small_dataset.path, "--run", tmp_path / "run", *OPTIONS)
    other = ("--table-optimizer.learning-rate", 0.5, "--train.timeout-s", 7, "--train.batch-size-global", 128)
    nodes = two_nodes(*arguments, second=(*other, "--max-restarts", 3))
    for code, output in (node.wait() for node in nodes):
        assert code == 2, output
        for name, before, now in (
            ("table_optimizer.learning_rate", 0.05, 0.5),
            ("train.timeout_s", 600.0, 7.0),
            ("train.batch_size_global", 64, 128),
            ("--max-restarts", 0, 3),
        ):
            (line,) = (line for line in output.splitlines() if f" {name}: " in line)
            assert f" {before} on node " in line
            assert f" {now} on node " in line
        assert "Traceback" not in output
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_what_one_machine_refuses_before_it_starts_ends_the_other(small_dataset, tmp_path):
    nodes = two_nodes(
        *("--run", tmp_path / "run", *OPTIONS),
        first=("--dataset", small_dataset.path),
        second=("--dataset", tmp_path / "nowhere"),
    )
    for code, output in (node.wait() for node in nodes):
        assert code == 2, output
        assert f"{tmp_path}/nowhere: is not a folder" in output
        assert "Traceback" not in output
    assert checkpoints(tmp_path / "run") == []
