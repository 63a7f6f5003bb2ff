from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kava.errors import CorpusError, HubUnreachableError
from kava.extract import Corpus, CorpusSettings, load_corpus
from kava.store import Segment, Split

Write = Callable[[list[Any]], str]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def inner(rows: list[Any]) -> str:
        path = tmp_path / "corpus.jsonl"
        path.write_text("\n".join(r if isinstance(r, str) else json.dumps(r) for r in rows))
        return str(path)

    return inner


def _load(path: str, **settings: Any) -> Corpus:
    return load_corpus(CorpusSettings.model_validate({"path": path, **settings}))


def test_segments_cover_the_canonical_text(write: Write) -> None:
    (record,) = _load(write([{"prompt": "Wie viel?", "rationale": "Zwölf.", "answer": "12"}])).records
    assert record.text == "Wie viel?\nZwölf.\n12"
    assert record.segments == ((0, 9, Segment.PROMPT), (9, 16, Segment.RATIONALE), (16, 19, Segment.ANSWER))
    assert [record.text[a:b] for _, a, b in record.turns] == ["Wie viel?", "Zwölf.\n12"]


def test_text_messages_and_field_names(write: Write) -> None:
    (record,) = _load(write([{"body": "all of it"}]), fields={"text": "body"}).records
    assert record.segments == ((0, 9, Segment.ANSWER),)
    chat = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}]
    (record,) = _load(write([{"messages": chat}]), separator=" ").records
    assert record.text == "hi yes"
    assert [s for *_, s in record.segments] == [Segment.PROMPT, Segment.ANSWER]
    (record,) = _load(write([{"q": "a", "prompt": "ignored", "answer": "b"}]), fields={"prompt": "q"}).records
    assert record.text == "a\nb"


def test_ids_are_stable_and_repetitions_are_told_apart(write: Write) -> None:
    rows = [{"text": "a"}, {"text": "b"}, {"text": "a"}]
    one, two = _load(write(rows)), _load(write([*rows[1:], rows[0]]))
    names = [r.sample_id for r in two.records]
    assert [r.sample_id for r in one.records] == [names[1], names[0], names[2]]
    assert one.records[2].sample_id == f"{one.records[0].sample_id}-2"
    assert [r.sample_id for r in _load(write([{"id": 7, "text": "a"}, {"id": "x", "text": "a"}])).records] == ["7", "x"]


def test_the_canonical_text_is_composed(write: Write) -> None:
    (record,) = _load(write([{"prompt": "cafe\u0301", "answer": "e\u0301"}])).records
    assert record.text == "caf\u00e9\n\u00e9"
    assert record.segments == ((0, 4, Segment.PROMPT), (4, 6, Segment.ANSWER))


def test_digest_follows_every_change(write: Write) -> None:
    base = _load(write([{"id": 1, "prompt": "a", "answer": "b"}])).digest
    assert base == _load(write([{"id": 1, "prompt": "a", "answer": "b", "other": 3}])).digest
    assert base != _load(write([{"id": 2, "prompt": "a", "answer": "b"}])).digest
    assert base != _load(write([{"id": 1, "prompt": "a\nb"}])).digest


def test_held_out_by_ratio_group_values_and_file(write: Write, tmp_path: Path) -> None:
    rows = [{"id": i, "text": f"t{i}", "g": i % 5} for i in range(20)]
    path = write(rows)
    heldout = _load(path, heldout={"ratio": 0.25}).split(Split.HELDOUT)
    assert len(heldout) == 5
    assert heldout == _load(path, heldout={"ratio": 0.25}).split(Split.HELDOUT)
    assert heldout != _load(path, heldout={"ratio": 0.25, "seed": 1}).split(Split.HELDOUT)
    groups = {i % 5 for i in _load(path, heldout={"ratio": 0.4, "group": "g"}).split(Split.HELDOUT)}
    assert len(groups) == 2
    assert len(_load(path, heldout={"ratio": 0.4, "group": "g"}).split(Split.HELDOUT)) == 8
    assert {i % 5 for i in _load(path, heldout={"group": "g", "values": ["3"]}).split(Split.HELDOUT)} == {3}
    other = tmp_path / "heldout.jsonl"
    other.write_text('{"id": "h", "text": "held"}')
    corpus = _load(path, heldout={"path": str(other)})
    assert [corpus.records[i].sample_id for i in corpus.split(Split.HELDOUT)] == ["h"]


def test_parquet_and_saved_datasets(tmp_path: Path) -> None:
    import datasets

    data = datasets.Dataset.from_dict({"prompt": ["a", "b"], "answer": ["1", "2"]})
    data.to_parquet(tmp_path / "c.parquet")
    data.save_to_disk(str(tmp_path / "saved"))
    one, two = _load(str(tmp_path / "c.parquet")), _load(str(tmp_path / "saved"))
    assert [r.text for r in one.records] == ["a\n1", "b\n2"]
    assert one.digest == two.digest
    assert len(_load(str(tmp_path / "saved"), limit=1)) == 1


@pytest.mark.parametrize(
    ("rows", "settings", "message"),
    [
        ([{"text": "a"}, "{broken"], {}, "line 2: not a JSON object"),
        (["[1]"], {}, "line 1: not a JSON object but list"),
        ([{"question": "a"}], {}, "line 1: none of the known formats fits; the fields are question. .*corpus.fields"),
        ([{"text": "a"}, {"text": "  "}], {}, "line 2: the record is empty"),
        ([{"prompt": 3}], {}, "line 1: 'prompt' must be a string, not int"),
        ([{"text": "\ud800"}], {}, "line 1: .*surrogate"),
        ([{"id": 1, "text": "a"}, {"id": 1, "text": "b"}], {}, "line 2: id '1' was used before, by .* line 1"),
        ([{"id": [], "text": "a"}], {}, "line 1: the id must be"),
        ([{"messages": [{"content": "a"}]}], {}, "messages must be a list"),
        ([{"text": "a"}, {"text": "b"}], {"heldout": {"ratio": 0.5, "group": "g"}}, "line 1: there is no field 'g'"),
        ([{"text": "a", "g": 1}], {"heldout": {"group": "g", "values": ["2"]}}, "no record has g '2'"),
        ([{"text": "a"}], {"heldout": {"ratio": 0.5}}, "too few to hold out"),
        ([], {}, "no record"),
    ],
)
def test_bad_corpora_name_the_line_and_the_mend(write: Write, rows: list[Any], settings: Any, message: str) -> None:
    with pytest.raises(CorpusError, match=message):
        _load(write(rows), **settings)


def test_missing_files_and_hub_ids(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(CorpusError, match="No such file"):
        _load(str(tmp_path / "none.jsonl"))
    (tmp_path / "bad.parquet").write_bytes(b"not parquet")
    with pytest.raises(CorpusError, match=r"bad\.parquet"):
        _load(str(tmp_path / "bad.parquet"))
    monkeypatch.setattr("kava.extract.files.hub_reachable", lambda: False)
    with pytest.raises(HubUnreachableError, match="someone/data"):
        _load("someone/data")
