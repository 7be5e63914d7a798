"""What a user drags: regions of a frame, how each shall move, and where nothing may change.

The paper's task, REVEL (DragStream section 3, Definition 1): *editing* makes the latest chunk again, *animation*
moves the regions through the next ones. Translation moves a region, deformation is the translation of an
object's edge, 2D rotation turns a region about a centre; 3D rotation is the translation of a part of an object,
which the model completes. Several handles at once; a mask says what may change.

Coordinates are those of `models.motion.tracks`: pixel column i covers x in [i, i + 1), y points down. A pose is
always relative to the frame that the user dragged in, never to the pose before. Left out: files (labels.py), and
how a handle's content is moved (geometry.py).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import cv2
import numpy as np

from models.motion.tracks import centre_crop

if TYPE_CHECKING:
    from stream.dragstream.features import Reference

MODES = ("edit", "animate")
Point = tuple[float, float]  # (x, y) px


@dataclass(frozen=True)
class Pose:
    """A handle's displacement: turned clockwise on screen about its centre, then moved."""

    dx: float = 0.0  # px to the right
    dy: float = 0.0  # px down
    degrees: float = 0.0

    @property
    def distance_px(self) -> float:
        return math.hypot(self.dx, self.dy)

    def minus(self, other: Pose) -> Pose:
        return Pose(self.dx - other.dx, self.dy - other.dy, self.degrees - other.degrees)

    def toward(self, target: Pose, share: float) -> Pose:
        """This pose at share 0, the target at 1, linear between: a rotation moves on its arc, not on the chord."""
        step = target.minus(self)
        return Pose(self.dx + share * step.dx, self.dy + share * step.dy, self.degrees + share * step.degrees)


@dataclass(frozen=True, eq=False)
class Handle:
    """A region and its pose in each dragged latent frame. See `translation` and `rotation`."""

    mask: np.ndarray  # bool [H, W], True inside
    point: Point  # the handle point: what the user holds
    poses: tuple[Pose, ...]  # one per latent frame; one in all where the drag edits
    center: Point  # of rotation
    reference: Reference | None = None  # features kept from an earlier drag; None: those of the current frame

    @classmethod
    def translation(cls, mask: np.ndarray, path: Sequence[Point], reference: Reference | None = None) -> Handle:
        """The region follows a path: path[0] is the handle point, path[i] where it shall be in frame i - 1."""
        start = path[0]
        poses = tuple(Pose(x - start[0], y - start[1]) for x, y in path[1:])
        return cls(mask, start, poses, start, reference)

    @classmethod
    def rotation(
        cls,
        mask: np.ndarray,
        center: Point,
        degrees: Sequence[float],
        point: Point | None = None,
        reference: Reference | None = None,
    ) -> Handle:
        """The region turns about a centre by degrees[i] in frame i, clockwise on screen, counted from the start."""
        poses = tuple(Pose(degrees=angle) for angle in degrees)
        return cls(mask, center if point is None else point, poses, center, reference)

    @property
    def returns(self) -> bool:
        """Whether it brings its look from earlier: what its mask shows now is something else."""
        return self.reference is not None

    @property
    def start(self) -> Pose:
        """Where its way begins: where it is, but what comes back has no way to where it shall be first."""
        return self.poses[0] if self.returns else Pose()

    @property
    def is_rotation(self) -> bool:
        return any(pose.degrees for pose in self.poses)


@dataclass(frozen=True, eq=False)
class Drag:
    """One user operation: all its handles move together."""

    mode: str  # edit: the latest chunk is made again | animate: the next chunks
    handles: tuple[Handle, ...]
    editable: np.ndarray | None = None  # bool [H, W], True where the frame may change; None: everywhere
    chunk: int | None = None  # the chunk in whose last frame the user dragged; None: the latest

    @property
    def num_frames(self) -> int:
        """Dragged latent frames."""
        return len(self.handles[0].poses)

    @property
    def is_still(self) -> bool:
        """Nothing is asked to move or to come back: the stream then is what it would be without the drag."""
        return all(not handle.returns and pose == Pose() for handle in self.handles for pose in handle.poses)

    def edited(self, frame: int, num_frames: int, opens_video: bool) -> list[Pose]:
        """Poses of the handles in one of the frames, pixel or latent, of a chunk that is edited: on the way there.

        The first frame of the video, which is given, stays where it is.
        """
        share = frame / max(1, num_frames - 1) if opens_video else (frame + 1) / num_frames
        return [handle.start.toward(handle.poses[0], share) for handle in self.handles]

    def copied(self) -> Drag:
        """The same with masks of its own: whoever drew them may go on drawing there."""
        handles = tuple(replace(handle, mask=handle.mask.copy()) for handle in self.handles)
        return replace(self, handles=handles, editable=None if self.editable is None else self.editable.copy())

    def resize_to(self, height: int, width: int) -> Drag:
        """The same drag in a frame of another size, cropped in the middle to its aspect as pictures are."""
        top, left, crop_height, crop_width = centre_crop(self.handles[0].mask.shape[:2], (height, width))
        sx, sy = width / crop_width, height / crop_height

        def scaled(mask: np.ndarray) -> np.ndarray:
            crop = mask[top : top + crop_height, left : left + crop_width].astype(np.float32)
            return cv2.resize(crop, (width, height), interpolation=cv2.INTER_AREA) >= 0.5

        def placed(point: Point) -> Point:
            return (point[0] - left) * sx, (point[1] - top) * sy

        handles = tuple(
            replace(
                handle,
                mask=scaled(handle.mask),
                point=placed(handle.point),
                center=placed(handle.center),
                poses=tuple(Pose(pose.dx * sx, pose.dy * sy, pose.degrees) for pose in handle.poses),
            )
            for handle in self.handles
        )
        editable = None if self.editable is None else scaled(self.editable)
        return replace(self, handles=handles, editable=editable)


def check_drag(drag: Drag, *, height: int, width: int, chunk_frames: int) -> None:
    """Raises ValueError that names the handle, the value and the remedy. A handle may leave the frame on its way."""
    if drag.mode not in MODES:
        raise ValueError(f"mode='{drag.mode}' must be {' or '.join(MODES)}")
    if not drag.handles:
        raise ValueError("handles=() must have at least one handle")
    for index, handle in enumerate(drag.handles):
        _check_handle(f"handle {index}", handle, height, width)
    if drag.editable is not None:
        _check_mask("the editable mask", drag.editable, height, width)
    lengths = [len(handle.poses) for handle in drag.handles]
    if len(set(lengths)) > 1:
        raise ValueError(
            f"handles have trajectories of {', '.join(map(str, lengths))} latent frames; give all the same length"
        )
    if drag.mode == "edit" and lengths[0] != 1:
        raise ValueError(f"a drag that edits has one target per handle, not {lengths[0]}; or use mode='animate'")
    if drag.mode == "animate" and (not lengths[0] or lengths[0] % chunk_frames):
        nearest = max(1, round(lengths[0] / chunk_frames)) * chunk_frames
        raise ValueError(
            f"trajectories have {lengths[0]} latent frames; they must fill chunks of {chunk_frames}; nearest "
            f"valid: {nearest}"
        )


def _check_handle(name: str, handle: Handle, height: int, width: int) -> None:
    x, y = handle.point
    numbers = [*handle.point, *handle.center, *(v for p in handle.poses for v in (p.dx, p.dy, p.degrees))]
    if not all(map(math.isfinite, numbers)):
        raise ValueError(f"{name} has coordinates that are not finite: {numbers}")
    _check_mask(f"the mask of {name}", handle.mask, height, width)
    if not handle.returns and not (0 <= x < width and 0 <= y < height):
        raise ValueError(
            f"{name} is at ({x:g}, {y:g}), outside the frame of {width} x {height} px; grab something that is seen "
            "(a target may lie outside)"
        )


def _check_mask(name: str, mask: np.ndarray, height: int, width: int) -> None:
    if mask.dtype != np.bool_ or mask.shape != (height, width):
        raise ValueError(
            f"{name} is {mask.dtype} {mask.shape}; it must be bool ({height}, {width}), the frame's size; use "
            f"Drag.resize_to({height}, {width})"
        )
    if not mask.any():
        raise ValueError(f"{name} is empty; mark at least one pixel")
