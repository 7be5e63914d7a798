"""The tracks a stream still has to follow: filled from outside at any time, read once per chunk.

Identities stay constant over a stream (MotionStream eq. 1 gives each track a random identity once). Tracks
whose ids are all 0 are "not yet drawn": column n then always gets the n-th identity of this stream. Tracks
with ids of their own keep them, so a caller may add and remove points. An identity missing from a later push
is released. Memory does not grow with the stream: frames already read are forgotten, except the last.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

import numpy as np
import torch

from models.motion.tracks import NUM_TRACK_IDS, Tracks, sample_track_ids

ENDINGS = ("hold", "release")


@dataclass(frozen=True)
class TrackBufferState:
    """What `snapshot` keeps; immutable."""

    held: Tracks | None
    num_read: int
    released: frozenset[int]


class TrackBuffer:
    """Tracks of one stream, in pixels of height x width.

    Args:
        height, width: px; pushed tracks must have this resolution.
        ending: beyond the last pushed frame, "hold" repeats it and "release" leaves motion unspecified.
        rng: draws the identities.
    """

    def __init__(self, height: int, width: int, *, ending: str, rng: torch.Generator) -> None:
        if ending not in ENDINGS:
            raise ValueError(f"ending='{ending}' must be one of {', '.join(ENDINGS)}")
        self.height, self.width, self.ending = height, width, ending
        self._identities = sample_track_ids(1, NUM_TRACK_IDS, rng)[0]
        self._held: Tracks | None = None
        self._num_read = 0  # frames at the head of `_held` that were read already: 0 or 1
        self._released: frozenset[int] = frozenset()  # identities that are not followed any more

    @property
    def num_pending(self) -> int:
        """Pushed frames that were not read yet."""
        return 0 if self._held is None else self._held.num_frames - self._num_read

    def push(self, tracks: Tracks) -> None:
        """Append the motion of the next frames; tracks hold one clip (B = 1).

        Raises:
            ValueError: another resolution or batch size, or an identity given twice.
        """
        if (tracks.height, tracks.width) != (self.height, self.width):
            raise ValueError(
                f"tracks at {tracks.height}x{tracks.width} px must be at {self.height}x{self.width}, the "
                f"model's clip size; use tracks.resize_to({self.height}, {self.width})"
            )
        if tracks.batch_size != 1:
            raise ValueError(f"tracks hold {tracks.batch_size} clips; a stream takes 1")
        tracks = self._identified(tracks.to("cpu"))
        self._held = tracks if self._held is None else _append(self._held, tracks)

    def ids_in(self, mask: np.ndarray) -> frozenset[int]:
        """Identities that are visible inside a mask, bool [H, W], in the latest frame read."""
        if self._held is None or not self._num_read:
            return frozenset()
        x, y = self._held.points[0, 0].floor().long().unbind(-1)
        inside = self._held.visibility[0, 0] & (x >= 0) & (x < self.width) & (y >= 0) & (y < self.height)
        hit = torch.from_numpy(mask)[y.clamp(0, self.height - 1), x.clamp(0, self.width - 1)]
        return frozenset(self._held.ids[0, inside & hit].tolist())

    def release(self, ids: Iterable[int]) -> None:
        """From the next frame on these identities are unspecified, whatever is pushed."""
        self._released |= frozenset(ids)

    def take(self, count: int) -> Tracks:
        """The motion of the next `count` frames, filled up as `ending` says."""
        if self._held is None:
            return Tracks.empty(1, count, self.height, self.width)
        taken = self._held.frames(slice(self._num_read, self._num_read + count))
        if taken.num_frames < count:
            taken = _append(taken, self._beyond_the_end(self._held, count - taken.num_frames))
        rest = self._held.frames(slice(self._num_read + count, None))
        self._held, self._num_read = _without_unseen(_append(taken.frames(slice(-1, None)), rest)), 1
        return self._without_released(taken)

    def snapshot(self) -> TrackBufferState:
        return TrackBufferState(self._held, self._num_read, self._released)

    def restore(self, state: TrackBufferState) -> None:
        self._held, self._num_read, self._released = state.held, state.num_read, state.released

    def _without_released(self, tracks: Tracks) -> Tracks:
        if not self._released:
            return tracks
        kept = [n for n, identity in enumerate(tracks.ids[0].tolist()) if identity not in self._released]
        return tracks.select(torch.tensor(kept, dtype=torch.long))

    def _identified(self, tracks: Tracks) -> Tracks:
        if not tracks.ids.any():
            return tracks.with_ids(self._identities[None, : tracks.num_tracks])
        if len(tracks.ids.unique()) < tracks.num_tracks:
            raise ValueError(
                "tracks.ids has an identity twice; give each track its own, or all 0 to have them drawn"
            )
        return tracks

    def _beyond_the_end(self, held: Tracks, count: int) -> Tracks:
        last = held.frames(slice(-1, None))
        points, visibility = last.points.expand(-1, count, -1, -1), last.visibility.expand(-1, count, -1)
        shown = visibility if self.ending == "hold" else torch.zeros_like(visibility)
        return replace(last, points=points, visibility=shown)


def _append(earlier: Tracks, later: Tracks) -> Tracks:
    """Join in time over the union of identities; where one is missing it is invisible.

    The later push decides the order of columns, because order decides which of two tracks in one cell is
    seen.
    """
    kept = [
        n for n, identity in enumerate(earlier.ids[0].tolist()) if identity not in set(later.ids[0].tolist())
    ]
    ids = torch.cat([later.ids[0], earlier.ids[0, kept]])
    parts = [_spread(part, ids) for part in (earlier, later)]
    return replace(
        later,
        points=torch.cat([part.points for part in parts], dim=1),
        visibility=torch.cat([part.visibility for part in parts], dim=1),
        ids=ids[None],
    )


def _spread(tracks: Tracks, ids: torch.Tensor) -> Tracks:
    """The same tracks as columns `ids`; absent ones are invisible at (0, 0)."""
    column_of = {identity: n for n, identity in enumerate(tracks.ids[0].tolist())}
    columns = torch.tensor(
        [column_of.get(identity, tracks.num_tracks) for identity in ids.tolist()], dtype=torch.long
    )
    return replace(Tracks.pad(tracks, tracks.num_tracks + 1).select(columns), ids=ids[None])


def _without_unseen(tracks: Tracks) -> Tracks:
    """Drop columns visible in no frame: in a stream that adds and removes points they would pile up."""
    return tracks.select(tracks.visibility[0].any(dim=0).nonzero()[:, 0])
