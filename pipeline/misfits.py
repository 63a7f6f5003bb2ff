"""What would be found out after a costly capture, found out before it."""

from __future__ import annotations

from ..errors import AlignmentError, CorpusError, ModelNotFoundError
from ..extract import Corpus, Encoder
from ..extract.tokenizer_check import check_tokenizer
from ..hub import find_model, load_config, load_tokenizer, token_digests, tokenizer_file, torch_device
from ..store import Split
from .maps.layers import layer_map
from .run import Run
from .segments import refuse_empty_segments


def refuse_misfits(run: Run, name: str) -> None:
    """Finds out before a capture what would be found out after it, as far as shapes and tokenizers tell.

    Raises:
        CorpusError: if nothing is left to train on, or a stage needs a segment that no record has.
        AlignmentError: if the projection that the recipe asks for cannot be made for this teacher and student, or
            the student is to be trained on logits of other tokens than its own.
        CheckpointError: if a tokenizer loses text, or gives ids that its model cannot read.
        RecipeError: if the teacher's device does not exist.
    """
    recipe = run.recipe
    refuse_empty_segments(run)
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


def check_teacher_tokenizer(run: Run, name: str, corpus: Corpus) -> None:
    """Check a teacher's tokenizer on the text that it will read.

    Raises:
        CheckpointError: if it loses text, or gives ids that the teacher cannot read.
    """
    source = run.teacher_source(name)
    encoder, original = run.teacher_encoder(name), tokenizer_file(source)
    check_tokenizer(f"teacher {name}", encoder, corpus.records, load_config(source), original)


def check_student_tokenizer(run: Run) -> None:
    """Check the student's tokenizer on the corpus, unless it is trained on it, or on another machine.

    Raises:
        CheckpointError: if it loses text, or gives ids that the student cannot read.
    """
    from ..train.student import model_source, student_config

    settings = run.recipe.student
    try:
        if run.has_student:
            source = run.student_source
        elif isinstance(settings.tokenizer, str):
            source = find_model(settings.tokenizer, trust_remote_code=settings.trust_remote_code)
        elif settings.model is not None:
            source = model_source(settings)
        else:
            return
        tokenizer = load_tokenizer(source)
        if run.has_student:
            config = load_config(source)
        elif settings.model is not None:
            config = load_config(model_source(settings))
        else:
            config = student_config(settings, tokenizer)
    except ModelNotFoundError:
        return
    encoder = Encoder(tokenizer, chat_template=settings.chat_template, add_eos=True)
    check_tokenizer("student", encoder, run.corpus.records, config, tokenizer_file(source))


def _refuse_other_tokens(run: Run, name: str) -> None:
    student = run.recipe.student
    if isinstance(student.tokenizer, str):
        source = find_model(student.tokenizer, trust_remote_code=student.trust_remote_code)
    else:
        source = find_model(str(student.model), revision=student.revision, trust_remote_code=student.trust_remote_code)
    mine = token_digests(source, chat_template=student.chat_template)
    theirs = token_digests(run.teacher_source(name), chat_template=run.teacher(name).chat_template)
    for what, one, two in zip(("tokenizer", "chat template"), theirs, mine, strict=True):
        if one != two:
            raise AlignmentError(
                f"train.logits: the {what} of teacher {name} is not the student's, so that its next tokens are not the "
                "student's; leave train.logits out, or give the student the teacher's tokenizer and template"
            )
