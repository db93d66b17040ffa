"""Makes vectors of dimension D of the rows of tables that are smaller, or of two; in training and as served alike.

B rows of the batch, D embedding dimension.
"""

from collections.abc import Callable, Mapping, Sequence

from torch import Tensor, nn

from torchdlrm.features.tables import FeatureTable


def projection(table: FeatureTable) -> nn.Linear:
    """What maps rows of a smaller table to D, without bias.

    Its weights have the variance 1 / dim, so that a vector starts with the scale of an ordinary row, whatever its
    table's dimension: Xavier's would make that of a table of 8 a third as long at D = 128.
    """
    layer = nn.Linear(table.dim, table.vector_dim, bias=False)
    bound = (3 / table.dim) ** 0.5
    nn.init.uniform_(layer.weight, -bound, bound)
    return layer


def feature_vectors(
    tables: Sequence[FeatureTable],
    embeddings: Mapping[str, Tensor],
    projections: Mapping[str, Callable[[Tensor], Tensor]] | nn.ModuleDict,
) -> list[Tensor]:
    """The vector of each feature: F of [B, D].

    Args:
        tables: of all features; a remainder's follows that of its quotient.
        embeddings: the pooled rows of each, by key: [B, dim].
        projections: what maps those of smaller tables to D, by the name of the table: a mapping of functions.
    """
    vectors: list[Tensor] = []
    for table in tables:
        vector = embeddings[table.key]
        if table.is_remainder:
            quotient = vectors.pop()
            vector = quotient * vector if table.combination == "mult" else quotient + vector
        elif table.dim < table.vector_dim:
            vector = projections[table.name](vector)
        vectors.append(vector)
    return vectors
