"""Segments that the recipe's stages need, against those that the corpus has."""

from __future__ import annotations

from collections.abc import Iterator

from ..errors import CorpusError
from ..store import SEGMENTS
from .run import Run


def segment_warnings(run: Run) -> list[str]:
    """What stages will not do with samples that lack a segment, a line for each stage.

    Records without text in a segment are counted over the whole corpus.
    """
    return [
        f"{key}: {len(run.corpus) - count:,} of {len(run.corpus):,} samples have no {segment}, {consequence}"
        for key, segment, count, consequence in _needs(run)
        if count < len(run.corpus)
    ]


def refuse_empty_segments(run: Run) -> None:
    """Makes sure that every segment that a stage needs has text in some record.

    Raises:
        CorpusError: naming the key of the recipe and the segment.
    """
    for key, segment, count, _ in _needs(run):
        if not count:
            recipe = run.recipe.corpus
            notes = "; ".join(run.corpus.notes)
            raise CorpusError(
                f"corpus {recipe.label}: {key} needs a {segment}, and no record has one ({notes}). Name its field "
                f"under corpus.fields, cut a field in two (corpus.split), or leave {key} out."
            )


def _needs(run: Run) -> Iterator[tuple[str, str, int, str]]:
    """Keys of the recipe that need a segment, the number of records that have it, and what becomes of the others."""
    recipe, records = run.recipe, run.corpus.segment_records
    if recipe.extract.importance:
        for name in ("rationale", "answer"):
            yield "extract.importance", name, records[SEGMENTS[name]], "and get no importance"
    if recipe.select is not None:
        name = recipe.select.segment
        yield "select", name, records[SEGMENTS[name]], "and all their slots stay empty"
    if (segments := recipe.train.ce_segments) and not any(records[SEGMENTS[name]] for name in segments):
        yield "train.ce_segments", " or ".join(segments), 0, "and nothing of them is predicted"
