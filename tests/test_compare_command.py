"""`kava compare` on tiny models: equal batches, numbers that plain loops give again, and trainings that are kept."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from fixtures.command import kava, write_recipe

from kava.pipeline import load_recipe
from kava.pipeline.compare_stage import arm_stages
from kava.pipeline.run import Run
from kava.store import KVStore, Lock, Split
from kava.tap import KVTap
from kava.train import load_student
from kava.train.data import TargetCollator
from kava.train.trainer import KVTrainer

COMPARE = {"arms": ["none", "kv", "shuffled", {"strong": {"alpha": 5, "loss": "cosine"}}], "seeds": [0, 1]}


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory, tiny_models: dict[str, Path]) -> Path:
    """A recipe whose comparison is done."""
    path: Path = write_recipe(tmp_path_factory.mktemp("compare"), tiny_models, compare=COMPARE)
    kava("run", path, "--until", "project")
    kava("compare", path, "--arm", "kv", "--seed", "1")
    kava("compare", path)
    return path


@pytest.fixture(scope="module")
def summary(recipe: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((recipe.parent / "run/compare/compare.json").read_text())
    return found


def test_a_second_call_trains_nothing(recipe: Path) -> None:
    folder = recipe.parent / "run/compare"
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("model.safetensors")}
    assert len(before) == 8
    assert kava("compare", recipe).count("up to date") == 8
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("model.safetensors")} == before


def test_the_tables_say_who_is_compared(recipe: Path) -> None:
    printed = kava("compare", recipe, "--no-train")
    lines = printed.splitlines()
    assert sum(line.split()[:2] == [arm, "2"] for line in lines for arm in ("none", "kv", "shuffled", "strong")) == 4
    assert any(line.split()[:2] == ["kv", "none"] for line in lines)
    assert any(line.split()[:2] == ["kv", "shuffled"] for line in lines)
    assert json.loads(kava("compare", recipe, "--no-train", "--json"))["missing"] == []


def test_numbers_are_those_of_a_plain_loop(recipe: Path, summary: dict[str, Any]) -> None:
    """Every held-out sample alone, in float64, against what the batches gave; KV errors against the true targets."""
    run = recipe.parent / "run"
    store = KVStore.open(run / "targets/big.zarr")
    statistics = store.statistics()
    for arm in ("none", "shuffled"):
        model = load_student(run / f"compare/{arm}-0", dtype="float32")[0].double().eval()
        nats, tokens, errors, rows = 0.0, 0, 0.0, 0
        for index in store.indices(Split.HELDOUT):
            sample = store.sample(index)
            batch = TargetCollator(0, ("prompt", "rationale", "answer"))([sample])
            with torch.no_grad(), KVTap(model) as tap:
                logits = model(input_ids=batch["input_ids"], use_cache=False).logits[0]
            for at in range(1, len(sample)):
                if batch["labels"][0, at] >= 0:
                    nats -= float(torch.log_softmax(logits[at - 1], -1)[batch["labels"][0, at]])
                    tokens += 1
            own, target = tap.stack()[0][0], sample.keys
            assert target is not None
            mask = torch.from_numpy(sample.mask)
            errors += float((own[mask][:, 1] - target[mask][:, 1].double()).square().sum())
            rows += int(mask.sum()) * own[0, 1].numel()
        found = summary["arms"][arm]["runs"][0]["metrics"]
        assert found["ce"] == pytest.approx(nats / tokens, rel=1e-5)
        wanted = errors / rows / float(statistics["keys_std"][1]) ** 2
        folder = json.loads((run / f"compare/{arm}-0/heldout.json").read_text())
        assert folder["errors"]["keys"][1] == pytest.approx(wanted, rel=1e-4)


def test_what_the_trainer_measured_is_what_is_compared(recipe: Path, summary: dict[str, Any]) -> None:
    for arm in summary["arms"].values():
        for trained in arm["runs"]:
            assert trained["curve"][-1][0] == trained["steps"] == 6
            assert [step for step, _ in trained["curve"]] == [3, 6]
            assert trained["metrics"]["ce"] == pytest.approx(trained["curve"][-1][1], rel=1e-5)


def test_differences_add_up(summary: dict[str, Any]) -> None:
    ce = {name: [t["metrics"]["ce"] for t in arm["runs"]] for name, arm in summary["arms"].items()}
    assert len(summary["differences"]) == 12
    for pair in summary["differences"]:
        each = [a - b for a, b in zip(ce[pair["arm"]], ce[pair["against"]], strict=True)]
        assert pair["by_seed"] == pytest.approx(each, abs=1e-12)
        assert pair["ce"] == pytest.approx(math.fsum(each) / 2, abs=1e-9)
        assert pair["interval_samples"][0] <= pair["ce"] <= pair["interval_samples"][1]
        assert pair["lower"] + pair["higher"] <= summary["heldout_samples"] == 6
    assert {json.dumps(arm["runs"][0]["train_samples"]) for arm in summary["arms"].values()} != {"null"}


def test_arms_of_one_seed_read_the_same_batches(recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[list[str]] = []
    step = KVTrainer.training_step

    def noting(self: KVTrainer, model: Any, inputs: dict[str, Any], *others: Any) -> torch.Tensor:
        read.append(inputs["sample_ids"])
        return step(self, model, inputs, *others)

    monkeypatch.setattr(KVTrainer, "training_step", noting)
    (tmp_path / "run").mkdir()
    for name in ("student", "teachers", "targets", "reference.zarr", "projectors"):
        (tmp_path / "run" / name).symlink_to(recipe.parent / "run" / name)
    orders = {}
    for stage in arm_stages(Run(load_recipe(recipe, [f"run_dir={tmp_path / 'run'}"])), ["none", "kv", "shuffled"]):
        read.clear()
        stage.make(None)
        orders[stage.arm.name if stage.arm else "", stage.seed] = list(read)
    for seed in (0, 1):
        assert len(orders["none", seed]) == 6
        assert orders["none", seed] == orders["kv", seed] == orders["shuffled", seed]
    assert orders["none", 0] != orders["none", 1]


def test_a_changed_arm_is_stale_and_the_others_are_not(recipe: Path) -> None:
    changed = ("compare", recipe, "-s", "train.key_weight=2")
    printed = kava(*changed, "--no-train")
    assert "not finished yet: kv seed 0, kv seed 1, shuffled seed 0" in printed
    assert "is stale" in kava(*changed, "--arm", "kv", code=2)
    assert "none seed 0:      " in kava(*changed, "--arm", "none")


def test_a_training_that_was_not_measured_is_measured_and_not_trained(recipe: Path) -> None:
    folder = recipe.parent / "run/compare/kv-0"
    kept, weights = (folder / "heldout.json").read_bytes(), (folder / "model.safetensors").stat().st_mtime_ns
    (folder / "heldout.json").unlink()
    assert "trained before" in kava("compare", recipe)
    assert (folder / "heldout.json").read_bytes() == kept
    assert (folder / "model.safetensors").stat().st_mtime_ns == weights


def test_what_cannot_be_compared_is_told_before_the_first_training(
    tmp_path: Path, tiny_models: dict[str, Path]
) -> None:
    recipe = write_recipe(tmp_path, tiny_models, corpus={"heldout": None}, compare=COMPARE)
    kava("run", recipe, "--until", "project")
    assert "no sample of it is held out" in kava("compare", recipe, code=2)
    arms = "compare.arms=[none, {other: {teacher: small}}]"
    assert "there is no teacher 'small'" in kava("compare", recipe, "-s", arms, code=2)
    seeded = ("-s", "train.arguments={data_seed: 3}")
    assert "train.arguments.data_seed: would be that of all" in kava("compare", recipe, *seeded, code=2)
    assert not (tmp_path / "run/compare").exists()


def test_what_another_process_trains_is_left_to_it(recipe: Path) -> None:
    run = recipe.parent / "run"
    changed = ("-s", "train.max_steps=1", "-s", "compare.arms=[none, random]", "-s", "compare.seeds=[0]")
    held = Lock.take(run / "compare/.random-0.lock")
    assert held is not None
    try:
        kava("train", recipe, "-s", "train.max_steps=1", "-s", "train.name=random-0")  # A student of its own.
        printed = kava("compare", recipe, *changed, "--arm", "random", code=75)
        assert "another process is training" in printed
        assert not (run / "compare/random-0").exists()
        printed = kava("compare", recipe, *changed, "--force")
        assert "not finished yet: random seed 0" in printed
        assert not (run / "compare/random-0").exists()
    finally:
        held.release()
    assert "not finished yet" not in kava("compare", recipe, *changed)
    student = Lock.take(run / "students/.kv.lock")
    assert student is not None
    try:
        assert "is training" in kava("train", recipe, code=75)
        assert not (run / "students/kv").exists()
    finally:
        student.release()
    kava("compare", recipe, "--force", "--arm", "none", "--seed", "0")  # As the others of this module expect it.


@pytest.mark.parametrize(
    ("changes", "words", "message"),
    [
        ({}, (), "no compare section"),
        ({"compare": COMPARE}, ("--arm", "kw"), "there is no such arm, only none, kv"),
        ({"compare": COMPARE}, ("--seed", "7"), "is none of compare.seeds (0, 1)"),
        ({"compare": COMPARE}, ("--no-train",), "is finished"),
        ({"compare": COMPARE}, (), "is not made yet"),
        ({"compare": {"arms": ["none", "kv"], "seed": [1]}}, (), "did you mean 'seeds'"),
        ({"compare": {"arms": ["none", {"x": {"alhpa": 1}}]}}, (), "did you mean 'alpha'"),
        ({"compare": COMPARE}, ("-s", "train.alpha=0"), "kv needs train.alpha above 0"),
        ({"compare": {"arms": ["none", "logits"]}}, (), "logits needs train.logits"),
    ],
)
def test_mistakes(
    tmp_path: Path, tiny_models: dict[str, Path], changes: Any, words: tuple[str, ...], message: str
) -> None:
    assert message in kava("compare", write_recipe(tmp_path, tiny_models, **changes), *words, code=2)


def test_a_recipe_with_arms_may_be_trained_without_a_kv_loss(tmp_path: Path, tiny_models: dict[str, Path]) -> None:
    recipe = write_recipe(tmp_path, tiny_models, compare=COMPARE)
    found = load_recipe(recipe, ["train.alpha=0"])
    assert found.train.alpha == 0
    assert found.compare is not None
    assert "none" in [arm.name for arm in found.compare.possible(found.train)]
