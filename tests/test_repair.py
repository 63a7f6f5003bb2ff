"""`kava repair`: every kind of damage in every store of a run, made again to the same bits, and nothing else touched."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from fixtures.command import kava, write_recipe
from fixtures.stores import flip, overwrite, tree

from kava.pipeline import load_recipe
from kava.pipeline.capture_stages import ReferenceStage
from kava.pipeline.cluster import Share
from kava.pipeline.repair import repair_stage
from kava.pipeline.run import Run
from kava.store import KVStore, Lock
from kava.store.fingerprint import file_stamp


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory, tiny_models: dict[str, Path]) -> Path:
    """A recipe whose stores are all made."""
    folder = tmp_path_factory.mktemp("repair")
    recipe: Path = write_recipe(
        folder, tiny_models, resample={"materialize": True}, select={"tokens": 4, "method": "uniform"}
    )
    kava("run", recipe, "--until", "select")
    return recipe


@pytest.fixture
def recipe(done: Path, tmp_path: Path) -> Path:
    """A copy of it to damage."""
    shutil.copytree(done.parent / "run", tmp_path / "run")
    text = yaml.safe_load(done.read_text()) | {"run_dir": str(tmp_path / "run")}
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(text))
    return path


STORES = {
    "extract big": "teachers/big.zarr",
    "reference": "reference.zarr",
    "resample big": "resampled/big.zarr",
    "project big": "targets/big.zarr",
    "select big": "selected/big.zarr",
}


def _stamps(root: Path) -> dict[str, tuple[int, ...]]:
    return {p.relative_to(root).as_posix(): file_stamp(p) for p in root.rglob("*") if p.is_file()}


def _truncate(part: Path) -> None:
    shard = part / "keys/c/0/0/0/0"
    overwrite(shard, shard.read_bytes()[:-9])


def _other_store(part: Path) -> None:
    other = next(p for p in sorted(part.parents[3].glob("**/parts/00001")) if p.parent != part.parent)
    shutil.rmtree(part)
    shutil.copytree(other, part)


def _other_index(part: Path) -> None:
    shutil.rmtree(part)
    shutil.copytree(part.with_name("00002"), part)


def _linked(part: Path) -> None:
    part.rename(part.parents[1] / "elsewhere")
    part.symlink_to(part.parents[1] / "elsewhere")


DAMAGE: dict[str, Callable[[Path], None]] = {
    "flipped bit": lambda part: flip(part / "values/c/0/0/0/0", 33),
    "missing file": lambda part: (part / "tokens/c/0/0").unlink(),
    "truncated": _truncate,
    "another store's part": _other_store,
    "another part of this store": _other_index,
    "no JSON": lambda part: overwrite(part / "zarr.json", b'{"zarr'),
    "no table": lambda part: (part / "zarr.json").unlink(),
    "a link": _linked,
}


@pytest.mark.parametrize(
    ("label", "how"),
    [
        *(("extract big", how) for how in DAMAGE),
        ("reference", "flipped bit"),
        ("resample big", "another store's part"),
        ("project big", "no JSON"),
        ("select big", "truncated"),
    ],
)
def test_one_damaged_part_is_made_again_and_nothing_else(done: Path, recipe: Path, label: str, how: str) -> None:
    run = recipe.parent / "run"
    DAMAGE[how](run / STORES[label] / "parts/00001")
    before = _stamps(run)
    printed = kava("repair", recipe)
    assert "made part 1 again" in printed
    assert f"{label}: " in printed
    assert {n: data for n, data in tree(run).items() if "/elsewhere/" not in n} == tree(done.parent / "run")
    changed = {name for name, stamp in _stamps(run).items() if before.get(name) != stamp}
    assert changed
    assert all(name.startswith(f"{STORES[label]}/parts/00001/") for name in changed)
    assert not list(run.rglob(".aside-*"))
    assert kava("repair", recipe).count("are as they were written") == 5


def test_run_and_status_say_what_to_do(recipe: Path) -> None:
    flip(recipe.parent / "run/teachers/big.zarr/parts/00001/zarr.json", 300)
    assert "kava repair" in kava("run", recipe, "--until", "project", code=1)
    rows = {r["stage"]: r for r in json.loads(kava("status", recipe, "--json"))["stages"]}
    assert rows["extract big"]["state"] == "damaged"
    assert "damaged" in kava("status", recipe)


def test_a_damaged_parent_costs_no_targets(recipe: Path) -> None:
    run = recipe.parent / "run"
    before = tree(run / "targets")
    flip(run / "resampled/big.zarr/parts/00001/zarr.json", 300)
    kava("project", recipe, code=1)
    kava("repair", recipe, "--store", "project big", code=1)
    assert tree(run / "targets") == before


def test_the_manifest_and_the_headers_are_written_again(done: Path, recipe: Path) -> None:
    run = recipe.parent / "run"
    (run / "teachers/big.zarr/zarr.json").unlink()
    flip(run / "targets/big.zarr/zarr.json", 200)
    (run / "resampled/big.zarr/parts/zarr.json").unlink()
    printed = kava("repair", recipe)
    assert printed.count("written again from the recipe") == 2
    for name in STORES.values():
        assert tree(run / name) == tree(done.parent / "run" / name)


def test_a_cut_off_repair_goes_on(done: Path, recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = recipe.parent / "run"
    flip(run / "teachers/big.zarr/parts/00003/keys/c/0/0/0/0", 40)
    (run / "teachers/big.zarr/parts/00001/length/c/0").unlink()
    with monkeypatch.context() as patch:
        patch.setattr(
            "kava.store.part_writer.PartWriter.commit", lambda *_, **__: (_ for _ in ()).throw(OSError(28, ""))
        )
        kava("repair", recipe, "--store", "extract", code=75)
    store = KVStore.open(run / "teachers/big.zarr")
    assert store.parts_set_aside() == store.missing_parts() == [1, 3]
    assert "made parts 1, 3 again" in kava("repair", recipe, "--store", str(store.path))
    assert tree(store.path) == tree(done.parent / "run/teachers/big.zarr")


def test_what_was_never_written_stays_so(recipe: Path) -> None:
    store = KVStore.open(recipe.parent / "run/targets/big.zarr")
    store.drop_part(4)
    shutil.rmtree(recipe.parent / "run/selected")
    flip(store.path / "parts/00002/tokens/c/0/0", 5)
    printed = kava("repair", recipe)
    assert "select big:        not made yet" in printed
    assert "made part 2 again" in printed
    assert store.missing_parts() == [4]


def test_another_recipe_and_missing_parents_are_refused_before_anything_is_lost(recipe: Path) -> None:
    run = recipe.parent / "run"
    flip(run / "targets/big.zarr/parts/00002/tokens/c/0/0", 5)
    before = tree(run)
    assert "describes another store" in kava("repair", recipe, "-s", "project.heads=mean", code=2)
    shutil.move(run / "resampled", recipe.parent / "gone")
    assert "cannot be made again: there is no store" in kava("repair", recipe, "--store", "project", code=2)
    shutil.move(recipe.parent / "gone", run / "resampled")
    assert tree(run) == before
    assert "no such store, only 'extract big'" in kava("repair", recipe, "--store", "nope", code=2)


def test_what_is_not_split_is_repaired_by_one_process_at_a_time(done: Path, recipe: Path) -> None:
    """Another is at it: it has done it by the time it lets go of the lock, and this one finds nothing to do."""
    run = Run(load_recipe(recipe))
    stage, part = ReferenceStage(run), run.reference_path / "parts/00001"
    flip(part / "keys/c/0/0/0/0", 40)
    lock, told = Lock.take(run.root / ".reference.lock"), []
    assert lock is not None

    def say(label: str, line: str) -> None:
        told.append(line)
        if "waiting" in line:
            shutil.rmtree(part)
            shutil.copytree(done.parent / "run/reference.zarr/parts/00001", part)
            lock.release()

    repaired = repair_stage(stage, failed=False, share=Share(1, 2), scheduler=None, say=say)
    assert repaired is not None
    assert (repaired.damages, repaired.parts) == ((), ())
    assert [line.split()[-1] for line in told] == ["waiting", "written"]


def test_failed_samples_on_request(tmp_path: Path, tiny_models: dict[str, Path]) -> None:
    recipe = write_recipe(tmp_path, tiny_models, extract={"too_long": "skip"})
    corpus = tmp_path / "corpus.jsonl"
    corpus.write_text(corpus.read_text().replace("5 + 5 = 10. ", "5 " * 400))
    kava("run", recipe, "--until", "project")
    before, stamps = tree(tmp_path / "run"), _stamps(tmp_path / "run")
    assert "again" not in kava("repair", recipe)
    assert _stamps(tmp_path / "run") == stamps
    printed = kava("repair", recipe, "--failed", "--store", "reference", "--rank", 0, "--world-size", 2)
    assert "failed samples are left" in printed
    assert _stamps(tmp_path / "run") == stamps
    assert "made part 1 again" in kava("repair", recipe, "--failed")
    changed = {name for name, stamp in _stamps(tmp_path / "run").items() if stamps.get(name) != stamp}
    assert {name.split("/parts/")[0] for name in changed} == {"reference.zarr", "teachers/big.zarr"}
    assert tree(tmp_path / "run") == before
