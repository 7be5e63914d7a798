"""Rotations: closed form, shift invariance, no upper limit, cached tables safe to share between modes."""

from __future__ import annotations

import math

import pytest
import torch
from diffusers.models.transformers.transformer_wan import WanRotaryPosEmbed
from wan_reference import rng

from models.wan import rope
from models.wan.rope import apply_rope, axis_widths, rope_table


def test_axis_widths():
    assert axis_widths(128) == (44, 42, 42)
    assert axis_widths(40) == (16, 12, 12)
    assert axis_widths(48) == (16, 16, 16)


@pytest.mark.parametrize("head_dim", [40, 48, 128])
def test_table_equals_diffusers(head_dim: int):
    cos, sin = WanRotaryPosEmbed(head_dim, (1, 2, 2), 1024)(torch.zeros(1, 1, 5, 4, 6))
    table = rope_table(3, 2, 3, head_dim, start_frame=2)
    skipped = 2 * 2 * 3
    torch.testing.assert_close(table[..., 0].double(), cos[0, skipped:, :, ::2].double(), atol=1e-7, rtol=0)
    torch.testing.assert_close(table[..., 1].double(), sin[0, skipped:, :, 1::2].double(), atol=1e-7, rtol=0)


def test_rotates_interleaved_pairs():
    frame = 5
    x = torch.zeros(1, 1, 1, 40)
    x[..., 0], x[..., 3] = 1.0, 1.0  # first member of pair 0, second member of pair 1
    rotated = apply_rope(x, rope_table(1, 1, 1, 40, start_frame=frame))
    slow = frame * 10_000 ** (-2 / 16)
    expected = {0: math.cos(frame), 1: math.sin(frame), 2: -math.sin(slow), 3: math.cos(slow)}
    for index, value in expected.items():
        assert rotated[..., index].item() == pytest.approx(value, abs=1e-6)
    assert rotated[..., 4:].abs().max() == 0


def test_compiled_arithmetic_is_the_same():
    x, table = torch.randn(2, 12, 3, 40, generator=rng()), rope_table(2, 2, 3, 40, start_frame=7)
    real = rope._rotate_real(x.unflatten(-1, (-1, 2)), table).flatten(-2)
    torch.testing.assert_close(apply_rope(x, table), real, rtol=1e-6, atol=1e-6)


def test_scores_depend_on_distance_only_even_beyond_1024_frames():
    q, k = torch.randn(2, 1, 6, 2, 48, generator=rng(), dtype=torch.float64)

    def scores(start: int) -> torch.Tensor:
        rotate = [
            apply_rope(x, rope_table(1, 2, 3, 48, start_frame=first, dtype=torch.float64))
            for x, first in ((q, start + 3), (k, start))
        ]
        return torch.einsum("bihd,bjhd->bhij", *rotate)

    torch.testing.assert_close(scores(5000), scores(0), rtol=0, atol=1e-9)


def test_keeps_dtype_and_rotates_in_float32():
    x, table = torch.randn(1, 12, 2, 48, generator=rng()).bfloat16(), rope_table(2, 2, 3, 48, start_frame=900)
    rotated = apply_rope(x, table)
    assert rotated.dtype == torch.bfloat16
    assert torch.equal(rotated, apply_rope(x.float(), table).bfloat16())


def test_table_made_in_inference_mode_serves_training():
    rope_table.cache_clear()
    with torch.inference_mode():
        table = rope_table(2, 2, 3, 48)
    x = torch.randn(1, 12, 2, 48, requires_grad=True)
    apply_rope(x, table).square().sum().backward()
    torch.testing.assert_close(x.grad, 2 * x.detach())  # a rotation keeps the norm
    assert rope_table(2, 2, 3, 48) is table
