"""Our transformer is Wan's: same outputs as diffusers' with the same weights, in float32.

Thresholds are ten times the differences measured between the public implementations.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from wan_reference import diffusers_twin, make_condition, make_latents, perturbed_dit, rng

from models.wan.checkpoint import diffusers_to_official
from models.wan.config import WanConfig

TIMESTEP = torch.tensor([731.25])
SIZES = {
    "ffn_dim": 160,
    "num_layers": 2,
    "latent_channels": 16,
    "freq_dim": 32,
    "text_dim": 24,
    "text_len": 512,
}


def _difference(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    assert ours.shape == theirs.shape
    assert theirs.abs().max() > 0.1, "the reference must not be trivially zero"
    return (ours - theirs).abs().max().item()


@pytest.mark.parametrize("head_dim", [48, 40])
@pytest.mark.parametrize("real_tokens", [512, 7])
@torch.no_grad()
def test_text_to_video(head_dim: int, real_tokens: int):
    config = WanConfig.tiny(dim=2 * head_dim, **SIZES)
    model, latents = perturbed_dit(config), make_latents(config, frames=3)
    condition = make_condition(config)
    condition.prompt_embeds[:, real_tokens:] = 0.0
    theirs = diffusers_twin(model)(latents, TIMESTEP, condition.prompt_embeds).sample
    assert _difference(model(latents, TIMESTEP, condition), theirs) < 7e-6


@pytest.mark.parametrize("head_dim", [48, 40])
@torch.no_grad()
def test_image_to_video_with_clip_branch(head_dim: int):
    config = WanConfig.tiny(dim=2 * head_dim, image_conditioning="inp", clip_dim=1280, **SIZES)
    model, latents = perturbed_dit(config), make_latents(config, frames=3)
    image = make_latents(config, frames=3, seed=5)  # the encoded [image, gray, gray] video
    condition = make_condition(config, image_latents=image)
    mask = torch.zeros(1, 4, *latents.shape[2:])
    mask[:, :, 0] = 1.0
    theirs = diffusers_twin(model)(
        torch.cat([latents, mask, image], dim=1), TIMESTEP, condition.prompt_embeds, condition.clip_embeds
    ).sample
    assert _difference(model(latents, TIMESTEP, condition), theirs) < 1e-5
    later = replace(condition, num_given_latents=0)  # a chunk in which nothing is given
    theirs = diffusers_twin(model)(
        torch.cat([latents, torch.zeros_like(mask), image], dim=1), TIMESTEP, condition.prompt_embeds,
        condition.clip_embeds,
    ).sample  # fmt: skip
    assert _difference(model(latents, TIMESTEP, later), theirs) < 1e-5


@torch.no_grad()
def test_fun_control_layout():
    config = WanConfig.tiny(
        image_conditioning="fun_control", track_encoding="rgb", track_channels=16, clip_dim=32, **SIZES
    )
    model, latents = perturbed_dit(config), make_latents(config, frames=3)
    control, image = make_latents(config, frames=3, seed=5), make_latents(config, frames=1, seed=6)
    condition = make_condition(config, image_latents=image, track_map=control, track_map_is_latent=True)
    start = torch.cat([image, torch.zeros_like(latents[:, :, 1:])], dim=2)
    theirs = diffusers_twin(model)(
        torch.cat([latents, control, start], dim=1), TIMESTEP, condition.prompt_embeds, condition.clip_embeds
    ).sample
    assert _difference(model(latents, TIMESTEP, condition), theirs) < 1e-5


@torch.no_grad()
def test_first_frame_with_timestep_per_token():
    config = WanConfig.tiny(image_conditioning="first_frame", **(SIZES | {"latent_channels": 12}))
    model, latents = perturbed_dit(config), make_latents(config, frames=3)
    image = make_latents(config, frames=1, seed=5)
    condition = make_condition(config, image_latents=image)
    clamped = torch.cat([image, latents[:, :, 1:]], dim=2)
    per_token = torch.where(torch.arange(18) < 6, 0.0, TIMESTEP).unsqueeze(0)  # 2 x 3 tokens per frame
    theirs = diffusers_twin(model)(clamped, per_token, condition.prompt_embeds).sample
    assert _difference(model(latents, TIMESTEP, condition), theirs) < 5e-6
    per_frame = TIMESTEP.expand(1, 3)
    assert _difference(model(latents, per_frame, condition), theirs) < 5e-6
    prepared, modulation = model.prepare(condition), model.modulation(TIMESTEP)
    assert _difference(model(latents, modulation, prepared), theirs) < 5e-6


@torch.no_grad()
def test_start_frame():
    """Positions 2..4: the reference is given the rotations of the last three frames of five."""
    config = WanConfig.tiny(**SIZES)
    model, latents, condition = perturbed_dit(config), make_latents(config, frames=3), make_condition(config)
    twin = diffusers_twin(model)
    rotations = [part[:, 2 * 6 :] for part in twin.rope(latents.new_zeros(1, 1, 5, 4, 6))]
    twin.rope.forward = lambda _: rotations
    theirs = twin(latents, TIMESTEP, condition.prompt_embeds).sample
    assert _difference(model(latents, TIMESTEP, condition, start_frame=2), theirs) < 7e-6


def test_gradients():
    config = WanConfig.tiny(**SIZES)
    model, latents, condition = perturbed_dit(config), make_latents(config, frames=3), make_condition(config)
    twin, weight = diffusers_twin(model), torch.randn(latents.shape, generator=rng(9))
    (model(latents, TIMESTEP, condition) * weight).sum().backward()
    (twin(latents, TIMESTEP, condition.prompt_embeds).sample * weight).sum().backward()
    theirs = diffusers_to_official({name: parameter.grad for name, parameter in twin.named_parameters()})
    for name, parameter in model.named_parameters():
        assert parameter.grad.norm() > 0, name
        torch.testing.assert_close(parameter.grad, theirs[name], rtol=1e-4, atol=1e-4, msg=name)
