"""The stage that fills slots: a store with the same number of them for every sample, made part by part."""

from __future__ import annotations

from contextlib import closing
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from ...errors import StageError
from ...extract.rope import RotaryTable, rotary_tables
from ...hub import ModelSource, load_config
from ...store import SEGMENTS, ExtraArray, KVSample, KVStore, Manifest, default_page_tokens
from ...store.dtypes import dtype_of
from ..parallel import walk
from ..project_stage import ProjectStage
from ..store_stages import TransformStage
from ..transform import load_projector, open_unchanged
from .rules import Candidates, Selector

if TYPE_CHECKING:
    from ..recipe import SelectSettings

NO_TOKEN: Final = -1
"""The token id of a slot, and the index of an empty one: every layer and head may have a token of its own."""


@dataclass(frozen=True)
class Selection:
    """What to do to every part; small, and safe to send to another machine that sees the same files."""

    parent: str
    """The teacher store."""
    out: str
    """The store to write; it exists."""
    fingerprint: str
    """Of that store: another one in its place is not written to."""
    selector: Selector
    segment: int
    """Tokens of this segment are candidates."""
    rotary: ModelSource | None
    """The teacher, to rotate keys as it does before they are compared; None to compare them as stored."""
    projector: str | None
    """The fitted projector; None to stay in the teacher's geometry."""
    calibration: str = ""
    """What the projector was fitted on; empty if on nothing, or if there is none."""

    def __call__(self, part: int) -> int:
        """Writes one part and returns its number."""
        parent, out = KVStore.open(self.parent), open_unchanged(self.out, self.fingerprint)
        reader = parent.part(part)
        read = partial(reader.sample, extras=self.selector.needs_importance)
        with out.write_part(part) as writer, closing(walk(reader, read, writer.fail)) as samples:
            for position, source in samples:
                places = np.flatnonzero(source.segments == self.segment)
                if self.selector.needs_importance and np.isnan(source.extras["importance"][places]).any():
                    reason = "no importance to select by: the sample has no answer"
                    writer.fail(position, source.sample_id, source.split, reason)
                    continue
                writer.append(position, self.slots(source, places))
            sources = {"calibration": self.calibration} if self.calibration else {}
            writer.commit({"parent": reader.content, **sources})
        return part

    def slots(self, source: KVSample, places: np.ndarray[Any, Any]) -> KVSample:
        """The slots of one sample, filled from its tokens at `places`; slots without a token are zero and masked."""
        import torch

        assert source.keys is not None
        assert source.values is not None
        size, shape = self.selector.tokens, source.keys.shape[1:]
        indices = torch.full((size, *shape[:2]), NO_TOKEN, dtype=torch.int64)
        scores = torch.full((size, *shape[:2]), float("nan"), dtype=torch.float64)
        keys, values = torch.zeros((2, size, *shape), dtype=source.keys.dtype)
        filled = min(size, len(places))
        if filled:
            chosen, scores[:filled] = self.selector(self._candidates(source, places))
            indices[:filled] = torch.from_numpy(places)[chosen]
            gather = indices[:filled, :, :, None].expand(-1, -1, -1, shape[2])
            keys[:filled], values[:filled] = source.keys.gather(0, gather), source.values.gather(0, gather)
        if self.projector is not None:
            projector = load_projector(self.projector)
            keys, values = projector.apply("keys", keys), projector.apply("values", values)
            keys[filled:], values[filled:] = 0, 0
        return KVSample(
            sample_id=source.sample_id,
            split=source.split,
            keys=keys,
            values=values,
            input_ids=np.full(size, NO_TOKEN, np.int32),
            positions=np.arange(size, dtype=np.int32),
            spans=np.zeros((size, 2), np.int32),
            segments=np.full(size, self.segment, np.uint8),
            mask=np.arange(size) < filled,
            extras={"indices": indices.numpy().astype(np.int32), "scores": scores.numpy().astype(np.float32)},
        )

    def _candidates(self, source: KVSample, places: np.ndarray[Any, Any]) -> Candidates:
        import torch

        assert source.keys is not None
        keys = source.keys[torch.from_numpy(places)].float()
        if self.rotary is not None:
            positions = torch.from_numpy(source.positions).long()
            tables = _tables(self.rotary, int(positions.max()) + 1)
            turned = [table.at(positions[places]).rotate(keys[:, layer]) for layer, table in enumerate(tables)]
            keys = torch.stack(turned, dim=1)
        importance = source.extras.get("importance")
        return Candidates(source.sample_id, keys, None if importance is None else torch.from_numpy(importance[places]))


class SelectStage(TransformStage):
    """Slots: some tokens of a teacher's capture, for each layer and KV head its own."""

    name = "select"

    @property
    def output(self) -> Path:
        """The store of slots."""
        return self.run.selected_path(self._teacher)

    @property
    def _settings(self) -> SelectSettings:
        assert self.run.recipe.select is not None
        return self.run.recipe.select

    def manifest(self) -> Manifest:
        """The capture's, but for what selection changes."""
        run, settings, parent = self.run, self._settings, self.run.parent_manifest(self._teacher)
        heads = (parent.geometry.num_layers, parent.geometry.num_key_value_heads)
        fields: dict[str, Any] = {"geometry": parent.geometry, "dtype": parent.dtype, "codec": parent.codec}
        parents = {"teacher": parent.fingerprint}
        if settings.geometry == "student":
            fields = {"geometry": run.student_geometry, **run.recipe.project.model_dump(include={"dtype", "codec"})}
            parents["target"] = run.target_manifest(self._teacher).fingerprint
        pages = default_page_tokens(fields["geometry"], dtype_of(fields["dtype"]).itemsize, fields["codec"])
        kept = parent.model_dump(exclude={"fingerprint", "versions", "parameters"})
        return Manifest(
            **kept
            | fields
            | {
                "kind": "selected",
                "page_tokens": min(pages, settings.tokens),  # A sample of few slots is one page, without padding.
                "parameters": {"select": settings.content()},
                "parents": parents,
                "extras": {
                    "indices": ExtraArray(axis="row", dtype="int32", shape=heads),
                    "scores": ExtraArray(axis="row", dtype="float32", shape=heads),
                },
            }
        )

    def parent(self) -> KVStore:
        """The teacher store."""
        return KVStore.open(self.run.teacher_path(self._teacher))

    def prepare(self, parent: KVStore) -> Selection:
        """What to do to each part.

        Raises:
            StageError: if the capture has no importance and the method needs it, or the projector is not fitted.
        """
        settings, selector = self._settings, self._settings.selector
        if selector.needs_importance and "importance" not in parent.manifest.extras:
            raise StageError(
                f"{parent.path} has no importance, which select.method: {selector.method} needs; capture it again with "
                "extract.importance: true (kava extract --force)"
            )
        rotated = settings.keys == "rotated" and selector.compares_keys
        return Selection(
            parent=str(parent.path.resolve()),
            out=str(self.building.resolve()),
            fingerprint=self.manifest().fingerprint,
            selector=selector,
            segment=int(SEGMENTS[settings.segment]),
            rotary=self.run.teacher_source(self._teacher) if rotated else None,
            projector=self._projector() if settings.geometry == "student" else None,
            calibration=self.calibration(),
        )

    def calibration(self) -> str:
        """What the projector that is applied was fitted on."""
        if self._settings.geometry == "teacher":
            return ""
        return ProjectStage(self.run, self._teacher).calibration()

    def _projector(self) -> str:
        path = self.run.projector_path(self._teacher)
        if not ProjectStage(self.run, self._teacher).is_fitted():
            raise StageError(
                f"{path} is not fitted for this recipe yet, which select.geometry: student needs; kava project"
            )
        return str(path.resolve())


_reading = Lock()


@lru_cache(maxsize=64)
def _tables(source: ModelSource, count: int) -> list[RotaryTable]:
    """Of positions `0 .. count`, as in a forward pass over them alone."""
    import torch

    with _reading:  # transformers builds models under settings of the whole process.
        return rotary_tables(load_config(source), torch.arange(count))
