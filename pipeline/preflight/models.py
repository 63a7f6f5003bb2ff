"""Preflight checks of teachers and student: models, devices, tokenizers, templates, and how both fit together."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial

from ...errors import AlignmentError, CorpusError, HubUnreachableError, KavaError, ModelNotFoundError
from ...hub import check_weights, load_config, token_digests, torch_device
from ...store import KVGeometry, KVStore, Split
from ..maps.layers import layer_map
from ..run import Run
from ..segments import refuse_empty_segments
from ..template_checks import check_student_template, check_teacher_template
from ..tokenizer_checks import check_student_tokenizer, check_teacher_tokenizer
from .scope import Scope


def check_teachers(scope: Scope) -> Iterator[str]:
    """Yield what is wrong with the teachers that are still needed."""
    run = scope.run
    if run.recipe.extract.generate is not None:
        yield from scope.problems_of(lambda: run.generating_teacher, key="extract.generate.teacher")
    for name in run.recipe.teachers:
        if scope.needs_teacher(name) and scope.only_teacher in (None, name):
            yield from _teacher_problems(scope, name)


def _teacher_problems(scope: Scope, name: str) -> Iterator[str]:
    run, runs = scope.run, scope.runs_teacher(name)
    if runs and run.recipe.extract.backend == "hf":
        device = run.teacher(name).device
        yield from scope.problems_of(lambda: torch_device(device), key=f"teachers.{name}.device")
    found = list(scope.problems_of(lambda: run.teacher_geometry(name), reached=runs))
    yield from found
    if found or not _is_here(lambda: load_config(run.teacher_source(name))):
        return
    source = run.teacher_source(name)
    if source.is_local and not source.gguf_file:
        yield from scope.problems_of(lambda: check_weights(source))
    most, wanted = int(load_config(source).vocab_size), run.recipe.extract.logits
    if wanted is not None and wanted > most:
        yield f"extract.logits: {wanted} is more than the {most} that the model has"
    yield from scope.problems_of(partial(check_teacher_template, run, name), reached=runs)
    if (corpus := scope.corpus) is not None:
        yield from scope.problems_of(lambda: check_teacher_tokenizer(run, name, corpus), reached=runs)


def check_student(scope: Scope) -> Iterator[str]:
    """Yield what is wrong with the student, unless it is in the run's folder already."""
    run, builds = scope.run, "student" in scope.stages
    if scope.has_student:
        return
    found = list(scope.problems_of(run.planned_student_geometry, reached=builds))
    yield from found
    settings = run.recipe.student
    if settings.model is not None and not found:
        from ...train.student import model_source

        source = model_source(settings)
        if source.is_local and not source.gguf_file:
            yield from scope.problems_of(lambda: check_weights(source))
    stated = settings.geometry
    if stated is not None and (geometry := student_geometry(run)) not in (None, stated):
        yield f"student.geometry: the recipe states {stated}, the model has {geometry}"
    yield from scope.problems_of(partial(check_student_template, run), reached=builds)
    if scope.corpus is not None:
        # Before a teacher has written the corpus, its prompts are what can be encoded.
        corpus = scope.corpus
        yield from scope.problems_of(lambda: check_student_tokenizer(run, corpus), reached=builds)


def check_fit(scope: Scope) -> Iterator[str]:
    """Yield why targets for this student cannot be made of a teacher's capture."""
    run = scope.run
    for name in run.recipe.teachers:
        source, target = source_geometry(run, name), student_geometry(run)
        if source is not None and target is not None:
            yield from scope.problems_of(partial(_refuse_projection, run, source, target))
        if scope.runs_teacher(name):
            yield from scope.problems_of(partial(_refuse_other_tokens, run, name), reached=False)


def refuse_teacher(run: Run, name: str) -> None:
    """Refuse a capture that could not be used, as far as shapes, tokenizers and the corpus tell.

    Raises:
        CorpusError: if nothing is left to train on, a stage needs a segment that no record has, or a chat template
            cannot be rendered.
        AlignmentError: if the projection that the recipe asks for cannot be made for this teacher and student, or
            the student is to be trained on logits of other tokens than its own.
        CheckpointError: if a tokenizer loses text, or gives ids that its model cannot read.
        RecipeError: if a chat template needs a date, or the teacher's device does not exist.
    """
    recipe = run.recipe
    refuse_empty_segments(run)
    check_teacher_template(run, name)
    with suppress(HubUnreachableError):  # The student may be on another machine.
        check_student_template(run)
    if not run.corpus.split(Split.TRAIN):
        raise CorpusError(f"corpus {recipe.corpus.label}: every sample is held out, none is left to train on")
    if recipe.extract.backend == "hf":
        torch_device(run.teacher(name).device)
    check_teacher_tokenizer(run, name, run.corpus)
    with suppress(ModelNotFoundError):
        check_student_tokenizer(run, run.corpus)
        _refuse_projection(run, run.teacher_geometry(name), run.planned_student_geometry())
        _refuse_other_tokens(run, name)


def source_geometry(run: Run, name: str) -> KVGeometry | None:
    """Return the geometry of a teacher's capture, or of its model; None if neither is on this machine."""
    with suppress(KavaError):
        return KVStore.open(run.teacher_path(name)).geometry
    with suppress(KavaError):
        return run.teacher_geometry(name)
    return run.teacher(name).geometry


def student_geometry(run: Run) -> KVGeometry | None:
    """Return the student's geometry; None if its model is not on this machine."""
    with suppress(KavaError):
        return run.planned_student_geometry()
    return run.recipe.student.geometry


def _is_here(load: Callable[[], object]) -> bool:
    try:
        load()
    except KavaError:
        return False
    return True


def _refuse_projection(run: Run, source: KVGeometry, target: KVGeometry) -> None:
    project = run.recipe.project
    layers = layer_map(project.layers, source.num_layers, target.num_layers)
    alike = source.shape[1:] == target.shape[1:] and all(len(s) == 1 for s in layers or [[0]])
    if project.heads == "identity" and not alike:
        raise AlignmentError(
            f"project.heads: identity needs equal heads and head_dim and one teacher layer for each, not {source} "
            f"onto {target}; use procrustes, cca or pca"
        )


def _refuse_other_tokens(run: Run, name: str) -> None:
    """Refuse logits of a teacher whose tokens are not the student's."""
    if run.recipe.train.logits is None or name != run.train_teacher:
        return
    from ...train.student import tokenizer_source

    student, source = run.recipe.student, tokenizer_source(run.recipe.student)
    teacher = run.teacher(name)
    student_digests = token_digests(source, chat_template=student.chat_template, date=student.chat_template_date)
    teacher_digests = token_digests(
        run.teacher_source(name), chat_template=teacher.chat_template, date=teacher.chat_template_date
    )
    for part, one, two in zip(("tokenizer", "chat template"), teacher_digests, student_digests, strict=True):
        if one != two:
            raise AlignmentError(
                f"train.logits: the {part} of teacher {name} is not the student's, so that its next tokens are not the "
                "student's; leave train.logits out, or give the student the teacher's tokenizer and template"
            )
