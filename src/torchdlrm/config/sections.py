"""Defines every setting of a run: type, default, unit and meaning.

docs/configuration.md is generated from it.
"""

from collections.abc import Iterator
from typing import Annotated, Literal, get_args

from pydantic import BaseModel, Field
from pydantic.fields import FieldInfo

from torchdlrm.config.model import ModelConfig
from torchdlrm.config.optimizers import (
    DENSE_OPTIMIZERS,
    TABLE_OPTIMIZERS,
    DenseOptimizerName,
    TableOptimizer,
    TableOptimizerName,
    WeightDecayModeName,
)
from torchdlrm.config.types import Fraction, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, Section
from torchdlrm.units import Size

DeviceChoice = Literal["auto", "cuda", "cpu"]


class TrainConfig(Section):
    """How much to train, in what steps."""

    batch_size_global: PositiveInt = Field(2048, description="rows per step over all ranks")
    epochs: PositiveInt = Field(1, description="passes over the training split")
    fresh_tables: bool | None = Field(
        None,
        description="begin each epoch after the first with tables as a new run has them, while the dense parts keep "
        "what they have learnt (arXiv:2305.19531): rows seen again are not known by heart; no when not set",
    )
    max_steps: PositiveInt | None = Field(None, description="stop after this many steps, regardless of epochs")
    device: DeviceChoice = Field(
        "auto",
        description="where to compute: cuda demands a GPU for each process of a host, cpu uses none; auto is cpu in "
        "the CPU set-up or where CUDA_VISIBLE_DEVICES is empty, and else demands GPUs that FBGEMM has kernels for",
    )
    precision: Literal["auto", "float32", "bfloat16"] = Field(
        "auto", description="precision of the dense parts' matrix products; auto asks the device; weights stay float32"
    )
    tf32: bool = Field(default=True, description="compute float32 products in TF32 on GPUs; has no effect on CPU")
    communication: Literal["auto", "float32", "float16"] = Field(
        "auto",
        description="precision of embeddings sent between ranks; with float16, gradients are sent as bfloat16 on GPUs; "
        "auto is float16 on GPUs, and on CPU the precision that the dense parts compute in",
    )
    dropout: Annotated[float, Field(ge=0, lt=1, allow_inf_nan=False)] = Field(
        0.0, description="fraction of the hidden units of dense and over arch that are zeroed for each training row"
    )
    label: str | None = Field(
        None,
        description="which of the dataset's labels to learn and be judged by; when not set, the first of its schema",
    )
    labels: Annotated[tuple[str, ...], Field(strict=False, min_length=1)] | None = Field(
        None,
        description="several labels to learn in one model; it is judged and chosen by the first, whose predictions it "
        "publishes; in place of label",
    )
    loss_weights: dict[str, PositiveFloat] | Literal["uncertainty"] | None = Field(
        None,
        description="of several labels: by what the loss of each is multiplied, as in {purchase = 2.0}, 1 where it is "
        "not set; uncertainty learns it (arXiv:1705.07115)",
    )
    negative_weight: PositiveFloat = Field(
        1.0,
        description="weight of a row without a click in the loss, as if only this fraction of them had been kept; the "
        "predictions are corrected for it, so they remain probabilities",
    )
    freeze: tuple[str, ...] = Field(
        (),
        strict=False,
        description="parts that training leaves as they are, weights and optimizer state, to the bit: tables (all), "
        "dense (all but the tables), features, or modules of the model such as dense_arch or over_arch",
    )
    init_tables: dict[str, str] | None = Field(
        None, description='Parquet files (value, vector) that tables begin with, as in {item = "vectors.parquet"}'
    )
    timeout_s: PositiveFloat = Field(600.0, description="seconds to wait for a process before the job fails")
    num_threads: PositiveInt | None = Field(
        None, description="threads of each process on CPU; when not set, chosen by its cores and its work"
    )

    @property
    def label_names(self) -> tuple[str, ...]:
        """The labels that are named; none where it is the first of the schema."""
        return self.labels or ((self.label,) if self.label is not None else ())

    @property
    def first_of_several(self) -> str:
        """The label that a run of several is judged by, so that what is shown of it names it; empty with one."""
        return self.label_names[0] if self.label_names[1:] else ""


class TableOptimizerConfig(Section):
    """The tables' optimizer, fused into their backward."""

    name: TableOptimizerName = Field("rowwise_adagrad", description="optimizer, by FBGEMM's name")
    learning_rate: PositiveFloat = Field(0.05, description="base learning rate")
    eps: PositiveFloat = Field(1e-8, description="added to the root of the accumulated squares (not for sgd)")
    beta1: Fraction = Field(0.9, description="decay of the running mean of gradients, in the kinds of adam and lamb")
    beta2: Fraction = Field(0.999, description="decay of the running mean of squares, in the kinds of adam and lamb")
    weight_decay: NonNegativeFloat = Field(0.0, description="weight decay of the rows that a step looks up")
    weight_decay_mode: WeightDecayModeName = Field(
        "decoupled",
        description="decoupled: times the learning rate, apart from the gradient; lazy: the same, also for the steps "
        "since the row was last looked up (CPU only); l2: added to the row's gradient (on GPUs only rowwise_adagrad)",
    )
    initial_accumulator: NonNegativeFloat = Field(
        0.0, description="initial value of the sums of squares, in adagrad and rowwise_adagrad"
    )

    @property
    def decays_lazily(self) -> bool:
        """Whether rows catch up on the decay of steps that did not look them up; also where it is 0 just now."""
        return self.weight_decay_mode == "lazy"

    @property
    def record(self) -> TableOptimizer:
        """The record of the optimizer, with the state that these settings add to it."""
        record = TABLE_OPTIMIZERS[self.name]
        return record.with_lazy_decay() if self.decays_lazily else record


class DenseOptimizerConfig(Section):
    """The optimizer of the dense and over arch."""

    name: DenseOptimizerName = Field("adagrad", description="optimizer, by torch.optim's name")
    learning_rate: PositiveFloat = Field(0.01, description="base learning rate")
    eps: PositiveFloat = Field(1e-8, description="added to the root of the accumulated squares (not for sgd)")
    beta1: Fraction = Field(0.9, description="decay of the running mean of gradients, in adamw")
    beta2: Fraction = Field(0.999, description="decay of the running mean of squares, in adamw")
    momentum: Annotated[float, Field(ge=0, lt=1, allow_inf_nan=False)] = Field(0.0, description="momentum of sgd")
    weight_decay: NonNegativeFloat = Field(
        0.0,
        description="weight decay: decoupled in adamw, added to the gradient in adagrad and sgd, as torch.optim does",
    )
    initial_accumulator: NonNegativeFloat = Field(0.0, description="initial value of the sums of squares, in adagrad")
    clip_norm: PositiveFloat | None = Field(
        None,
        description="largest norm of the gradient of the dense and over arch together, averaged over all ranks; a "
        "longer one is scaled down; tables, which update in the backward, are not clipped; no limit when not set",
    )


class ScheduleConfig(Section):
    """Learning rate over steps, for all optimizers alike.

    Every kind rises linearly to the base rate while step <= warmup_steps, and holds it until decay_start_step. Then
    constant keeps it; over decay_steps, warmup_polynomial falls quadratically (facebookresearch/dlrm) and cosine along
    half a cosine, both towards zero but not below 1e-7, where they stay. plateau has no such steps: it reduces the rate
    when the val AUC no longer rises, so set validation.every_steps or _rows.
    """

    name: Literal["constant", "warmup_polynomial", "cosine", "plateau"] | None = Field(
        None, description="kind of decay; when not set, warmup_polynomial where decay_steps is above 0, else constant"
    )
    warmup_steps: NonNegativeInt = Field(0, description="steps of linear warm-up")
    decay_start_step: NonNegativeInt = Field(
        0, description="last step at the base rate before decay; if 0, the end of the warm-up"
    )
    decay_steps: NonNegativeInt | None = Field(
        None, description="steps of decay; 0 for none; when not set, decay ends with the run"
    )
    plateau_factor: Fraction = Field(0.1, description="what plateau multiplies the rate by each time")
    plateau_patience_validations: PositiveInt = Field(
        1, description="validations in a row without a better val AUC after which plateau reduces the rate, and again"
    )
    plateau_min_fraction: Fraction = Field(
        0.001, description="fraction of the base rate below which plateau does not reduce it"
    )

    @property
    def kind(self) -> Literal["constant", "warmup_polynomial", "cosine", "plateau"]:
        """The kind of decay that these settings stand for."""
        return self.name or ("warmup_polynomial" if self.decay_steps else "constant")


class ValidationConfig(Section):
    """Metrics on the val split during training; a run always validates at its end."""

    every_steps: NonNegativeInt = Field(0, description="validate every this many steps; 0 means not by steps")
    every_rows: NonNegativeInt = Field(0, description="validate every this many training rows; 0 means not by rows")
    batch_size_global: PositiveInt = Field(8192, description="rows per forward pass over all ranks")
    max_rows: PositiveInt | None = Field(None, description="validate on the first this many rows; all when not set")


class CheckpointConfig(Section):
    """When a run saves itself; it also does at its end, after the best validation so far, and when asked to stop."""

    every_steps: NonNegativeInt = Field(0, description="save every this many steps; 0 means not by steps")
    every_minutes: NonNegativeFloat = Field(10.0, description="save every this many minutes; 0 means not by time")
    keep_last: PositiveInt = Field(2, description="checkpoints to keep, besides the one with the best val AUC")
    asynchronous: bool = Field(
        default=True, description="keep training while a copy of the state is written (needs memory for the copy)"
    )


class WarmStartConfig(Section):
    """What a run that is started from another takes over, besides the tables: read with `dlrm train --from RUN`."""

    checkpoint: str = Field("best", description="checkpoint of the other run: best of its val split, last, or a step")
    dense_optimizer_state: Literal["kept", "fresh"] = Field(
        "kept",
        description="state of the dense optimizer: kept, or fresh as in a new run, whose first steps are large in "
        "adagrad and adamw",
    )
    accumulator_decay: Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)] = Field(
        1.0,
        description="what Adagrad's sums of squared gradients are multiplied by, so that later rows count for more; 1 "
        "keeps them",
    )


class StopConfig(Section):
    """Reasons to stop before the last epoch ends; all look at the val split, so set validation.every_steps or _rows."""

    target_auc: Fraction | None = Field(None, description="stop once the val AUC has reached this")
    patience_validations: PositiveInt | None = Field(
        None, description="early stopping: stop after this many validations without a better val AUC"
    )


class LoggingConfig(Section):
    """What a run writes while it trains."""

    every_steps: PositiveInt = Field(100, description="steps between two lines of metrics.jsonl")
    profile_steps: NonNegativeInt = Field(
        0, description="write a Chrome trace of this many steps, and its summary, to the run's profile/; 0 for none"
    )
    tensorboard: bool = Field(default=True, description="also write TensorBoard event files")
    trackers: tuple[str, ...] = Field(
        (),
        strict=False,
        description="other trackers that receive metrics: wandb (Weights & Biases), mlflow; configured by their own "
        "environment variables",
    )
    experiment: str = Field("torchdlrm", description="wandb's project, MLflow's experiment")


class ShardingConfig(Section):
    """The machine as TorchRec's planner sees it, and rules for the plan."""

    hbm_bytes: Size | None = Field(
        None, description='memory of each GPU, such as "80GB" or a number of bytes; the device\'s own when not set'
    )
    host_memory_bytes: Size | None = Field(
        None, description="host memory of each rank; the machine's, divided by its ranks, when not set"
    )
    reserved_fraction: Fraction = Field(
        0.15,
        description="fraction of each rank's memory that is not for tables: the arches, activations, batches, slack; "
        "more where the dense parts need more",
    )
    constraints: tuple[str, ...] = Field(
        (),
        strict=False,
        description="rules for tables, such as cat_3=row_wise or cat_0=table_wise@2 (TABLE=KIND,KIND@RANK,RANK)",
    )
    cache_fraction: Fraction | None = Field(
        None, description="lets GPUs keep tables in host memory and cache this fraction of their rows; off when not set"
    )
    plan: str | None = Field(
        None, description="a plan.json to follow (dlrm plan writes it); training plans by itself when not set"
    )


class LoaderConfig(Section):
    """How batches are read."""

    prefetch_batches: PositiveInt = Field(8, description="batches that the reading thread keeps ready")


class Config(Section):
    """A whole run."""

    seed: NonNegativeInt = Field(0, description="seeds the initial weights and the order of row groups after epoch 0")
    model: ModelConfig = ModelConfig()
    train: TrainConfig = TrainConfig()
    table_optimizer: TableOptimizerConfig = TableOptimizerConfig()
    dense_optimizer: DenseOptimizerConfig = DenseOptimizerConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    validation: ValidationConfig = ValidationConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    warm_start: WarmStartConfig = WarmStartConfig()
    stop: StopConfig = StopConfig()
    logging: LoggingConfig = LoggingConfig()
    sharding: ShardingConfig = ShardingConfig()
    loader: LoaderConfig = LoaderConfig()

    @property
    def accumulators(self) -> tuple[str, ...]:
        """What the optimizers call their sums of squared gradients, which grow with every step."""
        records = TABLE_OPTIMIZERS[self.table_optimizer.name], DENSE_OPTIMIZERS[self.dense_optimizer.name]
        return tuple(record.accumulator for record in records if record.accumulator)


def setting_values(config: Config) -> dict[str, object]:
    """Return the value of every setting by its dotted name; of features, what is set."""
    return dict(_values(config, ""))


def _values(section: BaseModel, prefix: str) -> Iterator[tuple[str, object]]:
    for name in type(section).model_fields:
        value = getattr(section, name)
        if isinstance(value, BaseModel):
            yield from _values(value, f"{prefix}{name}.")
        elif isinstance(value, dict):
            for key, part in value.items():
                place = f"{prefix}{name}.{key}"
                if isinstance(part, BaseModel):
                    default = dict(_values(type(part)(), f"{place}."))
                    yield from ((leaf, now) for leaf, now in _values(part, f"{place}.") if now != default[leaf])
                else:
                    yield place, part
        else:
            yield f"{prefix}{name}", value


# Stands for the name of a feature.
ANY_FEATURE = "FEATURE"


def sections(section: type[BaseModel] = Config, prefix: str = "") -> Iterator[tuple[str, type[BaseModel]]]:
    """Iterate over every section by its dotted name, the whole of a config first, as ``."""
    yield prefix, section
    for name, field in section.model_fields.items():
        inner = _section_in(field)
        if inner is not None:
            place = f"{prefix}.{name}".lstrip(".")
            yield from sections(inner, place if inner is field.annotation else f"{place}.{ANY_FEATURE}")


def settings() -> Iterator[tuple[str, FieldInfo]]:
    """Iterate over every setting by its dotted name, with its type, default and description."""
    for prefix, section in sections():
        for name, field in section.model_fields.items():
            if _section_in(field) is None:
                yield f"{prefix}.{name}".lstrip("."), field


def _section_in(field: FieldInfo) -> type[BaseModel] | None:
    """The section that a field is, or that each value of it is."""
    *_, last = (field.annotation, *get_args(field.annotation))
    return last if isinstance(last, type) and issubclass(last, BaseModel) else None
