"""Lossy captures and rewritten stores in a whole run, on tiny random models."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from fixtures.command import kava, write_recipe
from fixtures.stores import tree

from kava.pipeline import load_recipe
from kava.pipeline.run import Run
from kava.store import DTYPES, LOSSY, KVStore


def test_a_run_on_a_lossy_capture(tmp_path: Path, tiny_models: dict[str, Path]) -> None:
    """The teacher store is the lossless one's numbers after the codec; targets come from it, by either way."""
    recipe = write_recipe(tmp_path, tiny_models)
    exact = tmp_path / "exact"
    kava("extract", recipe, "-s", f"run_dir={exact}")
    options = ("-s", "extract.codec=int8", "-s", "project.codec=int4")
    kava("run", recipe, *options)
    lossy, lossless = (KVStore.open(root / "teachers/big.zarr") for root in (tmp_path / "run", exact))
    assert lossy.manifest.fingerprint != lossless.manifest.fingerprint
    for mine, theirs in zip(lossy, lossless, strict=True):
        for name in ("keys", "values"):
            written = getattr(theirs, name)
            wanted = LOSSY["int8"].round_trip(name, written, 64, DTYPES["float32"])
            assert torch.equal(getattr(mine, name), wanted)
            assert not torch.equal(wanted, written)
            assert (wanted - written).float().norm() < 0.01 * written.float().norm()
    targets = KVStore.open(tmp_path / "run/targets/big.zarr")
    assert targets.manifest.codec == "int4"
    assert kava("verify", lossy.path, targets.path).count("are as they were written") == 2
    assert json.loads((tmp_path / "run/students/kv/metrics.jsonl").read_text().splitlines()[0])["kv"] > 0
    direct = tmp_path / "direct"
    kava("run", recipe, *options, "-s", "extract.keep=target", "-s", f"run_dir={direct}", "--until", "project")
    assert tree(direct / "targets/big.zarr").keys() == tree(targets.path).keys()
    for mine, theirs in zip(KVStore.open(direct / "targets/big.zarr"), targets, strict=True):
        assert torch.equal(mine.keys, theirs.keys)  # type: ignore[arg-type]
        assert torch.equal(mine.values, theirs.values)  # type: ignore[arg-type]


def test_a_rewritten_store_takes_the_place_of_the_original(tmp_path: Path, tiny_models: dict[str, Path]) -> None:
    """Nothing that was made from a capture is made again when only its codec changed."""
    recipe = write_recipe(tmp_path, tiny_models)
    kava("run", recipe, "--until", "project")
    teacher, other = tmp_path / "run/teachers/big.zarr", tmp_path / "rewritten.zarr"
    printed = kava("transcode", teacher, other, "--codec", "none")
    assert "5 parts" in printed
    assert "the same content" in printed
    targets = tree(tmp_path / "run/targets")
    teacher.rename(tmp_path / "original.zarr")
    other.rename(teacher)
    options = ("-s", "extract.codec=none")
    rows = {r["stage"]: r["state"] for r in json.loads(kava("status", recipe, *options, "--json"))["stages"]}
    assert rows["extract big"] == "complete"
    assert rows["project big"] == "complete"
    kava("run", recipe, *options, "--until", "project")
    assert tree(tmp_path / "run/targets") == targets
    assert Run(load_recipe(recipe)).teacher_manifest("big").fingerprint == KVStore.open(teacher).manifest.fingerprint
    lossy = kava("transcode", teacher, tmp_path / "lossy.zarr", "--codec", "int8", "--scheduler", "synchronous")
    assert "other content" in lossy
    assert "is the store to read" in kava("transcode", teacher, teacher, "--codec", "int8", code=2)
