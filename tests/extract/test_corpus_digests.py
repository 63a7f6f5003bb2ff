"""Digests and ids that stores on disk were made with: they must not change for content that does not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from kava.extract import CorpusSettings, load_corpus
from kava.store import Split

ROWS = [
    {
        "prompt": f"{n}. How many? cafe\u0301",
        "rationale": f"{n} + {n} = {2 * n}.",
        "answer": f"#### {2 * n}",
        "other": n,
        "g": n % 4,
    }
    for n in range(12)
]
CHAT = [
    {"role": role, "content": content}
    for role, content in [
        ("system", "Be brief."),
        ("user", "hi"),
        ("assistant", "yes"),
        ("user", "so?"),
        ("assistant", "no"),
    ]
]


@pytest.mark.parametrize(
    ("rows", "settings", "digest", "heldout"),
    [
        (ROWS, {}, "bb29bd08b20eaaaf5a132cdcbad7924b", []),
        (ROWS, {"separator": " "}, "eb4df984c09711a51e25962ea6e91864", []),
        (ROWS, {"heldout": {"ratio": 0.25}}, "1781940c51d93d5f79de29ec2486ad7f", [9, 10, 11]),
        (ROWS, {"heldout": {"ratio": 0.5, "group": "g"}}, "f0f8639cf7e4c723cb29d4cb408b7546", [1, 3, 5, 7, 9, 11]),
        (ROWS, {"limit": 5}, "c652db7ca76c0723314074410f81ef2f", []),
        ([{"id": n, "text": f"text {n % 3}"} for n in range(6)], {}, "b1097bc474adf759410773d520248be3", []),
        ([{"text": f"text {n % 3}"} for n in range(6)], {}, "7adf27da6eb69eca08ba1db15bd6a34c", []),
        ([{"messages": CHAT}], {}, "483e562cff914e650c148df0336d0ed3", []),
        ([{"q": "a", "answer": "b"}], {"fields": {"prompt": "q"}}, "c18d3a548473807a50dc1d73c95f543d", []),
    ],
)
def test_digests_stay(
    tmp_path: Path, rows: list[Any], settings: dict[str, Any], digest: str, heldout: list[int]
) -> None:
    path = tmp_path / "corpus.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in rows))
    corpus = load_corpus(CorpusSettings.model_validate({"path": str(path), **settings}))
    assert corpus.digest == digest
    assert list(corpus.split(Split.HELDOUT)) == heldout
    if rows is ROWS and not settings:
        assert [record.sample_id for record in corpus.records[:2]] == ["6c34c63e04ecc515", "9ac511ce60502c35"]
