"""Tracks that go where a drag goes, for a student that follows tracks.

Beyond the paper, whose student takes none: DragStream moves a region through its latents alone, and a track-conditioned
student that hears nothing of the drag from its tracks keeps what it knows. So the tracks on a handle take the handle's
poses, and a handle without tracks gets one per latent cell.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence

import numpy as np
import torch

from models.condition import FRAMES_PER_LATENT
from models.motion.tracks import Tracks
from stream.dragstream.drag import Drag, Handle, Pose
from stream.dragstream.geometry import cell_centers, moved
from stream.track_buffer import TrackBuffer


def tracks_on(buffer: TrackBuffer, drag: Drag, grid: tuple[int, int]) -> list[Tracks]:
    """The tracks on each handle now, one frame each; new ones where it has none. grid: latent cells, rows and cols."""
    found: list[Tracks] = []
    held: set[int] = set()
    for handle in reversed(drag.handles):  # a later one is in front: what lies in two goes with it
        seen = Tracks.empty(1, 1, *handle.mask.shape) if handle.returns else buffer.seen_in(handle.mask)
        free = [n for n, identity in enumerate(seen.ids[0].tolist()) if identity not in held]
        tracks = seen.select(torch.tensor(free)) if free else _one_per_cell(buffer, handle, grid, held)
        held.update(tracks.ids[0].tolist())
        found.insert(0, tracks)
    return found


def led(drag: Drag, tracks: Sequence[Tracks], num_frames: int, opens_video: bool) -> Tracks:
    """Tracks of each handle, of one frame or of all, taken along by the drag through the frames that it concerns.

    Those of later handles, which are in front, come first: of two tracks in one cell the first is seen.
    """
    parts = []
    for index, (handle, before) in enumerate(zip(drag.handles, tracks)):
        poses = [poses[index] for poses in pixel_poses(drag, num_frames, opens_video)]
        path = before.points[0].expand(num_frames, -1, -1)
        points = torch.stack([moved(at, pose, handle.center) for at, pose in zip(path, poses)])[None]
        size = points.new_tensor([before.width, before.height])
        seen = before.visibility.expand(-1, num_frames, -1) & ((points >= 0) & (points < size)).all(-1)
        parts.append(Tracks(points, seen, before.ids, before.height, before.width))
    front, *behind = reversed(parts)
    return front.beside(*behind)


def along(paths: Tracks, tracks: Tracks) -> Tracks:
    """The whole way of tracks of which one frame is known, where ``paths`` have it; new ones stand still."""
    column_of = {identity: n for n, identity in enumerate(paths.ids[0].tolist())}
    columns = [column_of.get(identity) for identity in tracks.ids[0].tolist()]
    return tracks if None in columns else paths.select(torch.tensor(columns))


def pixel_poses(drag: Drag, num_frames: int, opens_video: bool) -> Iterator[list[Pose]]:
    """Poses of the handles in each frame: of the latest chunk where the drag edits, else of the next ones.

    An edit of the video's first chunk leaves its first frame, which is given, where it is.
    """
    if drag.mode == "edit":
        for frame in range(num_frames):
            share = frame / max(1, num_frames - 1) if opens_video else (frame + 1) / num_frames
            yield [handle.start.toward(handle.poses[0], share) for handle in drag.handles]
        return
    for frame in range(num_frames):
        latent, within = divmod(frame, FRAMES_PER_LATENT)
        yield [_between(handle, latent, (within + 1) / FRAMES_PER_LATENT) for handle in drag.handles]


def _between(handle: Handle, latent: int, share: float) -> Pose:
    return (handle.poses[latent - 1] if latent else handle.start).toward(handle.poses[latent], share)


def _one_per_cell(buffer: TrackBuffer, handle: Handle, grid: tuple[int, int], held: Collection[int]) -> Tracks:
    height, width = handle.mask.shape
    centers = cell_centers(*grid, (height, width)).reshape(-1, 2)
    x, y = centers.long().unbind(-1)
    points = centers[torch.from_numpy(handle.mask)[y, x]]
    points = points if len(points) else torch.tensor([handle.point])
    visible = np.ones((1, len(points)), bool)
    return Tracks.from_arrays(points[None], visible, height, width).with_ids(buffer.unused_ids(len(points), held)[None])
