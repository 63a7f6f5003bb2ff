"""`--force` with an input that turns out to be unusable: the command fails and the old output is complete."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from fixtures.command import kava, write_recipe
from fixtures.stores import flip, overwrite, tree

from kava.pipeline import load_recipe
from kava.pipeline.make import _exchange_if_complete
from kava.pipeline.run import Run
from kava.pipeline.store_stages import ResampleStage
from kava.store import KVStore
from kava.store.fingerprint import file_stamp
from kava.store.part_writer import PartWriter
from kava.store.replace import next_path

OUTPUTS = {
    "generate": "generated",
    "student": "student",
    "extract big": "teachers/big.zarr",
    "reference": "reference.zarr",
    "resample big": "resampled/big.zarr",
    "project big": "targets/big.zarr",
    "select big": "selected/big.zarr",
    "fuse": "targets/fused.zarr",
    "train": "students/kv",
}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, tiny_models: dict[str, Path]) -> Path:
    """A recipe whose stages are all complete, with models of its own that may be spoiled."""
    folder = tmp_path_factory.mktemp("forced")
    models = {name: shutil.copytree(path, folder / name) for name, path in tiny_models.items()}
    recipe: Path = write_recipe(
        folder,
        models,
        extract={"generate": {"max_new_tokens": 4, "chunk": 12}},
        resample={"materialize": True},
        select={"tokens": 4, "method": "uniform"},
        fuse={},
        train={"max_steps": 2, "eval_steps": None, "teacher": "fused"},
    )
    kava("run", recipe)
    return recipe


class Spoiler:
    """Spoils files and folders below a folder, until `undo`."""

    def __init__(self, root: Path) -> None:
        self._root, self._undo = root, list[Callable[[], object]]()

    def __call__(self, name: str, how: str) -> None:
        """Truncates a file, removes a folder or flips a byte."""
        path = self._root / name
        if how == "remove":
            aside = path.with_name(f"{path.name}.away")
            path.rename(aside)
            self._undo.append(lambda: aside.rename(path))
            return
        data = path.read_bytes()
        self._undo.append(lambda: overwrite(path, data))
        if how == "truncate":
            overwrite(path, data[: len(data) // 2])
        else:
            flip(path, len(data) // 2)

    def undo(self) -> None:
        """Puts everything back as it was."""
        while self._undo:
            self._undo.pop()()


@pytest.fixture
def spoil(made: Path) -> Iterator[Spoiler]:
    """For what lies beside the recipe."""
    spoiler = Spoiler(made.parent)
    yield spoiler
    spoiler.undo()


def _states(recipe: Path, *options: str) -> dict[str, str]:
    return {row["stage"]: row["state"] for row in json.loads(kava("status", recipe, *options, "--json"))["stages"]}


CASES = {
    "generate": ("teacher/model.safetensors", "truncate"),
    "student": ("student/model.safetensors", "truncate"),
    "extract big": ("teacher/model.safetensors", "truncate"),
    "reference": ("run/student/model.safetensors", "truncate"),
    "resample big": ("run/teachers/big.zarr/parts/00003", "remove"),
    "project big": ("run/resampled/big.zarr/parts/00003/keys/c/0/0/0/0", "flip"),
    "select big": ("run/teachers/big.zarr/parts/00003/keys/c/0/0/0/0", "flip"),
    "fuse": ("run/targets/big.zarr/parts/00003", "remove"),
}


@pytest.mark.parametrize("label", CASES)
def test_what_cannot_be_made_again_stays(made: Path, spoil: Spoiler, label: str) -> None:
    before = tree(made.parent / "run" / OUTPUTS[label])
    spoil(*CASES[label])
    stage = label.split()[0]
    printed = kava("run", made, "--only", stage, "--force", stage, code=None)
    assert printed.count("\n") < 8, printed
    if label != "reference":  # What was spoiled is itself an output there.
        assert tree(made.parent / "run" / OUTPUTS[label]) == before
    spoil.undo()
    assert tree(made.parent / "run" / OUTPUTS[label]) == before
    assert set(_states(made).values()) == {"complete"}
    if (made.parent / "run" / OUTPUTS[label]).suffix == ".zarr":
        assert "as they were written" in kava("verify", made.parent / "run" / OUTPUTS[label])


@pytest.mark.parametrize("label", ["extract big", "project big", "resample big", "select big"])
def test_a_share_that_cannot_be_made_again_stays(made: Path, spoil: Spoiler, label: str) -> None:
    before = tree(made.parent / "run" / OUTPUTS[label])
    spoil(*CASES[label])
    stage = label.split()[0]
    kava("run", made, "--only", stage, "--force", stage, "--parts", "2-3", code=None)
    assert tree(made.parent / "run" / OUTPUTS[label]) == before
    spoil.undo()
    assert set(_states(made).values()) == {"complete"}


def test_a_training_that_diverges_leaves_the_student(made: Path) -> None:
    students = made.parent / "run/students"
    before = tree(students)
    options = ["-s", "train.learning_rate=1e38", "-s", "train.max_steps=5"]
    assert "finite" in kava("train", made, "--force", *options, code=1)
    assert tree(students) == before
    assert _states(made)["train"] == "complete"
    assert _states(made, *options)["train"] == "stale"
    assert [path.name for path in students.iterdir()] == ["kv"]


def test_a_view_whose_targets_are_incomplete_stays(made: Path, spoil: Spoiler) -> None:
    view = ["-s", "fuse.materialize=false"]
    kava("fuse", made, *view)
    before = tree(made.parent / "run/fusion")
    spoil("run/targets/big.zarr/parts/00003", "remove")
    kava("fuse", made, *view, "--force", code=2)
    assert tree(made.parent / "run/fusion") == before
    spoil.undo()
    assert _states(made, *view)["fuse"] == "complete"


def test_transcoding_a_damaged_source_leaves_the_copy(made: Path, spoil: Spoiler, tmp_path: Path) -> None:
    copy, part = tmp_path / "copy.zarr", "run/teachers/big.zarr/parts/00003"
    source = KVStore.open(made.parent / "run/teachers/big.zarr")
    kava("transcode", source.path, copy, "--codec", "none")
    before = tree(copy)
    with KVStore.open(copy).write_part(4) as writer:  # As of a part that is captured again with other numbers.
        (copy / "parts/00004").rename(tmp_path / "old")
        for position, index in enumerate(source.manifest.part_samples(4)):
            sample = source[index]
            writer.append(position, sample)
        writer.commit()
    other = tree(copy)
    assert other != before
    spoil(f"{part}/zarr.json", "truncate")
    kava("transcode", source.path, copy, "--codec", "none", code=1)
    assert tree(copy) == other
    spoil.undo()
    kava("transcode", source.path, copy, "--codec", "none")
    assert tree(copy) == before


@pytest.mark.parametrize("label", ["extract big", "project big"])
def test_a_rebuild_that_was_interrupted_goes_on(made: Path, monkeypatch: pytest.MonkeyPatch, label: str) -> None:
    store = made.parent / "run" / OUTPUTS[label]
    before, stage, commit = tree(store), label.split()[0], PartWriter.commit

    def fill(self: PartWriter, *words: Any, **named: Any) -> Path:
        if self.index == 2:
            raise OSError(28, "")
        return commit(self, *words, **named)

    with monkeypatch.context() as patch:
        patch.setattr(PartWriter, "commit", fill)
        scheduler = [] if stage == "extract" else ["--scheduler", "synchronous"]
        kava("run", made, "--only", stage, "--force", stage, *scheduler, code=75)
    assert tree(store) == before
    assert _states(made)[label] == "complete"
    rebuilt = KVStore.open(store.with_name(".big.zarr.next"))
    done = {part: file_stamp(rebuilt.path / f"parts/{part:05d}/zarr.json") for part in rebuilt.committed_parts()}
    assert 0 < len(done) < 5
    # Without --force, what is complete stays; with it, the rebuild goes on.
    assert "up to date" in kava("run", made, "--only", stage)
    kava("run", made, "--only", stage, "--force", stage)
    assert tree(store) == before
    for part, stamp in done.items():
        # The exchange renames the store; its files are those that were written before.
        assert file_stamp(store / f"parts/{part:05d}/zarr.json") == stamp
    assert not rebuilt.path.exists()


def test_shares_rebuild_a_stale_store_together(made: Path, tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(made.parent / "run", folder / "run")
    recipe = folder / "recipe.yaml"
    recipe.write_text(made.read_text().replace(f"run_dir: {made.parent}", f"run_dir: {folder}"))
    changed = ["-s", "resample.method=mean"]
    store = folder / "run/resampled/big.zarr"
    before = tree(store)
    printed = kava("run", recipe, *changed, "--only", "resample", "--rank", 0, "--world-size", 2)
    assert "the old output stays" in printed
    assert tree(store) == before
    other = ResampleStage(Run(load_recipe(recipe, changed[1:])), "big")
    other.beside = next_path(store)
    assert len(KVStore.open(store.with_name(".big.zarr.next")).committed_parts()) == 3
    kava("run", recipe, *changed, "--only", "resample", "--rank", 1, "--world-size", 2)
    assert KVStore.open(store).missing_parts() == []
    assert KVStore.open(store).manifest.parameters["resample"]["method"] == "mean"
    # A process that joined the rebuild, and whose last part another one made, finds it exchanged.
    assert "the old output stays" not in _exchange_if_complete(other, "done")
    assert other.building == store
    # One share of several stages: what the second one reads is made whole first.
    kava("run", recipe, "--only", "resample", "--only", "project", "--rank", 0, "--world-size", 2)
    assert tree(store) == before
    assert not list((folder / "run/resampled").rglob(".*"))
    assert not list((folder / "run/targets").rglob(".*"))
