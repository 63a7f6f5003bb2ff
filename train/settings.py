"""What a recipe may say of the student and its training."""

from __future__ import annotations

import datetime
from typing import Any, Final, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    field_validator,
    model_validator,
)

from ..store import SEGMENTS, KVGeometry

CHECKPOINTS: Final = "checkpoints"
"""Folder of the checkpoints of a training, below the student's."""
ADAPTER: Final = "adapter"
"""Folder of a low-rank adapter, below the student's."""
OF_KV: Final = (
    "alpha_schedule",
    "kv_share",
    "alpha_steps",
    "alpha_update_steps",
    "loss",
    "magnitude_weight",
    "relation_heads",
    "key_weight",
    "value_weight",
    "layers",
    "layer_weights",
    "segment_weights",
    "projector",
    "projector_learning_rate",
)
"""Keys of `train` that say nothing without a KV loss: changing one does not make a training without it stale."""
_ASIDE: Final = (
    "name",
    "teacher",
    "logging_steps",
    "eval_steps",
    "save_steps",
    "num_workers",
    "measure_steps",
    "collapse_threshold",
    "report_to",
    "reader_threads",
    "prefetch_steps",
    "fsdp",
)
"""Keys of `train` that the weights do not depend on; the targets stand for the teacher."""


class _Settings(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class ByteLevelBPE(_Settings):
    """A byte-level BPE tokenizer trained on the corpus's training split; digits stand alone."""

    vocab_size: PositiveInt


class StudentSettings(_Settings):
    """The student before training: an existing model, or a config with random weights."""

    model: str | None = None
    """A hub id or folder to start from."""
    revision: str | None = None
    config: dict[str, Any] | None = None
    """A transformers config (`model_type`, `hidden_size`, ...), for random weights. `vocab_size` is the tokenizer's."""
    tokenizer: str | ByteLevelBPE | None = None
    """A hub id or folder, or a tokenizer to train; None for that of `model`."""
    geometry: KVGeometry | None = None
    """What the KV geometry is expected to be: checked when the student is made, used for planning where it is not."""
    chat_template: bool = False
    """Wrap samples in the student's chat template; the recipe's `chat_template` if left out."""
    chat_template_date: datetime.date | None = None
    """Date that the chat template prints as today's; the recipe's `chat_template_date` if left out."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """dtype of the weights."""
    seed: int = 0
    """Of the random weights."""
    trust_remote_code: bool = False

    @model_validator(mode="after")
    def _one_origin(self) -> StudentSettings:
        if (self.model is None) == (self.config is None):
            raise ValueError("give either model or config")
        if self.config is not None and "model_type" not in self.config:
            raise ValueError("config needs model_type, for example llama")
        if self.config is not None and self.tokenizer is None:
            raise ValueError("a student made from config needs tokenizer: an id, a folder, or {vocab_size: N}")
        return self

    def determining(self) -> dict[str, Any]:
        """Return what the untrained student depends on, for JSON; defaults too: another default is another student.

        A model and a tokenizer that are given by name are not in it: what they are identified by is their content, see
        `train.student.student_origin`.
        """
        left_out = {"geometry", "model", "revision", "chat_template_date"} | (
            {"seed"} if self.model is not None else set()
        )
        if isinstance(self.tokenizer, str):
            left_out.add("tokenizer")
        return self.model_dump(mode="json", exclude=left_out)

    def names(self) -> dict[str, Any]:
        """Return how the recipe spells the model and the tokenizer that the student begins with."""
        return self.model_dump(mode="json", include={"model", "revision", "tokenizer"})


class AlphaSchedule(_Settings):
    """How alpha changes with the steps of training."""

    kind: Literal["constant", "linear_decay", "warmup"] = "constant"
    steps: PositiveInt | None = None
    """How long it rises or falls; None for `train.max_steps`."""


class LoraSettings(_Settings):
    """Adapters of low rank, trained instead of the weights."""

    r: PositiveInt = 16
    """Rank."""
    alpha: PositiveFloat = 32.0
    """The adapter counts `alpha / r` times."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    target_modules: list[str] | None = Field(default=None, min_length=1)
    """Names of the modules that get one; None for all projections of the attention."""


class LogitSettings(_Settings):
    """A loss against the teacher's cached next-token distributions; see `train.logits.logit_loss`."""

    weight: PositiveFloat = 1.0
    """Of the divergence, against the cross-entropy."""
    temperature: PositiveFloat = 1.0


class TrainSettings(_Settings):
    """Training: the loss is `CE + alpha * KV`, and `+ weight * KL` with logits."""

    name: str = Field("kv", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    """The student's folder below `students/`."""
    teacher: str | None = None
    """Whose targets to use; may be left out where there is one teacher, or where the recipe fuses several."""
    alpha: NonNegativeFloat | Literal["auto"] = "auto"
    """Weight of the KV loss; 0 is plain fine-tuning on the same batches; auto is found from gradients."""
    alpha_schedule: AlphaSchedule = AlphaSchedule()
    """What alpha is multiplied with, step by step."""
    kv_share: PositiveFloat = 1.0
    """`alpha: auto`: the KV gradient's norm over the cross-entropy's, on the parameters that both reach."""
    alpha_steps: PositiveInt = 20
    """`alpha: auto`: the first steps, in each of which gradients are measured; then alpha is frozen."""
    alpha_update_steps: PositiveInt | None = None
    """`alpha: auto`: measure again every so many steps after them; None to freeze alpha."""
    measure_steps: PositiveInt | None = None
    """Gradients are measured for the log every so many steps; None for the larger of 100 and `logging_steps`."""
    loss: Literal["mse", "smooth_l1", "cosine", "cosine_magnitude", "relation"] = "mse"
    magnitude_weight: NonNegativeFloat = 1.0
    """`cosine_magnitude`: weight of the squared difference of log norms."""
    relation_heads: PositiveInt | None = None
    """`relation`: heads that all numbers of a token are cut into; None for the student's KV heads."""
    key_weight: NonNegativeFloat = 1.0
    value_weight: NonNegativeFloat = 1.0
    layers: list[NonNegativeInt] | None = None
    """Student layers with a KV loss; None for all."""
    layer_weights: dict[NonNegativeInt, NonNegativeFloat] | list[NonNegativeFloat] | None = None
    """Weights of the layers' KV losses: one each, or by layer, 1 where it is left out. Only their ratios count."""
    segment_weights: dict[Literal["none", "prompt", "rationale", "answer"], NonNegativeFloat] = {}
    """Weights of tokens in the KV loss, by segment, 1 where it is left out. Only their ratios count."""
    logits: LogitSettings | None = None
    """Also learn the teacher's next-token distributions; None for not."""
    projector: Literal["none", "learned"] = "none"
    """`learned`: the student's keys and values go through a linear map of each layer, the identity at first, that is
    trained with it and dropped at the end."""
    projector_learning_rate: PositiveFloat | None = None
    """None for `learning_rate`; both follow the same schedule."""
    ce_segments: list[Literal["prompt", "rationale", "answer"]] = ["prompt", "rationale", "answer"]
    """Tokens of these segments are predicted; the end of the sequence always is."""
    max_steps: PositiveInt = 1000
    batch_size: PositiveInt = 8
    """Rows per device and forward pass; a row is a sample, or with `pack_tokens` several."""
    pack_tokens: PositiveInt | None = None
    """Tokens of a row that several samples share, at most; None for a row for each sample."""
    group_by_length: bool = False
    """Batches of samples of about equal length, for less padding."""
    shuffle_window: PositiveInt = 16
    """Parts of the store whose samples are shuffled together."""
    gradient_accumulation_steps: PositiveInt = 1
    learning_rate: PositiveFloat = 3e-4
    lr_scheduler: str = "cosine"
    warmup_steps: NonNegativeInt = 0
    weight_decay: NonNegativeFloat = 0.0
    max_grad_norm: PositiveFloat = 1.0
    bf16: bool = False
    """bfloat16 autocast."""
    logging_steps: PositiveInt = 10
    report_to: list[Literal["tensorboard", "wandb", "trackio"]] = ["tensorboard"]
    """Where the log goes beside `metrics.jsonl`."""
    eval_steps: PositiveInt | None = None
    """Held-out evaluation every so many steps; None for the end only."""
    save_steps: PositiveInt | None = None
    """A checkpoint to resume from every so many steps; None for none."""
    lora: LoraSettings | None = None
    """Train adapters instead of the weights; None for all weights."""
    gradient_checkpointing: bool = False
    """Compute activations again in the backward pass instead of keeping them."""
    fsdp: bool = False
    """Of several processes each keeps a shard of the weights, gradients and optimizer state, not a copy."""
    collapse_threshold: NonNegativeFloat = 0.1
    """A warning where the spread of the student's keys or values falls below this share of the target's; 0 for none."""
    reader_threads: PositiveInt = 2
    """Threads that read targets ahead."""
    prefetch_steps: PositiveInt = 2
    """Steps whose batches are read ahead, beyond the one in hand."""
    num_workers: NonNegativeInt = 0
    """Processes that read targets, in the place of threads; 0 for threads."""
    seed: int = 0
    """Of the order of batches, and of dropout."""
    arguments: dict[str, Any] = {}
    """Further `transformers.TrainingArguments`, by their own names."""

    @field_validator("alpha", mode="before")
    @classmethod
    def _auto_or_number(cls, value: Any) -> Any:
        """One message, where a union would give one for each of its members."""
        try:
            fits = value == "auto" or 0 <= float(value) < float("inf")
        except (TypeError, ValueError):
            fits = False
        if not fits:
            raise ValueError(f"must be auto, or a number greater than or equal to 0 (got {value!r})")
        return value

    @model_validator(mode="after")
    def _something_to_learn(self) -> TrainSettings:
        if not self.with_kv:
            if self.projector != "none":
                raise ValueError("projector: learned needs a KV loss; with alpha: 0 there is nothing to project")
            return self
        if self.key_weight + self.value_weight == 0:
            raise ValueError("key_weight and value_weight are both 0; set alpha: 0 to train without targets")
        if len(self.segment_weights) == len(SEGMENTS) and not any(self.segment_weights.values()):
            raise ValueError("segment_weights are all 0; set alpha: 0 to train without targets")
        return self

    @model_validator(mode="after")
    def _one_kind_of_rows(self) -> TrainSettings:
        if self.pack_tokens is not None and self.group_by_length:
            raise ValueError("group_by_length: packed rows are of about equal length already; leave one of both out")
        return self

    @model_validator(mode="after")
    def _what_is_sharded(self) -> TrainSettings:
        if self.fsdp and self.lora is not None:
            raise ValueError("fsdp: adapters are not sharded here; leave out one of fsdp and lora")
        if self.fsdp and self.projector != "none":
            raise ValueError("fsdp: a learned projector is not sharded here; leave out one of fsdp and projector")
        return self

    @property
    def with_kv(self) -> bool:
        """Whether there is a KV loss at all."""
        return self.alpha == "auto" or self.alpha > 0

    def determining(self) -> dict[str, Any]:
        """What the trained weights depend on, for JSON; with defaults, so that another default is another training.

        Keys that say nothing beside the others are left out.
        """
        silent = set(_ASIDE)
        if not self.with_kv:
            silent.update(OF_KV)
        if self.alpha != "auto":
            silent.update(("kv_share", "alpha_steps", "alpha_update_steps"))
        if self.loss != "cosine_magnitude":
            silent.add("magnitude_weight")
        if self.loss != "relation":
            silent.add("relation_heads")
        if self.projector == "none":
            silent.add("projector_learning_rate")
        return self.model_dump(mode="json", exclude=silent)
