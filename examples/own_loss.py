"""A loss of your own: cross-entropy, and how many pairs of the global batch are in the wrong order.

    dlrm train criteo-small --dataset DATASET --run RUN --model-class examples/own_loss.py:RankedDLRM
    python examples/own_loss.py DATASET RUN

B rows of the batch on this process.
"""

import sys

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits

from torchdlrm import DLRM, evaluate, global_mean, load_config, train


class RankedDLRM(DLRM):
    """The mean of (1 - p_i + p_j)^2 over all pairs of a clicked row i and another one j is added to the loss.

    It is made of means over the global batch (Ying, Wen and Lyu, NIPS 2016), so that processes can share the rows.
    """

    def loss(self, outputs: Tensor, labels: Tensor, weights: Tensor) -> Tensor:
        """Map logits [B, 1], labels [B] and row weights [B] to the loss of each row [B], which gets its weight."""
        predicted, means, variances = torch.sigmoid(outputs.squeeze(1)), [], []
        for of_class in (weights * labels, weights * (1 - labels)):
            share = global_mean(of_class).clamp(min=1e-6)
            mean = global_mean(of_class * predicted) / share
            variances.append(global_mean(of_class * (predicted - mean).square()) / share)
            means.append(mean)
        pairs = (1 - means[0] + means[1]).square() + variances[0] + variances[1]
        return binary_cross_entropy_with_logits(outputs.squeeze(1), labels, reduction="none") + 0.5 * pairs


if __name__ == "__main__":
    dataset, run = sys.argv[1:]
    train(load_config("criteo-small"), dataset, run, model_class=RankedDLRM)
    print(evaluate(run, model_class=RankedDLRM))
