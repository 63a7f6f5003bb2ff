"""Every test runs without a network, with its own cache folder, and leaves no hidden state behind."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from datetime import date
from pathlib import Path
from random import Random

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
# One thread here and in every process that a test starts: bits, and the provenance that parts state, depend on it.
os.environ.setdefault("OMP_NUM_THREADS", "1")


BEGUN = time.monotonic()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--budget",
        type=float,
        metavar="SECONDS",
        help="begin no test after this time, and say so; the files come in an order of the day, so that all have their turn",
    )


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--budget"):
        files = sorted({item.path for item in items})
        Random(date.today().toordinal()).shuffle(files)
        items.sort(key=lambda item: files.index(item.path))


def pytest_runtest_setup(item: pytest.Item) -> None:
    budget = item.config.getoption("--budget")
    if budget and time.monotonic() - BEGUN > budget:
        pytest.skip("no time left of --budget")


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    patch = pytest.MonkeyPatch()
    patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
    yield
    patch.undo()


@pytest.fixture(scope="session")
def tiny_models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders of a tiny random teacher and student, each with a tokenizer of its own."""
    from fixtures.models import save_model
    from fixtures.tokenizers import byte_level_tokenizer, sentencepiece_tokenizer

    root = tmp_path_factory.mktemp("models")
    teacher = save_model(
        root / "teacher", "qwen2", byte_level_tokenizer(400), layers=5, heads=6, kv_heads=2, head_dim=16
    )
    student = save_model(
        root / "student", "llama", sentencepiece_tokenizer(500), layers=3, heads=4, kv_heads=4, head_dim=8
    )
    return {"teacher": teacher, "student": student}
