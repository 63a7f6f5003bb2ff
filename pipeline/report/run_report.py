"""`kava report`: everything that is known of a run on one page, gathered from what lies below its folder.

Nothing is computed that another command computes, but for a projection report that is missing or of another projector.
A part of the page whose numbers are not there yet says which command makes them.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...errors import KavaError, StageError
from ...store import KVStore
from ...store.files import read_small, write_atomic
from ...store.safe_json import JSON_BYTES, LOG_BYTES, read_json_object
from ..compare_stage import SUMMARY, outdated
from ..places import RECORD, read_record
from ..run import Run
from ..stage import Stage
from ..stages import stages_of, trained_students
from .page import Page, Picture, Table


@dataclass(frozen=True)
class Output:
    """What a stage has made."""

    label: str
    state: str
    detail: str
    size: int
    """Bytes on disk."""
    seconds: float | None
    """From the first of its files that was written to the last one; None where there are none."""


def write_report(run: Run, *, project: bool = True, say: Callable[[str], None] = lambda line: None) -> Path:
    """Writes `run_dir/report.html`.

    Args:
        run: of which something is there already.
        project: whether a missing projection report is made, which reads the calibration once.
        say: told what takes time.

    Raises:
        StageError: if there is nothing of the run yet.
    """
    if not run.root.is_dir():
        raise StageError(f"{run.root} is not there: nothing of this run is made yet; kava run")
    summary = _summary(run)
    page = Page(f"{run.root.name}: KV-cache distillation", _subtitle(run))
    if summary is not None:
        page.cards(_headlines(summary))
        if changed := outdated(run, summary):
            page.note(
                f"The comparison on this page is not of the recipe as it is now, but of another {', '.join(changed)}; "
                "kava compare makes it again (--force where an arm is trained already)."
            )
    _pipeline(page, [output_of(stage) for stage in stages_of(run)])
    _curves(page, run, summary)
    _statistics(page, summary)
    _evaluations(page, run)
    _errors(page, run, summary)
    _projection(page, run, project, say)
    _provenance(page, run)
    path = run.root / "report.html"
    write_atomic(path, page.html().encode())
    return path


def output_of(stage: Stage) -> Output:
    """What a stage has made, by the files that are there."""
    status = stage.look()
    files = _files(stage.output.resolve()) if stage.output.is_dir() else []
    times = [file.st_mtime for file in files]
    size = sum(file.st_size for file in files)
    return Output(stage.label, status.state, status.detail, size, max(times) - min(times) if len(times) > 1 else None)


def _files(folder: Path) -> list[os.stat_result]:
    """Every file below a folder, but for those that a running stage removes meanwhile, as training does checkpoints."""
    found = []
    for root, _, names in os.walk(folder):
        for name in names:
            with suppress(FileNotFoundError):
                found.append(Path(root, name).stat())
    return found


def _summary(run: Run) -> dict[str, Any] | None:
    try:
        return read_json_object(run.compare_dir / SUMMARY, LOG_BYTES)
    except FileNotFoundError:
        return None


def _subtitle(run: Run) -> str:
    teachers = ", ".join(f"{name} ({settings.model})" for name, settings in run.recipe.teachers.items())
    try:
        student = str(run.student_geometry)
    except KavaError:
        student = "a student that is not made yet"
    return f"{teachers} into {student}; corpus {run.recipe.corpus.label}"


def _headlines(summary: dict[str, Any]) -> list[tuple[str, str, str]]:
    """For each arm against the baseline: the difference, its name, and how sure it is."""
    found = []
    for pair in summary["differences"]:
        if pair["against"] == summary["baseline"]:
            low, high = pair["interval_samples"] or (pair["ce"], pair["ce"])
            sure = "" if low <= 0 <= high else ", zero is not in it"
            note = f"95 % over held-out samples {low:+.3f} .. {high:+.3f}{sure}"
            found.append((f"{pair['ce']:+.3f} nats", f"{pair['arm']} against {pair['against']}", note))
    return found


def _pipeline(page: Page, outputs: list[Output]) -> None:
    from .curves import draw_sizes, size_text

    page.section("The pipeline")
    page.flow([(o.label, o.state, _amount(size_text, o)) for o in outputs])
    if sized := [(o.label, o.size) for o in outputs if o.size]:
        page.picture(Picture(draw_sizes(sized), "Bytes on disk of each stage's output"))
    rows = [[o.label, o.state, size_text(o.size) if o.size else "-", time_text(o.seconds), o.detail] for o in outputs]
    page.table(Table(["stage", "state", "size", "time", ""], rows))
    page.note("Time is from the first of its files that was written to the last one, pauses included.")


def _amount(size_text: Callable[[int], str], output: Output) -> str:
    return f"{size_text(output.size)}, {time_text(output.seconds)}" if output.size else "not there"


def time_text(seconds: float | None) -> str:
    """Seconds, for people."""
    if seconds is None:
        return "-"
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s"


def _curves(page: Page, run: Run, summary: dict[str, Any] | None) -> None:
    from .curves import draw_curves

    page.section("Held-out cross-entropy")
    if summary is not None:
        curves = {name: arm["curve"] for name, arm in summary["arms"].items()}
        baseline = summary["baseline"] if summary["baseline"] in curves else None
        page.picture(Picture(draw_curves(curves, baseline), "Held-out cross-entropy of each arm over steps"))
        page.note(
            f"Means over seeds {', '.join(map(str, summary['seeds']))}, bands are 95 % over seeds. The dashed line is "
            f"where {summary['baseline']} ends; a diamond is the first step at which an arm's mean is at or below it."
        )
        return
    curves = {record["name"]: _own_curve(Path(record["path"])) for record in trained_students(run)}
    if curves := {name: curve for name, curve in curves.items() if curve}:
        page.picture(Picture(draw_curves(curves, None), "Held-out cross-entropy of each student over steps"))
    else:
        page.note("No student is trained yet: kava train, or kava compare.")


def _own_curve(folder: Path) -> list[dict[str, Any]]:
    from ...train.compare import read_log

    rows = [row for row in read_log(folder) if "heldout_ce" in row]
    return [{"step": row["step"], "ce": row["heldout_ce"], "interval": None} for row in rows]


def _statistics(page: Page, summary: dict[str, Any] | None) -> None:
    page.section("The comparison")
    if summary is None:
        page.note("Nothing is compared yet: kava compare trains arms and seeds of this recipe.")
        return
    from ..commands.compare import arm_rows, difference_rows

    page.table(Table(*arm_rows(summary)))
    page.table(Table(*difference_rows(summary, list(summary["arms"]))))
    page.note(
        "A difference is the first arm's held-out CE less the second's: below zero it is better. Over samples: a "
        "paired bootstrap, for these trainings; over seeds: Student's t, for trainings with other orders of batches. "
        "Lower on: of how many held-out samples the first arm's CE is the lower one, and the sign test of that."
    )
    if summary["missing"]:
        page.note("Not finished yet: " + ", ".join(f"{arm} seed {seed}" for arm, seed in summary["missing"]) + ".")


def _evaluations(page: Page, run: Run) -> None:
    """What `kava evaluate` has measured of the run's students."""
    from ..commands.evaluate import RESULT
    from ..commands.harness import metric_texts

    page.section("Evaluated students")
    rows = []
    folders = (run.root / "students", run.compare_dir)
    for path in [path for folder in folders for path in sorted(folder.glob(f"[!.]*/{RESULT}"))]:
        try:
            found = read_json_object(path)
        except (OSError, ValueError):
            continue
        tasks = [f"{task} {text}" for task, metrics in found.get("tasks", {}).items() for text in metric_texts(metrics)]
        label = f"{path.parent.parent.name}/{path.parent.name}, {found['dtype']}"
        rows.append([label, f"{found['ce']:.4f}", f"{found['ce_per_byte']:.4f}", _match(found), "; ".join(tasks)])
    if not rows:
        page.note("Nothing is evaluated yet: kava evaluate lets a student answer the held-out questions.")
        return
    page.table(Table(["student", "CE", "per byte", "exact match", "tasks of lm-eval"], rows))
    page.note("CE in nats per token on held-out samples; exact match is of the numbers that answers end with.")


def _match(found: dict[str, Any]) -> str:
    if not (match := found.get("exact_match")):
        return "-"
    low, high = match["interval"]
    return f"{match['right']} of {match['questions']} ({match['share']:.3f}, 95 % {low:.3f} .. {high:.3f})"


def _errors(page: Page, run: Run, summary: dict[str, Any] | None) -> None:
    from .curves import draw_errors

    page.section("What is left between student and targets")
    arms = {} if summary is None else {n: arm["kv_error"] for n, arm in summary["arms"].items() if arm["kv_error"]}
    if arms:
        page.picture(Picture(draw_errors(arms, "arm"), "KV error of each arm by layer"))
        page.note(
            "Held-out keys and values against the true targets, whatever an arm was trained on; 1 is the targets' mean."
        )
    history = {}
    for folder in [*sorted(run.compare_dir.glob("kv-*")), *(Path(r["path"]) for r in trained_students(run))]:
        if history := _error_history(folder):
            page.picture(Picture(draw_errors(history, "step"), f"KV loss of {folder.name} by layer, over steps"))
            page.note(f"The KV loss of {folder.name} on held-out samples while it was trained, by layer.")
            break
    if not arms and not history:
        page.note("Nothing is trained with a KV loss yet.")


def _error_history(folder: Path) -> dict[str, dict[str, list[float]]]:
    """By step, held-out `keys` and `values` of each layer; empty where the log has not all layers of both."""
    from ...train.compare import read_log

    found = {}
    for row in read_log(folder):
        layers = {}
        for name in ("keys", "values"):
            prefix = f"heldout_{name}_"
            numbers = {int(key.removeprefix(prefix)): v for key, v in row.items() if key.startswith(prefix)}
            layers[name] = [numbers[layer] for layer in sorted(numbers)]
        if layers["keys"] and len(layers["keys"]) == len(layers["values"]):
            found[str(row["step"])] = layers
    return found


def _projection(page: Page, run: Run, project: bool, say: Callable[[str], None]) -> None:
    page.section("Layers and projection")
    for name in run.recipe.teachers:
        picture = run.projector_path(name).with_suffix(".png")
        # Where the map needs no reference, nothing but that command captures one to measure by.
        if project and not _is_reported(run, name) and (run.needs_reference or _has_reference(run)):
            from .projection import make_report

            try:
                say(f"{name}: measuring the projection")
                make_report(run, name).save(run.projector_path(name))
            except KavaError as error:
                page.note(f"{name}: no report of the projection: {error}")
                continue
        if _is_reported(run, name):
            data = read_small(picture, JSON_BYTES)
            page.picture(Picture(data, f"Layer map and diagnostics of {name}'s projection", "png"))
        else:
            page.note(f"{name}: kava project --report measures the projection.")


def _has_reference(run: Run) -> bool:
    return (run.reference_path / "zarr.json").is_file()


def _is_reported(run: Run, name: str) -> bool:
    """Whether there is a projection report of the projector that made the targets, or would make them."""
    projector = run.projector_path(name)
    try:
        report = read_json_object(projector.with_suffix(".report.json"))
        card = read_json_object(projector.with_suffix(".json"))
    except (OSError, ValueError):
        return False
    return bool(projector.with_suffix(".png").is_file() and report.get("made_for") == card.get("made_for"))


def _provenance(page: Page, run: Run) -> None:
    page.section("Provenance")
    try:
        rows = [["corpus", run.corpus.digest, f"{len(run.corpus)} samples of {run.recipe.corpus.label}"]]
    except KavaError as error:  # A teacher has not written it yet, or it is on another machine.
        rows = [["corpus", "-", str(error)]]
    if run.student_dir.is_dir():
        rows.append(
            ["student", str(read_record(run.student_dir).get("key")), str(run.recipe.student.model or "config")]
        )
    versions: dict[str, str] = {}
    for label, path in _stores(run):
        try:
            manifest = KVStore.open(path).manifest
        except KavaError as error:
            rows.append([label, "-", str(error)])
            continue
        weights = manifest.model.weights_digest or manifest.model.revision or "-"
        rows.append(
            [label, manifest.fingerprint, f"{manifest.geometry}, {manifest.dtype}, {manifest.codec}; weights {weights}"]
        )
        versions |= manifest.versions
    trained = [(f"student {record['name']}", record) for record in trained_students(run)]
    trained += [
        (f"compare {path.parent.name}", read_record(path.parent))
        for path in sorted(run.compare_dir.glob(f"[!.]*/{RECORD}"))
    ]
    rows += [
        [label, str(record.get("key")), f"trained on targets {record.get('targets')}"] for label, record in trained
    ]
    page.table(Table(["", "fingerprint", ""], rows))
    page.note("Made with " + ", ".join(f"{name} {version}" for name, version in sorted(versions.items())) + ".")
    import yaml

    page.code(
        "The recipe, with every default filled in", yaml.safe_dump(run.recipe.model_dump(mode="json"), sort_keys=False)
    )


def _stores(run: Run) -> list[tuple[str, Path]]:
    found = [(f"capture {name}", run.teacher_path(name)) for name in run.recipe.teachers]
    found.append(("reference", run.reference_path))
    found += [(f"targets {path.stem}", path) for path in sorted((run.root / "targets").glob("*.zarr"))]
    return [(label, path) for label, path in found if (path / "zarr.json").is_file()]
