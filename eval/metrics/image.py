"""PSNR and SSIM between a generated and a reference video, frame by frame (torchmetrics).

Conventions, because each changes the figure: frames are uint8 (so both sides are rounded alike) and scaled to
[0, 1] with `data_range` fixed at 1; SSIM is the Gaussian-window form (sigma 1.5, 11x11) on RGB, channels
averaged; figures are averaged over the frames of a video, then over videos. Frame 0 is skipped: an
image-to-video model is handed it.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure

PSNR_CEILING_DB = 100.0  # identical frames have infinite PSNR, which no mean survives
FRAMES_AT_A_TIME = 8


def frame_psnr(frames: Tensor, reference: Tensor) -> Tensor:  # uint8 [T, H, W, 3] twice -> [T - 1] dB
    """PSNR of frames 1.. in dB, capped at `PSNR_CEILING_DB`."""
    values = [
        peak_signal_noise_ratio(ours, theirs, data_range=1.0, reduction="none", dim=(1, 2, 3))
        for ours, theirs in unit_images(frames, reference)
    ]
    return torch.cat(values).clamp(max=PSNR_CEILING_DB)


def frame_ssim(frames: Tensor, reference: Tensor) -> Tensor:  # uint8 [T, H, W, 3] twice -> [T - 1] in -1..1
    """SSIM of frames 1..; sides must be at least 11 px, the window's size."""
    values = [
        structural_similarity_index_measure(
            ours, theirs, data_range=1.0, gaussian_kernel=True, sigma=1.5, reduction="none"
        ).reshape(len(ours))
        for ours, theirs in unit_images(frames, reference)
    ]
    return torch.cat(values)


def unit_images(frames: Tensor, reference: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Frames 1.. of two uint8 videos as [n, 3, H, W] in 0..1, a few at a time: the SSIM of a clip of 81 frames at
    832 x 480 at once would take ten gigabytes.
    """
    if frames.shape != reference.shape or frames.ndim != 4 or frames.shape[-1] != 3 or len(frames) < 2:
        raise ValueError(
            f"frames {tuple(frames.shape)} and reference {tuple(reference.shape)} must be equal "
            "[T, H, W, 3] with T >= 2"
        )
    if frames.dtype != torch.uint8 or reference.dtype != torch.uint8:
        raise ValueError(
            f"frames are {frames.dtype} and {reference.dtype}; both must be uint8, so that both sides are rounded alike"
        )
    for start in range(1, len(frames), FRAMES_AT_A_TIME):
        ours, theirs = (video[start : start + FRAMES_AT_A_TIME] for video in (frames, reference))
        yield ours.permute(0, 3, 1, 2).float() / 255.0, theirs.permute(0, 3, 1, 2).float() / 255.0
