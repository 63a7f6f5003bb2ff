"""The plan against what a run leaves on the disk."""

from __future__ import annotations

import json
from pathlib import Path
from random import Random
from typing import Any

import pytest
import yaml
from fixtures.command import kava, write_recipe
from fixtures.stores import mounted
from fixtures.tokenizers import TEXTS
from torch import cuda

from kava.extract import Corpus, Encoder, Record
from kava.hub import find_model, load_tokenizer
from kava.pipeline import load_recipe
from kava.pipeline.plan.tokens import count_tokens
from kava.pipeline.run import Run
from kava.pipeline.stages import stages_of
from kava.pipeline.store_stages import StoreStage
from kava.store import KVStore, Segment

# Everything that is a store, with arrays of its own: signals, slots, two teachers as one.
CHANGES: dict[str, Any] = {
    "resample": {"materialize": True},
    "fuse": {},
    "select": {"tokens": 4, "method": "uniform"},
    "train": {"teacher": "big"},
}


def _recipe(root: Path, models: dict[str, Path], **changes: Any) -> Path:
    teachers = {name: {"model": str(models["teacher"]), "dtype": "float32"} for name in ("big", "other")}
    path: Path = write_recipe(root, models, **({**CHANGES, "teachers": teachers} | changes))
    # Longer texts than the other tests have: with a page for every sample there would be nothing to get wrong.
    corpus = root / "corpus.jsonl"
    rows = [json.loads(line) for line in corpus.read_text().splitlines()]
    for number, row in enumerate(rows):
        row["rationale"] = row["rationale"] * (1 + 3 * number % 7)
    corpus.write_text("\n".join(json.dumps(row) for row in rows))
    return path


def _plan(*arguments: Any, code: int = 0) -> dict[str, Any]:
    printed = kava("plan", *arguments, "--json", code=code)  # Progress is on the other stream.
    return dict(json.loads(printed[printed.index("{\n") : printed.rindex("\n}") + 2]))


def _check_sizes(plan: dict[str, Any], recipe: Path, overrides: list[str]) -> None:
    run = Run(load_recipe(recipe, overrides))
    stages = {stage.label: stage for stage in stages_of(run) if isinstance(stage, StoreStage)}
    planned = {store["stage"]: store for store in plan["stores"]}
    assert stages.keys() == planned.keys()
    for label, stage in stages.items():
        store, told = KVStore.open(stage.output), planned[label]
        assert told["path"] == str(stage.output)
        assert told["tokens"] == store.num_tokens, label
        assert told["parts"] == store.manifest.num_parts == len(store.committed_parts()), label
        assert told["files"] == sum(path.is_file() for path in store.path.rglob("*")), label
        exact = 0.02 if told["estimated"] is None else 0.1  # Of fused numbers it is not measured how they compress.
        assert told["bytes"] == pytest.approx(store.size_on_disk(), rel=exact), label
    total = sum(KVStore.open(stage.output).size_on_disk() for stage in stages.values())
    assert plan["bytes"] == pytest.approx(total, rel=0.02)


def test_planned_bytes_are_those_on_disk(tmp_path: Path, tiny_models: dict[str, Path]) -> None:
    """Without compression from the token counts alone."""
    recipe = _recipe(tmp_path, tiny_models, extract={"codec": "none", "confidence": True, "importance": True})
    overrides = ["project.codec=none", "project.heads=random"]
    options = [word for override in overrides for word in ("-s", override)]
    plan = _plan(recipe, *options)
    assert not (tmp_path / "run").exists()
    assert plan["tokens"]["big"]["how"] == "exact"
    assert {store["estimated"] for store in plan["stores"]} == {None}
    kava("run", recipe, *options, "--until", "fuse")
    _check_sizes(plan, recipe, overrides)
    student, trained = plan["weights"]
    assert plan["disks"][0]["needed"] == plan["bytes"] + student["bytes"] + trained["bytes"]
    made = (tmp_path / "run/student/model.safetensors").stat().st_size
    assert student["bytes"] == trained["bytes"] == pytest.approx(made, abs=8192)  # Names of tensors are not counted.
    # What is there now is not needed any more; the trained student is.
    assert 0 <= _plan(recipe, *options)["disks"][0]["needed"] - trained["bytes"] < plan["bytes"] / 20


@pytest.mark.slow
@pytest.mark.parametrize("codec", ["blosc-zstd", "int8"])
def test_a_probe_measures_compression(tmp_path: Path, tiny_models: dict[str, Path], codec: str) -> None:
    recipe = _recipe(tmp_path, tiny_models, extract={"codec": codec, "dtype": "bfloat16"}, select=None)
    overrides = [f"project.codec={codec}"]
    options = ["-s", *overrides]
    plan = _plan(recipe, *options, "--probe")
    assert not (tmp_path / "run").exists()
    measured = {store["stage"] for store in plan["stores"] if store["estimated"] is None}
    assert measured >= {"extract big", "resample big", "project big", "extract other"}
    assert {*plan["seconds"]} == {"extract big", "project big", "extract other", "project other", "reference", "train"}
    assert all(seconds > 0 for seconds in plan["seconds"].values())
    kava("run", recipe, *options, "--until", "fuse")
    _check_sizes(plan, recipe, overrides)


def test_a_run_that_cannot_fit_is_refused(tmp_path: Path, tiny_models: dict[str, Path]) -> None:
    recipe, disk = _recipe(tmp_path, tiny_models), tmp_path / "disk"
    with mounted(disk, "-t", "tmpfs", "-o", "size=256k", "tmpfs"):
        printed = kava("plan", recipe, "-s", f"run_dir={disk}/run", code=2)
        assert f"does not fit: {disk} has 262.1 kB free" in printed
        found = kava("plan", recipe, "-s", f"run_dir={disk}/run", "--json", code=2)
        plan = json.loads(found[: found.rindex("}") + 1])
        needed = plan["bytes"] + sum(weights["bytes"] for weights in plan["weights"])
        assert plan["disks"] == [{"path": str(disk), "needed": needed, "free": 262144, "fits": False}]
        assert f"{(needed - 262144) / 1e6:.1f} MB too little" in plan["refusals"][0]
        assert not list(disk.iterdir())
        assert "does not fit" not in kava("run", recipe, "--dry-run", "-s", f"run_dir={disk}/run")


def test_what_would_make_it_smaller(tmp_path: Path, tiny_models: dict[str, Path]) -> None:
    """Each change by itself takes what the plan of the changed recipe says."""
    recipe = _recipe(tmp_path, tiny_models, select=None, fuse=None)
    plan = _plan(recipe)
    assert {
        "extract.dtype: bfloat16",
        "extract.codec: int8",
        "extract.keep: target",
        "resample.materialize: false",
    } <= {saving["change"] for saving in plan["smaller"]}
    assert [s["saves"] for s in plan["smaller"]] == sorted((s["saves"] for s in plan["smaller"]), reverse=True)
    for saving in plan["smaller"]:
        if saving["change"].startswith(("extract.codec", "extract.dtype", "resample")):
            assert _plan(recipe, "-s", saving["change"].replace(": ", "="))["bytes"] == saving["bytes"]
            assert plan["bytes"] - saving["bytes"] == saving["saves"] > 0
    long = ["-s", "corpus.separator=" + "x" * 200]
    line = "samples are longer than the 256 tokens that big reads (max_position_embeddings"
    assert f"{line} and rope scaling of its config): shorten them, or set extract.too_long: skip" in kava(
        "plan", recipe, *long, code=2
    )
    assert line in kava("plan", recipe, *long, "-s", "extract.too_long=skip")


def test_tokens_of_a_sample_lie_in_their_interval(tiny_models: dict[str, Path]) -> None:
    rng = Random(0)
    words = [text for text in TEXTS for _ in range(3)] + ["é中文😀" * 3, "0123456789 " * 4]
    texts = ["".join(rng.choice(words) for _ in range(rng.randint(1, 6))) for _ in range(120)]
    corpus = Corpus([Record(str(n), text, ((0, len(text), Segment.PROMPT),), ()) for n, text in enumerate(texts)])
    encoder = Encoder(load_tokenizer(find_model(str(tiny_models["teacher"]))))
    exact = count_tokens(encoder, corpus)
    assert exact.rows() == sum(len(encoder.encode(record)) for record in corpus.records)
    assert exact.rows(16) == sum(-(-len(encoder.encode(r)) // 16) * 16 for r in corpus.records)
    assert exact.error == 0
    found = [count_tokens(encoder, corpus, 30, seed) for seed in range(40)]
    inside = [abs(count.rows() - exact.rows()) <= count.error * count.rows() for count in found]
    assert sum(inside) >= 34  # Of a 95 % interval.
    assert all(0 < count.error < 0.2 for count in found)
    some = range(0, 120, 2)
    assert exact.rows(1, some) == sum(exact.lengths[i] for i in some)


def test_parts_are_sized_by_all_teachers(
    tmp_path: Path, tiny_models: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the plan is of one alone."""
    monkeypatch.setattr("kava.pipeline.parts.PART_BYTES", 140_000)
    recipe = _recipe(tmp_path, tiny_models, select=None, fuse=None, samples_per_part=None)
    whole = yaml.safe_load(recipe.read_text())
    whole["teachers"]["other"] = {"model": str(tiny_models["student"]), "dtype": "float32"}
    recipe.write_text(yaml.safe_dump(whole))
    small, size = _plan(recipe, "--teacher", "other"), Run(load_recipe(recipe)).samples_per_part
    assert {store["samples_per_part"] for store in small["stores"] if store["stage"] != "reference"} == {size}
    del whole["teachers"]["big"]
    recipe.write_text(yaml.safe_dump(whole))
    assert Run(load_recipe(recipe)).samples_per_part > size


def test_weights_of_arms_and_checkpoints_need_room(tmp_path: Path, tiny_models: dict[str, Path]) -> None:
    recipe = _recipe(
        tmp_path, tiny_models, select=None, fuse=None, compare={"arms": ["none", "kv"], "seeds": [0, 1, 2]}
    )
    whole = yaml.safe_load(recipe.read_text())
    config = {"model_type": "llama", "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    config |= {"num_attention_heads": 2, "num_key_value_heads": 2}
    whole |= {"student": {"config": config, "tokenizer": {"vocab_size": 300}}}
    whole["train"]["save_steps"] = 3
    recipe.write_text(yaml.safe_dump(whole))
    plan = _plan(recipe, "--teacher", "big", "--sample", "4", "-s", "extract.codec=none")
    # Embedding and head; each layer's projections, MLP and two norms; the last norm.
    one = 4 * (2 * 300 * 32 + 2 * (4 * 32 * 32 + 3 * 32 * 48 + 2 * 32) + 32)
    assert [weights["bytes"] for weights in plan["weights"]] == [one, one, 6 * one, 2 * 3 * one]
    assert plan["disks"][0]["needed"] == plan["bytes"] + 14 * one


def test_a_device_that_is_none(tmp_path: Path, tiny_models: dict[str, Path]) -> None:
    recipe, options = _recipe(tmp_path, tiny_models, select=None, fuse=None), ["--teacher", "big", "--sample", "4"]
    for device in ("cuda:x", "gpu"):
        plan = _plan(recipe, *options, "-s", f"teachers.big.device={device}", code=2)
        assert plan["memory"] == []
        assert f"teachers.big.device: device '{device}' cannot be used here" in plan["broken"][0]
        assert f"teachers.big.device: '{device}' is no device" in plan["problems"][-1]
    plan = _plan(recipe, *options, "-s", "teachers.big.device=cuda:99", code=2)
    assert "teachers.big.device: device 'cuda:99' cannot be used here" in plan["broken"][0]
    assert "this machine's last one is" in plan["problems"][-1] if cuda.is_available() else plan["memory"][0]["fits"]


def test_memory_counts_weights_once(tmp_path: Path, tiny_models: dict[str, Path]) -> None:
    from kava.hub import load_model

    recipe = _recipe(tmp_path, tiny_models)
    memory = _plan(recipe, "-s", "teachers.big.device=cpu")["memory"][0]
    model = load_model(find_model(str(tiny_models["teacher"])), dtype="float32")
    assert memory["weights"] == sum(p.numel() * 4 for p in model.parameters())
    assert memory["kv"] == 2 * 4096 * 1280
    assert memory["needed"] > memory["weights"] + memory["kv"] + memory["activations"]
    assert memory["fits"] is True
    assert memory["available"] > 0
