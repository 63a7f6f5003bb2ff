"""Offline equals online: training from the stores, and with the teacher run live, is the same training."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from fixtures.command import kava, write_recipe
from fixtures.live import LiveTargets

from kava.pipeline import load_recipe
from kava.pipeline.run import Run
from kava.store import KVStore
from kava.train import TrainSettings, train_student

TERMS = {"loss", "ce", "kv", "grad_norm", "heldout_ce", "heldout_kv"} | {
    f"{side}_{layer}" for side in ("keys", "values") for layer in range(3)
}
SETTINGS: dict[str, Any] = {
    "max_steps": 12,
    "batch_size": 4,
    "logging_steps": 1,
    "eval_steps": 6,
    "learning_rate": 3e-3,
    "alpha": 2.0,
}


def _log(student: Path, targets: Any, out: Path) -> list[dict[str, Any]]:
    train_student(student, targets, out, TrainSettings.model_validate(SETTINGS))
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def _apart(one: list[dict[str, Any]], two: list[dict[str, Any]]) -> float:
    """The largest relative difference of any term in any step."""
    assert [line["step"] for line in one] == [line["step"] for line in two]
    apart = [abs(a[n] - b[n]) / abs(b[n]) for a, b in zip(one, two, strict=True) for n in TERMS & a.keys()]
    return float(max(apart))


def test_the_same_loss_curve_to_storage_precision(tmp_path: Path, tiny_models: dict[str, Path]) -> None:
    """Another tokenizer, depth, number of heads and width; the order of batches is the same by its seed."""
    logs = {}
    for dtype in ("float32", "bfloat16"):
        folder = tmp_path / dtype
        folder.mkdir()
        recipe = write_recipe(folder, tiny_models, extract={"dtype": dtype}, project={"dtype": dtype})
        kava("run", recipe, "--until", "project")
        run = Run(load_recipe(recipe))
        store = KVStore.open(run.target_path("big"))
        logs[dtype] = _log(run.student_dir, store, folder / "offline")
        if dtype == "float32":
            live = LiveTargets(run, "big", store.manifest)
            logs["live"] = _log(run.student_dir, live, folder / "online")
            assert live.passes > SETTINGS["max_steps"] * SETTINGS["batch_size"]
    assert live.manifest.tokenizer_digest != KVStore.open(run.teacher_path("big")).manifest.tokenizer_digest
    first, last = logs["live"][0], [line for line in logs["live"] if "kv" in line][-1]
    assert last["kv"] < 0.9 * first["kv"], "something was learned, so that the curves could part"
    assert _apart(logs["float32"], logs["live"]) < 1e-6
    # The maps are fitted on stored keys too, so bfloat16 comes in twice: eight bits each time.
    assert 1e-4 < _apart(logs["bfloat16"], logs["live"]) < 2e-2
