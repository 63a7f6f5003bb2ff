"""`kava inspect`: a store, for a person."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from ...errors import StoreError
from ...extract.signals import CONFIDENCE
from ...store import KVSample, KVStore, Segment, Split
from ...terminal import printable
from .align import print_alignment

if TYPE_CHECKING:
    from ..run import Run


def inspect_store(
    path: Path, out: Console, *, sample: str | None, align: str | None, recipe: Path | None, as_json: bool
) -> None:
    """Prints a store's manifest, sizes and statistics, or one sample's tokens, alone or against the teacher's."""
    store = KVStore.open(path)
    if align is not None:
        print_alignment(store, _find(store, align), _run_of(path, recipe), out)
        return
    if sample is not None:
        _print_sample(store, _find(store, sample), _run_of(path, recipe), out)
        return
    facts = _facts(store)
    if as_json:
        manifest = store.manifest.model_dump(mode="json")
        statistics = {name: values.tolist() for name, values in store.statistics().items()}
        out.print_json(
            json.dumps({"manifest": manifest, "facts": facts, "statistics": statistics, "failed": store.failed})
        )
        return
    _print_store(store, facts, out)


def _facts(store: KVStore) -> dict[str, Any]:
    lengths, segments = store.lengths, np.zeros(len(Segment), np.int64)
    samples, target_tokens, parts = dict.fromkeys(Split, 0), 0, store.committed_parts()
    for part in map(store.part, parts):
        segments += part.tokens_by_segment()
        target_tokens += part.target_tokens
        for split in Split:
            samples[split] += int((part.splits == int(split)).sum())
    real = lengths[lengths > 0]
    raw = int(real.sum()) * store.geometry.bytes_per_token(store.dtype.itemsize)
    disk = store.size_on_disk()
    return {
        "parts": f"{len(parts)} of {store.manifest.num_parts}",
        "samples": {split.name.lower(): count for split, count in samples.items()},
        "failed": len(store.failed),
        "tokens": int(real.sum()),
        "tokens_with_target": target_tokens,
        "tokens_per_sample": [int(real.min()), int(np.median(real)), int(real.max())] if len(real) else [],
        "tokens_by_segment": {
            s.name.lower(): int(segments[s]) for s in Segment if s and (segments[s] or s is not Segment.TURN)
        },
        "coverage": store.coverage(),
        "written_by": store.written_by,
        "bytes_per_token": store.geometry.bytes_per_token(store.dtype.itemsize),
        "bytes_on_disk": disk,
        "disk_to_raw": round(disk / raw, 3) if raw else None,
        "extras": {name: [kind.axis, kind.dtype, *kind.shape] for name, kind in store.manifest.extras.items()},
        "confidence": _confidence(store),
        "fused": _weights(store),
    }


def _confidence(store: KVStore) -> dict[str, float] | None:
    """Loss and entropy over all predicted tokens of a capture that has them, in nats."""
    if not {*CONFIDENCE} <= store.manifest.extras.keys():
        return None
    nats, tokens, size, entropy = (store.per_sample(name) for name in CONFIDENCE)
    count, total = np.nansum(tokens), np.nansum(nats)
    if not count:
        return None
    return {
        "nats_per_byte": round(float(total / np.nansum(size)), 4),
        "nats_per_token": round(float(total / count), 4),
        "entropy_per_token": round(float(np.nansum(entropy * tokens) / count), 4),
        "predicted_tokens": int(count),
    }


def _weights(store: KVStore) -> dict[str, float] | None:
    """The average weight of each teacher in fused targets."""
    how = store.manifest.parameters.get("fuse")
    if how is None:
        return None
    weights = store.per_sample("weights")
    counted = weights[~np.isnan(weights).any(1)]
    return dict(zip(how["teachers"], counted.mean(0).tolist() if len(counted) else [], strict=False))


def _print_store(store: KVStore, facts: dict[str, Any], out: Console) -> None:
    m = store.manifest
    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_column(style="bold")
    rope = ", ".join(f"{k} {v}" for k, v in m.model.rope.items() if not isinstance(v, dict)) or "none stated"
    spread = "{} to {}, median {}".format(*[(facts["tokens_per_sample"] or [0, 0, 0])[i] for i in (0, 2, 1)])
    disk = facts["bytes_on_disk"] / 1e6
    weights = m.model.revision or m.model.weights_digest or "no revision"
    rows = {
        "store": str(store.path),
        "kind": m.kind,
        "model": f"{m.model.id} ({weights}), computed in {m.model.compute_dtype}",
        "geometry": str(m.geometry),
        "keys": f"before rotary embedding; the model rotates with: {rope}",
        "stored as": f"{m.dtype}, codec {m.codec}, pages of {m.page_tokens} tokens, parts of {m.samples_per_part}",
        "parts": facts["parts"],
        "samples": ", ".join(f"{count} {name}" for name, count in facts["samples"].items())
        + f", {facts['failed']} failed",
        "tokens": f"{facts['tokens']:,} ({facts['tokens_with_target']:,} with K/V), per sample {spread}",
        "segments": ", ".join(f"{count:,} {name}" for name, count in facts["tokens_by_segment"].items()),
        "coverage": ", ".join(
            f"{name} {matched / text:.1%} ({together / text:.1%} end with a token of the teacher)"
            for name, (text, matched, together) in facts["coverage"].items()
        )
        or ("that of the targets it is fused from" if facts["fused"] else "not resampled"),
        "fused": "no"
        if facts["fused"] is None
        else f"by {m.parameters['fuse']['weights']}, average weights "
        + ", ".join(f"{name} {weight:.3f}" for name, weight in facts["fused"].items()),
        "size": f"{disk:.1f} MB, {facts['disk_to_raw']} of {facts['bytes_per_token']:,} B/token raw",
        "arrays": ", ".join(f"{n} ({dtype} per {axis})" for n, (axis, dtype, *_) in facts["extras"].items())
        or "keys and values alone",
        "confidence": "not captured"
        if facts["confidence"] is None
        else "{nats_per_byte} nats per byte, {nats_per_token} per token; mean entropy {entropy_per_token}".format(
            **facts["confidence"]
        ),
        "made with": ", ".join(f"{name} {version}" for name, version in m.versions.items()),
        "written by": "; ".join(f"{who} ({count} parts)" for who, count in facts["written_by"].items())
        or "what its parents were",
        "parameters": json.dumps(m.parameters) if m.parameters else "none",
        "parents": ", ".join(f"{name} {fingerprint}" for name, fingerprint in m.parents.items()) or "none",
        "tokenizer": m.tokenizer_digest,
        "corpus": m.corpus_digest,
        "fingerprint": m.fingerprint,
    }
    for name, value in rows.items():
        table.add_row(name, escape(value))
    out.print(table)
    if facts["tokens_with_target"]:
        statistics = store.statistics()
        layers = Table("layer", "keys mean", "keys std", "values mean", "values std", box=None, pad_edge=False)
        for layer in range(store.geometry.num_layers):
            columns = ("keys_mean", "keys_std", "values_mean", "values_std")
            layers.add_row(str(layer), *(f"{statistics[name][layer]:.4f}" for name in columns))
        out.print()
        out.print(layers)
    for sample_id, reason in store.failed.items():
        out.print(f"failed: {sample_id}: {reason}", markup=False, style="yellow")


def _print_sample(store: KVStore, index: int, run: Run | None, out: Console) -> None:
    sample = store[index]
    assert sample.keys is not None
    assert sample.values is not None
    text, tokenizer = _text_and_tokenizer(store, sample, run)
    out.print(f"sample {index}, id {sample.sample_id}, {sample.split.name.lower()}, {len(sample)} tokens", markup=False)
    keys, values = (t.float().flatten(2).norm(dim=-1).mean(1).tolist() for t in (sample.keys, sample.values))
    more = _columns(sample)
    columns = ("row", "id", "token", "span", "text", "segment", "target", "|k|", "|v|", *more)
    table = Table(*columns, box=None, pad_edge=False)
    for row in range(len(sample)):
        start, stop = sample.spans[row].tolist()
        number = int(sample.input_ids[row])
        token = "" if tokenizer is None or number < 0 else repr(tokenizer.convert_ids_to_tokens(number))
        table.add_row(
            str(row),
            str(sample.input_ids[row]),
            escape(printable(token)),
            f"{start}-{stop}" if stop > start else "",
            ""
            if text is None or stop == start
            else escape(printable(repr(text[start:stop].decode("utf-8", "replace")))),
            Segment(int(sample.segments[row])).name.lower(),
            "yes" if sample.mask[row] else "no",
            f"{keys[row]:.2f}",
            f"{values[row]:.2f}",
            *(column[row] for column in more.values()),
        )
    wide = out if out.is_terminal else Console(width=400, highlight=False)  # In a file or a pipe nothing is cut.
    wide.print(table)


def _columns(sample: KVSample) -> dict[str, list[str]]:
    """What extra arrays of rows say, over all layers and heads."""
    found: dict[str, list[str]] = {}
    if "importance" in sample.extras:
        means = sample.extras["importance"].mean((1, 2)).tolist()
        found["importance"] = ["" if np.isnan(mean) else f"{mean:.4f}" for mean in means]
    if "indices" in sample.extras:
        flat = sample.extras["indices"].reshape(len(sample), -1)
        ends = zip(flat.min(1).tolist(), flat.max(1).tolist(), strict=True)
        found["tokens"] = ["" if first < 0 else f"{first}..{final}" for first, final in ends]
    return found


def _find(store: KVStore, sample: str) -> int:
    if indices := store.indices_of([sample]):
        return indices[sample]
    if sample.lstrip("-").isdigit() and -len(store) <= int(sample) < len(store):
        return int(sample) % len(store)
    raise StoreError(f"{store.path}: there is no sample {sample!r}; give a number below {len(store)} or an id")


def _run_of(path: Path, recipe: Path | None) -> Run | None:
    """Return the run that the store belongs to: by the recipe given, or the one saved in the run's folder."""
    from ..found_recipe import find_recipe, load_found_recipe
    from ..recipe import load_recipe
    from ..run import Run

    if recipe is not None:
        return Run(load_recipe(recipe))
    beside = find_recipe(path.resolve().parent, path.resolve().parent.parent)
    return None if beside is None else Run(load_found_recipe(beside))


def _text_and_tokenizer(store: KVStore, sample: KVSample, run: Run | None) -> tuple[bytes | None, Any]:
    if run is None:
        return None, None
    from ...hub import load_tokenizer, tokenizer_digest

    record = run.corpus.find(sample.sample_id)
    sources = [run.teacher_source(name) for name in run.recipe.teachers]
    sources += [run.student_source] if run.student_dir.is_dir() else []
    tokenizers = (load_tokenizer(source) for source in sources)
    wanted = store.manifest.tokenizer_digest
    tokenizer = next((t for t in tokenizers if tokenizer_digest(t) == wanted), None)
    return None if record is None else record.text.encode(), tokenizer
