"""Inputs that users of other projects reported, one kind a test: what they bring, and what becomes of it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fixtures.command import kava, write_recipe
from fixtures.models import save_model
from fixtures.templates import CHATML, chat_tokenizer
from fixtures.tokenizers import byte_level_tokenizer, sentencepiece_tokenizer
from safetensors.torch import load_file, save_file

from kava.answers import final_number
from kava.errors import CheckpointError, CorpusError, ModelNotFoundError
from kava.extract import Corpus, CorpusSettings, Encoder, Record, load_corpus
from kava.extract.tokenizer_check import check_tokenizer
from kava.hub import find_model, load_config, load_model, load_tokenizer, model_geometry
from kava.store import Segment
from kava.train.settings import StudentSettings
from kava.train.student import load_student, make_student

P, R, A = Segment.PROMPT, Segment.RATIONALE, Segment.ANSWER
USER = {"role": "user", "content": "How many?"}
ASSISTANT = {"role": "assistant", "content": "Four."}
POINTER = (
    "version https://git-lfs.github.com/spec/v1\n"
    "oid sha256:4d7a214614ab2935c943f9e0ff69d22eadbb8f32b1258daaa5e2ca24d17e2393\nsize 988097824\n"
)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(save_model(tmp_path_factory.mktemp("whole"), "llama", sentencepiece_tokenizer(), layers=2))


def _copy(whole: Path, folder: Path, name: str = "", change: Callable[[dict[str, Any]], Any] = lambda _: None) -> Path:
    """The model in another folder, with a change to one of its JSON files."""
    shutil.copytree(whole, folder)
    if name:
        values = json.loads((folder / name).read_text()) if (folder / name).exists() else {}
        change(values)
        (folder / name).write_text(json.dumps(values))
    return folder


def _load(path: Path, content: Any) -> Corpus:
    path.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
    return load_corpus(CorpusSettings(path=str(path)))


def _segments(record: Record) -> list[tuple[Segment, str]]:
    return [(kind, record.text[start:stop]) for start, stop, kind in record.segments]


@pytest.mark.parametrize(
    ("row", "segments"),
    [
        ({"prompt": "How many?", "chosen": "Four.", "rejected": "Five."}, [(P, "How many?"), (A, "\nFour.")]),
        ({"prompt": [USER], "chosen": [ASSISTANT], "rejected": [ASSISTANT]}, [(P, "How many?"), (A, "\nFour.")]),
        ({"prompt": "How many?", "chosen": [ASSISTANT], "rejected": []}, [(P, "How many?"), (A, "\nFour.")]),
        ({"prompt": "How many?", "chosen": [USER, ASSISTANT], "rejected": []}, [(P, "How many?"), (A, "\nFour.")]),
        ({"chosen": [USER, ASSISTANT], "rejected": [USER, ASSISTANT]}, [(P, "How many?"), (A, "\nFour.")]),
    ],
)
def test_preference_data(tmp_path: Path, row: Any, segments: list[Any]) -> None:
    """Preference data come as strings, as messages, and as messages that repeat the prompt; which is expected?

    https://github.com/huggingface/trl/issues/1886. The chosen answer is the answer, and the rejected one is named as
    not read.
    """
    corpus = _load(tmp_path / "c.json", [row])
    assert _segments(corpus.records[0]) == segments
    assert corpus.notes == ("preference: the chosen answer is the answer", "columns that are not read: rejected")


@pytest.mark.parametrize("sharegpt", [False, True])
def test_a_turn_of_weight_0_is_context(tmp_path: Path, sharegpt: bool) -> None:
    """A conversation holds a bad answer and its correction; the message with weight 0 must be masked in training.

    https://github.com/axolotl-ai-cloud/axolotl/pull/1703
    """
    wrong = {"role": "assistant", "content": "Five.", "weight": 0}
    messages: list[dict[str, Any]] = [USER, wrong, {"role": "user", "content": "Sure?"}, {**ASSISTANT, "weight": 1}]
    row: dict[str, Any] = {"messages": messages}
    if sharegpt:
        row = {"conversations": [{"from": m["role"], "value": m["content"], **_weight(m)} for m in messages]}
    (record,) = _load(tmp_path / "c.json", [row]).records
    assert _segments(record) == [(P, "How many?"), (P, "\nFive."), (P, "\nSure?"), (A, "\nFour.")]
    tokenizer = chat_tokenizer(CHATML)
    tokens = Encoder(tokenizer, chat_template=True, add_eos=True).encode(record)
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    turn = tokens.segments == int(Segment.TURN)
    learned = tokenizer.decode(tokens.input_ids[turn | (tokens.segments == int(A))])
    assert learned.replace(" ", "").strip() == "Four.<|im_end|>"
    assert np.flatnonzero(turn & (tokens.input_ids == end)).tolist() == [np.flatnonzero(tokens.input_ids == end)[-1]]
    last = Encoder(tokenizer, chat_template=True, add_eos=True).encode(
        _load(tmp_path / "d.json", [{"messages": [USER, wrong]}]).records[0]
    )
    assert not np.isin(last.segments, [int(A), int(Segment.TURN)]).any()
    with pytest.raises(CorpusError, match=r"messages\[0\].weight is 0.5. Use 1, or 0 for a turn that is not learned"):
        _load(tmp_path / "e.json", [{"messages": [{**ASSISTANT, "weight": 0.5}]}])


def _weight(message: dict[str, Any]) -> dict[str, Any]:
    return {"weight": message["weight"]} if "weight" in message else {}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"version": "1", "data": [{"question": "Q", "answer": "4"}]}, "'data' is a list of objects; if they are the"),
        (
            {"question": ["Q", "S"], "answer": ["4", "5"]},
            r"'question' must be a string, not list. Write one record for",
        ),
        ({"question": {"0": "Q"}, "answer": {"0": "4"}}, r"must be a string, not dict. .*to_json\(orient='records'"),
        ({"question": "Q", "answer": 4}, "'answer' must be a string, not int. Write it as text"),
    ],
)
def test_one_object_that_holds_all_records(tmp_path: Path, content: Any, message: str) -> None:
    """A JSON file is one object: the records are under a key such as `data`, or each key is a column.

    https://github.com/huggingface/datasets/pull/372, and pandas' default
    https://github.com/huggingface/datasets/issues/6977. The line says how to save the file.
    """
    with pytest.raises(CorpusError, match=message) as caught:
        _load(tmp_path / "c.json", content)
    assert "\n" not in str(caught.value)


def test_csv_from_a_spreadsheet(tmp_path: Path) -> None:
    """Excel's CSV is separated by semicolons in many countries, and it is not always UTF-8.

    https://github.com/oc-courses/perfectionnez_vous_en_python/pull/5 and
    https://github.com/Safiullah-Rahu/CSV-AI/issues/8
    """
    rows = 'question;answer\r\n"Où, et; quand?";3,5\r\n'
    (record,) = _load(tmp_path / "c.csv", b"\xef\xbb\xbf" + rows.encode()).records
    assert _segments(record) == [(P, "Où, et; quand?"), (A, "\n3,5")]
    (record,) = _load(tmp_path / "c.csv", b"question,answer\na;b;c,4\n").records
    assert _segments(record) == [(P, "a;b;c"), (A, "\n4")]
    for encoding in ("cp1252", "utf-16"):
        with pytest.raises(CorpusError, match=r"c.csv: .*'utf-8' codec.*Save the file as UTF-8"):
            _load(tmp_path / "c.csv", rows.encode(encoding))


def test_git_lfs_pointers(tmp_path: Path, whole: Path) -> None:
    """After a clone without Git LFS: "Error while deserializing header: HeaderTooLarge".

    https://github.com/huggingface/transformers/issues/27923. The file is named as what it is, wherever it is read.
    """
    message = "it is a Git LFS pointer, not the file itself. Download it with git lfs pull"
    for name in ("model.safetensors", "tokenizer.json"):
        folder = _copy(whole, tmp_path / name)
        (folder / name).write_text(POINTER)
        source = find_model(str(folder))
        with pytest.raises(CheckpointError, match=f"{name}: {message}"):
            load_tokenizer(source) if name == "tokenizer.json" else load_model(source, dtype="float32", device="cpu")
    (tmp_path / "m.gguf").write_text(POINTER)
    with pytest.raises(CheckpointError, match=f"m.gguf: {message}"):
        load_config(find_model(str(tmp_path / "m.gguf")))
    for name in ("c.parquet", "c.jsonl", "c.csv"):
        with pytest.raises(CorpusError, match=f"{name}: {message}"):
            _load(tmp_path / name, POINTER.encode())


@pytest.mark.parametrize("arch", ["mistral", "qwen2", "granite"])
def test_a_head_dim_of_null(tmp_path: Path, arch: str) -> None:
    """Mistral's config states `"head_dim": null`: "unsupported operand type(s) for *: 'int' and 'NoneType'".

    https://github.com/vllm-project/vllm/issues/18573. It is the hidden size divided by the heads, which the shapes of
    the weights prove.
    """
    whole = save_model(tmp_path / "whole", arch, byte_level_tokenizer(), layers=2, head_dim=8)
    source = find_model(str(_copy(whole, tmp_path / "null", "config.json", lambda c: c.update(head_dim=None))))
    assert model_geometry(source).head_dim == 8
    ids = torch.arange(20)[None]
    loaded = [load_model(each, dtype="float32", device="cpu") for each in (source, find_model(str(whole)))]
    with torch.no_grad():
        assert torch.equal(loaded[0](ids).logits, loaded[1](ids).logits)


def test_a_merged_adapter_with_a_head_of_its_own(
    tmp_path: Path, whole: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A merged LoRA has another head than embedding and still says `tie_word_embeddings`: it collapses when reloaded.

    https://github.com/huggingface/transformers/issues/45127. The stored head is used, and the student keeps it.
    """
    folder = _copy(whole, tmp_path / "merged", "config.json", lambda c: c.update(tie_word_embeddings=True))
    ids = torch.arange(20)[None]
    make_student(StudentSettings(model=str(folder)), tmp_path / "student", [])
    with torch.no_grad():
        expected = load_model(find_model(str(whole)), dtype="float32", device="cpu")(ids).logits
        for path in (folder, tmp_path / "student"):
            assert torch.equal(load_student(path)[0](ids).logits, expected)
    assert "we will NOT tie them" in capsys.readouterr().err


def test_a_teacher_that_overflows_in_float16(tmp_path: Path, tiny_models: dict[str, Path]) -> None:
    """Qwen2 loaded in float16: many numerical overflows (nan).

    https://github.com/QwenLM/Qwen3/issues/868. No number is stored, and the command fails with the reason.
    """
    folder = shutil.copytree(tiny_models["teacher"], tmp_path / "teacher")
    tensors = load_file(folder / "model.safetensors")
    changed = {name: tensor * 1e5 if "k_proj" in name else tensor for name, tensor in tensors.items()}
    save_file(changed, folder / "model.safetensors", {"format": "pt"})
    teacher = {"big": {"model": str(folder), "dtype": "float16"}}
    recipe = write_recipe(tmp_path, tiny_models, teachers=teacher, extract={"dtype": "float16"})
    printed = kava("extract", recipe, code=1)
    assert "all 24 samples of" in printed
    assert "non-finite keys" in printed
    assert "set its dtype to bfloat16 or float32, and capture again with --force" in printed
    assert "1285 tokens" not in printed
    printed = kava("extract", recipe, "--force", "-s", "teachers.big.dtype=float32", "-s", "extract.dtype=bfloat16")
    assert "failed" not in printed


def test_a_tokenizer_saved_with_truncation_and_padding(tmp_path: Path, whole: Path) -> None:
    """`tokenizer.json` may come with truncation and padding switched on; is there a way to encode without them?

    https://github.com/daulet/tokenizers/issues/30. Neither is heeded, and the folder is not called inconsistent.
    """
    cut = {"direction": "Right", "max_length": 8, "strategy": "LongestFirst", "stride": 0}
    pad = {"strategy": {"Fixed": 8}, "direction": "Right", "pad_to_multiple_of": None, "pad_id": 0, "pad_type_id": 0}
    pad["pad_token"] = "<unk>"
    change = {"truncation": cut, "padding": pad}
    folder = _copy(whole, tmp_path / "cut", "tokenizer.json", lambda values: values.update(change))
    for text in ("a", "one two three four five six seven eight nine ten"):
        record = Record("id", text, ((0, len(text), A),), (("assistant", 0, len(text)),))
        ids = [Encoder(load_tokenizer(find_model(str(each)))).encode(record).input_ids for each in (whole, folder)]
        assert ids[0].tolist() == ids[1].tolist()


def test_a_tokenizer_of_a_newer_version(tmp_path: Path, whole: Path) -> None:
    """ "data did not match any variant of untagged enum ModelWrapper at line 1251012 column 3".

    https://github.com/allenai/open-instruct/issues/738. The file is not damaged: the library is older than the file.
    """
    folder = _copy(whole, tmp_path / "new", "tokenizer.json", lambda values: values["model"].update(type="NewBPE"))
    with pytest.raises(CheckpointError, match=r"does not know \(data did not match any .*Upgrade tokenizers") as caught:
        load_tokenizer(find_model(str(folder)))
    assert "\n" not in str(caught.value)


def test_a_text_that_begins_with_bos(whole: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The dataset's text was rendered with the chat template, so an additional `bos_token` is in `input_ids`.

    https://github.com/unslothai/unsloth/issues/2648
    """
    source = find_model(str(whole))
    encoder = Encoder(load_tokenizer(source), add_eos=True)
    for text, warned in (("<s>How many?</s>", 1), ("How many?", 0)):
        record = Record("id", text, ((0, len(text), A),), (("assistant", 0, len(text)),))
        check_tokenizer(f"teacher {warned}", encoder, [record], load_config(source), None)
        said = capsys.readouterr().err
        assert said.count("samples begin with BOS twice: the tokenizer adds '<s>'") == warned
        assert encoder.encode(record).input_ids.tolist().count(encoder.tokenizer.eos_token_id) == 1


def test_a_generation_config_that_cannot_be_saved(tmp_path: Path, whole: Path) -> None:
    """Llama 2's `generation_config.json` does not sample and has a temperature: saving fails after the training.

    https://github.com/huggingface/transformers/issues/29988. The parameters that do not count are dropped.
    """
    settings = {"do_sample": False, "temperature": 0.9, "top_p": 0.6, "max_length": 77}
    folder = _copy(whole, tmp_path / "model", "generation_config.json", lambda values: values.update(settings))
    make_student(StudentSettings(model=str(folder)), tmp_path / "student", [])
    saved = json.loads((tmp_path / "student/generation_config.json").read_text())
    assert saved["max_length"] == 77
    assert not {"temperature", "top_p"} & set(saved)
    load_student(tmp_path / "student")[0].save_pretrained(tmp_path / "again")
    change = {"do_sample": True, "temperature": 0.9}
    sampling = _copy(whole, tmp_path / "sampling", "generation_config.json", lambda values: values.update(change))
    make_student(StudentSettings(model=str(sampling)), tmp_path / "other", [])
    assert json.loads((tmp_path / "other/generation_config.json").read_text())["temperature"] == 0.9


def test_gguf_files_that_are_not_the_model(tmp_path: Path, whole: Path) -> None:
    """ "unknown model architecture: 'clip'": the image encoder was named, or the folder, or another kind of file.

    https://github.com/ggml-org/llama.cpp/issues/7799
    """
    import gguf

    path = tmp_path / "mmproj-f16.gguf"
    writer = gguf.GGUFWriter(path, "clip")
    writer.add_uint32("clip.vision.block_count", 2)
    writer.add_tensor("v.blk.0.attn_q.weight", np.zeros((4, 4), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    messages: dict[Path, str] = {
        path: r"mmproj-f16.gguf: it holds the image encoder .*Name the model's other file",
        whole / "model.safetensors": f"this is one file of a model. Name its folder, {whole}",
    }
    for name, message in messages.items():
        with pytest.raises(CheckpointError, match=message):
            load_config(find_model(str(name)))
    with pytest.raises(ModelNotFoundError, match=r"holds GGUF files. Name one, as in .*mmproj-f16.gguf"):
        load_tokenizer(find_model(str(tmp_path)))


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("The answer is 72, in total, so the farmer earns that much.", 72),
        ("...the total cost of Rory's delivery order is $29.00.", 29),
        ("#### -3", -3),
        ("#### 5 * 3 = 15", 15),
        ("#### <<40+32=72>>72", 72),
        ("#### $1,200 / 4 = $300.00", 300),
        ("#### 72\nShe has 5 = 6", 72),
        ("#### 5 (because 1 dollar = 100 cents)", 5),
    ],
)
def test_answers_that_scorers_miss(text: str, number: int) -> None:
    """A comma behind the number, a currency and cents, a sign, or a calculation in the place of the answer.

    https://github.com/stanford-crfm/helm/issues/4337 and
    https://github.com/EleutherAI/lm-evaluation-harness/issues/3214
    """
    assert final_number(text) == number


def test_scientific_notation_in_yaml(tmp_path: Path, tiny_models: dict[str, Path]) -> None:
    """ "'<=' not supported between instances of 'float' and 'str'": YAML reads `2e-5` as a string.

    https://github.com/hiyouga/LlamaFactory/issues/4014
    """
    recipe = write_recipe(tmp_path, tiny_models)
    recipe.write_text(recipe.read_text().replace("learning_rate: 0.001", "learning_rate: 2e-5"))
    assert "learning_rate: 2e-5" in recipe.read_text()
    from kava.pipeline.recipe import load_recipe

    assert load_recipe(recipe).train.learning_rate == 2e-5
