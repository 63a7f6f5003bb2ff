"""Every codec on real keys and values: size, CPU time, and what attention makes of the error.

SmolLM2-135M reads items of the demo corpus in bfloat16; its capture is rewritten under each codec. The error of the
attention output is that of `softmax(q kᵀ / √d) v` with the model's own queries, causal, keys rotated after decoding,
of all tokens of a layer together, relative to the lossless one's.

Usage: OMP_NUM_THREADS=1 python benchmarks/codecs.py [SAMPLES]
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from measure import MODEL, errors, fastest, under_codec, with_queries

from kava.store import CODECS, LOSSY, KVStore


def main(samples: str = "40") -> None:
    """Prints one row per codec."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        exact, queries, config = with_queries(root, int(samples), None)
        raw = exact.num_tokens * exact.geometry.bytes_per_token(2)
        print(f"{MODEL}, {len(exact)} samples, {exact.num_tokens} tokens, {exact.geometry}, {raw / 1e6:.0f} MB raw")
        print("MB of raw bfloat16 per CPU second, reading and writing included; errors are relative, over layers")
        print(
            f"{'codec':<11} {'B/token':>8} {'of raw':>7} {'encode':>7} {'decode':>7} {'K mean':>8} {'worst':>7} "
            f"{'V mean':>8} {'worst':>7} {'attention mean':>15} {'worst':>7}"
        )
        for codec in [*CODECS, *LOSSY]:
            store = under_codec(exact, codec)
            tensors = [exact[index] for index in range(len(exact))]
            again = KVStore.create(root / f"{codec}-again", store.manifest)

            def write(again: KVStore = again, tensors: list[Any] = tensors) -> None:
                if again.committed_parts():
                    again.drop_part(0)
                with again.write_part(0) as writer:
                    for position, sample in enumerate(tensors):
                        writer.append(position, sample)
                    writer.commit()

            def read(store: KVStore = store) -> None:
                for index in range(len(store)):
                    store[index]

            encode, decode = raw / 1e6 / fastest(write), raw / 1e6 / fastest(read)
            found = errors(store, exact, queries, config, exact.geometry.num_layers)
            size = store.size_on_disk()
            shown = " ".join(
                f"{found[name].mean():>{width}.4f} {found[name].max():>7.4f}"
                for name, width in (("K", 8), ("V", 8), ("attention", 15))
            )
            print(
                f"{codec:<11} {size / exact.num_tokens:>8.0f} {size / raw:>7.3f} {encode:>7.0f} {decode:>7.0f} {shown}",
                flush=True,
            )


if __name__ == "__main__":
    main(*sys.argv[1:])
