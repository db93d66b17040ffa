"""What a pretended GPU needs of Python: the values that a kernel would have computed and TorchRec reads on the host.

Importing this changes torch.distributed and TorchRec in the process.
"""

import ctypes
import sys
from contextlib import contextmanager
from functools import wraps

import numpy as np
from torch import distributed as dist
from torchrec.distributed import dist_data, embeddingbag
from torchrec.sparse import jagged_tensor

from torchdlrm import metrics
from torchdlrm.training import checkpointer

COUNTS = ("launches", "waits", "copies_to_host", "copies_to_gpu", "collectives")  # as in stubs/pretended.h
_runtime = ctypes.CDLL(None)
_runtime.pretended_count.restype = _runtime.pretended_used_gpus.restype = ctypes.c_long


def counts():
    """What this process has asked of its GPUs so far, by COUNTS."""
    return {name: _runtime.pretended_count(number) for number, name in enumerate(COUNTS)}


def take_used_gpus():
    """The numbers of the GPUs that threads of this process have used since this was last asked."""
    bits = _runtime.pretended_used_gpus()
    _runtime.pretended_forget_used_gpus()
    return {gpu for gpu in range(64) if bits >> gpu & 1}


@contextmanager
def uncounted():
    """Inside, what this thread does is not counted."""
    _runtime.pretended_uncounted(1)
    try:
        yield
    finally:
        _runtime.pretended_uncounted(0)


_new_group = dist.new_group


@wraps(_new_group)
def new_group(ranks=None, *args, **options):
    """Tell NCCL who is in the group that it will split off."""
    members = list(range(dist.get_world_size())) if ranks is None else sorted(ranks)
    rank = dist.get_rank()
    _runtime.pretended_next_split(len(members), members.index(rank) if rank in members else 0)
    return _new_group(ranks, *args, **options)


_begin_splits = dist_data.SplitsAllToAllAwaitable.__init__
_end_splits = dist_data.SplitsAllToAllAwaitable._wait_impl


@wraps(_begin_splits)
def begin_splits(self, input_tensors, pg, *args, **options):
    """Keep the sizes that are sent; every other rank sends this one the same."""
    with uncounted():
        rows = [sizes.tolist() for sizes in input_tensors]
    self._pretended = [[row[pg.rank()]] * pg.size() for row in rows]
    _begin_splits(self, input_tensors, pg, *args, **options)


@wraps(_end_splits)
def end_splits(self):
    """The sizes that came; TorchRec reads them from a tensor that a kernel would have transposed."""
    found = _end_splits(self)
    return self._pretended if self._output_tensor.is_cuda else found


_sum_lengths = jagged_tensor._maybe_compute_length_per_key


@wraps(_sum_lengths)
def sum_lengths(keys, stride, stride_per_key, variable_stride_per_key, length_per_key, lengths, offsets, values):
    """As many values for each key, where a GPU would have summed the lengths."""
    found = _sum_lengths(
        keys, stride, stride_per_key, variable_stride_per_key, length_per_key, lengths, offsets, values
    )
    if length_per_key is None and values is not None and values.is_cuda and keys:
        quotient, rest = divmod(values.numel(), len(keys))
        return [quotient + (key < rest) for key in range(len(keys))]
    return found


_metrics_of = metrics.binary_metrics


@wraps(_metrics_of)
def metrics_of_anything(labels, logits, weights=None):
    """The metrics of labels and logits that no kernel has written, so that they may be any number."""
    return _metrics_of(labels > 0.5, np.nan_to_num(logits), None if weights is None else np.ones_like(weights))


_find_not_finite = checkpointer.find_not_finite


@wraps(_find_not_finite)
def find_nothing_not_finite(model, state):
    """Nothing, though all is looked at: no kernel has written the weights, nor the answer."""
    _find_not_finite(model, state)
    return []


changed = "torchdlrm.training.pipeline"
assert changed not in sys.modules, "import this before what it changes"
checkpointer.find_not_finite = find_nothing_not_finite
metrics.binary_metrics = metrics_of_anything
dist.new_group = new_group
dist_data.SplitsAllToAllAwaitable.__init__ = begin_splits
dist_data.SplitsAllToAllAwaitable._wait_impl = end_splits
jagged_tensor._maybe_compute_length_per_key = sum_lengths
embeddingbag.validate_keyed_jagged_tensor = lambda *_: True  # reads the first batch, before any step is counted
