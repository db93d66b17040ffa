"""The DLRM, which knows neither ranks nor files, and the names of its tables."""

from torchdlrm.features.tables import table_name


def table_weight(key: str) -> str:
    """The name in the state dict of the table that a key of the KJT looks into: that of TorchRec."""
    return f"sparse_arch.embedding_bag_collection.embedding_bags.{table_name(key)}.weight"


def projection_weight(key: str) -> str:
    """The name in the state dict of what projects a table of a smaller dimension to D: [D, dim]."""
    return f"sparse_arch.projections.{table_name(key)}.weight"
