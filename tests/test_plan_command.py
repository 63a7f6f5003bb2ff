"""The plan against what a run leaves on the disk."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from fixtures.command import kava, write_recipe

from kava.pipeline import load_recipe
from kava.pipeline.run import Run
from kava.pipeline.stages import stages_of
from kava.pipeline.store_stages import StoreStage
from kava.store import KVStore

# Everything that is a store, with arrays of its own: signals, slots, two teachers as one.
CHANGES: dict[str, Any] = {"resample": {"materialize": True}, "fuse": {}, "select": {"tokens": 4, "method": "uniform"}}


def _recipe(root: Path, models: dict[str, Path], **changes: Any) -> Path:
    teachers = {name: {"model": str(models["teacher"]), "dtype": "float32"} for name in ("big", "other")}
    path: Path = write_recipe(root, models, **({**CHANGES, "teachers": teachers} | changes))
    # Longer texts than the other tests have: with a page for every sample there would be nothing to get wrong.
    corpus = root / "corpus.jsonl"
    rows = [json.loads(line) for line in corpus.read_text().splitlines()]
    for number, row in enumerate(rows):
        row["rationale"] = row["rationale"] * (1 + 3 * number % 7)
    corpus.write_text("\n".join(json.dumps(row) for row in rows))
    return path


def _plan(*arguments: Any) -> dict[str, Any]:
    return dict(json.loads(kava("plan", *arguments, "--json")))


def _check_sizes(plan: dict[str, Any], recipe: Path, overrides: list[str]) -> None:
    run = Run(load_recipe(recipe, overrides))
    stages = {stage.label: stage for stage in stages_of(run) if isinstance(stage, StoreStage)}
    planned = {store["stage"]: store for store in plan["stores"]}
    assert stages.keys() == planned.keys()
    for label, stage in stages.items():
        store, told = KVStore.open(stage.output), planned[label]
        assert told["path"] == str(stage.output)
        assert told["tokens"] == store.num_tokens, label
        assert told["parts"] == store.manifest.num_parts == len(store.committed_parts()), label
        assert told["files"] == sum(path.is_file() for path in store.path.rglob("*")), label
        assert told["bytes"] == pytest.approx(store.size_on_disk(), rel=0.02), label
    assert plan["bytes"] == pytest.approx(sum(KVStore.open(s.output).size_on_disk() for s in stages.values()), rel=0.02)


def test_planned_bytes_are_those_on_disk(tmp_path: Path, tiny_models: dict[str, Path]) -> None:
    """Without compression from the token counts alone."""
    recipe = _recipe(tmp_path, tiny_models, extract={"codec": "none", "confidence": True, "importance": True})
    overrides = ["project.codec=none", "project.heads=random"]
    options = [word for override in overrides for word in ("-s", override)]
    plan = _plan(recipe, *options)
    assert not (tmp_path / "run").exists()
    assert plan["tokens"]["big"]["how"] == "exact"
    assert {store["estimated"] for store in plan["stores"]} == {None}
    kava("run", recipe, *options, "--until", "fuse")
    _check_sizes(plan, recipe, overrides)
    assert plan["disks"][0]["needed"] == plan["bytes"]
    assert _plan(recipe, *options)["disks"][0]["needed"] < plan["bytes"] / 20  # It is there now.


@pytest.mark.slow
@pytest.mark.parametrize("codec", ["blosc-zstd", "int8"])
def test_a_probe_measures_compression(tmp_path: Path, tiny_models: dict[str, Path], codec: str) -> None:
    recipe = _recipe(tmp_path, tiny_models, extract={"codec": codec, "dtype": "bfloat16"}, select=None)
    overrides = [f"project.codec={codec}"]
    options = ["-s", *overrides]
    plan = _plan(recipe, *options, "--probe")
    assert not (tmp_path / "run").exists()
    measured = {store["stage"] for store in plan["stores"] if store["estimated"] is None}
    assert measured >= {"extract big", "resample big", "project big", "extract other"}
    assert {*plan["seconds"]} == {"extract big", "project big", "extract other", "project other", "reference", "train"}
    assert all(seconds > 0 for seconds in plan["seconds"].values())
    kava("run", recipe, *options, "--until", "fuse")
    _check_sizes(plan, recipe, overrides)
