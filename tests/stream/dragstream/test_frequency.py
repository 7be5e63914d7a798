from __future__ import annotations

import pytest
import torch

from models.wan.rope import apply_rope, rope_table
from stream.dragstream.frequency import butterworth, low_pass, low_pass_keys, low_pass_tokens

GRID = (30, 52)


def test_the_response_is_that_of_the_official_filter():
    # At R = 0.25 and 0.5 cycles per token, measured there: 0.2 -> .144, .001; 0.4 -> .977, .144; 0.6 -> .999, .811.
    for cutoff, at_quarter, at_half in ((0.2, 0.144, 0.001), (0.4, 0.977, 0.144), (0.6, 0.999, 0.811)):
        response = butterworth(4, 4, cutoff)  # frequencies 0, 0.25, -0.5, -0.25
        assert response[0, 0] == 1
        assert response[0, 1] == pytest.approx(at_quarter, abs=1e-3)
        assert response[2, 0] == pytest.approx(at_half, abs=1e-3)


def test_a_constant_passes_and_a_checkerboard_does_not():
    constant, checker = torch.full((1, 8, 8), 3.0), torch.ones(1, 8, 8)
    checker[:, ::2, 1::2] = checker[:, 1::2, ::2] = -1
    torch.testing.assert_close(low_pass(constant, 0.2), constant)
    assert low_pass(checker, 0.2).abs().max() < 1e-3
    assert low_pass(checker.bfloat16(), 0.2).dtype == torch.bfloat16


def test_each_frame_head_and_channel_is_filtered_on_its_own():
    tokens = torch.randn(1, 2, 3 * 8 * 8, 4, generator=torch.Generator().manual_seed(0))
    found = low_pass_tokens(tokens, (8, 8), 0.3)
    alone = low_pass(tokens[0, 1, 64:128, 2].view(8, 8), 0.3).flatten()
    torch.testing.assert_close(found[0, 1, 64:128, 2], alone)


def test_keys_filtered_before_their_rotation_keep_a_constant_key():
    table = rope_table(2, *GRID, 128, start_frame=5)
    constant = torch.randn(1, 1, 1, 128, generator=torch.Generator().manual_seed(0)).expand(1, 2, 2 * 1560, 128)
    keys = apply_rope(constant.transpose(1, 2), table).transpose(1, 2)

    def error(rope: str) -> float:
        return float((low_pass_keys(keys, GRID, 0.2, rope) - keys).norm() / keys.norm())

    assert error("pre") < 1e-5
    assert error("post") > 0.02  # the rotation itself has high frequencies
