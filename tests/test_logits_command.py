"""Cached logits by the command: extract, project, train, on tiny models that share a tokenizer."""

from __future__ import annotations

import json
from collections.abc import Iterator
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

from kava.pipeline import load_recipe
from kava.pipeline.run import Run
from kava.store import LOGITS, KVStore, Split
from kava.train import load_student
from kava.train.data import IGNORED, TargetCollator

WHOLE = 400
"""Tokens in the vocabulary."""


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory, tiny_models: dict[str, Path]) -> dict[str, Path]:
    """The teacher, and a student with its tokenizer."""
    folder = tmp_path_factory.mktemp("models") / "same"
    tokenizer = load_student(tiny_models["teacher"])[1]
    shape = {"layers": 2, "heads": 4, "kv_heads": 2, "head_dim": 8}
    return {**tiny_models, "student": save_model(folder, "llama", tokenizer, scale=1.0, **shape)}


def _recipe(root: Path, models: dict[str, Path], **changes: Any) -> Path:
    root.mkdir(exist_ok=True)
    settings: dict[str, Any] = {
        "extract": {"logits": WHOLE},
        "train": {"logits": {"weight": 300}, "alpha": 0},
        "project": {"heads": "pca", "calibration_samples": 4},
    }
    for section, values in changes.items():
        settings[section] = {**settings.get(section, {}), **values}
    made: Path = write_recipe(root, models, **settings)
    return made


@pytest.fixture(scope="module", autouse=True)
def _few_calibration_parts() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("kava.pipeline.parts.CALIBRATION_PARTS", 2)
        yield


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory, models: dict[str, Path]) -> Path:
    recipe = _recipe(tmp_path_factory.mktemp("run"), models)
    kava("run", recipe)
    return recipe


def test_targets_have_the_teachers_rows_and_none_for_the_end(done: Path) -> None:
    run = Run(load_recipe(done))
    teacher, targets = KVStore.open(run.teacher_path("big")), KVStore.open(run.target_path("big"))
    assert targets.verify() == []
    for source, made in zip(teacher, targets, strict=True):
        assert len(made) == len(source) + 1
        for name in LOGITS:
            np.testing.assert_array_equal(made.extras[name][:-1], source.extras[name])
        assert (made.extras["logit_ids"][-1] == -1).all()
        assert np.isnan(made.extras["logprobs"][-1]).all()
        assert np.isnan(made.extras["logprob_tail"][-1])


def test_held_out_divergence_is_that_of_both_models(done: Path) -> None:
    """Of an untouched student, from two plain forward passes: nothing of kava but the ids and the labels."""
    kava("train", done, "-s", "train.name=untouched", "-s", "train.learning_rate=1e-30", "-s", "train.max_steps=1")
    run = Run(load_recipe(done))
    targets = KVStore.open(run.target_path("big"))
    teacher, student = (load_student(Path(p))[0].eval() for p in (run.teacher_source("big").location, run.student_dir))
    collate, found = TargetCollator(0, ("prompt", "rationale", "answer")), []
    for index in targets.indices(Split.HELDOUT):
        one = targets[index]
        ids = torch.from_numpy(one.input_ids).long()[None]
        predicted = collate([one])["labels"][0, 1:] != IGNORED
        with torch.no_grad():
            sides = [model(input_ids=ids).logits[0, :-1].double().log_softmax(-1) for model in (teacher, student)]
        # The student's head has a row more than the teacher's, to which the teacher gives nothing.
        found.append((sides[0].exp() * (sides[0] - sides[1][:, :WHOLE])).sum(-1)[predicted])
    log = (done.parent / "run/students/untouched/metrics.jsonl").read_text().splitlines()
    (line,) = [json.loads(text) for text in log if "heldout_logits" in text]
    assert line["heldout_logits"] == pytest.approx(float(torch.cat(found).mean()), rel=1e-4)
    record = json.loads((done.parent / "run/students/kv/kava.json").read_text())
    assert record["metrics"]["logits"] < line["heldout_logits"]


def test_every_way_to_a_target_carries_them(done: Path, tmp_path: Path, models: dict[str, Path]) -> None:
    made = {"plain": KVStore.open(Run(load_recipe(done)).target_path("big"))}
    ways: dict[str, Any] = {"straight": {"extract": {"keep": "target"}}, "two": {"resample": {"materialize": True}}}
    for name, changes in ways.items():
        recipe = _recipe(tmp_path / name, models, **changes)
        kava("run", recipe, "--until", "project")
        made[name] = KVStore.open(Run(load_recipe(recipe)).target_path("big"))
    for index in range(24):
        for name in LOGITS:
            arrays = [store[index].extras[name] for store in made.values()]
            for array in arrays[1:]:
                np.testing.assert_array_equal(array, arrays[0])
    files = [
        {n: d for n, d in tree(made[w].path).items() if not n.endswith("zarr.json")} for w in ("plain", "straight")
    ]
    assert files[0] == files[1]
    assert made["plain"].manifest.fingerprint == made["straight"].manifest.fingerprint
    kava("transcode", made["plain"].path, tmp_path / "int8.zarr", "--codec", "int8")
    copied = KVStore.open(tmp_path / "int8.zarr")
    for index in (0, 23):
        for name in LOGITS:
            np.testing.assert_array_equal(copied[index].extras[name], made["plain"][index].extras[name])


def test_they_are_content(done: Path, tmp_path: Path, models: dict[str, Path]) -> None:
    printed = kava("run", done, "-s", "extract.logits=7", code=2)
    assert "extras.logit_ids.shape" in printed
    assert "--force" in printed
    # Captured for another student: with other tokens the targets go without, as long as nothing is trained on them.
    changes = {"extract": {"logits": 6}, "train": {"logits": None, "alpha": 1}}
    models = models | {"student": models["teacher"].parent / "student"}
    recipe = _recipe(tmp_path, models, **changes)
    kava("run", recipe, "--until", "project")
    run = Run(load_recipe(recipe))
    assert set(KVStore.open(run.teacher_path("big")).manifest.extras) == set(LOGITS)
    assert KVStore.open(run.target_path("big")).manifest.extras == {}


def test_other_tokens_are_refused_before_the_capture(tmp_path: Path, models: dict[str, Path]) -> None:
    other = models | {"student": models["teacher"].parent / "student"}
    recipe = _recipe(tmp_path / "tokenizer", other)
    wanted = "the tokenizer of teacher big is not the student's"
    planned = " ".join(kava("run", recipe, "--dry-run", code=2).split())
    assert wanted in planned
    assert "the 400 likeliest next tokens, 3204 bytes per token" in planned
    assert wanted in " ".join(kava("run", recipe, code=2).split())
    assert not (tmp_path / "tokenizer/run/teachers/big.zarr").exists()
    recipe = _recipe(tmp_path / "template", models, student={"chat_template": True})
    assert "the chat template of teacher big" in " ".join(kava("run", recipe, code=2).split())


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("extract.logits=null", "train.logits needs extract.logits"),
        ("extract.backend=vllm", "extract.logits needs extract.backend: hf"),
        ("student.tokenizer={vocab_size: 300}", "train.logits needs the teacher's tokenizer"),
        ("fuse={}", None),
        ("fuse={name: all, teachers: [big]}", None),
        ("extract.logits=401", "extract.logits: 401 is more than the 400 that the model has"),
    ],
)
def test_what_cannot_be(tmp_path: Path, models: dict[str, Path], override: str, message: str | None) -> None:
    recipe = _recipe(tmp_path / "x", models)
    if message is None:
        kava("run", recipe, "-s", override, "--dry-run")
        name = "all" if "all" in override else "fused"
        printed = kava("run", recipe, "-s", override, "-s", f"train.teacher={name}", code=2)
        message = "train.logits: fused targets have none"
    else:
        printed = kava("run", recipe, "-s", override, code=2)
    assert message in " ".join(printed.split())


@pytest.mark.slow
def test_a_probe_trains_on_the_targets_that_training_names(tmp_path: Path, models: dict[str, Path]) -> None:
    """The first teacher's have no logits here: its tokens are not the student's."""
    recipe = _recipe(tmp_path, models, extract={"logits": 8}, train={"teacher": "big"})
    whole = yaml.safe_load(recipe.read_text())
    other = save_model(
        tmp_path / "other", "llama", sentencepiece_tokenizer(500), layers=2, heads=2, kv_heads=2, head_dim=8
    )
    whole["teachers"] = {"first": {"model": str(other), "dtype": "float32"}, **whole["teachers"]}
    recipe.write_text(yaml.safe_dump(whole))
    printed = kava("plan", recipe, "--probe", "--json")
    assert json.loads(printed[printed.index("{\n") : printed.rindex("\n}") + 2])["seconds"]["train"] > 0
    printed = kava("plan", recipe, "--probe", "--teacher", "first", "--json")
    plan = json.loads(printed[printed.index("{\n") : printed.rindex("\n}") + 2])
    assert "train" not in plan["seconds"]
    assert any("they learn logits of big, which is not probed" in problem for problem in plan["problems"])


def test_arms_with_logits_are_compared(tmp_path: Path, models: dict[str, Path]) -> None:
    """Each arm has the terms that it should, and the one that learns logits alone ends where its own training does."""
    recipe = _recipe(
        tmp_path,
        models,
        train={"alpha": 1, "max_steps": 6},
        compare={"arms": ["none", "kv", "logits", "kv+logits"], "seeds": [0]},
    )
    kava("run", recipe, "--until", "project")
    kava("compare", recipe)
    found = json.loads((tmp_path / "run/compare/compare.json").read_text())
    assert found["missing"] == []
    ce = {name: arm["runs"][0]["metrics"]["ce"] for name, arm in found["arms"].items()}
    assert list(ce) == ["none", "kv", "logits", "kv+logits"]
    assert len(set(ce.values())) == 4
    logs = {name: _rows(Path(arm["runs"][0]["folder"])) for name, arm in found["arms"].items()}
    last = {name: [row["heldout_logits"] for row in rows if "heldout_logits" in row] for name, rows in logs.items()}
    assert {name for name, values in last.items() if values} == {"logits", "kv+logits"}
    with_kv = {name for name, rows in logs.items() if any("heldout_kv" in row for row in rows)}
    assert with_kv == {"kv", "kv+logits"}
    kava("train", recipe, "-s", "train.name=alone", "-s", "train.alpha=0")
    alone = [row["heldout_logits"] for row in _rows(tmp_path / "run/students/alone") if "heldout_logits" in row]
    assert last["logits"][-1] == pytest.approx(alone[-1])


def _rows(student: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (student / "metrics.jsonl").read_text().splitlines()]
