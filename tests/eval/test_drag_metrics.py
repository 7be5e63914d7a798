from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from data.sprites import SpritesConfig, render_clip
from data.video import read_video
from eval.metrics.drag import (
    LocatorConfig,
    RegionLocator,
    dragging_accuracy,
    largest_radius,
    moved_map,
    objmc,
    psnr_outside,
)
from stream.dragstream.drag import Pose
from stream.dragstream.geometry import cell_centers, moved, sample, source_of
from stream.dragstream.labels import DragLabel

SIZE = (64, 64)
LABEL = Path(__file__).parents[3] / "shared/data/dragstream_label/block_3_Drag_trajectory.json"


def test_objmc_is_zero_on_the_users_path_and_the_distance_off_it():
    start = np.array([[10.0, 10.0], [20.0, 12.0]])
    poses = [Pose(dx=4.0 * t) for t in (1, 2)]
    perfect = start + np.array([[[0.0, 0.0]], [[4.0, 0.0]], [[8.0, 0.0]]])
    assert objmc(perfect, poses, (15, 11)).displacement_px == 0
    still = objmc(np.stack([start] * 3), poses, (15, 11))
    assert still.displacement_px == still.per_point_px == 6.0
    with pytest.raises(ValueError, match="must be"):
        objmc(perfect, poses[:1], (15, 11))


def test_a_turn_about_the_middle_shows_in_the_per_point_form_only():
    start = np.array([[5.0, 10.0], [15.0, 10.0]])
    still = objmc(np.stack([start, start]), [Pose(degrees=180)], (10.0, 10.0))
    assert still.displacement_px == pytest.approx(0, abs=1e-9) and still.per_point_px == pytest.approx(10)


def test_dai_is_zero_for_a_moved_patch_and_unsquared():
    before = torch.randn(4, 16, 16, generator=torch.Generator().manual_seed(0))
    after = before.roll((2, 3), dims=(1, 2))
    start, target = (26.0, 30.0), (26.0 + 12, 30.0 + 8)  # cells of 4 px: 3 right, 2 down
    assert dragging_accuracy(before, after, start, target, 3, SIZE) == 0
    assert dragging_accuracy(before, before + 1, start, start, 1, SIZE) == pytest.approx((4 * 9) ** 0.5 / 9)
    # cut at the border, equally on both sides: only the column x = 0 and to its right is shared
    assert dragging_accuracy(before, before + 1, (1, 30), (1, 30), 1, SIZE) == pytest.approx((4 * 6) ** 0.5 / 9)
    assert np.isnan(dragging_accuracy(before, after, start, (300.0, 30.0), 1, SIZE))
    # GoodDrag's script: the sum of squares; patches of 9 cells, cut to 6
    assert dragging_accuracy(before, before + 2, start, start, 1, SIZE, squared=True) == pytest.approx(4 * 4)
    assert dragging_accuracy(before, before + 2, (1, 30), (1, 30), 1, SIZE, squared=True) == pytest.approx(
        4 * 4 * 6 / 9
    )


@pytest.mark.skipif(not LABEL.exists(), reason="the real drag in ../shared/data/dragstream_label is absent")
def test_the_dai_of_the_official_demos_own_drag():
    """In RGB; the paper, on other videos, has 0.133 without a drag and 0.051 with its own."""
    drag = DragLabel.read(LABEL).drag_in(480, 832, 3)
    handle = drag.handles[0]
    target = moved(torch.tensor(handle.point), handle.poses[-1], handle.center).tolist()
    before, after = (_last_frame(LABEL.parent / name) for name in ("before.mp4", "after.mp4"))

    def dai(frame: torch.Tensor, *, squared: bool) -> float:
        return dragging_accuracy(before, frame, handle.point, target, 20, (480, 832), squared=squared)

    assert 0.05 < dai(after, squared=True) < 0.1 and 0.2 < dai(before, squared=True) < 0.5
    assert dai(after, squared=True) < 0.38 * dai(before, squared=True)
    assert dai(after, squared=False) < dai(before, squared=False) < 0.03


def _last_frame(video: Path) -> torch.Tensor:
    """RGB [3, H, W] in [0, 1]."""
    return torch.from_numpy(read_video(video)[-1]).permute(2, 0, 1).float() / 255


def test_a_moved_map_turns_and_moves_by_parts_of_a_cell():
    before = torch.randn(4, 16, 16, generator=torch.Generator().manual_seed(0))
    size = (64, 64)
    there = moved_map(before, Pose(dx=12, dy=8), (0.0, 0.0), size)
    torch.testing.assert_close(there[:, 2:, 3:], before[:, :-2, :-3])
    half = moved_map(before, Pose(dx=2), (0.0, 0.0), size)
    torch.testing.assert_close(half[:, :, 1:], (before[:, :, 1:] + before[:, :, :-1]) / 2)
    turned = moved_map(before, Pose(degrees=90), (32.0, 32.0), size)  # clockwise on screen
    torch.testing.assert_close(turned, before.rot90(-1, (1, 2)), atol=1e-5, rtol=0)
    target = (30.0, 34.0)
    assert dragging_accuracy(turned, before.rot90(-1, (1, 2)), target, target, 3, size) < 1e-5


def test_the_largest_radius_fits_at_both_points():
    assert largest_radius((34.0, 34.0), (34.0, 50.0), (16, 16), SIZE) == 3
    assert largest_radius((34.0, 34.0), (62.0, 50.0), (16, 16), SIZE) == 1
    assert largest_radius((416.0, 240.0), (416.0, 240.0), (480, 832), (480, 832)) == 20


def test_psnr_counts_what_lies_outside_only():
    reference = np.full((2, 8, 8, 3), 100, np.uint8)
    frames = reference.copy()
    editable = np.zeros((8, 8), bool)
    editable[:4] = True
    frames[:, :4] = 0
    assert psnr_outside(frames, reference, editable) == 100.0
    frames[:, 4:] += 10
    assert psnr_outside(frames, reference, editable) == pytest.approx(20 * np.log10(25.5))
    assert np.isnan(psnr_outside(frames, reference, np.ones((8, 8), bool)))


def scene() -> tuple[np.ndarray, np.ndarray]:
    cfg = SpritesConfig(num_frames=5, max_sprites=1, min_size=0.4, leave_margin=-0.3, background="static", events=False)
    clip = render_clip(cfg, 4)
    return clip.frames[0], clip.masks[0, 0]


@settings(max_examples=25, deadline=None)
@given(dx=st.floats(-12, 12), dy=st.floats(-12, 12), degrees=st.floats(-60, 60))
def test_a_region_is_found_where_it_went(dx: float, dy: float, degrees: float):
    frame, mask = scene()
    locator = RegionLocator(frame, mask)
    pose = Pose(dx, dy, degrees)
    points = source_of(cell_centers(*SIZE, SIZE), pose, locator.center)
    image = torch.from_numpy(frame).permute(2, 0, 1).float()
    there = sample(torch.from_numpy(mask)[None].float(), points, SIZE, outside="zeros") > 0.5
    composed = torch.where(there, sample(image, points, SIZE), image.permute(1, 2, 0).flip(0))
    found = locator.locate(composed.round().to(torch.uint8).numpy())
    assert found.correlation > 0.7
    assert np.hypot(found.pose.dx - dx, found.pose.dy - dy) < 0.7
    assert abs(found.pose.degrees - degrees) < 5


def test_a_region_that_stays_is_found_in_place():
    frame, mask = scene()
    found = RegionLocator(frame, mask, LocatorConfig(max_degrees=0.0)).locate(frame)
    assert found.correlation == pytest.approx(1, abs=0.02)
    assert np.hypot(found.pose.dx, found.pose.dy) < 0.1 and found.pose.degrees == 0
