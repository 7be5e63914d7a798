"""What drags do to the tracks of a running stream."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from drag_sessions import LEFT, advance, drag, mask, open_session, tracked_session, ways

from models.motion.tracks import Tracks
from stream.dragstream.drag import Drag, Handle, Pose


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
