"""Conversions between what a flow-matching model predicts and what a loss or a solver needs.

x_t = (1 - sigma) x0 + sigma * noise and velocity = noise - x0, hence x0 = x_t - sigma * velocity.
Everything is computed and returned in float32, whatever the model's dtype. ``sigma`` in [0, 1] is a float,
[B], or [B, F] (one level per latent frame); latents are [B, C, F, H, W].
"""

from __future__ import annotations

from typing import TypeAlias

import torch
from torch import Tensor

Sigma: TypeAlias = float | Tensor


def expand_sigma(sigma: Sigma, latents: Tensor) -> Tensor:
    """float, [], [B or 1] or [B or 1, F] -> float32, to broadcast against latents [B, C, F, H, W]."""
    level = torch.as_tensor(sigma, dtype=torch.float32, device=latents.device)
    if level.ndim == 0:
        return level
    batch, frames = latents.shape[0], latents.shape[2]
    if tuple(level.shape) not in ((1,), (batch,), (1, frames), (batch, frames)):
        raise ValueError(
            f"sigma has shape {tuple(level.shape)}; it must be a number, [{batch}] or [{batch}, {frames}] "
            f"for latents {tuple(latents.shape)}"
        )
    return level.view(level.shape[0], 1, -1, 1, 1)


def add_noise(x0: Tensor, noise: Tensor, sigma: Sigma) -> Tensor:
    """Clean latents moved to noise level sigma."""
    level = expand_sigma(sigma, x0)
    return (1 - level) * x0.float() + level * noise.float()


def velocity_target(x0: Tensor, noise: Tensor) -> Tensor:
    """What the model should predict: the direction from data to noise."""
    return noise.float() - x0.float()


def velocity_to_x0(noisy_latents: Tensor, velocity: Tensor, sigma: Sigma) -> Tensor:
    return noisy_latents.float() - expand_sigma(sigma, noisy_latents) * velocity.float()
