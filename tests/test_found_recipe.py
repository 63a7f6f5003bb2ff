"""A recipe that lies in a downloaded folder is data: no command runs code because of it."""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from fixtures.command import kava, seal_again, write_recipe

from kava.errors import DamagedStoreError, ModelNotFoundError, RecipeError
from kava.hub import find_model
from kava.pipeline.found_recipe import find_recipe, load_found_recipe
from kava.store.sealed import RECORD

CODE = """
from pathlib import Path
from transformers import PreTrainedTokenizerFast
Path({marker!r}).touch()
class Evil(PreTrainedTokenizerFast):
    pass
"""


class Download:
    """A run folder from elsewhere, whose tokenizers bring code along."""

    def __init__(self, root: Path, recipe: Path) -> None:
        self.root, self.recipe = root, recipe
        self.run = root / "run"
        self.capture, self.targets = (self.run / f"{kind}/big.zarr" for kind in ("teachers", "targets"))
        self.student = self.run / "students/kv"
        self.marker = root / "ran"

    def arm(self, folder: Path) -> None:
        """Let the tokenizer in a folder name a module of its own."""
        (folder / "evil.py").write_text(CODE.format(marker=str(self.marker)))
        path = folder / "tokenizer_config.json"
        code = {"tokenizer_class": "Evil", "auto_map": {"AutoTokenizer": ["evil.Evil", "evil.Evil"]}}
        path.write_text(json.dumps(json.loads(path.read_text()) | code))
        if (folder / RECORD).exists():  # As an attacker would: the record fits what is there.
            seal_again(folder)


@pytest.fixture(scope="module")
def download(tmp_path_factory: pytest.TempPathFactory, tiny_models: dict[str, Path]) -> Download:
    root = tmp_path_factory.mktemp("download")
    models = {name: root / name for name in ("teacher", "student")}
    for name, folder in models.items():
        shutil.copytree(tiny_models[name], folder)
    recipe = write_recipe(root, models)
    kava("run", recipe)
    made = Download(root, recipe)
    raw = yaml.safe_load(recipe.read_text())
    raw["teachers"]["big"]["trust_remote_code"] = raw["student"]["trust_remote_code"] = True
    recipe.write_text(yaml.safe_dump(raw))
    for place in (made.run, made.student):
        (place / "recipe.yaml").write_text(yaml.safe_dump(raw))
    for folder in (models["teacher"], models["student"], made.run / "student", made.student):
        made.arm(folder)
    return made


@pytest.mark.parametrize(
    "words",
    [
        ["inspect", "capture", "--sample", "0"],
        ["inspect", "targets", "--sample", "0"],
        ["inspect", "targets", "--align", "0"],
        ["inspect", "capture"],
        ["evaluate", "student"],
        ["evaluate", "student", "-s", "teachers.big.trust_remote_code=true"],
        ["verify", "capture"],
        ["status", "recipe"],
        ["report", "recipe", "--no-projection"],
        ["compare", "recipe", "--no-train", "-s", "compare.arms=[none, kv]"],
    ],
    ids=" ".join,
)
def test_no_command_runs_code_of_a_folder(download: Download, words: list[str]) -> None:
    # Where the recipe is named, it permits nothing: what the folder holds is not to matter.
    named = yaml.safe_load(download.recipe.read_text())
    named["teachers"]["big"]["trust_remote_code"] = named["student"]["trust_remote_code"] = False
    (download.root / "named.yaml").write_text(yaml.safe_dump(named))
    paths = {**vars(download), "recipe": download.root / "named.yaml"}
    code, printed = _kava(*(paths.get(word, word) for word in words))
    assert not download.marker.exists()
    assert code in (0, 1, 2)
    if words[0] == "evaluate" or any(word in words for word in ("--sample", "--align")):
        (line,) = [line for line in printed.splitlines() if "ignored" in line]
        assert "ignored student.trust_remote_code: True, teachers.big.trust_remote_code: True. Code runs only" in line


def test_the_recipe_that_is_named_decides(download: Download) -> None:
    """The attack is real: with permission, the same command runs the code."""
    trusting = yaml.safe_load(download.recipe.read_text())
    trusting["student"]["trust_remote_code"] = False
    recipe = _save(download.root / "trusting.yaml", yaml.safe_dump(trusting))
    _, printed = _kava("inspect", download.capture, "--sample", "0", "--recipe", recipe)
    assert download.marker.exists(), printed
    assert "ignored" not in printed
    download.marker.unlink()
    for name in [name for name in sys.modules if name.startswith("transformers_modules")]:
        del sys.modules[name]


def _kava(*words: Any) -> tuple[int, str]:
    for code in (0, 2, 1):
        try:
            return code, kava(*words, code=code)
        except AssertionError as error:
            last = error
    raise last


def _save(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def test_every_place_and_spelling_of_the_permission(tmp_path: Path, tiny_models: dict[str, Path]) -> None:
    recipe = write_recipe(tmp_path, tiny_models)
    for value in ("true", "yes", "1", '"true"', "[x]"):
        raw = yaml.safe_load(recipe.read_text())
        raw["teachers"]["big"]["trust_remote_code"] = yaml.safe_load(value)
        path = _save(tmp_path / "found.yaml", yaml.safe_dump(raw))
        loaded = load_found_recipe(path)
        assert loaded.teachers["big"].trust_remote_code is False
        assert loaded.student.trust_remote_code is False


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[" * 5000, "nested too deeply"),
        ("a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(f"{c}: &{c} [{','.join(['*' + p] * 9)}]\n" for p, c in zip("abcdefgh", "bcdefghi", strict=True)), "more than 100,000 values"),
        ("a: &a [*a]", "an alias leads to itself"),
        ("!!python/object/apply:os.system [touch x]", "not YAML"),
        ("a: " + "1" * 100_000, "not YAML"),
        ("- x", "must be a mapping"),
        ("\x00", "not YAML"),
        ("train: {seed: " + "x" * 500_000 + "}", r"train\.seed"),
        ("? " + "k" * 500_000 + "\n: 1", "unknown key"),
    ],
    ids=range(9),
)  # fmt: skip
def test_hostile_yaml_is_one_line(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message) as raised:
        load_found_recipe(_save(tmp_path / "recipe.yaml", text))
    assert "\n" not in str(raised.value)
    assert len(str(raised.value)) < 2000


def test_a_special_file_in_the_place_of_a_recipe(download: Download) -> None:
    recipe = download.run / "recipe.yaml"
    kept = recipe.read_bytes()
    for make, kind in (
        (os.mkfifo, "named pipe"),
        (lambda p: p.symlink_to("/etc/passwd"), "link"),
        (os.mkdir, "folder"),
    ):
        recipe.unlink()
        make(recipe)
        assert find_recipe(download.run) == recipe
        with pytest.raises(DamagedStoreError, match=f"recipe.yaml: a {kind} where"):
            load_found_recipe(recipe)
        assert f"a {kind} where" in kava("inspect", download.capture, "--sample", "0", code=1)
        recipe.rmdir() if kind == "folder" else recipe.unlink()
        recipe.write_bytes(kept)
    (download.root / "big").touch()
    recipe.write_bytes(b"#" * (1 << 21))
    with pytest.raises(DamagedStoreError, match="at most"):
        load_found_recipe(recipe)
    recipe.write_bytes(kept)


def test_a_pipe_in_the_place_of_a_students_file(download: Download) -> None:
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        path = download.student / name
        kept = path.read_bytes()
        path.unlink()
        os.mkfifo(path)
        assert "is a named pipe, a socket or a device" in kava("evaluate", download.student, code=2)
        path.unlink()
        path.write_bytes(kept)


def test_a_package_is_found_without_importing_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "evil/inner").mkdir(parents=True)
    (tmp_path / "evil/__init__.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    (tmp_path / "evil/inner/__init__.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    assert find_model("package:evil/inner").location == str(tmp_path / "evil/inner")
    with pytest.raises(ModelNotFoundError, match="name a top-level package"):
        find_model("package:evil.inner/file")
    assert not (tmp_path / "ran").exists()
