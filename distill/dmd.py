"""Distribution matching distillation (DMD): score noise levels, gradient, normaliser, loss. Pure functions.

Yin et al. 2024 (DMD, DMD2) in the form of Self Forcing (Huang et al. 2025), with MotionStream's joint
guidance in the real score (eq. 3 and 4). The student's clip x0 is noised to sigma; with the denoised
estimates of the teacher (x0_real, guided) and of the critic (x0_fake, plain), the gradient of the reverse
KL in x0 is, per sample,

    g = (x0_fake - x0_real) / mean |x0 - x0_real|

since score_fake - score_real = (1 - sigma) / sigma^2 * (x0_fake - x0_real): descending g moves x0 towards
the teacher. Frames that are given rather than generated (a clean first frame) carry no gradient and count
in no mean.

Left out: evaluating the two models (distill/self_forcing.py) and training the critic (distill/critic.py).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from models.diffusion.schedule import NUM_TRAIN_TIMESTEPS, shift_sigma

TINY = 1e-8  # keeps 0 / 0 at 0 where the student already equals the teacher's estimate


def score_sigma(index: Tensor, *, shift: float, min_timestep: float, max_timestep: float) -> Tensor:
    """Noise level at which the two scores are compared.

    index: integers in [0, 1000), any shape. Warped by `shift`, then clamped to [min_timestep, max_timestep]
    on the 0..1000 scale: neither pure data nor pure noise is ever asked for. Returns sigma, float64.
    """
    warped = shift_sigma(index.to(torch.float64) / NUM_TRAIN_TIMESTEPS, shift)
    return warped.clamp(min_timestep / NUM_TRAIN_TIMESTEPS, max_timestep / NUM_TRAIN_TIMESTEPS)


@dataclass(frozen=True)
class DmdGradient:
    """g, and the two means it is made of, all float32."""

    direction: Tensor  # [B, C, F, H, W], zero on given frames
    normaliser: Tensor  # [B], mean |x0 - x0_real|
    score_gap: Tensor  # [B], mean |x0_fake - x0_real|


def dmd_gradient(x0: Tensor, x0_real: Tensor, x0_fake: Tensor, generated: Tensor) -> DmdGradient:
    """Gradient of DMD with respect to the student's clip.

    x0, x0_real, x0_fake: [B, C, F, H, W]; generated: bool [F], False for frames that were given.
    Raises ValueError if no frame was generated.
    """
    if not bool(generated.any()):
        raise ValueError(f"generated={generated.tolist()} must mark at least one frame; use a longer clip")
    mask = generated.to(x0.device).view(1, 1, -1, 1, 1)
    x0, x0_real, x0_fake = x0.detach().float(), x0_real.detach().float(), x0_fake.detach().float()
    normaliser = generated_mean((x0 - x0_real).abs(), generated)
    gap = (x0_fake - x0_real) * mask
    direction = gap / normaliser.clamp_min(TINY).view(-1, 1, 1, 1, 1)
    return DmdGradient(direction, normaliser, generated_mean(gap.abs(), generated))


def generated_mean(values: Tensor, generated: Tensor) -> Tensor:
    """Mean over channels, generated frames and space: [B, C, F, H, W], bool [F] -> [B]."""
    return values[:, :, generated].mean(dim=(1, 2, 3, 4))


def generated_numel(x0: Tensor, generated: Tensor) -> int:
    """Number of latent values that were generated, over the whole batch."""
    return x0[:, :, generated].numel()


def dmd_loss(x0: Tensor, direction: Tensor, generated: Tensor) -> Tensor:
    """0.5 * mean (x0 - sg(x0 - g))^2 over generated frames; its gradient with respect to x0 is g / numel.

    In float64: x0 - (x0 - g) would lose the last digits of a small g.
    """
    x0 = x0.double()
    target = (x0 - direction).detach()
    return 0.5 * generated_mean((x0 - target).square(), generated).mean()


def chunk_surrogate(x0_chunk: Tensor, direction_chunk: Tensor, numel: int) -> Tensor:
    """Linear loss of one chunk; summed over chunks its gradient is that of `dmd_loss`, g / numel, exactly.

    Its value means nothing: it lets one chunk's graph be built, used and freed before the next one's.
    """
    return (x0_chunk.float() * direction_chunk).sum() / numel
