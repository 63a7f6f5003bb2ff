"""Two teachers with tokenizers and geometries of their own, one student: fused, trained on, made again, by the command."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from fixtures.command import kava, write_recipe
from fixtures.models import save_model
from fixtures.stores import tree
from fixtures.tokenizers import sentencepiece_tokenizer

from kava.hub import load_tokenizer, tokenizer_digest
from kava.pipeline import load_recipe
from kava.pipeline.run import Run
from kava.store import KVStore, Split

VIEW = ("-s", "fuse.materialize=false")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory, tiny_models: dict[str, Path]) -> dict[str, Path]:
    """The tiny models, and a second teacher of another architecture, tokenizer and shape."""
    root = tmp_path_factory.mktemp("second")
    shape = {"layers": 4, "heads": 3, "kv_heads": 1, "head_dim": 24}
    return {
        **tiny_models,
        "second": save_model(root / "second", "llama", sentencepiece_tokenizer(420), seed=3, **shape),
    }


def _recipe(root: Path, models: dict[str, Path], **changes: Any) -> Path:
    teachers = {
        "big": {"model": str(models["teacher"]), "dtype": "float32"},
        "small": {"model": str(models["second"]), "dtype": "float32"},
    }
    fuse = {"weights": "confidence", "temperature": 0.5}
    extract = {"confidence": True}
    recipe: Path = write_recipe(
        root, models, **{"teachers": teachers, "extract": extract, "fuse": fuse, "samples_per_part": 8} | changes
    )
    return recipe


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory, models: dict[str, Path]) -> Path:
    """A recipe that was run to the end."""
    recipe = _recipe(tmp_path_factory.mktemp("fuse"), models)
    assert "fuse:" in kava("run", recipe)
    return recipe


def _losses(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_a_run_fuses_and_trains_on_what_was_fused(done: Path) -> None:
    run = Run(load_recipe(done))
    assert run.train_teacher == "fused"
    fused = KVStore.open(run.target_path("fused"))
    stores = {name: KVStore.open(run.target_path(name)) for name in ("big", "small")}
    captures = [KVStore.open(run.teacher_path(name)) for name in stores]
    digests = {tokenizer_digest(load_tokenizer(run.teacher_source(n))) for n in stores} | {
        fused.manifest.tokenizer_digest
    }
    assert len(digests) == 3, "three tokenizers"
    assert captures[0].geometry != captures[1].geometry != fused.geometry
    assert fused.verify() == []
    assert fused.manifest.kind == "target"
    assert fused.manifest.parents == {name: store.manifest.fingerprint for name, store in stores.items()}
    record = json.loads((run.trained_dir() / "kava.json").read_text())
    assert record["targets"] == fused.manifest.fingerprint
    # Of two teachers each has the other's share of the softmax over nats per byte.
    per_byte = np.stack([c.per_sample("nats") / c.per_sample("text_bytes") for c in captures], 1) / 0.5
    shares = np.exp(per_byte) / np.exp(per_byte).sum(1, keepdims=True)
    np.testing.assert_allclose(fused.per_sample("weights"), shares[:, ::-1], rtol=1e-9)
    assert fused.per_sample("weights").std(0).min() > 1e-3, "weights differ from sample to sample"
    for index in (0, 13, 23):
        made, parts = fused[index], [store[index] for store in stores.values()]
        np.testing.assert_array_equal(made.mask, parts[0].mask | parts[1].mask)
        np.testing.assert_array_equal(made.input_ids, parts[0].input_ids)
    # The scale is between the teachers', and not what an average of them would have.
    for name in ("keys_std", "values_std"):
        found, own = fused.statistics()[name], np.stack([s.statistics()[name] for s in stores.values()])
        middle = (own * fused.per_sample("weights").mean(0)[:, None]).sum(0)
        np.testing.assert_allclose(found, middle, rtol=0.05)
    before = tree(run.root)
    assert kava("run", done).count("up to date") == 8
    assert tree(run.root) == before


def test_a_view_trains_like_the_store(done: Path) -> None:
    run = Run(load_recipe(done))
    rows = {
        r["stage"]: r for r in json.loads(kava("status", done, *VIEW, "-s", "train.name=viewed", "--json"))["stages"]
    }
    assert rows["fuse"]["state"] == "partial"
    assert rows["fuse"]["output"].endswith("fusion/fused.json")
    store = KVStore.open(run.target_path("fused"))
    kava("fuse", done, *VIEW)
    view = Run(load_recipe(done, ["fuse.materialize=false"])).open_target("fused")
    assert not isinstance(view, KVStore)
    assert view.manifest.fingerprint == store.manifest.fingerprint
    assert view.indices(Split.TRAIN) == store.indices(Split.TRAIN)
    for index in store.indices():
        assert torch.equal(view.sample(index).keys, store[index].keys)  # type: ignore[arg-type]
    hidden = store.path.with_name("hidden")
    store.path.rename(hidden)
    try:
        kava("train", done, *VIEW, "-s", "train.name=viewed")
        assert "complete" in kava("status", done, *VIEW, "-s", "train.name=viewed")
    finally:
        hidden.rename(store.path)
    one, two = (_losses(run.trained_dir(name)) for name in ("kv", "viewed"))
    assert len(one) == len(two) > 3
    for a, b in zip(one, two, strict=True):
        timings = {name for name in a if any(word in name for word in ("runtime", "per_second", "wait", "memory"))}
        for name in a.keys() - timings:
            assert b[name] == pytest.approx(a[name], rel=1e-5), name


def test_training_on_fused_targets_opens_no_teacher(done: Path, tmp_path: Path) -> None:
    hook = tmp_path / "sitecustomize.py"
    hook.write_text(
        "import atexit, sys\nopened = []\n"
        "sys.addaudithook(lambda e, a: opened.append(str(a[0])) if e == 'open' else None)\n"
        "atexit.register(lambda: print('\\n'.join([*opened, *sys.modules]), file=sys.__stdout__))\n"
    )
    kava("fuse", done, *VIEW)
    teachers = done.parent / "run/teachers"
    moved = done.parent / "elsewhere"
    teachers.rename(moved)
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    try:
        printed = kava("train", done, *VIEW, "-s", "train.name=offline", env={**os.environ, "PYTHONPATH": path})
    finally:
        moved.rename(teachers)
    lines = printed.splitlines()
    assert any("targets/small.zarr" in line and "keys" in line for line in lines)
    assert not [line for line in lines if "run/teachers/" in line and "zarr.json" not in line]
    assert not {"vllm", "kava.extract.hf"} & set(lines)
    weights = {line for line in lines if line.endswith(".safetensors")}
    assert weights
    models = [settings.model for settings in load_recipe(done).teachers.values()]
    assert not [line for line in weights if line.startswith(tuple(models))]


def test_what_is_cut_off_goes_on_and_what_changed_is_made_again(tmp_path: Path, models: dict[str, Path]) -> None:
    recipe = _recipe(tmp_path, models)
    kava("run", recipe, "--until", "fuse")
    run = Run(load_recipe(recipe))
    fused = KVStore.open(run.target_path("fused"))
    whole = tree(fused.path)
    fused.drop_part(1)
    assert "2 of 3 parts" in kava("status", recipe)
    kava("fuse", recipe)
    assert tree(fused.path) == whole
    # Another weight is another content; the same teachers and weights in another order are not.
    assert "parameters.fuse.temperature: 0.5 -> 1.0" in kava("status", recipe, "-s", "fuse.temperature=1")
    assert "up to date" in kava("fuse", recipe, "-s", "fuse.teachers=[small, big]")
    # A part of one teacher's targets that is another one now: moments changed, so all is made again.
    capture, corpus = KVStore.open(run.teacher_path("small")), run.corpus
    samples = [capture.part(1).sample(position) for position in range(8)]
    capture.drop_part(1)
    with capture.write_part(1) as writer:
        for position, sample in enumerate(samples):
            if position == 2:
                writer.fail(position, sample.sample_id, sample.split, "gone")
            else:
                writer.append(position, sample)
        writer.commit()
    kava("project", recipe)
    assert "3 to be made again" in kava("status", recipe)
    kava("fuse", recipe)
    fused = KVStore.open(fused.path)
    small, big = (KVStore.open(run.target_path(name)) for name in ("small", "big"))
    assert list(small.failed) == [corpus.records[10].sample_id]
    assert fused.failed == {}
    assert fused.per_sample("weights")[10].tolist() == [1, 0]
    np.testing.assert_array_equal(fused[10].mask, big[10].mask)
    assert tree(fused.path) != whole
    # A missing target store is no reason to make what was fused again; it cannot be fused without.
    small.path.rename(tmp_path / "elsewhere")
    rows = {r["stage"]: r["state"] for r in json.loads(kava("status", recipe, "--json"))["stages"]}
    assert rows["fuse"] == "complete"
    assert "there is no store at" in kava("fuse", recipe, "--force", code=2)


def test_people_see_it(done: Path, tmp_path: Path, models: dict[str, Path]) -> None:
    printed = kava("inspect", done.parent / "run/targets/fused.zarr")
    for wanted in ("by confidence, average weights big 0.", "teacher + second", "that of the targets it is fused from"):
        assert wanted in printed
    assert "fused from several teachers" in kava(
        "inspect", done.parent / "run/targets/fused.zarr", "--align", "r3", code=2
    )
    assert "'</s>'" in kava("inspect", done.parent / "run/targets/fused.zarr", "--sample", "r3")
    plan = kava("run", _recipe(tmp_path, models), "--dry-run", *VIEW)
    assert "big + small, weights by confidence, while they are read" in plan
    assert any(line.startswith("fuse ") and "missing" in line for line in plan.splitlines())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"fuse": None}, "has no fuse section; add one, or say -s fuse.weights=fixed"),
        ({"extract": {"confidence": False}}, "fuse.weights: confidence needs extract.confidence: true"),
        ({"fuse": {"weights": "confidense"}}, "fuse.weights: 'confidense' is unknown; did you mean 'confidence'?"),
        ({"fuse": {"weights": "fixed"}}, "temperature goes with weights: confidence, not fixed"),
        ({"fuse": {"fixed": {"big": 1}}}, "fixed goes without weights: confidence"),
        (
            {"fuse": {"weights": "fixed", "temperature": 1, "fixed": {"big": 1}}},
            "fuse.fixed: give a number for each of big, small, and no other",
        ),
        ({"fuse": {"teachers": ["big", "smal"]}}, "fuse.teachers: there is no teacher 'smal', only big, small"),
        ({"fuse": {"teachers": ["big", "big"]}}, "fuse.teachers: a teacher is named twice"),
        ({"fuse": {"name": "small"}}, "fuse.name: 'small' is a teacher"),
        ({"fuse": {"nam": "x"}}, "unknown key 'fuse.nam'; did you mean 'name'?"),
    ],
)
def test_mistakes_are_one_line(tmp_path: Path, models: dict[str, Path], changes: dict[str, Any], message: str) -> None:
    recipe = _recipe(tmp_path, models)
    raw = yaml.safe_load(recipe.read_text())
    for section, values in changes.items():
        raw[section] = values and raw.get(section, {}) | values
    recipe.write_text(yaml.safe_dump(raw))
    printed = kava("fuse", recipe, code=2)
    assert message in printed
    assert len(printed.splitlines()) == 1


def test_with_several_teachers_and_nothing_fused_one_must_be_named(tmp_path: Path, models: dict[str, Path]) -> None:
    recipe = load_recipe(_recipe(tmp_path, models), ["fuse=null"])
    from kava.errors import StageError

    with pytest.raises(StageError, match=r"train.teacher: name one of big, small, or add a fuse section"):
        _ = Run(recipe).train_teacher
    named = load_recipe(tmp_path / "recipe.yaml", ["train.teacher=small"])
    assert Run(named).train_teacher == "small"
