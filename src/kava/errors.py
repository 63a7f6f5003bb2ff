"""Everything that can go wrong for a user, as one tree.

Each error is also the builtin it resembles, so that code which does not know kava can still catch it. A message says
what is wrong, where, and how to mend it, in one line; the command line prints it alone and leaves with `exit_code`::

    KavaError                     2
    ├── RecipeError               2   ValueError        a key or value of the recipe
    │   └── BrokenRecipeError     2                     all that the preflight refuses
    ├── CorpusError               2   ValueError        a record, a line, a field
    ├── AlignmentError            2   ValueError        tokens, spans, indices, layers or heads that do not fit
    ├── UnsupportedModelError     2   NotImplementedError
    ├── ModelNotFoundError        2   FileNotFoundError
    │   └── HubUnreachableError   2                     not in the local cache, and there is no network
    ├── CheckpointError           2   ValueError        weights or a tokenizer that are not those of the model
    ├── BackendNotInstalledError  2   ImportError       the engine that the recipe asks for, or its version
    ├── CaptureError              1   RuntimeError      an engine did not deliver every row exactly once
    ├── NothingCapturedError      1   RuntimeError      every sample of a store failed
    ├── TrainingError             1   ArithmeticError   a loss or gradient that is not finite
    ├── StoreError                2   ValueError
    │   ├── StoreNotFoundError    2   FileNotFoundError
    │   ├── StoreFormatError      2                     a store of an older or a newer format
    │   ├── ManifestMismatchError 2                     a store of other content, naming every differing field
    │   ├── SampleFailedError     2   LookupError       this sample has no K/V; the reason was recorded
    │   └── DamagedStoreError     1   OSError           bytes on disk are not what was written
    ├── StageError                2   RuntimeError      a stage whose inputs are not there
    └── RetryLaterError           75  OSError           disk full and the like: run the same command again later
        └── BusyError             75                    another process makes just this
"""

from __future__ import annotations

import signal
from typing import Final, Self

EXIT_FAULT = 1
EXIT_USER = 2
EXIT_RETRY = 75
STOP_SIGNALS: Final = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
"""What ends a command with `EXIT_RETRY`: what cluster schedulers send some time before they kill, and Ctrl-C."""


class KavaError(Exception):
    """Base of all errors that are the user's to mend."""

    exit_code: int = EXIT_USER
    agreed: bool = False
    """Whether all processes that train together raise it, so that it is enough if the first one tells."""


class RecipeError(KavaError, ValueError):
    """A key or a value of the recipe is wrong."""


class BrokenRecipeError(RecipeError):
    """A recipe that the preflight refuses, with every problem; see `kava.pipeline.preflight`."""

    def __init__(self, *problems: str) -> None:
        super().__init__(*problems)
        self.problems = problems

    def __str__(self) -> str:
        return "\n".join(self.problems)


class CorpusError(KavaError, ValueError):
    """A record of the corpus is wrong."""


class AlignmentError(KavaError, ValueError):
    """Tokens, spans, indices, layers or heads do not fit each other."""


class UnsupportedModelError(KavaError, NotImplementedError):
    """It is not known where this architecture keeps its pre-RoPE keys."""


class ModelNotFoundError(KavaError, FileNotFoundError):
    """A model or tokenizer could not be found or loaded."""


class HubUnreachableError(ModelNotFoundError):
    """The hub cannot be reached and what is wanted is not in the local cache."""

    def __init__(self, name: str) -> None:
        super().__init__(
            f"{name!r} is not in the local cache (HF_HOME) and the hub cannot be reached; fetch it on a node with "
            "network, or name a local folder"
        )
        self.name = name

    def __reduce__(self) -> tuple[type[HubUnreachableError], tuple[str]]:
        """From another process it comes back by its name; the text is made of that."""
        return type(self), (self.name,)


class CheckpointError(KavaError, ValueError):
    """A model's weights or tokenizer are incomplete, damaged, or not those of its config."""


class BackendNotInstalledError(KavaError, ImportError):
    """The engine that the recipe asks for is not installed, or not in a version that is supported."""


class CaptureError(KavaError, RuntimeError):
    """An engine did not deliver every row of a prompt exactly once, or not of the tokens it was given."""

    exit_code = EXIT_FAULT


class NothingCapturedError(KavaError, RuntimeError):
    """Every sample of a store failed."""

    exit_code = EXIT_FAULT


class TrainingError(KavaError, ArithmeticError):
    """The loss or its gradient is infinite or not a number."""

    exit_code = EXIT_FAULT


class StoreError(KavaError, ValueError):
    """A store cannot be read or written as asked."""

    def __new__(cls, *args: object) -> Self:
        """ValueError's own cannot make those that are also an OSError, as tblib asks of it for dask."""
        maker = OSError if issubclass(cls, OSError) else ValueError
        return maker.__new__(cls, *args)


class StoreNotFoundError(StoreError, FileNotFoundError):
    """There is no store, or no such part of it, at this path."""


class StoreFormatError(StoreError):
    """A store of an older or a newer format."""


class ManifestMismatchError(StoreError):
    """A store at this path holds other content."""


class PartExistsError(StoreError, FileExistsError):
    """Another process has written this part meanwhile; it was kept."""


class SampleFailedError(StoreError, LookupError):
    """The sample was recorded as failed and has no keys and values."""


class DamagedStoreError(StoreError, OSError):
    """Bytes on disk are not the bytes that were written."""

    exit_code = EXIT_FAULT


class StageError(KavaError, RuntimeError):
    """A stage cannot run because its inputs are missing or do not match."""


class RetryLaterError(KavaError, OSError):
    """The machine, not the input, stands in the way; the same command may be run again later."""

    exit_code = EXIT_RETRY


class BusyError(RetryLaterError):
    """Another process makes what this one was to make, and it cannot be split."""
