"""The DLRM, which knows neither ranks nor files, and the names of its tables."""


def table_name(feature: str) -> str:
    """The name of a feature's table."""
    return f"t_{feature}"


def table_weight(feature: str) -> str:
    """The name of a feature's table in the state dict: that of TorchRec."""
    return f"sparse_arch.embedding_bag_collection.embedding_bags.{table_name(feature)}.weight"
