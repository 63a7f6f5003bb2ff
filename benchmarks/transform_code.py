"""Whether a transform code earns its place beside `int8` and `int4`: keys and values in their principal components.

In the manner of KVTC (a transform fitted on calibration text, bits allotted by variance, an entropy coder): each
layer's keys, and values, are turned onto principal components that are fitted on two thirds of the samples, and every
component is rounded with one and the same step. That is reverse water-filling: components below the step get no bits,
the others half the logarithm of their variance. The last third is coded. First tokens are exact, as in kava's own lossy
codecs.

Sizes: what an ideal coder of independent components would take (their empirical entropy), and what zstd makes of the
codes in pages of 64 tokens. The same samples under kava's codecs are beside them.

Usage: OMP_NUM_THREADS=1 python benchmarks/transform_code.py [SAMPLES] [CORPUS]
"""

from __future__ import annotations

import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Final

import numpy as np
import torch
from measure import MODEL, errors, under_codec, with_queries
from numcodecs import Blosc

from kava.store import LOSSY, KVSample
from kava.store.quantize import EXACT_TOKENS

STEPS: Final = (0.0025, 0.005, 0.01, 0.02, 0.04, 0.08)
PAGE: Final = 64


def components(samples: list[KVSample], name: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean `[l, w]` and orthonormal components `[l, w, w]` of keys or values, largest variance first."""
    rows = torch.cat([getattr(sample, name)[EXACT_TOKENS:].flatten(2) for sample in samples]).double().transpose(0, 1)
    mean = rows.mean(1)
    centred = rows - mean[:, None]
    _, vectors = torch.linalg.eigh(centred.transpose(1, 2) @ centred)
    return mean.float(), vectors.flip(2).float()


def coded(
    samples: list[KVSample], name: str, basis: tuple[torch.Tensor, torch.Tensor], step: torch.Tensor
) -> list[torch.Tensor]:
    """Each sample's codes `[t, l, w]`, integers, for a step per layer `[l]`."""
    mean, vectors = basis
    rows = [getattr(sample, name)[EXACT_TOKENS:].flatten(2).float() - mean for sample in samples]
    return [torch.einsum("tlw,lwc->tlc", row, vectors).div(step[:, None]).round() for row in rows]


def decoded(
    samples: list[KVSample],
    name: str,
    codes: list[torch.Tensor],
    basis: tuple[torch.Tensor, torch.Tensor],
    step: torch.Tensor,
) -> list[torch.Tensor]:
    """Keys or values `[t, l, h, d]` as they would be read, in bfloat16."""
    mean, vectors = basis
    out = []
    for sample, code in zip(samples, codes, strict=True):
        exact = getattr(sample, name)
        rows = torch.einsum("tlc,lwc->tlw", code * step[:, None], vectors) + mean
        made = rows.to(torch.bfloat16).view(-1, *exact.shape[1:])
        out.append(torch.cat([exact[:EXACT_TOKENS], made]))
    return out


def entropy_bytes(codes: list[torch.Tensor]) -> float:
    """Of an ideal coder that knows how often each component of each layer takes each value."""
    total = 0.0
    for column in torch.cat(codes).flatten(1).to(torch.int32).numpy().T:
        _, counts = np.unique(column, return_counts=True)
        total -= float((counts * np.log2(counts / counts.sum())).sum()) / 8
    return total


def zstd_bytes(codes: list[torch.Tensor]) -> int:
    """Of pages of tokens, component by component, their two bytes apart."""
    codec, total = Blosc("zstd", 1, Blosc.SHUFFLE), 0
    for code in codes:
        rows = code.to(torch.int16).flatten(1).numpy()
        for begin in range(0, len(rows), PAGE):
            total += len(codec.encode(np.ascontiguousarray(rows[begin : begin + PAGE].T)))
    return total


def main(count: str = "60", corpus: str | None = None) -> None:
    """Prints one row for each of kava's lossy codecs and for each step."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        exact, queries, config = with_queries(Path(folder), int(count), None if corpus is None else Path(corpus))
        layers, fitted = exact.geometry.num_layers, 2 * len(exact) // 3
        calibration, rest = [exact[i] for i in range(fitted)], [exact[i] for i in range(fitted, len(exact))]
        raw = sum(map(len, rest)) * exact.geometry.bytes_per_token(2)
        print(f"{MODEL}: components of {sum(map(len, calibration))} tokens; {sum(map(len, rest))} tokens coded")
        print(f"{'':<18} {'entropy / raw':>14} {'stored / raw':>13} {'K error':>8} {'V error':>8} {'attention':>10}")

        def show(name: str, ideal: str, stored: float, samples: list[KVSample]) -> None:
            found = errors(samples, rest, queries[fitted:], config, layers)
            shown = f"{found['K'].mean():>8.4f} {found['V'].mean():>8.4f} {found['attention'].mean():>10.4f}"
            print(f"{name:<18} {ideal:>14} {stored:>13.3f} {shown}", flush=True)

        for codec in LOSSY:
            store = under_codec(exact, codec)
            stored = store.size_on_disk() / (exact.num_tokens * exact.geometry.bytes_per_token(2))
            show(codec, "", stored, [store[i] for i in range(fitted, len(exact))])
        bases = {name: components(calibration, name) for name in ("keys", "values")}
        first = sum(2 * sample.keys[:EXACT_TOKENS].numel() * 2 for sample in rest if sample.keys is not None)
        for share in STEPS:
            ideal, stored, made = float(first), float(first), {}
            for name, basis in bases.items():
                rows = torch.cat([getattr(sample, name)[EXACT_TOKENS:].flatten(2) for sample in calibration]).float()
                step = share * rows.square().mean((0, 2)).sqrt() * 12**0.5
                codes = coded(rest, name, basis, step)
                ideal, stored = ideal + entropy_bytes(codes), stored + zstd_bytes(codes)
                made[name] = decoded(rest, name, codes, basis, step)
            samples = [
                replace(sample, keys=keys, values=values)
                for sample, keys, values in zip(rest, made["keys"], made["values"], strict=True)
            ]
            show(f"components, {share:g}", f"{ideal / raw:.3f}", stored / raw, samples)


if __name__ == "__main__":
    main(*sys.argv[1:])
