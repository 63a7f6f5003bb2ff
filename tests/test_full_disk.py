"""A disk that fills up under each stage that writes a store: exit code 75, nothing half-written, the same bits after."""

from __future__ import annotations

import gc
import subprocess
import time
from pathlib import Path

import pytest
from fixtures.command import kava, write_recipe
from fixtures.stores import mounted, tree, write_store

from kava.errors import RetryLaterError
from kava.hub import tokenizer_digest
from kava.store import KVGeometry, KVStore
from kava.train import TrainSettings, load_student, train_student
from kava.train.student import saving

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


@pytest.mark.parametrize(("writer", "share"), [("SafetensorError", 0.5), ("RuntimeError", 1.5)])
def test_a_disk_that_fills_up_under_a_checkpoint(
    tmp_path: Path, tiny_models: dict[str, Path], writer: str, share: float
) -> None:
    """Under the weights, or under the optimizer's state behind them; neither writer raises an `OSError`."""
    student, out = tiny_models["student"], tmp_path / "out"
    store, _ = write_store(
        tmp_path / "t.zarr",
        [9, 14, 6],
        kind="target",
        geometry=KVGeometry(num_layers=3, num_key_value_heads=4, head_dim=8),
        tokenizer_digest=tokenizer_digest(load_student(student)[1]),
    )
    settings = {"max_steps": 2, "alpha": 1.0, "batch_size": 2, "save_steps": 1, "logging_steps": 1, "report_to": []}
    weights = (student / "model.safetensors").stat().st_size // 1024
    with mounted(out, "-t", "tmpfs", "-o", f"size={int(share * weights) + 64}k", "tmpfs"):
        with pytest.raises(RetryLaterError, match="make room and run the same command again") as told:
            train_student(student, store, out, TrainSettings.model_validate(settings))
        assert told.value.__cause__ is not None
        assert type(told.value.__cause__.__cause__).__name__ == writer
        del told  # Its frames hold torch's file open.
        gc.collect()
        subprocess.run(["mount", "-o", f"remount,size={20 * weights}k", str(out)], check=True)
        assert train_student(student, store, out, TrainSettings.model_validate(settings)).steps == 2
        assert (out / "model.safetensors").is_file()


def test_a_disk_that_fills_up_under_a_tokenizer(tmp_path: Path, tiny_models: dict[str, Path]) -> None:
    tokenizer, place = load_student(tiny_models["student"])[1], tmp_path / "disk"
    with (
        mounted(place, "-t", "tmpfs", "-o", "size=8k", "tmpfs"),
        pytest.raises(RetryLaterError, match="no space left on device; make room"),
        saving(place),
    ):
        tokenizer.save_pretrained(place)


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
