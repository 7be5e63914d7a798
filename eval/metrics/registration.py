"""A second judge of motion that does not trust an optical-flow tracker: find each sprite by its appearance.

The sprites world knows what every sprite looks like in every frame. For each frame the sprite's pixels are
cut out of the ground truth, rotated by a few small angles, and compared with the generated frame at every
offset nearby, by normalised cross-correlation over the sprite's mask. The best match is the sprite's error in
position and in angle. One mean is taken over the mask and all three channels, so that a flat sprite still
matches by its colour. Peaks are refined below the grid step by a parabola.

A sprite is left out of a frame where fewer than `min_mask_px` of its pixels show. A peak below
`min_correlation` counts as lost: the sprite is not there, and its position means nothing. Leaves out changes
of scale, and angles beyond the search range.
"""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np
from numpy.lib.stride_tricks import sliding_window_view


@dataclass
class RegistrationConfig:
    """How far and how finely the judge looks."""

    search_px: int = 10  # largest offset looked at, in either direction and axis
    search_deg: float = 30.0  # largest rotation looked at, in either direction
    step_deg: float = 5.0  # spacing of the rotations
    first_frame: int = 1  # the first frame that is judged
    frame_stride: int = 4  # every k-th frame from there on is judged
    min_mask_px: int = 40  # visible pixels a sprite needs in a frame to be judged
    min_correlation: float = 0.5  # a lower peak counts as lost

    def __post_init__(self) -> None:
        if min(self.search_px, self.first_frame, self.frame_stride) < 1 or self.step_deg <= 0:
            raise ValueError(
                f"search_px={self.search_px}, first_frame={self.first_frame}, frame_stride={self.frame_stride} and "
                f"step_deg={self.step_deg} must be positive (frame 0 is given)"
            )


@dataclass(frozen=True)
class Registration:
    """One video's verdict; errors are means over the (sprite, frame) pairs that were found, else nan."""

    position_px: float  # distance between the sprite's place and where it should be
    angle_deg: float  # absolute rotation away from the true angle
    correlation: float  # mean peak correlation over all judged pairs, -1..1
    lost_ratio: float  # share of judged pairs whose peak is below `min_correlation`, 0..1
    judged: int  # number of (sprite, frame) pairs judged


def register_sprites(
    frames: np.ndarray, reference: np.ndarray, masks: np.ndarray, config: RegistrationConfig | None = None
) -> Registration:
    """Judge a generated sprites video against the rendered one.

    Args:
        frames: uint8 [T, H, W, 3], the video under test.
        reference: uint8 [T, H, W, 3], the ground truth it should equal.
        masks: bool [K, T, H, W], the visible pixels of each sprite in the ground truth.
    """
    config = config or RegistrationConfig()
    if frames.shape != reference.shape or masks.shape[1:] != frames.shape[:3]:
        raise ValueError(
            f"frames {frames.shape} and reference {reference.shape} must be equal [T, H, W, 3], and "
            f"masks {masks.shape} their [K, T, H, W]"
        )
    pairs = [
        (k, t)
        for t in range(config.first_frame, len(frames), config.frame_stride)
        for k in range(len(masks))
        if masks[k, t].sum() >= config.min_mask_px
    ]
    if not pairs:
        return Registration(float("nan"), float("nan"), float("nan"), float("nan"), 0)
    found = np.array([_register_one(frames[t], reference[t], masks[k, t], config) for k, t in pairs])
    kept = found[found[:, 2] >= config.min_correlation]
    position, angle = kept[:, :2].mean(0) if len(kept) else (float("nan"), float("nan"))
    return Registration(
        float(position), float(angle), float(found[:, 2].mean()), 1.0 - len(kept) / len(found), len(found)
    )


def _register_one(
    frame: np.ndarray, reference: np.ndarray, mask: np.ndarray, config: RegistrationConfig
) -> tuple[float, float, float]:
    """(position error px, angle error deg, correlation) of one sprite in one frame."""
    template, weight = _cut_out(reference, mask)
    steps = round(config.search_deg / config.step_deg)
    angles = np.arange(-steps, steps + 1) * config.step_deg
    templates, weights = zip(*(_rotate(template, weight, angle) for angle in angles), strict=True)
    scores = _correlate(
        _window(frame, mask, template.shape[0], config.search_px), np.stack(templates), np.stack(weights)
    )  # [A, offsets y, offsets x]
    a, y, x = (int(index) for index in np.unravel_index(scores.argmax(), scores.shape))
    dx = x - config.search_px + peak_offset(scores[a, y], x)
    dy = y - config.search_px + peak_offset(scores[a, :, x], y)
    angle = angles[a] + config.step_deg * peak_offset(scores[:, y, x], a)
    return float(np.hypot(dx, dy)), float(abs(angle)), float(scores[a, y, x])


def _square(mask: np.ndarray) -> tuple[int, int, int]:
    """Top row, left column and side of a square about the mask that also holds it when rotated."""
    rows, columns = np.nonzero(mask.any(1))[0], np.nonzero(mask.any(0))[0]
    height, width = rows[-1] - rows[0] + 1, columns[-1] - columns[0] + 1
    side = int(np.ceil(np.hypot(height, width))) | 1
    return rows[0] + height // 2 - side // 2, columns[0] + width // 2 - side // 2, side


def _cut_out(reference: np.ndarray, mask: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The sprite's pixels float32 [S, S, 3] and their weight [S, S] in 0..1."""
    top, left, side = _square(mask)
    pad = side
    image = np.pad(reference, ((pad, pad), (pad, pad), (0, 0)), mode="edge").astype(np.float32)
    weight = np.pad(mask, pad).astype(np.float32)
    rows, columns = slice(top + pad, top + pad + side), slice(left + pad, left + pad + side)
    return image[rows, columns], weight[rows, columns]


def _window(frame: np.ndarray, mask: np.ndarray, side: int, search_px: int) -> np.ndarray:
    """The part of the generated frame [S + 2R, S + 2R, 3] in which the sprite is looked for."""
    top, left, _ = _square(mask)
    pad = side + search_px
    image = np.pad(frame, ((pad, pad), (pad, pad), (0, 0)), mode="edge").astype(np.float32)
    first_row, first_column, size = top + pad - search_px, left + pad - search_px, side + 2 * search_px
    return image[first_row : first_row + size, first_column : first_column + size]


def _rotate(template: np.ndarray, weight: np.ndarray, angle: float) -> tuple[np.ndarray, np.ndarray]:
    side = len(weight)
    matrix = cv2.getRotationMatrix2D(((side - 1) / 2, (side - 1) / 2), float(angle), 1.0)
    turned = cv2.warpAffine(template, matrix, (side, side), flags=cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)
    return turned, (cv2.warpAffine(weight, matrix, (side, side), flags=cv2.INTER_LINEAR) > 0.5).astype(np.float32)


def _correlate(window: np.ndarray, templates: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Masked normalised cross-correlation [A, 2R + 1, 2R + 1] of A templates [A, S, S, 3] at every offset."""
    side = templates.shape[1]
    patches = sliding_window_view(window, (side, side), axis=(0, 1))  # [Y, X, 3, S, S]
    grid = patches.shape[:2]
    patches = patches.reshape(grid[0] * grid[1], -1)
    weights = np.repeat(weights[:, None], 3, axis=1).reshape(len(weights), -1)
    flat = templates.transpose(0, 3, 1, 2).reshape(len(templates), -1)
    count = np.maximum(weights.sum(1), 1.0)
    centred = weights * (flat - (weights * flat).sum(1, keepdims=True) / count[:, None])
    patch_sum, patch_square = patches @ weights.T, np.square(patches) @ weights.T
    patch_energy = np.maximum(patch_square - patch_sum**2 / count, 1e-3)
    score = (patches @ centred.T) / np.sqrt(patch_energy * np.maximum(np.square(centred).sum(1), 1e-3))
    return score.T.reshape(len(templates), *grid)


def peak_offset(values: np.ndarray, peak: int) -> float:
    """Offset of the true peak from the sample `peak`, in samples within +-0.5; 0 at the border."""
    if peak in (0, len(values) - 1):
        return 0.0
    before, at, after = values[peak - 1], values[peak], values[peak + 1]
    curvature = before - 2 * at + after
    return float(np.clip(0.5 * (before - after) / curvature, -0.5, 0.5)) if curvature < 0 else 0.0
