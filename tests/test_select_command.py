"""Signals and slots by the command: extract, select, verify, inspect, on tiny random models."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from fixtures.command import kava, rows, write_recipe
from fixtures.stores import overwrite, tree

from kava.errors import StageError
from kava.extract.hf import HFTeacher
from kava.extract.rope import rotary_tables
from kava.hub import load_config
from kava.pipeline import Projector, load_recipe
from kava.pipeline.run import Run
from kava.pipeline.select.rules import Candidates, Selector
from kava.store import KVStore, Segment, Split

SLOTS = {"tokens": 4, "mix_lambda": 0.5}


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory, tiny_models: dict[str, Path]) -> Path:
    """A recipe with signals and slots, run up to the slots; one sample has no answer, one no rationale."""
    root = tmp_path_factory.mktemp("slots")
    recipe: Path = write_recipe(
        root, tiny_models, extract={"importance": True, "confidence": True}, select=SLOTS, project={"heads": "pca"}
    )
    records = rows()
    records[2]["answer"], records[11]["rationale"] = "", ""
    (root / "corpus.jsonl").write_text("\n".join(json.dumps(row) for row in records))
    printed = kava("run", recipe, "--until", "select")
    assert "select big:" in printed
    return recipe


def _stores(recipe: Path, *overrides: str) -> tuple[Run, KVStore, KVStore]:
    run = Run(load_recipe(recipe, overrides))
    return run, KVStore.open(run.teacher_path("big")), KVStore.open(run.selected_path("big"))


def test_signals_are_stored_as_the_teacher_gives_them(done: Path) -> None:
    run, teacher, _ = _stores(done)
    encoder = run.teacher_encoder("big")
    tokens = [encoder.encode(record) for record in run.corpus.records]
    with HFTeacher.load(run.teacher_source("big"), dtype="float32", importance=True, confidence=True) as model:
        for index in (0, 2, 11, 23):
            (captured,) = model.capture([tokens[index]])
            for name, array in captured.extras.items():
                np.testing.assert_allclose(teacher[index].extras[name], array, rtol=1e-4, atol=1e-6)
    assert (teacher.per_sample("nats") > 0).all()
    assert teacher.verify() == []
    for index, sample in enumerate(teacher):
        known = ~np.isnan(sample.extras["importance"]).all((1, 2))
        rationale = sample.segments == Segment.RATIONALE
        np.testing.assert_array_equal(known, rationale if index not in (2, 11) else np.zeros(len(sample), bool))


def test_slots_are_the_teachers_tokens_at_the_stored_indices(done: Path) -> None:
    _, teacher, slots = _stores(done)
    assert slots.manifest.kind == "selected"
    assert slots.geometry == teacher.geometry
    assert slots.manifest.page_tokens == 4
    assert slots.failed == {"r2": "no importance to select by: the sample has no answer"}
    assert {*slots.indices(Split.HELDOUT)} == {*teacher.indices(Split.HELDOUT)} - {2}
    for index in slots.indices():
        source, made = teacher[index], slots[index]
        places = np.flatnonzero(source.segments == Segment.RATIONALE)
        filled = min(4, len(places))
        assert made.mask.tolist() == [True] * filled + [False] * (4 - filled)
        assert filled == (0 if index == 11 else 4)
        assert made.positions.tolist() == [0, 1, 2, 3]
        assert set(made.segments.tolist()) == {Segment.RATIONALE}
        if not filled:
            continue
        assert source.keys is not None
        assert source.values is not None
        kept = torch.from_numpy(source.extras["importance"][places])
        wanted, scores = Selector("r-kv", 4, 0.5)(Candidates("", source.keys[places], kept))
        np.testing.assert_array_equal(made.extras["indices"], places[wanted.numpy()])
        np.testing.assert_allclose(made.extras["scores"], scores, rtol=1e-6)
        for layer, head, slot in np.ndindex(*teacher.geometry.shape[:2], 4):
            at = made.extras["indices"][slot, layer, head]
            assert torch.equal(made.keys[slot, layer, head], source.keys[at, layer, head])  # type: ignore[index]
            assert torch.equal(made.values[slot, layer, head], source.values[at, layer, head])  # type: ignore[index]
    assert slots.verify() == []


def test_a_control_chooses_others_and_a_second_run_nothing(done: Path) -> None:
    _, _, slots = _stores(done)
    before = tree(slots.path)
    assert "up to date" in kava("select", done)
    assert "mix_lambda" in kava("status", done, "-s", "select.mix_lambda=0.9")
    rkv = {index: slots[index].extras["indices"] for index in slots.indices()}
    for changes in (["method=random"], ["method=crop"], ["keys=rotated", "mix=zscore"]):
        printed = kava("select", done, *(word for change in changes for word in ("-s", f"select.{change}")))
        assert "made again" in printed
        control = KVStore.open(slots.path)
        assert any((control[i].extras["indices"] != found).any() for i, found in rkv.items()), changes
    assert kava("select", done, "-s", "select.seed=3").count("stale") == 1  # Of another method than random.
    assert tree(slots.path) == before


def test_rotated_keys_are_those_of_the_teachers_cache(done: Path, tmp_path: Path) -> None:
    overrides = ("select.method=redundancy-only", "select.keys=rotated")
    kava("select", done, *(word for override in overrides for word in ("-s", override)))
    try:
        run, teacher, slots = _stores(done, *overrides)
        config = load_config(run.teacher_source("big"))
        assert slots.failed == {}
        for index in (0, 2, 23):
            source = teacher[index]
            places = np.flatnonzero(source.segments == Segment.RATIONALE)
            tables = rotary_tables(config, torch.from_numpy(source.positions).long())
            assert source.keys is not None
            turned = torch.stack([table.rotate(source.keys[:, layer]) for layer, table in enumerate(tables)], dim=1)
            wanted, _ = Selector("redundancy-only", 4)(Candidates("", turned[places], None))
            np.testing.assert_array_equal(slots[index].extras["indices"], places[wanted.numpy()])
    finally:
        kava("select", done)


def test_slots_in_the_students_geometry_keep_the_teachers_indices(done: Path) -> None:
    _, _, slots = _stores(done)
    plain = {index: slots[index] for index in slots.indices()}
    kava("select", done, "-s", "select.geometry=student")
    try:
        run, teacher, projected = _stores(done, "select.geometry=student")
        assert projected.geometry == run.student_geometry != teacher.geometry
        projector = Projector.load(run.projector_path("big"))
        for index, own in plain.items():
            made = projected[index]
            for name in ("indices", "scores"):
                np.testing.assert_array_equal(made.extras[name], own.extras[name])
            assert made.keys is not None
            assert own.keys is not None
            wanted = projector.apply("keys", own.keys)
            wanted[~torch.from_numpy(own.mask)] = 0
            torch.testing.assert_close(made.keys, wanted)
            assert not made.keys[~torch.from_numpy(made.mask)].any()
        assert projected.verify() == []
        assert "select.geometry: student needs" in kava(
            "run", done, "--only", "select", "-s", "select.geometry=student", "-s", "project.seed=9", code=2
        )
    finally:
        kava("select", done)


def test_a_part_captured_again_makes_only_its_slots_stale(done: Path) -> None:
    _, teacher, slots = _stores(done)
    before = {part: slots.part(part).digest for part in slots.committed_parts()}
    whole = tree(slots.path)
    saved = tree(teacher.path / "parts/00003")
    samples = [teacher.part(3).sample(position) for position in range(5)]
    teacher.drop_part(3)
    with teacher.write_part(3) as writer:
        for position, sample in enumerate(samples):
            writer.append(position, sample) if position else writer.fail(0, sample.sample_id, sample.split, "x")
        writer.commit()
    assert "1 to be made again" in kava("status", done)
    kava("run", done, "--only", "select")
    again = KVStore.open(slots.path)
    assert [part for part in before if again.part(part).digest != before[part]] == [3]
    for name, content in saved.items():
        overwrite(teacher.path / "parts/00003" / name, content)
    kava("run", done, "--only", "select")
    assert tree(slots.path) == whole


def test_inspect_verify_and_plan_know_of_them(done: Path) -> None:
    _, teacher, slots = _stores(done)
    printed = kava("inspect", teacher.path)
    for wanted in ("importance (float32 per row)", "entropy (float64 per sample)", "nats per byte"):
        assert wanted in printed
    found = json.loads(kava("inspect", teacher.path, "--json"))["facts"]["confidence"]
    nats, size = (float(teacher.per_sample(name).sum()) for name in ("nats", "text_bytes"))
    assert found["nats_per_byte"] == pytest.approx(nats / size, abs=1e-4)
    weights = teacher[1].extras["importance"][teacher[1].segments == Segment.RATIONALE]
    own = weights.mean((1, 2)).max()
    printed = kava("inspect", teacher.path, "--sample", "r1")
    assert "importance" in printed
    assert f"{own:.4f}" in printed
    printed = kava("inspect", slots.path)
    for wanted in ("selected", "indices (int32 per row)", "per sample 4 to 4", '"method": "r-kv"', "1 failed"):
        assert wanted in printed
    printed = kava("inspect", slots.path, "--sample", "r1")
    assert f"{slots[1].extras['indices'][0].min()}..{slots[1].extras['indices'][0].max()}" in printed
    assert "5 parts are as they were written" in kava("verify", slots.path)
    assert "4 of the rationale by r-kv, 5,120 bytes per sample" in kava("run", done, "--dry-run")
    assert {"stage": "select big", "state": "complete"}.items() <= json.loads(kava("status", done, "--json"))["stages"][
        3
    ].items()


def test_the_trainer_refuses_slots(done: Path) -> None:
    from kava.train import TrainSettings, train_student

    run, _, slots = _stores(done)
    with pytest.raises(StageError, match="is a selected store: its slots are no targets"):
        train_student(run.student_dir, slots, done.parent / "x", TrainSettings.model_validate({"max_steps": 1}))


def test_an_old_capture_is_not_continued_with_signals(tmp_path: Path, tiny_models: dict[str, Path]) -> None:
    recipe = write_recipe(tmp_path, tiny_models)
    kava("extract", recipe)
    stores = tmp_path / "run/teachers"
    before = tree(stores)
    printed = kava("extract", recipe, "-s", "extract.confidence=true", code=2)
    assert "extras.nats" in printed
    assert "--force" in printed
    assert tree(stores) == before
    printed = kava("select", recipe, "-s", "select.tokens=3", "-s", "extract.importance=true", code=2)
    assert "has no importance, which select.method: r-kv needs" in printed
    kava("select", recipe, "-s", "select.tokens=3", "-s", "select.method=uniform")
    assert len(KVStore.open(tmp_path / "run/selected/big.zarr").failed) == 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"select": {"tokens": 3}}, "select.method: r-kv needs extract.importance: true"),
        ({"select": {"tokens": 3, "method": "rkv"}}, "select.method: 'rkv' is unknown; did you mean 'r-kv'?"),
        (
            {"select": {"tokens": 3, "segment": "answer"}, "extract": {"importance": True}},
            "method r-kv chooses from the rationale alone",
        ),
        ({"select": {"method": "crop"}}, "'select.tokens' is missing"),
        ({"extract": {"backend": "vllm", "importance": True}}, "extract.importance needs extract.backend: hf"),
        ({"extract": {"backend": "vllm", "confidence": True}}, "extract.confidence needs extract.backend: hf"),
        ({}, "has no select section; add one, or say -s select.tokens=24"),
    ],
)
def test_mistakes_are_one_line(
    tmp_path: Path, tiny_models: dict[str, Path], changes: dict[str, Any], message: str
) -> None:
    recipe = write_recipe(tmp_path, tiny_models)
    raw = yaml.safe_load(recipe.read_text())
    for section, values in changes.items():
        raw[section] = raw.get(section, {}) | values
    recipe.write_text(yaml.safe_dump(raw))
    printed = kava("select", recipe, code=2)
    assert message in printed
    assert len(printed.splitlines()) == 1
