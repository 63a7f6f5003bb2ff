"""Finding and reading the files of a corpus: JSON, JSON lines, CSV and Parquet, data sets on disk and on the hub.

A name is local if it exists, has a known ending, a wildcard, or looks like a path; such a name is never looked up on
the hub. Readers stream, and read only the columns that the record's format needs.
"""

from __future__ import annotations

import csv
import glob
import io
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, BinaryIO, Final, cast

from ..errors import CorpusError, HubUnreachableError, KavaError
from ..hub import hub_reachable
from ..lfs import lfs_pointer
from ..store.fingerprint import file_stamp
from .corpus_settings import CorpusSettings
from .strict_json import json_lines, json_records

Row = dict[str, Any]
Rows = Iterator[tuple[str, Row]]
Choose = Callable[[Sequence[str]], list[str]]
"""Chooses the columns to read of a table's columns."""

KINDS: Final = {
    ".jsonl": "lines",
    ".ndjson": "lines",
    ".json": "json",
    ".csv": "csv",
    ".tsv": "csv",
    ".parquet": "parquet",
}
"""Kind of a file by its ending; all but Parquet may be compressed."""
COMPRESSED: Final = (".gz", ".zst")
_BATCH: Final = 1000
_WILDCARDS: Final = frozenset("*?[")


@dataclass(frozen=True)
class Source:
    """One file, or one data set."""

    label: str
    columns: tuple[str, ...] | None
    """All columns of a table; None for objects, each of which has its own keys."""
    rows: Callable[[], Rows]
    """Reads the records, with their place for messages."""


def find_sources(settings: CorpusSettings, paths: Sequence[str], choose: Choose) -> Iterator[Source]:
    """Opens the files and data sets that the names stand for, in order; files of one name are sorted.

    Args:
        settings: subset, split and revision of hub data sets.
        paths: files, globs, folders, hub ids or `hf://` addresses.
        choose: the columns to read of a table.

    Raises:
        CorpusError: if there is none, or it is of no known kind.
        HubUnreachableError: if it is on the hub, and that cannot be reached.
    """
    for name in paths:
        files = _local_files(name)
        if files is None and name.startswith("hf://"):
            yield from _hub_files(settings, name, choose)
        elif files is None:
            yield _data_set(settings, name, choose)
        else:
            for path in files:
                yield _data_set(settings, str(path), choose) if path.is_dir() else _file(path, choose)


def corpus_stamp(settings: CorpusSettings) -> tuple[tuple[int, ...], ...]:
    """A value that changes when a local file of the corpus is written again."""
    paths = list(settings.paths)
    if settings.heldout is not None and settings.heldout.path is not None:
        heldout = settings.heldout.path
        paths += [heldout] if isinstance(heldout, str) else heldout
    files = [path for name in paths for path in _local_files(name) or ()]
    return tuple(file_stamp(path) for path in files)


def _kind(path: Path) -> str | None:
    suffixes = [suffix.lower() for suffix in path.suffixes]
    packed = bool(suffixes) and suffixes[-1] in COMPRESSED
    kind = KINDS.get(suffixes[-2] if packed and len(suffixes) > 1 else suffixes[-1] if suffixes else "")
    return None if packed and kind == "parquet" else kind


def _local_files(name: str) -> list[Path] | None:
    """The local files, or the folder of a saved data set; None if the name is one of the hub."""
    if name.startswith("hf://"):
        return None
    if not name.strip():
        raise CorpusError("corpus: an empty name is no file. Give a file, a glob, a folder or a hub id.")
    if "://" in name:
        raise CorpusError(f"corpus {name}: this kind of address is not read. Give a local path or hf://datasets/NAME.")
    path = Path(name).expanduser()
    with _reading(name if len(name) < 200 else f"{name[:200]}..."):
        if path.is_dir():
            return [path] if _is_saved(path) else _in_folder(path)
        if path.exists():
            return [path]
    if _WILDCARDS & set(name):
        found = sorted(glob.glob(str(path), recursive=True))  # noqa: PTH207 - absolute patterns, too.
        files = [Path(match) for match in found if not Path(match).is_dir()]
        if not files:
            raise CorpusError(f"corpus {name}: no file matches. Change the pattern.")
        return files
    if _kind(path) or name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise CorpusError(f"corpus {name}: No such file or folder. Give an existing path, or a hub id.")
    return None


def _is_saved(folder: Path) -> bool:
    return any((folder / name).exists() for name in ("state.json", "dataset_dict.json"))


def _in_folder(folder: Path) -> list[Path]:
    """The files of a folder and of those in it, which must be of one kind."""
    kinds: dict[str, list[Path]] = {}
    for path in sorted(folder.rglob("*")):
        hidden = any(part.startswith(".") for part in path.relative_to(folder).parts)
        if not hidden and path.is_file() and (kind := _kind(path)):
            kinds.setdefault(kind, []).append(path)
    if not kinds:
        raise CorpusError(f"corpus {folder}: the folder holds no file that ends in {', '.join(KINDS)}. Name a file.")
    if len(kinds) > 1:
        first = ", ".join(str(files[0].relative_to(folder)) for files in kinds.values())
        raise CorpusError(
            f"corpus {folder}: the folder holds files of several kinds ({first}). Name those to read, for example "
            f"{folder}/*{next(iter(kinds.values()))[0].suffix}."
        )
    return next(iter(kinds.values()))


def _file(path: Path, choose: Choose) -> Source:
    kind = _kind(path)
    if pointer := lfs_pointer(path):
        raise CorpusError(f"corpus {path}: {pointer}.")
    if kind == "parquet":
        return _parquet(path, choose)
    if kind is None:
        raise CorpusError(
            f"corpus {path}: files of this ending are not read. Give one of {', '.join(KINDS)}, all but Parquet also "
            f"with {' or '.join(COMPRESSED)}."
        )
    if kind == "csv":
        return Source(str(path), None, lambda: _csv_rows(path))
    read = json_lines if kind == "lines" else json_records

    def rows() -> Rows:
        with _reading(str(path)), _stream(path) as stream:
            yield from read(stream, str(path))

    return Source(str(path), None, rows)


@contextmanager
def _reading(label: str) -> Iterator[None]:
    """Turns what libraries raise over a damaged file into one line."""
    import pyarrow as pa

    try:
        yield
    except KavaError:
        raise
    except OSError as error:
        raise CorpusError(f"corpus {label}: {error.strerror or _first_line(error)}") from None
    except UnicodeDecodeError as error:
        raise CorpusError(f"corpus {label}: cannot be read: {error}. Save the file as UTF-8.") from None
    except (pa.ArrowException, csv.Error, ValueError, OverflowError, EOFError) as error:
        raise CorpusError(f"corpus {label}: cannot be read: {_first_line(error)}. Restore the file.") from None


def _first_line(error: BaseException) -> str:
    return str(error).strip().split("\n")[0] or type(error).__name__


@contextmanager
def _stream(path: Path) -> Iterator[BinaryIO]:
    import pyarrow as pa

    if path.suffix.lower() not in COMPRESSED:
        with path.open("rb") as file:
            yield file
        return
    codec = "gzip" if path.suffix.lower() == ".gz" else "zstd"
    with path.open("rb"):  # A missing file is Python's error, with its reason.
        pass
    with pa.CompressedInputStream(pa.OSFile(str(path)), codec) as stream:
        yield cast("BinaryIO", io.BufferedReader(stream, 1 << 20))


def _csv_rows(path: Path) -> Rows:
    """Records of a CSV file with a header; an empty cell is no value.

    Cells are separated as the header is: Excel writes semicolons where the comma is the decimal point.
    """
    before = csv.field_size_limit(sys.maxsize)
    try:
        with _reading(str(path)), _stream(path) as binary:
            text = io.TextIOWrapper(binary, encoding="utf-8-sig", newline="")
            first = text.readline()
            known = "\t" if ".tsv" in path.suffixes else ",;\t"
            delimiter = next((character for character in known if character in first), known[0])
            lines = csv.reader(chain([first], text), delimiter=delimiter, strict=True)
            header = next(lines, [])
            if twice := next((name for name in header if header.count(name) > 1), None):
                raise CorpusError(f"{path} line 1: column {twice!a} occurs twice. Rename one.")
            for cells in lines:
                where = f"{path} line {lines.line_num}"
                if not cells:
                    continue
                if len(cells) != len(header):
                    raise CorpusError(f"{where}: {len(cells)} cells under {len(header)} columns. Quote the cells.")
                yield where, {name: cell for name, cell in zip(header, cells, strict=True) if cell}
    finally:
        csv.field_size_limit(before)


def _parquet(path: Path, choose: Choose) -> Source:
    import pyarrow.parquet as pq

    with _reading(str(path)), pq.ParquetFile(path) as file:
        names = tuple(file.schema_arrow.names)

    def rows() -> Rows:
        number = 0
        with _reading(str(path)), pq.ParquetFile(path) as file:
            for batch in file.iter_batches(_BATCH, columns=choose(names)):
                for row in _values(batch, f"{path} rows {number + 1} to {number + len(batch)}"):
                    number += 1
                    yield f"{path} row {number}", row

    return Source(str(path), names, rows)


def _values(batch: Any, where: str) -> list[Row]:
    """Rows of a record batch or table as Python values."""
    try:
        return cast("list[Row]", batch.to_pylist())
    except (ValueError, OverflowError) as error:
        raise CorpusError(f"{where}: a value cannot be read: {_first_line(error)}. Repair the file.") from None


def _data_set(settings: CorpusSettings, name: str, choose: Choose) -> Source:
    """A data set of the hub, or one that `datasets` saved in a folder."""
    folder = Path(name).expanduser()
    saved = folder.is_dir()
    offline = not saved and not hub_reachable()
    import datasets

    try:
        if saved:
            data = datasets.load_from_disk(str(folder))
            data = data[settings.hub_split_name] if isinstance(data, datasets.DatasetDict) else data
        else:
            data = datasets.load_dataset(
                name, settings.subset, split=settings.hub_split_name, revision=settings.revision
            )
    except Exception as error:
        if offline:
            raise HubUnreachableError(name) from None
        raise CorpusError(
            f"corpus {name!r} cannot be loaded: {_first_line(error)}. Give a file, a saved data set or a hub id."
        ) from None
    names = tuple(data.column_names)

    def rows() -> Rows:
        number = 0
        chosen = data.select_columns(choose(names)).with_format("arrow")  # Arrow: no image is decoded, no date made.
        with _reading(name):
            for table in chosen.iter(_BATCH):
                for row in _values(table, f"{name} rows {number + 1} to {number + len(table)}"):
                    number += 1
                    yield f"{name} row {number}", row

    return Source(name, names, rows)


def _hub_files(settings: CorpusSettings, address: str, choose: Choose) -> Iterator[Source]:
    """Files of a hub data set by address: `hf://datasets/OWNER/NAME[@REVISION][/FILE, FOLDER OR GLOB]`."""
    parts = address.removeprefix("hf://").split("/")
    if parts[0] != "datasets" or len(parts) < 3:
        raise CorpusError(f"corpus {address}: write hf://datasets/OWNER/NAME or hf://datasets/OWNER/NAME/FILE.")
    name, _, revision = "/".join(parts[1:3]).partition("@")
    inner = "/".join(parts[3:])
    if settings.revision and revision and revision != settings.revision:
        raise CorpusError(f"corpus {address}: corpus.revision is {settings.revision!r}. Give one revision.")
    settings = settings.model_copy(update={"revision": revision or settings.revision})
    if not inner:
        yield _data_set(settings, name, choose)
        return
    offline = not hub_reachable()
    from huggingface_hub import snapshot_download

    try:
        folder = snapshot_download(
            name,
            repo_type="dataset",
            revision=settings.revision,
            allow_patterns=[inner, f"{inner}/*"],
            local_files_only=offline,
        )
    except Exception as error:
        if offline:
            raise HubUnreachableError(name) from None
        raise CorpusError(f"corpus {address}: {_first_line(error)}. Check the address and your access.") from None
    for path in _local_files(str(Path(folder) / inner)) or ():
        yield _file(path, choose)
