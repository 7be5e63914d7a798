"""Tracks that go where a drag goes, for a student that follows tracks.

Beyond the paper, whose student takes none: DragStream moves a region through its latents alone, and a track-conditioned
student that hears nothing of the drag from its tracks keeps what it knows. So the tracks on a handle take the handle's
poses, and a handle without tracks gets one per latent cell.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from models.condition import FRAMES_PER_LATENT
from models.motion.tracks import Tracks
from stream.dragstream.drag import Drag, Handle, Pose
from stream.dragstream.geometry import cell_centers, contains, moved, source_of
from stream.track_buffer import TrackBuffer


@dataclass(frozen=True, eq=False)
class DragTracks:
    """What a drag does to the tracks of the frames to come, as the latest frame shows them."""

    drag: Drag
    poses: Sequence[Sequence[Pose]]  # of the handles in each frame to come, see `pixel_poses`
    on_way: frozenset[int]  # identities of the tracks that are in its way
    on_handles: Sequence[Tracks]  # of each handle, one frame or all; empty where none follow

    @classmethod
    def find(
        cls, buffer: TrackBuffer, drag: Drag, num_frames: int, *, opens_video: bool, grid: tuple[int, int] | None
    ) -> DragTracks:
        """Nothing for a drag that goes nowhere. grid: rows and columns of latent cells; None: no tracks follow."""
        poses = list(pixel_poses(drag, num_frames, opens_video))
        if drag.is_still:
            return cls(drag, poses, frozenset(), [])
        on_handles = [] if grid is None else tracks_on(buffer, drag, grid)
        return cls(drag, poses, tracks_on_way(buffer, drag, poses), on_handles)

    def along(self, paths: Tracks) -> DragTracks:
        """With the whole way of the tracks on handles, where ``paths`` have it; new ones stand still."""
        return replace(self, on_handles=[_along(paths, tracks) for tracks in self.on_handles])

    def steer(self, buffer: TrackBuffer) -> None:
        """Release what is in the way, and lead what is on the handles."""
        buffer.release(self.on_way)
        if self.on_handles:
            buffer.lead(led(self.drag, self.on_handles, self.poses))


def tracks_on(buffer: TrackBuffer, drag: Drag, grid: tuple[int, int]) -> list[Tracks]:
    """The tracks on each handle now, one frame each; new ones where it has none. grid: latent cells, rows and cols."""
    found: list[Tracks] = []
    held: set[int] = set()
    now = buffer.seen()
    for handle in reversed(drag.handles):  # a later one is in front: what lies in two goes with it
        hit = contains(handle.mask, now.points[0, 0]).tolist()
        free = [n for n, identity in enumerate(now.ids[0].tolist()) if hit[n] and identity not in held]
        is_here = free and not handle.returns
        tracks = now.select(torch.tensor(free)) if is_here else _one_per_cell(buffer, handle, grid, held)
        held.update(tracks.ids[0].tolist())
        found.insert(0, tracks)
    return found


def tracks_on_way(buffer: TrackBuffer, drag: Drag, poses: Sequence[Sequence[Pose]]) -> frozenset[int]:
    """Identities of the tracks that lie now where a handle is, or will be in some frame. poses: see `pixel_poses`."""
    now = buffer.seen()
    middles = now.points[0, 0].floor() + 0.5  # of the pixels that they are in
    hit = torch.zeros(now.num_tracks, dtype=torch.bool)
    for index, handle in enumerate(drag.handles):
        here = [] if handle.returns else [Pose()]
        for pose in dict.fromkeys([*here, *(frame[index] for frame in poses)]):
            hit |= contains(handle.mask, source_of(middles, pose, handle.center))
    return frozenset(now.ids[0, hit].tolist())


def led(drag: Drag, tracks: Sequence[Tracks], poses: Sequence[Sequence[Pose]]) -> Tracks:
    """Tracks of each handle, of one frame or of all, taken along by the drag. poses: see `pixel_poses`.

    Those of later handles, which are in front, come first: of two tracks in one cell the first is seen.
    """
    parts = []
    for index, (handle, before) in enumerate(zip(drag.handles, tracks)):
        path = before.points[0].expand(len(poses), -1, -1)
        points = torch.stack([moved(at, frame[index], handle.center) for at, frame in zip(path, poses)])[None]
        size = points.new_tensor([before.width, before.height])
        seen = before.visibility.expand(-1, len(poses), -1) & ((points >= 0) & (points < size)).all(-1)
        parts.append(Tracks(points, seen, before.ids, before.height, before.width))
    front, *behind = reversed(parts)
    return front.beside(*behind)


def pixel_poses(drag: Drag, num_frames: int, opens_video: bool) -> Iterator[list[Pose]]:
    """Poses of the handles in each frame: of the latest chunk where the drag edits, else of the next ones."""
    if drag.mode == "edit":
        for frame in range(num_frames):
            yield drag.edited(frame, num_frames, opens_video)
        return
    for frame in range(num_frames):
        latent, within = divmod(frame, FRAMES_PER_LATENT)
        yield [_between(handle, latent, (within + 1) / FRAMES_PER_LATENT) for handle in drag.handles]


def _between(handle: Handle, latent: int, share: float) -> Pose:
    return (handle.poses[latent - 1] if latent else handle.start).toward(handle.poses[latent], share)


def _along(paths: Tracks, tracks: Tracks) -> Tracks:
    column_of = {identity: n for n, identity in enumerate(paths.ids[0].tolist())}
    columns = [column_of.get(identity) for identity in tracks.ids[0].tolist()]
    return tracks if None in columns else paths.select(torch.tensor(columns))


def _one_per_cell(buffer: TrackBuffer, handle: Handle, grid: tuple[int, int], held: Collection[int]) -> Tracks:
    height, width = handle.mask.shape
    centers = cell_centers(*grid, (height, width)).reshape(-1, 2)
    points = centers[contains(handle.mask, centers)]
    points = points if len(points) else _inside_cells(handle.mask, grid)
    visible = np.ones((1, len(points)), bool)
    return Tracks.from_arrays(points[None], visible, height, width).with_ids(buffer.unused_ids(len(points), held)[None])


def _inside_cells(mask: np.ndarray, grid: tuple[int, int]) -> torch.Tensor:
    """Of a region that holds no cell's middle: its pixel nearest to the mean of those in each cell, [N, 2] px."""
    pixels = np.argwhere(mask)
    cells = pixels * np.array(grid) // np.array(mask.shape)
    points = []
    for cell in np.unique(cells, axis=0):
        own = pixels[(cells == cell).all(1)]
        points.append(own[np.square(own - own.mean(0)).sum(1).argmin(), ::-1] + 0.5)
    return torch.tensor(np.stack(points), dtype=torch.float32)
