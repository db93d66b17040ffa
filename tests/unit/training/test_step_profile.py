"""What the profile of some steps says: intervals, parts, and the share of communication that was hidden."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from torchdlrm.training.processes.process_group import Ranks
from torchdlrm.training.step_profile import summarize, total_us

INTERVALS = st.lists(
    st.tuples(st.integers(0, 40), st.integers(1, 10)).map(lambda pair: (float(pair[0]), float(sum(pair)))), max_size=12
)


def covered(intervals):
    """Which of the microseconds are inside an interval: an independent way to the same figures."""
    microseconds = np.zeros(64, dtype=bool)
    for start, end in intervals:
        microseconds[int(start) : int(end)] = True
    return microseconds


@given(INTERVALS, INTERVALS)
def test_lengths_of_unions_and_of_what_they_share(some, others):
    assert total_us(some) == covered(some).sum()
    shared = total_us(some) + total_us(others) - total_us(some + others)
    assert shared == (covered(some) & covered(others)).sum()


def event(name, start, end, *, device="CPU", annotation=False, parent=None):
    return SimpleNamespace(
        name=name,
        is_user_annotation=annotation,
        cpu_parent=parent,
        time_range=SimpleNamespace(start=start, end=end),
        device_type=SimpleNamespace(name=device),
        self_cpu_time_total=end - start if device == "CPU" else 0,
        self_device_time_total=end - start if device == "CUDA" else 0,
    )


def test_communication_beside_an_operator_is_hidden_and_beside_nothing_is_not():
    events = [
        event("aten::mm", 0, 4_000),
        event("gloo:all_to_all", 2_000, 6_000, annotation=True),  # half of it while the product was computed
        event("fbgemm::split_embedding_codegen_forward_cpu", 6_000, 9_000),
        event("DistributedDataParallel.forward", 0, 10_000),
    ]
    profile = summarize(events, Ranks(0, 2, 2, torch.device("cpu")), num_steps=2)
    assert profile.hidden_share == pytest.approx(0.5)
    assert profile.communication_ms_per_step == pytest.approx(2.0)
    assert profile.ms_per_step == pytest.approx(5.0)
    assert profile.ms_per_step_by_part["matrix products"] == pytest.approx(2.0)
    assert profile.ms_per_step_by_part["tables: look up"] == pytest.approx(1.5)


def test_on_a_gpu_kernels_count_and_operators_do_not():
    events = [
        event("aten::mm", 0, 1_000),
        event("ampere_bf16_gemm", 1_000, 5_000, device="CUDA"),
        event("ncclDevKernel_SendRecv", 4_000, 8_000, device="CUDA"),
    ]
    profile = summarize(events, Ranks(0, 2, 2, torch.device("cuda", 0)), num_steps=1)
    assert profile.hidden_share == pytest.approx(0.25)
    assert profile.ms_per_step_by_part == {"matrix products": pytest.approx(4.0)}


def test_annotations_on_a_gpus_timeline_are_no_kernels_and_the_hosts_ranges_no_communication():
    events = [
        event("nccl:all_to_all", 0, 8_000, annotation=True),  # on the host, from the call to the end of waiting for it
        event("nccl:all_to_all", 0, 2_000, device="CUDA", annotation=True),
        event("ncclDevKernel_SendRecv", 0, 1_000, device="CUDA"),
        event("gemm", 1_000, 2_000, device="CUDA"),
        event("## backward 3 ##", 0, 2_000, device="CUDA", annotation=True),
        event("## backward 3 ##", 0, 2_000, annotation=True),
    ]
    profile = summarize(events, Ranks(0, 2, 2, torch.device("cuda", 0)), num_steps=1)
    assert profile.hidden_share == 0.0
    assert profile.communication_ms_per_step == pytest.approx(1.0)
    assert profile.ms_per_step_by_part == {"matrix products": pytest.approx(1.0)}


def test_without_other_ranks_there_is_nothing_to_hide():
    profile = summarize([event("aten::mm", 0, 10)], Ranks(0, 1, 1, torch.device("cpu")), num_steps=1)
    assert profile.hidden_share is None


def test_an_operator_belongs_to_what_encloses_it_unless_it_is_a_product():
    interaction = event("_PairwiseDotsBackward", 0, 1_000)
    bias = event("autograd::engine::evaluate_function: AddmmBackward0", 0, 0)
    step = event("Optimizer.step#Adagrad.step", 2_000, 2_000)
    update = event("_LearntBackward", 3_000, 7_000)
    events = [
        *(interaction, bias, step, update),
        event("aten::bmm", 1_000, 3_000, parent=interaction),
        event("aten::copy_", 3_000, 6_000, parent=interaction),
        event("aten::sum", 6_000, 7_000, parent=bias),
        event("aten::mul", 7_000, 9_000, parent=event("aten::addcdiv", 7_000, 7_000, parent=step)),
        event("aten::copy_", 9_000, 10_000),
        event("aten::clamp_min", 10_000, 11_000),
        event("tables: look up", 11_000, 16_000),
        event("tables: update", 16_000, 22_000),
        event("aten::unknown", 22_000, 29_000),
    ]
    profile = summarize(events, Ranks(0, 1, 1, torch.device("cpu")), num_steps=1)
    assert profile.ms_per_step_by_part == {
        "tables: update": pytest.approx(4 + 6),
        "the rest": pytest.approx(7),
        "tables: look up": pytest.approx(5),
        "interaction": pytest.approx(1 + 3),
        "matrix products": pytest.approx(2),
        "dense optimizer": pytest.approx(2),
        "bias gradients": pytest.approx(1),
        "copies and casts": pytest.approx(1),
        "element by element": pytest.approx(1),
    }
