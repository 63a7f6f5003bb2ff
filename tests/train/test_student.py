"""Making the student before training."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from kava.store.maker import mark
from kava.train import StudentSettings, load_student, make_student
from kava.train.student import padding

SETTINGS = StudentSettings.model_validate(
    {
        "config": {
            "model_type": "llama",
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
        },
        "tokenizer": {"vocab_size": 257},
    }
)


def test_two_processes_that_make_one_student_do_not_meet(tmp_path: Path) -> None:
    """The other is at it, in a folder of its own, and is done before this one."""
    folder, other = tmp_path / "student", tmp_path / ".student.tmp"
    host, _, birth, word = mark().rsplit("-", 3)
    dead, away = (tmp_path / f".tmp-student-{name}-{2**22 - 1}-{birth}-{word}" for name in (host, "another-host"))
    for left in (dead, away):
        left.mkdir()
    other.mkdir()
    (other / "config.json").write_text("half of")

    def texts() -> Iterator[str]:
        make_student(SETTINGS, folder, ["a text"])
        (folder / "first").touch()
        yield "a text"

    make_student(SETTINGS, folder, texts())
    assert (folder / "first").exists()
    assert load_student(folder)[0].config.hidden_size == 16
    assert (other / "config.json").read_text() == "half of"
    assert sorted(path.name for path in tmp_path.iterdir()) == [".student.tmp", away.name, "student"]


@pytest.mark.parametrize(("pad", "end", "found"), [(3, 2, 3), (0, 2, 0), (None, 2, 2), (None, None, 0)])
def test_what_batches_are_padded_with(pad: int | None, end: int | None, found: int) -> None:
    assert padding(SimpleNamespace(pad_token_id=pad, eos_token_id=end)) == found
