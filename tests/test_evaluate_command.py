"""`kava evaluate` on tiny models: numbers that a plain loop gives again, any tokenizer, and what is refused."""

from __future__ import annotations

import json
import math
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from fixtures.command import kava, rows, write_recipe

from kava.store import KVStore, Split
from kava.train import load_student


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory, tiny_models: dict[str, Path]) -> Path:
    path: Path = write_recipe(tmp_path_factory.mktemp("evaluate"), tiny_models)
    kava("run", path)
    return path


def evaluate(*words: Any) -> dict[str, Any]:
    printed = kava("evaluate", *words, "--json")
    found: dict[str, Any] = json.loads(printed[printed.index("{\n") :])  # Libraries have their say on stderr.
    return found


def test_a_recipes_student(recipe: Path) -> None:
    found = evaluate(recipe, "--max-new-tokens", 8)
    folder = recipe.parent / "run/students/kv"
    record = json.loads((folder / "kava.json").read_text())
    assert found["ce"] == pytest.approx(record["metrics"]["ce"], rel=1e-5)
    assert found["ce_per_byte"] == pytest.approx(record["metrics"]["ce_per_byte"], rel=1e-5)
    assert found["kv_error"] == pytest.approx(record["metrics"]["kv"], rel=1e-4)
    assert found["perplexity_per_byte"] == pytest.approx(math.exp(found["ce_per_byte"]))
    assert len(found["keys_error"]) == len(found["values_error"]) == 3
    assert json.loads((folder / "evaluate.json").read_text()) == found
    assert found["exact_match"]["questions"] == found["heldout_samples"] == 6


def test_answers_are_of_the_prompts_alone(recipe: Path) -> None:
    """Every prompt continued by hand, one token after the other, from the record's own text."""
    kava("evaluate", recipe, "--max-new-tokens", 5, "--limit", 4, "--batch-size", 3)
    folder = recipe.parent / "run/students/kv"
    model, tokenizer = load_student(folder, dtype="float32")
    records = {row["id"]: row for row in rows()}
    lines = [json.loads(line) for line in (folder / "answers.jsonl").read_text().splitlines()]
    assert len(lines) == 4
    for line in lines:
        record = records[line["sample_id"]]
        ids = list(tokenizer(record["prompt"])["input_ids"])
        start = len(ids)
        for _ in range(5):
            with torch.no_grad():
                ids.append(int(model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
            if ids[-1] == tokenizer.eos_token_id:
                ids.pop()
                break
        assert line["written"] == tokenizer.decode(ids[start:])
        assert line["answer"].strip() == record["answer"]


def test_a_folder_finds_its_recipe(recipe: Path, tmp_path: Path) -> None:
    folder = recipe.parent / "run/students/kv"
    found = evaluate(folder, "--no-generate")
    assert "exact_match" not in found
    copied = tmp_path / "copied"
    shutil.copytree(folder, copied)
    (copied / "recipe.yaml").unlink()
    assert "say --recipe RECIPE" in kava("evaluate", copied, code=2)
    again = evaluate(copied, "--recipe", recipe, "--no-generate")
    assert {k: v for k, v in again.items() if k != "student"} == {k: v for k, v in found.items() if k != "student"}


def test_another_tokenizer_compares_by_bytes(recipe: Path, tiny_models: dict[str, Path], tmp_path: Path) -> None:
    """The teacher itself: its cross-entropy of the held-out texts, summed token by token, over their bytes."""
    shutil.copytree(tiny_models["teacher"], tmp_path / "teacher")
    found = evaluate(tmp_path / "teacher", "--recipe", recipe, "--max-new-tokens", 4)
    assert "kv_error" not in found
    assert "not measured" in kava("evaluate", tmp_path / "teacher", "--recipe", recipe, "--no-generate")
    model, tokenizer = load_student(tmp_path / "teacher", dtype="float32")
    store = KVStore.open(recipe.parent / "run/targets/big.zarr")
    heldout = {store.sample(i).sample_id for i in store.indices(Split.HELDOUT)}
    nats, text_bytes = 0.0, 0
    for row in rows():
        if row["id"] in heldout:
            text = "\n".join((row["prompt"], row["rationale"], row["answer"]))
            ids = [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]
            with torch.no_grad():
                logits = model(input_ids=torch.tensor([ids])).logits[0].double()
            nats -= sum(float(torch.log_softmax(logits[at - 1], -1)[ids[at]]) for at in range(1, len(ids)))
            text_bytes += len(text.encode())
    assert found["text_bytes"] == text_bytes
    assert found["ce_per_byte"] == pytest.approx(nats / text_bytes, rel=1e-4)


def test_people_are_told_in_a_table(recipe: Path) -> None:
    printed = kava("evaluate", recipe, "--max-new-tokens", 4)
    assert "exact match" in printed
    assert "of 6 (" in printed
    assert "K/V by layer" in printed


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("RECIPE", "-s", "train.alpha=3"), "is stale"),
        (("RECIPE", "-s", "train.name=other"), "is missing (not trained); kava train"),
        (("RECIPE", "--tasks", "gsm8k"), "pip install 'kava[eval]'"),
        (("RECIPE", "--dtype", "int8"), "use float32, bfloat16 or float16"),
    ],
)
def test_mistakes(recipe: Path, words: tuple[str, ...], message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval.tasks", None)  # As if it were not installed, whether it is or not.
    assert message in kava("evaluate", *(str(recipe) if word == "RECIPE" else word for word in words), code=2)
