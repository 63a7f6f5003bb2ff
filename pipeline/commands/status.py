"""`kava status`: every output of a recipe, once or again and again."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, Final

from rich.console import Group
from rich.live import Live
from rich.markup import escape
from rich.table import Table

from ..leftovers import leftovers
from ..run import Run
from ..stages import result_line, stages_of, trained_students

if TYPE_CHECKING:
    from rich.console import Console

_COLOURS: Final = {"complete": "green", "partial": "yellow", "stale": "yellow", "damaged": "red"}
_ON_A_TERMINAL: Final = 5.0
_IN_A_FILE: Final = 60.0


def survey(run: Run) -> dict[str, Any]:
    """The state of every output: what `kava status --json` prints; docs/cluster.md has its keys.

    Files above 64 MiB are compared with their records by size alone: a look is not to read gigabytes.
    """
    run.quick = True
    rows = []
    for stage in stages_of(run):
        found = stage.look()
        named = {"stage": stage.label, "name": stage.name, "teacher": stage.teacher, "output": str(stage.output)}
        rows.append(named | asdict(found))
    complete = all(row["state"] == "complete" for row in rows)
    left = [{"path": str(x.path), "bytes": x.size, "kind": x.kind, "use": x.use} for x in leftovers(run)]
    return {
        "run_dir": str(run.root),
        "complete": complete,
        "stages": rows,
        "students": trained_students(run),
        "leftovers": left,
    }


def tables(found: dict[str, Any]) -> list[Table]:
    """The same for people: the stages, and the students if there are any."""
    table = Table("stage", "state", "detail", "output", box=None, pad_edge=False)
    for row in found["stages"]:
        colour = _COLOURS.get(row["state"], "dim")
        table.add_row(row["stage"], f"[{colour}]{row['state']}[/]", escape(row["detail"]), escape(row["output"]))
    tables = [table, *_leftovers_table(found["leftovers"])]
    if not found["students"]:
        return tables
    students = Table("student", "alpha", "result", "folder", box=None, pad_edge=False)
    for record in found["students"]:
        students.add_row(record["name"], f"{record['alpha']:g}", result_line(record), escape(record["path"]))
    return [*tables, students]


def _leftovers_table(rows: list[dict[str, Any]]) -> list[Table]:
    """Name what killed processes left behind; no table if there is nothing."""
    if not rows:
        return []
    table = Table("left behind", "size", "what it is", "state", box=None, pad_edge=False)
    for row in rows:
        table.add_row(escape(row["path"]), f"{row['bytes'] / 1e6:.1f} MB", escape(row["kind"]), row["use"])
    return [table]


def watch_run(look: Callable[[], dict[str, Any]], out: Console, every: float | None) -> None:
    """Shows the state until all is complete: in place on a terminal, else a line at a time.

    Args:
        look: see `survey`.
        out: where to.
        every: seconds between two looks.
    """
    found = look()
    if not out.is_terminal:
        out.print(line(found), markup=False)
        while not found["complete"]:
            time.sleep(_IN_A_FILE if every is None else every)
            found = look()
            out.print(line(found), markup=False)
        return
    with Live(Group(*tables(found)), console=out, auto_refresh=False) as live:
        while not found["complete"]:
            time.sleep(_ON_A_TERMINAL if every is None else every)
            found = look()
            live.update(Group(*tables(found)), refresh=True)


def line(found: dict[str, Any]) -> str:
    """One plain line: `12:30:05 3 complete, 1 partial, 2 missing; extract big: 3 of 8 parts`."""
    count = Counter(row["state"] for row in found["stages"])
    told = ", ".join(f"{number} {state}" for state, number in count.items())
    under_way = [
        f"{r['stage']}: {r['detail']}" for r in found["stages"] if r["state"] not in ("complete", "missing", "blocked")
    ]
    return "; ".join([f"{time.strftime('%H:%M:%S')} {told}", *under_way])
