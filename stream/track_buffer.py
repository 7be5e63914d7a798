"""The tracks a stream still has to follow: filled from outside at any time, read once per chunk.

Identities stay constant over a stream (MotionStream eq. 1 gives each track a random identity once). Tracks
whose ids are all 0 are "not yet drawn": column n then always gets the n-th identity of this stream. Tracks
with ids of their own keep them, so a caller may add and remove points; it numbers them from 1. An identity
missing from a later push is released. A drag may lead tracks elsewhere, whatever is pushed for them. Memory
does not grow with the stream: frames already read are forgotten, except the last.
"""

from __future__ import annotations

import logging
from collections.abc import Collection
from dataclasses import dataclass, replace

import torch

from models.motion.tracks import NUM_TRACK_IDS, Tracks, sample_track_ids

log = logging.getLogger(__name__)

ENDINGS = ("hold", "release")
NOT_DRAWN = 0  # identity of tracks that are told apart by column


@dataclass(frozen=True)
class _Queue:
    """Frames of motion in a row, as they were appended: what was read is cut off, nothing else is copied. Immutable."""

    parts: tuple[Tracks, ...] = ()  # frames that were not read yet
    latest: Tracks | None = None  # the latest frame read
    ids: tuple[int, ...] = ()  # identities of all these; of two tracks in one cell that of the earlier one is seen
    seen: frozenset[int] = frozenset()  # identities of all that was ever appended

    @property
    def num_pending(self) -> int:
        return sum(part.num_frames for part in self.parts)

    def appended(self, tracks: Tracks) -> _Queue:
        """The later push decides the order of identities."""
        own = _ids_of(tracks)
        ids = (*own, *_others(self.ids, own))
        return replace(self, parts=(*self.parts, tracks), ids=ids, seen=self.seen.union(own))

    def without(self, ids: Collection[int]) -> _Queue:
        rest = replace(self, ids=_others(self.ids, ids))
        return replace(rest, latest=rest.shown())

    def ended(self) -> _Queue:
        """The same without what was not read yet."""
        return replace(self, parts=(), ids=() if self.latest is None else self.ids)

    def shown(self) -> Tracks | None:
        """The latest frame read, with these identities alone."""
        return None if self.latest is None else _spread(self.latest, self.ids)

    def taken(self, count: int, ending: str) -> tuple[Tracks | None, _Queue]:
        """The next `count` frames, filled up as `ending` says, and what is left."""
        if self.latest is None and not self.parts:
            return None, self
        found, rest, missing = [], self.parts, count
        while rest and missing:
            first, *others = rest
            found.append(_spread(first.frames(slice(0, missing)), self.ids))
            left = first.frames(slice(missing, None))
            rest = (left, *others) if left.num_frames else tuple(others)
            missing -= found[-1].num_frames
        last = self.shown() if not found else found[-1].frames(slice(-1, None))
        assert last is not None, "frames are pending, or one was read"
        taken = _in_a_row(*found, *_lasting(last, missing, ending))
        latest = taken.frames(slice(-1, None))
        return taken, replace(self, parts=rest, latest=latest, ids=_visible(self.ids, latest, *rest))


@dataclass(frozen=True)
class TrackBufferState:
    """What `snapshot` keeps; immutable."""

    pushed: _Queue
    led: _Queue
    released: frozenset[int]
    had: frozenset[int]
    identities: torch.Tensor


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
        self._promised: set[int] = set()  # given out by `reserve_ids`; no part of what is returned to

    @property
    def num_pending(self) -> int:
        """Pushed frames that were not read yet."""
        return self._pushed.num_pending

    def push(self, tracks: Tracks) -> None:
        """Append the motion of the next frames; see `checked`."""
        self.append(self.checked(tracks))

    def append(self, tracks: Tracks) -> None:
        """Append what was checked."""
        self._pushed = self._pushed.appended(tracks)

    def checked(self, tracks: Tracks) -> Tracks:
        """A copy of tracks of one clip (B = 1) with their identities; nothing of this buffer is changed.

        Raises:
            ValueError: another resolution or batch size, no frame, an identity given twice or that no student has
                learned, or more tracks than there are identities.
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
        points, visibility, ids = (part.to("cpu", copy=True) for part in (tracks.points, tracks.visibility, tracks.ids))
        tracks = self._identified(replace(tracks, points=points, visibility=visibility, ids=ids))
        if tracks.num_tracks and self._with_drags.issuperset(_ids_of(tracks)):
            log.warning("none of the %d pushed tracks is followed: drags have their identities", tracks.num_tracks)
        return tracks

    def drop_pending(self) -> None:
        """Forget pushed frames that were not read yet; what was read last goes on as `ending` says."""
        self._pushed = self._pushed.ended()

    def seen(self) -> Tracks:
        """Tracks that are visible in the latest frame read: that one frame of them."""
        now = _joined(self._pushed.without(self._with_drags).shown(), self._led.shown())
        if now is None:
            return Tracks.empty(1, 1, self.height, self.width)
        return now.select(now.seen[0, 0].nonzero()[:, 0])

    def reserve_ids(self, count: int) -> torch.Tensor:  # -> [count]
        """Identities for tracks that will be pushed; given out again only when no others are left.

        Raises ValueError where so many are not left beside those in use and those that drags have.
        """
        found = self.unused_ids(count, besides=self._released)
        self._promised.update(found.tolist())
        return found

    def unused_ids(self, count: int, besides: Collection[int] = ()) -> torch.Tensor:  # -> [count]
        """Identities that no track of this stream has now, nor ``besides``; those that none ever had come first, those
        that are reserved and wait for their tracks last.

        Raises ValueError where so many are not left.
        """
        held = {NOT_DRAWN, *self._pushed.ids, *self._led.ids, *besides}
        free = [identity for identity in reversed(self._identities.tolist()) if identity not in held]
        if len(free) < count:
            raise ValueError(f"{count} new tracks need identities, and {len(free)} of {NUM_TRACK_IDS} are left")
        seen = self._pushed.seen | self._had
        waiting = self._promised - seen
        order = sorted(free, key=lambda identity: (identity in waiting, identity in seen))
        return torch.tensor(order[:count], dtype=torch.long)

    def release(self, ids: Collection[int]) -> None:
        """From the next frame on these identities are unspecified, whatever is pushed."""
        self._released |= self._pushed.seen.intersection(ids)
        self._led = self._led.without(ids)

    def lead(self, tracks: Tracks) -> None:
        """From the next frame on these identities move so, whatever is pushed; beyond the end as `ending` says.

        They are in front of those that are led already.
        """
        self.release(_ids_of(tracks))
        self._had |= frozenset(_ids_of(tracks)) - self._pushed.seen
        length = max(tracks.num_frames, self._led.num_pending)
        others, _ = self._led.taken(length, self.ending)
        following, _ = _Queue().appended(tracks).taken(length, self.ending)
        assert following is not None, "tracks hold a frame"
        self._led = self._led.ended().appended(following if others is None else following.beside(others))

    def stop_leading(self) -> None:
        """From the next frame on the identities that are led go on as `ending` says."""
        self._led = self._led.ended()

    def take(self, count: int) -> Tracks:
        """The motion of the next `count` frames, filled up as `ending` says."""
        with_drags = self._with_drags
        pushed, self._pushed = self._pushed.taken(count, self.ending)
        led, self._led = self._led.taken(count, self.ending)
        followed = None if pushed is None else _spread(pushed, _others(_ids_of(pushed), with_drags))
        found = _joined(led, followed)
        return Tracks.empty(1, count, self.height, self.width) if found is None else found

    def peek(self, count: int) -> Tracks:
        """What `take` would give."""
        state = self.snapshot()
        tracks = self.take(count)
        self.restore(state)
        return tracks

    def snapshot(self) -> TrackBufferState:
        return TrackBufferState(self._pushed, self._led, self._released, self._had, self._identities)

    def restore(self, state: TrackBufferState) -> None:
        self._pushed, self._led = state.pushed, state.led
        self._released, self._had, self._identities = state.released, state.had, state.identities

    @property
    def _with_drags(self) -> frozenset[int]:
        """Identities whose pushed motion is not followed: a drag has them, or had them when they were pushed."""
        return self._released.union(self._led.ids)

    def _identified(self, tracks: Tracks) -> Tracks:
        if not tracks.ids.any():
            return tracks.with_ids(self._identities[None, : tracks.num_tracks])
        if (unknown := tracks.ids[(tracks.ids < 0) | (tracks.ids >= NUM_TRACK_IDS)]).numel():
            raise ValueError(
                f"tracks.ids holds {unknown[0]}; identities are 0..{NUM_TRACK_IDS - 1}, and no student follows others: "
                "take unused_track_ids() of the session"
            )
        if len(tracks.ids.unique()) < tracks.num_tracks:
            raise ValueError("tracks.ids has an identity twice; give each track its own, or all 0 to have them drawn")
        return tracks


def _ids_of(tracks: Tracks) -> list[int]:
    return tracks.ids[0].tolist()


def _joined(*parts: Tracks | None) -> Tracks | None:
    """The tracks that there are, side by side."""
    found = [part for part in parts if part is not None]
    return found[0].beside(*found[1:]) if found else None


def _lasting(last: Tracks, count: int, ending: str) -> list[Tracks]:
    """What follows the last frame: it goes on, or nothing is known; none for no frames."""
    if not count:
        return []
    points, visibility = last.points.expand(-1, count, -1, -1), last.visibility.expand(-1, count, -1)
    return [replace(last, points=points, visibility=visibility if ending == "hold" else torch.zeros_like(visibility))]


def _in_a_row(*parts: Tracks) -> Tracks:
    """Frames of the same identities, one part after another."""
    if len(parts) == 1:
        return parts[0]
    points, visibility = (torch.cat([getattr(part, name) for part in parts], 1) for name in ("points", "visibility"))
    return replace(parts[0], points=points, visibility=visibility)


def _spread(tracks: Tracks, ids: Collection[int]) -> Tracks:
    """The same tracks as columns `ids`; absent ones are invisible at (0, 0)."""
    wanted = torch.tensor(tuple(ids), dtype=torch.long)
    if torch.equal(tracks.ids[0], wanted):
        return tracks
    column_of = {identity: n for n, identity in enumerate(_ids_of(tracks))}
    columns = torch.tensor([column_of.get(identity, tracks.num_tracks) for identity in ids], dtype=torch.long)
    return replace(Tracks.pad(tracks, tracks.num_tracks + 1).select(columns), ids=wanted[None])


def _others(ids: Collection[int], than: Collection[int]) -> tuple[int, ...]:
    than = frozenset(than)
    return tuple(identity for identity in ids if identity not in than)


def _visible(ids: tuple[int, ...], *parts: Tracks) -> tuple[int, ...]:
    """Those visible in some frame: in a stream that adds and removes points the others would pile up."""
    found: set[int] = set()
    for part in parts:
        if found.issuperset(ids):
            break
        found.update(part.ids[0, part.visibility[0].any(dim=0)].tolist())
    return tuple(identity for identity in ids if identity in found)
