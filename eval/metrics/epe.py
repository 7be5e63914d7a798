"""End-point error between the tracks a video was asked to follow and those found in it.

Paper: MotionStream section 5 (EPE). The paper leaves the protocol open; this one is fixed here:

* the query frame is frame 0 and every point starts there;
* a point counts at frame t when the *ground truth* calls it visible at t (the tracker's own visibility,
  which depends on the video under test, is not used);
* frame 0 is excluded: a tracker is handed the query, so its error there is 0 and would flatter every model;
* the mean is over the visible (t, n) of one video, then over videos; a video without any is left out.

Distances are in pixels of the resolution the points are given in; published figures are at 832x480.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

PCK_THRESHOLDS_PX = (1, 2, 4, 8, 16)


@dataclass(frozen=True)
class EndpointError:
    """Per-video statistics of the end-point error; nan where a video (or frame) has no visible point."""

    per_video_px: Tensor  # [B] mean over visible (t >= 1, n)
    median_px: Tensor  # [B] median over the same
    per_frame_px: Tensor  # [B, T] mean over visible n; column 0 is nan by protocol
    pck: dict[int, Tensor]  # threshold in px -> [B], the fraction of visible (t, n) within it, 0..1
    visible_ratio: Tensor  # [B] visible fraction of all (t >= 1, n)

    @property
    def mean_px(self) -> float:
        """Mean over the videos that have a visible point, in pixels."""
        return float(self.per_video_px.nanmean())


def endpoint_error(predicted_points: Tensor, points: Tensor, visibility: Tensor) -> EndpointError:
    """Compare tracks with the ground truth under the protocol in the module's docstring.

    Args:
        predicted_points: [B, T, N, 2], (x, y) in pixels, as tracked in the video under test.
        points: [B, T, N, 2], the ground truth in the same pixels.
        visibility: [B, T, N] bool, the ground truth's visibility.

    Raises:
        ValueError: shapes disagree, fewer than two frames, or a predicted point that counts is not finite.
    """
    _check_shapes(predicted_points, points, visibility)
    counted = visibility.bool().clone()
    counted[:, 0] = False
    distance = (predicted_points.double() - points.double()).norm(dim=-1)
    if not torch.isfinite(distance[counted]).all():
        raise ValueError(
            "predicted_points holds a value that is not finite at a visible point; "
            "a tracker must return its last position for a point it lost"
        )
    distance = torch.where(counted, distance, torch.full_like(distance, float("nan")))
    flat, flat_counted = distance.flatten(1), counted.flatten(1)
    total = flat_counted.sum(1).double()
    return EndpointError(
        per_video_px=flat.nanmean(1),
        median_px=flat.nanquantile(0.5, dim=1),
        per_frame_px=distance.nanmean(2),
        pck={px: (flat <= px).sum(1) / total for px in PCK_THRESHOLDS_PX},
        visible_ratio=counted[:, 1:].double().mean(dim=(1, 2)),
    )


def _check_shapes(predicted_points: Tensor, points: Tensor, visibility: Tensor) -> None:
    if predicted_points.shape != points.shape or points.shape[:-1] != visibility.shape or points.shape[-1] != 2:
        raise ValueError(
            f"predicted_points {tuple(predicted_points.shape)} and points {tuple(points.shape)} must be "
            f"equal [B, T, N, 2] and visibility {tuple(visibility.shape)} their [B, T, N]"
        )
    if points.shape[1] < 2:
        raise ValueError(
            f"points has T={points.shape[1]} frame; the end-point error needs at least 2, because frame 0 is excluded"
        )
