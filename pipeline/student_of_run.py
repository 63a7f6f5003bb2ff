"""The untrained student of a run: what identifies it, and whether the one on disk is that and is undamaged."""

from __future__ import annotations

from abc import ABC, abstractmethod
from functools import cached_property
from pathlib import Path
from typing import Any

from ..errors import DamagedStoreError, ModelNotFoundError, StageError
from ..extract import Corpus
from ..hub import ModelSource, config_geometry, find_model, model_geometry
from ..store import KVGeometry, digest_json
from ..store.sealed import check_record
from ..train.settings import ByteLevelBPE
from .places import RECORD, Places, read_record
from .recipe import Recipe


class StudentOfRun(Places, ABC):
    """The paths of a run, and its untrained student."""

    def __init__(self, recipe: Recipe) -> None:
        """The run that a recipe describes."""
        super().__init__(Path(recipe.run_dir).expanduser(), recipe.train.name)
        self.recipe = recipe
        self.quick = False
        """Whether large files are compared with their records by size alone: for `kava status`, which only looks."""

    @property
    @abstractmethod
    def corpus(self) -> Corpus:
        """The corpus that models read."""

    @property
    def has_student(self) -> bool:
        """Whether the untrained student is made, with the settings that the recipe has now."""
        record = read_record(self.student_dir)
        try:
            return bool(record) and record.get("key") == self.student_key
        except ModelNotFoundError:  # It is made from a model of another name, which is not on this machine.
            return False
        except StageError:  # Its tokenizer is trained on a corpus that is still to be written.
            return False

    @property
    def student_source(self) -> ModelSource:
        """The student's folder.

        Raises:
            StageError: if it is not made yet, or for other settings.
            DamagedStoreError: if a file of it is not as it was written.
        """
        _ = self.student_weights
        return find_model(str(self.student_dir.resolve()))

    @cached_property
    def student_weights(self) -> str:
        """The digest of the student's weights: from its record, after its files were compared with that.

        Raises:
            StageError: if the student is not made yet, or for other settings.
            DamagedStoreError: if a file of it is not as it was written.
        """
        folder = self.student_dir
        if not folder.is_dir():
            raise StageError(f"{folder} is not made yet; kava run --only student")
        record = read_record(folder)
        if not record:
            raise DamagedStoreError(f"{folder / RECORD}: damaged: it is missing. Run kava repair")
        if record.get("key") != self.student_key:
            raise StageError(f"{folder} is stale: student settings or corpus changed; kava run --only student")
        check_record(folder, record, quick=self.quick)
        return str(record["weights"])

    def forget_student(self) -> None:
        """Read the student again when it is used next: it was made again."""
        for name in ("student_weights", "student_geometry", "reference_manifest"):
            self.__dict__.pop(name, None)

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
    def student_key(self) -> str:
        """What determines the untrained student, as a digest.

        That is its settings, the content of the models that they name, and the texts of a tokenizer trained here.

        Raises:
            ModelNotFoundError: if one of those models cannot be reached, and no student was made from it.
        """
        settings = self.recipe.student
        trained = isinstance(settings.tokenizer, ByteLevelBPE)
        corpus = self.corpus.digest if trained else None
        return digest_json({"settings": settings.determining(), "origin": self.student_origin, "corpus": corpus})

    @cached_property
    def student_origin(self) -> dict[str, Any]:
        """Digests of the model and the tokenizer that the student is made from.

        Where these are not on this machine, what the record of the student says of models of the same names.

        Raises:
            ModelNotFoundError: if they cannot be reached, and no student was made from them.
        """
        from ..train.student import student_origin

        try:
            return student_origin(self.recipe.student)
        except ModelNotFoundError:
            record = read_record(self.student_dir)
            if record.get("names") != self.recipe.student.names():
                raise
            return dict(record["origin"])

    @property
    def student_record(self) -> dict[str, Any]:
        """What the record of the untrained student says of its origin."""
        return {"key": self.student_key, "names": self.recipe.student.names(), "origin": self.student_origin}
