"""Two processes that train one student, as torchrun starts them: gloo on CPU, the command as a user types it."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from fixtures.command import kava, seal_again, write_recipe
from fixtures.stores import tree
from safetensors.torch import load_file, save_file

from kava.pipeline import load_recipe
from kava.pipeline.run import Run
from kava.store import KVStore, Lock, Split
from kava.store.sealed import read_sealed
from kava.train import TargetDataset, load_student
from kava.train.checkpoints import damaged_checkpoints
from kava.train.order import Order

pytestmark = pytest.mark.slow
TIMED = {"tokens_per_second", "data_wait_share", "peak_memory_gib"}
LOCAL = {"kv_gradient_share", "keys_spread", "values_spread"}
"""What is measured on each rank's own rows."""


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory, tiny_models: dict[str, Path]) -> Path:
    """A recipe with targets, for a student with dropout."""
    root = tmp_path_factory.mktemp("ranks")
    student = root / "with-dropout"
    shutil.copytree(tiny_models["student"], student)
    config = json.loads((student / "config.json").read_text())
    (student / "config.json").write_text(json.dumps(config | {"attention_dropout": 0.1}))
    made: Path = write_recipe(root, {**tiny_models, "student": student})
    kava("run", made, "--until", "project")
    return made


def _words(recipe: Path, name: str, changes: dict[str, Any]) -> list[str]:
    settings = {"name": name, "logging_steps": 1, **changes}
    return ["train", str(recipe), *(f"-strain.{key}={json.dumps(value)}" for key, value in settings.items())]


def _torchrun(*words: str) -> subprocess.Popen[str]:
    """A module in two processes."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    paths = [str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
    return subprocess.Popen(
        [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", f"--master-port={port}", "-m", *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, paths))},
    )


def _start(recipe: Path, name: str, **changes: Any) -> subprocess.Popen[str]:
    """`torchrun -m kava train` in two processes."""
    return _torchrun("kava", *_words(recipe, name, changes))


def _two(recipe: Path, name: str, *, code: int = 0, **changes: Any) -> str:
    run = _start(recipe, name, **changes)
    printed, _ = run.communicate(timeout=300)
    assert run.returncode == code, printed
    return printed


def _lines(recipe: Path, name: str) -> list[dict[str, Any]]:
    text = (recipe.parent / "run/students" / name / "metrics.jsonl").read_text()
    lines = [json.loads(line) for line in text.splitlines()]
    return [{k: v for k, v in line.items() if k not in TIMED} for line in lines if "train_runtime" not in line]


def _weights(recipe: Path, name: str) -> dict[str, torch.Tensor]:
    weights: dict[str, torch.Tensor] = load_student(recipe.parent / "run/students" / name)[0].state_dict()
    return weights


@pytest.mark.parametrize(
    ("two", "one"),
    [
        ({"batch_size": 2}, {"batch_size": 4}),
        (
            {
                "batch_size": 1,
                "gradient_accumulation_steps": 2,
                "pack_tokens": 120,
                "alpha_schedule": {"kind": "warmup"},
            },
            {
                "batch_size": 2,
                "gradient_accumulation_steps": 2,
                "pack_tokens": 120,
                "alpha_schedule": {"kind": "warmup"},
            },
        ),
        (
            {"batch_size": 3, "group_by_length": True, "lora": {"r": 4}},
            {"batch_size": 6, "group_by_length": True, "lora": {"r": 4}},
        ),
        (
            {"batch_size": 2, "projector": "learned", "projector_learning_rate": 1e-2, "max_grad_norm": 0.01},
            {"batch_size": 4, "projector": "learned", "projector_learning_rate": 1e-2, "max_grad_norm": 0.01},
        ),
        (
            {"batch_size": 2, "fsdp": True, "alpha": "auto", "alpha_steps": 3, "gradient_checkpointing": True},
            {"batch_size": 4, "alpha": "auto", "alpha_steps": 3},
        ),
        (
            {"batch_size": 1, "fsdp": True, "gradient_accumulation_steps": 2, "pack_tokens": 120},
            {"batch_size": 2, "gradient_accumulation_steps": 2, "pack_tokens": 120},
        ),
    ],
    ids=["rows", "packed", "lora", "projector", "shards", "packed-shards"],
)
def test_two_ranks_train_as_one(recipe: Path, tmp_path: Path, tiny_models: dict[str, Path], two: Any, one: Any) -> None:
    """The same global batches: equal loss, KV loss of each layer, gradient norm and held-out metrics; equal weights."""
    plain = tmp_path / "recipe.yaml"  # Without dropout, whose masks are of the shapes of each rank's batches.
    shutil.copytree(recipe.parent / "run", tmp_path / "run")
    shutil.copytree(tiny_models["student"], tmp_path / "run/student", dirs_exist_ok=True)
    seal_again(tmp_path / "run/student")
    plain.write_text(recipe.read_text().replace(str(recipe.parent / "run"), str(tmp_path / "run")))
    printed = _two(plain, "two", **two)
    assert printed.count("train:   ") == 1
    assert "6 steps, held-out CE" in printed
    kava(*_words(plain, "one", one))
    for got, wanted in zip(_lines(plain, "two"), _lines(plain, "one"), strict=True):
        assert got.keys() == wanted.keys()
        for name in got.keys() - {n for n in got if n.startswith(tuple(LOCAL))}:
            assert got[name] == pytest.approx(wanted[name], rel=2e-4 if name == "grad_norm" else 2e-5), name
    first, second = _weights(plain, "two"), _weights(plain, "one")
    for name, tensor in first.items():
        # Adam turns rounding in gradients that are nearly zero into steps.
        assert (tensor - second[name]).abs().max() < 2e-4, name
    files = {path for path in tree(tmp_path / "run/students/two") if "tensorboard" not in path}
    assert files == {path for path in tree(tmp_path / "run/students/one") if "tensorboard" not in path}
    assert len(list((tmp_path / "run/students/two/tensorboard").iterdir())) == 1
    assert "up to date" in _two(plain, "two", **two)


@pytest.mark.parametrize("fsdp", [False, True], ids=["copies", "shards"])
def test_one_is_told_to_stop_and_all_do_and_go_on_exactly(recipe: Path, fsdp: bool) -> None:
    """Every number of the log, bit for bit: dropout, alpha from gradients, packed rows, a log that spans the checkpoint."""
    settings: dict[str, Any] = {
        "max_steps": 120,
        "batch_size": 1,
        "pack_tokens": 120,
        "alpha": "auto",
        "alpha_update_steps": 5,
        "logging_steps": 7,
        "eval_steps": 50,
        "fsdp": fsdp,
    }
    shutil.rmtree(recipe.parent / "run/students", ignore_errors=True)
    _two(recipe, "whole", **settings)
    run = _start(recipe, "cut", **settings)
    log = recipe.parent / "run/students/cut/metrics.jsonl"
    while not log.is_file() or not log.read_text():
        time.sleep(0.05)
        assert run.poll() is None, run.communicate()
    ranks = [p for p in psutil.Process(run.pid).children(recursive=True) if p.environ().get("RANK") == "1"]
    ranks[0].send_signal(signal.SIGUSR1)
    printed, _ = run.communicate(timeout=300)
    (step,) = re.findall(r"stopped by SIGUSR1 after step (\d+) with a checkpoint", printed)
    assert 7 <= int(step) < 120
    assert set(re.findall(r"exitcode *: (\d+)", printed)) == {"75"}
    checkpoint = recipe.parent / f"run/students/cut/checkpoints/checkpoint-{step}"
    assert {"kava.json", "rng_state_0.pth", "rng_state_1.pth"} <= {path.name for path in checkpoint.iterdir()}
    files = {path.relative_to(checkpoint).as_posix() for path in checkpoint.rglob("*") if path.is_file()}
    assert {*read_sealed(checkpoint / "kava.json")["files"], "kava.json"} == files
    assert damaged_checkpoints(checkpoint.parent) == []
    words = _words(recipe, "cut", settings)
    assert "2 processes of 1 rows each, this one has 1 of 1: go on as it was begun" in kava(*words, code=2)
    other = _two(recipe, "cut", code=1, **settings | {"fsdp": not fsdp})
    assert f"with {'shards' if fsdp else 'copies'} of the student, this one has train.fsdp" in other
    _two(recipe, "cut", **settings)
    assert _lines(recipe, "cut") == _lines(recipe, "whole")
    one, two = _weights(recipe, "cut"), _weights(recipe, "whole")
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_each_process_holds_a_shard_and_every_weight_has_a_gradient(recipe: Path) -> None:
    run = _torchrun("fixtures.held", *_words(recipe, "held", {"fsdp": True, "batch_size": 2, "max_steps": 3}))
    printed, _ = run.communicate(timeout=300)
    assert run.returncode == 0, printed
    found = re.findall(r"rank (\d) holds ([\d.]+) and ([\d.]+), silent \[\]", printed)
    assert sorted(rank for rank, *_ in found) == ["0", "0", "0", "1", "1", "1"], printed
    assert all(0.45 < float(share) < 0.55 for _, *shares in found for share in shares), printed


def test_shards_of_a_student_whose_embeddings_are_also_its_head(tmp_path: Path, tiny_models: dict[str, Path]) -> None:
    student = tmp_path / "tied"
    shutil.copytree(tiny_models["student"], student)
    config = json.loads((student / "config.json").read_text()) | {"tie_word_embeddings": True}
    (student / "config.json").write_text(json.dumps(config))
    weights = load_file(student / "model.safetensors")
    del weights["lm_head.weight"]
    save_file(weights, student / "model.safetensors", metadata={"format": "pt"})
    recipe = write_recipe(tmp_path, {**tiny_models, "student": student})
    kava("run", recipe, "--until", "project")
    _two(recipe, "two", batch_size=2, fsdp=True)
    kava(*_words(recipe, "one", {"batch_size": 4}))
    found, wanted = ([line["ce"] for line in _lines(recipe, name) if "ce" in line] for name in ("two", "one"))
    assert len(found) == 6
    assert found == pytest.approx(wanted, rel=2e-5)
    first, second = _weights(recipe, "two"), _weights(recipe, "one")
    assert first.keys() == second.keys()
    assert all((tensor - second[name]).abs().max() < 2e-4 for name, tensor in first.items())


def _alone(targets: KVStore, owners: set[str]) -> Iterator[tuple[int, str]]:
    """Seeds under which the first of these samples to be read, a row for each of two ranks, has its step for itself."""
    dataset = TargetDataset(targets, Split.TRAIN)
    for seed in range(100):
        rows = Order(dataset.lengths, dataset.parts, seed=seed).rows(0, 40)
        names = [targets[dataset.indices[item]].sample_id for (item,) in rows]
        first = next(i for i, name in enumerate(names) if name in owners)
        if names[first ^ 1] not in owners:
            yield seed, names[first]


@pytest.mark.parametrize("fsdp", [False, True], ids=["copies", "shards"])
def test_what_goes_wrong_on_one_rank_stops_all_and_is_told_once(recipe: Path, tmp_path: Path, fsdp: bool) -> None:
    """A number that is not finite, in samples that one rank alone has; then damage."""
    root = recipe.parent / "run"
    targets = KVStore.open(Run(load_recipe(recipe)).target_path("big"))
    samples = [targets[index] for index in targets.indices(Split.TRAIN)]
    owners = {t: {s.sample_id for s in samples if t in s.input_ids} for t in range(400)}
    token = min((t for t in owners if owners[t]), key=lambda t: len(owners[t]))
    shutil.copytree(root, tmp_path / "run")
    copy = tmp_path / "recipe.yaml"
    copy.write_text(recipe.read_text().replace(str(root), str(tmp_path / "run")))
    model, _ = load_student(root / "student")
    with torch.no_grad():
        model.get_input_embeddings().weight[token] = torch.nan
    model.save_pretrained(tmp_path / "run/student")
    seal_again(tmp_path / "run/student")
    seed, owner = next(_alone(targets, owners[token]))
    printed = _two(copy, "nan", code=1, batch_size=1, max_steps=40, seed=seed, fsdp=fsdp)
    (samples_told,) = re.findall(
        r"kava: train: the loss \(.*\) is not finite in step \d+, samples (.*); the", " ".join(printed.split())
    )
    assert samples_told == owner
    assert set(re.findall(r"exitcode *: (\d+)", printed)) == {"1"}
    assert not (tmp_path / "run/students/nan/model.safetensors").exists()
    shutil.rmtree(tmp_path / "run/student")
    shutil.copytree(root / "student", tmp_path / "run/student")
    shard = next(p for p in (tmp_path / "run/targets/big.zarr/parts/00002/values/c").rglob("*") if p.is_file())
    data = bytearray(shard.read_bytes())
    data[50] ^= 4
    shard.unlink()
    shard.write_bytes(data)
    printed = " ".join(_two(copy, "damaged", code=1, batch_size=1, max_steps=40, fsdp=fsdp).split())
    assert len(re.findall(r"kava: sample 1[0-4]: ", printed)) == 1
    assert "rank 1" not in printed.split("Traceback")[0]


def test_other_verbs_are_not_for_several_processes(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "torchrun is for kava train: extract, project, reference, student would run 2 times" in kava(
        "run", recipe, "--until", "project", code=2
    )


def test_the_tap_carries_the_gradient_of_a_sharded_model() -> None:
    """torch's `fully_shard` alone, without the Trainer."""
    run = _torchrun("fixtures.sharded")
    printed, _ = run.communicate(timeout=120)
    assert run.returncode == 0, printed
    assert float(re.findall(r"error (\S+)", printed)[0]) < 1e-5


def test_two_ranks_train_again_or_leave_it_to_others(recipe: Path) -> None:
    words = [*_words(recipe, "again", {}), "--force"]
    folder = recipe.parent / "run/students"
    kava(*words[:-1])
    before = (folder / "again/model.safetensors").stat().st_mtime_ns
    held = Lock.take(folder / ".again.lock")
    assert held is not None
    try:
        run = _torchrun("kava", *words)
        printed, _ = run.communicate(timeout=300)
    finally:
        held.release()
    assert run.returncode == 1
    assert printed.count("another process is training") == 1
    assert (folder / "again/model.safetensors").stat().st_mtime_ns == before
    run = _torchrun("kava", *words)
    printed, _ = run.communicate(timeout=300)
    assert run.returncode == 0, printed
    assert (folder / "again/model.safetensors").stat().st_mtime_ns != before
    assert not (folder / ".again.lock").exists()
