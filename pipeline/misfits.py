"""What would be found out after a costly capture, found out before it."""

from __future__ import annotations

import datetime
from contextlib import suppress
from itertools import islice
from typing import Final

from ..errors import AlignmentError, CorpusError, ModelNotFoundError, RecipeError
from ..extract.chat import ChatTemplate
from ..hub import ModelSource, find_model, load_tokenizer, token_digests
from ..store import Split
from ..train.settings import ByteLevelBPE
from .maps.layers import layer_map
from .run import Run

_LOOKED_AT: Final = 100
"""Records that tell whether a corpus is one of chats."""


def refuse_misfits(run: Run, name: str) -> None:
    """Finds out before a capture what would be found out after it, as far as shapes and tokenizers tell.

    Raises:
        CorpusError: if nothing is left to train on, or a chat template cannot be rendered.
        RecipeError: if a chat template needs a date.
        AlignmentError: if the projection that the recipe asks for cannot be made for this teacher and student, or
            the student is to be trained on logits of other tokens than its own.
    """
    recipe = run.recipe
    _refuse_templates(run, name)
    if not run.corpus.split(Split.TRAIN):
        raise CorpusError(f"corpus {recipe.corpus.path}: every sample is held out, none is left to train on")
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


def template_warnings(run: Run) -> list[str]:
    """Describe chat template settings that are probably not meant, in one line each."""
    recipe = run.recipe
    models = {f"teachers.{name}": teacher.chat_template for name, teacher in recipe.teachers.items()}
    models["student"] = recipe.student.chat_template
    with_one = [name for name, used in models.items() if used]
    without = [name for name, used in models.items() if not used]
    if with_one and without:
        return [
            f"chat_template: {', '.join(with_one)} read the corpus in a chat template, {', '.join(without)} as plain "
            "text. Set chat_template once, at the top of the recipe, unless that is meant"
        ]
    if without and any(record.messages for record in islice(run.prompts.records, _LOOKED_AT)):
        return [
            f"chat_template: the records of corpus {recipe.corpus.path} are chats, and every model reads them as plain "
            "text without roles. Set chat_template: true at the top of the recipe, or false to confirm"
        ] * (recipe.chat_template is None)
    return []


def _refuse_templates(run: Run, name: str) -> None:
    """Refuse chat templates that cannot be rendered, or not to the same text every day."""
    teacher = run.teacher(name)
    if teacher.chat_template:
        _check_template(f"teachers.{name}", run.teacher_source(name), teacher.chat_template_date)
    # The student may be on another machine.
    with suppress(ModelNotFoundError):
        check_student_template(run)


def check_student_template(run: Run) -> None:
    """Refuse a student's chat template that cannot be rendered, or not to the same text every day.

    Raises:
        CorpusError: if there is no template, or it cannot render a question and an answer.
        RecipeError: if it prints today's date and none is set, or the tokenizer is one that is trained here.
        ModelNotFoundError: if its tokenizer cannot be loaded.
    """
    student = run.recipe.student
    if not student.chat_template:
        return
    if isinstance(student.tokenizer, ByteLevelBPE):
        raise RecipeError(
            "student.chat_template: a tokenizer that is trained on the corpus has no chat template. Set "
            "student.chat_template: false, or name a tokenizer that has one"
        )
    _check_template("student", _student_tokenizer(run), student.chat_template_date)


def _check_template(key: str, source: ModelSource, date: datetime.date | None) -> None:
    try:
        ChatTemplate(load_tokenizer(source), date).check()
    except (CorpusError, RecipeError) as error:
        raise type(error)(f"{key}: {error}") from None


def _student_tokenizer(run: Run) -> ModelSource:
    student = run.recipe.student
    if isinstance(student.tokenizer, str):
        return find_model(student.tokenizer, trust_remote_code=student.trust_remote_code)
    return find_model(str(student.model), revision=student.revision, trust_remote_code=student.trust_remote_code)


def _refuse_other_tokens(run: Run, name: str) -> None:
    student, source = run.recipe.student, _student_tokenizer(run)
    teacher = run.teacher(name)
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
