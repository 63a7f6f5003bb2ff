"""kava: distil the KV cache of large teacher LLMs into a small student, offline.

The rooms, and the one direction in which they import each other::

    pipeline ──> train ───┐
        │                 ├──> hub, tap ──> store ──> errors
        └─────> extract ──┘

* `kava.store`: the on-disk format, its one writer and its one reader.
* `kava.extract`: corpora, token spans, teachers, the capture loop.
* `kava.pipeline`: the recipe, the offline transforms, the stages, the command line.
* `kava.train`: the student, the cached targets, the losses, the Trainer.
* `kava.hub` and `kava.tap`: loading Hugging Face models and reading their keys and values,
  shared by teacher capture and student training.
"""

from .errors import KavaError

__all__ = ["KavaError", "__version__"]

__version__ = "0.1.0"
