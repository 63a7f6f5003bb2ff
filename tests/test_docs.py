"""Documents that tell the truth: pages made from the command, examples that parse, recipes, paths and messages that exist."""

from __future__ import annotations

import ast
import json
import re
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import pytest
import typer
import yaml
from fixtures.documents import DOCS, PAGES, ROOT, blocks, commands
from pydantic import BaseModel

from kava.pipeline.cli import app
from kava.pipeline.recipe import Recipe, load_recipe
from kava.train.settings import TrainSettings

ROOMS = ("store", "extract", "pipeline", "train")
GROUP: Any = typer.main.get_command(app)
PLAIN = {"cd", "export", "git", "mkdir", "rm", "scancel", "squeue", "tail", "tensorboard"}
"""Commands of other programs of which nothing can be wrong but what the reader sees."""
GEOMETRIES = {
    "Qwen/Qwen2-7B": (28, 4, 128),
    "Qwen/Qwen2.5-1.5B": (28, 2, 128),
    "mistralai/Mistral-7B-v0.3": (32, 8, 128),
    "TinyLlama/TinyLlama_v1.1": (22, 4, 64),
}
"""Layers, KV heads and head_dim, by the models' config.json."""


def test_command_pages_are_up_to_date() -> None:
    run = subprocess.run([sys.executable, "docs/make_cli.py", "--check"], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout


def _check_kava(words: list[str]) -> None:
    name, *rest = words
    context = GROUP.commands[name].make_context(name, rest)
    recipe = str(context.params.get("recipe") or "")
    assert not recipe.startswith("workflows/") or (ROOT / recipe).is_file()


def _check_make(words: list[str]) -> None:
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M)
    assert words[0] in targets


def _check_pip(words: list[str]) -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for named in re.findall(r"(?:kava|\.)\[([\w,-]+)\]", " ".join(words)):
        assert set(named.split(",")) <= set(extras)


def _check_paths(words: list[str]) -> None:
    paths = [word for word in words if word.startswith(("workflows/", "benchmarks/", "docs/", "tests/"))]
    assert paths, "names no file of the repository"
    for path in paths:
        assert (ROOT / path).exists(), path


CHECKS = {
    "kava": _check_kava,
    "make": _check_make,
    "pip": _check_pip,
    **dict.fromkeys(("bash", "python", "pytest", "sbatch", "snakemake"), _check_paths),
}


@pytest.mark.parametrize("line", sorted({line for page in PAGES for line in commands(page)}))
def test_every_command_in_the_documents_parses(line: str) -> None:
    program, *words = [w for w in shlex.split(line) if not re.fullmatch(r"[A-Z_]+=\S*", w) or line.startswith("make")]
    if program not in PLAIN:
        CHECKS[program](words)


def test_the_documents_have_examples_of_every_command() -> None:
    told = {line.split()[1] for page in PAGES for line in commands(page) if line.startswith("kava ")}
    assert told == set(GROUP.commands)


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_options_named_in_the_text_exist(page: Path) -> None:
    for code in re.findall(r"`kava ([^`\n]+)`", page.read_text()):
        name, *words = code.split()
        if not name.isalpha() or not name.islower():  # `kava -v COMMAND`, `kava NAME`
            continue
        options = {option for parameter in GROUP.commands[name].params for option in parameter.opts}
        assert {word for word in words if word.startswith("-")} <= options, code


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_links_lead_somewhere(page: Path) -> None:
    made = {DOCS / "notebooks" / f"{path.stem}.md" for path in (DOCS / "notebooks").glob("*.ipynb")}
    for target in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
        if not target.startswith("http"):
            path = (page.parent / target).resolve()
            assert path.exists() or path in made, target
            assert page.parent == ROOT or path.is_relative_to(DOCS), f"{target} is not on the site"


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_examples_in_python_know_their_names(page: Path) -> None:
    code = "\n".join(blocks(page, "python"))
    ruff = [sys.executable, "-m", "ruff", "check", "--isolated", "--quiet", "--select", "F821,F401,E9", "-"]
    run = subprocess.run(ruff, input=code, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout


def _keys(kind: Any) -> set[str]:
    """Every key of a section and of what lies below it; empty for what is none."""
    if isinstance(kind, type) and issubclass(kind, BaseModel):
        return {*kind.model_fields}.union(*(_keys(field.annotation) for field in kind.model_fields.values()))
    return set().union(*map(_keys, get_args(kind)))


def test_the_recipes_page_has_every_key() -> None:
    page = re.sub(r"^```.*?^```", "", (DOCS / "recipe.md").read_text(), flags=re.M | re.S)
    first, *sections = re.split(r"^## ", page, flags=re.M)
    text = {section.splitlines()[0]: section for section in sections}
    text["teachers"] += text["extract"]  # It has the engine.
    for name, field in Recipe.model_fields.items():
        keys = _keys(field.annotation)
        named = set(re.findall(r"\w+", " ".join(re.findall(r"`[^`]+`", text[name] if keys else first))))
        assert not (missing := (keys or {name}) - named), f"{name}: {missing} are not in docs/recipe.md"


def test_the_recipes_page_has_the_defaults_of_a_training() -> None:
    text, found = (DOCS / "recipe.md").read_text().partition("\n## train\n")[2].partition("\n## compare\n")[0], 0
    for key, field in TrainSettings.model_fields.items():
        for stated in re.findall(rf"^\| `{key}` \| `?([\w.-]+)`? \|", text, re.M):
            default: Any = field.default
            assert (type(default)(yaml.safe_load(stated)) if default is not None else None) == default, key
            assert default is not None or stated == "none", key
            found += 1
    assert found > 15


def test_every_page_is_on_the_site() -> None:
    def named(value: Any) -> Iterator[str]:
        if isinstance(value, str):
            yield value
        for item in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
            yield from named(item)

    told = set(named(yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"]))
    pages = {str(path.relative_to(DOCS)) for path in DOCS.rglob("*.md") if path.parent.name != "cli"}
    pages |= {f"notebooks/{path.stem}.md" for path in DOCS.rglob("*.ipynb")}
    assert told == pages


def _messages() -> Iterator[str]:
    """Every text in the rooms, with `…` for what is filled in."""
    for path in [p for room in ROOMS for p in (ROOT / room).rglob("*.py")] + list((ROOT / "src/kava").glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.JoinedStr):
                yield "".join(str(p.value) if isinstance(p, ast.Constant) else "…" for p in node.values)
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                yield node.value


def test_messages_in_troubleshooting_are_those_of_the_code() -> None:
    rows = re.findall(r"^\| `([^`]+)` \|", (DOCS / "troubleshooting.md").read_text(), re.M)
    known = "\n".join(_messages())
    assert len(rows) > 40
    assert [row for row in rows if row not in known] == []


def test_notebooks_have_no_outputs() -> None:
    for path in (DOCS / "notebooks").glob("*.ipynb"):
        for cell in json.loads(path.read_text())["cells"]:
            assert cell["cell_type"] != "code" or (cell["outputs"] == [] and cell["execution_count"] is None), path


@pytest.mark.parametrize("path", sorted((ROOT / "workflows").glob("*.yaml")), ids=lambda p: p.name)
def test_recipes_load_and_state_what_models_have(path: Path) -> None:
    recipe = load_recipe(path)
    for model, stated in [(t.model, t.geometry) for t in recipe.teachers.values()] + [
        (recipe.student.model, recipe.student.geometry)
    ]:
        if model in GEOMETRIES:
            assert stated is not None
            assert (stated.num_layers, *stated.shape[1:]) == GEOMETRIES[model]
        else:
            assert model is None or model.startswith("package:"), f"{model}: add its geometry here"
    if recipe.corpus.path == "openai/gsm8k":
        assert recipe.corpus.fields.content == {}  # Recognised, and split into rationale and answer.


def test_the_readmes_tree_is_the_tree() -> None:
    readme = (ROOT / "README.md").read_text()
    for room in ROOMS:
        for path in (ROOT / room).glob("*.py"):
            assert path.name == "__init__.py" or path.name in readme, f"{room}/{path.name} is not in the README's tree"
