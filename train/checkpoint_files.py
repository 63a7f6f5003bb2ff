"""What a checkpoint may hold, checked before torch loads it.

The Trainer loads its own files with `weights_only`, which runs nothing, but ends in a traceback. Of a sharded
checkpoint, torch unpickles the `.metadata`, and every value that is no tensor, without restriction. All are read here
first, by unpicklers that know the classes of a checkpoint and no other: a run folder from elsewhere runs no code.
"""

from __future__ import annotations

import io
import pickle
from pathlib import Path
from typing import Any, Final

import torch
from transformers.trainer_pt_utils import safe_globals

from ..errors import StageError
from ..store.files import check_regular, read_small
from ..store.safe_json import LOG_BYTES

_ALLOWED: Final = {
    "collections": {"OrderedDict"},
    "pathlib": {"Path", "PosixPath", "PurePosixPath"},
    "torch": {"Size", *(name for name in dir(torch) if isinstance(getattr(torch, name), torch.dtype))},
    "torch.serialization": {"_get_layout"},
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo", "_StoragePrefix"},
    "torch.distributed.checkpoint.metadata": {
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    },
}

_STATES: Final = ("optimizer.pt", "scheduler.pt", "scaler.pt", "rng_state*.pth")
_UNREADABLE: Final = (pickle.UnpicklingError, AttributeError, EOFError, KeyError, TypeError, ValueError, RuntimeError)


def check_checkpoint(folder: Path) -> None:
    """Check that loading a checkpoint can neither run code nor wait for a special file.

    Raises:
        DamagedStoreError: if a link or a special file is in it.
        StageError: if a sharded one names code that no checkpoint needs.
    """
    for path in folder.rglob("*"):
        if path.is_symlink() or not path.is_dir():
            check_regular(path)
    checks = {"*.metadata": _check_shards} | dict.fromkeys(_STATES, _check_state)
    for pattern, check in checks.items():
        for path in folder.rglob(pattern):
            try:
                check(path)
            except _UNREADABLE as error:
                raise StageError(f"{path}: refused: {_reason(error)}. Start over with --force train") from None


def _reason(error: Exception) -> str:
    """Return the one line of torch's message that names what was refused."""
    lines = str(error).splitlines() or [type(error).__name__]
    return next((line.strip().removesuffix(".") for line in lines if " GLOBAL " in line), lines[0])


def _check_state(path: Path) -> None:
    with safe_globals():  # Of NumPy, for the state of its random generator.
        torch.load(path, map_location="cpu", weights_only=True, mmap=True)


def _check_shards(path: Path) -> None:
    from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata

    metadata = _Restricted(io.BytesIO(read_small(path, LOG_BYTES))).load()
    if not isinstance(metadata, Metadata):
        raise ValueError(f"it holds a {type(metadata).__name__}, not the metadata of a checkpoint")
    for index, place in (metadata.storage_data or {}).items():
        if Path(place.relative_path).name != place.relative_path or place.transform_descriptors:
            raise ValueError(f"{place.relative_path!r} is no plain file of the checkpoint")
        if isinstance(metadata.state_dict_metadata[index.fqn], BytesStorageMetadata):
            with (path.parent / place.relative_path).open("rb") as file:
                file.seek(place.offset)
                torch.load(io.BytesIO(file.read(place.length)), weights_only=True)


class _Restricted(pickle.Unpickler):
    """An unpickler of the metadata of a sharded checkpoint."""

    def find_class(self, module: str, name: str) -> Any:
        """Return a class that such metadata is made of.

        Raises:
            pickle.UnpicklingError: for any other.
        """
        if name in _ALLOWED.get(module, ()):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it names {module}.{name}, which would run code")
