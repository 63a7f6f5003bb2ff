"""Documents that tell the truth: pages made from the command, examples that parse, recipes and paths that exist."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import typer

from kava.pipeline.cli import app

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def test_command_pages_are_up_to_date() -> None:
    run = subprocess.run([sys.executable, "docs/make_cli.py", "--check"], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout


def _commands() -> list[str]:
    blocks = [block for page in PAGES for block in re.findall(r"```bash\n(.*?)```", page.read_text(), re.S)]
    lines = {line.split("#")[0].strip() for block in blocks for line in block.splitlines()}
    return sorted(line for line in lines if line.startswith("kava "))


@pytest.mark.parametrize("line", _commands())
def test_every_command_in_the_documents_parses(line: str) -> None:
    group: Any = typer.main.get_command(app)
    name, *words = shlex.split(line)[1:]
    context = group.commands[name].make_context(name, words)
    recipe = str(context.params.get("recipe") or "")
    assert not recipe.startswith("workflows/") or (ROOT / recipe).is_file()


def test_the_documents_have_examples() -> None:
    assert {line.split()[1] for line in _commands()} >= {
        "init",
        "run",
        "extract",
        "project",
        "train",
        "status",
        "verify",
    }


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
        if not target.startswith("http"):
            assert (page.parent / target).exists(), target


def test_the_readmes_tree_is_the_tree() -> None:
    readme = (ROOT / "README.md").read_text()
    for room in ("store", "extract", "pipeline", "train"):
        for path in (ROOT / room).glob("*.py"):
            assert path.name == "__init__.py" or path.name in readme, f"{room}/{path.name} is not in the README's tree"
