"""Clips that are made during training: the teacher's sampled with joint guidance, anyone's decoded, tracked, drawn.

The end-point error compares the tracks that the clip was asked to follow with those a Lucas-Kanade tracker
finds in it, started at the same points of frame 0 (protocol: eval/metrics/epe.py). Left out: benchmarks
(eval/), rollouts of the student (distill/validation.py).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from data.batch import Batch
from data.trackers import build_tracker
from data.video import draw_tracks_on
from eval.metrics.epe import endpoint_error
from models.assemble import ModelConfig
from models.condition import Condition
from models.diffusion.guidance import Guidance
from models.diffusion.noise import KeyedNoise
from models.diffusion.sampler import sample_teacher
from models.motion.tracks import Tracks
from models.wan.dit import WanDiT
from stream.codecs import to_frames
from train.accelerator import kept_whole
from train.conditioning import ClipEncoder
from train.stage import ValidationOutput

MAX_DRAWN_TRACKS = 64  # per clip: more hide the picture
MAX_TRACKED = 256  # points per clip that the end-point error is measured on


def teacher_clips(
    dit: WanDiT, condition: Condition, model_cfg: ModelConfig, noise: KeyedNoise, sample_ids: Sequence[int],
    num_steps: int, shift: float,
) -> Tensor:  # fmt: skip
    """Whole clips in ``num_steps`` Euler steps -> x0 [B, C, F, h, w]; guided by motion where the condition has any."""
    weights = {name: w for name, w in model_cfg.guidance.items() if name != "motion" or condition.track_map is not None}
    with kept_whole(dit):
        x0 = sample_teacher(
            dit, condition, Guidance(weights), num_inference_steps=num_steps, shift=shift, noise=noise,
            sample_ids=sample_ids, latent_shape=model_cfg.latent_shape,
        )  # fmt: skip
    assert isinstance(x0, Tensor), "sample_teacher returns a pair only with keep_steps"
    return x0


def show_clips(x0: Tensor, batch: Batch, encoder: ClipEncoder, output: ValidationOutput) -> None:
    """Adds the decoded clips x0 [B, C, F, h, w] with their tracks drawn, and epe_px where the batch has tracks, to
    ``output``.
    """
    errors = []
    with torch.autocast(x0.device.type, enabled=False):
        clips = to_frames(encoder.vae.decode(x0))
    for row, frames in enumerate(clips):
        output.videos[f"clip_{row}"] = frames
        if batch.tracks is None:
            continue
        points, visibility = starting_tracks(batch.tracks, row)
        measured, drawn = (thin_out(points.shape[1], most) for most in (MAX_TRACKED, MAX_DRAWN_TRACKS))
        errors.append(clip_epe_px(frames, points[:, measured], visibility[:, measured]))
        output.videos[f"clip_{row}"] = draw_tracks_on(frames, points[:, drawn], visibility[:, drawn])
    finite = [error for error in errors if math.isfinite(error)]
    if finite:
        output.metrics["epe_px"] = sum(finite) / len(finite)


def clip_epe_px(frames: np.ndarray, points: np.ndarray, visibility: np.ndarray) -> float:
    """End-point error of one clip: frames uint8 [T, H, W, 3], points [T, N, 2] asked for; nan where none is
    visible.
    """
    if points.shape[1] == 0:
        return float("nan")
    found, _ = build_tracker("lucas_kanade").track(frames, points[0])
    error = endpoint_error(
        torch.from_numpy(np.asarray(found))[None],
        torch.from_numpy(points)[None],
        torch.from_numpy(visibility)[None],
    )
    return error.mean_px


def starting_tracks(tracks: Tracks, row: int) -> tuple[np.ndarray, np.ndarray]:
    """Tracks of one clip that are visible in frame 0: [T, N, 2], [T, N]."""
    start = tracks.visibility[row, 0]
    return tracks.points[row][:, start].cpu().numpy(), tracks.visibility[row][:, start].cpu().numpy()


def thin_out(count: int, most: int) -> slice:
    """Every n-th of ``count`` items, at most ``most`` of them."""
    return slice(None, None, max(1, -(-count // most)))
