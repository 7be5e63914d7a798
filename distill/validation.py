"""What the student makes now: full rollouts under held-out conditions, as when streaming.

Latents are compared with a reference clip's in spread, motion and visibility of the chunk seams; all three
are 1 where the student is as good as the reference. Left out: benchmarks (eval/).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from distill.health import TINY, has_seams, motion_energy, seam_score
from models.assemble import ModelConfig
from models.condition import Condition
from models.diffusion.noise import KeyedNoise
from models.rollout import rollout
from models.wan.dit import WanDiT
from train.accelerator import kept_whole


@torch.no_grad()
def generate_clips(
    student: WanDiT,
    condition: Condition,
    model_cfg: ModelConfig,
    noise: KeyedNoise,
    sample_ids: Sequence[int],
) -> Tensor:
    """Whole clips by all steps of the student -> x0 [B, C, F, h, w]; the same noise at every call."""
    channels, _, height, width = model_cfg.latent_shape
    with kept_whole(student):
        chunks = rollout(
            student,
            condition,
            model_cfg.rollout,
            num_chunks=model_cfg.num_chunks,
            noise=noise,
            noise_key=("validation",),
            sample_ids=sample_ids,
            latent_shape=(channels, height, width),
        )
        return torch.cat([chunk.x0 for chunk in chunks], dim=2)


def compare_latents(x0: Tensor, reference: Tensor, chunk_frames: int) -> dict[str, float]:
    """Ratios x0 : reference of spread, motion energy and seam score; both [B, C, F, h, w]."""
    metrics = {
        "latent_std_ratio": float(x0.float().std() / reference.float().std().clamp_min(TINY)),
        "motion_energy_ratio": float(motion_energy(x0) / motion_energy(reference).clamp_min(TINY)),
    }
    if has_seams(x0.shape[2], chunk_frames):
        seams = seam_score(x0, chunk_frames) / seam_score(reference, chunk_frames).clamp_min(TINY)
        metrics["seam_ratio"] = float(seams)
    return metrics
