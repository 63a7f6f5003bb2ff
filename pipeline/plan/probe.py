"""A short run of the real thing: the recipe's own stages on a few of its samples, in a temporary folder, timed.

The student has the tokenizer that it will have. What is measured is what the run will do: the teacher's forward passes
with writing, the fit, the pass over parts, steps of training; and how well this teacher's numbers compress under every
codec.
"""

from __future__ import annotations

import json
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from ...extract import Corpus, CorpusSettings, Record, capture_store
from ...extract.corpus import HeldoutSettings
from ...store import CODECS, LOSSY, KVStore, Segment, Split
from ..capture_stages import ExtractStage, ReferenceStage
from ..project_stage import ProjectStage
from ..run import Run
from ..store_stages import ResampleStage, StoreStage
from ..teachers import open_teacher
from ..transcode import transcode_store
from .sizes import paged_bytes
from .stores import Counts

PARTS: Final = 4
"""Parts of a probe; the first one warms up and is not counted."""
STEPS: Final = 4
"""Steps of training after the first, which warms up."""


@dataclass
class TeacherProbe:
    """Seconds, of one teacher."""

    load: float = 0.0
    per_token: float = 0.0
    """Of capture: forward passes, encoding and writing, as they overlap."""
    derive_per_token: float = 0.0
    """Of resampling and projecting, per token of the student, on this machine's threads."""
    fit_per_token: float = 0.0
    """Per token of the student in the calibration."""
    read_per_token: float = 0.0
    """Of reading targets back, per token of the student."""


@dataclass
class Probe:
    """What was measured."""

    samples: int = 0
    tokens: int = 0
    """Of the first teacher, in parts that were counted."""
    teachers: dict[str, TeacherProbe] = field(default_factory=dict)
    reference_per_token: float = 0.0
    start: float = 0.0
    """Of a command that finds nothing to do: imports, tokenizers, manifests."""
    step: float | None = None
    """Of one training step; None if it was not measured."""
    bytes_per_token: dict[tuple[str, str, str], float] = field(default_factory=dict)
    """On disk, by label of the stage, dtype and codec."""
    problems: list[str] = field(default_factory=list)


def run_probe(run: Run, corpus: Corpus, counts: Counts, names: list[str], folder: Path | None = None) -> Probe:
    """Runs the stages on some samples.

    Args:
        run: the run; nothing of it is touched.
        corpus: what models read.
        counts: of its tokens, to choose how many samples make a few batches.
        names: the teachers to probe.
        folder: where the temporary store lies; the system's place if not given.

    Raises:
        KavaError: whatever the stages raise.
    """
    from ...train.student import make_student

    found, recipe = Probe(), run.recipe
    with tempfile.TemporaryDirectory(prefix="kava-probe-", dir=folder) as place:
        small = _small_run(run, corpus, counts, names, Path(place))
        found.samples = len(small.corpus)
        make_student(recipe.student, small.student_dir, counts.student_texts(), small.student_record)
        for name in names:
            found.teachers[name] = TeacherProbe()
            _probe_capture(small, name, found)
        small.recipe.save(Path(place) / "recipe.yaml")
        command = [sys.executable, "-m", "kava", "extract", str(Path(place) / "recipe.yaml")]
        with _timed() as took:
            subprocess.run(command, capture_output=True, check=False)
        found.start = took[0]
        if small.needs_reference:
            stage = ReferenceStage(small)
            began = time.perf_counter()
            stage.make(None)
            seconds, store = time.perf_counter() - began, KVStore.open(stage.output)
            found.reference_per_token = seconds / max(store.num_tokens, 1)
            found.bytes_per_token[stage.label, "float32", store.manifest.codec] = paged_bytes(store)
        for name in names:
            _probe_derived(small, name, found)
        _probe_training(small, names, found)
    return found


def _small_run(run: Run, corpus: Corpus, counts: Counts, names: list[str], place: Path) -> Run:
    """The same recipe on samples that make `PARTS` parts of one full batch each, if there are as many."""
    recipe = run.recipe
    longest = max(counts.teacher(name).longest for name in names)
    mean = max(sum(counts.teacher(n).rows() for n in names) / len(names) / max(len(corpus), 1), 1)
    per_part = max(1, min(len(corpus) // PARTS, round(max(recipe.extract.batch_tokens, longest) / mean)))
    chosen = sorted(random.Random(0).sample(range(len(corpus)), min(len(corpus), PARTS * per_part)))
    train = [i for i in chosen if corpus.records[i].split == Split.TRAIN] or corpus.split(Split.TRAIN)[:1]
    records = [corpus.records[i] for i in sorted({*chosen, *train})]
    path = place / "corpus.jsonl"
    path.write_text("".join(json.dumps(_row(r), ensure_ascii=False) + "\n" for r in records), encoding="utf-8")
    heldout = None
    if any(r.split == Split.HELDOUT for r in records):
        heldout = HeldoutSettings(ratio=None, group="split", values=("heldout",))
    changes: dict[str, Any] = {
        "run_dir": str(place / "run"),
        "store_dir": None,
        "samples_per_part": per_part,
        "corpus": CorpusSettings(path=str(path), separator="", heldout=heldout),
        "extract": recipe.extract.model_copy(update={"keep": "capture", "generate": None, "too_long": "skip"}),
        "train": recipe.train.model_copy(
            update={"max_steps": STEPS + 1, "eval_steps": None, "save_steps": None, "report_to": [], "warmup_steps": 0}
        ),
    }
    return Run(recipe.model_copy(update={k: v for k, v in changes.items() if k in type(recipe).model_fields}))


def _row(record: Record) -> dict[str, Any]:
    """A corpus row that gives the same segments and turns; `_small_run` joins texts without a separator."""
    row: dict[str, Any] = {"id": record.sample_id, "split": record.split.name.lower()}
    if record.messages:
        return row | {"messages": list(record.messages)}
    kinds = [kind for *_, kind in record.segments]
    if len(set(kinds)) == len(kinds) and kinds == sorted(kinds):
        names = {Segment.PROMPT: "prompt", Segment.RATIONALE: "rationale", Segment.ANSWER: "answer"}
        return row | {names[kind]: record.text[start:stop] for start, stop, kind in record.segments}
    return row | {"messages": [{"role": role, "content": record.text[a:b]} for role, a, b in record.turns]}


def _probe_capture(run: Run, name: str, found: Probe) -> None:
    stage, probe = ExtractStage(run, name), found.teachers[name]
    store = KVStore.create(stage.output, stage.manifest())
    encoder, seconds, tokens = run.teacher_encoder(name), 0.0, 0
    began = time.perf_counter()
    with open_teacher(run, name) as teacher:
        probe.load = time.perf_counter() - began
        for part in range(store.manifest.num_parts):
            with _timed() as took:
                capture_store(store, run.corpus, encoder, teacher, run.recipe.extract, parts=[part])
            if part or store.manifest.num_parts == 1:
                seconds += took[0]
                tokens += int(store.part(part).lengths.sum())
    probe.per_token = seconds / max(tokens, 1)
    found.tokens = found.tokens or tokens
    _compress(stage, store, found)


def _probe_derived(run: Run, name: str, found: Probe) -> None:
    probe, seconds = found.teachers[name], 0.0
    if run.recipe.resample.materialize:
        stage: StoreStage = ResampleStage(run, name)
        with _timed() as took:
            stage.make(None)
        seconds += took[0]
        _compress(stage, KVStore.open(stage.output), found)
    project = ProjectStage(run, name)
    with _timed() as took:
        project.prepare(project.complete_parent())
    fit = took[0]
    with _timed() as took:
        project.make(None)
    targets = KVStore.open(project.output)
    probe.fit_per_token = fit / max(targets.num_tokens, 1)
    probe.derive_per_token = (seconds + took[0]) / max(targets.num_tokens, 1)
    _compress(project, targets, found)
    with _timed() as took:
        for sample in KVStore.open(project.output):
            del sample
    probe.read_per_token = took[0] / max(targets.num_tokens, 1)


def _probe_training(run: Run, names: list[str], found: Probe) -> None:
    from ...train.training import train_student

    times: list[float] = []
    taught_by = run.recipe.train.teacher
    teacher = taught_by if taught_by in names else names[0]
    if run.recipe.train.logits is not None and taught_by not in (None, teacher):
        found.problems.append(f"steps of training are not timed: they learn logits of {taught_by}, which is not probed")
        return
    targets = KVStore.open(run.target_path(teacher))
    train_student(
        run.student_dir,
        targets,
        run.trained_dir(),
        run.recipe.train,
        corpus_digest=run.corpus.digest,
        on_step=lambda step, total: times.append(time.perf_counter()),
    )
    if len(times) > 1:
        found.step = (times[-1] - times[0]) / (len(times) - 1)


def _compress(stage: StoreStage, store: KVStore, found: Probe) -> None:
    """Bytes per token under every codec, of the store's own dtype."""
    manifest = store.manifest
    found.bytes_per_token[stage.label, manifest.dtype, manifest.codec] = paged_bytes(store)
    if manifest.codec in LOSSY:  # Coded numbers coded again would tell of another store.
        return
    for codec in (*CODECS, *LOSSY):
        if codec != manifest.codec:
            made = transcode_store(store, store.path.with_name(f"{stage.teacher}-{stage.name}-{codec}.zarr"), codec)
            found.bytes_per_token[stage.label, manifest.dtype, codec] = paged_bytes(made)


@contextmanager
def _timed() -> Iterator[list[float]]:
    took = [0.0]
    began = time.perf_counter()
    try:
        yield took
    finally:
        took[0] = time.perf_counter() - began
