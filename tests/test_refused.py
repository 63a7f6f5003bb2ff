"""A command that is refused leaves nothing: the corrected one runs without `--force`."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from fixtures.command import copy_recipe, kava, write_recipe
from fixtures.stores import flip, overwrite, tree

from kava.store import KVStore


def _state(recipe: Path, label: str, *options: str) -> str:
    rows = {row["stage"]: row["state"] for row in json.loads(kava("status", recipe, *options, "--json"))["stages"]}
    return str(rows[label])


def _names(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*")} if folder.exists() else set()


@pytest.fixture(scope="module")
def made_once(tmp_path_factory: pytest.TempPathFactory, tiny_models: dict[str, Path]) -> Path:
    folder: Path = tmp_path_factory.mktemp("refused")
    kava("run", write_recipe(folder, tiny_models, train={"max_steps": 2, "eval_steps": None}), "--until", "project")
    return folder


@pytest.fixture
def recipe(made_once: Path, tmp_path: Path) -> Path:
    """A recipe whose targets are made, which a test may spoil."""
    recipe: Path = copy_recipe(made_once, tmp_path / "done")
    return recipe


@pytest.mark.parametrize(
    "options", [["train.layers=[7]"], ["train.arguments.nonsense=1"], ["train.arguments.save_strategy=best"]]
)
def test_a_training(recipe: Path, options: list[str]) -> None:
    before = _names(recipe.parent / "run")
    words = [word for option in options for word in ("-s", option)]
    kava("train", recipe, *words, code=None)
    assert _names(recipe.parent / "run") == before
    assert _state(recipe, "train") == "missing"
    kava("train", recipe)
    assert _state(recipe, "train") == "complete"


def test_a_training_that_diverges_before_its_first_checkpoint(recipe: Path) -> None:
    kava("train", recipe, "-s", "train.learning_rate=1e38", "-s", "train.max_steps=5", code=1)
    assert _state(recipe, "train") == "missing"
    kava("train", recipe)
    assert _state(recipe, "train") == "complete"
    assert json.loads((recipe.parent / "run/students/kv/metrics.jsonl").read_text().splitlines()[0])["step"] <= 2


def test_a_comparison(recipe: Path) -> None:
    before = _names(recipe.parent / "run")
    options = ["-s", "compare.arms=[none, kv]", "-s", "compare.seeds=[0]", "-s", "compare.eval_steps=1"]
    kava("compare", recipe, *options, "-s", "train.arguments.nonsense=1", code=2)
    assert _names(recipe.parent / "run") == before
    kava("compare", recipe, *options)


def test_an_extraction(tmp_path: Path, tiny_models: dict[str, Path]) -> None:
    models = {**tiny_models, "teacher": shutil.copytree(tiny_models["teacher"], tmp_path / "teacher")}
    weights = tmp_path / "teacher/model.safetensors"
    whole = weights.read_bytes()
    for changes in ({}, {"store_dir": str(tmp_path / "shared")}):
        recipe = write_recipe(tmp_path, models, **changes)
        overwrite(weights, whole[: len(whole) // 2])
        assert "is damaged or not a weight file" in kava("extract", recipe, code=2)
        assert "identity needs equal heads" in kava("extract", recipe, "-s", "project.heads=identity", code=2)
        assert not (tmp_path / "run").exists()
        assert _names(tmp_path / "shared") == set()
        overwrite(weights, whole)
        kava("extract", recipe)
        assert _state(recipe, "extract big") == "complete"
        shutil.rmtree(tmp_path / "run")


def test_the_text_that_a_teacher_writes(tmp_path: Path, tiny_models: dict[str, Path]) -> None:
    models = {**tiny_models, "teacher": shutil.copytree(tiny_models["teacher"], tmp_path / "teacher")}
    weights = tmp_path / "teacher/model.safetensors"
    whole = weights.read_bytes()
    recipe = write_recipe(tmp_path, models, extract={"generate": {"max_new_tokens": 4}})
    overwrite(weights, whole[: len(whole) // 2])
    for _ in range(2):
        assert "is damaged or not a weight file" in kava("run", recipe, "--only", "generate", code=2)
        assert not (tmp_path / "run").exists()
    overwrite(weights, whole)
    kava("run", recipe, "--only", "generate")
    assert _state(recipe, "generate") == "complete"


def test_a_student(tmp_path: Path, tiny_models: dict[str, Path]) -> None:
    recipe = write_recipe(tmp_path, tiny_models, student={"geometry": {"num_layers": 9}})
    geometry = "student.geometry={num_layers: 9, num_key_value_heads: 1, head_dim: 4}"
    recipe = write_recipe(tmp_path, tiny_models)
    kava("run", recipe, "--only", "student", "-s", geometry, code=2)
    assert not (tmp_path / "run").exists()
    kava("run", recipe, "--only", "student")
    assert _state(recipe, "student") == "complete"


@pytest.mark.parametrize("stage", ["resample", "project", "select", "fuse", "reference"])
def test_what_is_made_of_a_capture(recipe: Path, stage: str) -> None:
    run = recipe.parent / "run"
    output = {"resample": "resampled", "select": "selected", "fuse": "targets/fused.zarr", "project": "targets"}.get(
        stage
    )
    output = "reference.zarr" if output is None else output
    shutil.rmtree(run / output, ignore_errors=True)
    shutil.rmtree(run / "projectors")
    options = {
        "resample": ["-s", "resample.materialize=true"],
        "select": ["-s", "select.tokens=4", "-s", "select.method=uniform"],
        "fuse": ["-s", "fuse={}"],
    }.get(stage, [])
    before = _names(run)
    spoiled = run / ("student/model.safetensors" if stage == "reference" else "teachers/big.zarr/parts/00000/zarr.json")
    if stage in ("resample", "select"):  # Their parts are made in any order.
        spoiled = run / "student/tokenizer.json" if stage == "resample" else run / "teachers/big.zarr/zarr.json"
    if stage == "fuse":
        spoiled = run / "targets/big.zarr/parts/00000/zarr.json"
    whole = spoiled.read_bytes()
    overwrite(spoiled, whole[: len(whole) // 2])
    kava("run", recipe, "--only", stage, *options, code=None)
    overwrite(spoiled, whole)
    assert _names(run) == before
    kava("run", recipe, "--only", stage, *options)


def test_transcoding(recipe: Path, tmp_path: Path) -> None:
    source, copy = recipe.parent / "run/teachers/big.zarr", tmp_path / "copy.zarr"
    for part in range(5):
        flip(source / f"parts/{part:05d}/keys/c/0/0/0/0", 40)
    kava("transcode", source, copy, "--codec", "none", code=1)
    assert not copy.exists()
    kava("transcode", source, copy, "--codec", "gzip", code=2)
    assert not copy.exists()


def test_an_empty_store_of_another_recipe_is_not_in_the_way(recipe: Path) -> None:
    """As a process leaves it that was killed before its first part."""
    store = recipe.parent / "run/teachers/big.zarr"
    whole = tree(store)
    manifest = KVStore.open(store).manifest
    shutil.rmtree(store)
    KVStore.create(store, manifest.model_copy(update={"dtype": "float16"}))
    kava("extract", recipe)
    assert tree(store) == whole
