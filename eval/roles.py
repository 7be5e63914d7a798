"""Teacher and student under one interface: a list of clips -> the videos generated for them, timed.

The teacher samples whole clips bidirectionally (50 Euler steps, joint guidance of MotionStream eq. 2); the
student rolls its chunks out from its few fixed steps. Both get the same conditions, and noise keyed by the
clip, so that a role with tracks and the same role with tracks withheld differ in nothing else.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from eval.clips import EvalClip, stack_tracks
from models.condition import Condition
from models.diffusion.guidance import Guidance
from models.diffusion.noise import KeyedNoise
from models.diffusion.sampler import sample_teacher
from models.rollout import rollout
from models.wan.dit import WanDiT
from stream.codecs import Codecs

ROLES = ("teacher", "student")


@dataclass
class SamplingConfig:
    """How the teacher is sampled; its guidance is model.guidance, the student's steps model.rollout."""

    num_inference_steps: int = 50  # Euler steps of the teacher
    release_frame: int | None = None  # frame from which on no tracks are given, as when a user lets go; null: never

    def __post_init__(self) -> None:
        if self.num_inference_steps < 1:
            raise ValueError(f"bench.num_inference_steps={self.num_inference_steps} must be at least 1")
        if self.release_frame is not None and self.release_frame < 1:
            raise ValueError(f"bench.release_frame={self.release_frame} must be at least 1, or null to never let go")


@dataclass(frozen=True)
class Generated:
    """The videos of a batch of clips, in order, and the wall-clock seconds of denoising and decoding them."""

    clips: Sequence[EvalClip]
    frames: np.ndarray  # uint8 [B, T, H, W, 3]
    seconds: float


def generate(
    role: str,
    dit: WanDiT,
    codecs: Codecs,
    clips: Sequence[EvalClip],
    sampling: SamplingConfig,
    *,
    with_tracks: bool,
    noise: KeyedNoise,
    batch_size: int,
) -> Iterator[Generated]:
    """Generate every clip from its first frame, caption and (unless withheld) tracks, a batch at a time.

    Raises:
        ValueError: a role that is neither teacher nor student.
    """
    if role not in ROLES:
        raise ValueError(f"role='{role}' must be one of {', '.join(ROLES)}")
    sample = _sample_teacher if role == "teacher" else _sample_student
    for start in range(0, len(clips), batch_size):
        batch = clips[start : start + batch_size]
        condition = _condition(codecs, batch, with_tracks, sampling.release_frame)
        started = codecs.clock()
        latents = sample(dit, codecs, condition, sampling, noise, [clip.sample_id for clip in batch])
        frames = codecs.decode(latents)
        yield Generated(batch, frames, codecs.clock() - started)


def _condition(codecs: Codecs, clips: Sequence[EvalClip], with_tracks: bool, release_frame: int | None) -> Condition:
    tracks = stack_tracks(clips)
    condition = codecs.condition(
        codecs.encode_prompts([clip.caption for clip in clips]),
        tracks if release_frame is None else tracks.released_at(release_frame),
        codecs.encode_first_frames(np.stack([clip.frames[0] for clip in clips])),
    )
    return condition if with_tracks or condition.track_map is None else condition.drop("motion")


def _sample_teacher(
    dit: WanDiT,
    codecs: Codecs,
    condition: Condition,
    sampling: SamplingConfig,
    noise: KeyedNoise,
    sample_ids: Sequence[int],
) -> Tensor:  # [B, C, F, h, w]
    model_cfg = codecs.model_cfg
    return sample_teacher(
        dit,
        condition,
        Guidance(model_cfg.guidance),
        num_inference_steps=sampling.num_inference_steps,
        shift=model_cfg.rollout.shift,
        noise=noise,
        sample_ids=sample_ids,
        latent_shape=model_cfg.latent_shape,
    )


def _sample_student(
    dit: WanDiT,
    codecs: Codecs,
    condition: Condition,
    sampling: SamplingConfig,
    noise: KeyedNoise,
    sample_ids: Sequence[int],
) -> Tensor:  # [B, C, F, h, w]
    model_cfg = codecs.model_cfg
    chunks = rollout(
        dit,
        condition,
        model_cfg.rollout,
        num_chunks=model_cfg.num_chunks,
        noise=noise,
        sample_ids=sample_ids,
        latent_shape=codecs.frame_latent_shape,
        cache="static",
    )
    return torch.cat([chunk.x0 for chunk in chunks], dim=2)
