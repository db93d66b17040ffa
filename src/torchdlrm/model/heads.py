"""Makes a logit for each of several labels of what the interaction gives: a tower for each, over experts or over all.

One class a kind of `model.heads`, which says what experts and gates stand below the towers; the rest is common.

B rows of the batch on this rank, L labels, K numbers of a row that an expert gives.
"""

from collections.abc import Iterable, Mapping, Sequence
from itertools import repeat
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from torchdlrm.config.model import HeadsConfig
from torchdlrm.model.architecture import Product, layers


class Level(NamedTuple):
    """Experts side by side: which input each reads; and gates, which input each reads and which experts it mixes."""

    reads: Sequence[int]
    gates: Sequence[tuple[int, Sequence[int]]]


class Heads(nn.Module):
    """Towers over what the last level gives, one for each label; without levels, over all that comes in.

    Args:
        in_features: numbers of a row that come in.
        tower_sizes: output sizes of the layers of a tower; the last is 1.
        labels: names of the labels, in the order of the logits.
        config: kind and sizes.
        device: where to create the weights.
    """

    def __init__(
        self,
        in_features: int,
        tower_sizes: Sequence[int],
        labels: Sequence[str],
        config: HeadsConfig,
        device: torch.device | None = None,
    ) -> None:
        from torchrec.models.dlrm import OverArch  # noqa: PLC0415 - a planner can do without TorchRec

        super().__init__()
        self._chain, self.levels = config.chain(labels), nn.ModuleList()
        for level in self.levels_of(len(labels), config):
            self.levels.append(MixedExperts(in_features, config.expert_layer_sizes, level, device))
            in_features = config.expert_layer_sizes[-1]
        self.towers = nn.ModuleList(OverArch(in_features, [*tower_sizes], device=device) for _ in labels)

    @staticmethod
    def levels_of(num_labels: int, config: HeadsConfig) -> list[Level]:
        """The levels below the towers: the first has one input, the others the outputs of that before them."""
        del num_labels, config
        return []

    @classmethod
    def products(
        cls, in_features: int, tower_sizes: Sequence[int], num_labels: int, config: HeadsConfig
    ) -> list[Product]:
        """The matrix products of a row."""
        found, sizes = list[Product](), config.expert_layer_sizes
        for level in cls.levels_of(num_labels, config):
            found += layers(in_features, sizes) * len(level.reads)
            for _, experts in level.gates:
                found += [Product(1, in_features, len(experts)), Product(1, len(experts), sizes[-1], has_weight=False)]
            in_features = sizes[-1]
        return found + layers(in_features, tower_sizes) * num_labels

    def forward(self, inputs: Tensor) -> Tensor:
        """Maps [B, in_features] to logits [B, L] of the labels over all rows."""
        return logits_of_heads(inputs, self.levels, self.towers, self._chain)


class SharedBottom(Heads):
    """Everything below the towers is shared by all labels."""


class MMoE(Heads):
    """Each tower reads a mixture of all experts, by a softmax gate of its own (Ma et al., KDD 2018)."""

    @staticmethod
    def levels_of(num_labels: int, config: HeadsConfig) -> list[Level]:
        """One level, in which each gate mixes all experts."""
        return [Level([0] * config.num_experts, [(0, range(config.num_experts))] * num_labels)]


class PLE(Heads):
    """Experts of each label and shared ones, in two levels (progressive layered extraction, Tang et al., RecSys 2020).

    A label's gate mixes its own experts and the shared ones; that of the shared ones, in the first level, all.
    """

    @staticmethod
    def levels_of(num_labels: int, config: HeadsConfig) -> list[Level]:
        """Two levels; the second has the inputs of the labels, then that of the shared experts."""
        own, shared = config.num_experts, config.num_shared_experts
        reads = [label for label in range(num_labels) for _ in range(own)] + [num_labels] * shared
        mixed = [[at for at, of in enumerate(reads) if of in {label, num_labels}] for label in range(num_labels)]
        first = Level([0] * len(reads), [(0, experts) for experts in [*mixed, range(len(reads))]])
        return [first, Level(reads, [*enumerate(mixed)])]


HEADS: Mapping[str, type[Heads]] = {"shared": SharedBottom, "mmoe": MMoE, "ple": PLE}


class MixedExperts(nn.Module):
    """A level: experts of layers with ReLU, whose last gives K numbers, and mixtures by softmax gates without bias."""

    def __init__(
        self, in_features: int, layer_sizes: Sequence[int], level: Level, device: torch.device | None = None
    ) -> None:
        from torchrec.models.dlrm import DenseArch  # noqa: PLC0415 - as above

        super().__init__()
        self._level = level
        self.experts = nn.ModuleList(DenseArch(in_features, [*layer_sizes], device=device) for _ in level.reads)
        sizes = [len(experts) for _, experts in level.gates]
        self.gates = nn.ModuleList(nn.Linear(in_features, size, bias=False, device=device) for size in sizes)

    def forward(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        """Maps inputs of [B, in_features] to as many of [B, K] as there are gates."""
        return mixtures(self._level, self.experts, self.gates, inputs)


def mixtures(level: Level, experts: Iterable[Any], gates: Iterable[Any], inputs: Sequence[Tensor]) -> list[Tensor]:
    """What the gates of a level make of inputs of [B, in_features]: [B, K] each; trained or served."""
    made = [expert(inputs[of]) for expert, of in zip(experts, level.reads, strict=True)]
    found = []
    for gate, (of, mixed) in zip(gates, level.gates, strict=True):
        given = gate(inputs[of])
        shares_B1E = torch.softmax(given, dim=1, dtype=torch.promote_types(given.dtype, torch.float32)).unsqueeze(1)
        experts_BEK = torch.stack([made[expert] for expert in mixed], dim=1)
        found.append(torch.bmm(shares_B1E.to(experts_BEK.dtype), experts_BEK).squeeze(1))
    return found


def logits_of_heads(
    inputs: Tensor, levels: Iterable[Any], towers: Iterable[Any], chain: Sequence[tuple[int, int]]
) -> Tensor:
    """What towers, a label each, over levels of mixtures make of [B, in_features]: [B, L]; trained or served."""
    mixed = [inputs]
    for level in levels:
        mixed = level(mixed)
    logits = [tower(below) for tower, below in zip(towers, mixed if len(mixed) > 1 else repeat(inputs), strict=False)]
    for label, before in chain:
        logits[label] = logit_of_product(logits[before].float(), logits[label].float())
    return torch.cat(logits, dim=1)


def logit_of_product(first: Tensor, second: Tensor) -> Tensor:
    """The logit of p q, of the logits of p and q: 1 / (p q) = (1 + exp(-a)) (1 + exp(-b)); nothing overflows."""
    return -torch.logsumexp(torch.stack([-first, -second, -first - second]), dim=0)
