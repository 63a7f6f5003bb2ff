"""`kava inspect --align`: a sample's two token rows against each other, coloured by what is read from what."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Final

import numpy as np
from rich.text import Text

from ...errors import StoreError, StoreNotFoundError
from ...store import KVSample, KVStore
from ...terminal import printable
from ..maps.resample import TimeMap, coverage, time_map

if TYPE_CHECKING:
    from rich.console import Console

    from ...extract import Record, Tokens
    from ..run import Run

_COLOURS: Final = ("cyan", "yellow", "green", "magenta", "blue", "bright_cyan", "bright_yellow", "bright_green")
_MARKS: Final = {" ": ("␣", "_"), "\n": ("⏎", "\\n"), "\t": ("⇥", "\\t")}
"""White space, as it is shown: on terminals that can print it, and on others."""
_LABELS: Final = ("teacher ", "student ")


def print_alignment(store: KVStore, index: int, run: Run | None, out: Console) -> None:
    """Prints the teacher's tokens above the student's, which have the colour of the teacher token they are read from.

    Raises:
        StoreError: if the store was not resampled, or the recipe or the teacher's capture is not at hand.
    """
    if run is None:
        raise StoreError(
            f"{store.path}: --align needs the corpus and the teacher's capture: name the recipe (--recipe)"
        )
    how = store.manifest.parameters.get("resample")
    if "fuse" in store.manifest.parameters:
        raise StoreError(
            f"{store.path} is fused from several teachers; --align shows the targets of one: "
            + ", ".join(store.manifest.parents)
        )
    if how is None:
        axis = "has slots, not tokens" if store.manifest.kind == "selected" else "is on the teacher's own tokens"
        raise StoreError(f"{store.path} {axis}; --align shows a resampled or a target store")
    target = store.sample(index, keys=False, values=False)
    record = run.corpus.find(target.sample_id)
    if record is None:
        raise StoreError(f"{store.path}: the recipe's corpus has no sample {target.sample_id!r}")
    source = _source(store, index, run, record)
    time = time_map(how["method"], source, target, across_segments=how["across_segments"])
    out.print(f"sample {index}, id {target.sample_id}, {how['method']}", markup=False)
    counts = coverage(time, source, target).sum(0).tolist()
    out.print(f"{counts[0]} text tokens, {counts[1]} with a target, {counts[2]} end with a token of the teacher")
    out.print()
    for rows in _lines(_groups(source, target, time, record.text.encode()), max(40, out.width) - len(_LABELS[0])):
        for label, row in zip(_LABELS, rows, strict=True):
            out.print(Text(label, style="dim").append_text(row))
        out.print()
    marks = {_mark(character): name for character, name in ((" ", "space"), ("\n", "line end"))}
    legend = ", ".join(f"{mark} {name}" for mark, name in marks.items())
    out.print(Text("struck out: no target", style="red strike") + Text(f"; {legend}", style="dim"))


def _source(store: KVStore, index: int, run: Run, record: Record) -> KVSample | Tokens:
    """The teacher's tokens: of the capture, or made again where that part was not kept."""
    wanted = store.manifest.parents.get("teacher")
    for name in run.recipe.teachers:
        try:
            found = KVStore.open(run.teacher_path(name))
        except StoreNotFoundError:
            continue
        if found.manifest.fingerprint == wanted:
            part = index // found.manifest.samples_per_part
            if part in found.committed_parts():
                return found.sample(index, keys=False, values=False)
            return run.teacher_encoder(name).encode(record)
    raise StoreError(f"{store.path}: the capture it was made from ({wanted}) is not among the teachers in {run.root}")


def _groups(source: KVSample | Tokens, target: KVSample, time: TimeMap, text: bytes) -> Iterator[tuple[Text, Text]]:
    """Shortest runs of whole tokens of either side with the same bytes, padded to one width."""
    heaviest: dict[int, tuple[float, int]] = {}
    for row, column, weight in zip(time.rows.tolist(), time.columns.tolist(), time.weights.tolist(), strict=True):
        heaviest[row] = max(heaviest.get(row, (0.0, -1)), (weight, column))
    sides: list[tuple[KVSample | Tokens, list[int]]] = [
        (s, np.flatnonzero(s.spans[:, 1] > s.spans[:, 0]).tolist()) for s in (source, target)
    ]
    ends = [set(s.spans[indices, 1].tolist()) for s, indices in sides]
    for stop in sorted(ends[0] & ends[1]):
        made = []
        for number, (sample, indices) in enumerate(sides):
            line = Text()
            while indices and sample.spans[indices[0], 1] <= stop:
                token = indices.pop(0)
                column = token if number == 0 else heaviest.get(token, (0.0, -1))[1]
                style = f"{_COLOURS[column % len(_COLOURS)]} reverse" if column >= 0 else "red strike"
                line.append(_shown(text[slice(*sample.spans[token].tolist())]), style).append("|", "dim")
            made.append(line)
        width = max(line.cell_len for line in made)
        for line in made:
            line.pad_right(width - line.cell_len)
        yield made[0], made[1]


def _lines(groups: Iterator[tuple[Text, Text]], width: int) -> Iterator[tuple[Text, Text]]:
    rows = (Text(), Text())
    for group in groups:
        if rows[0] and rows[0].cell_len + group[0].cell_len > width:
            yield rows
            rows = (Text(), Text())
        for row, piece in zip(rows, group, strict=True):
            row.append_text(piece)
    if rows[0]:
        yield rows


def _shown(piece: bytes) -> str:
    try:
        return printable("".join(map(_mark, piece.decode())))
    except UnicodeDecodeError:
        return f"<{piece.hex()}>"


def _mark(character: str) -> str:
    """White space as a visible character that the terminal can print."""
    mark, plain = _MARKS.get(character, (character, character))
    return mark if printable(mark) == mark else plain
