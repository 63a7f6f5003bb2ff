"""The store: teacher and target KV caches on disk.

One format, one writer, one reader. A store is a Zarr v3 group whose *parts* hold a fixed number of consecutive samples;
a part is written once, renamed into place, and never changed. This room knows nothing of models, tokenizers or recipes.
See `docs/store-format.md`.
"""

from .codec import CODECS, Codec
from .cpus import num_cpus
from .dtypes import DTYPES, DType
from .extras import LOGITS, ExtraArray
from .fingerprint import cache_folder, digest_file, digest_json
from .geometry import KVGeometry
from .lock import Lock, at_work, claimed, locked
from .manifest import FORMAT_VERSION, Manifest, ModelIdentity, default_page_tokens, library_versions
from .part_reader import PartReader
from .part_writer import PartWriter
from .quantize import LOSSY, Quantizer
from .sample import SEGMENTS, SPLITS, KVBatch, KVSample, Segment, Split, collate
from .store import KVStore
from .verify import Damage, verify_store
from .writer import BackgroundWriter, Derive

__all__ = [
    "CODECS",
    "DTYPES",
    "FORMAT_VERSION",
    "LOGITS",
    "LOSSY",
    "SEGMENTS",
    "SPLITS",
    "BackgroundWriter",
    "Codec",
    "DType",
    "Damage",
    "Derive",
    "ExtraArray",
    "KVBatch",
    "KVGeometry",
    "KVSample",
    "KVStore",
    "Lock",
    "Manifest",
    "ModelIdentity",
    "PartReader",
    "PartWriter",
    "Quantizer",
    "Segment",
    "Split",
    "at_work",
    "cache_folder",
    "claimed",
    "collate",
    "default_page_tokens",
    "digest_file",
    "digest_json",
    "library_versions",
    "locked",
    "num_cpus",
    "verify_store",
]
