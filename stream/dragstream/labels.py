"""Drags as files, in the format that the official DragStream demo reads and writes.

`<prefix>_trajectory.json` and masks as 8-bit PNG beside it; prefix `block_<B>_<Drag|Animation>`, B = chunks made
before the drag: "Drag" makes chunk B - 1 again, "Animation" bends chunk B and those after it. Points there are
pixels, counted from 0, which lie at + 0.5 here. Deltas are cumulative, angles clockwise on screen. What the file
holds beyond that is kept and written back. Left out: the preview picture `<prefix>_trajectory.png`.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from data.pictures import read_mask
from stream.dragstream.drag import Drag, Handle, Point, Pose, check_drag

MODE_NAMES = {"Drag": "edit", "Animation": "animate"}
_NAME = re.compile(r"block_(?P<block>\d+)_(?P<mode>Drag|Animation)_trajectory\.json")


@dataclass(frozen=True, eq=False)
class DragLabel:
    """One label: the JSON as it is, and its masks by file name."""

    block: int  # chunks made before the drag
    content: dict[str, Any]
    masks: Mapping[str, np.ndarray] = field(default_factory=dict)  # bool [H, W]

    @property
    def prompt(self) -> str:
        """Of the stream that was labelled; empty where the file does not say."""
        return self.content.get("prompt") or ""

    @property
    def prefix(self) -> str:
        return f"block_{self.block}_{self.content['drag_or_animation_select']}"

    @classmethod
    def read(cls, path: str | Path) -> DragLabel:
        """Raises ValueError, naming the file, for a label that is not one; FileNotFoundError for a missing mask."""
        path = Path(path)
        name = _NAME.fullmatch(path.name)
        if name is None:
            raise ValueError(f"{path}: a label is named block_<number>_<Drag|Animation>_trajectory.json")
        try:
            content = json.loads(path.read_text())
            mode, trajectories = content["drag_or_animation_select"], content["trajectories"]
            files = [content.get("movable_area_mask_file"), *(each.get("mask_file") for each in trajectories)]
            paths = {file: path.parent / Path(file).name for file in files if file is not None}
        except (UnicodeDecodeError, json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{path} is not a DragStream label: {error!r}") from error
        if mode != name["mode"]:
            raise ValueError(
                f"{path}: drag_or_animation_select={mode!r}, but its name says {name['mode']!r}; they must agree"
            )
        return cls(int(name["block"]), content, {file: _read_mask(mask) for file, mask in paths.items()})

    def write(self, folder: str | Path) -> Path:
        """The JSON and its masks; returns the path of the JSON."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        for file, mask in self.masks.items():
            cv2.imwrite(str(folder / Path(file).name), mask.astype(np.uint8) * 255)
        path = folder / f"{self.prefix}_trajectory.json"  # last: a label that is there is whole
        path.write_text(json.dumps(self.content, indent=2))
        return path

    def to_drag(self) -> Drag:
        """The operation; its masks have the size of the frame that was labelled. See `Drag.resize_to`.

        Raises ValueError, naming the trajectory, for an incomplete one, or masks of different sizes.
        """
        trajectories = self.content["trajectories"]
        if not trajectories:
            raise ValueError(f"{self.prefix}: trajectories=[] must have at least one entry")
        sizes = {file: f"{mask.shape[1]} x {mask.shape[0]}" for file, mask in self.masks.items()}
        if len(set(sizes.values())) > 1:
            found = ", ".join(f"{file} {size}" for file, size in sizes.items())
            raise ValueError(f"{self.prefix}: masks must have the size of one frame, not {found}")
        handles = []
        for index, trajectory in enumerate(trajectories):
            if trajectory.get("mask_file") is None:
                raise ValueError(f"{self.prefix}: trajectory {index} has no mask_file; mark the region to drag")
            try:
                handles.append(self._handle(trajectory))
            except (KeyError, IndexError, TypeError, ValueError) as error:
                raise ValueError(f"{self.prefix}: trajectory {index} is incomplete or malformed: {error!r}") from error
        movable = self.content.get("movable_area_mask_file")
        return Drag(
            MODE_NAMES[self.content["drag_or_animation_select"]],
            tuple(handles),
            None if movable is None else self.masks[movable],
            self.block - 1,
        )

    def drag_in(self, height: int, width: int, chunk_frames: int) -> Drag:
        """The operation in a frame of another size, cropped in the middle to its aspect as pictures are.

        Raises ValueError, naming the label, for a drag that does not fit its own frame, or not what is left of it.
        """
        drawn = self.to_drag()
        own_height, own_width = drawn.handles[0].mask.shape
        fitted = drawn.resize_to(height, width)
        crop = f"cropped and scaled from {own_width} x {own_height} to {width} x {height} px, "
        for remark, drag, size in (("", drawn, (own_height, own_width)), (crop, fitted, (height, width))):
            try:
                check_drag(drag, height=size[0], width=size[1], chunk_frames=chunk_frames)
            except ValueError as error:
                raise ValueError(f"{self.prefix}: {remark}{error}") from error
        return fitted

    @classmethod
    def from_drag(cls, drag: Drag, prompt: str, block: int, chunk_frames: int) -> DragLabel:
        """A label of an operation that was checked.

        Raises ValueError for a handle that both turns and moves, or brings a reference.
        """
        mode = {ours: name for name, ours in MODE_NAMES.items()}[drag.mode]
        prefix, masks = f"block_{block}_{mode}", {}
        trajectories = []
        for index, handle in enumerate(drag.handles):
            masks[file := f"{prefix}_traj_{index}_mask.png"] = handle.mask
            trajectories.append(_trajectory(index, handle, chunk_frames) | {"mask_file": file})
        movable = np.ones_like(drag.handles[0].mask) if drag.editable is None else drag.editable
        masks[movable_file := f"{prefix}_movable_mask.png"] = movable
        content = {
            "block_number": max(1, drag.num_frames // chunk_frames),
            "prompt": prompt,
            "drag_or_animation_select": mode,
            "movable_area_mask_file": movable_file,
            "trajectories": trajectories,
        }
        return cls(block, content, masks)

    def _handle(self, trajectory: Mapping[str, Any]) -> Handle:
        mask = self.masks[trajectory["mask_file"]]
        parts = trajectory.get("block_trajectories") or [_recomputed(trajectory["original_trajectory"])]
        deltas = [delta for part in parts for delta in part["deltas"]]
        point = _from_pixel(parts[0]["start_point"])
        if not parts[0]["is_rotation"]:
            return Handle(mask, point, tuple(Pose(float(dx), float(dy)) for dx, dy in deltas), point)
        poses = tuple(Pose(degrees=float(angle)) for angle in deltas)
        return Handle(mask, point, poses, _from_pixel(parts[0]["rotation_center"]))


def _recomputed(original: Mapping[str, Any]) -> dict[str, Any]:
    """Deltas from the drawn points, for labels without block_trajectories."""
    points = original["points"]
    if not original["is_rotation"]:
        (x0, y0), *targets = points
        deltas: list[Any] = [[x - x0, y - y0] for x, y in targets]
        return {"is_rotation": False, "deltas": deltas, "start_point": points[0]}
    (cx, cy), start, *arms = points

    def angle(point: Point) -> float:
        return math.degrees(math.atan2(point[1] - cy, point[0] - cx))

    # each in (-180, 180] from the arm before: a turn goes on beyond half a circle
    turns = list(accumulate(180 - (180 + angle(one) - angle(other)) % 360 for one, other in pairwise((start, *arms))))
    return {"is_rotation": True, "deltas": turns, "start_point": start, "rotation_center": points[0]}


def _trajectory(index: int, handle: Handle, chunk_frames: int) -> dict[str, Any]:
    turns, moves = handle.is_rotation, any(pose.distance_px for pose in handle.poses)
    if turns and moves:
        raise ValueError(f"handle {index} turns and moves at once, which the format cannot say; split it in two")
    if handle.returns:
        raise ValueError(f"handle {index} brings back a reference, which the format cannot say")
    start, center = _to_pixel(handle.point), _to_pixel(handle.center)
    deltas: list[Any] = [pose.degrees if turns else [pose.dx, pose.dy] for pose in handle.poses]
    size = max(1, min(chunk_frames, len(deltas)))
    shared = {"start_point": start} | ({"rotation_center": center} if turns else {})
    blocks = [{"is_rotation": turns, "deltas": deltas[n : n + size]} | shared for n in range(0, len(deltas), size)]
    return {"original_trajectory": None, "block_trajectories": blocks}


def _from_pixel(point: Point) -> Point:
    return point[0] + 0.5, point[1] + 0.5


def _to_pixel(point: Point) -> list[float]:
    return [point[0] - 0.5, point[1] - 0.5]


def _read_mask(path: Path) -> np.ndarray:
    if not path.is_file():
        raise FileNotFoundError(f"{path}: the label names this mask, but it is not there")
    return read_mask(path, str(path))
