"""Statistics that show a long stream drifting: colour saturation, and mean and spread of the latents.

Papers: FramePack's drift measure (the difference of a per-frame figure between the first and the last 15 % of
a video); DragStream's latent mean/std drift. Leaves out VBench's learned quality scores.
"""

from __future__ import annotations

import torch
from torch import Tensor

DRIFT_SPAN = 0.15  # share of the video at either end


def frame_saturation(frames: Tensor) -> Tensor:  # uint8 [T, H, W, 3] -> [T] in 0..1
    """Mean HSV saturation of each frame: (max - min) / max over RGB, 0 for black."""
    rgb = frames.float()
    highest, lowest = rgb.amax(-1), rgb.amin(-1)
    return ((highest - lowest) / highest.clamp(min=1.0)).mean(dim=(1, 2))


def latent_moments(latents: Tensor) -> tuple[Tensor, Tensor]:  # [C, F, h, w] -> [F], [F]
    """Mean and standard deviation of each latent frame over channels and space (normalised: ~0, ~1)."""
    flat = latents.float().transpose(0, 1).flatten(1)
    return flat.mean(1), flat.std(1)


def drift(values: Tensor) -> float:  # [T] -> absolute change between the two ends
    """|mean of the first 15 % - mean of the last 15 %| of a per-frame figure; nan values are left out."""
    span = max(1, round(DRIFT_SPAN * len(values)))
    return float((values[:span].nanmean() - values[-span:].nanmean()).abs())


def window_means(values: Tensor, window: int) -> Tensor:  # [T] -> [ceil(T / window)]
    """Means over consecutive windows of `window` frames; the last may be shorter. nan where all is nan."""
    if window < 1:
        raise ValueError(f"window={window} must be at least 1 frame")
    return torch.stack([part.nanmean() for part in values.split(window)])
