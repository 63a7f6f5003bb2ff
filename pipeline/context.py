"""The longest sample that a teacher reads, worked out from its config before it is loaded."""

from __future__ import annotations

from collections.abc import Sequence

from ..extract import Corpus
from ..extract.capture import refuse_long_samples
from ..extract.rope import MODEL_LIMIT, max_positions
from ..extract.vllm.limits import prompt_limit
from ..hub import load_config
from ..progress import progress
from .run import Run


def context_limit(run: Run, name: str) -> tuple[int, str]:
    """Return the tokens that a teacher reads at most, and what limits them.

    Raises:
        ModelNotFoundError: if its config cannot be reached.
        RecipeError: if `engine.max_model_len` asks for more than can be captured.
    """
    config = load_config(run.teacher_source(name))
    if run.recipe.extract.backend == "vllm":
        return prompt_limit(config, run.teacher(name).engine)
    return max_positions(config), MODEL_LIMIT


def refuse_too_long(run: Run, name: str, corpus: Corpus, indices: Sequence[int]) -> None:
    """Refuse samples that are too long for a teacher before it is loaded, unless `extract.too_long` is `skip`.

    Args:
        run: the run.
        name: the teacher.
        corpus: the records.
        indices: of the samples that are to be captured.

    Raises:
        CorpusError: naming the first sample, the limit and how many samples are longer.
    """
    if run.recipe.extract.too_long == "skip":
        return
    max_tokens, limit = context_limit(run, name)
    with progress(f"count tokens {name}", len(indices), "samples") as advance:
        refuse_long_samples(corpus, indices, run.teacher_encoder(name), max_tokens, limit, on_sample=advance)
