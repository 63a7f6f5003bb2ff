"""Every output that decides content is compared with its record: no flipped byte is used, or taken for another input."""

from __future__ import annotations

import json
import os
import shutil
import stat
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from fixtures.command import kava, write_recipe
from fixtures.models import save_model
from fixtures.stores import flip, tree
from fixtures.tokenizers import sentencepiece_tokenizer

from kava.errors import DamagedStoreError
from kava.pipeline import load_recipe
from kava.pipeline.run import Run
from kava.pipeline.sealed_outputs import check_outputs
from kava.store.fingerprint import file_stamp
from kava.store.sealed import check_record, read_sealed, sealed_text, write_record

SEALED = {
    "generated corpus": "generated/corpus.jsonl",
    "answers": "generated/answers/*.jsonl",
    "generated record": "generated/kava.json",
    "student weights": "student/model.safetensors",
    "student tokenizer": "student/tokenizer.json",
    "student config": "student/config.json",
    "student record": "student/kava.json",
    "projector": "projectors/big.safetensors",
    "projector card": "projectors/big.json",
    "fusion": "fusion/fused.json",
    "trained weights": "students/kv/model.safetensors",
    "trained tokenizer": "students/kv/tokenizer.json",
    "trained log": "students/kv/metrics.jsonl",
    "trained record": "students/kv/kava.json",
}


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory, tiny_models: dict[str, Path]) -> Path:
    """A recipe that was run to the end: a written corpus, two teachers, targets fused while they are read."""
    folder = tmp_path_factory.mktemp("sealed")
    second = save_model(
        folder / "second", "llama", sentencepiece_tokenizer(420), seed=3, layers=4, heads=3, kv_heads=1, head_dim=24
    )
    before = os.umask(0o027)
    try:
        recipe: Path = write_recipe(
            folder,
            tiny_models,
            teachers={
                "big": {"model": str(tiny_models["teacher"]), "dtype": "float32"},
                "small": {"model": str(second), "dtype": "float32"},
            },
            extract={"generate": {"max_new_tokens": 12, "chunk": 6, "teacher": "big"}},
            samples_per_part=8,
            fuse={"materialize": False},
            train={"max_steps": 3, "report_to": []},
        )
        kava("run", recipe)
    finally:
        os.umask(before)
    return recipe


@pytest.fixture
def recipe(done: Path, tmp_path: Path) -> Path:
    """A copy of it to damage."""
    shutil.copytree(done.parent / "run", tmp_path / "run")
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(yaml.safe_load(done.read_text()) | {"run_dir": str(tmp_path / "run")}))
    return path


def _states(recipe: Path) -> dict[str, str]:
    return {row["stage"]: row["state"] for row in json.loads(kava("status", recipe, "--json"))["stages"]}


def _named(recipe: Path) -> str:
    return "\n".join(line for checked in check_outputs(Run(load_recipe(recipe))) for line in checked.damages)


def test_verify_of_a_recipe_checks_all_of_a_run(done: Path) -> None:
    printed = kava("verify", done)
    for label in ("generate", "student", "projector big", "projector small", "fusion", "student kv"):
        assert f": {label} is as it was written" in printed
    assert printed.count("parts are as they were written") == 5
    assert set(_states(done).values()) == {"complete"}


@pytest.mark.parametrize("kind", SEALED)
def test_every_flip_and_loss_is_named(recipe: Path, kind: str) -> None:
    rng = np.random.default_rng(0)
    path = sorted((recipe.parent / "run").glob(SEALED[kind]))[0]
    whole = path.read_bytes()
    for at in [0, len(whole) - 1, *rng.integers(0, len(whole), 10)]:
        flip(path, int(at), int(rng.integers(8)))
        assert str(path) in _named(recipe), f"byte {at} of {len(whole)}"
    for other in (whole[:-1], whole + b"\n" if path.suffix != ".json" else whole + b"}", b""):
        path.write_bytes(other)
        assert str(path) in _named(recipe)
    path.unlink()
    if kind != "fusion":  # Without it nothing is fused: it is not there, and made again.
        assert path.name in _named(recipe)
    path.write_bytes(whole)
    assert not _named(recipe)


@pytest.mark.parametrize(
    ("kind", "stage"),
    [
        ("student weights", "student"),
        ("student tokenizer", "student"),
        ("student record", "student"),
        ("generated corpus", "generate"),
        ("answers", "generate"),
        ("fusion", "fuse"),
    ],
)
def test_what_can_be_made_again_is_repaired_to_the_same_bits(done: Path, recipe: Path, kind: str, stage: str) -> None:
    run = recipe.parent / "run"
    path = sorted(run.glob(SEALED[kind]))[0]
    flip(path, path.stat().st_size // 2, 3)
    before = {name: file_stamp(run / name) for name in tree(run) if name.startswith(("t", "students"))}
    assert _states(recipe)[stage] == "damaged"
    printed = kava("run", recipe, code=1)
    assert f"{path}: damaged" in printed
    assert "kava repair" in printed
    # What was trained stays good when the corpus is damaged; the student and what fuses its targets are read.
    kava("run", recipe, "--only", "train", code=0 if stage == "generate" else 1)
    assert str(path) in kava("verify", recipe, code=1)
    assert {name: file_stamp(run / name) for name in before} == before, "nothing good was touched"
    assert "again" in kava("repair", recipe)
    whole = tree(done.parent / "run")
    assert {n: data for n, data in tree(run).items() if n in whole and n != "recipe.yaml"} == {
        n: data for n, data in whole.items() if n != "recipe.yaml"
    }
    assert "up to date" in kava("run", recipe)
    assert {name: file_stamp(run / name) for name in before} == before


@pytest.mark.parametrize("kind", [pytest.param("projector", marks=pytest.mark.slow), "projector card"])
def test_a_damaged_projector_makes_no_target(done: Path, recipe: Path, kind: str) -> None:
    run = recipe.parent / "run"
    path = run / SEALED[kind]
    flip(path, path.stat().st_size - 40, 2)
    shutil.rmtree(run / "targets/big.zarr/parts/00001")
    assert f"{path}: damaged" in kava("run", recipe, "--until", "project", code=1)
    assert sorted(p.name for p in (run / "targets/big.zarr/parts").glob("[0-9]*")) == ["00000", "00002"]
    assert "fitted again, with the same bits" in kava("repair", recipe)
    kava("run", recipe, "--until", "project")
    whole = {name: tree(done.parent / "run" / name) for name in ("projectors", "targets")}
    assert {name: tree(run / name) for name in whole} == whole
    flip(path, path.stat().st_size - 40, 2)
    kava("run", recipe, "--only", "project", "--force", "project")  # Fitted again beside the damaged one.
    assert {name: tree(run / name) for name in whole} == whole


def test_a_trained_student_is_named_and_only_trained_again(done: Path, recipe: Path) -> None:
    run = recipe.parent / "run"
    path = run / "students/kv/model.safetensors"
    flip(path, 4000)
    assert _states(recipe)["train"] == "damaged"
    for command in (["run", recipe], ["train", recipe], ["evaluate", recipe], ["evaluate", path.parent]):
        assert f"{path}: damaged" in kava(*command, code=2 if command == ["evaluate", recipe] else 1)
    printed = kava("repair", recipe, code=1)
    assert "kava train --force" in printed
    assert "the student is as it was written" in printed
    kava("train", recipe, "--force")
    assert path.read_bytes() == (done.parent / "run/students/kv/model.safetensors").read_bytes()


def test_a_file_that_loading_would_find_is_not_added(recipe: Path) -> None:
    run = recipe.parent / "run"
    (run / "students/kv/README.md").write_text("A card for people.")
    assert "up to date" in kava("run", recipe)
    (run / "student/adapter_config.json").write_text("{}")
    assert "student/adapter_config.json: damaged" in kava("run", recipe, code=1)


def test_other_bits_than_the_recorded_ones_are_not_put_in_place(recipe: Path) -> None:
    folder = recipe.parent / "run/student"
    record = read_sealed(folder / "kava.json")
    record["files"]["model.safetensors"][1] = "0" * 32
    (folder / "kava.json").write_bytes(sealed_text(record))
    before = tree(folder)
    printed = kava("repair", recipe, code=1)
    assert "made again, model.safetensors has other bits" in printed
    assert tree(folder) == before
    assert not list(folder.parent.glob(".tmp-student*"))


def test_a_damaged_measurement_of_a_comparison_is_measured_again(done: Path, recipe: Path) -> None:
    given = ["-s", "compare.arms=[none, kv]", "-s", "compare.seeds=[0]"]
    kava("compare", recipe, *given)
    path = recipe.parent / "run/compare/kv-0/heldout.json"
    whole = path.read_bytes()
    flip(path, 100)
    assert f"{path}: damaged" in kava("compare", recipe, *given, code=1)
    assert str(path) in kava("verify", recipe, code=1)
    assert "kava compare measures it again" in kava("repair", recipe, *given)
    kava("compare", recipe, *given)
    assert path.read_bytes() == whole


def test_all_files_have_the_mode_that_the_umask_leaves(done: Path) -> None:
    run = done.parent / "run"
    modes = {p.relative_to(run).as_posix(): stat.S_IMODE(p.stat().st_mode) for p in run.rglob("*") if p.is_file()}
    assert {mode for name, mode in modes.items() if "/parts/0" not in name} == {0o640}
    assert {mode for name, mode in modes.items() if "/parts/0" in name} == {0o440}


class TestIdentityOfTheStudent:
    """A student that is given as a model is identified by weights and tokenizer, not by how the recipe spells it."""

    @pytest.fixture
    def own(self, tmp_path: Path, tiny_models: dict[str, Path]) -> dict[str, Path]:
        shutil.copytree(tiny_models["student"], tmp_path / "own")
        return {**tiny_models, "student": tmp_path / "own"}

    def _state(self, recipe: Path, *given: str) -> str:
        rows = json.loads(kava("status", recipe, "--json", *given))["stages"]
        return str(next(row["state"] for row in rows if row["stage"] == "student"))

    def test_another_spelling_is_the_same(
        self, tmp_path: Path, own: dict[str, Path], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        recipe = write_recipe(tmp_path, own)
        kava("run", recipe, "--only", "student")
        (tmp_path / "link").symlink_to(own["student"])
        monkeypatch.chdir(tmp_path)
        for spelling in ("./own", f"{own['student']}/", str(tmp_path / "link"), "link/../own"):
            assert self._state(recipe, "-s", f"student.model={spelling}") == "complete", spelling

    def test_replaced_weights_or_tokenizer_are_another(self, tmp_path: Path, own: dict[str, Path]) -> None:
        recipe = write_recipe(tmp_path, own)
        kava("run", recipe, "--only", "student")
        weights = own["student"] / "model.safetensors"
        whole = weights.read_bytes()
        flip(weights, len(whole) - 3)
        assert self._state(recipe) == "stale"
        weights.write_bytes(whole)
        assert self._state(recipe) == "complete"
        tokenizer = own["student"] / "tokenizer.json"
        other = json.loads(tokenizer.read_text())
        other["model"]["merges"].pop()
        tokenizer.write_text(json.dumps(other))
        assert self._state(recipe) == "stale"

    def test_the_tokenizer_given_as_a_path_too(self, tmp_path: Path, own: dict[str, Path]) -> None:
        recipe = write_recipe(tmp_path, own, student={"tokenizer": str(own["student"]), "model": str(own["student"])})
        kava("run", recipe, "--only", "student")
        assert self._state(recipe, "-s", f"student.tokenizer={own['student']}/") == "complete"
        config = json.loads((own["student"] / "tokenizer_config.json").read_text())
        (own["student"] / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": "{{ messages }}"}))
        assert self._state(recipe) == "stale"

    def test_a_student_whose_model_is_elsewhere_is_used(self, tmp_path: Path, own: dict[str, Path]) -> None:
        recipe = write_recipe(tmp_path, own)
        kava("run", recipe, "--until", "project")
        own["student"].rename(tmp_path / "away")
        assert "up to date" in kava("run", recipe, "--only", "student")
        kava("run", recipe, "--until", "train")
        printed = kava("run", recipe, "--only", "student", "-s", f"student.model={tmp_path / 'never'}", code=2)
        assert "there is no such file or folder" in printed
        flip(tmp_path / "run/student/model.safetensors", 4000)
        assert "cannot be made again as it was" in kava("repair", recipe, code=1)


def test_a_record_is_written_after_all_it_stands_for(tmp_path: Path) -> None:
    (tmp_path / "inner").mkdir()
    (tmp_path / "weights.bin").write_bytes(b"abc")
    (tmp_path / "inner/adapter.bin").write_bytes(b"")
    (tmp_path / ".hidden").write_bytes(b"1")
    written = write_record(tmp_path, {"key": "k", "loss": float("nan")})
    record = read_sealed(tmp_path / "kava.json")
    assert record["files"] == written["files"]
    assert sorted(record["files"]) == ["inner/adapter.bin", "weights.bin"]
    check_record(tmp_path, record)
    entries: list[Any] = [None, [], [3], ["3", 4], {}, [3, None]]
    for entry in entries:
        with pytest.raises(DamagedStoreError):
            check_record(tmp_path, {"files": {"weights.bin": entry}})
    hostile: list[Any] = [{}, {"files": []}, {"files": {"../x": [1, "a"]}}, {"files": {"/etc/passwd": [1, "a"]}}]
    for other in hostile:
        with pytest.raises(DamagedStoreError):
            check_record(tmp_path, other)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(DamagedStoreError, match="not a regular file"):
        check_record(tmp_path, {"files": {"pipe": [0, "a"]}})
