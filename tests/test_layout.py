"""The house: real folders behind the links, and imports that point one way."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
ROOMS = ("store", "extract", "pipeline", "train")

ALLOWED = {
    "errors": set(),
    "answers": set(),
    "store": {"errors"},
    "tap": {"errors", "store"},
    "notices": set(),
    "lfs": set(),
    "checkpoint": {"errors", "lfs", "notices"},
    "gguf_tokenizer": {"errors"},
    "gguf": {"errors", "store", "checkpoint", "gguf_tokenizer", "lfs"},
    "sources": {"errors", "notices", "store"},
    "tokenizer": {"errors", "notices", "store", "gguf", "lfs", "sources"},
    "hub": {"errors", "notices", "store", "tap", "checkpoint", "gguf", "sources", "tokenizer"},
    "progress": {"errors"},
    "decoding": set(),
    "terminal": set(),
    "extract": {"errors", "answers", "decoding", "lfs", "notices", "store", "tap", "hub"},
    "train": {"errors", "answers", "decoding", "notices", "store", "tap", "hub"},
    "pipeline": {"errors", "notices", "store", "tap", "hub", "progress", "terminal", "extract", "train"},
}


@pytest.mark.parametrize("room", ROOMS)
def test_rooms_are_links_to_the_real_folders(room: str) -> None:
    link = ROOT / "src" / "kava" / room
    assert link.is_symlink()
    assert link.resolve() == ROOT / room


def _files() -> list[tuple[str, Path]]:
    files = [(room, path) for room in ROOMS for path in sorted((ROOT / room).rglob("*.py"))]
    own = ROOT / "src" / "kava"
    return files + [(path.stem, path) for path in sorted(own.glob("*.py")) if path.stem in ALLOWED]


@pytest.mark.parametrize(("room", "path"), _files(), ids=lambda x: x.name if isinstance(x, Path) else x)
def test_imports_point_one_way(room: str, path: Path) -> None:
    depth = len(path.relative_to(ROOT).parts) - 1 if room in ROOMS else 0
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            assert not any(alias.name.split(".")[0] in {*ROOMS, "kava"} for alias in node.names), ast.unparse(node)
        if isinstance(node, ast.ImportFrom):
            module = node.module or ""
            assert node.level > 0 or module.split(".")[0] not in {*ROOMS, "kava"}, f"import relatively: {module}"
            if node.level == depth + 1 and module:
                assert module.split(".")[0] in ALLOWED[room], f"{path}: {room} must not import {module}"


def test_files_stay_small() -> None:
    long = {str(path): n for _, path in _files() if (n := len(path.read_text().splitlines())) > 450}
    assert not long


def test_rooms_are_not_importable_from_the_root() -> None:
    assert not set(ROOMS) & set(sys.modules)


def _imported(code: str) -> set[str]:
    """Names in sys.modules after the code, in a fresh interpreter."""
    code += "\nimport sys; print('\\n'.join(sys.modules))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd="/")
    return set(run.stdout.splitlines())


def test_training_never_imports_an_extraction_backend() -> None:
    code = "import kava.train; kava.train.train_student; kava.train.make_student; kava.train.KVLoss"
    names = _imported(code)
    assert "kava.train.trainer" in names
    assert not {n for n in names if n.startswith(("kava.extract", "kava.pipeline", "vllm"))}


def test_help_imports_no_heavy_library() -> None:
    names = _imported("import sys; sys.argv = ['kava', '--help']\nimport kava.pipeline.cli")
    assert "kava.pipeline.cli" in names
    assert not names & {"torch", "transformers", "zarr", "dask", "datasets"}


def test_store_reads_without_models() -> None:
    names = _imported("import kava.store")
    assert not {n for n in names if n.split(".")[0] in {"torch", "transformers", "tokenizers"}}
