from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from fixtures.command import kava, rows, write_recipe

from kava.answers import final_number
from kava.pipeline import load_recipe
from kava.pipeline.generate_stage import GenerateStage
from kava.pipeline.run import Run
from kava.store import KVStore, Segment
from kava.store.replace import next_path
from kava.store.sealed import sealed_text


def _recipe(root: Path, models: dict[str, Path], **generate: Any) -> Path:
    generate = {"max_new_tokens": 30, "chunk": 5, **generate}
    path: Path = write_recipe(root, models, extract={"generate": generate})
    return path


def _lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def _answers(folder: Path) -> list[dict[str, Any]]:
    return [row for path in sorted(folder.iterdir()) for row in _lines(path)]


def test_the_teachers_text_is_what_is_captured(tmp_path: Path, tiny_models: dict[str, Path]) -> None:
    recipe = _recipe(tmp_path, tiny_models)
    assert "generated is not written yet" in kava("run", recipe, "--only", "student", "--only", "extract", code=2)
    printed = kava("extract", recipe)
    assert "24 of 24 samples kept" in printed
    corpus = _lines(tmp_path / "run/generated/corpus.jsonl")
    assert [row["id"] for row in corpus] == [row["id"] for row in rows()]
    assert all(row["rationale"] != old["rationale"] for row, old in zip(corpus, rows(), strict=True))
    store = KVStore.open(tmp_path / "run/teachers/big.zarr")
    sample = store[3]
    assert (sample.segments == Segment.RATIONALE).sum() > 5
    assert len(sample) > len(corpus[3]["prompt"]) // 8
    record = json.loads((tmp_path / "run/generated/kava.json").read_text())
    assert record["backend"].startswith("hf ")
    assert record["teacher"]["weights_digest"]
    assert "up to date" in kava("extract", recipe)
    kava("run", recipe)  # The student reads the same text, held-out samples stay held out.
    assert {row["id"] for row in corpus if row["split"] == "heldout"} == {
        store.part(p).ids[i] for p in range(5) for i in range(len(store.part(p))) if store.part(p).splits[i]
    }


def test_a_cut_off_generation_goes_on(tmp_path: Path, tiny_models: dict[str, Path]) -> None:
    recipe = _recipe(tmp_path, tiny_models, temperature=1.0)
    kava("run", recipe, "--only", "generate")
    folder = tmp_path / "run/generated"
    answers, corpus = sorted((folder / "answers").iterdir()), (folder / "corpus.jsonl").read_bytes()
    assert len(answers) == 5
    for path in (*answers[2:], folder / "corpus.jsonl"):
        path.unlink()
    record = json.loads((folder / "kava.json").read_text())
    (folder / "kava.json").write_bytes(sealed_text({"key": record["key"], "files": {}}))
    assert "10 of 24 prompts answered" in kava("status", recipe)
    kava("run", recipe, "--only", "generate")
    assert (folder / "corpus.jsonl").read_bytes() == corpus
    # Another process completed the rebuild and put it in place before this one asked or wrote anything.
    run = Run(load_recipe(recipe))
    late = GenerateStage(run, beside=next_path(folder))
    assert "24 of 24 samples kept" in late.make(None)
    assert late.building == folder
    assert not next_path(folder).exists()
    printed = kava("run", recipe, "--only", "generate", "-s", "extract.generate.seed=4", code=2)
    assert "add --force generate" in printed


def test_only_matching_answers_are_kept(tmp_path: Path, tiny_models: dict[str, Path]) -> None:
    recipe = _recipe(tmp_path, tiny_models)
    kava("run", recipe, "--only", "generate")
    written = {row["id"]: row for row in _answers(tmp_path / "run/generated/answers")}
    numbers = {i: final_number(row["rationale"]) for i, row in written.items()}
    right = {i for i in sorted(numbers) if numbers[i] is not None and int(i[1:]) % 2}
    assert len(right) > 1
    changed = [{**row, "answer": f"#### {numbers[row['id']] if row['id'] in right else 10**9}"} for row in rows()]
    (tmp_path / "corpus.jsonl").write_text("\n".join(json.dumps(row) for row in changed))
    matching = ["-s", "extract.generate.keep=matching", "-s", f"run_dir={tmp_path / 'second'}"]
    printed = kava("run", recipe, "--only", "generate", *matching)
    assert f"{len(right)} of 24 samples kept" in printed
    assert {row["id"] for row in _lines(tmp_path / "second/generated/corpus.jsonl")} == right
    nothing = [{**row, "answer": f"#### {10**9}"} for row in rows()]
    (tmp_path / "corpus.jsonl").write_text("\n".join(json.dumps(row) for row in nothing))
    printed = kava("run", recipe, "--only", "generate", *matching[:2], "-s", f"run_dir={tmp_path / 'third'}", code=2)
    assert "none of 24 answers matches" in printed


def test_a_prompt_that_leaves_no_room(tmp_path: Path, tiny_models: dict[str, Path]) -> None:
    recipe = _recipe(tmp_path, tiny_models, max_new_tokens=250)
    assert "250 new ones are more than the 256" in kava("run", recipe, "--only", "generate", code=2)
