"""Memory holds an index of the records, and not the records."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from kava.extract.record import Record
from kava.extract.record_file import RecordFile
from kava.store import Segment

PROGRAM = """
import resource, sys
from kava.extract import CorpusSettings, load_corpus
from kava.pipeline.parts import draw_calibration
from kava.store import Split

settings = CorpusSettings.model_validate({"path": sys.argv[1], "heldout": {"ratio": 0.02}, "limit": int(sys.argv[2])})
corpus = load_corpus(settings)
assert len(corpus) == settings.limit
corpus.digest
train = corpus.split(Split.TRAIN)
draw_calibration(train, len(corpus), 5000, 256, 0)
record = corpus.records[len(corpus) // 2]
assert corpus.find(record.sample_id) == record
assert sum(corpus.text_bytes) > 10 * len(corpus)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


@pytest.mark.slow
def test_a_million_records_take_an_index_of_memory(tmp_path: Path) -> None:
    path = tmp_path / "corpus.jsonl"
    with path.open("w") as file:
        file.writelines(f'{{"prompt": "{n} + {n}?", "answer": "{2 * n}", "extra": 1}}\n' for n in range(1_000_000))
    peaks = []
    for limit in (100_000, 1_000_000):
        run = subprocess.run([sys.executable, "-c", PROGRAM, str(path), str(limit)], capture_output=True, text=True)
        assert run.returncode == 0, run.stderr
        peaks.append(int(run.stdout) * 1024)
    per_record = (peaks[1] - peaks[0]) / 900_000
    assert per_record < 120, peaks  # 71 bytes when this was written; a list of records takes ten times as many.


def test_records_come_back_as_they_were_from_any_place() -> None:
    records = [
        Record(
            f"id{n}",
            "é東" * n + "x",
            ((0, 2 * n, Segment.PROMPT), (2 * n, 2 * n + 1, Segment.ANSWER)),
            (("user", 0, 1),),
        )
        for n in range(300)
    ]
    file = RecordFile()
    for number, record in enumerate(records):
        file.append(record, f"line {number}")
    file.refuse_repeated_ids()
    assert list(file) == records
    assert file[-1] == records[-1]
    assert file[10:13] == records[10:13]
    assert file.index("id299") == 299
    assert file.index(records[7]) == 7
    with pytest.raises(ValueError, match="id300"):
        file.index("id300")
    with pytest.raises(IndexError):
        file[300]
    assert file.segment_records[Segment.PROMPT] == 299
    assert sum(file.segment_bytes.values()) == sum(file.text_bytes) == sum(len(r.text.encode()) for r in records)
