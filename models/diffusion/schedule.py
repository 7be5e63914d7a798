"""The flow-matching time grid, in float64.

x_t = (1 - sigma) x0 + sigma * noise; sigma = 1 is pure noise and the net reads timestep = 1000 * sigma. A
shift k moves an even grid r towards the noise: sigma = k r / (1 + (k - 1) r). MotionStream: k = 6, 50
steps, the student's steps are grid points 0, 16 and 32. The grid is our own: diffusers' Euler scheduler
shifts its lower end twice and gives other values (925.85 and 764.30 where this one has 927.27 and 771.43).

The bell weight stands for the paper's "timestep-dependent weighting w_t" (eq. A2), which is not specified
there; this is the one of the Self-Forcing code base, that MotionStream builds on.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import TypeVar

import torch
from torch import Tensor

NUM_TRAIN_TIMESTEPS = 1000
Number = TypeVar("Number", float, Tensor)


def shift_sigma(r: Number, shift: float) -> Number:
    """Even grid position r in [0, 1] -> sigma in [0, 1]."""
    return shift * r / (1 + (shift - 1) * r)


def flow_grid(num_steps: int, shift: float) -> Tensor:
    """Noise levels of a solver -> [num_steps] float64, descending from exactly 1; the last step ends at 0."""
    if num_steps < 1:
        raise ValueError(f"num_steps={num_steps} must be at least 1")
    if not 0 < shift < math.inf:
        raise ValueError(f"shift={shift} must be positive and finite; 1 is the even grid")
    even = torch.linspace(1, 0, num_steps + 1, dtype=torch.float64)[:-1]
    return shift_sigma(even, shift)


def training_sigmas(shift: float) -> Tensor:
    """The 1000 noise levels of training -> [1000] float64, descending; training draws the index uniformly."""
    return flow_grid(NUM_TRAIN_TIMESTEPS, shift)


def bell_weight(sigma: Tensor, shift: float) -> Tensor:
    """Loss weight of a noise level, dtype of ``sigma``: largest at 0.5, exactly 0 at 1, mean 1 over training.

    y = exp(-2 (sigma - 1/2)^2), moved to 0 at its least grid value and normalised over the 1000 levels of
    this shift.
    """
    lowest, mean = _bell_moments(shift)
    return ((_bell(sigma.double()) - lowest).clamp_min(0.0) / mean).to(sigma.dtype)


def _bell(sigma: Tensor) -> Tensor:
    return torch.exp(-2 * (sigma - 0.5) ** 2)


@lru_cache(maxsize=32)
def _bell_moments(shift: float) -> tuple[float, float]:
    """(least value, mean above it) over the training grid."""
    values = _bell(training_sigmas(shift))
    lowest = values.min()
    return lowest.item(), (values - lowest).mean().item()
