"""Lossy codecs: their bounds, and that plain Zarr decodes them by the documented formula."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import zarr
from fixtures.stores import EXTRAS, GEOMETRY, manifest, sample, tree, write_store
from hypothesis import given, settings
from hypothesis import strategies as st

from kava.errors import DamagedStoreError, SampleFailedError
from kava.store import DTYPES, LOSSY, KVGeometry, KVSample, KVStore, default_page_tokens

LENGTHS = [3, 4, 9, 1, 6, 12, 5]
EXACT = 4


def documented(group: Any, name: str, position: int, bits: int, width: int) -> torch.Tensor:
    """Decodes one sample as docs/store-format.md says, with zarr-python alone."""
    start, length = int(group["start"][position]), int(group["length"][position])
    page = group[f"{name}_q"].chunks[0]
    rows, pages = slice(start, start + length), slice(start // page, -(-(start + length) // page))
    as_stored = getattr(torch, group[f"{name}_scale"].attrs["dtype"])

    def numbers(array: np.ndarray[Any, Any]) -> torch.Tensor:
        if as_stored == torch.bfloat16:
            return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
        return torch.from_numpy(array)

    codes = np.asarray(group[f"{name}_q"][rows])
    if bits == 4:
        codes = np.stack([codes & 15, codes >> 4], axis=-1).reshape(*codes.shape[:-1], 2 * codes.shape[-1])
        codes = codes[..., :width]
    scale, least = (
        numbers(np.asarray(group[f"{name}_{what}"][pages if name == "keys" else rows])).float().numpy()
        for what in ("scale", "min")
    )
    if name == "keys":
        scale, least = (np.repeat(a, page, axis=0)[:length] for a in (scale, least))
    else:
        scale, least = scale[..., None], least[..., None]
    decoded = torch.from_numpy(codes.astype(np.float32) * scale + least).to(as_stored)
    exact_rows = group[f"{name}_exact"].chunks[0]
    exact = np.asarray(group[f"{name}_exact"][pages.start * exact_rows : (pages.start + 1) * exact_rows])
    decoded[:exact_rows] = numbers(exact)[:length]
    return decoded


def groups(name: str, tensor: torch.Tensor, page: int) -> list[torch.Tensor]:
    """The numbers that share a scale, by plain loops: `[n]` each, the exact tokens left out."""
    exact = min(EXACT, page)
    out = []
    if name == "values":
        return [row for token in tensor[exact:] for layer in token for row in layer]
    for first in range(0, len(tensor), page):
        rows = tensor[max(first, exact) : first + page]
        if len(rows):
            out += list(rows.flatten(1).T)
    return out


def check_bounds(found: torch.Tensor, wanted: torch.Tensor, name: str, page: int, bits: int) -> None:
    exact = min(EXACT, page)
    assert torch.equal(found[:exact], wanted[:exact])
    for mine, theirs in zip(groups(name, found, page), groups(name, wanted, page), strict=True):
        spread = float(theirs.double().max() - theirs.double().min())
        # A scale is the next number of the dtype above spread / steps; what is decoded is rounded to the dtype.
        eps, tiny = torch.finfo(wanted.dtype).eps, torch.finfo(wanted.dtype).smallest_normal
        step = spread / (2**bits - 1) * (1 + eps) + tiny * eps
        rounding = eps / 2 * (theirs.double().abs().max() + step) + tiny * eps + 2.0**-22 * theirs.double().abs().max()
        assert float((mine.double() - theirs.double()).abs().max()) <= step / 2 * (1 + 1e-5) + float(rounding)
        if spread == 0:
            assert torch.equal(mine, theirs)


@settings(max_examples=15, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 21), min_size=1, max_size=5),
    page=st.sampled_from([1, 2, 8, 16]),
    shape=st.tuples(st.integers(1, 3), st.integers(1, 2), st.sampled_from([1, 3, 8])),
    codec=st.sampled_from(sorted(LOSSY)),
    dtype=st.sampled_from(sorted(DTYPES)),
    exponent=st.integers(-24, 14),
    offset=st.floats(-30, 30),
    seed=st.integers(0, 2**16),
)
def test_errors_are_within_half_a_scale_and_zarr_decodes_the_same_bits(
    tmp_path_factory: pytest.TempPathFactory,
    lengths: list[int],
    page: int,
    shape: Any,
    codec: str,
    dtype: str,
    exponent: int,
    offset: float,
    seed: int,
) -> None:
    geometry = KVGeometry(num_layers=shape[0], num_key_value_heads=shape[1], head_dim=shape[2])
    description = manifest(
        len(lengths), len(lengths), page_tokens=page, geometry=geometry, codec=codec, dtype=dtype, extras=EXTRAS
    )
    store = KVStore.create(tmp_path_factory.mktemp("store") / "s.zarr", description)
    generator = torch.Generator().manual_seed(seed)
    samples = []
    for number, tokens in enumerate(lengths):
        made = sample(number, tokens, geometry=geometry, extras=EXTRAS)
        numbers = ((torch.randn(tokens, *shape, generator=generator) + offset) * 2.0**exponent for _ in range(2))
        kv = [tensor.clamp(-6e4, 6e4).to(getattr(torch, dtype)) for tensor in numbers]  # float16 ends at 65,504.
        kv[0][:, 0] = offset  # A channel that does not change.
        samples.append(dataclasses.replace(made, keys=kv[0], values=kv[1]))
    with store.write_part(0) as writer:
        for position in np.random.default_rng(seed).permutation(len(lengths)).tolist():
            writer.append(position, samples[position])
        writer.commit()
    assert not store.failed
    assert store.verify() == []
    group = zarr.open_group(store.path / "parts/00000", mode="r", zarr_format=3)
    for position, wanted in enumerate(samples):
        found = store[position]
        for name in ("keys", "values"):
            mine, theirs = getattr(found, name), getattr(wanted, name)
            assert mine.dtype == theirs.dtype
            assert mine.shape == theirs.shape
            check_bounds(mine, theirs, name, page, LOSSY[codec].bits)
            assert torch.equal(mine, documented(group, name, position, LOSSY[codec].bits, shape[2]))
        for name, array in wanted.extras.items():
            np.testing.assert_array_equal(found.extras[name], array)


def test_the_documents_example_decodes_the_same_bits(tmp_path: Path) -> None:
    text = (Path(__file__).parents[2] / "docs/store-format.md").read_text()
    (example,) = re.findall(r"```python\n(def bfloat16.*?)```", text, re.S)
    store, samples = write_store(tmp_path / "s.zarr", LENGTHS, codec="int8", samples_per_part=7)
    part = zarr.open_group(store.path / "parts/00000", mode="r", zarr_format=3)
    for position in range(len(samples)):
        start, length = (int(part[name][position]) for name in ("start", "length"))  # type: ignore[index, arg-type]
        names: dict[str, Any] = {"torch": torch, "part": part, "start": start, "length": length}
        exec(example, names)
        assert torch.equal(names["keys"], store[position].keys)
        assert torch.equal(names["values"], store[position].values)


@pytest.mark.parametrize("name", ["keys", "values"])
def test_scales_are_by_plain_loops(name: str) -> None:
    """Oracle in float64: the smallest bfloat16 at or above spread / 255, the nearest code."""
    rng = np.random.default_rng(0)
    tensor = torch.from_numpy(rng.standard_normal((11, 2, 3, 5))).to(torch.bfloat16)
    bfloat16, page = DTYPES["bfloat16"], 8
    arrays = LOSSY["int8"].encode(name, bfloat16.to_numpy(tensor), page, bfloat16)
    scales, lows = (bfloat16.to_torch(arrays[f"{name}_{what}"]).double() for what in ("scale", "min"))
    for layer, head, dim in np.ndindex(2, 3, 5):
        for token in range(4, 11):
            if name == "keys":
                shared = tensor[4:8, layer, head, dim] if token < 8 else tensor[8:, layer, head, dim]
                scale, low = (float(t[token // page, layer, head, dim]) for t in (scales, lows))
            else:
                shared = tensor[token, layer, head]
                scale, low = (float(t[token, layer, head]) for t in (scales, lows))
            spread = float(shared.double().max() - shared.double().min())
            assert low == float(shared.min())
            below = torch.tensor(scale, dtype=torch.bfloat16).view(torch.int16) - 1
            assert float(below.view(torch.bfloat16)) * 255 < spread <= scale * 255
            code = (float(tensor[token, layer, head, dim]) - low) / scale
            assert abs(arrays[f"{name}_q"][token, layer, head, dim] - code) <= 0.5 + 1e-5
    assert not arrays[f"{name}_q"][:4].any()
    assert not arrays[f"{name}_q"][11:].any()


@pytest.mark.parametrize("codec", LOSSY)
def test_what_lies_behind_a_sample_is_in_no_scale(codec: str) -> None:
    """A sample's numbers do not depend on the length of its last page."""
    float32 = DTYPES["float32"]
    tensor = torch.randn(9, 2, 2, 6) + 100  # Far from the zeros of the padding.
    for page in (9, 16, 64):
        for name in ("keys", "values"):
            before = tensor.clone()
            found = LOSSY[codec].round_trip(name, tensor, page, float32)
            assert torch.equal(tensor, before)
            assert torch.equal(found, LOSSY[codec].round_trip(name, tensor, 9, float32))
            assert (found - tensor).abs().max() < 0.5


@pytest.mark.parametrize("codec", LOSSY)
@pytest.mark.parametrize("dtype", DTYPES)
def test_extreme_numbers_are_held_or_the_sample_fails(tmp_path: Path, codec: str, dtype: str) -> None:
    """From the smallest number of a dtype to the largest; a spread that no scale spans within the dtype is recorded, never written."""
    limits = torch.finfo(getattr(torch, dtype))
    smallest = limits.smallest_normal * limits.eps
    store = KVStore.create(tmp_path / "s.zarr", manifest(3, 3, dtype=dtype, codec=codec, page_tokens=8))
    tiny, large, wide = (sample(n, 8) for n in range(3))
    pattern = torch.arange(8.0)[:, None, None, None].expand(8, *GEOMETRY.shape)
    tiny = dataclasses.replace(tiny, keys=pattern.mul(smallest).clone(), values=pattern.mul(smallest).clone())
    large = dataclasses.replace(large, keys=pattern.mul(limits.max / 8), values=pattern.mul(limits.max / 8))
    ends = torch.where(pattern.int() % 2 == 0, limits.max, -limits.max)
    wide = dataclasses.replace(wide, keys=ends, values=torch.ones(8, *GEOMETRY.shape))
    with store.write_part(0) as writer:
        for position, made in enumerate((tiny, large, wide)):
            writer.append(position, made)
        writer.commit()
    for index, wanted in enumerate((tiny, large)):
        for name in ("keys", "values"):
            check_bounds(
                getattr(store[index], name),
                getattr(wanted, name).to(getattr(torch, dtype)),
                name,
                8,
                LOSSY[codec].bits,
            )
    assert store.failed == {"sample-2": f"{codec} cannot hold the keys in layers [0, 1, 2]"}
    with pytest.raises(SampleFailedError, match="cannot hold"):
        store[2]
    assert store.verify() == []


@pytest.mark.parametrize("codec", LOSSY)
def test_non_finite_samples_are_recorded(tmp_path: Path, codec: str) -> None:
    store = KVStore.create(tmp_path / "s.zarr", manifest(2, 2, codec=codec))
    broken = sample(0, 9)
    assert broken.values is not None
    broken.values[7, 1, 0, 3] = float("inf")
    with store.write_part(0) as writer:
        writer.append(0, broken)
        writer.append(1, sample(1, 6))
        writer.commit()
    assert store.failed == {"sample-0": "non-finite values in layers [1]"}
    assert len(store[1]) == 6
    assert store.verify() == []


@pytest.fixture(params=sorted(LOSSY))
def store(tmp_path: Path, request: pytest.FixtureRequest) -> KVStore:
    written: KVStore = write_store(tmp_path / "s.zarr", LENGTHS, codec=request.param, extras=EXTRAS)[0]
    return written


def test_statistics_and_dask_are_of_the_decoded_numbers(store: KVStore) -> None:
    for name in ("keys", "values"):
        rows = torch.cat([getattr(s, name) for s in store]).float().numpy()
        np.testing.assert_array_equal(getattr(store, name).compute(scheduler="synchronous"), rows)
        kept = rows[np.concatenate([s.mask for s in store])].astype(np.float64)
        np.testing.assert_allclose(store.statistics()[f"{name}_mean"], kept.mean((0, 2, 3)), atol=1e-7)
        np.testing.assert_allclose(store.statistics()[f"{name}_std"], kept.std((0, 2, 3)), rtol=1e-6)


def test_only_what_is_asked_for_is_read(store: KVStore) -> None:
    for path in (store.path / "parts/00000").glob("values_*/c/**/*"):
        if path.is_file():
            path.write_bytes(b"\0" * path.stat().st_size)
    assert store.sample(0, values=False).values is None
    with pytest.raises(DamagedStoreError):
        store.sample(0, keys=False)


def test_damage_of_every_array_is_found_and_named(store: KVStore) -> None:
    arrays = {f"{name}_{what}" for name in ("keys", "values") for what in ("q", "scale", "min", "exact")}
    assert set(store.part(1).pages) == arrays | {"importance", "indices", "tokens"}
    for array in sorted(arrays):
        (path,) = (p for p in (store.path / "parts/00001" / array / "c").rglob("*") if p.is_file())
        good = path.read_bytes()
        place = store.part(1).pages[array].offset(2) + 5
        path.write_bytes(good[:place] + bytes([good[place] ^ 8]) + good[place + 1 :])
        (damage,) = KVStore.open(store.path).verify()
        assert (damage.part, damage.array, damage.chunk, damage.sample_ids) == (1, array, 2, ("sample-4",))
        name = array.split("_")[0]
        if not array.endswith("_exact"):  # Of those a reader needs a sample's first page only.
            with pytest.raises(DamagedStoreError, match="chunk 2: checksum mismatch"):
                KVStore.open(store.path).sample(4, keys=name == "keys", values=name == "values")
        path.write_bytes(good)
    assert KVStore.open(store.path).verify() == []


def test_a_lossy_codec_is_content() -> None:
    prints = {codec: manifest(codec=codec).fingerprint for codec in ("blosc-zstd", "none", *LOSSY)}
    assert prints["blosc-zstd"] == prints["none"]
    assert len(set(prints.values())) == 1 + len(LOSSY)


def test_one_sample_is_the_same_whatever_it_lies_beside(tmp_path: Path) -> None:
    one, samples = write_store(tmp_path / "one.zarr", LENGTHS, codec="int8")
    other = KVStore.create(tmp_path / "other.zarr", manifest(codec="int8"))
    for part in other.missing_parts():
        with other.write_part(part) as writer:
            for position in reversed(range(len(other.manifest.part_samples(part)))):
                writer.append(position, samples[other.manifest.part_samples(part)[position]])
            writer.commit()
    assert tree(one.path) != tree(other.path)
    for mine, theirs in zip(one, other, strict=True):
        assert isinstance(mine, KVSample)
        assert torch.equal(mine.keys, theirs.keys)  # type: ignore[arg-type]
        assert torch.equal(mine.values, theirs.values)  # type: ignore[arg-type]


def test_pages_hold_64_tokens_whatever_the_geometry() -> None:
    large = KVGeometry(num_layers=80, num_key_value_heads=8, head_dim=128)
    assert default_page_tokens(large, 2) == 4
    assert {default_page_tokens(large, 2, codec) for codec in LOSSY} == {64}
