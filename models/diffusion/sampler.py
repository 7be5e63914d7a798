"""Euler sampling of the bidirectional teacher, also for the ODE pairs of causal initialisation.

x <- x + (sigma_next - sigma) * v over our own flow grid, in float32, with guidance combined in velocity
space (the combination is linear, so x0-space would give the same). Where the model conditions on a clean
first frame (Wan 2.2 TI2V), latent 0 is the image latent exactly, in every input and in the result. Left
out: higher-order solvers; the student's fixed steps are points of this Euler trajectory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from models.condition import Condition
from models.diffusion.guidance import Guidance, combine
from models.diffusion.noise import KeyedNoise
from models.diffusion.schedule import NUM_TRAIN_TIMESTEPS, flow_grid

if TYPE_CHECKING:
    from models.wan.dit import PreparedCondition, TextContext, WanDiT

Progress = Callable[[int, int], None]  # (steps done, steps in all)


def euler_trajectory(
    predict_velocity: Callable[[Tensor, Tensor], Tensor],
    noise: Tensor,
    sigmas: Tensor,
    clamp: Callable[[Tensor], Tensor] = lambda latents: latents,
) -> Iterator[tuple[float, Tensor]]:
    """Yields (sigma, noisy_latents) before each step and (0.0, x0) at the end, float32.

    noise [B, ...]; sigmas [steps] descending; predict_velocity(noisy_latents, sigma [B]) -> velocity.
    ``clamp`` is applied to the start and after every step (known parts of the latents).
    """
    latents = clamp(noise.float())
    levels = [*sigmas.tolist(), 0.0]
    for sigma, following in pairwise(levels):
        yield sigma, latents
        level = torch.full((latents.shape[0],), sigma, device=latents.device, dtype=torch.float32)
        latents = clamp(latents + (following - sigma) * predict_velocity(latents, level).float())
    yield 0.0, latents


@torch.no_grad()
def sample_teacher(
    dit: WanDiT,
    condition: Condition,
    guidance: Guidance,
    *,
    num_inference_steps: int,
    shift: float,
    noise: KeyedNoise,
    sample_ids: Sequence[int],
    latent_shape: tuple[int, int, int, int],
    keep_steps: Sequence[int] = (),
    resume: tuple[int, Tensor] | None = None,
    progress: Progress | None = None,
) -> Tensor | tuple[Tensor, list[Tensor]]:
    """Generates whole clips: latent_shape (C, F, h, w) -> x0 [B, C, F, h, w] float32.

    With ``keep_steps`` returns (x0, kept): kept[i] is the *input* of step keep_steps[i], noise level
    flow_grid(num_inference_steps, shift)[keep_steps[i]]; kept + [x0] is an ODE trajectory, noisiest first.
    ``resume``: (step, its input) to go on from instead of noise.
    The start noise is keyed ("teacher", "start") per sample. Raises ValueError for a step outside the grid or
    before the one to go on from, or a number of sample ids that is not the batch size.
    """
    _check_request(condition, sample_ids, keep_steps, range(resume[0] if resume else 0, num_inference_steps))
    device = condition.prompt_embeds.device
    branches = _prepare_branches(dit, guidance.branches(condition))

    def predict_velocity(latents: Tensor, sigma: Tensor) -> Tensor:
        timestep = NUM_TRAIN_TIMESTEPS * sigma
        return combine(lambda prepared: dit(latents, timestep, prepared), branches)

    first, start = resume or (0, noise.normal(latent_shape, sample_ids, "teacher", "start", device=device))
    sigmas = flow_grid(num_inference_steps, shift)[first:]
    kept: dict[int, Tensor] = {}
    latents = start
    clamp = first_frame_clamp(dit, condition)
    for step, (_, latents) in enumerate(euler_trajectory(predict_velocity, start, sigmas, clamp), first):
        if step in keep_steps:
            kept[step] = latents
        if progress is not None and step > first:
            progress(step, num_inference_steps)
    return (latents, [kept[step] for step in keep_steps]) if len(keep_steps) else latents


def first_frame_clamp(dit: WanDiT, condition: Condition) -> Callable[[Tensor], Tensor]:
    """Puts the clean image latent at frame 0 where the model conditions that way, else does nothing."""
    image = condition.image_latents
    if dit.config.image_conditioning != "first_frame" or image is None:
        return lambda latents: latents
    return lambda latents: torch.cat([image.to(latents), latents[:, :, 1:]], 2)


def _prepare_branches(
    dit: WanDiT, branches: Sequence[tuple[float, Condition]]
) -> list[tuple[float, PreparedCondition]]:
    """Text keys and control channels, once for all steps; branches of one prompt share its keys."""
    texts: dict[int, TextContext] = {}
    prepared = []
    for coefficient, branch in branches:
        prompt = id(branch.prompt_embeds)
        if prompt not in texts:
            texts[prompt] = dit.prepare_text(branch.prompt_embeds, branch.clip_embeds)
        prepared.append((coefficient, dit.prepare(branch, text=texts[prompt])))
    return prepared


def _check_request(condition: Condition, sample_ids: Sequence[int], keep_steps: Sequence[int], made: range) -> None:
    if len(sample_ids) != condition.batch_size:
        raise ValueError(
            f"sample_ids has {len(sample_ids)} entries; it must have {condition.batch_size}, the batch size"
        )
    for step in keep_steps:
        if step not in made:
            raise ValueError(
                f"keep_steps has {step}; it must be in {made.start}..{made.stop - 1}, num_inference_steps - 1"
            )
