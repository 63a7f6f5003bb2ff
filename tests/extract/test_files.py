"""Files of a corpus: kinds, names, damage, and what is not read of them."""

from __future__ import annotations

import datetime
import gzip
import json
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from kava.errors import CorpusError, HubUnreachableError
from kava.extract import Corpus, CorpusSettings, corpus_stamp, load_corpus

ROWS = [{"id": f"r{n}", "prompt": f'{n}. Où?\n"x", y', "answer": f"{n}", "other": n} for n in range(5)]
LINES = "\n".join(json.dumps(row) for row in ROWS).encode()


def _load(path: Any, **settings: Any) -> Corpus:
    return load_corpus(CorpusSettings.model_validate({"path": path, **settings}))


def _zstd(data: bytes) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(data)
    return bytes(sink.getvalue())


def _csv(delimiter: str) -> bytes:
    import csv
    import io

    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, list(ROWS[0]), delimiter=delimiter)
    writer.writeheader()
    writer.writerows(ROWS)
    return text.getvalue().encode()


def _parquet(rows: list[Any]) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_pylist(rows), sink)
    return bytes(sink.getvalue())


FILES: dict[str, Callable[[], bytes]] = {
    "c.jsonl": lambda: LINES,
    "c.ndjson": lambda: b"\xef\xbb\xbf" + LINES.replace(b"\n", b"\r\n\r\n"),
    "c.jsonl.gz": lambda: gzip.compress(LINES[: len(LINES) // 2]) + gzip.compress(LINES[len(LINES) // 2 :]),
    "c.jsonl.zst": lambda: _zstd(LINES),
    "c.json": lambda: json.dumps(ROWS, indent=2).encode(),
    "d.json": lambda: b"\xef\xbb\xbf" + LINES,
    "c.json.gz": lambda: gzip.compress(json.dumps(ROWS, ensure_ascii=False).encode()),
    "c.csv": lambda: b"\xef\xbb\xbf" + _csv(","),
    "c.csv.zst": lambda: _zstd(_csv(",")),
    "c.tsv": lambda: _csv("\t"),
    "c.parquet": lambda: _parquet(ROWS),
}


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Any look at the hub fails."""

    def refuse(*arguments: Any, **options: Any) -> Any:
        raise AssertionError(f"the network was asked: {arguments}")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr("kava.extract.files.hub_reachable", refuse)


@pytest.mark.usefixtures("no_network")
@pytest.mark.parametrize("name", FILES)
def test_every_kind_of_file_gives_the_same_corpus(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(FILES[name]())
    (tmp_path / "plain.jsonl").write_bytes(LINES)
    corpus = _load(str(tmp_path / name))
    assert [record.sample_id for record in corpus.records] == [row["id"] for row in ROWS]
    assert corpus.digest == _load(str(tmp_path / "plain.jsonl")).digest
    assert corpus.notes == ("prompt/rationale/answer: one field for each segment", "columns that are not read: other")
    assert len(_load(str(tmp_path / name), limit=2)) == 2


@pytest.mark.usefixtures("no_network")
def test_globs_lists_and_folders(tmp_path: Path) -> None:
    data = tmp_path / "data"
    (data / "b").mkdir(parents=True)
    (data / ".hidden").mkdir()
    for number, place in enumerate(["b/2.jsonl", "1.jsonl", ".hidden/0.jsonl"]):
        (data / place).write_text(json.dumps({"id": number, "text": place}))
    (data / "README.md").write_text("# text")
    names = {
        str(data): ["1.jsonl", "b/2.jsonl"],
        str(data / "*.jsonl"): ["1.jsonl"],
        str(data / "**/*.jsonl"): ["1.jsonl", "b/2.jsonl"],
        (str(data / "b/2.jsonl"), str(data / "1.jsonl")): ["b/2.jsonl", "1.jsonl"],
    }
    for path, texts in names.items():
        assert [record.text for record in _load(path).records] == texts
    settings = CorpusSettings(path=str(data))
    before = corpus_stamp(settings)
    assert before == corpus_stamp(settings)
    (data / "1.jsonl").write_text('{"text": "another"}')
    assert before != corpus_stamp(settings)
    with pytest.raises(CorpusError, match=r"id '0' was used before, by .*b/2.jsonl line 1"):
        _load([str(data), str(data / "b/2.jsonl")])
    (data / "3.csv").write_text("text\nx\n")
    with pytest.raises(CorpusError, match=r"files of several kinds \(1.jsonl, 3.csv\).*Name those to read"):
        _load(str(data))
    heldout = _load(str(data / "3.csv"), heldout={"path": [str(data / "1.jsonl"), str(data / "b/2.jsonl")]})
    assert [int(record.split) for record in heldout.records] == [0, 1, 1]


@pytest.mark.usefixtures("no_network")
def test_home_and_strange_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "x [1]*.jsonl").write_bytes(LINES)
    assert len(_load("~/x [1]*.jsonl")) == 5  # A name that exists is no pattern.


@pytest.mark.usefixtures("no_network")
@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("none.jsonl", "No such file"),
        ("none/*.csv", "no file matches"),
        ("none.csv", "No such file"),
        ("./none", "No such file"),
        ("a/b/c", "No such file"),
        ("data.txt", r"files of this ending are not read. Give one of .jsonl"),
        ("s3://bucket/c.jsonl", "this kind of address is not read"),
        ("hf://models/a/b", "write hf://datasets/OWNER/NAME"),
        ("empty", "the folder holds no file that ends in"),
        ("empty.jsonl", "there is no record in it"),
        ("", "an empty name is no file"),
        ("/" + "x" * 5000, "File name too long"),
        ("a\0.jsonl", "No such file"),
    ],
)
def test_names_that_are_not_there_never_reach_the_hub(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data.txt").write_text("x")
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty.jsonl").touch()
    began = time.monotonic()
    with pytest.raises(CorpusError, match=message):
        _load(name)
    assert time.monotonic() - began < 1


def _damaged_table() -> bytes:
    """A Parquet file with columns that Python cannot hold: a date past the year 9999, and bytes that are no text."""
    late = pa.array([400_000_000_000_000] * 5, pa.timestamp("ms"))
    text = pa.Array.from_buffers(
        pa.utf8(),
        5,
        [None, pa.py_buffer(b"".join(n.to_bytes(4, "little") for n in range(6))), pa.py_buffer(b"\xff" * 5)],
    )
    table = pa.Table.from_pylist(ROWS).append_column("late", late).append_column("broken", text)
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink)
    return bytes(sink.getvalue())


def test_columns_that_are_not_needed_are_not_read(tmp_path: Path) -> None:
    (tmp_path / "c.parquet").write_bytes(_damaged_table())
    (tmp_path / "plain.jsonl").write_bytes(LINES)
    corpus = _load(str(tmp_path / "c.parquet"))
    assert corpus.digest == _load(str(tmp_path / "plain.jsonl")).digest
    assert corpus.notes[1] == "columns that are not read: other, late, broken"
    import datasets

    images = datasets.Dataset.from_dict(
        {"prompt": ["a"], "answer": ["b"], "image": [{"bytes": b"no image", "path": None}]},
        features=datasets.Features({"prompt": datasets.Value("string"), "answer": datasets.Value("string"), "image": datasets.Image()}),
    )  # fmt: skip
    images.save_to_disk(str(tmp_path / "saved"))
    assert [record.text for record in _load(str(tmp_path / "saved")).records] == ["a\nb"]
    for name in ("late", "broken"):
        with pytest.raises(CorpusError, match=r"rows 1 to 5: a value cannot be read") as error:
            _load(str(tmp_path / "c.parquet"), heldout={"group": name, "ratio": 0.5})
        assert "\n" not in str(error.value)
    with pytest.raises(
        CorpusError, match=r"there is no column 'qestion', named by corpus.fields.prompt; the columns are id"
    ):
        _load(str(tmp_path / "c.parquet"), fields={"prompt": "qestion"})
    pq.write_table(
        pa.table(
            {
                "day": [datetime.date(2024, 1, 1)],
                "messages": [[{"role": "user", "content": "a", "day": datetime.date(2024, 1, 1)}]],
            }
        ),
        tmp_path / "d.parquet",
    )
    with pytest.raises(CorpusError, match=r"messages\[0\]: a value is not JSON: Object of type date"):
        _load(str(tmp_path / "d.parquet"))
    pq.write_table(pa.table({"problem": ["a"]}), tmp_path / "d.parquet")
    with pytest.raises(CorpusError, match="none of the known formats fits; the fields are problem"):
        _load(str(tmp_path / "d.parquet"))


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("c.jsonl", LINES[:-20], "line 5: not a JSON object"),
        ("c.jsonl", b'{"text": "a", "text": "b"}', "line 1: not a JSON object: the key 'text' is repeated"),
        ("c.jsonl", b'{"text": "a", "x": {"y": 1, "y": 2}}', "the key 'y' is repeated"),
        ("c.jsonl", b'{"text": "a", "x": ' + b"9" * 5000 + b"}", "line 1: .*a number of more than 4,300 digits"),
        ("c.jsonl", b'{"text": "a", "x": ' + b"[" * 200_000 + b"]" * 200_000 + b"}", "line 1: .*nested too deeply"),
        ("c.jsonl", b'{"text": "a", "id": "\\ud800"}', r"line 1: the id '\\ud800' is not valid Unicode"),
        ("c.jsonl", b'{"text": "a", "id": true}', "line 1: the id must be a string or a whole number, not True"),
        ("c.jsonl", b'{"\\ud800": "a"}', r"the fields are \\ud800"),
        ("c.jsonl", '{"text": "a"}'.encode("utf-16"), "line 1: not a JSON object"),
        ("c.json", json.dumps(ROWS).encode()[:-1], "the list of records does not end"),
        ("c.json", json.dumps(ROWS).encode()[:-9], "record 5: not JSON"),
        ("c.json", b'[{"text": "a"}] x', "more text follows the list of records: 'x'"),
        ("c.json", b'[{"text": "a"}, 3]', "record 2: not a JSON object but int"),
        ("c.json", b'[{"text": "a", "text": "b"}]', "record 1: not JSON: the key 'text' is repeated"),
        ("c.json", b'{"text": "' + b"a" * 3_000_000 + b'"} {', "record 2: not JSON"),
        ("c.json", b'[{"text": "\xff"}]', "not UTF-8"),
        ("c.jsonl.gz", gzip.compress(LINES * 99)[:-30], "c.jsonl.gz"),
        ("c.jsonl.gz", b"no gzip", "c.jsonl.gz"),
        ("c.jsonl.zst", _zstd(LINES * 99)[:-9], "c.jsonl.zst"),
        ("c.parquet", _parquet(ROWS)[:-40], "c.parquet"),
        ("c.parquet", b"", "c.parquet"),
        ("c.csv", b"text,text\na,b\n", "line 1: column 'text' occurs twice"),
        ("c.csv", b"text,x\na,b,c\n", "line 2: 3 cells under 2 columns"),
        ("c.csv", b'text\n"a', "unexpected end of data"),
        ("c.csv", b"text\n\xff\n", "c.csv: cannot be read"),
        ("c.csv", b'text\n"a" b\n', "c.csv: cannot be read"),
    ],
)
def test_damage_is_one_line_that_names_the_place(tmp_path: Path, name: str, data: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(data)
    with pytest.raises(CorpusError, match=message) as error:
        _load(str(tmp_path / name))
    assert name in str(error.value)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 600


def test_a_long_record_and_a_long_list_are_read_in_blocks(tmp_path: Path) -> None:
    rows = [{"text": f"{n} " + "é" * (3_000_000 if n == 1 else 40)} for n in range(30_000)]
    (tmp_path / "c.json").write_text(json.dumps(rows, ensure_ascii=False))
    corpus = _load(str(tmp_path / "c.json"))
    assert len(corpus) == 30_000
    assert corpus.records[1].text == rows[1]["text"]
    assert corpus.records[-1].text == rows[-1]["text"]


def test_hub_addresses_are_read_from_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The layout of the hub's cache, as a download leaves it."""
    from huggingface_hub import constants

    revision = "0123456789abcdef0123456789abcdef01234567"
    snapshot = tmp_path / "datasets--someone--data/snapshots" / revision
    (snapshot / "train").mkdir(parents=True)
    (snapshot / "train/a.jsonl").write_bytes(LINES)
    (snapshot / "test.csv").write_text("text\nheld\n")
    refs = tmp_path / "datasets--someone--data/refs"
    refs.mkdir()
    (refs / "main").write_text(revision)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("kava.extract.files.hub_reachable", lambda: False)
    base = "hf://datasets/someone/data"
    for path in (f"{base}/train/a.jsonl", f"{base}/train", f"{base}/train/*.jsonl", f"{base}@{revision}/train/a.jsonl"):
        assert len(_load(path)) == 5, path
    corpus = _load([f"{base}/train/a.jsonl", f"{base}/test.csv"])
    assert corpus.records[5].text == "held"
    with pytest.raises(HubUnreachableError, match="someone/other"):
        _load("hf://datasets/someone/other/x.csv")
    with pytest.raises(CorpusError, match="No such file"):
        _load(f"{base}/none.csv")
    with pytest.raises(HubUnreachableError, match="nobody/data"):
        _load("nobody/data")
    with pytest.raises(CorpusError, match="Give one revision"):
        _load(f"{base}@{revision}/train", revision="main")
