"""Chat templates of a run, rendered before anything is computed."""

from __future__ import annotations

import datetime

from ..errors import CorpusError, RecipeError
from ..extract.chat import ChatTemplate
from ..hub import ModelSource, load_tokenizer
from ..train.settings import ByteLevelBPE
from .run import Run


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
    if without and run.prompts.num_chats:
        return [
            f"chat_template: the records of corpus {recipe.corpus.label} are chats, and every model reads them as "
            "plain text without roles. Set chat_template: true at the top of the recipe, or false to confirm"
        ] * (recipe.chat_template is None)
    return []


def check_teacher_template(run: Run, name: str) -> None:
    """Refuse a teacher's chat template that cannot be rendered, or not to the same text every day.

    Raises:
        CorpusError: if the template cannot be rendered.
        RecipeError: if it prints today's date and none is set.
    """
    teacher = run.teacher(name)
    if teacher.chat_template:
        _check_template(f"teachers.{name}", run.teacher_source(name), teacher.chat_template_date)


def check_student_template(run: Run) -> None:
    """Refuse a student's chat template that cannot be rendered, or not to the same text every day.

    Raises:
        CorpusError: if there is no template, or it cannot render a question and an answer.
        RecipeError: if it prints today's date and none is set, or the tokenizer is one that is trained here.
        ModelNotFoundError: if its tokenizer cannot be loaded.
    """
    from ..train.student import tokenizer_source

    student = run.recipe.student
    if not student.chat_template:
        return
    if isinstance(student.tokenizer, ByteLevelBPE):
        raise RecipeError(
            "student.chat_template: a tokenizer that is trained on the corpus has no chat template. Set "
            "student.chat_template: false, or name a tokenizer that has one"
        )
    _check_template("student", tokenizer_source(student), student.chat_template_date)


def _check_template(key: str, source: ModelSource, date: datetime.date | None) -> None:
    try:
        ChatTemplate(load_tokenizer(source), date).check()
    except (CorpusError, RecipeError) as error:
        raise type(error)(f"{key}: {error}") from None
