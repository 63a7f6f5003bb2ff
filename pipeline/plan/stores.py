"""The stores of a recipe before any is made: what each will be, from geometries and the tokenizers' counts."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ...errors import HubUnreachableError, KavaError
from ...extract import Corpus, Encoder
from ...extract.signals import signal_arrays
from ...hub import load_tokenizer, token_digests
from ...store import ExtraArray, KVGeometry, Manifest, ModelIdentity, Split, default_page_tokens
from ...store.dtypes import dtype_of
from ..parts import BYTES_PER_TOKEN, draw_calibration
from ..parts import samples_per_part as parts_of
from ..run import Run
from ..transform import inherited_extras
from .sizes import StoreSize, store_size
from .tokens import TokenCount, at_most, count_tokens


@dataclass(frozen=True)
class PlannedStore:
    """One store of the recipe."""

    label: str
    """Of its stage."""
    path: Path
    manifest: Manifest
    """Its size-giving fields; digests are left open."""
    parts: int
    among: list[int] | None
    """The samples it holds; None for all."""
    count: TokenCount
    size: StoreSize


class Counts:
    """Tokens under each tokenizer, each counted once; an upper bound where a tokenizer cannot be reached."""

    def __init__(self, run: Run, corpus: Corpus, sample: int | None, problems: list[str]) -> None:
        self.run, self.corpus, self.sample, self._problems = run, corpus, sample, problems
        self._found: dict[str, TokenCount] = {}
        self.bounds: set[str] = set()
        """Whose tokens are an upper bound: `teacher NAME`, or `student`."""

    def teacher(self, name: str) -> TokenCount:
        """On a teacher's time axis."""
        return self._count(f"teacher {name}", lambda: self.run.teacher_encoder(name))

    @property
    def student(self) -> TokenCount:
        """On the student's time axis."""
        return self._count("student", self._student_encoder)

    def student_texts(self) -> Iterator[str]:
        """What a tokenizer of the student's own is trained on; of a sample, fewer, which cut alike."""
        train = self.corpus.split(Split.TRAIN)
        chosen = train if self.sample is None else train[: 10 * self.sample]
        return (self.corpus.records[i].text for i in chosen)

    def _count(self, key: str, encoder: Callable[[], Encoder]) -> TokenCount:
        if key not in self._found:
            try:
                self._found[key] = count_tokens(encoder(), self.corpus, self.sample)
            except KavaError as error:
                why = "the hub has its tokenizer" if isinstance(error, HubUnreachableError) else error
                self._problems.append(f"tokens of {key}: {why}; at most one for {BYTES_PER_TOKEN} bytes of text")
                self._found[key] = at_most(self.corpus, BYTES_PER_TOKEN)
                self.bounds.add(key)
        return self._found[key]

    def _student_encoder(self) -> Encoder:
        from ...train.student import student_tokenizer

        settings = self.run.recipe.student
        if self.run.has_student:
            tokenizer = load_tokenizer(self.run.student_source)
        else:
            tokenizer = student_tokenizer(settings, self.student_texts())
        return Encoder(
            tokenizer,
            chat_template=settings.chat_template,
            add_eos=True,
            chat_template_date=settings.chat_template_date,
        )


def planned_stores(
    run: Run,
    corpus: Corpus,
    counts: Counts,
    teachers: dict[str, KVGeometry],
    student: KVGeometry | None,
    *,
    everyone: Collection[KVGeometry] = (),
    measured: dict[tuple[str, str, str], float] | None = None,
) -> list[PlannedStore]:
    """Every store that the recipe asks for, as it will be.

    Args:
        run: the run.
        corpus: what models read, or its nearest before it is written.
        counts: of its tokens.
        teachers: geometries of those teachers whose stores are wanted.
        student: the student's geometry; None if it cannot be reached: then there are captures alone.
        everyone: geometries of all teachers of the recipe, which size the parts; those of `teachers` if not given.
        measured: bytes per token on disk by label, dtype and codec, from a probe.
    """
    recipe, found = run.recipe, []
    dtype = dtype_of(recipe.extract.dtype)
    size = recipe.samples_per_part or min(
        parts_of(array("d", (n / BYTES_PER_TOKEN * g.bytes_per_token(dtype.itemsize) for n in corpus.text_bytes)))
        for g in everyone or teachers.values()
    )
    project = recipe.project
    parts, calibration = draw_calibration(
        corpus.split(Split.TRAIN), len(corpus), size, project.calibration_samples, project.seed
    )

    def add(label: str, path: Path, count: TokenCount, manifest: Manifest, **among: Any) -> None:
        # Fusing is not probed: it mixes the numbers of targets, which are.
        like = f"project {recipe.fused_teachers[0]}" if label == "fuse" else label
        known = (measured or {}).get((like, manifest.dtype, manifest.codec))
        sized = store_size(manifest, count, measured=known, **among)
        if known is not None and like != label:
            sized = replace(sized, estimated="as its teachers' targets")
        chosen = among.get("parts", manifest.num_parts)
        found.append(PlannedStore(label, path, manifest, chosen, among.get("among"), count, sized))

    for name, geometry in teachers.items():
        signals = signal_arrays(
            geometry,
            importance=recipe.extract.importance,
            confidence=recipe.extract.confidence,
            logits=recipe.extract.logits,
        )
        capture = _manifest("capture", geometry, recipe.extract.dtype, recipe.extract.codec, len(corpus), size, signals)
        kept: dict[str, Any] = {}
        if recipe.extract.keep == "target":
            inside = [i for part in parts for i in range(part * size, min((part + 1) * size, len(corpus)))]
            kept = {"among": inside, "parts": len(parts)}
        path = run.teacher_path(name)
        add(f"extract {name}", path, counts.teacher(name), capture, **kept)
        if student is None:
            continue
        inherited = _inherited(run, name, capture)
        if recipe.resample.materialize:
            manifest = _manifest("resampled", geometry, capture.dtype, capture.codec, len(corpus), size, inherited)
            add(f"resample {name}", run.resampled_path(name), counts.student, manifest)
        manifest = _manifest("target", student, project.dtype, project.codec, len(corpus), size, inherited)
        add(f"project {name}", run.target_path(name), counts.student, manifest)
        if recipe.select is not None:
            _add_slots(run, name, capture, student, add)
    if student is not None and run.needs_reference:
        own = recipe.samples_per_part or parts_of(
            [corpus.text_bytes[i] / BYTES_PER_TOKEN * student.bytes_per_token(4) for i in calibration]
        )
        manifest = _manifest("capture", student, "float32", "blosc-zstd", len(calibration), own, {})
        add("reference", run.reference_path, counts.student, manifest, among=calibration, parts=manifest.num_parts)
    if student is not None and recipe.fuse is not None and recipe.fuse.materialize:
        extras = {"weights": ExtraArray(axis="sample", dtype="float64", shape=(len(recipe.fused_teachers),))}
        manifest = _manifest("target", student, project.dtype, project.codec, len(corpus), size, extras)
        add("fuse", run.target_path(recipe.fuse.name), counts.student, manifest)
    return found


def _add_slots(run: Run, name: str, capture: Manifest, student: KVGeometry, add: Callable[..., None]) -> None:
    recipe = run.recipe
    assert recipe.select is not None
    slots, geometry, dtype, codec = recipe.select.tokens, capture.geometry, capture.dtype, capture.codec
    if recipe.select.geometry == "student":
        geometry, dtype, codec = student, recipe.project.dtype, recipe.project.codec
    heads = (capture.geometry.num_layers, capture.geometry.num_key_value_heads)
    extras = {
        "indices": ExtraArray(axis="row", dtype="int32", shape=heads),
        "scores": ExtraArray(axis="row", dtype="float32", shape=heads),
    }
    size, samples = capture.samples_per_part, capture.num_samples
    manifest = _manifest("selected", geometry, dtype, codec, samples, size, extras)
    manifest = manifest.model_copy(update={"page_tokens": min(manifest.page_tokens, slots)})
    count = TokenCount(list(range(samples)), [slots] * samples, [1] * samples, 0.0)
    add(f"select {name}", run.selected_path(name), count, manifest)


def _inherited(run: Run, name: str, capture: Manifest) -> dict[str, ExtraArray]:
    """What targets take over; logits only where the student's tokens are the teacher's."""
    same = None
    if run.recipe.extract.logits is not None:
        try:
            sources = ((run.teacher(name), run.teacher_source(name)), (run.recipe.student, run.student_source))
            teacher, student = (
                token_digests(source, chat_template=s.chat_template, date=s.chat_template_date) for s, source in sources
            )
            same = teacher == student
        except KavaError:  # Not made yet: at most this.
            same = True
    return inherited_extras(capture, capture.tokenizer_digest if same else "", None)


def _manifest(
    kind: Any, geometry: KVGeometry, dtype: Any, codec: str, samples: int, size: int, extras: dict[str, ExtraArray]
) -> Manifest:
    return Manifest(
        kind=kind,
        geometry=geometry,
        dtype=dtype,
        codec=codec,
        page_tokens=default_page_tokens(geometry, dtype_of(dtype).itemsize, codec),
        num_samples=samples,
        samples_per_part=size,
        model=ModelIdentity(id="planned", compute_dtype=dtype),
        tokenizer_digest="0" * 32,
        corpus_digest="0" * 32,
        extras=extras,
    )
