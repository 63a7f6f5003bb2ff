"""The fused offline pass: one part of a teacher store in, the same part of a target store out.

A part is one dask task. It streams sample by sample: while one is computed, the next is read and the one before is
written, each on a thread of its own; so its memory is that of a few samples. It records the digest of the parent part,
so that a part captured again makes exactly its own targets stale.
"""

from __future__ import annotations

import datetime
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from ..errors import AlignmentError, StageError, StoreNotFoundError
from ..extract import Corpus, CorpusSettings, Encoder, corpus_stamp, load_corpus
from ..hub import ModelSource, find_model, load_tokenizer
from ..store import LOGITS, BackgroundWriter, Derive, ExtraArray, KVSample, KVStore, Manifest, PartReader
from ..store.fingerprint import file_stamp
from .maps.moments import Pair
from .maps.projector import Projector
from .maps.resample import TimeMap, coverage, identity_map, time_map
from .parallel import walk

if TYPE_CHECKING:
    import torch

    from ..extract import Tokens

_WAITING_BYTES: Final = 32 << 20
"""Of computed samples that may wait to be written; one that is larger waits alone."""


@dataclass(frozen=True)
class Transform:
    """What to do to every part; small, and safe to send to another machine that sees the same files."""

    parent: str
    """The store to read."""
    out: str
    """The store to write; it exists."""
    fingerprint: str
    """Of that store: another one in its place is not written to."""
    corpus: CorpusSettings
    student: str
    """The folder with the student's tokenizer."""
    chat_template: bool
    chat_template_date: datetime.date | None
    """Date that the student's chat template prints as today's."""
    resampler: str | None
    """A name in `RESAMPLERS`; None where the parent is on the student's tokens already."""
    across_segments: bool
    projector: str | None
    """The fitted projector; None to change time only."""
    calibration: str = ""
    """What the projector was fitted on, which every part records; empty if on nothing."""

    def __call__(self, part: int) -> int:
        """Writes one part and returns its number.

        Raises:
            StageError: if the store, the projector or the corpus is another one by now.
        """
        parent, out = KVStore.open(self.parent), open_unchanged(self.out, self.fingerprint)
        reader, derive = parent.part(part), self.derive(parent.manifest)
        rows = [name for name, kind in out.manifest.extras.items() if kind.axis == "row"]
        with (
            BackgroundWriter(out, queue_bytes=_WAITING_BYTES, encoders=0) as writer,
            closing(walk(reader, partial(_read, reader, rows), writer.fail)) as samples,
        ):
            writer.begin(part)
            for position, source in samples:
                made, met = derive(source)
                writer.append(position, made, coverage=None if self.resampler is None else met)
            # On the parent's own time axis, how that one met the teacher's is what there is to know.
            known = reader.coverage if self.resampler is None else None
            writer.commit({"parent": reader.content, **self.sources}, coverage=known)
        return part

    @property
    def sources(self) -> dict[str, str]:
        """What every part was made from beside its parent."""
        return {"calibration": self.calibration} if self.calibration else {}

    def derive(self, parent: Manifest) -> Derive:
        """What makes a sample of `out` of a sample of a store with the manifest `parent`.

        Raises:
            StageError: if the corpus changed since.
        """
        corpus = _corpus(self.corpus, corpus_stamp(self.corpus))
        if parent.corpus_digest != corpus.digest:
            raise StageError(f"{self.parent} was made from another corpus than {self.corpus.label} holds now")
        encoder = student_encoder(self.student, self.chat_template, self.chat_template_date)
        projector = None if self.projector is None else load_projector(self.projector)
        if projector is not None and projector.card.get("made_for") != self.fingerprint:
            raise StageError(f"{self.projector} was replaced by that of another run meanwhile; run one at a time")
        extras = open_unchanged(self.out, self.fingerprint).manifest.extras

        def derived(source: KVSample) -> tuple[KVSample, np.ndarray[Any, Any]]:
            record = corpus.find(source.sample_id)
            assert record is not None  # The digests are equal.
            tokens = encoder.encode(record)
            time = self.time_map(source, tokens)
            keys, values = transformed(source, time, projector)
            made = KVSample(
                sample_id=source.sample_id,
                split=source.split,
                keys=keys,
                values=values,
                input_ids=tokens.input_ids,
                positions=tokens.positions,
                spans=tokens.spans,
                segments=tokens.segments,
                mask=time.mask,
                extras={name: carried_over(source, name, kind, tokens) for name, kind in extras.items()},
            )
            return made, coverage(time, source, tokens)

        return derived

    def time_map(self, source: KVSample, tokens: Tokens) -> TimeMap:
        """From the source's tokens to the student's."""
        if self.resampler is not None:
            return time_map(self.resampler, source, tokens, across_segments=self.across_segments)
        if len(source) != len(tokens) or (source.input_ids != tokens.input_ids).any():
            raise StageError(
                f"{self.parent}: sample {source.sample_id!r} is not on this student's tokens; resample it again"
            )
        return identity_map(len(tokens), source.mask)


def _read(reader: PartReader, rows: Sequence[str], position: int) -> KVSample:
    """A sample with those of its extra arrays that are carried on."""
    source = reader.sample(position, extras=False)
    return replace(source, extras=source.extras | {name: reader.read(name, position) for name in rows})


@dataclass(frozen=True)
class Unclaimed:
    """Work on those parts that no other process has made by the time it is their turn."""

    work: Callable[[int], int]
    out: str
    """The store that it writes."""
    fingerprint: str
    """Of that store."""
    output: str
    """Where that store lies once it is complete; `out` itself, unless another output is being replaced."""

    def __call__(self, part: int) -> int:
        """Waits for whoever is at the part, then makes it if it is not there."""
        try:
            store = open_unchanged(self.out, self.fingerprint)
            claim = store.claim(part, wait=True)
        except (StoreNotFoundError, StageError):
            if self.out != self.output and open_unchanged(self.output, self.fingerprint).holds(part):
                return part  # Another process made the last part, and the store took the place of the old one.
            raise
        assert claim is not None
        try:
            return part if store.holds(part) else self.work(part)
        finally:
            claim.release()


def open_unchanged(path: str, fingerprint: str) -> KVStore:
    """The store at `path`.

    Raises:
        StageError: if it is not the one of this fingerprint any more.
    """
    store = KVStore.open(path)
    if store.manifest.fingerprint != fingerprint:
        raise StageError(f"{path} was replaced by that of another run meanwhile; run one at a time")
    return store


def inherited_extras(
    parent: Manifest, tokenizer_digest: str, chat_template_digest: str | None
) -> dict[str, ExtraArray]:
    """What a store on a student's tokens takes over of a teacher's.

    What is known of whole samples, whatever their tokens; and the teacher's logits where its tokens are the student's.

    Args:
        parent: the teacher's.
        tokenizer_digest: of the student's tokenizer.
        chat_template_digest: of the template that the student's samples are wrapped in.
    """
    same = (parent.tokenizer_digest, parent.chat_template_digest) == (tokenizer_digest, chat_template_digest)
    return {name: kind for name, kind in parent.extras.items() if kind.axis == "sample" or (same and name in LOGITS)}


def carried_over(source: KVSample, name: str, kind: ExtraArray, tokens: Tokens) -> np.ndarray[Any, Any]:
    """An extra array of `source` for the student's tokens: those of the teacher, and an end of sequence behind them.

    Raises:
        AlignmentError: if they are others.
    """
    array = source.extras[name]
    if kind.axis == "sample":
        return array
    further = len(tokens) - len(source)
    if further < 0 or (tokens.input_ids[: len(source)] != source.input_ids).any():
        raise AlignmentError(f"sample {source.sample_id!r}: its {name} are of other tokens than the student's")
    return np.concatenate([array, np.full((further, *kind.shape), kind.fill_value, kind.dtype)])


def transformed(source: KVSample, time: TimeMap, projector: Projector | None) -> Pair:
    """Keys and values of `source`, resampled and, if there is a projector, projected; masked rows are zero."""
    import torch

    assert source.keys is not None
    assert source.values is not None
    out, masked = [], torch.from_numpy(np.flatnonzero(~time.mask))
    for name, tensor in (("keys", source.keys), ("values", source.values)):
        moved = time.apply(tensor).float()
        if projector is not None:
            moved = projector.apply(name, moved).index_fill_(0, masked, 0)
        out.append(moved)
    return out[0], out[1]


@dataclass(frozen=True)
class CalibrationSample:
    """A teacher's capture on the student's tokens, in the teacher's geometry."""

    sample_id: str
    tokens: Tokens
    mask: np.ndarray[tuple[int], np.dtype[np.bool_]]
    """`[t]`: tokens that have a target."""
    keys: torch.Tensor
    """`[t, l, h, d]` float32; rows without a target hold no meaning."""
    values: torch.Tensor
    """`[t, l, h, d]` float32."""


def calibration_samples(
    transform: Transform, parent: KVStore, sample_ids: list[str], reference: KVStore | None
) -> Iterator[CalibrationSample | None]:
    """The samples that a projector is fitted and measured on, in order.

    None stands for one that failed on either side, or has no token with a target: so which samples are held out does
    not depend on which failed.
    """
    corpus = _corpus(transform.corpus, corpus_stamp(transform.corpus))
    encoder = student_encoder(transform.student, transform.chat_template, transform.chat_template_date)
    failed = {*parent.failed, *(reference.failed if reference else ())}
    indices = parent.indices_of(sample_ids)
    for sample_id in sample_ids:
        if sample_id in failed:
            yield None
            continue
        index = indices[sample_id]
        source, tokens = parent[index], encoder.encode(corpus.records[index])
        time = transform.time_map(source, tokens)
        found = transformed(source, time, None) if time.mask.any() else None
        yield None if found is None else CalibrationSample(sample_id, tokens, time.mask, *found)


def calibration_pairs(
    transform: Transform, parent: KVStore, sample_ids: list[str], reference: KVStore | None
) -> Iterator[tuple[Pair, Pair | None] | None]:
    """What a projector is fitted on: the teacher's tensors on the student's tokens, with the student's own.

    Only tokens that have a target.
    """
    import torch

    indices = {} if reference is None else reference.indices_of(sample_ids)
    for sample in calibration_samples(transform, parent, sample_ids, reference):
        if sample is None:
            yield None
            continue
        kept = torch.from_numpy(sample.mask)
        own = None
        if reference is not None:
            mine = reference[indices[sample.sample_id]]
            assert mine.keys is not None
            assert mine.values is not None
            own = mine.keys[kept], mine.values[kept]
        yield (sample.keys[kept], sample.values[kept]), own


def student_encoder(folder: str, chat_template: bool, date: datetime.date | None = None) -> Encoder:
    """Return the student's encoder; its samples end with the end of a turn or of the sequence.

    Args:
        folder: that holds the student's tokenizer.
        chat_template: whether samples are wrapped in its chat template.
        date: that the template prints as today's.
    """
    return _encoder(find_model(str(Path(folder).resolve())), chat_template, date)


def load_projector(path: str) -> Projector:
    """The projector at `path`, read again only when it was written again."""
    return _projector(path, _stamp(path))


# A dask worker outlives a run: what it remembers is remembered under the file's stamp too, which a `ModelSource` holds.


def _stamp(path: str) -> tuple[int, ...]:
    file = Path(path).expanduser()
    return file_stamp(file) if file.exists() else ()


@cache
def _corpus(settings: CorpusSettings, stamp: tuple[tuple[int, ...], ...]) -> Corpus:
    return load_corpus(settings)


@cache
def _encoder(source: ModelSource, chat_template: bool, date: datetime.date | None) -> Encoder:
    return Encoder(load_tokenizer(source), chat_template=chat_template, add_eos=True, chat_template_date=date)


@cache
def _projector(path: str, stamp: tuple[int, ...]) -> Projector:
    return Projector.load(Path(path))
