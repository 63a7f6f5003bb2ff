"""A run whose stores an earlier version of kava wrote."""

from __future__ import annotations

import json
from pathlib import Path

from fixtures.command import kava, write_recipe
from fixtures.stores import overwrite

from kava.store import KVStore


def test_stores_of_an_older_format_are_stale_and_can_be_replaced(tmp_path: Path, tiny_models: dict[str, Path]) -> None:
    recipe = write_recipe(tmp_path, tiny_models, project={"heads": "random"})
    kava("run", recipe, "--until", "project")
    stores = [tmp_path / "run/teachers/big.zarr", tmp_path / "run/targets/big.zarr"]
    for store in stores:
        header = json.loads((store / "zarr.json").read_text())
        header["attributes"]["kava"]["format_version"] = 1
        overwrite(store / "zarr.json", json.dumps(header).encode())
    states = {row["stage"]: row for row in json.loads(kava("status", recipe, "--json"))["stages"]}
    assert states["extract big"]["state"] == "stale"
    assert "store format 1, this kava reads 2. write the store again" in states["extract big"]["detail"]
    assert "store format 1" in kava("extract", recipe, code=2)
    kava("extract", recipe, "--force")
    kava("run", recipe, "--until", "project")
    assert all(KVStore.open(store).verify() == [] for store in stores)
