"""What `kava run --dry-run` says: the stages, how geometries map onto each other, what a token costs.

Nothing is made. A model or corpus that cannot be reached is named in one line, and what the recipe states is used
instead.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, TypeVar

from rich.markup import escape
from rich.table import Table

from ...errors import HubUnreachableError, KavaError
from ...store import KVGeometry
from ...store.dtypes import dtype_of
from ...store.manifest import default_page_tokens
from ..maps.layers import LayerMap, layer_map
from ..misfits import refuse_misfits
from ..parts import BYTES_PER_TOKEN
from ..run import Run
from ..stages import stages_of

if TYPE_CHECKING:
    from rich.console import Console

T = TypeVar("T")


def print_plan(run: Run, chosen: list[str], out: Console) -> None:
    """Prints the plan of the chosen stages."""
    recipe = run.recipe
    problems: list[str] = []
    unreached: list[str] = []

    def reach(what: str, find: Callable[[], T], instead: T | None) -> tuple[T | None, str]:
        try:
            return find(), ""
        except KavaError as error:
            if isinstance(error, HubUnreachableError):
                unreached.append(error.name)
            else:
                problems.append(f"{what}: {error}")
            return instead, "as the recipe states" if instead is not None else "not known"

    geometry = Table(box=None, pad_edge=False, show_header=False)
    student, note = reach("student", run.planned_student_geometry, recipe.student.geometry)
    teachers: dict[str, KVGeometry] = {}
    for name, settings in recipe.teachers.items():
        found, remark = reach(name, lambda name=name: run.teacher_geometry(name), settings.geometry)  # type: ignore[misc]
        geometry.add_row(f"teacher {name}", str(found or "?"), remark)
        if found is not None:
            teachers[name] = found
    geometry.add_row("student", str(student or "?"), note)
    out.print(geometry)
    out.print()
    if student is not None:
        for name, found in teachers.items():
            _print_maps(run, name, found, student, out)
    if (fuse := recipe.fuse) is not None:
        reading = "" if fuse.materialize else ", while they are read"
        out.print(f"{fuse.name:<19} {' + '.join(recipe.fused_teachers)}, weights by {fuse.weights}{reading}\n")
    for name in teachers:
        reach(name, lambda name=name: refuse_misfits(run, name), None)  # type: ignore[misc]
    corpus, _ = reach("corpus", lambda: run.corpus, None)
    if corpus is not None:
        size = sum(len(r.text.encode()) for r in corpus.records)
        tokens = size / BYTES_PER_TOKEN
        out.print(
            f"corpus              {len(corpus)} samples, {size / 1e6:.1f} MB of text, {tokens:,.0f} tokens at most"
        )
        for name, found in teachers.items():
            raw = tokens * found.bytes_per_token(dtype_of(recipe.extract.dtype).itemsize)
            out.print(f"  store of {name:<9} at most about {_bytes(raw)} raw")
        out.print()
    table = Table("stage", "state", "output", box=None, pad_edge=False)
    for stage in stages_of(run):
        if stage.name in chosen:
            try:
                state = stage.status().state
            except KavaError:
                state = "blocked"
            if state == "blocked":
                state = "missing"
            table.add_row(stage.label, state, escape(str(stage.output)))
    out.print(table)
    out.print()
    if unreached:
        out.print(
            f"The hub cannot be reached for {', '.join(unreached)}: planned with what the recipe states.", markup=False
        )
    for problem in problems:
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


def _bytes(count: float) -> str:
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if count < 1000 or unit == "TB":
            break
        count /= 1000
    return f"{count:.1f} {unit}"
