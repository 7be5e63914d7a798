"""Streams with drags: one method's way through one scenario, and what is kept of it to be judged.

Beside the methods stands what no method does: the region cut out of the picture and pasted where it should be
(``pasted``). It says how well the figures judge a drag that is perfect by construction.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import cv2
import numpy as np
import torch
from torch import Tensor

from eval.benchmarks.drag_scenarios import DragScenario, moved_to
from eval.metrics.drag import LocatorConfig, RegionLocator
from models.condition import FRAMES_PER_LATENT
from stream.dragstream.drag import Drag, Pose
from stream.dragstream.features import Reference
from stream.dragstream.geometry import cell_centers, moved_mask, sample, source_of
from stream.dragstream.led_tracks import pixel_poses
from stream.session import StreamSession

INPAINT_RADIUS_PX = 3


@dataclass(frozen=True, eq=False)
class DraggedChunks:
    """One drag of one run, and what there is to judge it by."""

    drag: Drag
    before: np.ndarray  # uint8 [H, W, 3]: the frame that shows the region as it should look: the one dragged in
    before_latent: Tensor  # [C, h, w]
    frames: np.ndarray  # uint8 [T, H, W, 3]
    latents: Tensor  # [C, F, h, w]
    first_frame: int  # of ``frames`` in the video
    seconds: list[float]  # per chunk; the first with what starting the drag took

    @property
    def poses(self) -> list[tuple[int, list[Pose]]]:
        """(frame, pose of each handle) for every judged frame: the last of each dragged latent frame."""
        count = len(self.drag.handles[0].poses)
        at = [len(self.frames) - 1 - FRAMES_PER_LATENT * n for n in reversed(range(count))]
        return [(frame, [handle.poses[n] for handle in self.drag.handles]) for n, frame in enumerate(at)]


@dataclass(frozen=True, eq=False)
class Run:
    """One method on one scenario."""

    frames: np.ndarray  # uint8 [T, H, W, 3], from the chunk before the first drag on
    drags: list[DraggedChunks]
    plain_seconds: list[float]  # of chunks without a drag


def pasted(run: Run, encode: Callable[[np.ndarray], Tensor]) -> Run:
    """A run without a drag, with each handle's pixels moved exactly as asked and its old place painted over.

    Args:
        encode: uint8 [1 + 4k, H, W, 3] -> normalised latents [C, 1 + k, h, w].
    """
    drags = []
    for dragged in run.drags:
        opens_video = len(dragged.frames) % FRAMES_PER_LATENT == 1
        frames = _with_handles_pasted(dragged, opens_video)
        latents = encode(frames if opens_video else np.concatenate([dragged.before[None], frames]))
        latents = latents[:, -dragged.latents.shape[1] :]
        drags.append(replace(dragged, frames=frames, latents=latents, seconds=[]))
    return replace(run, drags=drags)


def _with_handles_pasted(dragged: DraggedChunks, opens_video: bool) -> np.ndarray:
    height, width = size = (dragged.before.shape[0], dragged.before.shape[1])
    content = torch.from_numpy(dragged.before).permute(2, 0, 1).float()
    handles, centers = dragged.drag.handles, cell_centers(height, width, size)
    hole = np.any([handle.mask for handle in handles], axis=0).astype(np.uint8)
    hole = cv2.dilate(hole, np.ones((3, 3), np.uint8))  # its blended border too
    frames = []
    for frame, poses in zip(dragged.frames, pixel_poses(dragged.drag, len(dragged.frames), opens_video)):
        picture = torch.from_numpy(cv2.inpaint(frame, hole, INPAINT_RADIUS_PX, cv2.INPAINT_TELEA)).float()
        for handle, pose in zip(handles, poses):
            share = moved_mask(torch.from_numpy(handle.mask), pose, handle.center, height, width)[..., None]
            moved = sample(content, source_of(centers, pose, handle.center), size)
            picture = torch.lerp(picture, moved, share)
        frames.append(picture.round().to(torch.uint8).numpy())
    return np.stack(frames)


class Replay:
    """One method's way through one scenario, from the state before its first drag."""

    def __init__(
        self, session: StreamSession, scenario: DragScenario, locator: LocatorConfig, last: np.ndarray, latents: Tensor
    ) -> None:
        self.session, self.scenario, self.locator = session, scenario, locator
        self.chunks, self.latents = [last], [latents[0].float().cpu()]  # the latest replaced by an edit
        self.start = session.num_frames - len(last)
        self.plain: list[float] = []
        self.dragged: list[DraggedChunks] = []
        self.references: list[tuple[Reference, ...]] = []
        self.origin: tuple[np.ndarray, Drag] | None = None  # frame and drag that a "follows" event starts from

    def run(self) -> Run:
        for event in self.scenario.events:
            while self.session.chunk_index < event.after_chunks:
                self._next()
            drag = self._placed(event.drag) if event.follows else event.drag
            look = (self.chunks[-1][-1], self.latents[-1][:, -1])
            if event.brings_back is not None:
                earlier, stored = self.dragged[event.brings_back], self.references[event.brings_back]
                handles = tuple(replace(handle, reference=each) for handle, each in zip(drag.handles, stored))
                drag, look = replace(drag, handles=handles), (earlier.before, earlier.before_latent)
            self.origin = self.origin or (self.chunks[-1][-1], drag)
            self._drag(drag, *look)
        while self.session.chunk_index < self.scenario.num_chunks:
            self._next()
        frames = np.concatenate(self.chunks)
        self._next()  # timed alone: many scenarios have no chunk without a drag
        return Run(frames, self.dragged, self.plain)

    def _placed(self, drag: Drag) -> Drag:
        """The drag where its objects are now, as a user would grab them."""
        assert self.origin is not None, "the first event of a scenario does not follow"
        frame, first = self.origin
        now = self.chunks[-1][-1]
        return moved_to(drag, [RegionLocator(frame, h.mask, self.locator).locate(now).pose for h in first.handles])

    def _drag(self, drag: Drag, before: np.ndarray, before_latent: Tensor) -> None:
        session, clock = self.session, self.session.codecs.clock
        first_frame = session.num_frames - self.start
        started = clock()
        outcome = session.drag(drag)
        drag_seconds = clock() - started  # its references read; an edit's chunk made again
        if outcome.frames is not None:
            self.chunks[-1], self.latents[-1] = outcome.frames, self._latents()
            first_frame -= len(outcome.frames)
            frames, latents, seconds = outcome.frames, self.latents[-1], [drag_seconds]
        else:
            count = drag.num_frames // session.codecs.model_cfg.rollout.chunk_frames
            seconds = [self._next(is_plain=False) for _ in range(count)]
            seconds[0] += drag_seconds
            frames, latents = np.concatenate(self.chunks[-count:]), torch.cat(self.latents[-count:], dim=1)
        self.references.append(outcome.references)
        self.dragged.append(DraggedChunks(drag, before, before_latent, frames, latents, first_frame, seconds))

    def _next(self, is_plain: bool = True) -> float:
        self.chunks.append(self.session.next_chunk())
        self.latents.append(self._latents())
        seconds = self.session.timing.total_seconds
        if is_plain:
            self.plain.append(seconds)
        return seconds

    def _latents(self) -> Tensor:
        return self.session.latents[0].float().cpu()
