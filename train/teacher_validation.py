"""Clips of the teacher during training: sampled with joint guidance, decoded, tracked, drawn.

The end-point error compares the tracks that the clip was asked to follow with those a Lucas-Kanade tracker
finds in it, started at the same points of frame 0 (protocol: eval/metrics/epe.py). Left out: benchmarks
(eval/).
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from data.batch import Batch
from data.trackers import build_tracker
from data.video import draw_tracks_on
from eval.metrics.epe import endpoint_error
from models.condition import Condition
from models.diffusion.guidance import Guidance
from models.diffusion.noise import KeyedNoise
from models.diffusion.sampler import sample_teacher
from models.motion.tracks import Tracks
from models.wan.dit import WanDiT
from train.conditioning import ClipEncoder
from train.stage import ValidationOutput

MAX_DRAWN_TRACKS = 64  # per clip: more hide the picture
MAX_TRACKED = 256  # points per clip that the end-point error is measured on


def sample_clips(
    dit: WanDiT, condition: Condition, batch: Batch, encoder: ClipEncoder, noise: KeyedNoise, num_steps: int,
    shift: float, output: ValidationOutput,
) -> None:  # fmt: skip
    """Add videos (tracks drawn) and, where the batch has tracks, epe_px to `output`."""
    model_cfg = encoder.model_cfg
    weights = {name: w for name, w in model_cfg.guidance.items() if name != "motion" or condition.track_map is not None}
    x0 = sample_teacher(
        dit, condition, Guidance(weights), num_inference_steps=num_steps, shift=shift, noise=noise,
        sample_ids=batch.sample_ids, latent_shape=model_cfg.latent_shape,
    )  # fmt: skip
    assert isinstance(x0, Tensor), "sample_teacher returns a pair only with keep_steps"
    with torch.autocast(x0.device.type, enabled=False):
        clips = to_uint8(encoder.vae.decode(x0))
    errors = []
    for row, frames in enumerate(clips):
        drawn = frames
        if batch.tracks is not None:
            points, visibility = starting_tracks(batch.tracks, row, model_cfg.clip.height, model_cfg.clip.width)
            errors.append(
                clip_epe_px(
                    frames,
                    points[:, :: _stride(points, MAX_TRACKED)],
                    visibility[:, :: _stride(points, MAX_TRACKED)],
                )
            )
            every = _stride(points, MAX_DRAWN_TRACKS)
            drawn = draw_tracks_on(frames, points[:, ::every], visibility[:, ::every])
        output.videos[f"clip_{row}"] = drawn
    finite = [error for error in errors if np.isfinite(error)]
    if finite:
        output.metrics["epe_px"] = float(np.mean(finite))


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


def starting_tracks(tracks: Tracks, row: int, height: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """Tracks of one clip that are visible in frame 0, in pixels of height x width: [T, N, 2], [T, N]."""
    tracks = tracks.resize_to(height, width)
    start = tracks.visibility[row, 0]
    return tracks.points[row][:, start].cpu().numpy(), tracks.visibility[row][:, start].cpu().numpy()


def to_uint8(pixels: Tensor) -> np.ndarray:
    """[B, 3, T, H, W] in [-1, 1] -> uint8 [B, T, H, W, 3]."""
    return ((pixels.float().clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 4, 1).cpu().numpy()


def _stride(points: np.ndarray, most: int) -> int:
    return max(1, -(-points.shape[1] // most))
