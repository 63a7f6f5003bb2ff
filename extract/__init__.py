"""From a corpus and a teacher to a store of keys and values.

`corpus` reads records (`files` finds them, `formats` names their segments), `tokens` turns a record into token ids with
UTF-8 byte spans, `hf` and `vllm` run a teacher, `capture` is the loop from one to the other. This room knows nothing of
students or recipes.
"""

from .capture import CaptureSettings, capture_store
from .corpus import Corpus, CorpusSettings, Record, corpus_stamp, load_corpus
from .teacher import Captured, Teacher
from .tokens import Encoder, Tokens

__all__ = [
    "CaptureSettings",
    "Captured",
    "Corpus",
    "CorpusSettings",
    "Encoder",
    "Record",
    "Teacher",
    "Tokens",
    "capture_store",
    "corpus_stamp",
    "load_corpus",
]
