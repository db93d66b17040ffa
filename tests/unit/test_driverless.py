"""The library that takes the place of NVIDIA's where there is no driver."""

import ctypes
import os
import platform
from pathlib import Path

import pytest

from torchdlrm.driverless import LIBRARY_NAME, fbgemm_build, stand_in_for_driver


def has_driver():
    try:
        ctypes.CDLL(LIBRARY_NAME)
    except OSError:
        return False
    return True


@pytest.mark.skipif(platform.machine() != "x86_64", reason="FBGEMM has CUDA builds for x86-64 alone")
@pytest.mark.skipif(has_driver(), reason="this host has a driver")
def test_the_cuda_set_up_gets_a_library_whose_functions_say_that_there_is_no_driver(monkeypatch):
    monkeypatch.setenv("LD_PRELOAD", "libnothing.so")
    monkeypatch.setattr("torchdlrm.driverless.fbgemm_build", lambda: "cpu")
    assert not stand_in_for_driver()
    assert not has_driver()
    monkeypatch.setattr("torchdlrm.driverless.fbgemm_build", lambda: "cuda")
    assert stand_in_for_driver()
    library = ctypes.CDLL(LIBRARY_NAME)  # the linker goes by the name that a library has inside
    assert library.nvmlInit_v2() == 9  # NVML_ERROR_DRIVER_NOT_LOADED
    assert library.nvmlDeviceGetNvLinkRemotePciInfo_v2(None, 0, None) == 9
    with pytest.raises(AttributeError):
        _ = library.nvmlShutdown
    children_load, others = os.environ["LD_PRELOAD"].split(":")
    assert Path(children_load).is_file()  # of the package, so that it outlives this process
    assert others == "libnothing.so"
    assert not stand_in_for_driver()  # once is enough


def test_the_build_is_told_by_the_package_that_is_installed():
    import fbgemm_gpu

    assert fbgemm_build() == fbgemm_gpu.__variant__
