from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from fixtures.models import tiny_model
from fixtures.stores import write_store

from kava.errors import RecipeError, StageError
from kava.hub import tokenizer_digest
from kava.store import KVGeometry, KVStore
from kava.tap import KVTap, decoder, probe_geometry
from kava.train import TrainSettings, load_student, train_student
from kava.train.lora import add_lora
from kava.train.losses import LOSSES, KVLoss
from kava.train.settings import LoraSettings


@pytest.mark.parametrize("model_type", ["llama", "qwen3", "phi3", "phi"])
def test_the_tap_sees_through_the_wrapper(model_type: str) -> None:
    """Untrained adapters change nothing; the tap, the geometry and the decoder are those of the model inside."""
    model = tiny_model(model_type, layers=3)
    geometry, ids = probe_geometry(model), torch.arange(10).view(2, 5)
    with KVTap(model) as tap:
        model(input_ids=ids, use_cache=False)
    wanted = tap.stack()
    wrapped = add_lora(model, LoraSettings())
    assert decoder(wrapped) is decoder(model)
    assert probe_geometry(wrapped) == geometry
    with KVTap(wrapped) as tap:
        wrapped(input_ids=ids, use_cache=False)
    for found, plain in zip(tap.stack(), wanted, strict=True):
        torch.testing.assert_close(found, plain, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("name", LOSSES)
def test_the_kv_loss_reaches_the_adapters_of_every_layer(name: str, checkpointing: bool) -> None:
    model = add_lora(tiny_model("llama", layers=3, heads=4, kv_heads=2, head_dim=8), LoraSettings(r=2)).train()
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    generator = torch.Generator().manual_seed(0)
    target = {side: torch.randn(2, 7, 3, 2, 8, generator=generator) for side in ("keys", "values")}
    with KVTap(model) as tap:
        model(input_ids=torch.arange(14).view(2, 7), use_cache=False)
    loss = KVLoss(name, 1, 1, (0, 1, 2), dict.fromkeys(target, (1.0, 1.0, 1.0)))
    loss({"keys": tap.keys, "values": tap.values}, target, torch.ones(2, 7, dtype=torch.bool))["kv"].backward()  # type: ignore[no-untyped-call]
    gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    assert all("lora_" in n for n in gradients)
    # B is zero at first, so that A has a gradient only from the second step on.
    for layer in range(3):
        for side in ("k_proj", "v_proj"):
            (gradient,) = [g for n, g in gradients.items() if f"layers.{layer}.self_attn.{side}.lora_B" in n]
            assert gradient.abs().max() > 1e-6


@pytest.fixture(scope="module")
def targets(tmp_path_factory: pytest.TempPathFactory, tiny_models: dict[str, Path]) -> KVStore:
    store: KVStore = write_store(
        tmp_path_factory.mktemp("targets") / "t.zarr",
        [9, 14, 6, 11, 8, 17, 5, 12, 10],
        kind="target",
        geometry=KVGeometry(num_layers=3, num_key_value_heads=4, head_dim=8),
        tokenizer_digest=tokenizer_digest(load_student(tiny_models["student"])[1]),
    )[0]
    return store


def test_a_merged_student_and_its_adapter(targets: KVStore, tiny_models: dict[str, Path], tmp_path: Path) -> None:
    """The merged student needs neither kava nor peft; the adapter on the first student says the same. And it resumes."""
    lora = {"r": 4, "dropout": 0.1, "target_modules": ["q_proj", "k_proj", "v_proj", "gate_proj"]}
    settings = TrainSettings.model_validate(
        {
            "max_steps": 6,
            "alpha": 1.0,
            "batch_size": 2,
            "logging_steps": 1,
            "save_steps": 2,
            "learning_rate": 1e-2,
            "lora": lora,
        }
    )

    def fall(step: int, total: int) -> None:
        if step == 5:
            raise RuntimeError("power")

    train_student(tiny_models["student"], targets, tmp_path / "whole", settings)
    with pytest.raises(RuntimeError, match="power"):
        train_student(tiny_models["student"], targets, tmp_path / "cut", settings, on_step=fall)
    train_student(tiny_models["student"], targets, tmp_path / "cut", settings)
    ids = torch.arange(10).view(2, 5)
    code = (
        "import sys, torch; from transformers import AutoModelForCausalLM as M\n"
        f"out = {{n: M.from_pretrained({str(tmp_path)!r} + '/' + n).eval()(torch.arange(10).view(2, 5)).logits\n"
        "       for n in ('whole', 'cut')}\n"
        f"torch.save(out, {str(tmp_path / 'logits.pt')!r})\n"
        "assert not {'kava', 'peft'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd="/")
    logits = torch.load(tmp_path / "logits.pt")
    assert torch.equal(logits["whole"], logits["cut"])
    from peft import PeftModel

    first = load_student(tiny_models["student"])[0].eval()
    assert not torch.allclose(first(ids).logits, logits["whole"], atol=1e-3)
    adapted = PeftModel.from_pretrained(first, tmp_path / "whole/adapter").eval()
    torch.testing.assert_close(adapted(ids).logits, logits["whole"], rtol=1e-4, atol=1e-4)
    config = json.loads((tmp_path / "whole/adapter/adapter_config.json").read_text())
    assert (config["r"], set(config["target_modules"])) == (4, set(lora["target_modules"]))  # type: ignore[call-overload]


def test_what_cannot_be_taught_is_refused(targets: KVStore, tiny_models: dict[str, Path], tmp_path: Path) -> None:
    """Nothing before the keys of layer 0 is trainable: their loss would be logged, and teach nothing."""
    only_queries = TrainSettings.model_validate({"max_steps": 1, "lora": {"target_modules": ["q_proj"]}})
    with pytest.raises(StageError, match="the keys of layer 0 depend on no trainable weight"):
        train_student(tiny_models["student"], targets, tmp_path / "x", only_queries)
    values = {"target_modules": ["v_proj"]}
    only_values = TrainSettings.model_validate({"max_steps": 1, "lora": values, "key_weight": 0})
    train_student(tiny_models["student"], targets, tmp_path / "y", only_values)
    with pytest.raises(RecipeError, match=r"target_modules: LlamaForCausalLM has no module 'qproj'"):
        add_lora(tiny_model("llama"), LoraSettings(target_modules=["qproj"]))
