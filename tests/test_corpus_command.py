"""What plan, --dry-run and extract say of a corpus, and what they refuse."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from fixtures.command import kava, write_recipe

from kava.store import KVStore, Segment

GSM8K = [
    {"question": f"{n}. How many?", "answer": f"{n} + {n} = {2 * n}.\n#### {2 * n}", "source": n} for n in range(24)
]


def _recipe(root: Path, models: dict[str, Path], rows: list[Any], **changes: Any) -> Path:
    path: Path = write_recipe(root, models, **changes)
    (root / "corpus.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    return path


def test_format_columns_and_segments_are_told(tmp_path: Path, tiny_models: dict[str, Path]) -> None:
    recipe = _recipe(tmp_path, tiny_models, GSM8K)
    for command in (("plan", recipe), ("run", recipe, "--dry-run")):
        printed = kava(*command)
        assert "GSM8K: rationale and answer split at ####" in printed
        assert "columns that are not read: source" in printed
        assert printed.count("columns that are not read") == 1
        assert "prompt" in printed
        assert "rationale" in printed
    plan = json.loads(kava("plan", recipe, "--json"))
    assert plan["corpus"] == ["GSM8K: rationale and answer split at ####", "columns that are not read: source"]
    segments = plan["tokens"]["big"]["segments"]
    printed = kava("extract", recipe)
    assert printed.count("columns that are not read: source") == 1
    numbers = ", ".join(f"{name} {segments[name]:,}" for name in ("prompt", "rationale", "answer"))
    assert f"tokens: {numbers}" in printed
    store = KVStore.open(tmp_path / "run/teachers/big.zarr")
    captured = [store.sample(index, keys=False, values=False).segments for index in range(len(store))]
    for name, count in segments.items():
        assert count == sum((kinds == Segment[name.upper()]).sum() for kinds in captured) > 0
    assert "tokens:" not in kava("extract", recipe), "nothing is captured, nothing is counted"


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"select": {"tokens": 4, "method": "uniform"}}, "select needs a rationale"),
        ({"extract": {"importance": True}}, "extract.importance needs a rationale"),
        ({"select": {"tokens": 4, "method": "uniform", "segment": "prompt"}}, "select needs a prompt"),
        ({"train": {"ce_segments": ["rationale"]}}, "train.ce_segments needs a rationale"),
    ],
)
def test_a_stage_whose_segment_is_empty_is_refused(
    tmp_path: Path, tiny_models: dict[str, Path], changes: dict[str, Any], key: str
) -> None:
    rows = [{"question": "Q", "answer": str(n)} for n in range(24)]
    if "prompt" in key:
        rows = [{"text": str(n)} for n in range(24)]
    recipe = _recipe(tmp_path, tiny_models, rows, **changes)
    printed = kava("extract", recipe, code=2)
    assert f"corpus.jsonl: {key}, and no record has one" in printed
    assert not (tmp_path / "run/teachers").exists()
    assert f"{key}, and no record has one" in kava("run", recipe, "--dry-run", code=2)


def test_samples_without_the_segment_are_counted(tmp_path: Path, tiny_models: dict[str, Path]) -> None:
    rows = [*GSM8K[:20], *({"question": f"Q{n}", "answer": "1"} for n in range(4))]
    recipe = _recipe(tmp_path, tiny_models, rows, select={"tokens": 4, "method": "uniform"})
    warning = "select: 4 of 24 samples have no rationale, and all their slots stay empty"
    assert warning in kava("plan", recipe)
    assert warning in kava("extract", recipe)


def test_a_field_that_no_record_has_is_refused_before_any_work(tmp_path: Path, tiny_models: dict[str, Path]) -> None:
    recipe = _recipe(tmp_path, tiny_models, GSM8K)
    printed = kava("extract", recipe, "-s", "corpus.fields={prompt: qestion}", code=2)
    assert (
        "no record has the field 'qestion', named by corpus.fields.prompt; the fields are question, answer" in printed
    )
    assert not (tmp_path / "run/teachers").exists()
