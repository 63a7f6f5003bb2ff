"""What `kava plan` and `kava run --dry-run` say: how geometries map onto each other, what it takes, the stages.

Nothing is made. A model or corpus that cannot be reached is named in one line, and what the recipe states is used
instead. The reasons why a recipe is broken are an error after the plan.
"""

from __future__ import annotations

from contextlib import suppress
from typing import Final

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from ...errors import KavaError
from ...store import KVGeometry
from ...store.dtypes import dtype_of
from ...store.manifest import default_page_tokens
from ..maps.layers import LayerMap, layer_map
from ..plan.plan import Plan
from ..plan.show import size_tables
from ..run import Run
from ..segments import segment_warnings
from ..stages import stages_of
from ..template_checks import template_warnings

QUICK: Final = 200
"""Samples whose tokens a dry run counts."""


def print_plan(plan: Plan, chosen: list[str], out: Console) -> None:
    """Prints a plan, and the state of the chosen stages."""
    run, recipe = plan.run, plan.run.recipe
    problems = list(plan.problems)
    geometry = Table(box=None, pad_edge=False, show_header=False)
    rows = [(f"teacher {name}", plan.geometries.get(name), t.model) for name, t in recipe.teachers.items()]
    for label, found, model in [*rows, ("student", plan.student, recipe.student.model)]:
        note = "as the recipe states" if found is not None and model in plan.unreached else "" if found else "not known"
        geometry.add_row(label, str(found or "?"), note)
    out.print(geometry)
    out.print()
    if plan.student is not None:
        for name, found in plan.geometries.items():
            with suppress(KavaError):  # One of the reasons why the recipe is broken.
                _print_maps(run, name, found, plan.student, out)
    if (fuse := recipe.fuse) is not None:
        reading = "" if fuse.materialize else ", while they are read"
        out.print(f"{fuse.name:<19} {' + '.join(recipe.fused_teachers)}, weights by {fuse.weights}{reading}\n")
    if plan.corpus is not None:
        with suppress(KavaError):  # Not written yet.
            problems += segment_warnings(run) + template_warnings(run)
        size = sum(plan.corpus.text_bytes)
        out.print(f"corpus              {len(plan.corpus)} samples, {size / 1e6:.1f} MB of text")
        for note in plan.corpus.notes:
            out.print(f"                    {note}", markup=False)
        out.print()
    wide = out if out.is_terminal else Console(file=out.file, width=400, highlight=False)
    for table in size_tables(plan):
        wide.print(table)
        out.print()
    stages = Table("stage", "state", "output", box=None, pad_edge=False)
    for stage in stages_of(run):
        if stage.name in chosen:
            state = stage.look().state
            if state == "blocked" and not stage.output.exists():  # What it needs is made before it.
                state = "missing"
            stages.add_row(stage.label, state, escape(str(stage.output)))
    wide.print(stages)
    out.print()
    if plan.unreached:
        names = ", ".join(dict.fromkeys(plan.unreached))
        out.print(f"The hub cannot be reached for {names}: planned with what the recipe states.", markup=False)
    for problem in problems:
        if any(reason in problem for reason in plan.broken):
            continue
        out.print(problem, markup=False, style="yellow")


def _print_maps(run: Run, name: str, teacher: KVGeometry, student: KVGeometry, out: Console) -> None:
    recipe = run.recipe
    layers = layer_map(recipe.project.layers, teacher.num_layers, student.num_layers)
    if layers is None:
        joined = recipe.project.top_k if recipe.project.layers == "best" else 1
        depth = f"{recipe.project.layers}, chosen on {recipe.project.calibration_samples} calibration samples"
    else:
        joined, depth = max(map(len, layers)), arrows(layers)
    most = "up to " if joined > 1 else ""
    width = f"{most}{joined * teacher.width} -> {student.width} numbers per layer, keys and values apart"
    out.print(f"{name} -> student")
    out.print(f"  time              {recipe.resample.method}, by UTF-8 bytes of the text")
    out.print(f"  layers            {depth}")
    apart = ", each head by itself" if recipe.project.per == "head" else ""
    out.print(f"  heads             {recipe.project.heads}{apart}: {width}")
    for label, geometry, settings in (
        ("teacher store", teacher, recipe.extract),
        ("targets", student, recipe.project),
    ):
        itemsize = dtype_of(settings.dtype).itemsize
        raw, page = geometry.bytes_per_token(itemsize), default_page_tokens(geometry, itemsize, settings.codec)
        out.print(
            f"  {label:<17} {raw:,} bytes per token ({settings.dtype}, raw), {settings.codec}, pages of {page} tokens"
        )
    if (top := recipe.extract.logits) is not None:
        out.print(f"  logits            the {top} likeliest next tokens, {8 * top + 4} bytes per token")
    if (select := recipe.select) is not None:
        kept, dtype = (
            (teacher, recipe.extract.dtype) if select.geometry == "teacher" else (student, recipe.project.dtype)
        )
        raw = select.tokens * kept.bytes_per_token(dtype_of(dtype).itemsize)
        out.print(
            f"  slots             {select.tokens} of the {select.segment} by {select.method}, {raw:,} bytes per sample"
        )
    out.print()


def arrows(layers: LayerMap) -> str:
    """Teacher layers of each student layer: `0->0 1+2->1`."""
    return " ".join(f"{'+'.join(map(str, sources))}->{target}" for target, sources in enumerate(layers))
