"""Defines the settings of the model: its shape, how its vectors interact, and which tables are smaller."""

from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import Field, SerializerFunctionWrapHandler, model_serializer

from torchdlrm.config.types import PositiveInt, Section

InteractionName = Literal["dot", "dcn", "projection"]
# What each kind of interaction reads, besides what all models have.
INTERACTION_SETTINGS: Mapping[InteractionName, tuple[str, ...]] = {
    "dot": (),
    "dcn": ("dcn_num_layers", "dcn_low_rank_dim", "dcn_gated"),
    "projection": ("interaction_branch1_layer_sizes", "interaction_branch2_layer_sizes"),
}


class FeatureConfig(Section):
    """The table of one sparse feature, where it is not of dimension D or is in two parts, as [model.features.cat_2]."""

    embedding_dim: PositiveInt | None = Field(
        None,
        description="dimension of the feature's table, a multiple of 4 and at most D: rows are projected to D by a "
        "matrix of its own; D when not set",
    )
    quotient_remainder: Literal["mult", "add"] | None = Field(
        None,
        description="keep two small tables in place of one, of the quotients and of the remainders of ids by "
        "num_collisions, and multiply (mult, where cells have one value) or add their rows; one table when not set",
    )
    num_collisions: Annotated[int, Field(ge=2)] = Field(
        4, description="by how much quotient_remainder divides the rows: so many ids have the same quotient"
    )


class ModelConfig(Section):
    """The DLRM's shape; the defaults are the paper's Criteo model."""

    embedding_dim: PositiveInt = Field(128, description="dimension D of every table; a multiple of 4")
    dense_arch_layer_sizes: tuple[PositiveInt, ...] = Field(
        (512, 256, 128), strict=False, min_length=1, description="output sizes of the dense arch; the last is D"
    )
    over_arch_layer_sizes: tuple[PositiveInt, ...] = Field(
        (1024, 512, 256, 1), strict=False, min_length=2, description="output sizes of the over arch; the last is 1"
    )
    table_init_scale: Annotated[float, Field(gt=0, le=1000, allow_inf_nan=False)] = Field(
        1.0,
        description="initial rows of a table of n rows are drawn evenly between -table_init_scale / sqrt(n) and "
        "table_init_scale / sqrt(n); 1 suits dot products, sums of the vectors' own numbers want less (docs/models.md)",
    )
    interaction: InteractionName = Field(
        "dot",
        description="what happens between embeddings and over arch; dot: dot products of all pairs of vectors; dcn: a "
        "low-rank cross net (DCN v2); projection: products of what two branches make of all vectors",
    )
    dcn_num_layers: Annotated[int, Field(ge=1, le=100)] = Field(3, description="layers of the cross net (dcn)")
    dcn_low_rank_dim: PositiveInt = Field(512, description="rank of the cross net's weights (dcn)")
    dcn_gated: bool = Field(default=False, description="multiply each cross layer by a gate of its own, as GDCN (dcn)")
    interaction_branch1_layer_sizes: tuple[PositiveInt, ...] | None = Field(
        None,
        strict=False,
        min_length=1,
        description="output sizes of the first branch; the last is a multiple of D (projection)",
    )
    interaction_branch2_layer_sizes: tuple[PositiveInt, ...] | None = Field(
        None,
        strict=False,
        min_length=1,
        description="output sizes of the second branch; the last is a multiple of D (projection)",
    )
    features: dict[str, FeatureConfig] = Field({}, description="smaller tables, by feature")

    def __hash__(self) -> int:
        return hash(self.model_dump_json())

    @property
    def interaction_settings(self) -> dict[str, Any]:
        """The settings that the interaction reads, by name."""
        return {name: getattr(self, name) for name in INTERACTION_SETTINGS[self.interaction]}

    @property
    def interaction_text(self) -> str:
        """The interaction with its settings, as people read it; switches that are off are left out."""
        settings = self.interaction_settings.items()
        words = [name if value is True else f"{name} {value}" for name, value in settings if value is not False]
        return f"{self.interaction} ({', '.join(words)})" if words else self.interaction

    @model_serializer(mode="wrap")
    def _without_what_nothing_reads(self, write: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """So that a config says what its model is, and no more; older programs read it where it is no news to them."""
        unread = {name for names in INTERACTION_SETTINGS.values() for name in names} - {*self.interaction_settings}
        unread |= set() if self.features else {"features"}
        unread |= set() if self.table_init_scale != 1 else {"table_init_scale"}
        return {name: value for name, value in write(self).items() if name not in unread}

    def interaction_problems(self) -> list[str]:
        """Settings that the interaction does not read, lacks, or cannot be built with."""
        found = []
        for name, readers in ((name, kind) for kind, names in INTERACTION_SETTINGS.items() for name in names):
            value, default = getattr(self, name), type(self).model_fields[name].default
            if readers != self.interaction and value != default:
                found.append(
                    f"model.{name}: only model.interaction = {readers} reads it, got {value!r} with {self.interaction}"
                )
            elif readers == self.interaction and value is None:
                found.append(f"model.{name}: model.interaction = {self.interaction} needs it; it is not set")
            elif readers == self.interaction == "projection" and value[-1] % self.embedding_dim:
                found.append(
                    f"model.{name}: must end with a multiple of model.embedding_dim = {self.embedding_dim}, got "
                    f"{value[-1]}"
                )
        return found

    def with_features(self, features: dict[str, FeatureConfig]) -> Self:
        """The same with other smaller tables."""
        return self.model_copy(update={"features": features})

    @property
    def as_served(self) -> Self:
        """The same without what is read in training alone."""
        return self.model_copy(update={"table_init_scale": 1.0})

    def feature_problems(self) -> list[str]:
        """What is wrong with smaller tables, whatever the dataset."""
        found = []
        for name, feature in self.features.items():
            key, dim = f"model.features.{name}", feature.embedding_dim
            if dim is not None and (dim % 4 or dim > self.embedding_dim):
                found.append(
                    f"{key}.embedding_dim: must be a multiple of 4 and at most model.embedding_dim = "
                    f"{self.embedding_dim}, got {dim}"
                )
            if feature.quotient_remainder is None and feature.num_collisions != 4:
                found.append(
                    f"{key}.num_collisions: only quotient_remainder reads it; set {key}.quotient_remainder too"
                )
            if dim not in {None, self.embedding_dim} and feature.quotient_remainder is not None:
                found.append(
                    f"{key}.embedding_dim: tables of quotient_remainder have model.embedding_dim; set one of both"
                )
        return found
