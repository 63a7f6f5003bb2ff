"""The power fails: what is on the disk then is complete or absent, and the same command ends with the same bits."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from fixtures.command import write_recipe
from fixtures.disk_trace import Disk, trace
from fixtures.models import save_model
from fixtures.tokenizers import sentencepiece_tokenizer

STAGES = ["generate", "student", "extract", "reference", "resample", "project", "select", "fuse", "train"]
needs_strace = pytest.mark.skipif(shutil.which("strace") is None, reason="strace is not installed")
needs_images = pytest.mark.skipif(
    os.geteuid() != 0 or shutil.which("mkfs.ext4") is None or not Path("/dev/loop-control").exists(),
    reason="mounting an ext4 image needs root, mkfs.ext4 and loop devices",
)


FLUSHED = """
def flush(path):
    descriptor = os.open(at(path), os.O_RDONLY); os.fsync(descriptor); os.close(descriptor)
def write(path):
    with open(at(path), "w") as file: file.write("x")
def rename(old, new):
    os.rename(at(old), at(new))
"""


def _recipe(root: Path, models: dict[str, Path], **changes: Any) -> Path:
    recipe: Path = write_recipe(
        root,
        models,
        **{
            "run_dir": str(root / "place/run"),
            "samples_per_part": 8,
            "train": {"max_steps": 4, "save_steps": 1, "report_to": [], "eval_steps": None},
            **changes,
        },
    )
    return recipe


def _environment() -> dict[str, str]:
    path = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    return {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}


def _faults(folder: Path, code: str) -> list[str]:
    (folder / "run").mkdir()
    at = f"def at(name): return os.path.join({str(folder / 'run')!r}, name)"
    script = f"import os\n{at}\n{FLUSHED}\n{code}"
    trace([sys.executable, "-c", script], folder / "log", check=True)
    disk = Disk(folder / "run", lambda path: False)
    disk.replay(folder / "log")
    faults: list[str] = disk.faults
    return faults


@needs_strace
@pytest.mark.parametrize(
    ("code", "fault"),
    [
        ("write('.a'); flush('.a'); rename('.a', 'a'); flush('.')", ""),
        ("write('.a'); rename('.a', 'a'); flush('.')", "a is published, the bytes of .a"),
        ("write('.a'); flush('.a'); rename('.a', 'a')", "the end, the name of a "),
        ("write('a'); flush('.')", "the end, the bytes of a "),
        ("os.mkdir(at('s')); flush('.'); write('s/a'); flush('s/a'); write('s/kava.json')", "the end, the name of s/a"),
        (
            "os.mkdir(at('s')); flush('.'); write('s/a'); write('s/.k'); flush('s/.k'); flush('s'); rename('s/.k', 's/kava.json')",
            "s/kava.json is written, the bytes of s/a",
        ),
        (
            "write('old'); flush('old'); flush('.'); write('.k'); flush('.k'); rename('.k', 'kava.json'); os.remove(at('old'))",
            "old is removed, the name of kava.json",
        ),
    ],
)
def test_the_model_of_the_disk_sees_what_is_not_flushed(tmp_path: Path, code: str, fault: str) -> None:
    faults = _faults(tmp_path, code)
    assert any(fault in found for found in faults) if fault else faults == []


@needs_strace
def test_every_record_is_written_after_all_it_stands_for(tmp_path: Path, tiny_models: dict[str, Path]) -> None:
    """All file operations of a run with checkpoints, also those of Rust and C++, replayed on a strict model of the disk."""
    recipe = _recipe(tmp_path, tiny_models)
    ran = trace([sys.executable, "-m", "kava", "run", str(recipe)], tmp_path / "log", env=_environment())
    assert ran.returncode == 0, ran.stderr
    disk = Disk(tmp_path / "place/run", lambda path: False)
    disk.replay(tmp_path / "log")
    # What safetensors renames within a folder is not published before the record of that folder is.
    faults = [fault for fault in disk.faults if not fault.startswith("students/kv/") or "is published" not in fault]
    assert faults == []
    steps = [f"students/kv/checkpoints/checkpoint-{step}/kava.json" for step in (1, 2, 3, 4)]
    trained = "students/kv/kava.json"
    assert disk.records[1:] == ["projectors/big.json", trained, *steps, trained]
    assert disk.records[0].endswith("kava.json")


def _cut(recipe: Path, folder: Path, stages: dict[str, int]) -> dict[str, dict[str, int]]:
    words = [str(recipe), str(folder / "base.img"), str(folder / "place"), *(f"{s}:{n}" for s, n in stages.items())]
    # Mounts of its own, which end with it.
    command = ["unshare", "--mount", sys.executable, "-m", "fixtures.power_cut", *words]
    ran = subprocess.run(command, capture_output=True, text=True, env=_environment())
    assert ran.returncode == 0, ran.stderr[-3000:]
    told: dict[str, dict[str, int]] = json.loads(ran.stdout.splitlines()[-1])
    return told


@pytest.mark.slow
@needs_images
def test_a_few_power_cuts_while_the_student_is_made(tmp_path: Path, tiny_models: dict[str, Path]) -> None:
    told = _cut(_recipe(tmp_path, tiny_models), tmp_path, {"student": 3})
    assert told["student"]["cuts"] >= 2


@pytest.mark.slow
@needs_images
def test_fifty_power_cuts_under_each_stage(tmp_path: Path, tiny_models: dict[str, Path]) -> None:
    shape = {"layers": 4, "heads": 3, "kv_heads": 1, "head_dim": 24}
    second = save_model(tmp_path / "second", "llama", sentencepiece_tokenizer(420), seed=3, **shape)
    recipe = _recipe(
        tmp_path,
        tiny_models,
        teachers={
            "big": {"model": str(tiny_models["teacher"]), "dtype": "float32"},
            "small": {"model": str(second), "dtype": "float32"},
        },
        extract={"generate": {"max_new_tokens": 12, "chunk": 3, "teacher": "big"}},
        resample={"materialize": True},
        select={"tokens": 4, "method": "uniform"},
        fuse={"weights": "fixed"},
    )
    told = _cut(recipe, tmp_path, dict.fromkeys(STAGES, 50))
    assert list(told) == STAGES
    # Threads write in another order the second time, so a few of the last moments may not come.
    assert all(stage["cuts"] >= 0.8 * min(50, stage["operations"]) for stage in told.values()), told
