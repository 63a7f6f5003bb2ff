"""Several processes on one run: in the end the bits of one process, however they were started and whoever died."""

from __future__ import annotations

import json
import signal
import subprocess
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from fixtures.command import KAVA, kava, write_recipe
from fixtures.stores import flip, manifest, tree, write_store
from fixtures.together import together

from kava.store import KVStore, Lock, locked
from kava.store.fingerprint import file_stamp

# Everything that is split: text that a teacher writes, both ways of resampling, slots, two teachers' targets as one.
CHANGES: dict[str, Any] = {
    "samples_per_part": 3,
    "resample": {"materialize": True},
    "select": {"tokens": 4, "method": "uniform"},
}
STORES = ("student", "teachers", "reference.zarr", "resampled", "targets", "selected")


def _recipe(folder: Path, models: dict[str, Path], **changes: Any) -> Path:
    folder.mkdir()
    teachers = {
        name: {"model": str(models["teacher"]), "dtype": dtype}
        for name, dtype in (("big", "float32"), ("other", "bfloat16"))
    }
    generate = {"generate": {"max_new_tokens": 8, "chunk": 4}}
    path: Path = write_recipe(
        folder, models, **(CHANGES | {"teachers": teachers, "extract": generate, "fuse": {}} | changes)
    )
    return path


def _made(recipe: Path) -> dict[str, bytes]:
    """Every file of every store, and of the text; nothing may be left over."""
    root = recipe.parent / "run"
    found = {f"{name}/{file}": data for name in (*STORES, "generated") for file, data in tree(root / name).items()}
    found |= tree(root / "projectors")
    return found


def _all_done(ended: list[tuple[int, str]]) -> None:
    assert not any(code for code, _ in ended), "\n\n".join(printed for _, printed in ended)


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory, tiny_models: dict[str, Path]) -> Path:
    """What one process makes."""
    recipe = _recipe(tmp_path_factory.mktemp("alone") / "one", tiny_models)
    kava("run", recipe, "--until", "fuse")
    return recipe


def _ranks(recipe: Path, size: int) -> list[list[Any]]:
    return [["run", recipe, "--until", "fuse", "--rank", rank, "--world-size", size] for rank in range(size)]


def test_ranks_one_after_the_other(alone: Path, tmp_path: Path, tiny_models: dict[str, Path]) -> None:
    """The first needs what the second was to make, and does not wait for it."""
    recipe = _recipe(tmp_path / "ranks", tiny_models)
    for command in _ranks(recipe, 2):
        kava(*command)
    assert _made(recipe) == _made(alone)
    assert list((tmp_path / "ranks/run").glob(".*")) == []


def test_stage_by_stage_each_rank_makes_its_own(tmp_path: Path, tiny_models: dict[str, Path]) -> None:
    teachers = {"big": {"model": str(tiny_models["teacher"]), "dtype": "float32"}}
    recipe = _recipe(tmp_path / "ranks", tiny_models, teachers=teachers, fuse=None, extract={})
    store = tmp_path / "ranks/run/teachers/big.zarr"
    assert "4 parts are not there yet" in kava("extract", recipe, "--force", "--rank", 1, "--world-size", 2)
    assert KVStore.open(store).committed_parts() == [1, 3, 5, 7]
    assert "4 of 8 parts" in kava("status", recipe)
    assert "parts 0,2,4,6" in kava("project", recipe, "--rank", 1, "--world-size", 2, code=2).replace("(", "parts ")
    kava("extract", recipe, "--parts", "0-1,4")
    assert KVStore.open(store).committed_parts() == [0, 1, 3, 4, 5, 7]
    kava("extract", recipe, "--parts", "0-7", "--rank", 1, "--world-size", 3)
    assert "there is no part 8" in kava("extract", recipe, "--parts", "6-8", code=2)
    kava("extract", recipe, "--rank", 12, "--world-size", 20)  # More ranks than parts.
    assert KVStore.open(store).missing_parts() == [2, 6]
    kava("extract", recipe)
    # Of the rank that could not project, the resampled parts are there.
    for stage, folder, there in (
        ("resample", "resampled", [1, 5, 7]),
        ("project", "targets", []),
        ("select", "selected", []),
    ):
        kava(stage, recipe, "--teacher", "big", "--parts", "3-4")
        made = KVStore.open(tmp_path / f"ranks/run/{folder}/big.zarr")
        assert made.committed_parts() == sorted([3, 4, *there])
        kava("run", recipe, "--only", stage)
        assert made.missing_parts() == []
    assert "training is not split" in kava("run", recipe, "--parts", "0", code=2)
    # Again, but only some: the others keep their files.
    files = {part: file_stamp(store / f"parts/{part:05d}/zarr.json") for part in range(8)}
    kava("extract", recipe, "--force", "--parts", "2-3")
    changed = {part for part in range(8) if file_stamp(store / f"parts/{part:05d}/zarr.json") != files[part]}
    assert changed == {2, 3}
    assert "up to date" in kava("project", recipe)
    assert "there is no part 99" in kava("extract", recipe, "--parts", "99", code=2)
    # What the others read is nobody's to throw away.
    before = tree(tmp_path / "ranks/run")
    for stage in ("student", "reference"):
        printed = kava("run", recipe, "--only", stage, "--force", stage, "--rank", 1, "--world-size", 2, code=2)
        assert "what other ranks write would be thrown away too" in printed
    printed = kava("extract", recipe, "-s", "extract.dtype=float16", "--force", "--parts", "99", code=2)
    assert "there is no part 99" in printed
    assert tree(tmp_path / "ranks/run") == before
    out = tmp_path / "copy.zarr"
    for rank in range(2):
        kava("transcode", store, out, "--codec", "none", "--rank", rank, "--world-size", 2)
        assert len(KVStore.open(out).committed_parts()) == 4 * (rank + 1)
    assert "3 parts are as they were written" in kava("verify", out, "--parts", "5-7")


def test_only_what_failed_or_is_damaged(tmp_path: Path, tiny_models: dict[str, Path]) -> None:
    teachers = {"big": {"model": str(tiny_models["teacher"]), "dtype": "float32"}}
    recipe = _recipe(tmp_path / "run", tiny_models, teachers=teachers, fuse=None, extract={})
    kava("extract", recipe, "--parts", "0-5")
    store = KVStore.open(tmp_path / "run/run/teachers/big.zarr")
    whole = tree(store.path)
    sample = [store.part(1).sample(i) for i in range(3)]
    store.drop_part(1)
    with store.write_part(1) as writer:
        writer.append(0, sample[0])
        writer.append(1, sample[1])
        writer.fail(2, sample[2].sample_id, sample[2].split, "the lights went out")
        writer.commit(written_by=store.part(0).written_by)
    flip(store.path / "parts/00004/keys/c/0/0/0/0", 50)
    spoiled = tree(store.path)
    printed = kava("extract", recipe, "-s", "extract.dtype=float16", "--retry-failed", code=2)
    assert "is not what this recipe describes" in printed
    assert "goes without --force" in kava("extract", recipe, "--force", "--retry-failed", code=2)
    assert tree(store.path) == spoiled
    kava("extract", recipe, "--only-failed", "--parts", "0-3")
    assert "part 4" in kava("verify", store.path, code=1)
    printed = kava("extract", recipe, "--only-failed", "--rank", 1, "--world-size", 2)
    assert "part 4" not in printed
    kava("extract", recipe, "--only-failed")
    assert tree(store.path) == whole  # Parts 6 and 7 are still missing.


@pytest.mark.parametrize("size", [2, pytest.param(3, marks=pytest.mark.slow), pytest.param(11, marks=pytest.mark.slow)])
def test_ranks_at_the_same_moment(alone: Path, tmp_path: Path, tiny_models: dict[str, Path], size: int) -> None:
    recipe = _recipe(tmp_path / "ranks", tiny_models)
    _all_done(together(_ranks(recipe, size)))
    assert _made(recipe) == _made(alone)
    assert list((tmp_path / "ranks/run").glob(".*")) == []


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [True, False])
def test_a_stale_run_is_made_again_together(
    alone: Path, tmp_path: Path, tiny_models: dict[str, Path], ranks: bool
) -> None:
    """All write the same rebuilds, and whoever completes one exchanges it while others are still at their last part."""
    recipe = _recipe(tmp_path / "ranks", tiny_models)
    kava("run", recipe, "--until", "fuse", "-s", "resample.method=mean", "-s", "project.heads=mean")
    assert _made(recipe) != _made(alone)
    commands = _ranks(recipe, 2) if ranks else [["run", recipe, "--until", "fuse"]] * 2
    _all_done(together(commands))
    assert _made(recipe) == _made(alone)
    assert list((tmp_path / "ranks/run").rglob(".*")) == []


@pytest.mark.slow
def test_a_forced_capture_is_made_again_together(alone: Path, tmp_path: Path, tiny_models: dict[str, Path]) -> None:
    recipe = _recipe(tmp_path / "ranks", tiny_models)
    kava("run", recipe, "--until", "fuse")
    for words in ([], ["--rank", "0", "--world-size", "2"]):
        second = ["--rank", "1", "--world-size", "2"] if words else []
        command = ["run", recipe, "--only", "extract", "--force", "extract"]
        _all_done(together([[*command, *words], [*command, *second]]))
        assert _made(recipe) == _made(alone)
        assert list((tmp_path / "ranks/run").rglob(".*")) == []


@pytest.mark.slow
def test_without_ranks_two_processes_share_the_work(alone: Path, tmp_path: Path, tiny_models: dict[str, Path]) -> None:
    recipe = _recipe(tmp_path / "ranks", tiny_models)
    _all_done(together([["run", recipe, "--until", "fuse"]] * 2))
    assert _made(recipe) == _made(alone)


@pytest.mark.slow
def test_a_rank_that_is_killed(alone: Path, tmp_path: Path, tiny_models: dict[str, Path]) -> None:
    recipe = _recipe(tmp_path / "ranks", tiny_models)
    watched = tmp_path / "ranks/run/teachers/big.zarr"
    (killed, _), (code, printed) = together(_ranks(recipe, 2), kill=0, watch=watched)
    assert killed == -signal.SIGKILL
    assert code == 0, printed
    kava(*_ranks(recipe, 2)[0])
    assert _made(recipe) == _made(alone)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1], ids=lambda number: number.name)
@pytest.mark.parametrize("stage", ["generate", "extract", "resample", "project", "select", "fuse"])
def test_asked_to_stop_it_can_be_put_back_into_the_queue(
    alone: Path, tmp_path: Path, tiny_models: dict[str, Path], stage: str, number: signal.Signals
) -> None:
    recipe = _recipe(tmp_path / "run", tiny_models)
    order = ["generate", "extract", "resample", "project", "select", "fuse"]
    if stage != "generate":
        kava("run", recipe, "--until", order[order.index(stage) - 1])
    folders = {
        "generate": "generated/answers",
        "extract": "teachers/big.zarr/parts",
        "resample": "resampled/big.zarr/parts",
    }
    folders |= {
        "project": "targets/big.zarr/parts",
        "select": "selected/big.zarr/parts",
        "fuse": "targets/fused.zarr/parts",
    }
    process = subprocess.Popen(
        [*KAVA, "run", str(recipe), "--only", stage], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    while not (tmp_path / "run/run" / folders[stage]).exists():
        assert process.poll() is None
        time.sleep(0.001)
    process.send_signal(number)
    printed = process.communicate()[0]
    assert process.returncode == 75, printed
    assert f"stopped by {number.name}" in printed
    assert "Traceback" not in printed
    kava("run", recipe, "--until", "fuse")
    assert _made(recipe) == _made(alone)


def test_a_lock_is_one_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "new/x.lock"
    first = Lock.take(path)
    assert first is not None
    assert Lock.take(path) is None
    first.release()
    assert not path.exists()
    told = []
    with locked(path, lambda: told.append("waits")):
        assert Lock.take(path) is None
    assert told == []
    monkeypatch.setattr("kava.store.lock.PATIENCE", 0.1)  # Whoever holds it may hang: it is done without.
    with locked(path), locked(path, lambda: told.append("waits")):
        assert told == ["waits"]
    assert json.dumps(sorted(p.name for p in path.parent.iterdir())) == "[]"


@pytest.mark.parametrize("reads", [True, False])
def test_whoever_is_at_work_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reads: bool) -> None:
    monkeypatch.setattr("kava.store.lock.PATIENCE", 0.3)
    store, samples = write_store(tmp_path / "store", [3, 4])
    path = tmp_path / "x.lock"
    held = Lock.take(path)
    assert held is not None
    done = threading.Event()

    def work() -> None:
        end, position = time.monotonic() + 1.5, 0
        with KVStore.create(tmp_path / "out", manifest(10_000, 10_000)).write_part(0) as writer:
            while time.monotonic() < end:
                time.sleep(0.02)
                if reads:
                    store.sample(1)
                else:
                    writer.append(position, replace(samples[0], sample_id=str(position)))
                position += 1
        done.set()
        held.release()

    thread = threading.Thread(target=work)
    thread.start()
    mine = Lock.take(path, wait=True)
    assert done.is_set()
    assert mine is not None
    assert Lock.take(path) is None  # It is held indeed, not done without.
    mine.release()
    thread.join()
