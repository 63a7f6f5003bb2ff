"""Depth: which teacher layers each student layer is compared with.

Two kinds of maps: those known from the two depths alone, in `PLANNED`, and those that are chosen on calibration samples
when the projector is fitted (`FITTED`, see `layer_fit.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final

from ...errors import AlignmentError

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


def last_aligned(num_source: int, num_target: int) -> LayerMap:
    """The last with the last, and so on backwards, one by one.

    A shallower student skips the teacher's first layers; the first layers of a deeper one all get the teacher's first.
    The default of Cache-to-Cache (Fu et al. 2025, https://arxiv.org/abs/2510.03215).
    """
    return [[max(num_source - num_target + i, 0)] for i in range(num_target)]


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


PLANNED: Final[dict[str, Callable[[int, int], LayerMap]]] = {"uniform": uniform, "last-aligned": last_aligned}
FITTED: Final = ("cka", "best")


def layer_map(layers: str | Sequence[int | Sequence[int]], num_source: int, num_target: int) -> LayerMap | None:
    """The map that the recipe names or lists; None where it is chosen when the projector is fitted."""
    if isinstance(layers, str):
        return None if layers in FITTED else PLANNED[layers](num_source, num_target)
    return explicit(layers, num_source, num_target)
