"""Targets straight from a running teacher, for corpora whose captures would not fit on the disk.

What a store would have done to a sample on the way to the disk and back is done in memory, so that the targets are,
bit for bit, those of a capture that was kept: rounding to the capture's dtype, refusing what is not finite, and the
capture's codec if it is a lossy one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import SampleFailedError
from ..extract import CaptureSettings, Corpus, Encoder, Teacher, capture_store
from ..store import DTYPES, LOSSY, Derive, KVSample, KVStore, Manifest
from .transform import Transform

if TYPE_CHECKING:
    import torch


def capture_targets(
    transform: Transform,
    store: KVStore,
    corpus: Corpus,
    encoder: Encoder,
    teacher: Teacher,
    settings: CaptureSettings,
    *,
    parts: Sequence[int],
    on_text: Callable[[int], None],
    limit: str = "",
) -> None:
    """Writes targets of samples as the teacher gives them; see `capture_store`.

    Raises:
        StageError: if the corpus changed since the capture of the calibration.
    """
    import torch

    derive = derive_directly(transform, KVStore.open(transform.parent).manifest)
    threads = torch.get_num_threads()
    try:
        capture_store(
            store,
            corpus,
            encoder,
            teacher,
            settings,
            parts=parts,
            derive=derive,
            sources=transform.sources,
            on_text=on_text,
            limit=limit,
        )
    finally:
        torch.set_num_threads(threads)


def derive_directly(transform: Transform, capture: Manifest) -> Derive:
    """What makes a target of a sample as a teacher gives it.

    Args:
        transform: what is done to every part of a capture that is kept.
        capture: the manifest of that capture, were it kept.

    Raises:
        StageError: if the corpus changed since the capture.
    """
    derive = transform.derive(capture)
    storage, quantizer = DTYPES[capture.dtype], LOSSY.get(capture.codec)
    dtype = storage.torch_dtype

    def derived(sample: KVSample) -> tuple[KVSample, np.ndarray[Any, Any]]:
        import torch

        # As in `run_parts`: products are not the same bits with another number of threads. It counts for the thread
        # that writes, which this is; the teacher computes on its own with as many as before.
        torch.set_num_threads(1)
        assert sample.keys is not None
        assert sample.values is not None
        kv = {"keys": sample.keys.to(dtype), "values": sample.values.to(dtype)}
        for name, tensor in kv.items():
            if bad := _not_finite(tensor):
                raise SampleFailedError(f"non-finite {name} in layers {bad}")
        if quantizer is not None:
            kv = {n: quantizer.round_trip(n, tensor, capture.page_tokens, storage) for n, tensor in kv.items()}
            for name, tensor in kv.items():
                if bad := _not_finite(tensor):
                    raise SampleFailedError(f"{capture.codec} cannot hold the {name} in layers {bad}")
        return derive(replace(sample, keys=kv["keys"], values=kv["values"]))

    return derived


def _not_finite(tensor: torch.Tensor) -> list[int]:
    """The layers of `[t, l, h, d]` whose numbers are not all finite."""
    found: list[int] = (~tensor.isfinite().flatten(2).all(2).all(0)).nonzero().flatten().tolist()
    return found
