"""Silences what libraries tell each other's developers; no user of ours can act on it."""

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

_LOGGED = (
    "torchrec.distributed.planner.types",  # "The topology was constructed directly": instead of by Meta's presets
    "torchrec.distributed.comm",  # "[Connection] intra_group": which ranks a table that is cut by rows connects
    "torch.fx._symbolic_trace",
)
_WARNED = (
    ("Please use DTensor instead", FutureWarning),
    ("`broadcast_buffers` is deprecated", FutureWarning),
    ("`torch.distributed.reduce_scatter_tensor` is deprecated", FutureWarning),
    ("`torch.distributed.all_gather_into_tensor` is deprecated", FutureWarning),
    ("TBE B200 optimization", UserWarning),  # which size of blocks FBGEMM's backward has chosen, whatever the GPU
    (r"(?s).*training optimizer '\w+' is marked as\s+EXPERIMENTAL", UserWarning),  # FBGEMM, of adam and lamb
)


@contextmanager
def silenced_libraries() -> Iterator[None]:
    """Inside, TorchRec, FBGEMM and torch do not say what they have to say of themselves and of each other."""
    levels = dict.fromkeys(_LOGGED, logging.ERROR)
    # The launcher's own account of a failed process, with its traceback: `launch` tells it once, in our words.
    launcher = [name for name in logging.root.manager.loggerDict if name.startswith("torch.distributed.elastic")]
    names = (*launcher, "torch.distributed.elastic", "torch.multiprocessing.spawn")
    levels |= dict.fromkeys(names, logging.CRITICAL)
    before = {name: logging.getLogger(name).level for name in levels}
    with warnings.catch_warnings():
        for message, category in _WARNED:
            warnings.filterwarnings("ignore", message=message, category=category)
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)
        try:
            yield
        finally:
            for name, level in before.items():
                logging.getLogger(name).setLevel(level)
