"""A store rewritten under another codec or dtype, part by part.

From one lossless codec to another nothing changes but bytes: the manifest keeps its fingerprint, and a part keeps its
sources and remembers which part's numbers it holds, so that what was made from the original stays up to date when the
rewritten store takes its place. A lossy codec or another dtype makes another store, whose parent the original is.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from ..errors import ManifestMismatchError, RecipeError
from ..store import CODECS, DTYPES, LOSSY, KVStore, Manifest, PartReader, default_page_tokens, library_versions
from ..store.part_exchange import removed_if_empty, replacing_outdated
from .parallel import run_parts, walk


@dataclass(frozen=True)
class Transcoding:
    """What to do to every part; small, and safe to send to another machine that sees the same files."""

    source: str
    """The store to read."""
    out: str
    """The store to write; it exists."""

    def __call__(self, part: int) -> int:
        """Writes one part and returns its number; every chunk's checksum is checked as it is read.

        Raises:
            DamagedStoreError: if the source is damaged.
        """
        source, out = KVStore.open(self.source), KVStore.open(self.out)
        reader = source.part(part)
        with out.write_part(part) as writer, closing(walk(reader, reader.sample, writer.fail)) as samples:
            for position, sample in samples:
                writer.append(position, sample)
            same = source.manifest.fingerprint == out.manifest.fingerprint
            writer.commit(
                reader.sources if same else {"transcoded": reader.content},
                written_by=reader.written_by,
                coverage=reader.coverage,
                content=reader.content if same else None,
            )
        return part

    def holds(self, made: PartReader, source: PartReader) -> bool:
        """Whether a part of `out` was made from this part, as it is now."""
        if made.manifest.fingerprint == source.manifest.fingerprint:
            return made.content == source.content
        return made.sources.get("transcoded") == source.content


def transcoded_manifest(source: Manifest, codec: str, dtype: str) -> Manifest:
    """The manifest of a store rewritten under `codec` in `dtype`.

    Raises:
        RecipeError: if there is no such codec or dtype, or it is the store's own.
    """
    for option, name, known in (("codec", codec, [*CODECS, *LOSSY]), ("dtype", dtype, [*DTYPES])):
        if name not in known:
            raise RecipeError(f"--{option} {name}: there is no such {option}; use one of {', '.join(known)}")
    if (codec, dtype) == (source.codec, source.dtype):
        raise RecipeError(f"the store is {codec}, {dtype} already; name another --codec or --dtype, or copy it")
    if dtype == source.dtype and not {codec, source.codec} & LOSSY.keys():
        return source.model_copy(update={"codec": codec})
    usual, page = (
        default_page_tokens(source.geometry, DTYPES[d].itemsize, c)
        for d, c in ((source.dtype, source.codec), (dtype, codec))
    )
    return source.model_copy(
        update={
            "codec": codec,
            "dtype": dtype,
            # Pages of another size were chosen for what the store holds, as those of slots are.
            "page_tokens": page if source.page_tokens == usual else source.page_tokens,
            "parents": {"transcoded": source.fingerprint},
            "versions": library_versions(),
        }
    )


def transcode_store(
    source: KVStore,
    out: Path,
    codec: str,
    dtype: str | None = None,
    *,
    parts: Collection[int] | None = None,
    scheduler: str | None = None,
    on_part: Callable[[int], None] = lambda part: None,
) -> KVStore:
    """Rewrites the parts of `source` that `out` does not hold yet, or holds as they were before.

    Run again, it goes on where it was stopped, and does nothing where nothing is left to do.

    Args:
        source: the store to read; of one that is not complete, the parts that are written.
        out: where to write.
        codec: a name in `CODECS` or `LOSSY`.
        dtype: a name in `DTYPES`; the source's own if not given.
        parts: only these.
        scheduler: see `run_parts`.
        on_part: called with each part that is done, those found done included.

    Raises:
        RecipeError: if `codec` or `dtype` cannot be, or `out` is the source or lies in it.
        ManifestMismatchError: if `out` holds something else.
        DamagedStoreError: if the source is damaged.
    """
    here = source.path.resolve()
    if here in (out.resolve(), *out.resolve().parents):
        raise RecipeError(f"{out} is the store to read or lies in it; write to a new folder, then exchange the two")
    manifest = transcoded_manifest(source.manifest, codec, dtype or source.manifest.dtype)
    if (out / "zarr.json").exists() and (found := KVStore.open(out).manifest.differences(manifest)):
        fields = "; ".join(f"{name}: {old!r} there, {new!r} now" for name, (old, new) in found.items())
        raise ManifestMismatchError(f"{out} holds something else ({fields}); remove it, or write to a new folder")
    with removed_if_empty(out):
        return _transcode(source, KVStore.create(out, manifest), parts, scheduler, on_part)


def _transcode(
    source: KVStore,
    made: KVStore,
    parts: Collection[int] | None,
    scheduler: str | None,
    on_part: Callable[[int], None],
) -> KVStore:
    work = Transcoding(str(source.path.resolve()), str(made.path.resolve()))
    there = [part for part in source.committed_parts() if parts is None or part in parts]

    def outdated() -> list[int]:
        done = set(made.committed_parts()) & set(there)
        return [part for part in sorted(done) if not work.holds(made.part(part), source.part(part))]

    with replacing_outdated(made, outdated, there):
        done = set(made.committed_parts()) & set(there)
        for part in sorted(done):
            on_part(part)
        run_parts(work, [part for part in there if part not in done], scheduler=scheduler, on_part=on_part)
    return made
