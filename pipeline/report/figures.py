"""The picture of a projection report. Matplotlib is imported here and in `curves`, nowhere else."""

from __future__ import annotations

from io import BytesIO
from textwrap import fill
from typing import TYPE_CHECKING, Any, Final

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from .projection import ProjectionReport

KEYS: Final = "#1f6fb4"
VALUES: Final = "#d9700f"
FLOOR: Final = -1.2
"""R² below this is shown as an arrow at the lower edge: how bad a bad map is would flatten all others. Unrelated
targets of the student's own variance are at -1."""


def draw_report(report: ProjectionReport) -> bytes:
    """A PNG: the layer map over the layers' similarity, held-out R², explained variance and attention cosine.

    The layer map alone where nothing is measured yet.
    """
    from matplotlib.figure import Figure

    settings = report.settings
    title = f"{report.teacher}: {report.source}  to  {report.target}\n"
    title += f"heads {settings['heads']}, per {settings['per']}, scale {settings['scale']}"
    if "layers_by" in settings:
        title += f", layers by {settings['layers_by']['method']}"
    if not report.measured:
        figure = Figure(figsize=(6, 5.5), dpi=120, layout="constrained")
        _layers(figure.subplots(), report)
    else:
        counts = report.measured["calibration"]
        title += "; {fit} samples fitted, {heldout} held out".format(**counts["samples"])
        figure = Figure(figsize=(12, 9), dpi=120, layout="constrained")
        (first, second), (third, fourth) = figure.subplots(2, 2)
        _layers(first, report)
        rows = report.rows()
        _curves(second, rows, "Held-out R² for the student's own", "r2", "r2_naive")
        _curves(third, rows, "Share of the teacher's variance that is kept", "explained_variance", None)
        _attention(fourth, report)
    figure.suptitle(title, fontsize=11)
    out = BytesIO()
    figure.savefig(out, format="png", metadata={"Software": None})
    return out.getvalue()


def _layers(axes: Axes, report: ProjectionReport) -> None:
    """Student layers to the right, teacher layers upwards; a dot where they are joined, over their CKA."""
    cka = report.measured.get("cka")
    size = (len(report.layers), report.num_teacher_layers)
    if cka is not None:
        shown = axes.imshow(cka, origin="lower", aspect="auto", cmap="Blues", vmin=0)
        bar = axes.figure.colorbar(shown, ax=axes, fraction=0.046, pad=0.02)
        bar.set_label("linear CKA, mean of K and V")
    else:
        axes.set(xlim=(-0.5, size[0] - 0.5), ylim=(-0.5, size[1] - 0.5))
        axes.grid(color="0.9")
        axes.set_axisbelow(True)
    points = [(target, layer) for target, sources in enumerate(report.layers) for layer in sources]
    if len(points) == size[0]:
        axes.plot(*zip(*points, strict=True), color="#c02942", linewidth=1, alpha=0.5)
    axes.plot(*zip(*points, strict=True), "o", color="#c02942", markeredgecolor="white", markersize=7)
    axes.set(title="Layer map", xlabel="student layer", ylabel="teacher layer")
    _whole_numbers(axes)
    from matplotlib.ticker import MaxNLocator

    axes.yaxis.set_major_locator(MaxNLocator(integer=True))


def _curves(axes: Axes, rows: list[dict[str, Any]], title: str, fitted: str, naive: str | None) -> None:
    for name, colour in (("keys", KEYS), ("values", VALUES)):
        for key, style, label in ((fitted, "-", name), (naive, "--", f"{name}, naive map")):
            if key is not None:
                _line(axes, [row[f"{name}_{key}"] for row in rows], colour, style, label)
    _finish(axes, title)


def _attention(axes: Axes, report: ProjectionReport) -> None:
    title = "Cosine of attention outputs with the student's own"
    if "problem" in report.attention:
        axes.set_title(title)
        axes.text(0.5, 0.5, fill(report.attention["problem"], 55), ha="center", va="center", transform=axes.transAxes)
        axes.set_axis_off()
        return
    _line(axes, report.attention["fitted"], "#2a7d4f", "-", "this projector")
    _line(axes, report.attention["naive"], "#2a7d4f", "--", "naive map")
    _finish(axes, title)


def _line(axes: Axes, found: list[float | None], colour: str, style: str, label: str) -> None:
    known = [(layer, value) for layer, value in enumerate(found) if value is not None]
    if not known:
        return
    layers, values = zip(*known, strict=True)
    marker = "o" if style == "-" else "s"
    axes.plot(
        layers,
        values,
        style,
        color=colour,
        label=f"{label} (mean {sum(values) / len(values):.2f})",
        marker=marker,
        markersize=4,
        linewidth=1.6,
    )
    below = [layer for layer, value in known if value < FLOOR]
    if below:
        aside = 0.06 if colour == VALUES else -0.06  # Keys and values are often both below.
        axes.plot([layer + aside for layer in below], [FLOOR] * len(below), "v", color=colour, markersize=7)


def _finish(axes: Axes, title: str) -> None:
    axes.set(title=title, xlabel="student layer")
    _whole_numbers(axes)
    axes.grid(color="0.92")
    axes.set_axisbelow(True)
    heights = [float(y) for line in axes.get_lines() for y in np.asarray(line.get_ydata(), dtype=float)]
    if not heights:
        axes.text(0.5, 0.5, "nothing is held out", ha="center", va="center", transform=axes.transAxes)
        return
    low = min(*heights, 0.0)
    axes.set_ylim(max(low, FLOOR) - 0.05, 1.05)
    if low < 0:
        axes.axhline(0, color="0.4", linewidth=0.8)
    axes.legend(frameon=False, fontsize=9)


def _whole_numbers(axes: Axes) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
