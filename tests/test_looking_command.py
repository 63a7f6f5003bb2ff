"""Looking at a run when not all is well: status, report and dry run say what there is."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from threading import Event, Thread
from typing import Any

import pytest
from fixtures.command import kava, write_recipe

from kava.pipeline import load_recipe
from kava.pipeline.report.run_report import output_of
from kava.pipeline.run import Run
from kava.pipeline.stages import stages_of


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory, tiny_models: dict[str, Path]) -> Path:
    """Of a run that is complete, with a teacher of its own."""
    root = tmp_path_factory.mktemp("looking")
    shutil.copytree(tiny_models["teacher"], root / "teacher")
    path: Path = write_recipe(root, {**tiny_models, "teacher": root / "teacher"})
    kava("run", path)
    return path


@pytest.fixture
def away(recipe: Path) -> Iterator[Any]:
    """Moves a file or folder beside the recipe away, until the test is over."""
    moved = []

    def move(name: str) -> None:
        path = recipe.parent / name
        moved.append((path.rename(path.with_name(f"{path.name}.away")), path))

    yield move
    for there, back in moved:
        there.rename(back)


def _stages(recipe: Path) -> dict[str, dict[str, Any]]:
    return {row["stage"]: row for row in json.loads(kava("status", recipe, "--json"))["stages"]}


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_every_character_can_be_printed_anywhere(recipe: Path, encoding: str) -> None:
    """The corpus has accents and Japanese, and the tables have marks of their own."""
    target = recipe.parent / "run/targets/big.zarr"
    shown = {
        "ascii": ("caf", "\\u00e9s", "_", "\\n", r"'\u2581'"),
        "latin-1": ("caf", "\u00e9s", "_", "\\n", r"'\u2581'"),
        "utf-8": ("caf", "\u00e9s", "\u2423", "\u23ce", "'\u2581'"),
    }
    *pieces, token = shown[encoding]
    aligned = kava("inspect", target, "--align", 3, encoding=encoding)
    assert all(piece in aligned for piece in pieces)
    teacher, student = (
        next(line for line in aligned.splitlines() if line.startswith(n)) for n in ("teacher", "student")
    )
    assert len(teacher) == len(student)
    sample = kava("inspect", target, "--sample", 3, encoding=encoding)
    assert token in sample
    assert len({line.index("prompt") for line in sample.splitlines() if " prompt " in line}) == 1
    assert json.loads(kava("inspect", target, "--json", encoding=encoding))["facts"]["failed"] == 0
    kava("status", recipe, encoding=encoding)
    fault = kava("plan", recipe.parent / "caf\u00e9 \u6771 \U0001f642 \udcff.yaml", code=2, encoding=encoding)
    names = {
        "ascii": r"caf\u00e9 \u6771 \ud83d\ude42 \udcff.yaml",
        "latin-1": "caf\u00e9 " + r"\u6771 \ud83d\ude42 \udcff.yaml",
        "utf-8": "caf\u00e9 \u6771 \U0001f642 " + r"\udcff.yaml",
    }
    assert names[encoding] in fault.replace("\n", " ")


def test_a_file_name_that_the_locale_cannot_encode(recipe: Path) -> None:
    env = {**os.environ, "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "LC_ALL": "C"}
    env.pop("PYTHONIOENCODING", None)
    run_dir = "run_dir=" + json.dumps(str(recipe.parent / "caf\u00e9"))
    printed = kava("run", recipe, "--only", "student", "-s", run_dir, code=2, env=env)
    assert r"caf\xe9" in printed or r"caf\u00e9" in printed
    assert "Set PYTHONUTF8=1" in printed


def test_without_the_teacher(recipe: Path, away: Any) -> None:
    """It need not be on the machine that trains, and looks."""
    away("teacher")
    found = _stages(recipe)
    assert {label: row["state"] for label, row in found.items()} == {
        "student": "complete",
        "extract big": "blocked",
        "reference": "complete",
        "project big": "complete",
        "train": "complete",
    }
    capture = found["extract big"]
    assert (capture["parts_done"], capture["parts_total"], capture["failed_samples"]) == (5, 5, 0)
    assert "5 of 5 parts are there" in capture["detail"]
    assert "there is no such file or folder" in capture["detail"]
    assert kava("status", recipe).count("complete") == 4
    printed = kava("run", recipe, "--dry-run")
    assert "extract big  blocked" in printed
    kava("report", recipe, "--no-projection")
    assert "5 of 5 parts are there" in (recipe.parent / "run/report.html").read_text()
    # What makes something is refused as ever, and throws nothing away.
    assert "there is no such file or folder" in kava("extract", recipe, "--force", code=2)
    assert _stages(recipe)["extract big"]["parts_done"] == 5


def test_without_the_corpus(recipe: Path, away: Any) -> None:
    away("corpus.jsonl")
    found = _stages(recipe)
    assert found["extract big"]["state"] == found["project big"]["state"] == "blocked"
    assert found["project big"]["parts_done"] == 5
    assert found["train"]["state"] == "complete"
    kava("report", recipe, "--no-projection")


def test_with_a_damaged_manifest(recipe: Path) -> None:
    header = recipe.parent / "run/teachers/big.zarr/zarr.json"
    whole = header.read_bytes()
    header.chmod(0o644)
    header.write_bytes(whole[:100])
    try:
        found = _stages(recipe)
        kava("report", recipe, "--no-projection")
    finally:
        header.write_bytes(whole)
    assert found["extract big"]["state"] == "damaged"
    assert found["project big"]["state"] == "blocked"
    assert found["project big"]["parts_done"] == 5
    assert found["train"]["state"] == "complete"
    assert all(str(header) in found[label]["detail"] for label in ("extract big", "project big"))
    assert str(header) in (recipe.parent / "run/report.html").read_text()


def test_a_report_while_files_are_rotated_away(recipe: Path) -> None:
    """As a running training does with its checkpoints."""
    folder, stop = recipe.parent / "run/students/kv/rotated", Event()

    def rotate() -> None:
        while not stop.is_set():
            for number in range(20):
                folder.mkdir(exist_ok=True)
                (folder / f"{number}.bin").write_bytes(b"x")
            shutil.rmtree(folder)

    thread = Thread(target=rotate)
    thread.start()
    try:
        stage = next(s for s in stages_of(Run(load_recipe(recipe))) if s.name == "train")
        sizes = {output_of(stage).size for _ in range(100)}
    finally:
        stop.set()
        thread.join()
    assert max(sizes) - min(sizes) <= 20


def test_parts_that_were_written_differently(tmp_path: Path, tiny_models: dict[str, Path]) -> None:
    path = write_recipe(tmp_path, tiny_models)
    store = tmp_path / "run/teachers/big.zarr"
    kava("extract", path, "--parts", "0-1", "-s", "extract.batch_tokens=64")
    kava("extract", path, "--parts", "2")
    assert "written in 2 ways that round differently" in _stages(path)["extract big"]["detail"]
    assert "written by" in kava("inspect", store)
    writers = json.loads(kava("inspect", store, "--json"))["facts"]["written_by"]
    assert {who.rpartition(", ")[2]: parts for who, parts in writers.items()} == {
        "batch_tokens 64": 2,
        "batch_tokens 4096": 1,
    }
    kava("extract", path, "--force")
    assert "ways" not in _stages(path)["extract big"]["detail"]
