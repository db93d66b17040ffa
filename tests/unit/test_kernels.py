"""Kernels of our own: work is dealt out whole, errors come back, bfloat16 is torch's, large memory is in huge pages."""

import re
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from fbgemm_gpu.split_embedding_configs import EmbOptimType
from fbgemm_gpu.split_table_batched_embeddings_ops_training import (
    ComputeDevice,
    EmbeddingLocation,
    SplitTableBatchedEmbeddingBagsCodegen,
)

from torchdlrm.kernels import threads
from torchdlrm.kernels.compile import as_in, compiled_loop, widened
from torchdlrm.kernels.threads import array_of, in_parts
from torchdlrm.tables.huge_pages import huge_pages_policy, use_huge_pages


@pytest.fixture(params=[1, 2, 4])
def num_threads(request, monkeypatch):
    monkeypatch.setattr(threads, "MIN_FLOATS", 0)
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.mark.parametrize("num_items", [0, 1, 3, 1000])
def test_every_item_is_done_once(num_threads, num_items):
    done, by = np.zeros(num_items, np.int64), set()

    def task(first, end):
        done[first:end] += 1
        by.add(threading.get_native_id())

    in_parts(num_items, 1, task)
    assert (done == 1).all()
    assert len(by) == num_threads


def test_little_work_stays_in_this_thread(num_threads, monkeypatch):
    monkeypatch.setattr(threads, "MIN_FLOATS", 100)
    parts = []
    in_parts(10, 9, lambda first, end: parts.append((first, end, threading.get_native_id())))
    assert parts == [(0, 10, threading.get_native_id())]


def test_an_error_in_any_part_is_raised_by_who_asked(num_threads):
    def task(first, end):
        if end == 100:
            msg = f"item {end - 1}"
            raise ValueError(msg)

    with pytest.raises(ValueError, match="item 99"):
        in_parts(100, 1, task)


@compiled_loop
def _copy(values, out):
    for i in range(len(values)):
        out[i] = as_in(out, widened(values[i]))


def test_numbers_are_rounded_to_bfloat16_as_torch_does():
    generator = torch.Generator().manual_seed(0)
    bits = torch.randint(-(2**31), 2**31 - 1, (100_000,), generator=generator, dtype=torch.int64).to(torch.int32)
    some = bits.view(torch.float32)
    ties = torch.tensor(
        [1 + 2**-8, 1 + 3 * 2**-8, -1 - 2**-8, 0.0, -0.0, torch.inf, -torch.inf, torch.nan, 3.4e38, 1e-45]
    )
    values = torch.cat([some[some.isfinite()], ties])
    found = torch.empty_like(values, dtype=torch.bfloat16)
    _copy(array_of(values), array_of(found))
    torch.testing.assert_close(found, values.bfloat16(), rtol=0, atol=0, equal_nan=True)
    back = torch.empty_like(values)
    _copy(array_of(found), array_of(back))
    torch.testing.assert_close(back, found.float(), rtol=0, atol=0, equal_nan=True)


@pytest.mark.skipif(huge_pages_policy() not in {"madvise", "always"}, reason="the system has no huge pages to give")
def test_large_tables_lie_in_huge_pages():
    large, small = ((rows, 64, EmbeddingLocation.HOST, ComputeDevice.CPU) for rows in (2**18, 100))
    kernels = [
        SplitTableBatchedEmbeddingBagsCodegen([spec], optimizer=EmbOptimType.EXACT_ROWWISE_ADAGRAD)
        for spec in (large, small)
    ]
    for kernel in kernels:
        kernel.init_embedding_weights_uniform(1.0, 2.0)
        use_huge_pages(kernel)
    weights = kernels[0].weights_host
    assert not weights.any()
    assert kernels[1].weights_host.all()
    with torch.no_grad():
        weights.fill_(2.0)
    address = weights.data_ptr() + weights.nbytes // 2
    found = 0
    for mapping in re.split(r"\n(?=[0-9a-f]+-[0-9a-f]+ )", Path("/proc/self/smaps").read_text()):
        begin, end = (int(text, 16) for text in mapping.split(" ", 1)[0].split("-"))
        if begin <= address < end:
            found = int(re.search(r"AnonHugePages:\s+(\d+)", mapping).group(1)) * 1024
    assert found > weights.nbytes // 2
