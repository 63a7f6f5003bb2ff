"""Does this backend capture what the model computes? A few samples against Hugging Face in float32, layer by layer.

The error of a layer is `rms(x - reference) / rms(reference)` over all tokens, heads and dimensions. In float32 it must
stay below `FLOAT32_LIMIT`; in half precision it must not exceed what Hugging Face itself loses in that precision.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import numpy as np

from ...errors import CorpusError
from ...extract import Captured, Tokens
from ...extract.hf import HFTeacher
from ...hub import ModelSource
from ..run import Run
from ..teachers import open_teacher

if TYPE_CHECKING:
    from rich.console import Console

FLOAT32_LIMIT: Final = 1e-5
"""Of the relative error of each layer, in float32."""
HALF_SLACK: Final = 1.05
"""Of the error that Hugging Face makes in half precision, averaged over layers: rounding is random."""


@dataclass(frozen=True)
class Parity:
    """Errors of one teacher's backend."""

    teacher: str
    backend: str
    dtype: str
    samples: int
    tokens: int
    error: np.ndarray[tuple[int, int], np.dtype[np.float64]]
    """`[l, 2]`: of keys and values, against Hugging Face in float32."""
    own: np.ndarray[tuple[int, int], np.dtype[np.float64]] | None
    """`[l, 2]`: of Hugging Face in `dtype`, if that is not float32."""
    quantization: str | None = None

    @property
    def holds(self) -> bool:
        """Whether the backend is as exact as it must be; weights that were quantised are not judged."""
        if self.quantization:
            return True
        if self.own is None:
            return bool((self.error <= FLOAT32_LIMIT).all())
        return bool((self.error.mean(0) <= HALF_SLACK * self.own.mean(0)).all())


def measure_parity(run: Run, name: str, samples: int) -> Parity:
    """Captures samples that are spread over the corpus with the recipe's backend and with Hugging Face.

    Raises:
        CorpusError: if every sample is too long.
    """
    settings, source, encoder = run.teacher(name), run.teacher_source(name), run.teacher_encoder(name)
    chosen = np.unique(np.linspace(0, len(run.corpus) - 1, samples).round().astype(int))
    tokens = [encoder.encode(run.corpus.records[index]) for index in chosen]
    with open_teacher(run, name) as teacher:
        tokens = [t for t in tokens if 0 < len(t) <= teacher.max_tokens]
        if not tokens:
            raise CorpusError(f"no sample has between 1 and {teacher.max_tokens} tokens")
        found = {c.index: c for c in teacher.capture(tokens)}
        backend = teacher.backend
    reference = _captured(run, source, tokens, "float32", settings.device)
    own = None
    if settings.dtype != "float32":
        own = relative_error(_captured(run, source, tokens, settings.dtype, settings.device), reference)
    return Parity(
        teacher=name,
        backend=backend,
        dtype=settings.dtype,
        samples=len(tokens),
        tokens=sum(len(t) for t in tokens),
        error=relative_error(found, reference),
        own=own,
        quantization=settings.engine.quantization,
    )


def relative_error(
    found: dict[int, Captured], reference: dict[int, Captured]
) -> np.ndarray[tuple[int, int], np.dtype[np.float64]]:
    """`rms(found - reference) / rms(reference)` of keys and values, per layer: `[l, 2]`."""
    sums = np.zeros((2, len(next(iter(reference.values())).keys[0]), 2))
    for index, expected in reference.items():
        got = found[index]
        for kind, (a, b) in enumerate(((got.keys, expected.keys), (got.values, expected.values))):
            a, b = a.double(), b.double()
            sums[0, :, kind] += (a - b).square().sum((0, 2, 3)).numpy()
            sums[1, :, kind] += b.square().sum((0, 2, 3)).numpy()
    return np.sqrt(sums[0] / sums[1])  # type: ignore[no-any-return]


def print_parity(parity: Parity, out: Console) -> None:
    """The errors of every layer, and what they mean."""
    from rich.table import Table

    columns = ["layer", "keys", "values"]
    if parity.own is not None:
        columns += [f"keys, hf {parity.dtype}", f"values, hf {parity.dtype}"]
    table = Table(*columns, box=None, pad_edge=False)
    rows = parity.error if parity.own is None else np.concatenate([parity.error, parity.own], axis=1)
    for layer, row in enumerate(rows):
        table.add_row(str(layer), *(f"{x:.2e}" for x in row))
    table.add_row("worst", *(f"{x:.2e}" for x in rows.max(0)))
    table.add_row("mean", *(f"{x:.2e}" for x in rows.mean(0)))
    out.print(
        f"{parity.teacher}: {parity.backend} in {parity.dtype} against Hugging Face in float32, {parity.samples} "
        f"samples, {parity.tokens} tokens; relative RMS error before rotary embedding",
        markup=False,
    )
    out.print(table)
    if parity.quantization:
        out.print(f"The engine's weights are quantised ({parity.quantization}): the error is theirs, it is not judged.")
    elif parity.own is None:
        out.print(f"{'Equal' if parity.holds else 'NOT EQUAL'}: the limit is {FLOAT32_LIMIT:.0e} in every layer.")
    else:
        verdict = "As exact as" if parity.holds else "LESS EXACT than"
        out.print(f"{verdict} Hugging Face in {parity.dtype}, on the mean over layers.")


def _captured(run: Run, source: ModelSource, tokens: list[Tokens], dtype: str, device: str) -> dict[int, Captured]:
    batch_tokens = run.recipe.extract.batch_tokens
    with HFTeacher.load(source, dtype=dtype, device=device, batch_tokens=batch_tokens) as teacher:
        return {c.index: c for c in teacher.capture(tokens)}
