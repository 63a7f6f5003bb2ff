"""A recipe at a place: what each output is made from, and the manifest that each store must have.

Everything here is worked out from the recipe and its inputs, nothing is remembered: two processes, or two nodes, come
to the same manifests.
"""

from __future__ import annotations

import re
from array import array
from functools import cached_property
from pathlib import Path
from typing import Any

from ..errors import AlignmentError, StageError, StoreNotFoundError
from ..extract import Corpus, CorpusSettings, Encoder, load_corpus
from ..extract.corpus import HeldoutSettings
from ..extract.generate import GenerateSettings
from ..extract.signals import signal_arrays
from ..hub import (
    ModelSource,
    config_geometry,
    find_model,
    load_tokenizer,
    model_geometry,
    model_identity,
    stop_token_ids,
    token_digests,
    weights_digest,
)
from ..store import KVGeometry, KVStore, Manifest, ModelIdentity, Split, digest_json
from ..store.dtypes import dtype_of
from ..store.files import check_regular
from ..store.manifest import default_page_tokens
from ..train.settings import TrainSettings
from .fuse.view import FusedTargets
from .maps.heads import HEAD_MAPS
from .maps.layers import FITTED, LayerMap, layer_map
from .parts import BYTES_PER_TOKEN, draw_calibration, samples_per_part
from .places import Places, read_record
from .recipe import Recipe, TeacherSettings
from .transform import inherited_extras


class Run(Places):
    """A recipe, resolved."""

    def __init__(self, recipe: Recipe) -> None:
        super().__init__(Path(recipe.run_dir).expanduser(), recipe.train.name)
        self.recipe = recipe
        self.corpus_was_described = False
        """Whether people were told how the corpus is read."""

    # What they are made from.

    @cached_property
    def prompts(self) -> Corpus:
        """The corpus that the recipe names, read once."""
        return load_corpus(self.recipe.corpus)

    @cached_property
    def corpus(self) -> Corpus:
        """The corpus that models read: the recipe's, or what a teacher wrote for its prompts.

        Raises:
            StageError: if that is not written yet, or for other prompts or settings.
        """
        if self.recipe.extract.generate is None:
            return self.prompts
        record = read_record(self.generated_dir)
        if record.get("key") != self.generate_key or "kept" not in record:
            raise StageError(f"{self.generated_dir} is not written yet, or is stale; kava run --only generate")
        check_regular(self.generated_dir / "corpus.jsonl")
        return load_corpus(self.corpus_settings)

    @property
    def corpus_settings(self) -> CorpusSettings:
        """Where `corpus` is read from."""
        if self.recipe.extract.generate is None:
            return self.recipe.corpus
        heldout = None
        if self.prompts.split(Split.HELDOUT):
            heldout = HeldoutSettings(ratio=None, group="split", values=("heldout",))
        path = str((self.generated_dir / "corpus.jsonl").resolve())
        return CorpusSettings(path=path, separator=self.recipe.corpus.separator, heldout=heldout)

    @property
    def generate_settings(self) -> GenerateSettings:
        """How the teacher writes."""
        assert self.recipe.extract.generate is not None
        return self.recipe.extract.generate

    @property
    def generating_teacher(self) -> str:
        """The teacher that writes the corpus."""
        name = self.generate_settings.teacher or next(iter(self.recipe.teachers))
        self.teacher(name)
        return name

    @cached_property
    def generate_key(self) -> str:
        """What determines the corpus that a teacher writes."""
        name = self.generating_teacher
        return digest_json(
            {
                "settings": self.generate_settings.model_dump(mode="json", exclude={"chunk", "teacher"}),
                "prompts": self.prompts.digest,
                "teacher": self.teacher_identity(name).model_dump(mode="json"),
                "tokens": token_digests(
                    self.teacher_source(name),
                    chat_template=self.teacher(name).chat_template,
                    date=self.teacher(name).chat_template_date,
                ),
                "stop_ids": self.stop_ids(name),
                "quantization": self.teacher(name).engine.quantization,
            }
        )

    @cached_property
    def calibration(self) -> Corpus:
        """The training samples that a fitted map is fitted on: a seeded choice from some parts, in corpus order."""
        return self.corpus.subset(self._calibration[1])

    @property
    def calibration_parts(self) -> list[int]:
        """The parts that hold the calibration: all that `extract.keep: target` keeps of a capture."""
        return self._calibration[0]

    @cached_property
    def _calibration(self) -> tuple[list[int], list[int]]:
        project, train = self.recipe.project, self.corpus.split(Split.TRAIN)
        return draw_calibration(train, len(self.corpus), self._part_size, project.calibration_samples, project.seed)

    @property
    def _part_size(self) -> int:
        """Samples in a part, from a capture that is there: its teacher need not be on this machine."""
        for name in self.recipe.teachers:
            path = self.teacher_path(name)
            if (path / "zarr.json").exists():
                return KVStore.open(path).manifest.samples_per_part
        return self.samples_per_part

    def teacher(self, name: str) -> TeacherSettings:
        """A teacher's settings.

        Raises:
            StageError: if the recipe has none of this name.
        """
        if name not in self.recipe.teachers:
            raise StageError(f"there is no teacher {name!r} in the recipe, only {', '.join(self.recipe.teachers)}")
        return self.recipe.teachers[name]

    @property
    def train_teacher(self) -> str:
        """The teacher whose targets the student is trained on, or the name of the fused ones; see `teacher_of`."""
        return self.teacher_of(self.recipe.train)

    def teacher_of(self, settings: TrainSettings) -> str:
        """The teacher whose targets these settings name, or the name of the fused ones.

        Raises:
            StageError: if there are several and the recipe neither names nor fuses any.
        """
        named, fuse = settings.teacher, self.recipe.fuse
        if named is None and len(self.recipe.teachers) > 1:
            if fuse is None:
                raise StageError(f"train.teacher: name one of {', '.join(self.recipe.teachers)}, or add a fuse section")
            named = fuse.name
        name = named or next(iter(self.recipe.teachers))
        if fuse is not None and name == fuse.name:
            return name
        self.teacher(name)
        return name

    def teacher_source(self, name: str) -> ModelSource:
        """Where a teacher's weights are."""
        settings = self.teacher(name)
        return find_model(settings.model, revision=settings.revision, trust_remote_code=settings.trust_remote_code)

    def teacher_encoder(self, name: str) -> Encoder:
        """A teacher's tokenizer, with its chat template if the recipe asks for it."""
        settings = self.teacher(name)
        return Encoder(
            load_tokenizer(self.teacher_source(name)),
            chat_template=settings.chat_template,
            chat_template_date=settings.chat_template_date,
        )

    def stop_ids(self, name: str) -> list[int]:
        """Ids that end what a teacher writes: those of the model, and the end of a turn in its chat template."""
        return sorted({*stop_token_ids(self.teacher_source(name)), *self.teacher_encoder(name).stop_ids})

    def teacher_identity(self, name: str) -> ModelIdentity:
        """What determines a teacher's numbers."""
        return model_identity(self.teacher_source(name), compute_dtype=self.teacher(name).dtype)

    def teacher_geometry(self, name: str) -> KVGeometry:
        """A teacher's KV geometry: counted, and checked against what the recipe states.

        Raises:
            AlignmentError: if the recipe states another.
        """
        counted = model_geometry(self.teacher_source(name))
        stated = self.teacher(name).geometry
        if stated is not None and stated != counted:
            raise AlignmentError(f"teachers.{name}.geometry: the recipe states {stated}, the model has {counted}")
        return counted

    @property
    def has_student(self) -> bool:
        """Whether the untrained student is made, with the settings that the recipe has now."""
        key = read_record(self.student_dir).get("key")
        try:
            return key is not None and bool(key == self.student_key)
        except StageError:  # Its tokenizer is trained on a corpus that is still to be written.
            return False

    @property
    def student_source(self) -> ModelSource:
        """The student's folder.

        Raises:
            StageError: if it is not made yet, or for other settings.
        """
        if not self.student_dir.is_dir():
            raise StageError(f"{self.student_dir} is not made yet; kava run --only student")
        if not self.has_student:
            raise StageError(
                f"{self.student_dir} is stale: student settings or corpus changed; kava run --only student"
            )
        return find_model(str(self.student_dir.resolve()))

    @cached_property
    def student_geometry(self) -> KVGeometry:
        """The student's KV geometry."""
        return model_geometry(self.student_source)

    def planned_student_geometry(self) -> KVGeometry:
        """The student's KV geometry, also before it is made.

        Raises:
            ModelNotFoundError: if it is a model that cannot be reached.
        """
        settings = self.recipe.student
        if self.has_student:
            return self.student_geometry
        if settings.model is not None:
            from ..train.student import model_source

            return model_geometry(model_source(settings))
        from ..train.student import student_config

        return config_geometry(student_config(settings, None))

    @cached_property
    def samples_per_part(self) -> int:
        """Samples in a part of every store of this run: the recipe's number, or at most about 1 GiB of any teacher."""
        if self.recipe.samples_per_part is not None:
            return self.recipe.samples_per_part
        dtype = dtype_of(self.recipe.extract.dtype)
        stated = {name: t.geometry or self.teacher_geometry(name) for name, t in self.recipe.teachers.items()}
        return min(self._parts_of(self.corpus, geometry, dtype.itemsize) for geometry in stated.values())

    def _parts_of(self, corpus: Corpus, geometry: KVGeometry, itemsize: int) -> int:
        row = geometry.bytes_per_token(itemsize)
        return samples_per_part(array("d", (size / BYTES_PER_TOKEN * row for size in corpus.text_bytes)))

    # What the stores must say of themselves.

    @cached_property
    def student_key(self) -> str:
        """What determines the untrained student: its settings, and the texts of a tokenizer trained here."""
        settings = self.recipe.student.determining()
        trained = isinstance(settings["tokenizer"], dict)
        return digest_json({"settings": settings, "corpus": self.corpus.digest if trained else None})

    def teacher_manifest(self, name: str) -> Manifest:
        """The manifest of a teacher's capture."""
        settings, source, extract = self.teacher(name), self.teacher_source(name), self.recipe.extract
        tokens = token_digests(source, chat_template=settings.chat_template, date=settings.chat_template_date)
        quantization = settings.engine.quantization
        geometry = self.teacher_geometry(name)
        return self._manifest(
            kind="capture",
            parameters={"quantization": quantization} if quantization else {},
            geometry=geometry,
            dtype=extract.dtype,
            codec=extract.codec,
            extras=signal_arrays(
                geometry, importance=extract.importance, confidence=extract.confidence, logits=extract.logits
            ),
            model=self.teacher_identity(name),
            tokenizer_digest=tokens[0],
            chat_template_digest=tokens[1],
        )

    def shared_path(self, name: str) -> Path | None:
        """Where the capture of a teacher is kept for other runs too: a name of its own for every content and codec."""
        if self.recipe.store_dir is None:
            return None
        manifest = self.teacher_manifest(name)
        model = re.sub(r"[^A-Za-z0-9.-]+", "-", manifest.model.id.rsplit("/", 1)[-1]).lstrip(".")
        folder = Path(self.recipe.store_dir).expanduser().resolve()
        return folder / f"{model}-{manifest.fingerprint[:16]}-{manifest.codec}.zarr"

    def parent_manifest(self, name: str) -> Manifest:
        """What is projected: the capture on disk, or the one that the recipe would make.

        With the capture at hand, neither the teacher nor its tokenizer need be on this machine.
        """
        path = self.teacher_path(name)
        return KVStore.open(path).manifest if (path / "zarr.json").exists() else self.teacher_manifest(name)

    @cached_property
    def reference_manifest(self) -> Manifest:
        """The manifest of the student's own keys and values before training."""
        return self._student_manifest(
            kind="capture",
            geometry=self.student_geometry,
            dtype="float32",
            codec="blosc-zstd",  # It is small, and what maps are fitted to: a lossy one is for targets.
            model=model_identity(self.student_source, compute_dtype="float32"),
            num_samples=len(self.calibration),
            samples_per_part=self.recipe.samples_per_part or self._parts_of(self.calibration, self.student_geometry, 4),
            corpus_digest=self.calibration.digest,
        )

    def resampled_manifest(self, name: str) -> Manifest:
        """The manifest of a teacher's capture on the student's tokens."""
        parent = self.parent_manifest(name)
        return self._student_manifest(
            kind="resampled",
            geometry=parent.geometry,
            dtype=parent.dtype,
            codec=parent.codec,
            model=parent.model,
            samples_per_part=parent.samples_per_part,
            parameters={"resample": self.resampling},
            teacher=parent,
            parents={"teacher": parent.fingerprint},
        )

    def target_manifest(self, name: str) -> Manifest:
        """The manifest of the targets made from a teacher."""
        parent = self.parent_manifest(name)
        project = self.recipe.project
        parents = {"teacher": parent.fingerprint}
        if self.recipe.resample.materialize:
            parents["resampled"] = self.resampled_manifest(name).fingerprint
        if self.needs_reference:
            parents["reference"] = self.reference_manifest.fingerprint
        fit: dict[str, Any] = project.model_dump(include={"heads", "per", "scale", "seed"})
        # A map that is chosen at the fit is named by how it is chosen, and on what: that determines it.
        fit["layers"] = self.layers(name) or project.layers
        if project.layers == "best":
            fit["top_k"] = project.top_k
        if project.layers == "best" or project.heads == "ridge":
            fit["ridge"] = project.ridge
        if self.needs_reference or HEAD_MAPS[project.heads].needs == "teacher" or project.scale == "unit":
            fit["calibration"] = self.calibration.digest
        return self._student_manifest(
            kind="target",
            geometry=self.student_geometry,
            dtype=project.dtype,
            codec=project.codec,
            model=parent.model,
            samples_per_part=parent.samples_per_part,
            parameters={"resample": self.resampling, "project": fit},
            teacher=parent,
            parents=parents,
        )

    @property
    def resampling(self) -> dict[str, Any]:
        """What determines how time is resampled."""
        return self.recipe.resample.model_dump(include={"method", "across_segments"})

    @property
    def needs_reference(self) -> bool:
        """Whether layers or heads are fitted against the student's own keys and values."""
        return HEAD_MAPS[self.recipe.project.heads].needs == "student" or self.recipe.project.layers in FITTED

    def layers(self, name: str) -> LayerMap | None:
        """Teacher layers for each student layer; None where the fit chooses them: the projector has them then."""
        source = self.parent_manifest(name).geometry
        return layer_map(self.recipe.project.layers, source.num_layers, self.student_geometry.num_layers)

    def trained_key(self, settings: TrainSettings) -> str:
        """What determines a trained student: read from the targets on disk, nothing is asked of a teacher.

        Args:
            settings: how it is trained.

        Raises:
            StoreNotFoundError: if the targets are not made yet.
        """
        student = self._student_weights  # First: where nothing is made yet, it is what is to be made first.
        targets = self.open_target(self.teacher_of(settings))
        content = [targets.manifest.fingerprint, targets.content]
        return digest_json({"settings": settings.determining(), "student": student, "targets": content})

    @cached_property
    def _student_weights(self) -> str:
        return weights_digest(Path(self.student_source.location))

    def open_target(self, name: str) -> KVStore | FusedTargets:
        """The targets made from a teacher, or the fused ones.

        Raises:
            StoreNotFoundError: if they are not made yet.
            StageError: if targets that are fused while they are read are others now.
        """
        fuse = self.recipe.fuse
        if fuse is None or fuse.materialize or name != fuse.name:
            path = self.target_path(name)
            try:
                store = KVStore.open(path)
            except StoreNotFoundError:
                verb = "project" if fuse is None or name != fuse.name else "fuse"
                raise StoreNotFoundError(f"{path} is not made yet; kava {verb}") from None
            store.check_files()
            return store
        view = FusedTargets.open(self.fusion_path(name), {n: self.target_path(n) for n in self.recipe.fused_teachers})
        view.check()
        return view

    def _student_manifest(self, teacher: Manifest | None = None, **fields: Any) -> Manifest:
        student = self.recipe.student
        tokens = token_digests(
            self.student_source, chat_template=student.chat_template, date=student.chat_template_date
        )
        if teacher is not None:
            fields["extras"] = inherited_extras(teacher, *tokens)
        return self._manifest(tokenizer_digest=tokens[0], chat_template_digest=tokens[1], **fields)

    def _manifest(self, **fields: Any) -> Manifest:
        pages = default_page_tokens(fields["geometry"], dtype_of(fields["dtype"]).itemsize, fields["codec"])
        defaults: dict[str, Any] = {
            "page_tokens": pages,
            "num_samples": len(self.corpus),
            "corpus_digest": self.corpus.digest,
        }
        if "samples_per_part" not in fields:
            defaults["samples_per_part"] = self.samples_per_part
        return Manifest(**(defaults | fields))
