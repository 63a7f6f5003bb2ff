"""The command on models with chat templates: one decision, a fixed date, the end of a turn."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from fixtures.command import kava, rows, write_recipe
from fixtures.models import next_logits, save_model
from fixtures.templates import CHATML, DATED, chat_tokenizer

from kava.extract import Corpus, Record
from kava.hub import find_model, load_model
from kava.pipeline.recipe import load_recipe
from kava.pipeline.run import Run
from kava.pipeline.template_checks import template_warnings
from kava.store import KVStore, Segment, Split


@pytest.fixture(scope="module")
def chat_models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("chat")
    teacher = save_model(root / "teacher", "qwen2", chat_tokenizer(DATED), layers=2, heads=2, kv_heads=1, head_dim=8)
    student = save_model(root / "student", "llama", chat_tokenizer(CHATML), layers=2, heads=2, kv_heads=2, head_dim=8)
    return {"teacher": teacher, "student": student}


def test_dates_are_fixed_recorded_and_needed(tmp_path: Path, chat_models: dict[str, Path]) -> None:
    recipe = write_recipe(tmp_path, chat_models, chat_template=True, train={"max_steps": 2, "eval_steps": 2})
    printed = kava("run", recipe, code=2)
    assert "chat_template_date: the chat template prints today's date" in printed
    dated = ["-s", "chat_template_date=2025-01-02"]
    kava("run", recipe, *dated)
    teacher, targets = (KVStore.open(next(tmp_path.glob(f"run/{kind}/*.zarr"))) for kind in ("teachers", "targets"))
    tokenizer = chat_tokenizer(DATED)
    assert "Today Date: 02 Jan 2025" in tokenizer.decode(teacher[0].input_ids)
    # The end of the turn is learned and has no target; what it ends is text that has one.
    for store in (teacher, targets):
        sample = store[0]
        assert (sample.segments == Segment.TURN).sum() == 1
        (end,) = (sample.segments == Segment.TURN).nonzero()[0]
        assert sample.segments[end - 1] == Segment.ANSWER
    assert not sample.mask[end]
    assert sample.mask[end - 1]
    assert chat_tokenizer(CHATML).decode(sample.input_ids[end:]) == "<|im_end|>\n"
    # Another date is other content.
    runs = [Run(load_recipe(recipe, [f"chat_template_date=2025-01-0{day}"])) for day in (2, 3)]
    digests = [run.teacher_manifest("big").chat_template_digest for run in runs]
    assert digests[0] == teacher.manifest.chat_template_digest != digests[1]
    # The student's template prints no date, so its date is none of its content.
    assert len({run.reference_manifest.chat_template_digest for run in runs}) == 1
    # The student ends its turn also where kava is not: in generate of transformers, in vLLM.
    (trained,) = tmp_path.glob("run/students/*/generation_config.json")
    turn_end = chat_tokenizer(CHATML).convert_tokens_to_ids("<|im_end|>")
    assert turn_end in json.loads(trained.read_bytes())["eos_token_id"]
    answers = kava("evaluate", recipe, *dated)
    assert "exact match" in answers


def test_a_mixture_is_named(tmp_path: Path, chat_models: dict[str, Path]) -> None:
    recipe = write_recipe(tmp_path, chat_models, student={"chat_template": True})
    printed = kava("extract", recipe, "-s", "teachers.big.model=/nowhere", code=2)
    assert "warning: chat_template: student read the corpus in a chat template, teachers.big as plain text" in printed


@pytest.mark.slow
def test_a_trained_student_ends_its_turn(tmp_path: Path, chat_models: dict[str, Path]) -> None:
    train = {"max_steps": 200, "eval_steps": 200, "alpha": 0, "learning_rate": 3e-3, "logging_steps": 50}
    template = {"chat_template": True, "chat_template_date": "2025-01-02"}
    recipe = write_recipe(tmp_path, chat_models, train=train, **template)
    ended = [{**row, "answer": f"So there are {2 * n}."} for n, row in enumerate(rows())]
    (tmp_path / "corpus.jsonl").write_text("\n".join(map(json.dumps, ended)))
    kava("run", recipe)
    run = Run(load_recipe(recipe))
    targets = run.open_target("big")
    chances: dict[str, list[float]] = {}
    for name, folder in (("before", run.student_dir), ("after", run.trained_dir())):
        model = load_model(find_model(str(folder)), dtype="float32", device="cpu")
        for index in targets.indices(Split.HELDOUT):
            sample = targets.sample(index, keys=False, values=False)
            (end,) = (sample.segments == Segment.TURN).nonzero()[0]
            logits = next_logits(model, sample.input_ids[:end].tolist())
            chances.setdefault(name, []).append(float(logits.softmax(-1)[sample.input_ids[end]]))
    assert max(chances["before"]) < 0.1
    assert min(chances["after"]) > 0.9


@pytest.mark.parametrize(
    ("stated", "warned"), [({}, True), ({"chat_template": True}, False), ({"chat_template": False}, False)]
)
def test_chats_without_a_template_are_warned_of(
    tmp_path: Path, chat_models: dict[str, Path], stated: dict[str, Any], warned: bool
) -> None:
    run = Run(load_recipe(write_recipe(tmp_path, chat_models, **stated)))
    messages = ({"role": "user", "content": "Hi."}, {"role": "assistant", "content": "Yes?"})
    pieces = ((0, 3, Segment.PROMPT), (3, 8, Segment.ANSWER))
    turns = (("user", 0, 3), ("assistant", 4, 8))
    run.prompts = Corpus([Record("id", "Hi.\nYes?", pieces, turns, messages=messages)])
    warnings = template_warnings(run)
    assert bool(warnings) == warned
    assert all("every model reads them as plain text without roles" in warning for warning in warnings)


def test_sampling_and_stop_tokens_are_in_the_key(tmp_path: Path, chat_models: dict[str, Path]) -> None:
    def key(*overrides: str) -> str:
        recipe = write_recipe(tmp_path, chat_models, extract={"generate": {"temperature": 0.6}})
        return Run(load_recipe(recipe, list(overrides))).generate_key

    generate = "extract.generate."
    changes = ["temperature=0.7", "top_p=0.9", "top_k=20", "seed=1", "max_new_tokens=9"]
    template = ["chat_template=true", "chat_template_date=2025-01-02"]
    keys = [key(), *(key(generate + change) for change in changes), key(*template)]
    assert len(set(keys)) == len(keys)
    assert key(generate + "chunk=7") == keys[0]
    folder = chat_models["teacher"]
    before = (folder / "generation_config.json").read_bytes()
    try:
        said = {"repetition_penalty": 1.9, "top_k": 3, "num_beams": 4}
        (folder / "generation_config.json").write_text(json.dumps(json.loads(before) | said))
        assert key() == keys[0]
        (folder / "generation_config.json").write_text(json.dumps(json.loads(before) | {"eos_token_id": 7}))
        assert key() != keys[0]
    finally:
        (folder / "generation_config.json").write_bytes(before)
    run = Run(load_recipe(write_recipe(tmp_path, chat_models), template))
    assert chat_tokenizer(DATED).convert_tokens_to_ids("<|eot_id|>") in run.stop_ids("big")
