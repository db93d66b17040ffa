"""A small version of benchmarks/scaling.py: the bytes that it counts, and that docs/scaling.md has what it prints."""

from pathlib import Path

import pytest

import scaling

PAGE = (Path(__file__).parents[2] / "docs" / "scaling.md").read_text()
VALUES = 26 * 128  # of a row: embeddings of all tables


@pytest.mark.parametrize("hosts", [1, 2])
def test_all_hosts_together_send_what_the_rows_of_others_look_up(hosts):
    """Whole tables on two hosts: half of each host's look-ups are the other's."""
    found = scaling.training_on(hosts, "cpu", 4096, scaling.Host())
    sent = found["sent_bytes"]
    assert found["kinds"] == ["table_wise"]
    assert (found["limit"], sent["dense"] > 0) == (("compute", False), ("all-to-all", True))[hosts - 1]
    half = 0 if hosts == 1 else 4096 // 2 * VALUES * 4 / 2
    assert sent["embeddings"] == pytest.approx(half, rel=0.1)  # 26 tables need not be 13 and 13
    assert sent["gradients"] == pytest.approx(half, rel=0.1)
    assert sent["embeddings"] + sent["gradients"] == 2 * half
    assert sent["ids"] == pytest.approx(half / 128 / 4 * (8 + 4), rel=0.1)


def test_the_page_has_what_the_script_prints(capsys):
    rows = [scaling.step_on(step, machines, scaling.Host()) for step in scaling.STEPS for machines in (1, 10)]
    scaling.print_steps([row for row in rows if row["machines"] == 10 or row["step"] == "export"])
    for line in capsys.readouterr().out.splitlines()[2:-1]:
        assert line in PAGE


def test_more_machines_are_faster_until_the_network_limits():
    (preprocess,) = (step for step in scaling.STEPS if step.name == "preprocess")
    hours = [scaling.step_on(preprocess, machines, scaling.Host())["hours"] for machines in (1, 2, 10)]
    assert hours == sorted(hours, reverse=True)
    slow = scaling.Host(network=1e6)
    assert scaling.step_on(preprocess, 1, slow)["limit"] == "network"
