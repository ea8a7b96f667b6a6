"""The sections of config.yaml: every setting with its type and range.

Units, and why one would change a setting, are in the comments of config.yaml. A check that needs
more than one setting raises ValueError; its text names the keys, what is wrong and the fix.
"""

import contextlib
import datetime
import math
from typing import Annotated, Any, Literal

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationInfo,
    field_validator,
    model_validator,
)
from pydantic_core import PydanticCustomError

from trainstack.config.batch import BatchPlan
from trainstack.config.names import asset_name, checkpoint_name, file_path, prompt, said, split_name
from trainstack.config.schedules import SCHEDULES, check_settings
from trainstack.config.strict_yaml import Dumper

MOST_SOURCES = 32  # data sets of a mixture
PositiveInt = Annotated[int, Field(ge=1)]
PositiveFloat = Annotated[float, Field(gt=0)]
Beta = Annotated[float, Field(ge=0, lt=1)]


def day(text: str) -> str:
    """A date such as 2026-01-01."""
    with contextlib.suppress(ValueError):
        if str(datetime.date.fromisoformat(text)) == text:
            return text
    raise PydanticCustomError("name", "{fix}", {"fix": "no such day; write for example 2026-01-01"})


Prompt = Annotated[str | list[dict[str, str]], BeforeValidator(prompt)]
Text = Annotated[str, AfterValidator(said)]
Name = Annotated[Text, Field(min_length=1)]
AssetName = Annotated[Name, AfterValidator(asset_name)]  # of a model or a data set
SplitName = Annotated[Name, AfterValidator(split_name)]
FilePath = Annotated[Name, AfterValidator(file_path)]


class Section(BaseModel):
    """A part of config.yaml: no unknown key, no default, no silent conversion of a type."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class RunSection(Section):
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$")]
    seed: Annotated[int, Field(ge=0, lt=2**63)]
    branch_from: Annotated[str, AfterValidator(checkpoint_name)] | None

    @property
    def parent(self) -> tuple[str, int] | None:
        """The run that this one is a branch of, and its step; None if it is none."""
        name, _, step = (self.branch_from or "").partition("@")
        return (name, int(step)) if name else None

    @model_validator(mode="after")
    def check_parent(self) -> "RunSection":
        if self.parent and self.parent[0] == self.name:
            raise ValueError(
                f"run.branch_from={self.branch_from}: a branch is another run than {self.name}; "
                "choose another run.name"
            )
        return self


class ModelSection(Section):
    name: AssetName
    revision: Name
    init: Literal["scratch", "pretrained"]
    attn_implementation: Literal["auto", "sdpa", "eager", "flash_attention_2"]


class SourceSection(Section):
    """One data set; ``weight``: its share of the sequences, relative to the others' weights."""

    name: AssetName
    revision: Name
    subset: Name | None
    split: SplitName
    eval_split: SplitName | None
    eval_fraction: Annotated[float, Field(ge=0, lt=1)]
    format: Literal["auto", "text", "messages", "prompt_completion", "alpaca", "sharegpt"]
    text_field: Name
    columns: dict[Name, Name]
    learn: Literal["all", "last"]
    each_turn: bool
    chat_template: FilePath | None
    chat_date: Annotated[str, AfterValidator(day)]
    special_tokens: Literal["text", "tokens"] | None
    split_on: Name | None
    max_bad_records: Annotated[int, Field(ge=0)]
    weight: PositiveFloat | None

    @property
    def label(self) -> str:
        """The name that tells it from the others of a mixture: ``name@subset:split``."""
        subset = f"@{self.subset}" if self.subset else ""
        return f"{self.name}{subset}" + (f":{self.split}" if self.split != "train" else "")


class DataSection(SourceSection):
    seq_len: Annotated[int, Field(ge=2)]
    packing: Literal["concat", "best_fit", "none"]
    too_long: Literal["split", "drop"]
    mixture: Annotated[list[SourceSection], Field(max_length=MOST_SOURCES - 1)]

    @property
    def sources(self) -> list["DataSection"]:
        """Each data set of the mixture as if it were the only one; the first is this one."""
        mixed = [source.model_dump() for source in self.mixture]
        return [self.model_copy(update={**other, "mixture": []}) for other in ({}, *mixed)]

    @model_validator(mode="after")
    def check_mixture(self) -> "DataSection":
        sources = self.sources
        labels = [source.label for source in sources]
        repeated = next((label for label in labels if labels.count(label) > 1), None)
        if repeated:
            raise ValueError(f"data.mixture: {repeated} is repeated; give it one larger weight")
        for source in sources:
            same = [s for s in sources if (s.name, s.subset) == (source.name, source.subset)]
            if len({s.revision for s in same}) > 1:
                found = " and ".join(s.revision for s in same)
                raise ValueError(
                    f"data.mixture: {source.name} in revisions {found}; give all its splits one"
                )
        held_out = {(s.name, s.subset, s.eval_split) for s in sources}
        both = next((s for s in sources if (s.name, s.subset, s.split) in held_out), None)
        if both:
            raise ValueError(
                f"data.eval_split={both.split}: {both.name} is trained on that split too; hold out "
                "another one, or null and an eval_fraction"
            )
        return self

    @model_validator(mode="after")
    def check_weights(self) -> "DataSection":
        weights = {source.label: source.weight for source in self.sources}
        if None in weights.values() and any(weights.values()):
            given = ", ".join(f"{label}: {weight}" for label, weight in weights.items())
            raise ValueError(
                f"data.weight is set for some data sets only ({given}); set it for all, or for "
                "none (then each counts by its size)"
            )
        if self.weight and not self.mixture:
            raise ValueError(
                f"data.weight={self.weight:g}: there is no other data set to weigh it against; "
                "write data.weight=null, or name others in data.mixture"
            )
        return self

    @model_validator(mode="after")
    def check_too_long(self) -> "DataSection":
        if self.packing == "concat" and self.too_long == "drop":
            raise ValueError(
                "data.too_long=drop: data.packing=concat cuts documents anywhere, so none is too "
                "long; write data.too_long=split, or another data.packing"
            )
        return self


class AdapterSection(Section):
    """Small matrices that learn in place of the model's own: LoRA (Hu et al., arXiv 2106.09685)."""

    type: Literal["lora"] | None
    r: PositiveInt
    alpha: PositiveFloat
    dropout: Annotated[float, Field(ge=0, lt=1)]
    target_modules: Literal["all-linear"] | Annotated[list[Name], Field(min_length=1)]


class TrainSection(Section):
    global_batch_size: PositiveInt
    micro_batch_size: PositiveInt
    num_train_epochs: PositiveFloat
    max_steps: PositiveInt | None
    precision: Literal["fp32", "tf32", "bf16", "fp16", "fp64"]
    torch_compile: bool
    deterministic: bool
    activation_checkpointing: bool


class OptimSection(Section):
    learning_rate: PositiveFloat
    weight_decay: Annotated[float, Field(ge=0)]
    adam_beta1: Beta
    adam_beta2: Beta
    adam_epsilon: PositiveFloat
    max_grad_norm: PositiveFloat | None
    lr_scheduler_type: Literal[*SCHEDULES]
    lr_scheduler_kwargs: dict[str, float | int | str | bool]
    warmup_steps: Annotated[int, Field(ge=0)]
    warmup_ratio: Annotated[float, Field(ge=0, lt=1)] | None

    @field_validator("lr_scheduler_kwargs")
    @classmethod
    def check_schedule(cls, settings: dict, info: ValidationInfo) -> dict:
        if "lr_scheduler_type" in info.data:  # else that is wrong itself
            check_settings(info.data["lr_scheduler_type"], settings)
        return settings


class CheckpointSection(Section):
    save_steps: PositiveInt | Literal["auto", "epoch"]
    failure_hours: PositiveFloat | None
    save_total_limit: Annotated[int, Field(ge=2)]


class EvalSection(Section):
    eval_steps: PositiveInt | Literal["epoch"] | None
    eval_samples: PositiveInt | None
    keep_best: bool
    patience: PositiveInt | None
    prompts: list[Prompt]
    sample_tokens: PositiveInt

    @model_validator(mode="after")
    def check_patience(self) -> "EvalSection":
        if self.patience and self.eval_steps is None:
            raise ValueError(
                f"eval.patience={self.patience}: with eval.eval_steps=null the only evaluation is "
                "at the end; write a number of steps, or eval.patience=null"
            )
        return self


class GuardSection(Section):
    hang_seconds: PositiveFloat | None
    on_divergence: Literal["stop", "skip", "rollback"]
    max_skips: PositiveInt
    spike_sigma: PositiveFloat | None


class LogSection(Section):
    logging_steps: PositiveInt
    report_to: list[Literal["tensorboard", "html", "wandb", "trackio"]]


class Config(Section):
    """The whole of config.yaml; every value is there, none has a second default here."""

    run: RunSection
    model: ModelSection
    data: DataSection
    adapter: AdapterSection
    train: TrainSection
    optim: OptimSection
    checkpoint: CheckpointSection
    eval: EvalSection
    guard: GuardSection
    log: LogSection

    @model_validator(mode="after")
    def check_adapter(self) -> "Config":
        if self.adapter.type and self.model.init == "scratch":
            raise ValueError(
                f"adapter.type={self.adapter.type} with model.init=scratch: it would learn beside "
                "random weights that stay; write model.init=pretrained, or adapter.type=null"
            )
        return self

    def to_yaml(self) -> str:
        """The resolved configuration, as it is kept in the run folder."""
        return yaml.dump(self.model_dump(), Dumper=Dumper, sort_keys=False, allow_unicode=True)

    def batch_plan(self, world_size: int) -> BatchPlan:
        """How a step is spread over ``world_size`` processes; ConfigError if it cannot be."""
        size, micro = self.train.global_batch_size, self.train.micro_batch_size
        share, rest = divmod(size, max(1, world_size))
        if not (share and rest):  # of many processes each may have less than that
            micro = min(micro, max(1, share))
        return BatchPlan(size, micro, world_size, self.data.seq_len)

    def steps_for(self, num_samples: int) -> int:
        """Steps of the run: max_steps, else those that cover num_train_epochs of the samples."""
        if self.train.max_steps is not None:
            return self.train.max_steps
        samples = self.train.num_train_epochs * num_samples
        return math.ceil(samples / self.train.global_batch_size)

    def epoch_steps(self, num_samples: int) -> int:
        """Steps that an epoch of so many samples takes, the last one perhaps not for it alone."""
        return math.ceil(num_samples / self.train.global_batch_size)

    def identity(self) -> dict[str, Any]:
        """The settings that may not change when a run is resumed, by their dotted keys.

        They decide what is learned from. The mixture is left out if there is none, so that a run
        from before there were mixtures is resumed too; so are settings of which only the effect on
        the tokens counts, which have a name of their own.
        """
        found = self.data.model_dump()
        for section in (found, *found["mixture"]):
            del section["chat_template"], section["special_tokens"]
        data = {f"data.{key}": value for key, value in found.items()}
        if not self.data.mixture:
            del data["data.mixture"], data["data.weight"]
        adapter = {
            f"adapter.{key}": getattr(self.adapter, key)
            for key in ("type", "r", "alpha", "target_modules")
            if self.adapter.type
        }
        model = {f"model.{key}": getattr(self.model, key) for key in ("name", "revision", "init")}
        return {
            "run.seed": self.run.seed,
            "train.global_batch_size": self.train.global_batch_size,
            **model,
            **data,
            **adapter,
        }
