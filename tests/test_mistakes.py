"""What a user gets wrong, and what the machine does: one line, an exit code, and nothing lost."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
from fixtures.command import kava, rows, write_recipe
from fixtures.stores import tree
from fixtures.tokenizers import TEXTS

from kava.store import KVStore


@pytest.mark.parametrize(
    ("changes", "command", "message"),
    [
        ({}, ("run", "RECIPE", "-s", "train.alfa=1"), "did you mean 'alpha'"),
        ({}, ("run", "RECIPE", "--only", "projct"), "did you mean project"),
        ({}, ("train", "RECIPE"), "is not made yet"),
        ({}, ("project", "RECIPE"), "there is no store at"),
        (
            {"corpus": {"fields": {"prompt": "q", "rationale": "q", "answer": "q"}}},
            ("extract", "RECIPE"),
            "corpus.jsonl line 1: none of",
        ),
        ({"teachers": {"big": {"model": "./nothing"}}}, ("extract", "RECIPE"), "no such file or folder"),
        ({"teachers": {"big": {"model": "no/such-model"}}}, ("extract", "RECIPE"), "cannot be reached"),
        ({"run_dir": "/proc/kava"}, ("run", "RECIPE", "--until", "extract"), "cannot write here"),
        ({}, ("extract", "RECIPE", "--teacher", "small"), "there is no teacher 'small' in the recipe, only big"),
        ({"student": {"tokenizer": "./none"}}, ("run", "RECIPE", "--only", "student"), "no such file or folder"),
        ({}, ("extract", "RECIPE", "--check-parity", "2", "--parts", "0"), "--check-parity stores nothing"),
        ({}, ("extract", "RECIPE", "--check-parity", "2", "--force"), "--check-parity stores nothing"),
        ({}, ("evaluate", "RECIPE", "--recipe", "other.yaml"), "--recipe other.yaml goes with a folder of weights"),
        ({"project": {"layers": [0, 1]}}, ("run", "RECIPE", "--dry-run"), "lists 2 layers, the student has 3"),
    ],
)
def test_mistakes_are_one_line_and_exit_2(
    tmp_path: Path, tiny_models: dict[str, Path], changes: dict[str, Any], command: tuple[str, ...], message: str
) -> None:
    recipe = write_recipe(tmp_path, tiny_models, **changes)
    printed = kava(*(str(recipe) if part == "RECIPE" else part for part in command), code=2)
    assert message in printed
    (line,) = [line for line in printed.splitlines() if line.startswith("kava: ")]
    assert message in line


def test_too_long_a_text_is_refused_before_the_first_part(tmp_path: Path, tiny_models: dict[str, Path]) -> None:
    recipe = write_recipe(tmp_path, tiny_models)
    records = rows()
    records[12]["prompt"] = TEXTS[0] * 40
    (tmp_path / "corpus.jsonl").write_text("\n".join(json.dumps(row) for row in records))
    printed = kava("extract", recipe, code=2)
    assert "sample 'r12': " in printed
    assert "the model reads at most 256 (max_position_embeddings" in printed
    assert not (tmp_path / "run").exists()
    assert "1 failed samples" in kava("extract", recipe, "-s", "extract.too_long=skip")
    before = tree(tmp_path / "run/teachers")
    table = tmp_path / "run/teachers/big.zarr/parts/00002/zarr.json"
    made = table.stat().st_mtime_ns
    kava("extract", recipe, "-s", "extract.too_long=skip", "--retry-failed")
    assert table.stat().st_mtime_ns != made, "the part with the failed sample was captured again"
    assert tree(tmp_path / "run/teachers") == before
    kava("run", recipe, "-s", "extract.too_long=skip")


def test_a_full_disk_is_75_and_the_rest_stays_valid(tmp_path: Path, tiny_models: dict[str, Path]) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=700k", "tmpfs", str(disk)], capture_output=True)
    if mounted.returncode:
        pytest.skip(f"mounting a small file system needs rights: {mounted.stderr.decode().strip()}")
    try:
        recipe = write_recipe(tmp_path, tiny_models, run_dir=str(disk / "run"))
        printed = kava("run", recipe, "--only", "extract", code=75)
        assert "no space left on device" in printed
        assert "run the same command again" in printed
        store = KVStore.open(disk / "run/teachers/big.zarr")
        assert store.verify() == []
        assert store.missing_parts()
        assert not list((disk / "run/teachers/big.zarr/parts").glob(".tmp*"))
        subprocess.run(["mount", "-o", "remount,size=50m", str(disk)], check=True)
        kava("run", recipe, "--only", "extract")
        assert not KVStore.open(disk / "run/teachers/big.zarr").missing_parts()
    finally:
        subprocess.run(["umount", str(disk)], check=True)
