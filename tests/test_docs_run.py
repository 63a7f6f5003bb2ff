"""The documents' commands and Python, executed: in a folder of their own, with tiny models under the demo's names."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from pathlib import Path

import nbformat
import pytest
import yaml
from fixtures.command import kava, write_recipe
from fixtures.documents import DOCS, blocks, commands

from kava.pipeline.maps.heads import HEAD_MAPS
from kava.store import KVStore
from kava.tap import ATTENTION_LAYOUTS


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, tiny_models: dict[str, Path]) -> Iterator[Path]:
    """`recipe.yaml` and `workflows/demo.yaml`: two teachers, slots and fused targets, all of it tiny."""
    root = tmp_path_factory.mktemp("documents")
    teachers = {
        name: {"model": str(tiny_models[model]), "dtype": "float32"}
        for name, model in (("smollm2", "teacher"), ("other", "student"))
    }
    recipe = write_recipe(
        root,
        tiny_models,
        run_dir="runs/demo",
        extract={"importance": True, "confidence": True},
        select={"tokens": 4},
        fuse={"weights": "confidence"},
        compare={"arms": {"none": {}, "kv": {"alpha": 1}}, "seeds": [0]},
    )
    whole = yaml.safe_load(recipe.read_text()) | {"teachers": teachers}
    (root / "workflows").mkdir()
    (root / "workflows/demo.yaml").write_text(yaml.safe_dump(whole))
    recipe.write_text(yaml.safe_dump(whole | {"run_dir": "runs/first"}))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        yield root


def _run(page: Path, folder: Path) -> list[str]:
    """Runs the page's kava commands in order, but for those that need another machine; what each printed."""
    printed = []
    kept = (folder / "recipe.yaml").read_text()
    for line in commands(page):
        words = shlex.split(line.replace("/archive/", f"{folder}/archive-{page.stem}-"))
        if words[0] != "kava" or "tcp://" in line:
            continue
        if words[1] == "init":
            (folder / words[2]).unlink()
        printed.append(kava(*words[1:]))
        if words[1] == "init":  # The first recipe names a real teacher.
            (folder / words[2]).write_text(kept)
    return printed


@pytest.mark.slow
def test_the_tutorials_commands_run(folder: Path) -> None:
    assert _run(DOCS / "tutorial.md", folder)


def test_adding_a_projector() -> None:
    before, names = dict(HEAD_MAPS), dict[str, object]()
    for block in blocks(DOCS / "howto/projector.md", "python"):
        exec(compile(block, "projector.md", "exec"), names)
    assert HEAD_MAPS.pop("widest")
    assert before == HEAD_MAPS
    projector = names["projector"]
    assert projector.weights["keys"][0].sum(0).tolist() == [1] * 16  # type: ignore[attr-defined]


def test_adding_an_architecture() -> None:
    before, names = dict(ATTENTION_LAYOUTS), dict[str, object]()
    for block in blocks(DOCS / "howto/architecture.md", "python"):
        exec(compile(block, "architecture.md", "exec"), names)
    assert ATTENTION_LAYOUTS.pop("qwen3").keys == before["qwen3"].keys
    ATTENTION_LAYOUTS["qwen3"] = before["qwen3"]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_the_notebook_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from fixtures.stores import write_store
    from nbclient import NotebookClient

    store, _ = write_store(tmp_path / "s.zarr", [5, 70, 3, 9], samples_per_part=2)
    monkeypatch.setenv("KAVA_STORE", str(store.path))
    notebook = nbformat.read(DOCS / "notebooks/inspect_store.ipynb", as_version=4)
    NotebookClient(notebook, timeout=120, kernel_name="python3").execute()
    made = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    pictures = [output for output in made if "image/png" in output.get("data", {})]
    assert len(pictures) == 3
    assert made[-1].data["text/plain"] == repr(KVStore.open(store.path).verify())
