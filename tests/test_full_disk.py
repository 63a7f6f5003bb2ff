"""A disk that fills up under each stage that writes a store: exit code 75, nothing half-written, the same bits after."""

from __future__ import annotations

import subprocess
import time
from pathlib import Path

import pytest
from fixtures.command import kava, write_recipe
from fixtures.stores import mounted, tree

from kava.store import KVStore

FOLDERS = {"extract": "teachers", "resample": "resampled", "project": "targets", "select": "selected"}


def test_a_disk_that_fills_up_under_each_stage(tmp_path: Path, tiny_models: dict[str, Path]) -> None:
    recipe = write_recipe(
        tmp_path, tiny_models, resample={"materialize": True}, select={"tokens": 4, "method": "uniform"}
    )
    kava("run", recipe, "--until", "select")
    for stage, folder in FOLDERS.items():
        place = tmp_path / "run" / folder
        whole = tree(place)
        place.rename(tmp_path / "kept")
        used = sum(4096 * -(-len(data) // 4096) for data in whole.values()) // 1024
        with mounted(place, "-t", "tmpfs", "-o", f"size={used // 2}k", "tmpfs"):
            printed = kava("run", recipe, "--only", stage, code=75)
            assert "no space left on device; make room and run the same command again" in printed
            assert str(place) in printed
            store = KVStore.open(place / "big.zarr")
            assert store.missing_parts()
            assert store.verify() == []
            # Another thread may be at its part still; the command itself would wait for it before it ends.
            deadline = time.monotonic() + 30
            while list(place.rglob(".tmp-*")) and time.monotonic() < deadline:
                time.sleep(0.02)
            assert not list(place.rglob(".tmp-*"))
            subprocess.run(["mount", "-o", f"remount,size={2 * used + 500}k", str(place)], check=True)
            kava("run", recipe, "--only", stage)
            assert tree(place) == whole
        place.rmdir()
        (tmp_path / "kept").rename(place)


@pytest.mark.parametrize("command", [("inspect",), ("inspect", "--json"), ("verify",)])
def test_read_only_media_are_inspected_and_verified(
    tmp_path: Path, tiny_models: dict[str, Path], command: tuple[str, ...]
) -> None:
    recipe = write_recipe(tmp_path, tiny_models)
    kava("extract", recipe)
    store = tmp_path / "run/teachers/big.zarr"
    KVStore.open(store).drop_part(1)
    with mounted(tmp_path / "run", "--bind", str(tmp_path / "run")):
        subprocess.run(["mount", "-o", "remount,ro,bind", str(tmp_path / "run")], check=True)
        kava(command[0], store, *command[1:])
        assert "4 of 5 parts" in kava("status", recipe)
        printed = kava("extract", recipe, code=2)
        assert "read-only file system" in printed
