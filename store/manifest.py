"""What a store says about itself.

The *content* of a store is determined by everything in the manifest except the library versions and a lossless codec (a
lossy one is content: it changes numbers); the fingerprint is a digest of exactly that. Two stores with the same
fingerprint hold the same numbers within rounding of the dtype that they were computed in; parts whose `written_by`
(backend, library versions, device, tokens of a batch) is the same too are equal bit for bit under Hugging Face.
"""

from __future__ import annotations

import math
from importlib import metadata
from typing import Annotated, Any, Final, Literal, Self

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    computed_field,
    field_validator,
    model_validator,
)

from ..errors import StoreError, StoreFormatError
from .dtypes import dtype_of
from .extras import ExtraArray, check_names
from .fingerprint import digest_json
from .geometry import KVGeometry
from .quantize import LOSSY
from .safe_json import shortened

FORMAT_VERSION: Final = 2
"""Version of the on-disk format. Version 1 had no index, and checksums of files that depended on their length alone."""

MAX_SAMPLES: Final = 1 << 27
"""Upper bound of samples. Readers allocate a few numbers for each: 1 GiB of lengths."""

MAX_PARTS: Final = 1 << 20
"""Upper bound of parts: each is a folder, and lists of their numbers are built."""

MAX_PART_SAMPLES: Final = 1 << 20
"""Upper bound of samples in one part, whose small arrays are read at once."""

MAX_PAGE_TOKENS: Final = 1 << 16
"""Upper bound of rows in one page; kava writes 64 at most."""

MAX_PAGE_BYTES: Final = 1 << 30
"""Upper bound of the raw bytes of one page of any array: it is decoded in one piece, and Blosc holds 2 GiB at most."""

MAX_SAMPLE_BYTES: Final = 4 << 30
"""Upper bound of the bytes of an extra array of samples in the whole store, which is read at once."""

MAX_EXTRAS: Final = 256
"""Upper bound of extra arrays."""

_Name = Annotated[str, Field(max_length=4096)]
"""A name or digest, which messages quote."""

_NOT_CONTENT: Final = ("versions", "fingerprint")


class _Strict(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class ModelIdentity(_Strict):
    """Which weights made the numbers."""

    id: _Name
    """The name given by the recipe: a hub id, or the last part of a local path."""
    revision: _Name | None = None
    """The resolved commit of a hub model."""
    weights_digest: _Name | None = None
    """The digest of local weights."""
    compute_dtype: _Name
    """The dtype of the forward pass."""
    rope: dict[str, Any] = Field(default_factory=dict)
    """The model's `rope_parameters`; stored keys are un-rotated, this is what to rotate them with."""


class Manifest(_Strict):
    """The manifest of a store, format version 2."""

    format_version: Literal[2] = FORMAT_VERSION
    kind: Literal["capture", "resampled", "target", "selected"]
    """`capture`: as computed; `resampled`: on the student's tokens; `target`: in the student's geometry too;
    `selected`: the same number of slots for every sample, each filled from a token of its own per layer and head."""
    geometry: KVGeometry
    dtype: Literal["bfloat16", "float16", "float32"]
    codec: _Name
    page_tokens: Annotated[int, Field(gt=0, le=MAX_PAGE_TOKENS)]
    """Rows per page; a page is one chunk and belongs to one sample."""
    num_samples: Annotated[int, Field(ge=0, le=MAX_SAMPLES)]
    samples_per_part: Annotated[int, Field(gt=0, le=MAX_PART_SAMPLES)]
    model: ModelIdentity
    tokenizer_digest: _Name
    """The tokenizer of this store's time axis."""
    chat_template_digest: _Name | None = None
    corpus_digest: _Name
    parameters: dict[str, Any] = Field(default_factory=dict)
    """The parameters of the stage that made this store."""
    parents: dict[_Name, _Name] = Field(default_factory=dict)
    """Fingerprints of what this store was made from."""
    extras: dict[_Name, ExtraArray] = Field(default_factory=dict, max_length=MAX_EXTRAS)
    """Further arrays that every part holds, by name."""
    versions: dict[_Name, _Name] = Field(default_factory=lambda: library_versions())
    """Library versions of the writer: provenance, not content."""

    @field_validator("extras")
    @classmethod
    def _plain_names(cls, extras: dict[str, ExtraArray]) -> dict[str, ExtraArray]:
        check_names(extras)
        return extras

    @model_validator(mode="after")
    def _plausible(self) -> Self:
        """Refuse sizes that no reader could allocate or count through."""
        page = self.page_tokens * math.prod(self.geometry.shape) * dtype_of(self.dtype).itemsize
        sizes = [("num_parts", self.num_parts, MAX_PARTS), ("bytes of a page of keys", page, MAX_PAGE_BYTES)]
        for name, kind in self.extras.items():
            if kind.axis == "row":
                sizes.append((f"bytes of a page of {name}", self.page_tokens * kind.entry_bytes, MAX_PAGE_BYTES))
            else:
                sizes.append((f"bytes of {name}", self.num_samples * kind.entry_bytes, MAX_SAMPLE_BYTES))
        for what, size, limit in sizes:
            if size > limit:
                raise ValueError(f"{what}: {size:,}, at most {limit:,} are read")
        return self

    @computed_field  # type: ignore[prop-decorator]
    @property
    def fingerprint(self) -> str:
        """A digest of everything that determines the content, within rounding."""
        lossless = () if self.codec in LOSSY else ("codec",)
        content = self.model_dump(mode="json", exclude={*_NOT_CONTENT, *lossless})
        if not self.extras:  # As if there were no such field: stores from before it keep their fingerprint.
            del content["extras"]
        return digest_json(content)

    @property
    def num_parts(self) -> int:
        """Parts of the complete store."""
        return -(-self.num_samples // self.samples_per_part)

    def part_samples(self, part: int) -> range:
        """The samples of part `part`, as indices into the store."""
        first = part * self.samples_per_part
        return range(first, min(first + self.samples_per_part, self.num_samples))

    def place(self, index: int) -> tuple[int, int]:
        """The part of sample `index`, and its position there; negative ones count from the end.

        Raises:
            IndexError: if there is no such sample.
        """
        found = index + self.num_samples if index < 0 else index
        if not 0 <= found < self.num_samples:
            raise IndexError(f"sample {found} of {self.num_samples}")
        return divmod(found, self.samples_per_part)

    def differences(self, other: Manifest) -> dict[str, tuple[Any, Any]]:
        """Every field, by dotted name, in which two manifests differ; library versions do not count."""
        mine, theirs = (_flat(m.model_dump(mode="json", exclude={"versions", "fingerprint"})) for m in (self, other))
        names = sorted(mine.keys() | theirs.keys())
        return {name: (mine.get(name), theirs.get(name)) for name in names if mine.get(name) != theirs.get(name)}

    @classmethod
    def from_attributes(cls, attributes: dict[str, Any], where: str) -> Manifest:
        """Read the manifest from a Zarr group's attributes.

        Raises:
            StoreError: if this is no kava store, one of another format, or not as it was written.
        """
        raw = attributes.get("kava")
        if not isinstance(raw, dict):
            raise StoreError(f"{where} is not a kava store: its zarr.json has no 'kava' attribute")
        version = raw.get("format_version")
        if version != FORMAT_VERSION:
            older = isinstance(version, int) and version < FORMAT_VERSION
            advice = "write the store again with this kava" if older else "upgrade kava"
            raise StoreFormatError(
                f"{where} has store format {shortened(version)}, this kava reads {FORMAT_VERSION}. {advice}"
            )
        seals = {name: raw.get(name) for name in ("fingerprint", "digest")}
        if seals["digest"] != digest_json({k: v for k, v in raw.items() if k != "digest"}):
            raise StoreError(f"{where}/zarr.json was edited or damaged: its digest does not match its fields")
        try:
            manifest = cls.model_validate({k: v for k, v in raw.items() if k not in seals})
        except ValidationError as error:
            first = error.errors()[0]
            place = ".".join(str(p) for p in first["loc"])
            raise StoreError(f"{where}/zarr.json: manifest field {shortened(place)}: {first['msg']}") from None
        if seals["fingerprint"] != manifest.fingerprint:
            raise StoreError(f"{where}/zarr.json was edited: its fingerprint does not match its fields")
        return manifest

    def to_attributes(self) -> dict[str, Any]:
        """Return the attributes of a store's Zarr group: all fields, and a digest that covers provenance as well."""
        return sealed(self.model_dump(mode="json"))


def sealed(fields: dict[str, Any]) -> dict[str, Any]:
    """Return the attributes of a store's Zarr group with these fields of a manifest."""
    return {"kava": {**fields, "digest": digest_json(fields)}}


def default_page_tokens(geometry: KVGeometry, itemsize: int, codec: str = "blosc-zstd") -> int:
    """Tokens per page: the power of two, 64 at most, that keeps the raw page of keys at or under 1 MiB.

    64 for every lossy codec: the more tokens of keys share a scale, the fewer scales there are.
    """
    if codec in LOSSY:
        return 64
    row = geometry.num_layers * geometry.width * itemsize
    fitting = max(1, (1 << 20) // row)
    return int(min(64, 1 << (fitting.bit_length() - 1)))


def library_versions() -> dict[str, str]:
    """Versions of the libraries that could change a number."""
    found = {}
    for name in ("kava", "numpy", "torch", "transformers", "tokenizers", "zarr"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    if isinstance(value, dict) and value:
        return {k: v for name, sub in value.items() for k, v in _flat(sub, f"{prefix}{name}.").items()}
    return {prefix.removesuffix("."): value}
