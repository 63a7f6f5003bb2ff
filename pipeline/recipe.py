"""The recipe: one YAML file that says everything of a run, checked to the last key.

Each room owns the settings of its part; this file puts them together, applies `-s key=value` overrides, and turns
what is wrong into one line that names the key and the nearest valid one.
"""

from __future__ import annotations

import datetime
import difflib
import json
import types
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any, Literal, Self, Union, get_args, get_origin

import yaml
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    PositiveFloat,
    PositiveInt,
    ValidationError,
    field_validator,
    model_validator,
)

from ..errors import RecipeError
from ..extract import CaptureSettings, CorpusSettings
from ..extract.generate import GenerateSettings
from ..extract.vllm.settings import EngineSettings
from ..store import CODECS, LOSSY, KVGeometry
from ..store.files import write_atomic
from ..store.manifest import MAX_PART_SAMPLES
from ..store.safe_json import shortened
from ..train.arms import CompareSettings
from ..train.settings import ByteLevelBPE, StudentSettings, TrainSettings
from .fuse.rules import RULES, Weighting
from .maps.heads import HEAD_MAPS, RIDGE
from .maps.resample import RESAMPLERS
from .recipe_file import expand_paths, read_yaml, refuse_urls, refuse_values, set_key, share_templates, without_secrets
from .select.rules import SELECTORS, Selector

DTypeName = Literal["bfloat16", "float16", "float32"]


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class TeacherSettings(_Section):
    """One teacher."""

    model: str
    """A hub id, a folder, a `.gguf` file, or `package:PACKAGE/FILE`."""
    revision: str | None = None
    dtype: DTypeName = "bfloat16"
    """Of the weights and the forward pass."""
    device: str = "auto"
    """`auto`, `cpu`, `cuda`, `cuda:1`, ...; vLLM takes the devices that it sees."""
    engine: EngineSettings = EngineSettings()
    """How vLLM runs it, with `extract.backend: vllm`."""
    chat_template: bool = False
    """Wrap the text in the tokenizer's chat template; the recipe's `chat_template` if left out."""
    chat_template_date: datetime.date | None = None
    """Date that the chat template prints as today's; the recipe's `chat_template_date` if left out."""
    trust_remote_code: bool = False
    geometry: KVGeometry | None = None
    """What the model's KV geometry is expected to be: checked when it is loaded, used for planning where it is not."""


class ExtractSettings(CaptureSettings):
    """Capture of every teacher."""

    backend: Literal["hf", "vllm"] = "hf"
    """What runs the teachers: Hugging Face transformers, or vLLM."""
    dtype: DTypeName = "bfloat16"
    """Storage dtype of the teacher stores."""
    codec: str = "blosc-zstd"
    keep: Literal["capture", "target"] = "capture"
    """`target`: only the parts that maps are fitted on are kept as captured; of the others only targets are written."""
    importance: bool = False
    """Also capture how much the answer attends to each rationale token, per layer and KV head. Part of the content."""
    confidence: bool = False
    """Also capture each sample's loss and mean entropy under the teacher. Part of the content."""
    logits: PositiveInt | None = None
    """Also capture so many of the likeliest next tokens after each token, and how likely. Part of the content."""
    generate: GenerateSettings | None = None
    """Let a teacher write the rationales first."""

    @field_validator("codec")
    @classmethod
    def _known_codec(cls, name: str) -> str:
        return _known(name, [*CODECS, *LOSSY])


class ResampleSettings(_Section):
    """Time: teacher tokens to student tokens."""

    method: str = "last"
    across_segments: bool = False
    """Read rationale tokens from the prompt too, and so on; otherwise segments do not mix."""
    materialize: bool = False
    """Write the resampled store too, in the teacher's geometry; otherwise resampling is fused into projection."""

    @field_validator("method")
    @classmethod
    def _known_method(cls, name: str) -> str:
        return _known(name, RESAMPLERS)


class ProjectSettings(_Section):
    """Layers, heads and width: teacher geometry to student geometry."""

    layers: Literal["uniform", "last-aligned", "cka", "best"] | list[int | list[int]] = "uniform"
    top_k: PositiveInt = 4
    """Teacher layers that `layers: best` joins, at most."""
    heads: str = "procrustes"
    per: Literal["layer", "head"] = "layer"
    """`layer`: all heads are mapped together; `head`: each from the teacher's heads that it overlaps."""
    ridge: list[PositiveFloat] = Field(default=list(RIDGE), min_length=1)
    """Penalties that `heads: ridge` and `layers: best` choose from, relative to the teacher's mean variance."""
    scale: Literal["own", "unit"] = "own"
    """`own`: that of the head map (procrustes: the student's); `unit`: mean 0 and variance 1 in every layer."""
    calibration_samples: PositiveInt = 256
    """Training samples for a fitted map; every fifth is held out to choose by and to measure on."""
    dtype: DTypeName = "bfloat16"
    """Storage dtype of the targets."""
    codec: str = "blosc-zstd"
    seed: int = 0

    @field_validator("heads")
    @classmethod
    def _known_heads(cls, name: str) -> str:
        return _known(name, HEAD_MAPS)

    @field_validator("codec")
    @classmethod
    def _known_codec(cls, name: str) -> str:
        return _known(name, [*CODECS, *LOSSY])


class SelectSettings(_Section):
    """Slots: the tokens of each sample that are kept, for each layer and KV head its own."""

    tokens: PositiveInt
    """Slots per sample."""
    method: str = "r-kv"
    mix_lambda: Annotated[float, Field(ge=0, le=1)] = 0.1
    """Share of the answer's attention in the score of `r-kv`; the rest is unlikeness to the other tokens."""
    mix: Literal["sum", "zscore"] = "sum"
    """`zscore`: standardise both before mixing; as they are, unlikeness hardly varies and attention decides."""
    keys: Literal["pre-rope", "rotated"] = "pre-rope"
    """Which keys are compared: as stored, or rotated as in the teacher's cache."""
    segment: Literal["prompt", "rationale", "answer"] = "rationale"
    """Whose tokens are chosen from."""
    geometry: Literal["teacher", "student"] = "teacher"
    """`student`: project what was chosen."""
    seed: int = 0
    """Of `random`."""

    @field_validator("method")
    @classmethod
    def _known_method(cls, name: str) -> str:
        return _known(name, SELECTORS)

    @model_validator(mode="after")
    def _importance_is_of_the_rationale(self) -> Self:
        if self.selector.needs_importance and self.segment != "rationale":
            raise ValueError(f"method {self.method} chooses from the rationale alone: only its importance is captured")
        return self

    @property
    def selector(self) -> Selector:
        """How to choose."""
        return Selector(self.method, self.tokens, self.mix_lambda, self.mix, self.seed)

    def content(self) -> dict[str, Any]:
        """The settings that determine what is chosen by this method."""
        used = {"tokens", "method", "segment", "geometry"}
        used |= {"mix_lambda", "mix"} if self.method == "r-kv" else set()
        used |= {"keys"} if self.selector.compares_keys else set()
        used |= {"seed"} if self.method == "random" else set()
        return self.model_dump(mode="json", include=used)


class FuseSettings(_Section):
    """Several teachers' targets as one."""

    teachers: list[str] | None = Field(None, min_length=1)
    """Whose targets are fused; None for all."""
    weights: str = "fixed"
    fixed: dict[str, PositiveFloat] = {}
    """With `weights: fixed`, a number for each teacher, of which only the ratios count; empty for alike."""
    temperature: PositiveFloat = 1.0
    """With `weights: confidence`: below 1 the surest teacher of a sample gets more."""
    materialize: bool = True
    """Write the fused store; otherwise training fuses while it reads."""
    name: str = Field("fused", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    """Of the fused targets, for `train.teacher` and for files."""

    @field_validator("weights")
    @classmethod
    def _known_weights(cls, name: str) -> str:
        return _known(name, RULES)

    @model_validator(mode="after")
    def _used(self) -> Self:
        if self.fixed and self.weights != "fixed":
            raise ValueError(f"fixed goes without weights: {self.weights}")
        if self.temperature != 1 and self.weights != "confidence":
            raise ValueError(f"temperature goes with weights: confidence, not {self.weights}")
        return self

    def weighting(self, teachers: Sequence[str]) -> Weighting:
        """How these teachers are weighed, in this order."""
        return Weighting(self.weights, tuple(self.fixed[name] for name in teachers if self.fixed), self.temperature)


class Recipe(_Section):
    """A whole run."""

    run_dir: str
    """Where everything is written."""
    store_dir: str | None = None
    """Where captures are kept, so that other recipes with the same teacher and corpus have them too."""
    corpus: CorpusSettings
    chat_template: bool | None = None
    """Whether teachers and student read the text in their chat templates; each may say otherwise. None for no."""
    chat_template_date: datetime.date | None = None
    """Date that chat templates print as today's. Templates that print one are refused without it."""
    samples_per_part: Annotated[int, Field(gt=0, le=MAX_PART_SAMPLES)] | None = None
    """Samples in one part of every store; None for about 1 GiB at most."""
    teachers: dict[str, TeacherSettings] = Field(min_length=1)
    extract: ExtractSettings = ExtractSettings()
    student: StudentSettings
    resample: ResampleSettings = ResampleSettings()
    project: ProjectSettings = ProjectSettings()
    select: SelectSettings | None = None
    """Slots as well as targets."""
    fuse: FuseSettings | None = None
    """The targets of several teachers as one."""
    train: TrainSettings = Field(default_factory=lambda: TrainSettings.model_validate({}))
    compare: CompareSettings | None = None
    """Arms and seeds of kava compare."""

    @field_validator("teachers")
    @classmethod
    def _plain_names(cls, teachers: dict[str, TeacherSettings]) -> dict[str, TeacherSettings]:
        for name in teachers:
            if not name.replace("-", "").replace("_", "").replace(".", "").isalnum() or name.startswith("."):
                raise ValueError(f"teacher name {name!r} must be letters, digits, '.', '-' and '_': it names files")
        return teachers

    @model_validator(mode="after")
    def _keeps_what_is_needed(self) -> Self:
        if self.extract.keep == "target":
            for key, asked in {
                "resample.materialize": self.resample.materialize,
                "select": self.select is not None,
                "extract.importance": self.extract.importance,
            }.items():
                if asked:
                    raise ValueError(f"{key} needs the whole capture; set extract.keep: capture")
        return self

    @model_validator(mode="after")
    def _fits_the_backend(self) -> Self:
        for signal in ("importance", "confidence", "logits"):
            if self.extract.backend == "vllm" and getattr(self.extract, signal):
                raise ValueError(f"extract.{signal} needs extract.backend: hf; under vLLM it is not captured")
        for name, teacher in self.teachers.items():
            if self.extract.backend == "hf" and teacher.engine.quantization is not None:
                raise ValueError(f"teachers.{name}.engine.quantization needs extract.backend: vllm")
            if self.extract.backend == "vllm" and teacher.device != "auto":
                raise ValueError(
                    f"teachers.{name}.device: vLLM takes the devices that it sees; leave it at auto and choose them "
                    "with CUDA_VISIBLE_DEVICES"
                )
        return self

    @model_validator(mode="after")
    def _captures_what_is_selected_by(self) -> Self:
        if self.select is not None and self.select.selector.needs_importance and not self.extract.importance:
            raise ValueError(f"select.method: {self.select.method} needs extract.importance: true")
        return self

    @model_validator(mode="after")
    def _fuses_what_there_is(self) -> Self:
        if self.fuse is None:
            return self
        for name in self.fused_teachers:
            if name not in self.teachers:
                raise ValueError(f"fuse.teachers: there is no teacher {name!r}, only {', '.join(self.teachers)}")
        if self.fuse.teachers is not None and len(self.fused_teachers) < len(self.fuse.teachers):
            raise ValueError("fuse.teachers: a teacher is named twice")
        if self.fuse.name in self.teachers:
            raise ValueError(f"fuse.name: {self.fuse.name!r} is a teacher; its targets would be overwritten")
        if self.fuse.fixed and set(self.fuse.fixed) != set(self.fused_teachers):
            raise ValueError(f"fuse.fixed: give a number for each of {', '.join(self.fused_teachers)}, and no other")
        if RULES[self.fuse.weights].measure is not None and not self.extract.confidence:
            raise ValueError(f"fuse.weights: {self.fuse.weights} needs extract.confidence: true")
        return self

    @model_validator(mode="after")
    def _captures_logits_that_are_trained_on(self) -> Self:
        arms = [] if self.compare is None else self.compare.possible(self.train)
        for settings in (self.train, *(arm.settings(self.train, 0, 1) for arm in arms)):
            self._check_logits(settings)
        return self

    def _check_logits(self, train: TrainSettings) -> None:
        if train.logits is None:
            return
        if self.extract.logits is None:
            raise ValueError("train.logits needs extract.logits: how many next tokens are captured, for example 64")
        if isinstance(self.student.tokenizer, ByteLevelBPE):
            raise ValueError(
                "train.logits needs the teacher's tokenizer; student.tokenizer is one trained on the corpus"
            )
        named = train.teacher
        if self.fuse is not None and (named == self.fuse.name or (named is None and len(self.teachers) > 1)):
            raise ValueError("train.logits: fused targets have none; name one teacher in train.teacher")

    @property
    def fused_teachers(self) -> list[str]:
        """Whose targets are fused, by name: the order in the recipe changes nothing, not even a rounding."""
        named = None if self.fuse is None else self.fuse.teachers
        return sorted(set(self.teachers if named is None else named))

    def save(self, path: Path) -> None:
        """Write the recipe with every default and without secrets; a file that holds just that is left alone."""
        sections = without_secrets(self.model_dump(mode="json"))
        data = yaml.safe_dump(sections, sort_keys=False, allow_unicode=True).encode()
        with suppress(OSError):
            if path.read_bytes() == data:
                return
        write_atomic(path, data)


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Reads a recipe and applies `key.sub=value` overrides; values are YAML.

    Raises:
        RecipeError: naming the file, the key, and the nearest valid key or what a value should be.
    """
    path = Path(path)
    try:
        data = path.read_bytes()
    except OSError as error:
        hint = "; kava init writes a first recipe" if isinstance(error, FileNotFoundError) else ""
        raise RecipeError(f"recipe {path}: {error.strerror}{hint}") from None
    return check_recipe(path, parse_recipe(path, data, overrides))


def parse_recipe(path: Path, data: bytes, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """Return the sections of a recipe with overrides applied, not yet checked; see `read_yaml`."""
    try:
        raw = read_yaml(data.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise RecipeError(f"recipe {path}: not UTF-8: {error}. Save it as UTF-8.") from None
    except RecipeError as error:
        raise RecipeError(f"recipe {path}{error}") from None
    if not isinstance(raw, dict):
        raise RecipeError(f"recipe {path}: must be a mapping of sections, not {type(raw).__name__}")
    for override in overrides:
        set_key(raw, override)
    return raw


def check_recipe(path: Path, raw: dict[str, Any]) -> Recipe:
    """Return the recipe that these sections describe.

    Raises:
        RecipeError: naming the key, and the nearest valid key or what a value should be.
    """
    try:
        refuse_values(raw)
        expand_paths(raw)
        refuse_urls(raw)
    except RecipeError as error:
        raise RecipeError(f"recipe {path}: {error}") from None
    try:
        # JSON's lists are tuples, too: no validator may hand pydantic Python's own.
        return Recipe.model_validate_json(json.dumps(share_templates(raw)), strict=True)
    except ValidationError as error:
        raise RecipeError(f"recipe {path}: " + "; ".join(_explain(e) for e in error.errors())) from None


def _explain(error: Any) -> str:
    place = [p for p in error["loc"] if not (isinstance(p, str) and ("[" in p or p in _TAGS))]
    key = ".".join(str(p) for p in place)
    if error["type"] == "extra_forbidden":
        valid = _keys_at(Recipe, list(place[:-1]))
        near = difflib.get_close_matches(str(place[-1]), valid, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]!r}?" if near else f"valid here: {', '.join(valid)}"
        return f"unknown key {shortened(key)}; {hint}"
    if error["type"] == "missing":
        return f"{key!r} is missing"
    message = error["msg"].removeprefix("Value error, ")
    given = "" if error["type"] in ("value_error", "missing") else f" (got {shortened(error['input'])})"
    return f"{key}: {message}{given}" if key else message


_TAGS = ("str", "int", "ByteLevelBPE", "list[union[int,list[int]]]")


def _keys_at(model: type[BaseModel], path: list[Any]) -> list[str]:
    """The valid keys of the section that `path` leads to."""
    if not path:
        return list(model.model_fields)
    field = model.model_fields.get(str(path[0]))
    if field is None:
        return []
    annotation, rest = field.annotation, path[1:]
    if get_origin(annotation) is dict:
        annotation, rest = get_args(annotation)[1], rest[1:]
    options = get_args(annotation) if get_origin(annotation) in (Union, types.UnionType) else (annotation,)
    found = [o for o in options if isinstance(o, type) and issubclass(o, BaseModel)]
    return _keys_at(found[0], rest) if found else []


def _known(name: str, registry: Any) -> str:
    if name in registry:
        return name
    near = difflib.get_close_matches(name, list(registry), n=1)
    hint = f"did you mean {near[0]!r}?" if near else f"use one of {', '.join(registry)}"
    raise ValueError(f"{name!r} is unknown; {hint}")
