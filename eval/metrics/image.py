"""PSNR and SSIM between a generated and a reference video, frame by frame (torchmetrics).

Conventions, because each changes the figure: frames are uint8 (so both sides are rounded alike) and scaled to
[0, 1] with `data_range` fixed at 1; SSIM is the Gaussian-window form (sigma 1.5, 11x11) on RGB, channels
averaged; figures are averaged over the frames of a video, then over videos. Frame 0 is skipped: an
image-to-video model is handed it.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure

PSNR_CEILING_DB = 100.0  # identical frames have infinite PSNR, which no mean survives


def frame_psnr(frames: Tensor, reference: Tensor) -> Tensor:  # uint8 [T, H, W, 3] twice -> [T - 1] dB
    """PSNR of frames 1.. in dB, capped at `PSNR_CEILING_DB`."""
    values = peak_signal_noise_ratio(*_unit_images(frames, reference), data_range=1.0, reduction="none", dim=(1, 2, 3))
    return values.clamp(max=PSNR_CEILING_DB)


def frame_ssim(frames: Tensor, reference: Tensor) -> Tensor:  # uint8 [T, H, W, 3] twice -> [T - 1] in -1..1
    """SSIM of frames 1..; sides must be at least 11 px, the window's size."""
    return structural_similarity_index_measure(
        *_unit_images(frames, reference), data_range=1.0, gaussian_kernel=True, sigma=1.5, reduction="none"
    )


def _unit_images(frames: Tensor, reference: Tensor) -> tuple[Tensor, Tensor]:
    """Check two uint8 videos and return frames 1.. as [T - 1, 3, H, W] in 0..1."""
    if frames.shape != reference.shape or frames.ndim != 4 or frames.shape[-1] != 3 or len(frames) < 2:
        raise ValueError(
            f"frames {tuple(frames.shape)} and reference {tuple(reference.shape)} must be equal "
            "[T, H, W, 3] with T >= 2"
        )
    if frames.dtype != torch.uint8 or reference.dtype != torch.uint8:
        raise ValueError(
            f"frames are {frames.dtype} and {reference.dtype}; both must be uint8, so that both sides are rounded alike"
        )
    return tuple(video[1:].permute(0, 3, 1, 2).float() / 255.0 for video in (frames, reference))
