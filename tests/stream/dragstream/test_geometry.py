"""Masks and features move by one mapping, exact to interpolation."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from stream.dragstream.drag import Drag, Handle, Pose
from stream.dragstream.features import Reference
from stream.dragstream.geometry import (
    bounding_box,
    cell_centers,
    contains,
    gaussian_map,
    moved,
    moved_mask,
    sample,
    source_of,
    swept_region,
)

SIZE = (480, 832)  # px, a token is 16 px, a latent cell 8
ROWS, COLS = 30, 52
NUMBERS = st.floats(-200, 200, allow_nan=False)


def token_map() -> torch.Tensor:
    return torch.randn(3, ROWS, COLS, generator=torch.Generator().manual_seed(0))


def warped(features: torch.Tensor, pose: Pose, center: tuple[float, float] = (0.0, 0.0)) -> torch.Tensor:
    points = source_of(cell_centers(ROWS, COLS, SIZE), pose, center)
    return sample(features, points, SIZE, outside="zeros").permute(2, 0, 1)


def test_sixteen_pixels_to_the_right_are_one_token_to_the_right():
    features = token_map()
    found = warped(features, Pose(dx=16.0))
    torch.testing.assert_close(found[:, :, 1:], features[:, :, :-1], atol=3e-5, rtol=0)
    assert found[:, :, 0].abs().max() < 1e-5


def test_a_quarter_turn_brings_right_to_down():
    center = (416.0, 240.0)
    right = torch.tensor([[516.0, 240.0]])
    torch.testing.assert_close(moved(right, Pose(degrees=90), center), torch.tensor([[416.0, 340.0]]))
    features = torch.zeros(1, ROWS, COLS)
    features[0, 15, 30] = 1.0  # its middle is at (488, 248)
    found = warped(features, Pose(degrees=90), (416.0, 248.0))
    assert found[0].argmax() == 20 * COLS + 25 or found[0].max() <= 0.5  # (416, 320): between cells 25 and 26
    assert found[0, 19:21, 25:27].sum() == pytest.approx(1.0, abs=1e-4)


def test_half_a_token_is_the_mean_of_two():
    features = token_map()
    found = warped(features, Pose(dy=8.0))
    torch.testing.assert_close(found[:, 1:], (features[:, 1:] + features[:, :-1]) / 2, atol=3e-5, rtol=1e-4)


@settings(max_examples=50, deadline=None)
@given(dx=NUMBERS, dy=NUMBERS, degrees=st.floats(-720, 720), x=NUMBERS, y=NUMBERS)
def test_source_is_the_inverse_of_moved(dx: float, dy: float, degrees: float, x: float, y: float):
    pose, center = Pose(dx, dy, degrees), (x, y)
    points = torch.tensor([[0.0, 0.0], [31.5, 80.25], [-7.0, 400.0]], dtype=torch.float64)
    back = source_of(moved(points, pose, center), pose, center)
    torch.testing.assert_close(back, points, atol=1e-9, rtol=1e-9)


def test_a_moved_mask_covers_what_it_should():
    mask = torch.zeros(SIZE, dtype=torch.bool)
    mask[64:128, 160:320] = True  # cells 8..15 by 20..39 of 8 px
    here = moved_mask(mask, Pose(), (0, 0), 60, 104)
    assert here[8:16, 20:40].min() == 1 and here.sum() == 8 * 20
    there = moved_mask(mask, Pose(dx=12.0, dy=-8.0), (0, 0), 60, 104)  # one and a half cells
    assert there[7:15, 22:41].min() == 1
    torch.testing.assert_close(there[7:15, 21], torch.full((8,), 0.5))
    assert there.sum() == pytest.approx(8 * 20, abs=1e-3)


def test_places_are_not_rounded_to_the_features_dtype():
    ramp = torch.arange(104.0)[None, None].expand(1, 60, -1)
    points = torch.tensor([[701.3, 200.7], [803.9, 411.1]])
    found = sample(ramp.bfloat16(), points, (480, 832))
    torch.testing.assert_close(found.float(), sample(ramp, points, (480, 832)), atol=0.0, rtol=2**-8)
    assert found.dtype == torch.bfloat16


def test_what_leaves_the_frame_is_gone():
    mask = torch.zeros(SIZE, dtype=torch.bool)
    mask[0:16, 0:16] = True
    assert moved_mask(mask, Pose(dx=-16.0), (0, 0), 60, 104).sum() == 0
    assert bounding_box(mask, Pose(dx=-16.0), (0, 0)) is None
    assert bounding_box(mask, Pose(dx=-8.0, dy=8.0), (0, 0)) == (0.0, 8.0, 8.0, 24.0)


def test_the_gaussian_map_has_the_papers_width():
    box = (160.0, 80.0, 240.0, 160.0)
    found = gaussian_map([box], 480, 832, SIZE, alpha=1.0)
    assert found[120, 200] == pytest.approx(1.0, abs=1e-3)  # the middle
    assert found[120, 240] == pytest.approx(np.exp(-0.5), abs=0.01)  # a box's edge is one sigma away
    assert found[120, 320] == pytest.approx(np.exp(-4.5), abs=0.003)
    both = gaussian_map([box, (600.0, 300.0, 680.0, 380.0)], 480, 832, SIZE, alpha=1.0)
    assert (both >= found).all() and both[340, 640] == pytest.approx(1.0, abs=1e-3)
    assert gaussian_map([], 4, 4, SIZE, alpha=1.0).abs().max() == 0


def test_the_gaussian_of_a_box_is_as_wide_and_as_high_as_the_box():
    """Twice as wide as high: it has fallen alike half a width beside the middle and half a height below it."""
    found = gaussian_map([(10.0, 20.0, 50.0, 40.0)], 60, 60, (60, 60), alpha=1.0)
    x, y = 30.5 - 30, 30.5 - 30
    for row, col in ((30, 50), (40, 30), (40, 50)):
        offset = ((col - 30 + x) / 20) ** 2 + ((row - 30 + y) / 10) ** 2
        assert float(found[row, col]) == pytest.approx(np.exp(-offset / 2), rel=1e-4)


def test_a_mask_contains_the_points_over_its_pixels_and_none_beyond_the_frame():
    mask = np.zeros((4, 8), bool)
    mask[1:3, 5:] = True
    points = torch.tensor([[5.0, 1.0], [7.9, 2.9], [4.9, 1.0], [8.0, 1.0], [5.0, 3.0], [6.0, -0.1], [1.0, 5.0]])
    assert contains(mask, points).tolist() == [True, True, False, False, False, False, False]


def test_what_comes_back_sweeps_its_targets_alone():
    mask = np.zeros((8, 8), bool)
    mask[2:4, 0:2] = True
    handle = Handle(mask, (1.0, 3.0), (Pose(dx=3.0),), (1.0, 3.0))
    assert np.unique(swept_region(Drag("edit", (handle,))).nonzero()[1]).tolist() == [0, 1, 3, 4]
    back = Handle(mask, (1.0, 3.0), (Pose(dx=3.0),), (1.0, 3.0), Reference(torch.zeros(1, 2, 2)))
    assert np.unique(swept_region(Drag("edit", (back,))).nonzero()[1]).tolist() == [3, 4]
