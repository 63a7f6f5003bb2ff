"""`kava extract` with vLLM, as a user runs it; and killed, as a cluster runs it."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from fixtures.command import KAVA, kava, rows, write_recipe
from fixtures.models import save_model
from fixtures.stores import tree
from fixtures.tokenizers import byte_level_tokenizer, smollm2_gguf

pytest.importorskip("vllm")

from kava.extract.hf import HFTeacher
from kava.pipeline.recipe import load_recipe
from kava.pipeline.run import Run
from kava.store import KVStore

pytestmark = pytest.mark.vllm

ENGINE = {"kv_cache_memory_bytes": 64 << 20, "enforce_eager": True}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory, tiny_models: dict[str, Path]) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("teacher")
    path = save_model(folder / "qwen2", "qwen2", byte_level_tokenizer(400), layers=4, head_dim=32, hidden_size=192)
    return {**tiny_models, "teacher": path}


def _recipe(root: Path, models: dict[str, Path], samples: int = 24, **engine: Any) -> Path:
    root.mkdir(exist_ok=True)
    teacher = {"model": str(models["teacher"]), "dtype": "float32", "engine": {**ENGINE, **engine}}
    path: Path = write_recipe(root, models, teachers={"big": teacher}, extract={"backend": "vllm"})
    (root / "corpus.jsonl").write_text("\n".join(json.dumps(row) for row in rows(samples)))
    return path


def test_the_whole_line_with_vllm(tmp_path: Path, models: dict[str, Path]) -> None:
    recipe = _recipe(tmp_path, models)
    printed = kava("run", recipe, new_process=True)
    assert "held-out CE" in printed
    path = tmp_path / "run/teachers/big.zarr"
    kava("verify", path)
    assert KVStore.open(path).part(0).written_by.startswith("vllm 0.")
    # The same content by either backend: complete is complete; a part that is missing is another matter.
    hf = ["-s", "extract.backend=hf"]
    assert "up to date" in kava("extract", recipe, *hf)
    shutil.rmtree(path / "parts/00001")
    printed = kava("extract", recipe, *hf, code=2)
    assert "part 0 was captured by vllm" in printed
    assert "extract.mix_backends: true" in printed
    kava("extract", recipe, *hf, "-s", "extract.mix_backends=true")
    kava("verify", path)


def test_parity_is_printed_and_judged(tmp_path: Path, models: dict[str, Path]) -> None:
    recipe = _recipe(tmp_path, models)
    printed = kava("extract", recipe, "--check-parity", 5, new_process=True)
    assert "big: vllm 0." in printed
    assert "in float32 against Hugging Face in float32, 5 samples" in printed
    assert "Equal: the limit is 1e-05 in every layer." in printed
    printed = kava("extract", recipe, "--check-parity", 5, "-s", "extract.dtype=bfloat16", code=1, new_process=True)
    assert "NOT EQUAL" in printed  # Storage in bfloat16 rounds more than float32 may differ.
    assert not (tmp_path / "run/teachers").exists()


def test_the_real_smollm2_is_equal(tmp_path: Path, models: dict[str, Path]) -> None:
    recipe = _recipe(tmp_path, {**models, "teacher": smollm2_gguf()}, kv_cache_memory_bytes=1 << 30)
    printed = kava("extract", recipe, "--check-parity", 4, new_process=True)
    print(printed)
    assert "Equal: the limit is 1e-05 in every layer." in printed
    assert len([line for line in printed.splitlines() if line[:2].strip().isdigit()]) == 30


def test_quantised_weights_are_another_content(tmp_path: Path, models: dict[str, Path]) -> None:
    recipe = _recipe(tmp_path, models)
    printed = kava("extract", recipe, "-s", "extract.backend=hf", "-s", "teachers.big.engine.quantization=fp8", code=2)
    assert "teachers.big.engine.quantization needs extract.backend: vllm" in printed
    plain = Run(load_recipe(recipe)).teacher_manifest("big")
    quantised = Run(load_recipe(recipe, ["teachers.big.engine.quantization=fp8"])).teacher_manifest("big")
    assert list(plain.differences(quantised)) == ["parameters", "parameters.quantization"] or (
        "parameters.quantization" in plain.differences(quantised)
    )


def _family(process: Any) -> list[psutil.Process]:
    return list(psutil.Process(process.pid).children(recursive=True))


def _named(process: Any, name: str) -> int:
    return int(next(p.pid for p in _family(process) if any(name in word for word in p.cmdline())))


@pytest.mark.parametrize(
    ("victim", "engine"),
    [
        ("parent", {}),
        ("worker", {"tensor_parallel_size": 2}),
        ("engine", {"deterministic": False}),
        ("parent", {"deterministic": False, "tensor_parallel_size": 2}),
    ],
    ids=["parent", "worker", "engine core", "parent of engine core and workers"],
)
def test_killed_anywhere_a_rerun_completes(
    tmp_path: Path, models: dict[str, Path], victim: str, engine: dict[str, Any]
) -> None:
    environment = dict(os.environ)
    if "tensor_parallel_size" in engine:  # Two ranks bound to cores that others use too wait for each other.
        environment["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"
    recipe = _recipe(tmp_path / "killed", models, samples=120, **engine)
    command = [*KAVA, "extract", str(recipe), "-s", "samples_per_part=2"]
    shared_before = set(Path("/dev/shm").iterdir())
    parts = tmp_path / "killed/run/teachers/big.zarr/parts"
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, env=environment)
        while len(list(parts.glob("0*"))) < 3:
            assert process.poll() is None, (tmp_path / "log").read_text()
            time.sleep(0.005)
        family = _family(process)
        target = {
            "parent": lambda: process.pid,
            "worker": lambda: _named(process, "Worker"),
            "engine": lambda: _named(process, "EngineCore"),
        }[victim]()
        os.kill(target, signal.SIGKILL)
        code = process.wait(60)
    assert code == (-signal.SIGKILL if victim == "parent" else 75), (tmp_path / "log").read_text()
    if victim != "parent":  # The engine logs its own death at length; we say what to do.
        assert (
            "kava: worker" in (tmp_path / "log").read_text()
            or "kava: the vLLM engine" in (tmp_path / "log").read_text()
        )
    written = len(list(parts.glob("0*")))
    assert 3 <= written < 60
    _, alive = psutil.wait_procs(family, timeout=30)
    assert not alive, [p.cmdline() for p in alive]
    assert set(Path("/dev/shm").iterdir()) <= shared_before
    subprocess.run(command, check=True, env=environment, capture_output=True)
    store = KVStore.open(parts.parent)
    assert store.verify() == []
    assert store.missing_parts() == []
    if engine.get("deterministic", True):
        whole = _recipe(tmp_path / "whole", models, samples=120, **engine)
        again = [*KAVA, "extract", str(whole), "-s", "samples_per_part=2"]
        subprocess.run(again, check=True, env=environment, capture_output=True)
        assert tree(store.path) == tree(tmp_path / "whole/run/teachers/big.zarr")
    run = Run(load_recipe(recipe))
    chosen = list(range(0, 120, 13))
    tokens = [run.teacher_encoder("big").encode(run.corpus.records[index]) for index in chosen]
    for captured in HFTeacher.load(run.teacher_source("big"), dtype="float32").capture(tokens):
        stored = store[chosen[captured.index]]
        torch.testing.assert_close(stored.keys, captured.keys, rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(stored.values, captured.values, rtol=1e-3, atol=1e-4)
