"""What would be found out after a costly capture, found out before it."""

from __future__ import annotations

from ..errors import AlignmentError, CorpusError, ModelNotFoundError
from ..hub import token_digests, torch_device
from ..store import Split
from .maps.layers import layer_map
from .run import Run
from .segments import refuse_empty_segments
from .template_checks import refuse_templates
from .tokenizer_checks import check_student_tokenizer, check_teacher_tokenizer


def refuse_misfits(run: Run, name: str) -> None:
    """Finds out before a capture what would be found out after it, as far as shapes and tokenizers tell.

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
    refuse_templates(run, name)
    if not run.corpus.split(Split.TRAIN):
        raise CorpusError(f"corpus {recipe.corpus.label}: every sample is held out, none is left to train on")
    if recipe.extract.backend == "hf":
        torch_device(run.teacher(name).device)
    check_teacher_tokenizer(run, name, run.corpus)
    check_student_tokenizer(run)
    try:
        source, target = run.teacher_geometry(name), run.planned_student_geometry()
    except ModelNotFoundError:  # The student may be on another machine.
        return
    project = recipe.project
    layers = layer_map(project.layers, source.num_layers, target.num_layers)
    alike = source.shape[1:] == target.shape[1:] and all(len(s) == 1 for s in layers or [[0]])
    if project.heads == "identity" and not alike:
        raise AlignmentError(
            f"project.heads: identity needs equal heads and head_dim and one teacher layer for each, not {source} "
            f"onto {target}; use procrustes, cca or pca"
        )
    if recipe.train.logits is not None and name == run.train_teacher:
        _refuse_other_tokens(run, name)


def _refuse_other_tokens(run: Run, name: str) -> None:
    from ..train.student import tokenizer_source

    student, teacher = run.recipe.student, run.teacher(name)
    source = tokenizer_source(student)
    mine = token_digests(source, chat_template=student.chat_template, date=student.chat_template_date)
    theirs = token_digests(
        run.teacher_source(name), chat_template=teacher.chat_template, date=teacher.chat_template_date
    )
    for what, one, two in zip(("tokenizer", "chat template"), theirs, mine, strict=True):
        if one != two:
            raise AlignmentError(
                f"train.logits: the {what} of teacher {name} is not the student's, so that its next tokens are not the "
                "student's; leave train.logits out, or give the student the teacher's tokenizer and template"
            )
