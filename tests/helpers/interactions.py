"""A small one of every built-in architecture, for models whose dimension divides 16."""

from torchdlrm.config import DCNConfig, ProjectionConfig
from torchdlrm.toml import toml_value

# Settings of `[model]`.
INTERACTIONS = {
    "dot": {},
    "dcn": {"interaction": "dcn", "dcn": DCNConfig(num_layers=2, low_rank_dim=20)},
    "gated dcn": {"interaction": "dcn", "dcn": DCNConfig(num_layers=2, low_rank_dim=20, gated=True)},
    "projection": {
        "interaction": "projection",
        "projection": ProjectionConfig(branch1_layer_sizes=(40, 48), branch2_layer_sizes=(32,)),
    },
}


def overrides_of(interaction):
    """The same as overrides of a config."""
    settings = INTERACTIONS[interaction]
    name = settings.get("interaction", "dot")
    return {"model.interaction": name} | {
        f"model.{name}.{leaf}": toml_value(value) for leaf, value in settings.get(name, ())
    }
