"""Where a training computes, by what was seen of the machine: a CUDA build never computes on the processor unasked."""

from dataclasses import replace

import pytest
import torch

from torchdlrm.config import load_config
from torchdlrm.errors import ConfigError
from torchdlrm.training.processes.device import GPU, SeenGPUs, choose_device_type, rank_device

H100 = GPU("NVIDIA H100 80GB HBM3", (9, 0), 80 * 10**9)
TWO = SeenGPUs(torch="2.13.0+cu130", cuda="13.0", driver="580.65.06", gpus=(H100, H100))
CPU_BUILD = SeenGPUs(torch="2.13.0+cpu", cuda=None, driver="580.65.06", gpus=())


def refusal(seen, *, choice="auto", num_processes=1):
    with pytest.raises(ConfigError) as error:
        choose_device_type(choice, seen, num_processes=num_processes)
    return str(error.value)


@pytest.mark.parametrize("choice", ["auto", "cuda"])
@pytest.mark.parametrize("num_processes", [1, 2])
def test_gpus_are_used_where_each_process_has_one(choice, num_processes):
    assert choose_device_type(choice, TWO, num_processes=num_processes) == "cuda"


IN_CPU_SET_UP = replace(TWO, fbgemm="cpu")  # pip fetches PyTorch's CUDA build where its CPU wheels are not named
HIDDEN = replace(TWO, gpus=(), visible="")


@pytest.mark.parametrize(
    ("choice", "seen"),
    [
        ("auto", CPU_BUILD),
        ("auto", IN_CPU_SET_UP),
        ("auto", replace(IN_CPU_SET_UP, driver=None, gpus=())),
        ("auto", HIDDEN),
        ("cpu", TWO),
    ],
)
def test_the_processor_computes_where_nothing_else_can_or_it_is_chosen(choice, seen):
    assert choose_device_type(choice, seen, num_processes=64) == "cpu"


@pytest.mark.parametrize(
    ("seen", "signs"),
    [
        (CPU_BUILD, ["train.device = cuda", "2.13.0+cpu", "make install EXTRA=gpu"]),
        (IN_CPU_SET_UP, ["FBGEMM (fbgemm-gpu-cpu) is the CPU build"]),
        (HIDDEN, ["CUDA_VISIBLE_DEVICES is ''"]),
    ],
)
def test_a_demand_for_gpus_is_refused_where_there_are_none(seen, signs):
    said = refusal(seen, choice="cuda")
    assert [sign for sign in signs if sign not in said] == []


def test_fewer_gpus_than_processes_are_an_error_with_both_numbers():
    said = refusal(TWO, num_processes=4)
    assert "4 processes" in said
    assert "2 GPUs (NVIDIA H100 80GB HBM3)" in said
    assert "driver 580.65.06" in said
    assert "`nproc_per_node`" in said
    assert "train.device to cpu" in said


@pytest.mark.parametrize("choice", ["auto", "cuda"])
@pytest.mark.parametrize(
    ("seen", "signs"),
    [
        (replace(TWO, driver=None, gpus=()), ["no NVIDIA driver", "580 or newer"]),
        (replace(TWO, driver="550.54.14", gpus=()), ["driver 550.54.14 is too old for CUDA 13.0", "580 or newer"]),
        (replace(TWO, cuda="12.9", driver="470.1", gpus=()), ["driver 470.1 is too old for CUDA 12.9", "525 or newer"]),
        (replace(TWO, gpus=()), ["driver 580.65.06", "shows no GPU", "--gpus all"]),
        (replace(TWO, gpus=(), visible="7"), ["shows no GPU", "CUDA_VISIBLE_DEVICES is '7'"]),
        (replace(TWO, gpus=(), said="Error 802: system not yet initialized"), ["Error 802: system not yet"]),
    ],
)
def test_a_cuda_build_without_a_usable_gpu_says_what_is_there_and_what_to_do(choice, seen, signs):
    said = refusal(seen, choice=choice)
    assert f"train.device = {choice}" in said
    assert [sign for sign in signs if sign not in said] == []
    assert "train.device to cpu" in said


@pytest.mark.parametrize(
    ("name", "capability"), [("Tesla T4", (7, 5)), ("Tesla V100", (7, 0)), ("NVIDIA GeForce RTX 5090", (12, 0))]
)
def test_a_gpu_without_kernels_of_fbgemm_is_refused_unless_it_is_demanded(name, capability):
    seen = replace(TWO, gpus=(H100, GPU(name, capability, 16 * 10**9)))
    assert choose_device_type("auto", seen, num_processes=1) == "cuda"  # the first one will do
    said = refusal(seen, num_processes=2)
    assert f"{name} has compute capability {capability[0]}.{capability[1]}" in said
    assert "8.x, 9.x, 10.x" in said
    assert choose_device_type("cuda", seen, num_processes=2) == "cuda"  # FBGEMM may have been built for it


@pytest.mark.parametrize("capability", [(8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (10, 3)])
def test_a_gpu_of_the_same_major_capability_runs_fbgemms_kernels(capability):
    seen = replace(TWO, gpus=(GPU("a", capability, 1),))
    assert choose_device_type("auto", seen, num_processes=1) == "cuda"


def test_another_setting_is_named_where_it_decides():
    with pytest.raises(ConfigError, match=r"^`device` = cuda: .*; or set `device` to cpu"):
        choose_device_type("cuda", replace(TWO, gpus=()), num_processes=1, setting="`device`")


def test_this_machine_is_seen_as_torch_sees_it():
    seen = SeenGPUs.now()
    assert seen.torch == torch.__version__
    assert seen.cuda == torch.version.cuda
    assert len(seen.gpus) == (torch.cuda.device_count() if torch.cuda.is_available() else 0)


def test_a_config_that_wants_the_processor_gets_it():
    config = load_config(None, {"train.device": "cpu"})
    assert rank_device(3, 4, config.train.device) == torch.device("cpu")
