"""Pictures of a run: held-out curves of arms, what is left between student and targets by layer, sizes of stages."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from io import BytesIO
from typing import TYPE_CHECKING, Any, Final

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

BASELINE: Final = "#555555"
ARMS: Final = ("#1f6fb4", "#c02942", "#2a7d4f", "#d9700f", "#7b4fa3", "#8c6d31", "#17a2b8", "#e377c2")
"""Colours of the other arms, in their order."""


def colours_of(arms: Sequence[str], baseline: str | None) -> dict[str, str]:
    """A colour for each arm: grey for the baseline, and the same ones in every picture."""
    others = [arm for arm in arms if arm != baseline]
    found = {arm: ARMS[number % len(ARMS)] for number, arm in enumerate(others)}
    return {arm: BASELINE if arm == baseline else found[arm] for arm in arms}


def draw_curves(curves: Mapping[str, Sequence[Mapping[str, Any]]], baseline: str | None) -> bytes:
    """An SVG: held-out cross-entropy over steps, a line for each arm and a band of its 95 % over seeds.

    A dashed line is where the baseline ends; a mark on it, where each arm's mean has come there.

    Args:
        curves: of each arm, entries with `step`, `ce` and `interval`, which may be None.
        baseline: one of the arms, or None.
    """
    figure, axes = _figure((8.5, 4.6))
    level = curves[baseline][-1]["ce"] if baseline is not None and curves.get(baseline) else None
    for arm, colour in colours_of(list(curves), baseline).items():
        points = curves[arm]
        steps, means = [p["step"] for p in points], [p["ce"] for p in points]
        if points and all(p["interval"] is not None for p in points):
            low, high = zip(*(p["interval"] for p in points), strict=True)
            axes.fill_between(steps, low, high, color=colour, alpha=0.15, linewidth=0)
        axes.plot(steps, means, color=colour, linewidth=1.8, marker="o", markersize=3.5, label=arm)
        if level is not None and arm != baseline:
            reached = next((step for step, mean in zip(steps, means, strict=True) if mean <= level), None)
            if reached is not None:
                axes.plot([reached], [level], "D", color=colour, markeredgecolor="white", markersize=8, zorder=5)
                axes.annotate(
                    str(reached),
                    (reached, level),
                    xytext=(0, -16),
                    textcoords="offset points",
                    ha="center",
                    color=colour,
                )
    if level is not None:
        axes.axhline(level, color=BASELINE, linestyle="--", linewidth=1)
    axes.set(xlabel="step", ylabel="held-out CE, nats per token")
    axes.set_xlim(left=0)
    _light(axes)
    axes.legend(frameon=False)
    return _svg(figure)


def draw_errors(errors: Mapping[str, Mapping[str, Sequence[float]]], label: str) -> bytes:
    """An SVG: KV error as two heat maps, keys and values; layers upwards, `errors` to the right.

    Args:
        errors: by arm or by step, `keys` and `values` of each layer, over the target's variance.
        label: what is to the right.
    """
    columns = list(errors)
    layers = len(next(iter(errors.values()))["keys"])
    figure, pair = _figure((max(6.0, 2.6 + 1.1 * len(columns)), max(2.6, 1.6 + 0.32 * layers)), 2)
    top = max(max(found[name]) for found in errors.values() for name in ("keys", "values"))
    shown = None
    for axes, name in zip(pair, ("keys", "values"), strict=True):
        grid = np.asarray([errors[column][name] for column in columns]).T
        shown = axes.imshow(grid, origin="lower", aspect="auto", cmap="Blues", vmin=0, vmax=max(top, 1e-9))
        axes.set(title=name, xlabel=label)
        axes.set_xticks(range(len(columns)), columns, rotation=0 if len(columns) <= 4 else 60)
        axes.set_yticks(range(layers) if layers <= 12 else range(0, layers, 4))
        if grid.size <= 160:
            for (layer, column), value in np.ndenumerate(grid):
                axes.text(
                    column,
                    layer,
                    f"{value:.2f}",
                    ha="center",
                    va="center",
                    fontsize=8,
                    color="white" if value > 0.6 * top else "0.15",
                )
    pair[0].set_ylabel("student layer")
    assert shown is not None
    bar = figure.colorbar(shown, ax=list(pair), fraction=0.04, pad=0.02)
    bar.set_label("squared error / target's variance")
    return _svg(figure)


def draw_sizes(rows: Sequence[tuple[str, int]]) -> bytes:
    """An SVG: bytes on disk of each stage's output, on a logarithmic scale, with the number beside each bar.

    Args:
        rows: label and bytes, the first one on top.
    """
    figure, axes = _figure((8.5, 0.9 + 0.34 * len(rows)))
    labels, sizes = [label for label, _ in rows], [max(size, 1) for _, size in rows]
    axes.barh(range(len(rows)), sizes, color="#9db8d2", height=0.62)
    for place, size in enumerate(sizes):
        axes.text(size * 1.15, place, size_text(size), va="center", fontsize=9)
    axes.set_yticks(range(len(rows)), labels)
    axes.invert_yaxis()
    axes.set_xscale("log")
    axes.set_xlim(min(sizes) / 2, max(sizes) * 12)
    axes.set_xlabel("bytes on disk")
    _light(axes)
    axes.grid(visible=False, axis="y")
    return _svg(figure)


def size_text(count: int) -> str:
    """A number of bytes, for people."""
    size = float(count)
    for unit in ("B", "kB", "MB", "GB"):
        if size < 999.5:
            return f"{size:.0f} {unit}" if unit == "B" or size >= 99.5 else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} TB"


def _figure(size: tuple[float, float], columns: int = 1) -> tuple[Figure, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained")
    return figure, figure.subplots(1, columns)


def _light(axes: Axes) -> None:
    axes.grid(color="0.92")
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def _svg(figure: Figure) -> bytes:
    """Letters are drawn as outlines, so that no font is asked for; equal numbers give equal bytes."""
    import matplotlib as mpl

    out = BytesIO()
    with mpl.rc_context({"svg.fonttype": "path", "svg.hashsalt": "kava"}):
        figure.savefig(out, format="svg", metadata={"Date": None, "Creator": None})
    return out.getvalue()
