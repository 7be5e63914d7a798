from __future__ import annotations

import cv2
import numpy as np
import pytest

from data.sprites import SpritesConfig, render_clip
from eval.metrics.registration import RegistrationConfig, register_sprites


@pytest.fixture(scope="module")
def clips():  # several seeds, so that shapes and textures differ
    return [render_clip(SpritesConfig(num_frames=17), seed) for seed in range(4)]


def _turned_in_place(clip, degrees: float) -> np.ndarray:
    """Each frame's first sprite rotated about its own centre and pasted over the frame."""
    frames = clip.frames.copy()
    for t, (frame, mask) in enumerate(zip(clip.frames, clip.masks[-1])):
        if not mask.any():
            continue
        ys, xs = np.nonzero(mask)
        centre = (float(xs.min() + xs.max()) / 2, float(ys.min() + ys.max()) / 2)
        matrix = cv2.getRotationMatrix2D(centre, degrees, 1.0)
        turned = cv2.warpAffine(frame, matrix, mask.shape[::-1])
        turned_mask = cv2.warpAffine(mask.astype(np.uint8), matrix, mask.shape[::-1]) > 0
        frames[t][turned_mask] = turned[turned_mask]
    return frames


def test_ground_truth_registers_on_itself(clips) -> None:
    for clip in clips:
        found = register_sprites(clip.frames, clip.frames, clip.masks)
        assert found.judged > 0 and found.lost_ratio == 0
        assert found.position_px < 0.5
        assert found.angle_deg < 5
        assert found.correlation > 0.99


@pytest.mark.parametrize("shift", [(3.0, 0.0), (-4.0, 3.0), (0.0, 6.0)])
def test_a_shifted_video_shows_its_shift(clips, shift) -> None:
    matrix = np.float32([[1, 0, shift[0]], [0, 1, shift[1]]])
    frames = np.stack([cv2.warpAffine(f, matrix, (64, 64), borderMode=cv2.BORDER_REFLECT) for f in clips[0].frames])
    found = register_sprites(frames, clips[0].frames, clips[0].masks)
    assert found.position_px == pytest.approx(np.hypot(*shift), abs=0.6)


def test_a_turned_sprite_shows_its_angle(clips) -> None:
    config = RegistrationConfig(frame_stride=2)
    for clip in clips[:2]:
        masks = clip.masks[-1:]  # the front-most sprite: never occluded
        found = register_sprites(_turned_in_place(clip, 12.0), clip.frames, masks, config)
        assert found.angle_deg == pytest.approx(12.0, abs=5.0)
        assert found.position_px < 1.5


def test_another_video_is_lost_and_a_blank_one_too(clips) -> None:
    blank = np.full_like(clips[0].frames, 127)
    assert register_sprites(blank, clips[0].frames, clips[0].masks).lost_ratio == 1.0
    assert np.isnan(register_sprites(blank, clips[0].frames, clips[0].masks).position_px)
    other = register_sprites(clips[1].frames, clips[0].frames, clips[0].masks)
    assert other.lost_ratio > 0.3 or other.position_px > 2


def test_nothing_to_judge() -> None:
    frames = np.zeros((5, 32, 32, 3), np.uint8)
    assert register_sprites(frames, frames, np.zeros((1, 5, 32, 32), bool)).judged == 0
    with pytest.raises(ValueError, match="masks"):
        register_sprites(frames, frames, np.zeros((1, 4, 32, 32), bool))
