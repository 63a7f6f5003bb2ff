"""Recipes that share a teacher and a corpus share the capture; and the state of a run, for programs and for watching."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
import yaml
from fixtures.command import KAVA, kava, write_recipe
from fixtures.stores import tree
from fixtures.together import together

from kava.pipeline import load_recipe
from kava.pipeline.run import Run
from kava.store import KVStore


def _recipes(folder: Path, models: dict[str, Path]) -> tuple[Path, Path]:
    """Two recipes with different students and projections, and one corpus."""
    first = write_recipe(folder, models, store_dir=str(folder / "shared"), samples_per_part=3)
    raw = yaml.safe_load(first.read_text())
    raw |= {"run_dir": str(folder / "second"), "teachers": {"renamed": raw["teachers"]["big"]}}
    raw |= {"student": {"model": str(models["teacher"])}, "project": {"heads": "identity", "dtype": "float32"}}
    (folder / "second.yaml").write_text(yaml.safe_dump(raw))
    return first, folder / "second.yaml"


def test_two_recipes_share_a_capture(
    tmp_path: Path, tiny_models: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = _recipes(tmp_path, tiny_models)
    kava("run", first, "--until", "project")
    (store,) = (tmp_path / "shared").iterdir()
    whole = tree(store)
    assert KVStore.open(store).manifest.fingerprint[:16] in store.name
    assert (tmp_path / "run/teachers/big.zarr").resolve() == store
    assert "no link to it yet" in kava("status", second)
    printed = kava("plan", second, "--json")
    plan = json.loads(printed[printed.index("{\n") : printed.rindex("\n}") + 2])
    derived = sum(row["bytes"] for row in plan["stores"] if not row["stage"].startswith("extract"))
    derived += sum(row["bytes"] for row in plan["weights"])
    assert 0 < plan["disks"][0]["needed"] < 1.1 * derived, "the capture is there already"
    with monkeypatch.context() as patch:  # Nothing is captured, so no teacher is loaded.
        patch.setattr("kava.pipeline.capture_stages.open_teacher", lambda *_: pytest.fail("a teacher was loaded"))
        kava("run", second, "--until", "project")
    assert tree(store) == whole
    assert (tmp_path / "second/teachers/renamed.zarr").resolve() == store
    assert KVStore.open(Run(load_recipe(second)).target_path("renamed")).missing_parts() == []
    # Another content is stale as ever, is made beside it, and takes nothing from the other recipe.
    other = ["-s", "extract.dtype=float16"]
    assert "float32" in kava("extract", second, *other, code=2)
    kava("extract", second, *other, "--force")
    assert len(list((tmp_path / "shared").iterdir())) == 2
    assert (tmp_path / "second/teachers/renamed.zarr").resolve() != store
    assert tree(store) == whole
    assert "up to date" in kava("extract", first)
    # As where it is already in its place: what another run has captured, before there is a link to it.
    place = tmp_path / "second/teachers/renamed.zarr"
    place.unlink()
    assert "is shared with other runs" in kava("extract", second, "--force", code=2)
    place.unlink()
    made = (store / "parts/00000").stat().st_ctime_ns
    kava("extract", second, "--force", "--parts", "0")
    assert (store / "parts/00000").stat().st_ctime_ns > made
    assert place.resolve() == store
    assert tree(store) == whole
    # What others read is not thrown away as a whole.
    assert "is shared with other runs" in kava("extract", first, "--force", code=2)
    kava("extract", first, "--force", "--parts", "2")
    assert tree(store) == whole
    # Somebody removed it: the link leads nowhere, and it is captured again.
    shutil.rmtree(store)
    assert "missing" in kava("status", first)
    kava("extract", first)
    assert tree(store) == whole


@pytest.mark.slow
def test_two_runs_at_once_on_a_shared_capture(tmp_path: Path, tiny_models: dict[str, Path]) -> None:
    first, second = _recipes(tmp_path, tiny_models)
    for code, printed in together([["run", recipe, "--until", "project"] for recipe in (first, second)]):
        assert code == 0, printed
    (store,) = (tmp_path / "shared").iterdir()
    assert KVStore.open(store).verify() == []
    made = tree(store)
    alone = write_recipe(tmp_path, tiny_models, run_dir=str(tmp_path / "alone"), samples_per_part=3)
    kava("run", alone, "--until", "extract")
    assert tree(tmp_path / "alone/teachers/big.zarr") == made


def test_status_for_programs(tmp_path: Path, tiny_models: dict[str, Path]) -> None:
    recipe = write_recipe(tmp_path, tiny_models)
    kava("extract", recipe, "--parts", "1-2")
    found = json.loads(kava("status", recipe, "--json"))
    assert set(found) == {"run_dir", "complete", "stages", "students", "leftovers"}
    assert found["complete"] is False
    rows = {row["name"]: row for row in found["stages"]}
    keys = ["stage", "name", "teacher", "output", "state", "detail"]
    keys += ["parts_done", "parts_total", "parts_outdated", "failed_samples"]
    assert list(rows["extract"]) == keys
    values = ("big", "partial", 2, 5, 0, 0)
    assert tuple(rows["extract"][k] for k in ("teacher", "state", *keys[6:])) == values
    assert rows["student"]["parts_total"] is None
    assert "goes with --watch" in kava("status", recipe, "--every", 3, code=2)
    assert "for people" in kava("status", recipe, "--watch", "--json", code=2)


def test_an_interruption_ends_watching(
    tmp_path: Path, tiny_models: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = write_recipe(tmp_path, tiny_models)
    monkeypatch.setattr(time, "sleep", lambda seconds: os.kill(os.getpid(), signal.SIGINT))
    # A shell starts what runs in its background deaf to it.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        printed = kava("status", recipe, "--watch").splitlines()
    finally:
        signal.signal(signal.SIGINT, before)
    assert len(printed) == 1
    assert "missing" in printed[0]


def test_watching_ends_when_all_is_complete(tmp_path: Path, tiny_models: dict[str, Path]) -> None:
    """A line at a time, as in a log file; on a terminal a table in its place."""
    recipe = write_recipe(tmp_path, tiny_models, train={"max_steps": 2, "eval_steps": None})
    command = [*KAVA, "status", str(recipe), "--watch", "--every", "0.2"]
    watching = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    time.sleep(0.5)
    kava("run", recipe)
    printed = watching.communicate(timeout=120)[0].splitlines()
    assert watching.returncode == 0
    assert len(printed) > 1 or "5 complete" in printed[0]
    assert "5 complete" in printed[-1].replace("4 complete", "5 complete")
    from rich.console import Console

    from kava.pipeline.commands.status import survey, watch_run

    states = [survey(Run(load_recipe(recipe)))]
    states.insert(0, {**states[0], "complete": False})
    screen = Console(force_terminal=True, width=300, record=True)
    watch_run(lambda: states.pop(0), screen, 0.01)
    assert states == []
    assert "extract big" in screen.export_text()
