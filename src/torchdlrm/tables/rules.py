"""What our kernels need of FBGEMM's module: where its state is, and the rule of a step.

F features, T tables.
"""

import numpy as np
from fbgemm_gpu.split_table_batched_embeddings_ops_training import (
    SplitTableBatchedEmbeddingBagsCodegen,
    WeightDecayMode,
)

from torchdlrm.tables.kernels import Array
from torchdlrm.tables.optimizers import record_of
from torchdlrm.tables.updates import KINDS, Rule, State


def next_rule(kernel: SplitTableBatchedEmbeddingBagsCodegen) -> Rule:
    """The rule of the next step, which is counted with this."""
    step = kernel.iter_cpu.add_(1).item()
    args, record = kernel.optimizer_args, record_of(kernel.optimizer)
    rate, decay = kernel.learning_rate_tensor.item(), args.weight_decay
    adds_to_gradient = args.weight_decay_mode == WeightDecayMode.L2
    is_in_ratio = record.momentum == "lamb"
    return Rule(
        kind=KINDS[record.name],
        rate=np.float32(rate),
        eps=np.float32(args.eps),
        beta1=np.float32(args.beta1),
        beta2=np.float32(args.beta2),
        rest1=np.float32(1 - args.beta1),
        rest2=np.float32(1 - args.beta2),
        unbias1=np.float32(1 / (1 - args.beta1**step)),
        unbias2=np.float32(1 / (1 - args.beta2**step)),
        l2=np.float32(decay if adds_to_gradient else 0),
        in_ratio=np.float32(decay if is_in_ratio and not adds_to_gradient else 0),
        keeps=1.0 if adds_to_gradient or is_in_ratio else 1 - rate * decay,
        step=step if getattr(kernel, "is_lazy", False) else 0,
    )


def state_of(kernel: SplitTableBatchedEmbeddingBagsCodegen, name: str, first_feature_T: Array, dim_T: Array) -> State:
    """Where a kind of state is, such as momentum1; there are no values of it where the optimizer has none."""
    rows_T = np.asarray([rows for rows, *_ in kernel.embedding_specs])
    values = getattr(kernel, f"{name}_host").detach().numpy()
    nothing = np.zeros_like(dim_T)
    dtype = np.int32 if name == "prev_iter" else np.float32
    if values.dtype != dtype:  # FBGEMM's placeholder
        return State(np.empty(0, dtype), nothing, nothing)
    begins = getattr(kernel, f"{name}_offsets").numpy()[first_feature_T]
    return State(values, begins, dim_T if len(values) == rows_T @ dim_T else np.ones_like(dim_T))
