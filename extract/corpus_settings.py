"""The recipe's `corpus` section."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field, PositiveInt, model_validator


class _Settings(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class FieldNames(_Settings):
    """Names of the record's fields in the file; a name that no record has is an error."""

    id: str | None = None
    """Field with the sample's id; `id` if None, and a digest of the content where a record has none."""
    prompt: str | None = None
    rationale: str | None = None
    answer: str | None = None
    text: str | None = None
    messages: str | None = None

    @property
    def content(self) -> dict[str, str]:
        """The content fields that are named, by role; empty if the format is to be recognised."""
        return {role: name for role, name in self if role != "id" and name is not None}


class HeldoutSettings(_Settings):
    """Held-out samples: a share of them, a share (or a list) of the values of a group field, or a file."""

    ratio: float | None = Field(None, gt=0, lt=1)
    """Share of the samples, or of the groups if `group` is set."""
    group: str | None = None
    """A field of the records; samples of one group are never split."""
    values: tuple[str, ...] | None = None
    """Values of the group field that are held out."""
    path: str | tuple[str, ...] | None = None
    """Files of held-out records, named as in `corpus.path`."""
    seed: int = 0
    """Seed of the random choice."""

    @model_validator(mode="after")
    def _one_way(self) -> HeldoutSettings:
        ways = [name for name in ("ratio", "values", "path") if getattr(self, name) is not None]
        if len(ways) != 1:
            raise ValueError("give exactly one of ratio, values or path")
        if self.values is not None and self.group is None:
            raise ValueError("values needs group, the field they are values of")
        return self


class SplitSettings(_Settings):
    """One field that holds the rationale and the answer."""

    field: str
    """Name of the field in the file."""
    at: str = Field(min_length=1)
    """Mark that begins the answer, for example `####`; its last occurrence counts."""


class CorpusSettings(_Settings):
    """Location and layout of the records."""

    path: str | tuple[str, ...]
    """Files, globs, folders, hub ids or `hf://` addresses; one or a list."""
    subset: str | None = None
    """Configuration name of a hub data set."""
    split: str | SplitSettings = "train"
    """Split of a hub data set, or the field and the mark at which rationale and answer are split."""
    hub_split: str | None = None
    """Split of a hub data set if `split` is a mapping; `train` if None."""
    revision: str | None = None
    """Revision of a hub data set."""
    fields: FieldNames = FieldNames()
    separator: str = "\n"
    """Text between two fields in the canonical text."""
    answer_prefix: str = ""
    """Text put before an answer that does not begin with it."""
    drop_last_step: bool = False
    """Leave out the last step of each rationale."""
    heldout: HeldoutSettings | None = None
    limit: PositiveInt | None = None
    """Number of records to read; all if None."""

    @model_validator(mode="after")
    def _one_hub_split(self) -> CorpusSettings:
        if self.hub_split is not None and isinstance(self.split, str) and self.split != "train":
            raise ValueError("split and hub_split both name the split of a hub data set; give one")
        if not self.paths:
            raise ValueError("path: give at least one file")
        return self

    @property
    def paths(self) -> tuple[str, ...]:
        """`path` as a tuple."""
        return (self.path,) if isinstance(self.path, str) else self.path

    @property
    def label(self) -> str:
        """`path` for messages."""
        return ", ".join(self.paths)

    @property
    def hub_split_name(self) -> str:
        """Split of a hub data set."""
        return self.hub_split or (self.split if isinstance(self.split, str) else "train")

    @property
    def text_split(self) -> SplitSettings | None:
        """Where rationale and answer are split, if the recipe says so."""
        return self.split if isinstance(self.split, SplitSettings) else None
