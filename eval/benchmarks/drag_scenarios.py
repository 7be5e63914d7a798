"""What the drag benchmark asks for: annotated drags of the sprites world, made from a seed, or labels from a folder.

Like REVEL (DragStream appendix C): editing and animation, translation, deformation and rotation, one handle or
several; some with an object in the way, some that leave the frame and come back, some on streams of 20 seconds.
204 by default: 12 combinations, 17 each. Everything stands still in the first chunks (a grid of tracks holds it), so
that the object is where the first frame shows it when the user takes hold of it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import cv2
import numpy as np
import torch

from data.sprites import SpritesClip, SpritesConfig, render_clip, split_seed
from models.condition import FRAMES_PER_LATENT, ClipGeometry, num_pixel_frames
from stream.dragstream.drag import Drag, Handle, Point, Pose
from stream.dragstream.geometry import bounding_box, moved, moved_mask, swept_region
from stream.dragstream.labels import DragLabel
from stream.track_source import load_first_frame

KINDS = ("translation", "deformation", "rotation")
COMBINATIONS = [(mode, kind, count) for mode in ("edit", "animate") for kind in KINDS for count in (1, 2)]
VARIANTS = ("plain",) * 11 + ("occlusion",) * 3 + ("leaving",) * 2 + ("long",)
LONG_SECONDS, LONG_EVERY_CHUNKS = 20, 4
EDITABLE_MARGIN_PX = 8  # around the way of a drag
FIRST_INDEX = 10_000  # of the test split: no clip that another benchmark shows
MIN_MASK_PX, TRIES = 80, 400
DRAGGED_CHUNKS = 2  # of an animation


@dataclass(frozen=True, eq=False)
class DragEvent:
    """One drag of a scenario."""

    after_chunks: int  # made when the user drags
    drag: Drag
    brings_back: int | None = None  # the event whose stored features it uses
    follows: bool = False  # its handles are where the object is found to be at that time


@dataclass(frozen=True, eq=False)
class DragScenario:
    """One stream with its drags."""

    key: str
    mode: str
    kind: str
    num_handles: int
    variant: str
    first_frame: np.ndarray  # uint8 [H, W, 3]
    prompt: str
    events: tuple[DragEvent, ...]
    num_chunks: int
    sample_id: int

    def num_frames(self, chunk_frames: int) -> int:
        """Pixel frames from the chunk before the first drag on."""
        chunks_before = self.events[0].after_chunks - 1
        before = num_pixel_frames(chunks_before * chunk_frames) if chunks_before else 0
        return num_pixel_frames(self.num_chunks * chunk_frames) - before


def sprites_scenarios(
    world: SpritesConfig, geometry: ClipGeometry, *, chunk_frames: int, count: int, seed: int, opening_chunks: int = 1
) -> list[DragScenario]:
    """The first ``count`` scenarios of a seed; the same arguments give the same ones.

    The first chunk that a drag concerns comes after ``opening_chunks``: an edit makes the latest one again.
    """
    world = replace(world, height=geometry.height, width=geometry.width, num_frames=1, fps=geometry.fps, events=False)
    return [_scenario(world, index, chunk_frames, seed, opening_chunks) for index in range(count)]


def _scenario(world: SpritesConfig, index: int, chunk_frames: int, seed: int, opening_chunks: int) -> DragScenario:
    mode, kind, handles = COMBINATIONS[index % len(COMBINATIONS)]
    variant = VARIANTS[index // len(COMBINATIONS) % len(VARIANTS)]
    if mode == "edit" and variant == "long":
        variant = "plain"
    if variant == "leaving":
        kind, handles = "translation", 1
    rng = np.random.default_rng([seed, index])
    sprites = 2 if handles == 2 or variant == "occlusion" else 1
    scene = _still_scene(replace(world, min_sprites=sprites, max_sprites=sprites), rng)
    chunks = opening_chunks + (mode == "edit")
    events = tuple(_events(scene, mode, kind, handles, variant, chunks, chunk_frames, rng))
    last = max(event.after_chunks + _chunks_of(event.drag, chunk_frames) for event in events)
    return DragScenario(
        f"{index:03d}_{mode}_{kind}_{handles}_{variant}", mode, kind, handles, variant, scene.frames[0],
        scene.caption, events, max(last, chunks), FIRST_INDEX + index,
    )  # fmt: skip


def _chunks_of(drag: Drag, chunk_frames: int) -> int:
    return 0 if drag.mode == "edit" else drag.num_frames // chunk_frames


def _still_scene(world: SpritesConfig, rng: np.random.Generator) -> SpritesClip:
    """A first frame that shows every sprite whole."""
    for _ in range(TRIES):
        clip = render_clip(world, split_seed("test", FIRST_INDEX + int(rng.integers(1 << 20))))
        masks = clip.masks[:, 0]
        border = np.ones(masks.shape[1:], bool)
        border[2:-2, 2:-2] = False
        if len(masks) == world.min_sprites and not (masks & border).any() and masks.sum((1, 2)).min() >= MIN_MASK_PX:
            return clip
    raise ValueError(f"no scene shows {world.min_sprites} whole sprites in {TRIES} tries; make them smaller")


def _events(
    scene: SpritesClip, mode: str, kind: str, handles: int, variant: str, chunks: int, chunk_frames: int,
    rng: np.random.Generator,
) -> Iterator[DragEvent]:  # fmt: skip
    masks = [scene.masks[k, 0] for k in range(handles)]
    frames = 1 if mode == "edit" else DRAGGED_CHUNKS * chunk_frames
    if variant == "leaving":
        yield from _leave_and_return(masks[0], mode, chunks, frames, rng)
    elif variant == "long":
        total = math.ceil(LONG_SECONDS * scene.scene.cfg.fps / (FRAMES_PER_LATENT * chunk_frames))
        handled = [_handle(mask, kind, mode, frames, rng) for mask in masks]
        for number, after in enumerate(range(chunks, total - DRAGGED_CHUNKS, LONG_EVERY_CHUNKS)):
            sign = 1 if number % 2 == 0 else -1  # there and back
            there = [replace(h, poses=tuple(Pose().toward(pose, sign) for pose in h.poses)) for h in handled]
            yield DragEvent(after, _with_editable(Drag("animate", tuple(there))), follows=number > 0)
    elif variant == "occlusion":
        over = _toward(masks[0], scene.masks[1, 0], frames)
        others = tuple(_handle(mask, kind, mode, frames, rng) for mask in masks[1:])
        yield DragEvent(chunks, _with_editable(Drag(mode, (over, *others))))
    else:
        drag = Drag(mode, tuple(_handle(mask, kind, mode, frames, rng) for mask in masks))
        yield DragEvent(chunks, _with_editable(drag))


def _handle(mask: np.ndarray, kind: str, mode: str, frames: int, rng: np.random.Generator) -> Handle:
    center, height = _centroid(mask), mask.shape[0]
    if kind == "rotation":
        limits = (20.0, 45.0) if mode == "edit" else (40.0, 90.0)
        degrees = rng.uniform(*limits) * rng.choice([-1, 1])
        arm = _centroid(_edge(mask, rng.uniform(0, 2 * np.pi)))  # where the user pulls: the middle would not move
        return Handle(mask, arm, _ramp(Pose(degrees=float(degrees)), frames), center)
    limits = (0.08, 0.19) if mode == "edit" else (0.16, 0.31)  # of the height
    region, target = mask, Pose()
    for _ in range(TRIES):
        distance, angle = height * rng.uniform(*limits), rng.uniform(0, 2 * np.pi)
        if kind == "deformation":
            distance *= 0.5
            region = _edge(mask, angle)
        target = Pose(float(distance * np.cos(angle)), float(distance * np.sin(angle)))
        if region.sum() >= MIN_MASK_PX // 4 and _stays(region, target):
            break
    return Handle(region, _centroid(region), _ramp(target, frames), center)


def _leave_and_return(
    mask: np.ndarray, mode: str, chunks: int, frames: int, rng: np.random.Generator
) -> Iterator[DragEvent]:
    """Out over the nearest border; an animation brings it back from there with the features it had."""
    height, width = mask.shape
    x, y = center = _centroid(mask)
    ways = {(-1, 0): x, (1, 0): width - x, (0, -1): y, (0, 1): height - y}
    (dx, dy), distance = min(ways.items(), key=lambda item: item[1])
    if mode == "edit":  # half of it
        half_out = Handle(mask, center, (Pose(dx * distance, dy * distance),), center)
        yield DragEvent(chunks, _with_editable(Drag(mode, (half_out,))))
        return
    extent = 0.5 * max(np.ptp(np.nonzero(mask)[0]), np.ptp(np.nonzero(mask)[1])) + 4
    away = Pose(dx * (distance + extent), dy * (distance + extent))
    leaving = Handle(mask, center, _ramp(away, frames), center)
    yield DragEvent(chunks, _with_editable(Drag(mode, (leaving,))))
    home = Pose(float(rng.uniform(-4, 4)), float(rng.uniform(-4, 4)))
    poses = tuple(away.toward(home, (n + 1) / frames) for n in range(frames))
    back = Drag(mode, (Handle(mask, center, poses, center),))
    yield DragEvent(chunks + DRAGGED_CHUNKS, _with_editable(back), brings_back=0)


def _toward(mask: np.ndarray, other: np.ndarray, frames: int) -> Handle:
    """The handle on its way onto another object."""
    (x0, y0), (x1, y1) = start, _ = _centroid(mask), _centroid(other)
    reach = min(1.0, 0.35 * mask.shape[0] / max(1e-6, math.hypot(x1 - x0, y1 - y0)))
    return Handle(mask, start, _ramp(Pose(reach * (x1 - x0), reach * (y1 - y0)), frames), start)


def _ramp(target: Pose, frames: int) -> tuple[Pose, ...]:
    return tuple(Pose().toward(target, (n + 1) / frames) for n in range(frames))


def _edge(mask: np.ndarray, angle: float) -> np.ndarray:
    """The third of a region that lies furthest in a direction."""
    rows, cols = np.nonzero(mask)
    along = cols * np.cos(angle) + rows * np.sin(angle)
    far = along >= np.quantile(along, 2 / 3)
    edge = np.zeros_like(mask)
    edge[rows[far], cols[far]] = True
    return edge


def _stays(mask: np.ndarray, pose: Pose) -> bool:
    """Whether the moved region lies in the frame as a whole."""
    rows, cols = np.nonzero(mask)
    x, y = cols + 0.5 + pose.dx, rows + 0.5 + pose.dy
    return bool(x.min() >= 0 and y.min() >= 0 and x.max() < mask.shape[1] and y.max() < mask.shape[0])


def _centroid(mask: np.ndarray) -> Point:
    rows, cols = np.nonzero(mask)
    return float(cols.mean() + 0.5), float(rows.mean() + 0.5)


def _with_editable(drag: Drag) -> Drag:
    size = 2 * EDITABLE_MARGIN_PX + 1
    swept = swept_region(drag).astype(np.uint8)
    editable = cv2.dilate(swept, cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (size, size))) > 0
    return replace(drag, editable=editable)


def moved_to(drag: Drag, poses: Sequence[Pose]) -> Drag:
    """The same drag with each handle where its object is now: at a pose about the middle of its mask's box."""
    handles = []
    for handle, pose in zip(drag.handles, poses):
        mask = torch.from_numpy(handle.mask)
        box = bounding_box(mask, Pose(), handle.center)
        assert box is not None, "a handle in the frame has a box"
        middle = ((box[0] + box[2]) / 2, (box[1] + box[3]) / 2)
        there = (moved_mask(mask, pose, middle, *handle.mask.shape) >= 0.5).numpy()
        if there.sum() < MIN_MASK_PX // 4:  # it is gone: grab where it was
            there, pose = handle.mask, Pose()
        x, y = moved(torch.tensor(handle.point), pose, middle).tolist()
        point = min(max(x, 0.0), there.shape[1] - 1.0), min(max(y, 0.0), there.shape[0] - 1.0)
        handles.append(replace(handle, mask=there, point=point, center=_centroid(there)))
    return _with_editable(replace(drag, handles=tuple(handles)))


def labelled_scenarios(folder: Path, geometry: ClipGeometry, chunk_frames: int) -> list[DragScenario]:
    """One scenario per official label under a folder; beside each lies its first frame, as a picture or a video.

    Raises:
        ValueError: no label there, one that does not fit the model's frame or chunks, or no first frame beside one.
    """
    scenarios = []
    for index, path in enumerate(sorted(folder.rglob("*_trajectory.json"))):
        label = DragLabel.read(path)
        try:
            drag = replace(label.drag_in(geometry.height, geometry.width, chunk_frames), chunk=None)
        except ValueError as error:
            raise ValueError(f"{path.parent}: {error}") from error
        event = DragEvent(max(1, label.block), drag)
        kind = "rotation" if any(handle.is_rotation for handle in drag.handles) else "translation"
        scenarios.append(
            DragScenario(
                f"{index:03d}_{path.parent.name}_{label.prefix}", drag.mode, kind, len(drag.handles), "label",
                load_first_frame(str(_first_frame_of(path.parent)), geometry), label.prompt, (event,),
                event.after_chunks + _chunks_of(drag, chunk_frames), index,
            )
        )  # fmt: skip
    if not scenarios:
        raise ValueError(f"bench.labels={folder} has no *_trajectory.json; set a folder of DragStream labels, or null")
    return scenarios


def _first_frame_of(folder: Path) -> Path:
    for pattern in ("first.*", "image.*", "before.mp4", "*.mp4"):
        for path in sorted(folder.glob(pattern)):
            return path
    raise ValueError(f"{folder} has a label but no first frame; put first.png or the video it was drawn on beside it")
