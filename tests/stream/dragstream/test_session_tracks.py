"""What drags do to the tracks of a running stream."""

from __future__ import annotations

from dataclasses import replace
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from drag_sessions import LEFT, advance, drag, mask, open_session, tracked_session, ways

from models.motion.tracks import NUM_TRACK_IDS, Tracks
from stream.dragstream.config import DragConfig
from stream.dragstream.drag import Drag, Handle, Pose
from stream.dragstream.features import Reference
from stream.dragstream.led_tracks import led, pixel_poses, tracks_on, tracks_on_way
from stream.session import StreamSession
from stream.track_buffer import TrackBuffer


def test_the_tracks_of_a_dragged_region_are_released_where_the_profile_says_so(parts) -> None:
    session = tracked_session(parts, tracks="release")
    advance(session, 2)
    before = ways(session)
    session.drag(drag("animate", LEFT))
    (rest,) = ways(session).values()
    assert rest == [13.0] * 12
    session.undo()
    assert ways(session) == before


def test_an_animation_takes_the_tracks_of_its_handle_along_and_leaves_them_there(parts) -> None:
    session = tracked_session(parts)
    advance(session, 2)
    moving, still = ways(session)
    session.drag(drag("animate", LEFT))
    found = ways(session, 16)
    assert found[still] == [13.0] * 16
    np.testing.assert_allclose(found[moving], [*(7 - 4 * (n + 1) / 12 for n in range(12)), *[3.0] * 4], atol=1e-5)


def test_an_animation_that_waits_is_ended_without_a_trace(parts) -> None:
    session = tracked_session(parts)
    advance(session, 2)
    before = ways(session)
    session.drag(drag("animate", LEFT))
    session.drag(drag("animate", Pose(dx=3.0)))
    assert {round(way[-1], 3) for way in ways(session).values()} == {10.0, 13.0}, "of the second alone"
    session.drag(drag("animate", Pose()))
    assert ways(session) == before
    session.drag(drag("edit", LEFT))  # nothing waits any more


@pytest.mark.parametrize("edited", [False, True])  # an edit of its chunk does not bring it back
def test_an_animation_ended_on_its_way_leaves_its_tracks_where_they_are(parts, edited: bool) -> None:
    session = tracked_session(parts)
    advance(session, 2)
    poses = tuple(Pose(dx=-n) for n in range(1, 7))
    outcome = session.drag(Drag("animate", (Handle(mask(), (7.0, 7.0), poses, (7.0, 7.0)),)))
    session.next_chunk()
    session.drag(drag("animate", Pose()))
    if edited:
        session.drag(drag("edit", Pose()))
    assert {way[-1] for way in ways(session, 24).values()} == {4.0, 13.0}
    session.next_chunk()
    assert [log.chunk for log in outcome.logs] == [2]


def test_a_new_stroke_needs_identities_that_no_drag_has(parts, caplog) -> None:
    session = tracked_session(parts)
    advance(session, 2)
    session.drag(drag("edit", LEFT))
    stroke = Tracks.from_arrays(np.full((12, 1, 2), 9.0), np.ones((12, 1), bool), 16, 16)
    session.push_tracks(stroke)
    assert "none of the 1 pushed tracks is followed" in caplog.text
    assert all(9.0 not in way for way in ways(session).values())
    session.undo()
    session.next_chunk()
    session.drag(drag("edit", LEFT))
    session.push_tracks(stroke.with_ids(session.unused_track_ids(1)[None]))
    assert [9.0] * 12 in ways(session).values()


def test_an_edit_bends_the_tracks_of_its_chunk_and_undo_straightens_them(parts) -> None:
    session = tracked_session(parts)
    advance(session, 2)
    before = ways(session)
    moving = next(iter(before))
    session.push_tracks(Tracks.from_arrays(np.full((2, 1, 2), 9.0), np.ones((2, 1), bool), 16, 16))
    session.drag(drag("edit", LEFT))
    assert ways(session)[moving] == [3.0] * 12
    again = Handle(mask(0, 10), (3.0, 7.0), (Pose(dx=-2.0),), (3.0, 7.0))
    session.drag(Drag("edit", (again,)))  # goes on from the first
    assert ways(session)[moving] == [1.0] * 12
    assert session.num_pending_track_frames == 2  # what was pushed since the chunk is not lost
    session.undo()
    assert ways(session) == before


def test_the_first_frame_of_the_video_which_is_given_keeps_its_tracks(parts, monkeypatch) -> None:
    session, taken = tracked_session(parts), []
    session.next_chunk()
    take = session._buffer.take
    monkeypatch.setattr(session._buffer, "take", lambda count: taken.append(take(count)) or taken[-1])
    session.drag(drag("edit", LEFT))
    followed = taken[-1].points[0, :, 0, 0]  # of the chunk that was made again
    np.testing.assert_allclose(followed, 7 - 4 * np.arange(9) / 8, atol=1e-5)


def test_a_handle_without_tracks_gets_one_per_cell(parts) -> None:
    session = open_session(parts)
    advance(session, 2)
    session.drag(drag("animate", LEFT))
    rows, cols = session.codecs.model_cfg.latent_size
    taken = session._buffer.peek(12)
    centers = (np.arange(cols) + 0.5) * 16 / cols
    inside = sum(4 <= center < 10 for center in centers)
    assert taken.num_tracks == inside**2 and len(taken.ids.unique()) == inside**2 and rows == cols


def test_every_track_that_is_led_has_its_own_identity(parts) -> None:
    for session in (open_session(parts), tracked_session(parts)):  # without tracks on the handles, and with one
        advance(session, 2)
        there = Handle(mask(6, 12), (9.0, 7.0), (Pose(dy=2.0),) * 3, (9.0, 7.0))
        session.drag(replace(drag("animate", LEFT), handles=(*drag("animate", LEFT).handles, there)))
        ids = session._buffer.peek(12).ids[0]
        assert len(ids.unique()) == len(ids)


@pytest.mark.parametrize("mode", ["edit", "animate"])
def test_tracks_that_a_far_drag_passes_between_its_poses_are_on_its_way(parts, mode: str) -> None:
    points = np.tile(np.array([[7.0, 3.0], [9.0, 12.0]], np.float32), (9, 1, 1))
    tracks = Tracks.from_arrays(points, np.ones((9, 2), bool), 16, 16)
    session = open_session(parts, tracks=tracks, drag=DragConfig(tracks="release"))
    advance(session, 2)
    poses = (Pose(dx=12.0),) * (1 if mode == "edit" else 3)  # from the left border to the right one
    session.drag(Drag(mode, (Handle(mask(0, 4, 2, 5), (2.0, 3.0), poses, (2.0, 3.0)),)))
    (rest,) = ways(session).values()
    assert rest[0] == 9.0, "the track off its way"


@pytest.mark.parametrize("mode", ["animate", "edit"])
def test_the_tracks_of_what_comes_back_begin_where_it_comes_in(parts, mode: str) -> None:
    """They would else set out from the place that it left, towards the border that it comes from."""
    session = open_session(parts, drag=DragConfig(iterations=1))
    advance(session, 2)
    (reference,) = session.drag(drag("animate", LEFT)).references
    session.next_chunk()
    poses = (Pose(dx=8.0),) if mode == "edit" else (Pose(dx=8.0), Pose(dx=6.0), Pose(dx=5.0))
    back = Drag(mode, (Handle(mask(), (7.0, 7.0), poses, (7.0, 7.0), reference),))
    way = [pose for (pose,) in pixel_poses(back, 12, opens_video=False)]
    assert way[0] == poses[0] and way[-1] == poses[-1]
    assert all(5.0 <= pose.dx <= 8.0 for pose in way)


def test_a_later_handle_is_in_front_among_the_tracks_too(parts) -> None:
    """Of two tracks in one cell the first is seen: where handles overlap that is one of the later handle."""
    session = open_session(parts, drag=DragConfig(iterations=1))
    advance(session, 2)
    behind = Handle(mask(0, 6), (3.0, 7.0), (Pose(dx=1.0),) * 3, (3.0, 7.0))
    in_front = Handle(mask(10, 16), (13.0, 7.0), (Pose(dx=-9.0),) * 3, (13.0, 7.0))
    both = Drag("animate", (behind, in_front))
    on_handles = tracks_on(session._buffer, both, session.codecs.model_cfg.latent_size)
    found = led(both, on_handles, list(pixel_poses(both, 12, opens_video=False)))
    assert found.ids[0].tolist() == [*on_handles[1].ids[0].tolist(), *on_handles[0].ids[0].tolist()]


def test_a_new_drag_is_in_front_of_what_is_led_already(parts) -> None:
    session = tracked_session(parts)
    advance(session, 2)
    (first,) = _led(session, drag("edit", LEFT))
    there = Handle(mask(12, 16, 12, 16), (13.0, 13.0), (Pose(dx=-3.0),), (13.0, 13.0))
    (second,) = set(_led(session, Drag("edit", (there,)))) - {first}
    assert session._buffer.peek(1).ids[0].tolist() == [second, first]


def _led(session: StreamSession, asked: Drag) -> list[int]:
    """Identities that are led after a drag."""
    session.drag(asked)
    return list(session._buffer.snapshot().led.ids)


def test_drags_give_back_the_identities_of_tracks_that_have_ended(parts) -> None:
    """A drag without tracks on its handle takes one per cell: 10,000 would be used up within an hour."""
    session = open_session(parts, ending="release", drag=DragConfig(iterations=0, warm_rounds=0))
    advance(session, 2)
    whole = Handle(mask(0, 16, 0, 16), (7.0, 7.0), (Pose(dx=0.5),) * 3, (7.0, 7.0))
    taken: set[int] = set()
    for _ in range(3):
        ids = set(_led(session, Drag("animate", (whole,))))
        assert not taken & ids, "while there are new ones, no other gets them"
        taken |= ids
        advance(session, 2)
    assert not set(session.unused_track_ids(NUM_TRACK_IDS - 1 - len(taken)).tolist()) & taken
    assert len(session.unused_track_ids(NUM_TRACK_IDS - 1)) == NUM_TRACK_IDS - 1  # 0 stands for no identity


def test_identities_are_given_out_once_and_not_to_drags(parts) -> None:
    session = open_session(parts)
    advance(session, 2)
    first, second = (set(session.unused_track_ids(4).tolist()) for _ in range(2))
    session.drag(drag("animate", LEFT))
    session.undo()
    third = set(session.unused_track_ids(4).tolist())
    assert len(first | second | third) == 12
    advance(session, 1)
    assert not set(_led(session, drag("animate", LEFT))) & (first | second | third)


@pytest.mark.parametrize(
    ("region", "pose", "count"),
    [
        ((6, 7, 3, 4), Pose(dx=1.0), 1),  # one pixel
        ((5, 6, 0, 16), Pose(dx=1.0), 4),  # a bar of a pixel's width beside the middles of four cells
        ((4, 6, 4, 5), Pose(degrees=30.0), 1),
    ],
)
def test_a_handle_that_holds_no_cell_s_middle_gets_tracks_within_it(parts, region, pose: Pose, count: int) -> None:
    session = open_session(parts)
    advance(session, 2)
    region = mask(*region)
    handle = Handle(region, (8.0, 8.0), (pose,) * 3, (8.0, 8.0))  # the point is the centre of rotation
    (tracks,) = tracks_on(session._buffer, Drag("animate", (handle,)), (4, 4))
    x, y = tracks.points[0, 0].floor().long().unbind(-1)
    assert tracks.num_tracks == count and region[y, x].all()


def test_a_drag_that_finds_no_identities_leaves_the_one_before_it(parts, monkeypatch) -> None:
    session = open_session(parts, drag=DragConfig(iterations=1))
    advance(session, 2)
    session.drag(drag("animate", LEFT))
    before, animation = ways(session), session._animation
    monkeypatch.setattr(TrackBuffer, "unused_ids", Mock(side_effect=ValueError("none are left")))
    away = Handle(mask(10, 16), (13.0, 7.0), (Pose(dx=1.0),) * 3, (13.0, 7.0))
    with pytest.raises(ValueError, match="none are left"):
        session.drag(Drag("animate", (away,)))
    assert ways(session) == before and session._animation is animation


def test_a_track_that_is_led_out_of_the_frame_is_not_seen_there() -> None:
    """In a frame of 16 x 8 px, where x and y end elsewhere."""
    region = np.zeros((8, 16), bool)
    region[4:6, 4:6] = True
    poses = (Pose(dx=7.0), Pose(dy=5.0), Pose(dx=12.0))
    asked = Drag("animate", (Handle(region, (5.0, 5.0), poses, (5.0, 5.0)),))
    track = Tracks.from_arrays(np.full((1, 1, 2), 5.0), np.ones((1, 1), bool), 8, 16)
    found = led(asked, [track], [[pose] for pose in poses])
    assert found.points[0, :, 0].tolist() == [[12.0, 5.0], [5.0, 10.0], [17.0, 5.0]]
    assert found.visibility[0, :, 0].tolist() == [True, False, False]


def test_a_track_is_on_the_way_where_the_middle_of_its_pixel_is() -> None:
    buffer = TrackBuffer(16, 16, ending="hold", rng=torch.Generator().manual_seed(0))
    points = np.array([[[12.6, 7.0], [5.0, 7.0]]], np.float32)
    buffer.push(Tracks.from_arrays(points, np.ones((1, 2), bool), 16, 16))
    reached, grabbed = buffer.take(1).ids[0].tolist()
    handle = Handle(mask(), (7.0, 7.0), (Pose(dx=8.25),), (7.0, 7.0))
    asked, poses = Drag("edit", (handle,)), [[Pose(dx=8.25)]]
    assert tracks_on_way(buffer, asked, poses) == {reached, grabbed}
    back = Drag("edit", (replace(handle, reference=Reference(torch.zeros(4, 4, 4))),))
    assert tracks_on_way(buffer, back, poses) == {reached}, "what lies where it was grabbed is something else now"
