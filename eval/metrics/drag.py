"""Did the dragged region go where it should, does it still look the same, and did the rest stay?

Papers: DragStream appendix C.2. ObjMC: points are tracked from the handle; the path of their mean is compared with
the user's. Here the *displacement* of the mean is (a handle point need not be the middle of its region), and, since
turning about its own middle moves no mean, each point with its own target beside it. DAI (eq. 11): the patch around
the target point against the one around the handle point, unsquared norm over the patch's size. GoodDrag, whose
measure it is, takes RGB and squares the norm (its script also divides by the number of points twice). The paper gives
0.133 without a drag and 0.051 with it, and does not say by which; what speaks for the squares is in docs/evaluation.md.
Both are here. Patches are cropped equally at the frame's border. A square patch stays upright where its region turns
and moves by whole cells: of the frame that the drag found, moved as the region is (`moved_map`), the patch at the
target is another reference.
"""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np
import torch
from torch import Tensor

from eval.metrics.registration import peak_offset
from stream.dragstream.drag import Point, Pose
from stream.dragstream.geometry import cell_centers, moved, sample, source_of


@dataclass(frozen=True)
class Objmc:
    """Mean distances over the judged frames, px."""

    displacement_px: float  # of the mean of the points
    per_point_px: float


def objmc(points: np.ndarray, poses: list[Pose], center: Point) -> Objmc:
    """Tracked points against the user's path.

    Args:
        points: [1 + T, N, 2] px; points[0] are where the drag found them.
        poses: T poses that the region should have taken.
        center: of rotation, px.

    Raises:
        ValueError: lengths disagree, or nothing to judge.
    """
    if len(points) != 1 + len(poses) or len(points) < 2 or not points.shape[1]:
        raise ValueError(f"points {points.shape} must be [1 + T, N, 2] with N >= 1 for T={len(poses)} >= 1 poses")
    start = torch.from_numpy(points[0].astype(np.float64))
    wanted = np.stack([moved(start, pose, center).numpy() for pose in poses])
    found = points[1:].astype(np.float64)
    per_point = np.linalg.norm(found - wanted, axis=-1)
    mean = np.linalg.norm(found.mean(1) - wanted.mean(1), axis=-1)
    return Objmc(float(mean.mean()), float(per_point.mean()))


def dragging_accuracy(
    before: Tensor,
    after: Tensor,
    start: Point,
    target: Point,
    radius: int,
    size: tuple[int, int],
    *,
    squared: bool = False,
) -> float:
    """DAI of one point: |after[patch at the target] - before[patch at the handle]| / (1 + 2 radius)^2.

    Args:
        before, after: [C, h, w] over a frame of ``size`` (height, width) px: latents or RGB in [0, 1].
        start, target: handle and target point in px.
        radius: of the square patch, in cells of the maps.
        squared: the squared norm, as GoodDrag's script has it (on RGB), not the norm of eq. 11.

    Returns:
        nan where no cell of the patch lies in the frame at both places.
    """
    rows, cols = before.shape[-2:]
    centers = [(int(y * rows / size[0] // 1), int(x * cols / size[1] // 1)) for x, y in (start, target)]
    low = [max(-radius, *(-each[axis] for each in centers)) for axis in (0, 1)]
    high = [min(radius, *(length - 1 - each[axis] for each in centers)) for axis, length in ((0, rows), (1, cols))]
    if low[0] > high[0] or low[1] > high[1]:
        return float("nan")
    patches = [
        image[:, y + low[0] : y + high[0] + 1, x + low[1] : x + high[1] + 1].float()
        for image, (y, x) in zip((before, after), centers)
    ]
    distance = float((patches[1] - patches[0]).norm())
    return (distance**2 if squared else distance) / (1 + 2 * radius) ** 2


def moved_map(before: Tensor, pose: Pose, center: Point, size: tuple[int, int]) -> Tensor:
    """All of [C, h, w] moved and turned as a handle is, bilinearly, over a frame of ``size`` px; its edge goes on."""
    rows, cols = before.shape[-2:]
    centers = cell_centers(rows, cols, size, before.device)
    return sample(before, source_of(centers, pose, center), size).movedim(-1, 0)


def largest_radius(start: Point, target: Point, grid: tuple[int, int], size: tuple[int, int], limit: int = 20) -> int:
    """The largest radius up to ``limit`` whose patch lies in the frame at both points, in cells; at least 1."""
    rows, cols = grid
    reach = limit
    for x, y in (start, target):
        row, col = int(y * rows / size[0] // 1), int(x * cols / size[1] // 1)
        reach = min(reach, row, col, rows - 1 - row, cols - 1 - col)
    return max(1, reach)


def psnr_outside(frames: np.ndarray, reference: np.ndarray, editable: np.ndarray) -> float:
    """PSNR in dB of two uint8 videos [T, H, W, 3] outside bool [H, W]; nan where nothing is outside."""
    outside = ~editable
    if not outside.any():
        return float("nan")
    difference = frames[:, outside].astype(np.float64) - reference[:, outside].astype(np.float64)
    error = np.square(difference).mean(axis=(1, 2))
    return float(np.minimum(100.0, 10 * np.log10(255.0**2 / np.maximum(error, 1e-6))).mean())


# ------------------------------------------------------------------------------------------ finding a region again
@dataclass
class LocatorConfig:
    """How a region is looked for in a later frame, by its appearance."""

    max_degrees: float = 90.0  # rotations looked at, either way
    step_degrees: float = 7.5
    margin_ratio: float = 0.5  # of the region's size that may lie outside of the frame

    def __post_init__(self) -> None:
        if self.max_degrees < 0 or self.step_degrees <= 0 or not 0 <= self.margin_ratio <= 1:
            raise ValueError(
                f"max_degrees={self.max_degrees} must be >= 0, step_degrees={self.step_degrees} > 0 and "
                f"margin_ratio={self.margin_ratio} in 0..1"
            )


@dataclass(frozen=True)
class Located:
    """Where a region was found."""

    pose: Pose  # about the centre of its bounding box
    correlation: float  # at the best match, -1..1


class RegionLocator:
    """Finds one region of a frame in other frames of its video, anywhere and turned by any angle looked at.

    The least squared difference over all three channels under the mask, refined by parabolas: a correlation would
    take any texture of the background for that of a region whose own has faded. For videos of the sprites world,
    where a drag may move an object by half a frame at once and optical flow loses it.
    """

    def __init__(self, frame: np.ndarray, mask: np.ndarray, cfg: LocatorConfig | None = None) -> None:
        """frame uint8 [H, W, 3]; mask bool [H, W], not empty."""
        self.cfg = cfg or LocatorConfig()
        rows, cols = np.nonzero(mask)
        self.center = ((cols.min() + cols.max() + 1) / 2, (rows.min() + rows.max() + 1) / 2)
        half = int(np.ceil(np.hypot(np.ptp(rows) + 1, np.ptp(cols) + 1) / 2)) + 1
        self.half = half
        corner = (self.center[0] - half, self.center[1] - half)
        shift = np.array([[1, 0, -corner[0]], [0, 1, -corner[1]]], np.float32)
        side = 2 * half
        template = cv2.warpAffine(frame, shift, (side, side), flags=cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)
        weight = cv2.warpAffine(mask.astype(np.float32), shift, (side, side), flags=cv2.INTER_LINEAR)
        steps = int(self.cfg.max_degrees // self.cfg.step_degrees)
        self.angles = np.arange(-steps, steps + 1) * self.cfg.step_degrees
        self.templates = [self._turned(template, weight, angle) for angle in self.angles]
        self.pad = int(np.ceil(self.cfg.margin_ratio * half)) + half

    def locate(self, frame: np.ndarray) -> Located:
        """The best match in frame uint8 [H, W, 3]."""
        padded = cv2.copyMakeBorder(frame, self.pad, self.pad, self.pad, self.pad, cv2.BORDER_REPLICATE)
        differences = [
            cv2.matchTemplate(padded, template, cv2.TM_SQDIFF, mask=weight) / weight.sum()
            for template, weight in self.templates
        ]
        volume = -np.stack(differences)
        turn, y, x = (int(index) for index in np.unravel_index(volume.argmax(), volume.shape))
        dx = x + peak_offset(volume[turn, y], x) - self.pad + self.half - self.center[0]
        dy = y + peak_offset(volume[turn, :, x], y) - self.pad + self.half - self.center[1]
        degrees = self.angles[turn] + self.cfg.step_degrees * peak_offset(volume[:, y, x], turn)
        template, weight = self.templates[turn]
        patch = padded[y : y + len(weight), x : x + len(weight)]
        return Located(Pose(float(dx), float(dy), float(degrees)), _correlation(patch, template, weight > 0))

    def _turned(self, template: np.ndarray, weight: np.ndarray, degrees: float) -> tuple[np.ndarray, np.ndarray]:
        side, middle = len(weight), (len(weight) - 1) / 2
        matrix = cv2.getRotationMatrix2D((middle, middle), -float(degrees), 1.0)  # OpenCV turns counter-clockwise
        turned = cv2.warpAffine(template, matrix, (side, side), borderMode=cv2.BORDER_REPLICATE)
        return turned, (cv2.warpAffine(weight, matrix, (side, side)) > 0.5).astype(np.float32)


def _correlation(patch: np.ndarray, template: np.ndarray, inside: np.ndarray) -> float:
    """Of two pictures under a mask, each channel about its own mean; 0 where one of them is flat."""
    first, second = (image[inside].astype(np.float64) for image in (patch, template))
    first, second = first - first.mean(0), second - second.mean(0)
    size = np.sqrt(np.square(first).sum() * np.square(second).sum())
    return float((first * second).sum() / size) if size > 0 else 0.0
