"""Checkpoints as people bring them: those that are not whole are refused by name, those that only look odd are read."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from fixtures.command import kava, write_recipe
from fixtures.models import save_model
from fixtures.tokenizers import byte_level_tokenizer
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from kava.errors import CheckpointError, KavaError, ModelNotFoundError
from kava.extract.vllm.settings import EngineSettings
from kava.extract.vllm.teacher import VLLMTeacher
from kava.hub import check_weights, find_model, load_model
from kava.train.settings import StudentSettings
from kava.train.student import load_student, make_student

Tensors = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    save_model(folder, "llama", byte_level_tokenizer(), layers=3)
    return folder


def _copy(whole: Path, folder: Path, change: Callable[[Tensors], Tensors] = dict, **config: Any) -> Path:
    """The model in another folder, with other tensors or another config."""
    folder.mkdir(parents=True, exist_ok=True)
    for path in whole.iterdir():
        if path.suffix == ".json":
            (folder / path.name).write_bytes(path.read_bytes())
    save_file(change(load_file(whole / "model.safetensors")), folder / "model.safetensors", {"format": "pt"})
    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(settings | config))
    return folder


def _without(part: str) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {name: tensor for name, tensor in tensors.items() if part not in name}


def _prefixed(prefix: str) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {prefix + name: tensor for name, tensor in tensors.items()}


def _with(name: str, *shape: int) -> Callable[[Tensors], Tensors]:
    return lambda tensors: tensors | {name: torch.zeros(*shape)}


def _shards(folder: Path, suffix: str = "safetensors") -> list[Path]:
    """Splits the checkpoint of a folder into two files and an index."""
    single = folder / "model.safetensors"
    tensors = sorted(load_file(single).items())
    single.unlink()
    stem = "model" if suffix == "safetensors" else "pytorch_model"
    names = [f"{stem}-{number}-of-00002.{suffix}" for number in ("00001", "00002")]
    weight_map: dict[str, str] = {}
    for name, part in zip(names, (tensors[:5], tensors[5:]), strict=True):
        if suffix == "safetensors":
            save_file(dict(part), folder / name, {"format": "pt"})
        else:
            torch.save(dict(part), folder / name)
        weight_map |= {key: name for key, _ in part}
    (folder / f"{stem}.{suffix}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return [folder / name for name in names]


REFUSED: dict[str, tuple[Callable[[Tensors], Tensors], dict[str, Any], str]] = {
    "a layer missing": (_without("layers.1."), {}, r"9 tensors missing \(model.layers.1.input_layernorm.weight, "),
    "one tensor missing": (_without("2.self_attn.k_proj"), {}, r"1 tensors missing \(model.layers.2.self_attn.k_proj"),
    "no head": (_without("lm_head"), {}, r"1 tensors missing \(lm_head.weight\)"),
    "no embedding, tied": (
        lambda tensors: _without("lm_head")(_without("embed_tokens")(tensors)),
        {"tie_word_embeddings": True},
        r"missing \(.*model.embed_tokens.weight",
    ),
    "a layer too many": (dict, {"num_hidden_layers": 2}, r"9 tensors unexpected \(model.layers.2.input_layernorm"),
    "another vocabulary": (dict, {"vocab_size": 300}, r"2 tensors of another shape \(lm_head.weight \[400, 48\] inst"),
    "a value head": (_with("v_head.weight", 1, 48), {}, r"1 tensors unexpected \(v_head.weight\)"),
    "a prefix and a tensor missing": (
        lambda tensors: _prefixed("_orig_mod.")(_without("2.mlp.up_proj")(tensors)),
        {},
        r"config: 1 tensors missing \(model.layers.2.mlp.up_proj.weight\)",
    ),
    "an unknown prefix": (_prefixed("net."), {}, r"30 tensors unexpected \(net.lm_head.weight, "),
    "a tensor under two names": (
        lambda tensors: tensors | {"module.lm_head.weight": tensors["lm_head.weight"] + 1},
        {},
        r"1 tensors unexpected \(module.lm_head.weight\)",
    ),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_tensors_that_are_not_those_of_the_config_are_refused_by_name(whole: Path, tmp_path: Path, kind: str) -> None:
    change, config, message = REFUSED[kind]
    folder = _copy(whole, tmp_path / "model", change, **config)
    source = find_model(str(folder))
    loads: list[Callable[[], Any]] = [
        lambda: load_model(source, dtype="float32", device="cpu"),
        lambda: load_student(folder),
        lambda: make_student(StudentSettings(model=str(folder)), tmp_path / "student", []),
        lambda: VLLMTeacher(source, dtype="float32", output_dtype="float32", settings=EngineSettings()),
    ]
    for load in loads:
        with pytest.raises(CheckpointError, match=message):
            load()


@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
@pytest.mark.parametrize("damage", ["none", "missing", "truncated", "index", "names"])
def test_shards(whole: Path, tmp_path: Path, suffix: str, damage: str) -> None:
    folder = _copy(whole, tmp_path / "model")
    first, second = _shards(folder, suffix)
    index = next(folder.glob("*.index.json"))
    message = ""
    if damage == "missing":
        second.unlink()
        message = f"index.json names 1 of 2 files that do not exist \\({second.name}\\)"
    elif damage == "truncated":
        second.write_bytes(second.read_bytes()[:-5000])
        message = f"{second.name} is damaged"
    elif damage == "index":
        index.write_text(index.read_text()[:-20])
        message = f"{index.name} is not an index of shards"
    elif damage == "names":
        changed = json.loads(index.read_text())
        changed["weight_map"] = dict.fromkeys(changed["weight_map"], first.name)
        index.write_text(json.dumps(changed))
        message = "25 tensors missing"
    if damage != "none":
        with pytest.raises(CheckpointError, match=message):
            load_model(find_model(str(folder)), dtype="float32", device="cpu")
        return
    _assert_same(folder, whole)


def _assert_same(folder: Path, whole: Path) -> None:
    model = load_model(find_model(str(folder)), dtype="float32", device="cpu")
    expected = load_model(find_model(str(whole)), dtype="float32", device="cpu").state_dict()
    found = model.state_dict()
    assert list(found) == list(expected)
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


@pytest.mark.parametrize("kind", ["safetensors", "bin", "old bin"])
def test_a_truncated_file_is_named(whole: Path, tmp_path: Path, kind: str) -> None:
    for folder in (tmp_path / "model", tmp_path / "damaged"):
        path = _copy(whole, folder) / "model.safetensors"
        if kind != "safetensors":
            tensors = load_file(path)
            path.unlink()
            path = folder / "pytorch_model.bin"
            torch.save(tensors, path, _use_new_zipfile_serialization=kind == "bin")
    _assert_same(tmp_path / "model", whole)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(CheckpointError, match=f"{path.name} is damaged"):
        load_model(find_model(str(tmp_path / "damaged")), dtype="auto", device="cpu")


def test_a_folder_without_weights(whole: Path, tmp_path: Path) -> None:
    folder = _copy(whole, tmp_path / "model")
    (folder / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"there are no weights; expected model.safetensors or pytorch_model.bin"):
        check_weights(find_model(str(folder)))


def test_an_adapter_is_not_a_model(whole: Path, tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(AutoModelForCausalLM.from_pretrained(whole), LoraConfig(target_modules=["q_proj"]))
    model.save_pretrained(tmp_path / "adapter")
    with pytest.raises(CheckpointError, match="holds an adapter"):
        load_model(find_model(str(tmp_path / "adapter")), dtype="float32")


@pytest.mark.parametrize(
    "prefix", ["_orig_mod.", "module.", "module._orig_mod.", "_fsdp_wrapped_module._checkpoint_wrapped_module."]
)
def test_prefixes_of_wrappers_are_removed_and_said(
    whole: Path, tmp_path: Path, prefix: str, capsys: pytest.CaptureFixture[str]
) -> None:
    def wrap(tensors: Tensors) -> Tensors:
        return {prefix + name.replace("layers.1.", "layers.1._orig_mod."): t for name, t in tensors.items()}

    folder = _copy(whole, tmp_path / "model", wrap)
    _assert_same(folder, whole)
    said = capsys.readouterr().err
    assert said.count("prefixes of wrappers are removed") == 1
    assert f"as in '{prefix}" in said
    make_student(StudentSettings(model=str(folder)), tmp_path / "student", [])
    assert set(load_file(tmp_path / "student/model.safetensors")) == set(load_file(whole / "model.safetensors"))
    with pytest.raises(CheckpointError, match="which vLLM does not remove"):
        VLLMTeacher(find_model(str(folder)), dtype="float32", output_dtype="float32", settings=EngineSettings())


@pytest.mark.parametrize("arch", ["llama", "gemma3_text", "olmo3"])
def test_rotary_buffers_of_old_checkpoints_are_ignored(tmp_path: Path, arch: str) -> None:
    whole = save_model(tmp_path / "whole", arch, byte_level_tokenizer())
    buffers = {f"model.layers.{layer}.self_attn.rotary_emb.inv_freq": torch.ones(8) for layer in range(4)}
    _assert_same(_copy(whole, tmp_path / "old", lambda tensors: tensors | buffers), whole)


def test_tied_heads_may_be_left_out_or_stored_twice(tmp_path: Path) -> None:
    whole = save_model(tmp_path / "whole", "llama", byte_level_tokenizer(), tie_word_embeddings=True)
    assert "lm_head.weight" not in load_file(whole / "model.safetensors")
    _assert_same(whole, whole)
    twice = _copy(whole, tmp_path / "twice", lambda t: t | {"lm_head.weight": t["model.embed_tokens.weight"].clone()})
    _assert_same(twice, whole)
    only_head = _copy(
        whole,
        tmp_path / "head",
        lambda t: {name.replace("model.embed_tokens", "lm_head"): tensor for name, tensor in t.items()},
    )
    _assert_same(only_head, whole)


@pytest.mark.parametrize("arch", ["mixtral", "qwen3_moe", "phi", "gemma2", "cohere"])
def test_other_families(tmp_path: Path, arch: str) -> None:
    whole = save_model(tmp_path / "whole", arch, byte_level_tokenizer())
    _assert_same(_copy(whole, tmp_path / "copy"), whole)
    names = sorted(load_file(whole / "model.safetensors"))
    name = next(name for name in names if "layers.1." in name and ("mlp" in name or "moe" in name))
    broken = _copy(whole, tmp_path / "broken", _without(name))
    with pytest.raises(CheckpointError, match=r"1 tensors (missing|of another shape)"):
        check_weights(find_model(str(broken)))


def test_the_command_says_it_in_one_line_before_any_work(tmp_path: Path, tiny_models: dict[str, Path]) -> None:
    broken = _copy(tiny_models["teacher"], tmp_path / "broken", _without("layers.3."))
    recipe = write_recipe(tmp_path, tiny_models | {"teacher": broken})
    printed = kava("extract", recipe, code=2)
    assert "12 tensors missing (model.layers.3." in printed
    assert "Traceback" not in printed
    assert not list((tmp_path / "run").rglob("parts/0*"))


def test_a_model_type_without_a_checkpoint_is_still_one_error() -> None:
    assert issubclass(CheckpointError, KavaError)
    assert not issubclass(CheckpointError, ModelNotFoundError), "a plan passes over models that are elsewhere"
