"""Where a dragged region goes, and what it takes along: one mapping for masks and features.

DragStream eq. 1: Y, Pi = G(H, ...), a target mask and the coordinate map from the handle to it. Everything is
sampled backwards and bilinearly (`align_corners=False`: a cell is an area, its value stands at its middle), so a
drag of any fraction of a cell moves features by just that. The official code warps by the nearest neighbour at
1/8 of the resolution and upsamples with `align_corners=True`: drags are rounded to 8 px, and a drag of 120 px asks
for 118. Left out: occlusion between handles except that a later one is in front.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from stream.dragstream.drag import Drag, Handle, Point, Pose

SMALLEST_SHARE = 1e-3  # of a cell: less is rounding of the bilinear weights


def cell_centers(rows: int, cols: int, size: tuple[int, int], device: torch.device | str = "cpu") -> Tensor:
    """Middles of the cells of a grid over a frame of ``size`` (height, width) px: [rows, cols, 2] as (x, y)."""
    height, width = size
    y = (torch.arange(rows, device=device, dtype=torch.float32) + 0.5) * (height / rows)
    x = (torch.arange(cols, device=device, dtype=torch.float32) + 0.5) * (width / cols)
    return torch.stack(torch.meshgrid(x, y, indexing="xy"), dim=-1)


def moved(points: Tensor, pose: Pose, center: Point) -> Tensor:
    """Where content at points [..., 2] goes: turned clockwise on screen about the centre, then moved."""
    origin = points.new_tensor(center)
    return _turned(points - origin, pose.degrees) + origin + points.new_tensor([pose.dx, pose.dy])


def source_of(points: Tensor, pose: Pose, center: Point) -> Tensor:
    """Where the content that is to be at points [..., 2] comes from: the inverse of `moved`."""
    origin = points.new_tensor(center)
    return _turned(points - origin - points.new_tensor([pose.dx, pose.dy]), -pose.degrees) + origin


def sample(image: Tensor, points: Tensor, size: tuple[int, int], outside: str = "border") -> Tensor:
    """Values of image [C, h, w], which covers a frame of ``size`` px, at points [..., 2] px -> [..., C].

    Bilinear; beyond the frame its edge ("border") or zero ("zeros").
    """
    height, width = size
    grid = 2 * points / points.new_tensor([width, height]) - 1
    found = F.grid_sample(  # in float32: bfloat16 would round the places
        image[None].float(), grid.reshape(1, 1, -1, 2).float(), mode="bilinear", padding_mode=outside,
        align_corners=False,
    )  # fmt: skip
    return found[0, :, 0].T.reshape(*points.shape[:-1], image.shape[0]).to(image.dtype)


def moved_mask(mask: Tensor, pose: Pose, center: Point, rows: int, cols: int) -> Tensor:
    """Share of each cell that the moved mask covers: mask [H, W] -> [rows, cols] in [0, 1]."""
    size = (mask.shape[0], mask.shape[1])
    source = source_of(cell_centers(*size, size, mask.device), pose, center)
    at_pixels = sample(mask[None].float(), source, size, outside="zeros")[..., 0]
    share = F.adaptive_avg_pool2d(at_pixels[None], (rows, cols))[0]
    return share.masked_fill(share < SMALLEST_SHARE, 0.0)


def contains(mask: np.ndarray, points: Tensor) -> Tensor:
    """Whether points [N, 2] px lie in a mask, bool [H, W]: bool [N]; beyond the frame there is nothing."""
    height, width = mask.shape
    x, y = points.floor().long().unbind(-1)
    inside = (x >= 0) & (x < width) & (y >= 0) & (y < height)
    return inside & torch.from_numpy(mask)[y.clamp(0, height - 1), x.clamp(0, width - 1)]


def swept_region(drag: Drag) -> np.ndarray:
    """Where the handles are, and will be in each latent frame: bool [H, W]."""
    here = [(handle, Pose()) for handle in drag.handles if not handle.returns]
    return covered([*here, *((handle, pose) for handle in drag.handles for pose in handle.poses)])


def covered(placed: Sequence[tuple[Handle, Pose]]) -> np.ndarray:
    """Pixels that handles cover at poses: bool [H, W]."""
    masks = [moved_mask(torch.from_numpy(h.mask), pose, h.center, *h.mask.shape) >= 0.5 for h, pose in placed]
    return torch.stack(masks).any(0).numpy()


def gaussian_map(boxes: list[tuple[float, float, float, float]], rows: int, cols: int, size: tuple[int, int],
                 alpha: float) -> Tensor:  # fmt: skip
    """Where an update may act (DragStream eq. 10): [rows, cols], 1 in the middle of a box (x0, y0, x1, y1) px.

    sigma = alpha / 2 of a box's width and height; the union over boxes is 1 - prod(1 - G).
    """
    points = cell_centers(rows, cols, size)
    rest = torch.ones(rows, cols)
    for x0, y0, x1, y1 in boxes:
        sigma_x, sigma_y = (max(1.0, 0.5 * alpha * extent) for extent in (x1 - x0, y1 - y0))
        x, y = points[..., 0] - (x0 + x1) / 2, points[..., 1] - (y0 + y1) / 2
        rest = rest * (1 - torch.exp(-(x.square() / (2 * sigma_x**2) + y.square() / (2 * sigma_y**2))))
    return 1 - rest


def bounding_box(mask: Tensor, pose: Pose, center: Point) -> tuple[float, float, float, float] | None:
    """(x0, y0, x1, y1) px around the moved mask, as far as it is in the frame; None where it has left."""
    height, width = mask.shape
    rows, cols = mask.nonzero(as_tuple=True)
    inside = moved(torch.stack([cols, rows], dim=-1).float() + 0.5, pose, center)
    inside = inside[(inside >= 0).all(-1) & (inside[:, 0] < width) & (inside[:, 1] < height)]
    if not len(inside):
        return None
    low, high = inside.amin(0) - 0.5, inside.amax(0) + 0.5
    return low[0].item(), low[1].item(), high[0].item(), high[1].item()


def _turned(offsets: Tensor, degrees: float) -> Tensor:
    cos, sin = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    return offsets @ offsets.new_tensor([[cos, sin], [-sin, cos]])
