"""Which cells of the square of dot products feed the over arch, and in which order.

Each pair of the N vectors stands twice in the square, and the over arch wants it once.  In float32 the upper triangle
is picked, as in training.  Picking single bfloat16 numbers is slow (torch copies 2-byte numbers one by one: 0.44 ms for
512 rows, longer than the products), picking 4 bytes is not (0.05 ms).  So two neighbours are picked at a time, from a
square whose rows have an even length; the few cells that come along without being wanted (a vector with itself, or with
the zero vector that makes N even) get the weight 0 in the over arch's first layer.  The sums are of the same products.

B rows, D embedding dimension, N vectors that interact, M the same rounded up to even, W words of two numbers.
"""

import torch
from torch import Tensor


class PairLayout:
    """Picks the pairs out of a square, and lays the over arch's first weight out alike.

    Args:
        num_vectors: N.
        dtype: of the square.
    """

    def __init__(self, num_vectors: int, dtype: torch.dtype) -> None:
        first_P, second_P = torch.triu_indices(num_vectors, num_vectors, offset=1)
        self._is_paired = dtype == torch.bfloat16
        self.num_slots = num_vectors + (num_vectors % 2 if self._is_paired else 0)
        cells_P = first_P * self.num_slots + second_P
        if self._is_paired:
            self._picked = (cells_P // 2).unique()  # W words, sorted
            position = torch.searchsorted(self._picked, cells_P // 2) * 2 + cells_P % 2
            self.num_columns = 2 * len(self._picked)
        else:
            self._picked, position, self.num_columns = cells_P, torch.arange(len(cells_P)), len(cells_P)
        self._position_P = position

    def pick(self, square_BMM: Tensor, out: Tensor) -> None:
        """Copy the cells of each row's square to `out` [B, num_columns], which may be part of a wider tensor."""
        flat = square_BMM.flatten(1)
        if self._is_paired:
            torch.index_select(flat.view(torch.float32), 1, self._picked, out=out.view(torch.float32))
        else:
            torch.index_select(flat, 1, self._picked, out=out)

    def spread(self, weight: Tensor, dim: int) -> Tensor:
        """The over arch's first weight for inputs in this layout.

        Args:
            weight: [O, D + P], P the pairs in the order of the upper triangle.
            dim: D.

        Returns:
            [O, D + num_columns].
        """
        spread = weight.new_zeros(len(weight), dim + self.num_columns)
        spread[:, :dim] = weight[:, :dim]
        spread[:, dim + self._position_P] = weight[:, dim:]
        return spread
