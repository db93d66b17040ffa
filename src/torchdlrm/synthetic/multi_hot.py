"""Gives values of a synthetic log companions, so that cells hold as many values as in MLPerf's DLRM-DCNv2 benchmark.

In: the ranks of the values that a plain log has.  Out: the ranks of their companions, and the schema of such a log.

As in the benchmark (mlcommons/training, `multi_hot.py` of torchrec_dlrm), the companions of a value are a function of
the value, fixed for the whole log: they add nothing to what a row tells. There they are drawn once, into tables of 22
GiB; here they are hashed, which takes no memory. Companions are `uniform` over the values of their column, the harder
case for caches, or follow a power law (`pareto`, a = 0.25), of which the remainder by the number of values is taken.

B rows, K values in a cell.
"""

from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray

from torchdlrm.features.columns import SparseColumn
from torchdlrm.features.schema import criteo_schema
from torchdlrm.synthetic.shapes import MULTI_HOT_SIZES, LogShape
from torchdlrm.toml import toml_value

Companions = Literal["uniform", "pareto"]
COMPANIONS: tuple[Companions, ...] = get_args(Companions)
VALUE_SEPARATOR = ","

_LARGEST = 2.0**53  # of a draw of the power law: one in ten thousand is larger, and has this as its rank


def draw_companions(
    ranks_B: NDArray[np.uint32], keys: NDArray[np.uint32], cardinality: int, companions: Companions
) -> NDArray[np.uint64]:
    """The ranks of the companions of some values: uint64 [K - 1, B].

    All arithmetic is on integers, or rounded as IEEE 754 has it: the same ranks on every machine.

    Args:
        ranks_B: of the values.
        keys: random numbers, one for each companion, [K - 1].
        cardinality: values of the column.
        companions: how they are distributed.
    """
    drawn = scatter(ranks_B ^ keys[:, None])
    if companions == "uniform":
        found = drawn.astype(np.uint64)
        found *= np.uint64(cardinality)
        found >>= np.uint64(32)
        return found
    u = (drawn + 1.0) / 2.0**32
    u *= u
    x = np.floor(1.0 / (u * u)) - 1.0  # 1 / u^4 - 1, the inverse of the distribution
    return np.minimum(x, _LARGEST).astype(np.uint64) % np.uint64(cardinality)


def scatter(numbers: NDArray[np.uint32]) -> NDArray[np.uint32]:
    """A bijection of 32-bit numbers that leaves no order to see (the finaliser of MurmurHash3); overwrites them."""
    numbers ^= numbers >> 16
    numbers *= np.uint32(0x85EBCA6B)
    numbers ^= numbers >> 13
    numbers *= np.uint32(0xC2B2AE35)
    numbers ^= numbers >> 16
    return numbers


def multi_hot_schema(shape: LogShape, max_embeddings: int | None) -> str:
    """The schema of a log with companions, as a TOML file.

    Its features are hashed: then tables have the size that is asked for however short the log is, and no values are
    counted, most of which would be seen once.

    Args:
        shape: of the log.
        max_embeddings: rows of the largest tables; None: as many as the log's columns have values.
    """
    lines = ['name = "criteo-multi-hot"', "columns = ["]
    sizes = iter(zip(shape.sparse, MULTI_HOT_SIZES, strict=True))
    for column in criteo_schema().columns:
        keys: dict[str, object] = {"role": column.role, "name": column.name}
        if not isinstance(column, SparseColumn):
            keys |= column.model_dump(mode="json", include={"kind"})
        else:
            values, size = next(sizes)
            keys |= {"kind": column.kind, "hash": min(values.cardinality, max_embeddings or values.cardinality)}
            keys |= {"value_separator": VALUE_SEPARATOR, "max_values": size} if size > 1 else {}
        lines.append(f"    {{ {', '.join(f'{key} = {toml_value(value)}' for key, value in keys.items())} }},")
    return "\n".join([*lines, "]", ""])
