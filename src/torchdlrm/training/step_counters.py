"""Whatever counts steps by itself is told which step it is: a resumed run then counts as an uninterrupted one."""

from torch import nn

from torchdlrm.model.dropout import DroppedActivation
from torchdlrm.tables.optimizers import table_kernels


class StepCounters:
    """Tells FBGEMM's tables and the dropout layers of a model which step begins.

    FBGEMM counts forward passes, also those of a validation, and its count is in no state dict; Adam's and LAMB's bias
    correction depend on it. Dropout draws its random numbers from seed, step and rank, so that no checkpoint needs
    to hold the state of a generator.

    Args:
        model: after `DistributedModelParallel`.
        seed: of the run.
        rank: of this process.
    """

    def __init__(self, model: nn.Module, *, seed: int, rank: int) -> None:
        self._kernels = list(table_kernels(model))
        self._dropped = [module for module in model.modules() if isinstance(module, DroppedActivation)]
        self._seed, self._rank = seed, rank

    def begin(self, step: int) -> None:
        """Step `step` (from 1) comes next."""
        for kernel in self._kernels:
            kernel.iter.fill_(step - 1)  # its forward adds one
            kernel.iter_cpu.fill_(step - 1)
        for module in self._dropped:
            module.drawn_from = (self._seed, step, self._rank)
