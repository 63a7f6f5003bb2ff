"""Tokenizers of a run, checked on its corpus before anything is computed."""

from __future__ import annotations

from ..extract import Corpus, Encoder
from ..extract.tokenizer_check import check_tokenizer
from ..hub import load_config, load_tokenizer, tokenizer_file
from ..train.settings import ByteLevelBPE
from .run import Run


def check_teacher_tokenizer(run: Run, name: str, corpus: Corpus) -> None:
    """Check a teacher's tokenizer on the text that it will read.

    Raises:
        CheckpointError: if it loses text, or gives ids that the teacher cannot read.
    """
    source = run.teacher_source(name)
    encoder, original = run.teacher_encoder(name), tokenizer_file(source)
    check_tokenizer(f"teacher {name}", encoder, corpus.records, load_config(source), original)


def check_student_tokenizer(run: Run, corpus: Corpus, *, origin: bool = False) -> None:
    """Check the student's tokenizer on the text that it will read, unless it is trained on that.

    Args:
        run: the run.
        corpus: the records that it will read.
        origin: check the tokenizer that the student is made from, even if a student exists, which may be damaged.

    Raises:
        ModelNotFoundError: if the tokenizer is not on this machine.
        CheckpointError: if it loses text, or gives ids that the student cannot read.
    """
    from ..train.student import model_source, student_config, tokenizer_source

    settings = run.recipe.student
    exists = not origin and run.has_student
    if exists:
        source = run.student_source
    elif not isinstance(settings.tokenizer, ByteLevelBPE):
        source = tokenizer_source(settings)
    else:
        return
    tokenizer = load_tokenizer(source)
    if exists:
        config = load_config(source)
    elif settings.model is not None:
        config = load_config(model_source(settings))
    else:
        config = student_config(settings, tokenizer)
    encoder = Encoder(
        tokenizer,
        chat_template=settings.chat_template,
        chat_template_date=settings.chat_template_date,
        add_eos=True,
    )
    check_tokenizer("student", encoder, corpus.records, config, tokenizer_file(source))
