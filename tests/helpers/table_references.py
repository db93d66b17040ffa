"""Every optimizer of the tables as its paper has it, in float64, on a whole table at a time.

R rows of a table, D its dimension, N ids of a batch.
"""

import torch
from torch import Tensor


class Reference:
    """A table and its optimizer; a step moves the rows that the batch looks up.

    Lazy decay is not computed lazily: every row that some step has looked up decays in every step. What the kernel
    still owes its rows, it has to pay before the two are compared: `owed_R`.
    """

    def __init__(self, weights_RD, name, *, decay=0.0, mode="decoupled", eps=1e-8, beta1=0.9, beta2=0.999):
        self.weights_RD = weights_RD.double().clone()
        self.name, self.decay, self.mode = name, decay, mode
        self.eps, self.beta1, self.beta2 = eps, beta1, beta2
        rows, dim = weights_RD.shape
        self.first_RD = torch.zeros(rows, dim, dtype=torch.float64)
        self.second_RD = torch.zeros(rows, dim, dtype=torch.float64)  # a value a row: the same in all columns
        self.owed_R = torch.ones(rows, dtype=torch.float64)
        self.seen_R = torch.zeros(rows, dtype=torch.bool)
        self.steps = 0

    def step(self, ids_N: Tensor, grads_ND: Tensor, rate: float) -> None:
        """Step on the sum of the gradients of each row."""
        self.steps += 1
        touched_R = torch.zeros(len(self.weights_RD), dtype=torch.bool)
        touched_R[ids_N] = True
        sums_RD = torch.zeros_like(self.weights_RD).index_add(0, ids_N, grads_ND.double())
        if self.mode == "l2":
            sums_RD += self.decay * self.weights_RD
        update_RD = self._update(sums_RD, touched_R)
        decoupled = self.decay if self.mode != "l2" else 0.0
        if self.name.endswith("lamb"):
            update_RD = update_RD + decoupled * self.weights_RD
            ratio_R = self.weights_RD.norm(dim=1) / update_RD.norm(dim=1)
            moved_RD = self.weights_RD - rate * ratio_R[:, None] * update_RD
        else:
            moved_RD = (1 - rate * decoupled) * self.weights_RD - rate * update_RD
        decays = 1 - rate * decoupled if self.mode == "lazy" else 1.0
        resting_RD = torch.where(self.seen_R[:, None], decays * self.weights_RD, self.weights_RD)
        self.owed_R = torch.where(touched_R | ~self.seen_R, 1.0, decays * self.owed_R)
        self.weights_RD = torch.where(touched_R[:, None], moved_RD, resting_RD)
        self.seen_R |= touched_R

    def _update(self, sums_RD: Tensor, touched_R: Tensor) -> Tensor:
        """What the learning rate is multiplied with; moves the state of touched rows."""
        name, squares_RD = self.name, sums_RD**2
        if "rowwise" in name:
            squares_RD = squares_RD.mean(dim=1, keepdim=True).expand_as(squares_RD)
        if name == "sgd":
            return sums_RD
        at_RD = touched_R[:, None].expand_as(sums_RD)
        if name.endswith("adagrad"):
            self.second_RD = torch.where(at_RD, self.second_RD + squares_RD, self.second_RD)
            return sums_RD / (self.second_RD.sqrt() + self.eps)
        beta1, beta2 = self.beta1, self.beta2
        self.first_RD = torch.where(at_RD, beta1 * self.first_RD + (1 - beta1) * sums_RD, self.first_RD)
        self.second_RD = torch.where(at_RD, beta2 * self.second_RD + (1 - beta2) * squares_RD, self.second_RD)
        first_RD = self.first_RD / (1 - beta1**self.steps)
        second_RD = self.second_RD / (1 - beta2**self.steps)
        return first_RD / (second_RD.sqrt() + self.eps)
