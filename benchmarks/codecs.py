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
from smollm import MODEL, captured, fastest, under_codec

from kava.extract.hf import HFTeacher
from kava.extract.rope import rotary_tables
from kava.store import CODECS, LOSSY, KVStore
from kava.tap import KVTap, decoder


def capture(root: Path, samples: int) -> tuple[KVStore, list[torch.Tensor], Any]:
    """The capture, uncompressed; the queries `[t, l, h, d]` of each sample; the model's config."""
    queries, configs = [], []

    def look(teacher: HFTeacher, store: KVStore) -> None:
        model = teacher.model
        configs.append(model.config)
        for sample in store:
            with torch.inference_mode(), KVTap(model, queries=True) as tap:
                decoder(model)(input_ids=torch.from_numpy(sample.input_ids).long()[None], use_cache=False)
            queries.append(torch.stack([tap.queries[layer][0] for layer in sorted(tap.queries)], dim=1))

    return captured(root, samples, None, look), queries, configs[0]


def attention(queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """Causal attention's output `[t, h, d]` of one layer, in float32; heads of keys and values are shared."""
    tokens, heads, width = queries.shape
    keys, values = (t.repeat_interleave(heads // t.shape[1], dim=1) for t in (keys, values))
    scores = torch.einsum("qhd,khd->hqk", queries, keys) / width**0.5
    scores.masked_fill_(torch.ones(tokens, tokens, dtype=torch.bool).triu(1), float("-inf"))
    return torch.einsum("hqk,khd->qhd", scores.softmax(-1), values)


def errors(store: KVStore, exact: KVStore, queries: list[torch.Tensor], config: Any) -> dict[str, torch.Tensor]:
    """Relative L2 error of keys, values and attention output, `[l]` each."""
    layers = store.geometry.num_layers
    off, size = ({n: torch.zeros(layers, dtype=torch.float64) for n in ("K", "V", "attention")} for _ in range(2))
    for mine, theirs, query in zip(store, exact, queries, strict=True):
        tables = rotary_tables(config, torch.from_numpy(theirs.positions))
        kv = [t.float() for t in (mine.keys, mine.values, theirs.keys, theirs.values) if t is not None]
        for layer, table in enumerate(tables):
            keys, values, exact_keys, exact_values = (t[:, layer] for t in kv)
            turned = table.rotate(query[:, layer].float())
            pairs = {
                "K": (keys, exact_keys),
                "V": (values, exact_values),
                "attention": (
                    attention(turned, table.rotate(keys), values),
                    attention(turned, table.rotate(exact_keys), exact_values),
                ),
            }
            for name, (found, wanted) in pairs.items():
                off[name][layer] += (found - wanted).double().square().sum()
                size[name][layer] += wanted.double().square().sum()
    return {name: (off[name] / size[name]).sqrt() for name in off}


def main(samples: str = "40") -> None:
    """Prints one row per codec."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        exact, queries, config = capture(root, int(samples))
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
            found = errors(store, exact, queries, config)
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
