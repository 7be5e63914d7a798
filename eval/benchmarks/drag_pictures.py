"""What the drag benchmark shows: which scenarios, and handles drawn where they should be."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence

import cv2
import numpy as np
import torch

from eval.benchmarks.drag_runs import DraggedChunks, Run
from eval.benchmarks.drag_scenarios import DragScenario
from eval.report import Figure, contact_sheet
from stream.dragstream.drag import Handle, Pose
from stream.dragstream.geometry import moved_mask

SHEET_SCALE = 4  # so that outlines are thin
MAX_SHEET_FRAMES = 8
SHEET_TEXT = (
    "For each drag the frame that was grabbed, then the last frame of each latent frame that it concerns. White: the "
    "handle, where it is in the first and where it should be in the others."
)


def pick_shown(scenarios: Sequence[DragScenario], count: int) -> list[int]:
    """Numbers of scenarios to look at: one of each operation first, then of each variant, then of each combination."""
    groups: list[list[Hashable]] = [
        [(each.mode, each.kind) for each in scenarios],
        [each.variant for each in scenarios],
        [(each.mode, each.kind, each.num_handles) for each in scenarios],
    ]
    first_of_each = [keys.index(key) for keys in groups for key in dict.fromkeys(keys)]
    return list(dict.fromkeys(first_of_each))[:count]


def drag_sheet(runs: Mapping[str, Run], caption: str) -> Figure:
    """A row per run: for each drag the frame that was grabbed, then one frame per latent frame of the drag."""
    rows = {name: np.stack([frame for dragged in run.drags for frame in _steps(dragged)]) for name, run in runs.items()}
    return contact_sheet(rows, num_frames=MAX_SHEET_FRAMES, caption=caption)


def _steps(dragged: DraggedChunks) -> list[np.ndarray]:
    handles = dragged.drag.handles
    grabbed = _outlined(dragged.before, handles, [Pose()] * len(handles), SHEET_SCALE)
    return [
        grabbed,
        *(_outlined(dragged.frames[frame], handles, poses, SHEET_SCALE) for frame, poses in dragged.poses),
    ]


def with_handles(run: Run) -> np.ndarray:
    """The run's frames with the outline of each handle where it should be, while it is dragged."""
    frames = run.frames.copy()
    for dragged in run.drags:
        for frame, poses in dragged.poses:
            at = dragged.first_frame + frame
            frames[at] = _outlined(frames[at], dragged.drag.handles, poses)
    return frames


def _outlined(frame: np.ndarray, handles: Sequence[Handle], poses: Sequence[Pose], scale: int = 1) -> np.ndarray:
    """The frame, so many times as large, with each handle's outline."""
    picture = np.ascontiguousarray(frame.repeat(scale, axis=0).repeat(scale, axis=1))
    for handle, pose in zip(handles, poses):
        mask = cv2.resize(handle_at(handle, pose), None, fx=scale, fy=scale, interpolation=cv2.INTER_LINEAR)
        outlines, _ = cv2.findContours((mask >= 0.5).astype(np.uint8), cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
        cv2.drawContours(picture, outlines, -1, (255, 255, 255), 1)
    return picture


def handle_at(handle: Handle, pose: Pose) -> np.ndarray:
    """Its mask at a pose, [H, W] in [0, 1]."""
    height, width = handle.mask.shape
    return moved_mask(torch.from_numpy(handle.mask), pose, handle.center, height, width).numpy()
