from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kava.extract.rope import RotaryTable


def _table(positions: int, width: int, *, interleaved: bool = False, scale: float = 1.0) -> RotaryTable:
    frequencies = 10000.0 ** (-torch.arange(0, width, 2).double() / width)
    angles = torch.arange(positions).double()[:, None] * frequencies
    return RotaryTable((angles.cos() * scale).float(), (angles.sin() * scale).float(), interleaved)


@settings(deadline=None)
@given(st.integers(1, 60), st.sampled_from([(8, 8), (16, 8), (16, 4)]), st.booleans(), st.sampled_from([1.0, 1.3]))
def test_unrotate_is_the_inverse(tokens: int, dims: tuple[int, int], interleaved: bool, scale: float) -> None:
    table = _table(200, dims[1], interleaved=interleaved, scale=scale)
    generator = torch.Generator().manual_seed(tokens)
    keys = torch.randn(tokens, 3, dims[0], generator=generator)
    positions = torch.randint(0, 200, (tokens,), generator=generator)
    rows = table.at(positions)
    rotated = rows.rotate(keys)
    torch.testing.assert_close(rows.unrotate(rotated), keys, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(rotated[..., dims[1] :], keys[..., dims[1] :])


@pytest.mark.parametrize("interleaved", [False, True])
def test_rotation_is_multiplication_of_complex_numbers(interleaved: bool) -> None:
    table, width = _table(50, 16, interleaved=interleaved), 16
    keys = torch.randn(50, 2, width)
    first, second = (slice(0, width, 2), slice(1, width, 2)) if interleaved else (slice(0, 8), slice(8, 16))
    turned = torch.complex(keys[..., first], keys[..., second]) * torch.complex(table.cos, table.sin)[:, None]
    found = table.rotate(keys)
    torch.testing.assert_close(found[..., first], turned.real)
    torch.testing.assert_close(found[..., second], turned.imag)


def test_equals_transformers_llama() -> None:
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    table = _table(40, 16)
    keys = torch.randn(40, 2, 16)
    cos, sin = (torch.cat([x, x], dim=-1)[None] for x in (table.cos, table.sin))
    heads = keys.transpose(0, 1)[None]
    expected = apply_rotary_pos_emb(heads, heads, cos, sin)[1][0].transpose(0, 1)
    torch.testing.assert_close(table.rotate(keys), expected)
