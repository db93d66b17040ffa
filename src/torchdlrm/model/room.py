"""Puts all vectors of a row into one buffer, without a copy where the look-up has left room for the dense one.

The mark is on the memory and not on a tensor, so it stays behind when a tensor is copied, pickled or scripted. The
first that asks for the room gets it; code that reads the embeddings notices nothing.
Why: docs/decisions/embeddings-leave-room-for-the-dense-vector.md.

B rows of the batch, F sparse features, D embedding dimension, N = F + 1 vectors.
"""

from torch import Tensor

_MARK = "room_for_a_vector_of"


def with_room(embeddings: Tensor, dim: int) -> Tensor:
    """The tensor, once its memory says that before each row there is room for a vector of `dim` numbers.

    To autograd it is no view of the memory with the room, so what is written there does not change it.
    """
    setattr(embeddings.untyped_storage(), _MARK, dim)
    return embeddings.data


def together(dense_BD: Tensor, sparse_BFD: Tensor) -> tuple[Tensor, bool]:
    """All vectors [B, N, D] in the dense one's precision, and whether the memory is that of the embeddings.

    Without room, or in another precision, they are copied, and cast meanwhile.
    """
    num_rows, num_features, dim = sparse_BFD.shape
    shape, strides = (num_rows, num_features + 1, dim), ((num_features + 1) * dim, dim, 1)
    memory = sparse_BFD.untyped_storage()
    is_shared = getattr(memory, _MARK, 0) == dim and sparse_BFD.stride() == strides
    if is_shared and sparse_BFD.dtype == dense_BD.dtype:
        setattr(memory, _MARK, 0)  # there may be another interaction, of another dense vector
        vectors_BND = sparse_BFD.data.as_strided(shape, strides, sparse_BFD.storage_offset() - dim)
    else:
        is_shared, vectors_BND = False, dense_BD.new_empty(shape)
        vectors_BND[:, 1:] = sparse_BFD
    vectors_BND[:, 0] = dense_BD
    return vectors_BND, is_shared
