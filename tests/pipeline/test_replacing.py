"""Nothing is thrown away before what replaces it can be made, and nothing stays that was made from something else."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from fixtures.command import copy_recipe, kava, write_recipe
from fixtures.stores import tree

from kava.errors import StageError
from kava.pipeline import Projector, load_recipe
from kava.pipeline.direct import derive_directly
from kava.pipeline.project_stage import ProjectStage
from kava.pipeline.run import Run
from kava.store import KVStore


@pytest.fixture(scope="module")
def made_once(tmp_path_factory: pytest.TempPathFactory, tiny_models: dict[str, Path]) -> Path:
    folder: Path = tmp_path_factory.mktemp("made")
    kava("run", write_recipe(folder, tiny_models), "--until", "project")
    return folder


@pytest.fixture
def done(tmp_path: Path, made_once: Path) -> Path:
    """A recipe that was run up to its targets, which a test may spoil."""
    recipe: Path = copy_recipe(made_once, tmp_path / "done")
    return recipe


def _state(recipe: Path, stage: str, *options: str) -> str:
    rows = {r["stage"]: r["state"] for r in json.loads(kava("status", recipe, *options, "--json"))["stages"]}
    return str(rows[stage])


def test_a_map_that_does_not_fit_leaves_the_targets(done: Path) -> None:
    targets = tree(done.parent / "run/targets")
    for options in (["-s", "project.heads=identity"], ["-s", "project.layers=[0,1]"]):
        kava("project", done, *options, code=2)
        kava("project", done, *options, "--force", code=2)
        assert tree(done.parent / "run/targets") == targets
    assert _state(done, "project big", "-s", "project.layers=[0,1]") == "stale"
    # Told before a capture, not after it.
    assert "identity needs equal heads" in kava("run", done, "--dry-run", "-s", "project.heads=identity", code=2)
    captured = tree(done.parent / "run/teachers")
    for options in ([], ["--parts", "0"]):
        printed = kava("extract", done, "-s", "project.heads=identity", "--force", *options, code=2)
        assert "identity needs equal heads" in printed
    assert tree(done.parent / "run/teachers") == captured
    shutil.rmtree(done.parent / "run/teachers")
    assert "identity needs equal heads" in kava("extract", done, "-s", "project.heads=identity", code=2)
    assert not (done.parent / "run/teachers").exists()


def test_a_student_that_cannot_be_trained_again_stays(done: Path) -> None:
    kava("train", done, "-s", "train.max_steps=1")
    run = done.parent / "run"
    students = tree(run / "students")
    again = ("train", done, "--force", "-s", "train.max_steps=1")
    for options, message in (
        (["-s", "train.layers=[7]"], "train.layers"),
        (["-s", "train.arguments.nonsense=1"], "no 'nonsense'"),
        (["-s", "corpus.heldout=null"], "was made for another student"),
        (["-s", "train.teacher=other"], "there is no teacher 'other'"),
    ):
        assert message in kava(*again, *options, code=2)
        assert tree(run / "students") == students
    targets = KVStore.open(run / "targets/big.zarr")
    targets.drop_part(1)
    assert "1 of 5 parts are missing" in kava(*again, code=2)
    shutil.rmtree(run / "targets")
    assert "is not made yet; kava project" in kava(*again, code=2)
    assert tree(run / "students") == students


def test_targets_straight_from_a_teacher_are_costly(tmp_path: Path, tiny_models: dict[str, Path]) -> None:
    changes = {"samples_per_part": 2, "project": {"calibration_samples": 4}}
    recipe = write_recipe(tmp_path, tiny_models, extract={"keep": "target"}, **changes)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("kava.pipeline.parts.CALIBRATION_PARTS", 3)
        kava("run", recipe, "--until", "project")
        targets = tree(tmp_path / "run/targets")
        assert "--force project" in kava("project", recipe, "-s", "project.heads=mean", code=2)
        assert tree(tmp_path / "run/targets") == targets
        run = Run(load_recipe(recipe))
        absent = run.target_path("big")
        store = KVStore.open(absent)
        kept = KVStore.open(run.teacher_path("big")).committed_parts()
        number = next(part for part in range(12) if part not in kept)
        printed = kava("inspect", absent, "--align", store.part(number).ids[0])
        assert " text tokens, " in printed
        # A sample that failed on the way is asked for again.
        for command in (["extract", recipe, "--retry-failed"], ["project", recipe, "--only-failed"]):
            store.drop_part(number)
            with store.write_part(number) as writer:
                for position, index in enumerate(store.manifest.part_samples(number)):
                    record = run.corpus.records[index]
                    writer.fail(position, record.sample_id, record.split, "out of memory")
                writer.commit(ProjectStage(run, "big").prepare(KVStore.open(run.teacher_path("big"))).sources)
            assert len(KVStore.open(absent).failed) == 2
            kava(*command)
            kava("project", recipe)
            assert KVStore.open(absent).failed == {}
    assert tree(tmp_path / "run/targets") == targets


def test_a_calibration_captured_again_is_fitted_again(done: Path, tmp_path: Path, tiny_models: dict[str, Path]) -> None:
    """As after `extract --retry-failed`: the result must be that of a run in which nothing ever failed."""
    run = Run(load_recipe(done))
    right = tree(run.target_path("big"))
    teacher = KVStore.open(run.teacher_path("big"))
    whole = [teacher.part(1).sample(position) for position in teacher.part(1).order]
    order = teacher.part(1).order
    assert 1 in run.calibration_parts
    for broken in (True, False):
        teacher.drop_part(1)
        with teacher.write_part(1) as writer:
            for position, sample in zip(order, whole, strict=True):
                if broken and position == 0:
                    writer.fail(position, sample.sample_id, sample.split, "out of memory")
                else:
                    writer.append(position, sample)
            writer.commit(written_by=KVStore.open(run.teacher_path("big")).part(0).written_by)
        assert f"{teacher.manifest.num_parts} to be made again" in kava("status", done)
        kava("project", done)
        assert (tree(run.target_path("big")) == right) != broken
    assert "up to date" in kava("project", done)


def test_a_worker_does_not_write_into_another_runs_store(done: Path) -> None:
    run = Run(load_recipe(done))
    transform = ProjectStage(run, "big").prepare(KVStore.open(run.teacher_path("big")))
    path = run.projector_path("big")
    kava("project", done, "-s", "resample.method=mean")
    KVStore.open(run.target_path("big")).drop_part(2)
    with pytest.raises(StageError, match="was replaced by that of another run"):
        transform(2)
    kava("project", done)
    projector = Projector.load(path)
    replace(projector, card=projector.card | {"made_for": "another store"}).save(path)
    KVStore.open(run.target_path("big")).drop_part(2)
    with pytest.raises(StageError, match="was replaced by that of another run"):
        transform(2)


def test_coverage_of_two_steps_is_that_of_one(done: Path, tmp_path: Path, tiny_models: dict[str, Path]) -> None:
    folder = tmp_path / "two"
    folder.mkdir()
    recipe = write_recipe(folder, tiny_models, resample={"materialize": True})
    kava("run", recipe, "--until", "project")
    one, two, both = (
        KVStore.open(p) for p in (Run(load_recipe(done)).target_path("big"), folder / "run/targets/big.zarr",
                                  folder / "run/resampled/big.zarr")
    )  # fmt: skip
    assert one.coverage() == two.coverage() == both.coverage()
    assert any(together < matched for _, matched, together in one.coverage().values())


def test_the_bits_of_direct_targets_do_not_depend_on_threads(done: Path) -> None:
    """Products of few rows differ by the number of threads; tasks of the other way have one."""
    run = Run(load_recipe(done))
    teacher = KVStore.open(run.teacher_path("big"))
    transform = ProjectStage(run, "big").prepare(teacher)
    derive, threads = derive_directly(transform, teacher.manifest), torch.get_num_threads()
    made = []
    try:
        for count in (1, 2, 4):
            torch.set_num_threads(count)
            made.append([derive(teacher[index])[0].keys for index in range(6)])
    finally:
        torch.set_num_threads(threads)
    for other in made[1:]:
        assert all(torch.equal(a, b) for a, b in zip(made[0], other, strict=True) if a is not None and b is not None)


def test_a_report_says_when_it_is_not_of_the_targets(done: Path) -> None:
    run = Run(load_recipe(done))
    before = Projector.load(run.projector_path("big")).card
    printed = kava("project", done, "--report", "-s", "project.heads=pca")
    assert "not saved: the targets that are there were made with another projector" in printed
    report = json.loads(run.projector_path("big").with_suffix(".report.json").read_text())
    assert not report["is_saved"]
    assert report["made_for"] != before["made_for"]
    assert report["parameters"]["project"]["heads"] == "pca"
    assert Projector.load(run.projector_path("big")).card == before
    assert "not saved" not in kava("project", done, "--report")


def test_a_mistake_of_the_whole_recipe_has_no_empty_key(done: Path) -> None:
    printed = kava("status", done, "-s", "select.tokens=4", code=2)
    assert "recipe.yaml: select.method: r-kv needs extract.importance" in printed


def test_a_transform_of_nothing_else_changes(done: Path) -> None:
    """The same work given to another place writes there, or nowhere."""
    run = Run(load_recipe(done))
    transform = ProjectStage(run, "big").prepare(KVStore.open(run.teacher_path("big")))
    with pytest.raises(StageError, match="was replaced"):
        replace(transform, fingerprint="0" * 32)(0)
