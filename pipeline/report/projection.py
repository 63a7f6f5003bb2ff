"""`kava project --report`: how good a projector is, before any target is written.

One more pass over the calibration measures the projector, the plainest map beside it, and the similarity of every
teacher layer with every student layer; the student then reads a few held-out samples with targets in the place of its
own keys and values. Everything is in `projectors/NAME.report.json`, and drawn in `projectors/NAME.png`.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from itertools import islice
from typing import TYPE_CHECKING, Any, Final

from rich.table import Table

from ...errors import StoreNotFoundError, UnsupportedModelError
from ...hub import load_model
from ...store import KVStore
from ...store.files import write_atomic
from ..capture_stages import ReferenceStage
from ..maps.diagnostics import in_own_scale, measure, naive_projector
from ..maps.layers import LayerMap
from ..maps.moments import NAMES, Calibration, Wanted, is_held_out
from ..maps.projector import Projector
from ..project_stage import ProjectStage
from ..run import Run
from ..stage import Stage
from ..stages import stages_of
from ..transform import CalibrationSample, calibration_pairs, calibration_samples

if TYPE_CHECKING:
    from pathlib import Path

ATTENTION_SAMPLES: Final = 8
"""Held-out calibration samples that the student reads."""


@dataclass(frozen=True)
class ProjectionReport:
    """What is known of one teacher's projector."""

    teacher: str
    source: str
    """The teacher's geometry."""
    target: str
    """The student's geometry."""
    num_teacher_layers: int
    layers: LayerMap
    settings: dict[str, Any]
    """How it is made: `heads`, `per`, `scale`, and what the fit chose."""
    made_for: str = ""
    """The fingerprint of the targets that it makes."""
    is_saved: bool = False
    """Whether it is the one in `projectors/`; not if there are targets that another one made."""
    parameters: dict[str, Any] = field(default_factory=dict)
    """Of those targets: layer rule, resampling, calibration, seed."""
    measured: dict[str, Any] = field(default_factory=dict)
    """`calibration`, `diagnostics` and `cka`, see `diagnostics.measure`; empty before the teacher is captured."""
    attention: dict[str, Any] = field(default_factory=dict)
    """`samples`, and for each student layer the cosine of attention outputs, `fitted` and `naive`; or `problem`."""

    def rows(self) -> list[dict[str, Any]]:
        """One row of numbers for each student layer; None is what was not measured."""
        out = []
        for index, sources in enumerate(self.layers):
            row: dict[str, Any] = {"layer": index, "teacher": sources}
            cka = self.measured.get("cka")
            row["cka"] = None if cka is None else sum(cka[i][index] for i in sources) / len(sources)
            for name in NAMES:
                found = self.measured["diagnostics"][name][index] if self.measured else {}
                for key in ("r2_naive", "r2", "explained_variance"):
                    row[f"{name}_{key}"] = found.get(key)
            for kind in ("naive", "fitted"):
                row[f"attention_{kind}"] = self.attention[kind][index] if kind in self.attention else None
            out.append(row)
        return out

    def save(self, projector: Path) -> tuple[Path, Path]:
        """Writes the numbers and the picture beside a projector; returns where."""
        from .figures import draw_report

        numbers, picture = projector.with_suffix(".report.json"), projector.with_suffix(".png")
        write_atomic(numbers, json.dumps({**asdict(self), "rows": self.rows()}, indent=1).encode())
        write_atomic(picture, draw_report(self))
        return numbers, picture


def report_stages(run: Run) -> list[Stage]:
    """What must be made for a report: the student and its reference, and the resampled stores if the recipe has any."""
    stages = [stage for stage in stages_of(run) if stage.name in ("student", "reference", "resample")]
    if not run.needs_reference:
        stages.insert(1, ReferenceStage(run))
    return stages


def make_report(run: Run, teacher: str) -> ProjectionReport:
    """Fits the projector, or takes the one on disk if it is the recipe's, and measures it.

    It is saved, unless there are targets that another one made. Before the teacher is captured, a layer map that
    nothing has to be fitted for is all there is to report.

    Raises:
        StoreNotFoundError: if there is no capture, and the layer map needs one.
    """
    stage = ProjectStage(run, teacher)
    try:
        parent = stage.complete_parent()
    except StoreNotFoundError:
        if (layers := run.layers(teacher)) is None:
            raise
        source = run.parent_manifest(teacher).geometry
        settings = run.recipe.project.model_dump(include={"heads", "per", "scale"})
        return ProjectionReport(
            teacher, str(source), str(run.student_geometry), source.num_layers, layers, settings=settings
        )
    projector = stage.fitted(parent)
    kept = stage.keep(projector)
    reference, transform = KVStore.open(run.reference_path), stage.transform(parent)
    ids = [record.sample_id for record in run.calibration.records]
    wanted = Wanted.for_map(projector.layers) | Wanted.for_cka(projector.source, projector.target)
    pairs = calibration_pairs(transform, parent, ids, reference)
    calibration = Calibration.gather(projector.source, projector.target, wanted, pairs)
    samples = enumerate(calibration_samples(transform, parent, ids, reference))
    heldout = list(islice((sample for number, sample in samples if sample and is_held_out(number)), ATTENTION_SAMPLES))
    return ProjectionReport(
        teacher,
        str(projector.source),
        str(projector.target),
        projector.source.num_layers,
        projector.layers,
        settings={
            k: projector.card[k] for k in ("heads", "per", "scale", "layers_by", "penalties") if k in projector.card
        },
        made_for=projector.card["made_for"],
        is_saved=kept,
        parameters=stage.manifest().parameters,
        measured=measure(projector, calibration),
        attention=_attention(run, projector, calibration, heldout),
    )


def report_table(report: ProjectionReport) -> Table:
    """The numbers of every layer, and their means."""
    names = {"keys": "K", "values": "V"}
    columns = ["layer", "teacher", "CKA"]
    for name in names.values():
        columns += [f"{name} R2 naive", f"{name} R2", f"{name} kept"]
    columns += ["attention naive", "attention"]
    penalties = report.settings.get("penalties")
    if penalties:
        columns += [f"{name} penalty" for name in names.values()]
    table = Table(*columns, box=None, pad_edge=False)
    rows = report.rows()
    numbers = [key for key in rows[0] if key not in ("layer", "teacher")]
    for row in rows:
        cells = [str(row["layer"]), "+".join(map(str, row["teacher"])), *(_cell(row[key]) for key in numbers)]
        if penalties:
            cells += [_range(penalties[name][row["layer"]]) for name in names]
        table.add_row(*cells)
    table.add_row("mean", "", *(_cell(_mean([row[key] for row in rows])) for key in numbers))
    return table


def _attention(
    run: Run, projector: Projector, calibration: Calibration, samples: list[CalibrationSample]
) -> dict[str, Any]:
    import torch

    from .attention import AttentionReplay

    if not samples:
        return {"problem": "no calibration sample is held out"}
    model = load_model(run.student_source, dtype="float32")
    candidates = {"naive": naive_projector(projector, calibration), "fitted": projector}
    candidates = {kind: in_own_scale(candidate, calibration) for kind, candidate in candidates.items()}
    totals = {kind: torch.zeros(projector.target.num_layers, dtype=torch.float64) for kind in candidates}
    tokens = 0
    for sample in samples:
        ids, positions = (torch.from_numpy(x).long() for x in (sample.tokens.input_ids, sample.tokens.positions))
        try:
            replay = AttentionReplay(model, ids, positions)
        except UnsupportedModelError as error:
            return {"problem": str(error)}
        mask = torch.from_numpy(sample.mask)
        for kind, candidate in candidates.items():
            keys, values = candidate.apply("keys", sample.keys), candidate.apply("values", sample.values)
            totals[kind] += replay.cosines(keys, values, mask).double() * int(mask.sum())
        tokens += int(mask.sum())
    return {"samples": len(samples), "tokens": tokens} | {k: (total / tokens).tolist() for k, total in totals.items()}


def _mean(found: list[float | None]) -> float | None:
    known = [x for x in found if x is not None]
    return sum(known) / len(known) if known else None


def _cell(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _range(penalties: list[float]) -> str:
    low, high = min(penalties), max(penalties)
    return f"{low:g}" if low == high else f"{low:g}..{high:g}"
