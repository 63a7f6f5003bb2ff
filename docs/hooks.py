"""What the site makes while it is built: the list of commands, and a page of each notebook beside the notebook."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

COMMANDS = Path(__file__).parent / "cli"
NOTEBOOKS = Path(__file__).parent / "notebooks"


def notebook_page(path: Path) -> str:
    """A notebook as Markdown: its text, and its code in blocks. Outputs are not in git, so there are none."""
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    blocks = ["".join(c["source"]) if c["cell_type"] == "markdown" else _code(c) for c in cells]
    return "\n\n".join([*blocks, f"[Download the notebook]({path.name})."]) + "\n"


def _code(cell: dict[str, Any]) -> str:
    return "```python\n" + "".join(cell["source"]) + "\n```"


def on_config(config: Any) -> Any:
    """Fills the list of commands: one page each, which make_cli.py has written."""
    for entry in config.nav:
        if isinstance(entry, dict) and "Commands" in entry:
            entry["Commands"] = [f"cli/{path.name}" for path in sorted(COMMANDS.glob("*.md"))]
    return config


def on_files(files: Any, *, config: Any) -> Any:
    """Adds a page for each notebook."""
    from mkdocs.structure.files import File

    for path in sorted(NOTEBOOKS.glob("*.ipynb")):
        name = f"notebooks/{path.stem}.md"
        files.append(File.generated(config, name, content=notebook_page(path)))
    return files
