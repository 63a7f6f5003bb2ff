"""Depth: which teacher layers each student layer is compared with."""

from __future__ import annotations

from collections.abc import Sequence

from ..errors import AlignmentError

LayerMap = list[list[int]]
"""For each student layer its teacher layers; several are joined before the head map."""


def uniform(num_source: int, num_target: int) -> LayerMap:
    """Evenly spread, first to first and last to last: `round(i (L_t - 1) / (L_s - 1))`, halves up.

    A student of one layer gets the teacher's last.
    """
    if num_target == 1:
        return [[num_source - 1]]
    span, steps = num_source - 1, num_target - 1
    return [[(2 * i * span + steps) // (2 * steps)] for i in range(num_target)]


def explicit(layers: Sequence[int | Sequence[int]], num_source: int, num_target: int) -> LayerMap:
    """As the recipe lists them: one teacher layer, or several, for each student layer.

    Negative layers count from the end.

    Raises:
        AlignmentError: if the list has another length than the student, or names a layer that is not there.
    """
    if len(layers) != num_target:
        raise AlignmentError(f"project.layers lists {len(layers)} layers, the student has {num_target}")
    out: LayerMap = []
    for entry in layers:
        wanted = [entry] if isinstance(entry, int) else list(entry)
        if not wanted:
            raise AlignmentError("project.layers: an empty list of teacher layers")
        for layer in wanted:
            if not -num_source <= layer < num_source:
                raise AlignmentError(f"project.layers: teacher layer {layer} is not one of 0..{num_source - 1}")
        out.append([layer % num_source for layer in wanted])
    return out


def layer_map(layers: str | Sequence[int | Sequence[int]], num_source: int, num_target: int) -> LayerMap:
    """The map that the recipe names or lists."""
    if isinstance(layers, str):
        return uniform(num_source, num_target)
    return explicit(layers, num_source, num_target)
