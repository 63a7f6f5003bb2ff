"""What transformers says of a model is passed on: errors as one line that says what to do, warnings once."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from fixtures.command import kava, write_recipe
from fixtures.models import save_model
from fixtures.tokenizers import byte_level_tokenizer

from kava.errors import KavaError, RecipeError
from kava.hub import find_model, load_config, load_model, model_geometry, torch_device
from kava.train.settings import StudentSettings
from kava.train.student import student_config


def _folder(folder: Path, arch: str = "llama", **config: Any) -> Path:
    save_model(folder, arch, byte_level_tokenizer(), layers=2)
    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(settings | config))
    return folder


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            {"rope_parameters": {"rope_type": "foo", "rope_theta": 1e4}},
            "rope_type 'foo' is not known.*only default, dyn",
        ),
        ({"rope_scaling": {"type": "foo", "factor": 2.0}}, "rope_type 'foo' is not known"),
        ({"rope_parameters": {"rope_type": "llama3", "factor": 2.0}}, "Missing required keys .*low_freq_factor"),
        ({"hidden_size": "many"}, "Field 'hidden_size' expected int, got str"),
        ({"num_attention_heads": 5}, r"hidden size \(48\) is not a multiple of the number of attention heads \(5\)"),
        ({"attn_implementation": "flash_attention_2"}, "FlashAttention2 .* seem to be installed"),
        ({"hidden_act": "bogus"}, "unknown key 'bogus'"),
        ({"model_type": "nosuch"}, "does not recognize this architecture"),
    ],
)
def test_a_config_that_transformers_refuses_is_one_useful_line(
    tmp_path: Path, config: dict[str, Any], message: str
) -> None:
    source = find_model(str(_folder(tmp_path / "model", **config)))
    for load in (lambda: load_model(source, dtype="float32", device="cpu"), lambda: model_geometry(source)):
        with pytest.raises(KavaError, match=message) as caught:
            load()
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"model_type": "llama", "hidden_size": "many"}, "student.config: .*expected int, got str"),
        (
            {"model_type": "llama", "rope_parameters": {"rope_type": "foo", "rope_theta": 1e4}},
            "student.config: rope_type 'foo' is not known",
        ),
    ],
)
def test_a_student_config(config: dict[str, Any], message: str) -> None:
    settings = StudentSettings.model_validate({"config": config, "tokenizer": {"vocab_size": 300}})
    with pytest.raises(KavaError, match=message) as caught:
        student_config(settings, None)
    assert "\n" not in str(caught.value)


def test_warnings_of_transformers_are_shown_once(
    tmp_path: Path, tiny_models: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRANSFORMERS_VERBOSITY", "error")
    parameters = {"rope_type": "yarn", "factor": 2.0, "rope_theta": 1e4, "original_max_position_embeddings": 128}
    teacher = _folder(tmp_path / "model", "qwen2", rope_parameters=parameters | {"bogus": 3})
    printed = kava("extract", write_recipe(tmp_path, tiny_models | {"teacher": teacher}))
    assert printed.count("warning: ") == 1
    (line,) = [line for line in printed.splitlines() if line.startswith("warning: ")]
    assert f"model {str(teacher)!r}: transformers says: Unrecognized keys in `rope_parameters`" in line
    assert "bogus" in line
    assert "LOAD REPORT" not in printed


def test_attention_that_is_chosen_for_a_family_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = find_model(str(_folder(tmp_path / "model", "gemma2")))
    for _ in range(2):
        load_model(source, dtype="float32", device="cpu")
    said = capsys.readouterr().err
    assert said.count("attention is computed by 'eager', which is exact for it") == 1


def test_the_attention_of_a_config_is_kept(tmp_path: Path) -> None:
    source = find_model(str(_folder(tmp_path / "model", attn_implementation="eager")))
    assert load_model(source, dtype="float32", device="cpu").config._attn_implementation == "eager"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is CUDA")
@pytest.mark.parametrize("device", ["cuda", "cuda:1"])
def test_cuda_where_there_is_none(tmp_path: Path, tiny_models: dict[str, Path], device: str) -> None:
    with pytest.raises(RecipeError, match=f"device '{device}' cannot be used here: .*Set device to one of auto, cpu"):
        torch_device(device)
    recipe = write_recipe(
        tmp_path, tiny_models, teachers={"big": {"model": str(tiny_models["teacher"]), "device": device}}
    )
    for command in (("extract", recipe), ("run", recipe), ("extract", recipe, "--check-parity", "1")):
        assert f"device '{device}' cannot be used here" in kava(*command, code=2)
    assert f"device '{device}' cannot be used here" in kava("plan", recipe, code=2)
    assert not list((tmp_path / "run").rglob("parts/0*"))


def test_a_device_that_torch_does_not_know() -> None:
    with pytest.raises(RecipeError, match="device 'gpu' cannot be used here"):
        torch_device("gpu")
    assert torch_device("auto").type in ("cpu", "cuda")


def test_a_loaded_config_is_the_models(tmp_path: Path) -> None:
    source = find_model(str(_folder(tmp_path / "model")))
    assert load_config(source).num_hidden_layers == 2
