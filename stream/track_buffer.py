"""The tracks a stream still has to follow: filled from outside at any time, read once per chunk.

Identities stay constant over a stream (MotionStream eq. 1 gives each track a random identity once). Tracks
whose ids are all 0 are "not yet drawn": column n then always gets the n-th identity of this stream. Tracks
with ids of their own keep them, so a caller may add and remove points. An identity missing from a later push
is released. A drag may lead tracks elsewhere, whatever is pushed for them. Memory does not grow with the
stream: frames already read are forgotten, except the last.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterable
from dataclasses import dataclass, replace

import numpy as np
import torch

from models.motion.tracks import NUM_TRACK_IDS, Tracks, sample_track_ids

log = logging.getLogger(__name__)

ENDINGS = ("hold", "release")


@dataclass(frozen=True)
class _Queue:
    """Frames of motion in a row, of which the first may have been read already; immutable."""

    held: Tracks | None = None
    num_read: int = 0  # frames at the head of `held` that were read: 0 or 1
    seen: frozenset[int] = frozenset()  # identities of all that was ever appended

    @property
    def num_pending(self) -> int:
        return 0 if self.held is None else self.held.num_frames - self.num_read

    @property
    def latest(self) -> Tracks | None:
        """The latest frame read."""
        return None if self.held is None or not self.num_read else self.held.frames(slice(0, 1))

    def appended(self, tracks: Tracks) -> _Queue:
        held = tracks if self.held is None else _append(self.held, tracks)
        return _Queue(held, self.num_read, self.seen.union(_ids_of(tracks)))

    def without(self, ids: frozenset[int]) -> _Queue:
        return self if self.held is None else replace(self, held=_without(self.held, ids))

    def taken(self, count: int, ending: str) -> tuple[Tracks | None, _Queue]:
        """The next `count` frames, filled up as `ending` says, and what is left."""
        if self.held is None:
            return None, self
        taken = _filled(self.held.frames(slice(self.num_read, self.num_read + count)), self.held, count, ending)
        rest = self.held.frames(slice(self.num_read + count, None))
        return taken, replace(self, held=_without_unseen(_append(taken.frames(slice(-1, None)), rest)), num_read=1)


@dataclass(frozen=True)
class TrackBufferState:
    """What `snapshot` keeps; immutable."""

    pushed: _Queue
    led: _Queue
    released: frozenset[int]
    had: frozenset[int]


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
        self._pushed = _Queue()
        self._led = _Queue()  # identities that a drag leads
        self._released: frozenset[int] = frozenset()  # pushed identities whose motion is not followed any more
        self._had: frozenset[int] = frozenset()  # identities that drags gave to tracks of their own, now or earlier

    @property
    def num_pending(self) -> int:
        """Pushed frames that were not read yet."""
        return self._pushed.num_pending

    def push(self, tracks: Tracks) -> None:
        """Append the motion of the next frames; tracks hold one clip (B = 1).

        Raises:
            ValueError: another resolution or batch size, no frame, an identity given twice, or more tracks than
                there are identities.
        """
        if (tracks.height, tracks.width) != (self.height, self.width):
            raise ValueError(
                f"tracks at {tracks.height}x{tracks.width} px must be at {self.height}x{self.width}, the "
                f"model's clip size; use tracks.resize_to({self.height}, {self.width})"
            )
        if tracks.batch_size != 1:
            raise ValueError(f"tracks hold {tracks.batch_size} clips; a stream takes 1")
        if not tracks.num_frames:
            raise ValueError("tracks hold 0 frames; push at least one")
        if tracks.num_tracks > NUM_TRACK_IDS:
            raise ValueError(f"tracks hold {tracks.num_tracks} tracks; a stream follows at most {NUM_TRACK_IDS}")
        tracks = self._identified(tracks.to("cpu"))
        if tracks.num_tracks and self._with_drags.issuperset(_ids_of(tracks)):
            log.warning("none of the %d pushed tracks is followed: drags have their identities", tracks.num_tracks)
        self._pushed = self._pushed.appended(tracks)

    def drop_pending(self) -> None:
        """Forget pushed frames that were not read yet; what was read last goes on as `ending` says."""
        latest = self._pushed.latest
        self._pushed = replace(self._pushed, held=latest, num_read=0 if latest is None else 1)

    def seen_in(self, mask: np.ndarray) -> Tracks:
        """Tracks that are visible inside a mask, bool [H, W], in the latest frame read: that one frame of them."""
        now = _joined(self._pushed.without(self._with_drags).latest, self._led.latest)
        if now is None:
            return Tracks.empty(1, 1, self.height, self.width)
        x, y = now.points[0, 0].floor().long().unbind(-1)
        hit = torch.from_numpy(mask)[y.clamp(0, self.height - 1), x.clamp(0, self.width - 1)]
        return now.select((now.seen[0, 0] & hit).nonzero()[:, 0])

    def unused_ids(self, count: int, besides: Collection[int] = ()) -> torch.Tensor:  # -> [count]
        """Identities that no track of this stream has now, nor ``besides``; those that none ever had come first.

        Raises ValueError where so many are not left.
        """
        held = {identity for queue in (self._pushed, self._led) for identity in _ids_of(queue.held)} | set(besides)
        free = [identity for identity in reversed(self._identities.tolist()) if identity not in held]
        if len(free) < count:
            raise ValueError(f"{count} new tracks need identities, and {len(free)} of {NUM_TRACK_IDS} are left")
        seen = self._pushed.seen | self._had
        return torch.tensor(sorted(free, key=lambda identity: identity in seen)[:count], dtype=torch.long)

    def release(self, ids: Iterable[int]) -> None:
        """From the next frame on these identities are unspecified, whatever is pushed."""
        self._released |= self._pushed.seen.intersection(ids)
        self._led = self._led.without(frozenset(ids))

    def lead(self, tracks: Tracks) -> None:
        """From the next frame on these identities move so, whatever is pushed; beyond the end as `ending` says.

        They are in front of those that are led already.
        """
        self.release(_ids_of(tracks))
        self._had |= frozenset(_ids_of(tracks)) - self._pushed.seen
        length = max(tracks.num_frames, self._led.num_pending)
        others, _ = self._led.taken(length, self.ending)
        filled = _filled(tracks, tracks, length, self.ending)
        latest = self._led.latest
        following = filled if others is None else filled.beside(others)
        self._led = _Queue(following) if latest is None else _Queue(latest, 1).appended(following)

    def stop_leading(self) -> None:
        """From the next frame on the identities that are led go on as `ending` says."""
        latest = self._led.latest
        self._led = _Queue() if latest is None else _Queue(latest, 1)

    def take(self, count: int) -> Tracks:
        """The motion of the next `count` frames, filled up as `ending` says."""
        with_drags = self._with_drags
        pushed, self._pushed = self._pushed.taken(count, self.ending)
        led, self._led = self._led.taken(count, self.ending)
        followed = None if pushed is None else _without(pushed, with_drags)
        found = _joined(led, followed)
        return Tracks.empty(1, count, self.height, self.width) if found is None else found

    def peek(self, count: int) -> Tracks:
        """What `take` would give."""
        state = self.snapshot()
        tracks = self.take(count)
        self.restore(state)
        return tracks

    def snapshot(self) -> TrackBufferState:
        return TrackBufferState(self._pushed, self._led, self._released, self._had)

    def restore(self, state: TrackBufferState) -> None:
        self._pushed, self._led = state.pushed, state.led
        self._released, self._had = state.released, state.had

    @property
    def _with_drags(self) -> frozenset[int]:
        """Identities whose pushed motion is not followed: a drag has them, or had them when they were pushed."""
        return self._released.union(_ids_of(self._led.held))

    def _identified(self, tracks: Tracks) -> Tracks:
        if not tracks.ids.any():
            return tracks.with_ids(self._identities[None, : tracks.num_tracks])
        if len(tracks.ids.unique()) < tracks.num_tracks:
            raise ValueError("tracks.ids has an identity twice; give each track its own, or all 0 to have them drawn")
        return tracks


def _ids_of(tracks: Tracks | None) -> list[int]:
    return [] if tracks is None else tracks.ids[0].tolist()


def _without(tracks: Tracks, ids: frozenset[int]) -> Tracks:
    if not ids:
        return tracks
    kept = [n for n, identity in enumerate(_ids_of(tracks)) if identity not in ids]
    return tracks.select(torch.tensor(kept, dtype=torch.long))


def _joined(*parts: Tracks | None) -> Tracks | None:
    """The tracks that there are, side by side."""
    found = [part for part in parts if part is not None]
    return found[0].beside(*found[1:]) if found else None


def _filled(tracks: Tracks, held: Tracks, count: int, ending: str) -> Tracks:
    """Tracks of `count` frames: beyond their end the last frame held goes on, or nothing is known."""
    missing = count - tracks.num_frames
    if missing <= 0:
        return tracks
    last = held.frames(slice(-1, None))
    points, visibility = last.points.expand(-1, missing, -1, -1), last.visibility.expand(-1, missing, -1)
    shown = visibility if ending == "hold" else torch.zeros_like(visibility)
    return _append(tracks, replace(last, points=points, visibility=shown))


def _append(earlier: Tracks, later: Tracks) -> Tracks:
    """Join in time over the union of identities; where one is missing it is invisible.

    The later push decides the order of columns, because order decides which of two tracks in one cell is
    seen.
    """
    following = set(_ids_of(later))
    kept = [n for n, identity in enumerate(_ids_of(earlier)) if identity not in following]
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
    if torch.equal(tracks.ids[0], ids):
        return tracks
    column_of = {identity: n for n, identity in enumerate(tracks.ids[0].tolist())}
    columns = torch.tensor([column_of.get(identity, tracks.num_tracks) for identity in ids.tolist()], dtype=torch.long)
    return replace(Tracks.pad(tracks, tracks.num_tracks + 1).select(columns), ids=ids[None])


def _without_unseen(tracks: Tracks) -> Tracks:
    """Drop columns visible in no frame: in a stream that adds and removes points they would pile up."""
    return tracks.select(tracks.visibility[0].any(dim=0).nonzero()[:, 0])
