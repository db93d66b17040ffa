"""Copies a checkpoint into the state of a model: all of it to resume a run, or what another run has learnt.

In: the state dict of a sharded model, which holds initial values, and a checkpoint of any number of ranks; that of
another run may have tables with fewer rows.  Out: the same state dict, in place.  Each rank reads the rows of its own
shards, a block at a time, so no more than a block of a table is in memory twice; rows that the checkpoint lacks, and
those that stand for another value now, keep their initial values.

An optimizer's state with one value a row is a vector.  Where a table is cut by columns, each piece of the columns has
values of its own: the vector is as many times as long, piece after piece.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.distributed._shard.sharded_tensor import ShardedTensor

from torchdlrm.errors import RunError
from torchdlrm.training.checkpoint_reader import CheckpointReader

_BLOCK_ROWS = 65_536


@dataclass(frozen=True)
class TakeOver:
    """What of another run's checkpoint is taken over, and how; by default all, as it is.

    Attributes:
        keeps_dense_state: whether the dense optimizer's state is taken over; tables keep theirs.
        may_grow: whether tables may have more rows than in the checkpoint.
        reset_ids: of tables by name, rows that keep their initial values, ascending int32 [R].
        factors: by what kinds of an optimizer's state are multiplied, by the names that it has for them.
    """

    keeps_dense_state: bool = True
    may_grow: bool = False
    reset_ids: Mapping[str, npt.NDArray[np.int32]] = field(default_factory=dict)
    factors: Mapping[str, float] = field(default_factory=dict)

    def reset_of(self, weight: str) -> npt.NDArray[np.int32]:
        """The rows of a table that keep their initial values; `weight` is the name of its weights in the model."""
        return self.reset_ids.get(weight.split(".")[-2], np.zeros(0, np.int32))

    def factor_of(self, leaf: str) -> float:
        """By what a tensor of an optimizer's state is multiplied."""
        return self.factors.get(leaf.rsplit(".", maxsplit=1)[-1], 1.0)


def take_over(state: dict[str, Any], checkpoint: CheckpointReader, how: TakeOver) -> None:
    """Copy what the checkpoint has into a state.

    Args:
        state: `model`, and `optimizer` where there is one, as `Checkpointer` saves them.
        checkpoint: all of its tensors, by their whole names.
        how: what is left as it is or changed.

    Raises:
        RunError: it does not hold what the model needs; the same on every rank.
    """
    model = state["model"]
    tables = {name: value for name, value in model.items() if isinstance(value, ShardedTensor)}
    saved = [name.removeprefix("model.") for name in checkpoint.shapes if name.startswith("model.")]
    left = [name for name in saved if name not in model]
    if left:  # the class of a model of one's own may have changed
        raise _refusal(checkpoint, f"the model has no {', '.join(left[:4])}")
    if "optimizer" in state:
        _check_column_cuts(tables, checkpoint)
    for name, value in model.items():
        if name in tables:
            _copy_rows(value, f"model.{name}", checkpoint, how, how.reset_of(name))
        else:
            _copy(value, f"model.{name}", checkpoint)
    for param, values in state["optimizer"]["state"].items() if "optimizer" in state else ():
        kind, _, weight = param.partition(".")
        for leaf, value in values.items():
            name = f"optimizer.state.{param}.{leaf}"
            if isinstance(value, ShardedTensor):
                pieces = len(_column_cuts(tables[weight])) if len(value.size()) == 1 else 1
                _copy_rows(value, name, checkpoint, how, how.reset_of(weight), pieces, how.factor_of(leaf))
            elif isinstance(value, Tensor) and (kind == "tables" or how.keeps_dense_state):
                _copy(value, name, checkpoint)
                if (factor := how.factor_of(leaf)) != 1:
                    value.detach().mul_(factor)


def _copy(value: Tensor, name: str, checkpoint: CheckpointReader) -> None:
    found = checkpoint.shapes.get(name)
    if found != value.shape:
        why = f"{name} is {[*value.shape]} in the new run, and there {found and [*found]}"
        if found is not None and len(found) == value.dim() and found[0] < len(value) and found[1:] == value.shape[1:]:
            why += (
                "; where vocabularies grow, tables alone get new rows: a parameter that has numbers for each id needs "
                "a fixed number of ids (hash, in the schema), or a run without `from_run`"
            )
        raise _refusal(checkpoint, why)
    value.detach().copy_(checkpoint.tensor(name))


def _copy_rows(
    value: ShardedTensor,
    name: str,
    checkpoint: CheckpointReader,
    how: TakeOver,
    reset_ids: npt.NDArray[np.int32],
    pieces: int = 1,
    factor: float = 1.0,
) -> None:
    """Copy the rows of this rank's shards that the checkpoint has, but for `reset_ids` [R], and multiply them.

    The tensor is [rows, columns], or [pieces * rows] where each piece of the columns has a value for each row.
    """
    size, found = value.size(), checkpoint.shapes.get(name, ())
    is_smaller = how.may_grow and len(found) == len(size) and found[0] <= size[0] and found[1:] == size[1:]
    if found != size and not is_smaller:
        raise _refusal(checkpoint, f"{name} is {[*size]} in the new run, and there {[*found]}")
    new_rows, old_rows = size[0] // pieces, found[0] // pieces
    for shard in value.local_shards():
        (begin, *columns), (num_rows, *widths) = shard.metadata.shard_offsets, shard.metadata.shard_sizes
        piece, first_row = divmod(begin, new_rows)
        column_ends = [column + width for column, width in zip(columns, widths, strict=True)]
        rows = shard.tensor.detach().view(num_rows, *widths)
        kept = min(first_row + num_rows, old_rows)
        for start in range(first_row, kept, _BLOCK_ROWS):
            end, there = min(start + _BLOCK_ROWS, kept), piece * old_rows
            block = checkpoint.part(name, (there + start, *columns), (there + end, *column_ends))
            target = rows[start - first_row : end - first_row]
            in_block = reset_ids[slice(*np.searchsorted(reset_ids, (start, end)))].astype(np.int64) - start
            reset = torch.from_numpy(in_block).to(target.device)
            initial = target[reset]
            target.copy_(block if factor == 1 else block * factor)
            target[reset] = initial


def _check_column_cuts(tables: Mapping[str, ShardedTensor], checkpoint: CheckpointReader) -> None:
    """Refuse tables whose optimizer has a value for each row of each piece, and that were cut into other pieces.

    All tables are looked at, not only those of this rank: each rank must come to the same end.
    """
    for name, table in tables.items():
        prefix = f"optimizer.state.tables.{name}."
        states = [shape for key, shape in checkpoint.shapes.items() if key.startswith(prefix)]
        if any(len(shape) == 1 for shape in states) and _column_cuts(table) != checkpoint.column_cuts(f"model.{name}"):
            why = (
                f"{name.split('.')[-2]} was cut into other pieces of columns, and the optimizer has values for each "
                "row of each; cut it as the plan.json of its run says (sharding.plan, sharding.constraints)"
            )
            raise _refusal(checkpoint, why)


def _column_cuts(table: ShardedTensor) -> set[tuple[int, int]]:
    """Where the pieces of columns of a table begin, and how wide they are."""
    shards = table.metadata().shards_metadata
    return {(shard.shard_offsets[1], shard.shard_sizes[1]) for shard in shards if all(shard.shard_sizes)}


def _refusal(checkpoint: CheckpointReader, why: str) -> RunError:
    return RunError(f"{checkpoint.path}: cannot be loaded: {why}").everywhere()
