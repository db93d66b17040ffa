"""A small one of every built-in architecture, for models whose dimension divides 16."""

from torchdlrm.toml import toml_value

# Settings of `[model]`.
INTERACTIONS = {
    "dot": {},
    "dcn": {"interaction": "dcn", "dcn_num_layers": 2, "dcn_low_rank_dim": 20},
    "gated dcn": {"interaction": "dcn", "dcn_num_layers": 2, "dcn_low_rank_dim": 20, "dcn_gated": True},
    "projection": {
        "interaction": "projection",
        "interaction_branch1_layer_sizes": (40, 48),
        "interaction_branch2_layer_sizes": (32,),
    },
}


def overrides_of(interaction):
    """The same as overrides of a config."""
    settings = INTERACTIONS[interaction].items()
    return {f"model.{name}": value if isinstance(value, str) else toml_value(value) for name, value in settings}
