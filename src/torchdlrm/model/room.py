"""Marks embeddings that have room for one more vector before those of each row, so that nobody needs to copy them.

A mark is an attribute of the tensor: what is computed of it has none.
"""

from torch import Tensor

_MARK = "has_room_for_a_vector"


def mark_room(embeddings: Tensor) -> Tensor:
    """Say that the memory before each row, as much as one embedding takes, belongs to nobody; returns the tensor."""
    setattr(embeddings, _MARK, True)
    return embeddings


def has_room(embeddings: Tensor) -> bool:
    """Whether there is such room."""
    return getattr(embeddings, _MARK, False)
