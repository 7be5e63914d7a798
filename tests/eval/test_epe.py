from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from eval.metrics.epe import endpoint_error


def _straight(batch: int = 2, frames: int = 5, tracks: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    points = torch.rand(batch, frames, tracks, 2, generator=torch.Generator().manual_seed(0)) * 64
    return points, torch.ones(batch, frames, tracks, dtype=torch.bool)


@settings(max_examples=25, deadline=None)
@given(dx=st.floats(-30, 30), dy=st.floats(-30, 30))
def test_a_constant_shift_is_its_length(dx: float, dy: float) -> None:
    points, visibility = _straight()
    found = endpoint_error(points.double() + torch.tensor([dx, dy], dtype=torch.float64), points, visibility)
    assert found.mean_px == pytest.approx(math.hypot(dx, dy), abs=1e-9)
    torch.testing.assert_close(found.median_px, found.per_video_px)


def test_frame_zero_and_invisible_points_do_not_count() -> None:
    points, visibility = _straight(batch=1)
    predicted = points.clone()
    predicted[:, 0] += 100  # excluded by protocol
    predicted[:, :, 1] += 50
    visibility[:, :, 1] = False
    predicted[:, 2, 0, 0] += 3
    found = endpoint_error(predicted, points, visibility)
    assert found.mean_px == pytest.approx(3 / 8)  # one error of 3 px among 4 frames x 2 visible tracks
    assert math.isnan(found.per_frame_px[0, 0])
    assert found.per_frame_px[0, 2] == pytest.approx(1.5)
    assert float(found.visible_ratio[0]) == pytest.approx(2 / 3)


def test_videos_weigh_alike_and_empty_ones_are_left_out() -> None:
    points, visibility = _straight(batch=3)
    predicted = points.clone()
    predicted[0] += torch.tensor([4.0, 0.0])
    visibility[0, :, 1:] = False  # fewer points, the same weight
    visibility[2] = False
    found = endpoint_error(predicted, points, visibility)
    assert found.mean_px == pytest.approx(2.0)
    assert math.isnan(found.per_video_px[2])
    assert math.isnan(found.pck[4][2])


def test_pck_counts_the_threshold_itself() -> None:
    points, visibility = _straight(batch=1, tracks=2)
    points = points.double()
    predicted = points.clone()
    predicted[..., 1, 0] = points[..., 1, 0] + 5
    pck = endpoint_error(predicted, points, visibility).pck
    assert [float(pck[px][0]) for px in (1, 4, 8)] == [0.5, 0.5, 1.0]
    assert list(pck) == [1, 2, 4, 8, 16]


def test_refuses_what_it_cannot_judge() -> None:
    points, visibility = _straight()
    with pytest.raises(ValueError, match="equal"):
        endpoint_error(points[:, :-1], points, visibility)
    with pytest.raises(ValueError, match="at least 2"):
        endpoint_error(points[:, :1], points[:, :1], visibility[:, :1])
    lost = points.clone()
    lost[0, 2, 0] = float("nan")
    with pytest.raises(ValueError, match="not finite"):
        endpoint_error(lost, points, visibility)
    visibility[0, 2, 0] = False
    assert math.isfinite(endpoint_error(lost, points, visibility).mean_px)
