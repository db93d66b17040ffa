"""Defines the settings of the model: its shape, how its vectors interact, and which tables are smaller.

An interaction with settings of its own has a section for them, by the name that `model.interaction` has for it; its
other half is an `Architecture` of `torchdlrm.model.architecture`.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any, Literal, Self

from pydantic import Field, SerializerFunctionWrapHandler, model_serializer

from torchdlrm.config.types import PositiveInt, Section, changed_settings

InteractionName = Literal["dot", "dcn", "projection"]
# Of a model class: what TOML and JSON have in common.
Setting = bool | int | float | str | Annotated[tuple[int | float | str, ...], Field(strict=False)]
LayerSizes = Annotated[tuple[PositiveInt, ...], Field(strict=False, min_length=1)]


class InteractionConfig(Section):
    """The settings of an interaction."""

    @property
    def layer_sizes(self) -> tuple[int, ...]:
        """Numbers of a row behind each of its layers."""
        return ()

    def problems(self, embedding_dim: int) -> Iterator[str]:
        """Settings that it lacks or cannot be built with, each with what is wrong."""
        del embedding_dim
        yield from ()


class DCNConfig(InteractionConfig):
    """The cross net of DCN v2, where model.interaction = "dcn"."""

    num_layers: Annotated[int, Field(ge=1, le=100)] = Field(3, description="layers of the cross net")
    low_rank_dim: PositiveInt = Field(512, description="rank of the cross net's weights")
    gated: bool = Field(default=False, description="multiply each cross layer by a gate of its own, as GDCN")

    @property
    def layer_sizes(self) -> tuple[int, ...]:
        """The rank: behind V of each layer."""
        return (self.low_rank_dim,)


class ProjectionConfig(InteractionConfig):
    """The two branches, where model.interaction = "projection", which needs both settings."""

    branch1_layer_sizes: LayerSizes | None = Field(
        None, description="output sizes of the first branch; the last is a multiple of D"
    )
    branch2_layer_sizes: LayerSizes | None = Field(
        None, description="output sizes of the second branch; the last is a multiple of D"
    )

    @property
    def branches(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The output sizes of both."""
        return self.branch1_layer_sizes or (), self.branch2_layer_sizes or ()

    @property
    def layer_sizes(self) -> tuple[int, ...]:
        """Those of both branches."""
        return sum(self.branches, ())

    def problems(self, embedding_dim: int) -> Iterator[str]:
        """A branch that is not set, or does not end with a multiple of D."""
        for name, sizes in zip(type(self).model_fields, self.branches, strict=True):
            if not sizes:
                yield f"{name}: model.interaction = projection needs it; it is not set"
            elif sizes[-1] % embedding_dim:
                yield f"{name}: must end with a multiple of model.embedding_dim = {embedding_dim}, got {sizes[-1]}"


# What settings of interactions were called before each had a section. Files that are written by programs keep these
# names, so that older versions read them: bundles.
FLAT_NAMES: Mapping[str, tuple[str, str]] = {
    "dcn_num_layers": ("dcn", "num_layers"),
    "dcn_low_rank_dim": ("dcn", "low_rank_dim"),
    "dcn_gated": ("dcn", "gated"),
    "interaction_branch1_layer_sizes": ("projection", "branch1_layer_sizes"),
    "interaction_branch2_layer_sizes": ("projection", "branch2_layer_sizes"),
}


def in_sections(model: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a model by today's names; some may have their earlier ones."""
    found = {name: value for name, value in model.items() if name not in FLAT_NAMES}
    for name in model.keys() & FLAT_NAMES.keys():
        section, leaf = FLAT_NAMES[name]
        before = found.get(section)
        found[section] = {**(before if isinstance(before, dict) else {}), leaf: model[name]}
    return found


def in_one_list(model: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a model as they were named when none had a section; the opposite of `in_sections`."""
    flat, found = {place: name for name, place in FLAT_NAMES.items()}, dict[str, Any]()
    for name, value in model.items():
        is_section = any(section == name for section, _ in flat)
        found |= {flat[name, leaf]: part for leaf, part in value.items()} if is_section else {name: value}
    return found


class HeadsConfig(Section):
    """What makes a logit for each of several train.labels of what the interaction gives, as [model.heads]."""

    kind: Literal["shared", "mmoe", "ple"] = Field(
        "shared",
        description="shared: an over arch for each label, a tower, and all else is shared; mmoe: each tower reads a "
        "mixture of experts, by a gate of its own (MMoE, KDD 2018); ple: experts of each label and shared ones, in two "
        "levels (PLE, RecSys 2020)",
    )
    num_experts: PositiveInt = Field(4, description="experts of mmoe; of ple those of each label, in each level")
    num_shared_experts: PositiveInt = Field(4, description="experts of ple that all labels share, in each level")
    expert_layer_sizes: LayerSizes = Field((256, 128), description="output sizes of the layers of an expert")
    after: dict[str, str] = Field(
        {},
        description='labels that another one comes before, as in {purchase = "click"}: its probability, over all '
        "rows, is that of the other times what its own tower gives (ESMM, arXiv:1804.07931)",
    )

    def chain(self, labels: Sequence[str]) -> list[tuple[int, int]]:
        """The labels of `after` and which comes before them, by number, each behind what it needs itself."""
        left, found = dict(self.after), list[tuple[int, int]]()
        while ready := [name for name, before in left.items() if before not in left]:
            found += [(labels.index(name), labels.index(left.pop(name))) for name in ready]
        return found

    def problems(self, labels: Sequence[str]) -> Iterator[str]:
        """Settings that are for other labels, or that are not read, each with what is wrong."""
        if len(labels) < 2:
            if self != HeadsConfig():
                yield f"heads: is for several train.labels, got {self.model_dump(exclude_defaults=True)} with one"
            return
        unread = {"shared": _OF_EXPERTS, "mmoe": _OF_EXPERTS[:1]}.get(self.kind, ())
        for leaf, value in changed_settings(self):
            if leaf in unread:
                yield f"heads.{leaf}: model.heads.kind = {self.kind} does not read it, got {value!r}"
        if unknown := {*self.after, *self.after.values()}.difference(labels):
            yield f"heads.after: {', '.join(sorted(unknown))} is not in train.labels, which are {', '.join(labels)}"
        elif len(self.chain(labels)) < len(self.after):
            yield f"heads.after: goes in a circle, got {self.after}"


_OF_EXPERTS = ("num_shared_experts", "num_experts", "expert_layer_sizes")
_OF_ATTENTION = ("target", "attention", "attention_layer_sizes")


class FeatureConfig(Section):
    """What is different for one sparse feature, its table or its pooling, as [model.features.cat_2]."""

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
        4, description="by how much quotient_remainder divides the rows: this many ids have the same quotient"
    )
    pooling: Literal["sum", "mean", "last", "attention"] = Field(
        "sum",
        description="what several values of a row become: the sum or the mean of their embeddings, that of the last "
        "value alone, or their sum weighted by attention on target (docs/behaviour.md)",
    )
    target: str | None = Field(
        None, description="for attention: the sparse feature, of one value a row, that values are weighted for"
    )
    attention: Literal["din", "dot"] = Field(
        "din",
        description="how attention weighs a value; din: by a network of it and the target (DIN); dot: by a scaled dot "
        "product with the target and its position, with a softmax",
    )
    attention_layer_sizes: LayerSizes = Field((32, 16), description="output sizes of the hidden layers of din")

    @model_serializer(mode="wrap")
    def _without_what_nothing_reads(self, write: SerializerFunctionWrapHandler) -> dict[str, Any]:
        unread = {"sum": {"pooling", *_OF_ATTENTION}, "attention": set()}.get(self.pooling, {*_OF_ATTENTION})
        return {name: value for name, value in write(self).items() if name not in unread}


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
    dcn: DCNConfig = DCNConfig()
    projection: ProjectionConfig = ProjectionConfig()
    heads: HeadsConfig = HeadsConfig()
    features: dict[str, FeatureConfig] = Field({}, description="smaller tables, and pooling, by feature")
    settings: dict[str, Setting] = Field(
        {},
        description="of a model class, by the names in its `settings` (docs/models.md)",
    )

    def __hash__(self) -> int:
        return hash(self.model_dump_json())

    @property
    def interaction_config(self) -> InteractionConfig:
        """The settings that the interaction reads."""
        return self._interactions.get(self.interaction, InteractionConfig())

    @property
    def _interactions(self) -> dict[str, InteractionConfig]:
        return {name: value for name, value in self if isinstance(value, InteractionConfig)}

    @property
    def interaction_text(self) -> str:
        """The interaction with its settings, as people read it; switches that are off are left out."""
        words = [
            name if value is True else f"{name} {value}"
            for name, value in self.interaction_config
            if value is not False
        ]
        return f"{self.interaction} ({', '.join(words)})" if words else self.interaction

    @model_serializer(mode="wrap")
    def _without_what_nothing_reads(self, write: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """So that a config says what its model is, and no more; older programs read it where it is no news to them."""
        unread = {name for name in self._interactions if name != self.interaction}
        unread |= {name for name in ("features", "settings") if not getattr(self, name)}
        unread |= set() if self.table_init_scale != 1 else {"table_init_scale"}
        unread |= set() if self.heads != HeadsConfig() else {"heads"}
        return {name: value for name, value in write(self).items() if name not in unread}

    def interaction_problems(self) -> Iterator[str]:
        """Settings that the interaction does not read, lacks, or cannot be built with."""
        for name, section in self._interactions.items():
            if name == self.interaction:
                yield from (f"model.{name}.{problem}" for problem in section.problems(self.embedding_dim))
                continue
            for leaf, value in changed_settings(section):
                only = f"only model.interaction = {name} reads it"
                yield f"model.{name}.{leaf}: {only}, got {value!r} with {self.interaction}"

    def with_features(self, features: dict[str, FeatureConfig]) -> Self:
        """The same with other smaller tables."""
        return self.model_copy(update={"features": features})

    @property
    def as_served(self) -> Self:
        """The same without what is read in training alone."""
        return self.model_copy(update={"table_init_scale": 1.0})

    def feature_problems(self) -> Iterator[str]:
        """What is wrong with the settings of features, whatever the dataset."""
        for name, feature in self.features.items():
            key, dim = f"model.features.{name}", feature.embedding_dim
            if dim is not None and (dim % 4 or dim > self.embedding_dim):
                yield (
                    f"{key}.embedding_dim: must be a multiple of 4 and at most model.embedding_dim = "
                    f"{self.embedding_dim}, got {dim}"
                )
            if feature.quotient_remainder is None and feature.num_collisions != 4:
                yield f"{key}.num_collisions: only quotient_remainder reads it; set {key}.quotient_remainder too"
            if dim not in {None, self.embedding_dim} and feature.quotient_remainder is not None:
                yield f"{key}.embedding_dim: tables of quotient_remainder have model.embedding_dim; set one of both"
            if feature.pooling == "attention" and feature.target is None:
                yield f"{key}.target: pooling = attention needs it: the feature that values are weighted for"
            if feature.pooling != "attention":
                for leaf, _ in changed_settings(feature):
                    if leaf in _OF_ATTENTION:
                        yield f"{key}.{leaf}: only pooling = attention reads it; leave it out, or set {key}.pooling"
