"""The critic's objective: flow matching on the student's own clips (Self-Forcing: fake_score).

DMD needs the score of the distribution the student produces now. The critic, a copy of the teacher, is
kept there by plain rectified-flow regression without weighting: v(x_sigma) -> noise - x0, on clips that
carry no gradient to the student. It sees the same prompt, tracks and image as the teacher, and no
guidance.

Left out: the rollout that makes the clips, and the noise levels (distill/self_forcing.py, distill/dmd.py).
"""

from __future__ import annotations

from torch import Tensor

from distill.dmd import generated_mean
from models.diffusion.prediction import velocity_target


def critic_loss(velocity: Tensor, x0: Tensor, noise: Tensor, generated: Tensor) -> Tensor:
    """Mean squared error of the predicted velocity over generated frames.

    velocity, x0, noise: [B, C, F, H, W]; generated: bool [F]. Zero exactly where velocity == noise - x0.
    """
    error = velocity.float() - velocity_target(x0.detach().float(), noise.float())
    return generated_mean(error.square(), generated).mean()
