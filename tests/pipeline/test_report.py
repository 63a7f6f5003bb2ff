"""`kava project --report` on tiny models, and projections whose layers the fit chooses, from the recipe on."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from fixtures.command import kava, write_recipe
from fixtures.stores import tree

from kava.pipeline import Projector, load_recipe
from kava.pipeline.project_stage import ProjectStage
from kava.pipeline.run import Run
from kava.pipeline.transform import calibration_pairs
from kava.store import KVStore


@pytest.fixture(scope="module")
def captured(tmp_path_factory: pytest.TempPathFactory, tiny_models: dict[str, Path]) -> Path:
    """A recipe whose teacher is captured."""
    recipe: Path = write_recipe(tmp_path_factory.mktemp("report"), tiny_models)
    kava("run", recipe, "--until", "extract")
    return recipe


def _report(recipe: Path, **settings: Any) -> tuple[str, dict[str, Any]]:
    overrides = [part for key, value in settings.items() for part in ("-s", f"project.{key}={value}")]
    printed = kava("project", recipe, "--report", *overrides)
    folder = recipe.parent / "run/projectors"
    picture = (folder / "big.png").read_bytes()
    assert picture[:8] == b"\x89PNG\r\n\x1a\n"
    assert struct.unpack(">II", picture[16:24]) == (1440, 1080)
    return printed, json.loads((folder / "big.report.json").read_text())


CASES: dict[str, dict[str, Any]] = {
    "procrustes": {"heads": "procrustes"},
    "ridge on the best layers": {"heads": "ridge", "layers": "best", "top_k": 2},
    "cca by head, unit scale": {"heads": "cca", "per": "head", "scale": "unit", "layers": "cka"},
    "random": {"heads": "random", "layers": "last-aligned"},
    "mean, unit scale": {"heads": "mean", "scale": "unit"},
}


@pytest.mark.parametrize("name", CASES)
def test_everything_is_measured_for_every_kind_of_map(captured: Path, name: str) -> None:
    printed, report = _report(captured, **CASES[name])
    assert not (captured.parent / "run/targets").exists(), "a report writes no targets"
    assert len(report["rows"]) == 3
    for row in report["rows"]:
        for kind in ("keys", "values"):
            assert 0 < row[f"{kind}_explained_variance"] <= 1 + 1e-9
            assert row[f"{kind}_r2"] <= 1
            assert row[f"{kind}_r2_naive"] <= 1
        assert 0 < row["cka"] <= 1
        assert -1 <= row["attention_naive"] <= 1
        assert -1 <= row["attention_fitted"] <= 1
    assert [len(row) for row in report["measured"]["cka"]] == [3] * 5
    assert report["measured"]["calibration"]["samples"] == {"fit": 14, "heldout": 4}
    assert report["attention"]["samples"] == 4
    for word in ("CKA", "K R2 naive", "V kept", "attention", "mean", "big.png", "5 layers x 2 KV heads x 16"):
        assert word in printed
    assert ("K penalty" in printed) == (CASES[name]["heads"] == "ridge")
    if CASES[name]["heads"] == "mean":
        assert all(row["keys_r2"] == pytest.approx(row["keys_r2_naive"]) for row in report["rows"])
        assert all(row["attention_fitted"] == pytest.approx(row["attention_naive"]) for row in report["rows"])
    if CASES[name]["heads"] in ("procrustes", "ridge", "cca"):
        card = json.loads((captured.parent / "run/projectors/big.json").read_text())
        for mine, its in zip(report["rows"], card["diagnostics"]["keys"], strict=True):
            assert mine["keys_r2"] == pytest.approx(its["r2"])


def test_a_student_that_is_its_own_teacher(tmp_path: Path, tiny_models: dict[str, Path]) -> None:
    """The identity of the same model: R² and attention are one in every layer, and CKA is on the diagonal."""
    recipe = write_recipe(tmp_path, tiny_models, teachers={"big": {"model": str(tiny_models["student"])}})
    kava("run", recipe, "--until", "extract", "-s", "teachers.big.dtype=float32")
    for scale in ("own", "unit"):
        _, report = _report(recipe, heads="identity", scale=scale)
        for row in report["rows"]:
            assert row["keys_r2"] == pytest.approx(1, abs=1e-4)
            assert row["values_r2"] == pytest.approx(1, abs=1e-4)
            assert row["cka"] == pytest.approx(1, abs=1e-4)
            assert row["attention_fitted"] == pytest.approx(1, abs=1e-4)


def test_layers_that_the_fit_chooses_are_in_the_projector_and_their_rule_in_the_store(
    captured: Path, tmp_path: Path
) -> None:
    options = ("-s", f"run_dir={tmp_path / 'run'}", "-s", "project.heads=cca", "-s", "project.layers=best")
    printed = kava("run", captured, *options, "--until", "project")
    assert "reference" in printed
    run = Run(load_recipe(captured, [options[1], options[3], options[5]]))
    store = KVStore.open(run.target_path("big"))
    fit = store.manifest.parameters["project"]
    assert (fit["layers"], fit["top_k"]) == ("best", 4)
    assert fit["calibration"] == run.calibration.digest
    assert store.manifest.parents["reference"] == KVStore.open(run.reference_path).manifest.fingerprint
    projector = Projector.load(run.projector_path("big"))
    assert len(projector.layers) == 3
    assert {len(sources) for sources in projector.layers} <= {1, 2, 3, 4}
    assert "up to date" in kava("project", captured, *options)
    # What is chosen on other samples, or of fewer layers, is another map.
    for change in ("project.top_k=2", "project.calibration_samples=9", "project.ridge=[0.5]", "project.layers=cka"):
        states = json.loads(kava("status", captured, *options, "-s", change, "--json"))["stages"]
        assert {row["stage"]: row["state"] for row in states}["project big"] in ("stale", "blocked"), change
    # The targets are what the projector makes of the capture.
    stage = ProjectStage(run, "big")
    ids = [store[0].sample_id]
    (pair,) = calibration_pairs(stage.transform(stage.parent()), stage.parent(), ids, None)
    assert pair is not None
    ((keys, values), _) = pair
    made = store[0]
    assert made.keys is not None
    assert made.values is not None
    kept = torch.from_numpy(made.mask)
    torch.testing.assert_close(projector.apply("keys", keys), made.keys[kept], atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(projector.apply("values", values), made.values[kept], atol=1e-6, rtol=1e-5)


def test_the_plan_says_how_layers_are_chosen(captured: Path) -> None:
    printed = kava("run", captured, "--dry-run", "-s", "project.layers=best", "-s", "project.per=head")
    assert "best, chosen on 256 calibration samples" in printed
    assert "procrustes, each head by itself: up to 128 -> 32" in printed
    assert "2->0 3->1 4->2" in kava("run", captured, "--dry-run", "-s", "project.layers=last-aligned")


def test_a_report_leaves_the_projector_of_targets_that_are_there(captured: Path, tmp_path: Path) -> None:
    options = ("-s", f"run_dir={tmp_path / 'run'}")
    kava("run", captured, *options, "--until", "project")
    before = {k: v for k, v in tree(tmp_path / "run").items() if "report" not in k and not k.endswith(".png")}
    kava("project", captured, *options, "-s", "project.heads=cca", "--report")
    assert json.loads((tmp_path / "run/projectors/big.report.json").read_text())["settings"]["heads"] == "cca"
    after = {k: v for k, v in tree(tmp_path / "run").items() if "report" not in k and not k.endswith(".png")}
    assert before == after


def test_before_the_capture_there_is_only_the_layer_map(tmp_path: Path, tiny_models: dict[str, Path]) -> None:
    recipe = write_recipe(tmp_path, tiny_models)
    printed = kava("project", recipe, "--report", "-s", "project.heads=mean")
    assert "not captured yet" in printed
    folder = tmp_path / "run/projectors"
    assert json.loads((folder / "big.report.json").read_text())["layers"] == [[0], [2], [4]]
    assert (folder / "big.png").read_bytes()[:4] == b"\x89PNG"
    assert not (folder / "big.safetensors").exists()
    assert "there is no store at" in kava("project", recipe, "--report", "-s", "project.layers=cka", code=2)
    assert "--report makes no targets, so it goes without --force" in kava(
        "project", recipe, "--report", "--force", code=2
    )


def test_one_calibration_sample_is_enough_for_maps_that_do_not_choose(captured: Path) -> None:
    printed, report = _report(captured, heads="procrustes", calibration_samples=1)
    assert "attention is not measured: no calibration sample is held out" in printed
    assert report["rows"][0]["keys_r2"] is None
    options = ("-s", "project.heads=ridge", "-s", "project.calibration_samples=1")
    assert "give it 2 calibration samples" in kava("project", captured, "--report", *options, code=2)
