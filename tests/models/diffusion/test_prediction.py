"""Conversions: exact on straight paths, inverse to each other, float32 whatever comes in."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from models.diffusion.prediction import add_noise, expand_sigma, velocity_target, velocity_to_x0

SHAPE = (2, 3, 4, 2, 5)  # B, C, F, H, W


def path(seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    rng = torch.Generator().manual_seed(seed)
    return torch.randn(SHAPE, generator=rng), torch.randn(SHAPE, generator=rng)


@pytest.mark.parametrize(
    "sigma", [0.0, 0.3, 1.0, torch.tensor([0.25, 1.0]), torch.linspace(0, 1, 8).view(2, 4)], ids=str
)
def test_straight_path_is_recovered(sigma):
    x0, noise = path(0)
    noisy, velocity = add_noise(x0, noise, sigma), velocity_target(x0, noise)
    torch.testing.assert_close(velocity_to_x0(noisy, velocity, sigma), x0, atol=1e-6, rtol=0)


def test_ends_of_the_path_are_exact():
    x0, noise = path(1)
    assert torch.equal(add_noise(x0, noise, 0.0), x0)
    assert torch.equal(add_noise(x0, noise, 1.0), noise)


@settings(max_examples=50)
@given(st.integers(0, 1000), st.floats(0.0, 1.0))
def test_parts_rebuild_the_input(seed, sigma):
    noisy, velocity = path(seed)
    x0 = velocity_to_x0(noisy, velocity, sigma)
    torch.testing.assert_close(add_noise(x0, x0 + velocity, sigma), noisy, atol=1e-5, rtol=0)


def test_level_per_frame_touches_only_its_frame():
    x0, noise = path(3)
    sigma = torch.zeros(2, 4)
    sigma[1, 2] = 1.0
    noisy = add_noise(x0, noise, sigma)
    assert torch.equal(noisy[1, :, 2], noise[1, :, 2])
    noisy[1, :, 2] = x0[1, :, 2]
    assert torch.equal(noisy, x0)


def test_half_precision_is_computed_in_float32():
    x0, noise = (part.bfloat16() for part in path(4))
    noisy = add_noise(x0, noise, 0.92727)
    assert noisy.dtype == torch.float32
    torch.testing.assert_close(
        velocity_to_x0(noisy, velocity_target(x0, noise), 0.92727), x0.float(), atol=1e-5, rtol=0
    )


def test_sigma_of_another_shape_is_refused():
    with pytest.raises(ValueError, match=r"sigma has shape \(3,\)"):
        expand_sigma(torch.zeros(3), torch.zeros(SHAPE))
