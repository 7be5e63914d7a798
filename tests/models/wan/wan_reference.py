"""Tiny models whose every weight matters, and diffusers' transformer with the same weights."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import WanTransformer3DModel
from torch import Tensor

from models.condition import Condition
from models.wan.checkpoint import official_to_diffusers
from models.wan.config import WanConfig
from models.wan.dit import WanDiT


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def perturbed_dit(config: WanConfig, seed: int = 0) -> WanDiT:
    """0.05 randn on every parameter: the head starts at zero, and biases and modulation must count."""
    generator = rng(seed)
    model = WanDiT(config, generator)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return model


def diffusers_twin(model: WanDiT) -> WanTransformer3DModel:
    """diffusers' model of the same architecture and weights; a strict load."""
    twin = WanTransformer3DModel(**diffusers_arguments(model.config)).eval()
    state = {name: tensor for name, tensor in model.state_dict().items() if not name.startswith("track_head.")}
    twin.load_state_dict(official_to_diffusers(state), strict=True)
    return twin


def diffusers_arguments(config: WanConfig) -> dict[str, Any]:
    return {
        "patch_size": tuple(config.patch_size),
        "num_attention_heads": config.num_heads,
        "attention_head_dim": config.head_dim,
        "in_channels": config.in_channels,
        "out_channels": config.latent_channels,
        "text_dim": config.text_dim,
        "freq_dim": config.freq_dim,
        "ffn_dim": config.ffn_dim,
        "num_layers": config.num_layers,
        "image_dim": config.clip_dim,
        "added_kv_proj_dim": None if config.clip_dim is None else config.dim,
    }


def make_latents(
    config: WanConfig, frames: int, height: int = 4, width: int = 6, batch: int = 1, seed: int = 1
) -> Tensor:
    return torch.randn(batch, config.latent_channels, frames, height, width, generator=rng(seed))


def make_condition(config: WanConfig, batch: int = 1, seed: int = 2, **parts: Tensor) -> Condition:
    """Text (and CLIP where the model reads it), and the parts given."""
    generator = rng(seed)
    prompt = torch.randn(batch, config.text_len, config.text_dim, generator=generator)
    if config.clip_dim is not None:
        parts.setdefault("clip_embeds", torch.randn(batch, 257, config.clip_dim, generator=generator))
    return Condition(prompt_embeds=prompt, null_prompt_embeds=torch.zeros_like(prompt[:1]), **parts)
