"""`kava compare`: a comparison as rows of text, for a terminal or a page."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.markup import escape
from rich.table import Table

Rows = tuple[list[str], list[list[str]]]
"""Names of columns, and rows."""


def arm_rows(summary: dict[str, Any]) -> Rows:
    """A row for each arm: held-out metrics, their 95 %, and the steps to the baseline's final cross-entropy."""
    steps = max(run["steps"] for arm in summary["arms"].values() for run in arm["runs"])
    title = f"steps of {steps} to reach {summary['baseline']}"
    columns = ["arm", "seeds", "held-out CE", "95 % over seeds", "95 % over samples", "per byte", "KV error", title]
    rows = []
    for name, arm in summary["arms"].items():
        metrics = arm["metrics"]
        rows.append(
            [
                name,
                str(len(arm["runs"])),
                f"{metrics['ce']['mean']:.4f}",
                interval(metrics["ce"]["interval"]),
                interval(arm["ce_interval_samples"]),
                f"{metrics['ce_per_byte']['mean']:.4f}",
                f"{metrics['kv_error']['mean']:.3f}" if "kv_error" in metrics else "-",
                "-" if name == summary["baseline"] else reached(list(arm["steps_to_baseline"].values()), steps),
            ]
        )
    return columns, rows


def difference_rows(summary: dict[str, Any], against: Sequence[str]) -> Rows:
    """A row for each arm against each of `against`: the difference in held-out cross-entropy, and how sure it is."""
    columns = ["arm", "against", "CE difference", "95 % over samples", "95 % over seeds", "lower on", "sign test p"]
    return columns, [
        [
            pair["arm"],
            pair["against"],
            f"{pair['ce']:+.4f}",
            interval(pair["interval_samples"], signed=True),
            interval(pair["interval_seeds"], signed=True),
            f"{pair['lower']} of {pair['lower'] + pair['higher']}",
            f"{pair['p']:.2g}",
        ]
        for pair in summary["differences"]
        if pair["against"] in against
    ]


def compared_with(summary: dict[str, Any]) -> list[str]:
    """Whom differences are shown from: the baseline, and the arms whose targets are not those of the text."""
    controls = [name for name, arm in summary["arms"].items() if arm["targets"] != "true"]
    return list(dict.fromkeys([summary["baseline"], *controls]))


def as_table(rows: Rows) -> Table:
    """For a terminal."""
    table = Table(*rows[0], box=None, pad_edge=False)
    for row in rows[1]:
        table.add_row(*map(escape, row))
    return table


def interval(found: Sequence[float] | None, *, signed: bool = False) -> str:
    """Its ends; a dash where there is none."""
    if found is None:
        return "-"
    return "{:+.4f} .. {:+.4f}".format(*found) if signed else "{:.4f} .. {:.4f}".format(*found)


def reached(steps: Sequence[int | None], of: int) -> str:
    """The steps of each seed, and their mean as a share; `never` where a seed did not come there."""
    if not steps:
        return "-"
    each = " ".join("never" if step is None else str(step) for step in steps)
    known = [step for step in steps if step is not None]
    return f"{each} ({sum(known) / len(known) / of:.2f})" if len(known) == len(steps) else each
