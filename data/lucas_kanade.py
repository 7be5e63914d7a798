"""Pyramidal Lucas-Kanade point tracking (OpenCV) with a forward-backward check.

Points are followed from frame to frame; one whose way back misses its start by more than `max_roundtrip_px`
is lost, and stays where its neighbours carry it (invisible).
Left out: finding a lost point again; with `max_layers` > 0 that is done by `motion_layers.py`.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np

SUPPORT_POINTS = 500  # tracked beside the queries where layers are wanted
MIN_SUPPORT_STEP_PX = 2.0
BORDER_PX = 16  # replicated margin: windows of points at the frame's edge


@dataclass(kw_only=True)
class LucasKanadeConfig:
    """The fields of `tracker` that Lucas-Kanade reads. Raises ValueError, naming the field."""

    window_px: float = 7.0  # side of the window, in pixels of the clip
    levels: int = 3  # pyramid levels above the first
    upsample: int = 2  # cubic enlargement before tracking, 1..4
    max_roundtrip_px: float = 0.5  # forward-backward error beyond which a point is lost
    max_layers: int | None = 0  # rigid layers that carry points through occlusion; 0 = off; null: see bench.tracker

    def __post_init__(self) -> None:
        if not 1 <= self.upsample <= 4:
            raise ValueError(f"tracker.upsample={self.upsample} must be in 1..4")
        if self.window_px < 3 or self.max_roundtrip_px <= 0:
            raise ValueError(
                f"tracker.window_px={self.window_px} must be >= 3, tracker.max_roundtrip_px={self.max_roundtrip_px} > 0"
            )
        if self.levels < 0 or (self.max_layers or 0) < 0:
            raise ValueError(f"tracker.levels={self.levels} and tracker.max_layers={self.max_layers} must be >= 0")


class LucasKanadeTracker:
    def __init__(self, cfg: LucasKanadeConfig) -> None:
        self.cfg = cfg

    def track(self, frames: np.ndarray, queries: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """frames uint8 [T, H, W, 3], queries [N, 2] px -> points [T, N, 2], visibility [T, N] (see
        `Tracker`).
        """
        queries = np.asarray(queries, np.float32).reshape(-1, 2)
        if self.cfg.max_layers and len(queries):
            from data.motion_layers import carry_through

            support = support_grid(*frames.shape[1:3])
            points, alive = self._chain(frames, np.concatenate([queries, support]))
            points, alive = carry_through(frames, points, alive, self.cfg.max_layers)
            points, alive = points[:, : len(queries)], alive[:, : len(queries)]
        else:
            points, alive = self._chain(frames, queries)
        return points, alive & _in_frame(points, *frames.shape[1:3])

    def _chain(self, frames: np.ndarray, queries: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Frame to frame; a lost point stays lost."""
        images = [self._prepared(frame) for frame in frames]
        points, alive = [queries], [np.ones(len(queries), bool)]
        for before, after in pairwise(images):
            moved, held = self._step(before, after, points[-1]) if len(queries) else (points[-1], alive[-1])
            held = held & alive[-1] & _in_frame(moved, *frames.shape[1:3])
            points.append(_carry_lost(points[0], moved, held))
            alive.append(held)
        return np.stack(points), np.stack(alive)

    def _prepared(self, frame: np.ndarray) -> np.ndarray:
        import cv2

        gray = cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY)
        if self.cfg.upsample > 1:
            scale = self.cfg.upsample
            gray = cv2.resize(gray, None, fx=scale, fy=scale, interpolation=cv2.INTER_CUBIC)
        return cv2.copyMakeBorder(gray, BORDER_PX, BORDER_PX, BORDER_PX, BORDER_PX, cv2.BORDER_REPLICATE)

    def _step(self, before: np.ndarray, after: np.ndarray, points: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        import cv2

        scale, offset = self.cfg.upsample, np.float32(BORDER_PX - 0.5)  # OpenCV's pixel centres are integers
        side = int(self.cfg.window_px * scale) | 1
        settings: dict[str, Any] = {
            "winSize": (side, side),
            "maxLevel": self.cfg.levels,
            "criteria": (cv2.TERM_CRITERIA_EPS | cv2.TERM_CRITERIA_COUNT, 30, 0.003),
        }
        start = (points * scale + offset)[:, None]
        forward, found, _ = cv2.calcOpticalFlowPyrLK(before, after, start, None, **settings)
        backward, found_back, _ = cv2.calcOpticalFlowPyrLK(after, before, forward, None, **settings)
        roundtrip = np.linalg.norm(backward - start, axis=-1)[:, 0] / scale
        held = (found[:, 0] > 0) & (found_back[:, 0] > 0) & (roundtrip < self.cfg.max_roundtrip_px)
        return (forward[:, 0] - offset) / scale, held


def support_grid(height: int, width: int) -> np.ndarray:
    """Points that are tracked beside the queries, so that small bodies have enough of them: [M, 2] px."""
    step = max(MIN_SUPPORT_STEP_PX, (height * width / SUPPORT_POINTS) ** 0.5)
    x, y = np.arange(step / 2, width, step), np.arange(step / 2, height, step)
    return np.stack(np.meshgrid(x, y), axis=-1).reshape(-1, 2).astype(np.float32)


def _in_frame(points: np.ndarray, height: int, width: int) -> np.ndarray:
    x, y = points[..., 0], points[..., 1]
    return (x >= 0) & (x < width) & (y >= 0) & (y < height)


def _carry_lost(start: np.ndarray, moved: np.ndarray, held: np.ndarray) -> np.ndarray:
    """Give each lost point the displacement (since frame 0) of the held point that started nearest to it."""
    if held.all() or not held.any():
        return moved
    kept, lost = np.flatnonzero(held), np.flatnonzero(~held)
    distance = ((start[lost, None] - start[None, kept]) ** 2).sum(-1)
    nearest = kept[distance.argmin(axis=1)]
    carried = moved.copy()
    carried[lost] = start[lost] + moved[nearest] - start[nearest]
    return carried
