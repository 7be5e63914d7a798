"""Back to an earlier chunk boundary: undo, snapshots, and chunks that fail."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import replace

import numpy as np
import pytest
from drag_sessions import LEFT, advance, drag, first_frame, mask, open_session, refused, tracked_session, ways

from models.motion.tracks import Tracks
from stream.dragstream.config import DragConfig
from stream.dragstream.drag import Drag, Handle, Pose


def test_undo_takes_back_drags_and_prompts_bit_for_bit(parts) -> None:
    plain, session = open_session(parts), open_session(parts, undo_chunks=3)
    expected = advance(plain, 6)
    advance(session, 3)
    session.drag(drag("edit", LEFT))
    session.drag(drag("animate", LEFT))
    session.set_prompt("a green disc on a red background")
    advance(session, 1)
    session.undo(2)
    np.testing.assert_array_equal(np.concatenate(advance(session, 1)), expected[2])
    session.drag(drag("animate", LEFT))
    session.next_chunk()
    session.undo(2)
    assert session.chunk_index == 2
    for found, wanted in zip(advance(session, 4), expected[2:]):
        np.testing.assert_array_equal(found, wanted)


def test_undo_takes_back_what_came_for_the_chunk_and_keeps_what_was_pushed(parts) -> None:
    plain, session = open_session(parts), open_session(parts)
    expected = advance(plain, 3)[-1]
    advance(session, 2)
    session.drag(drag("animate", LEFT))
    session.set_prompt("a green disc on a red background")
    session.push_tracks(Tracks.from_arrays(np.full((20, 1, 2), 9.0), np.ones((20, 1), bool), 16, 16))
    with_tracks = session.next_chunk()
    session.undo()
    assert session.num_pending_track_frames == 20
    again = session.next_chunk()
    assert (again != with_tracks).any() and (again != expected).any()
    bare = open_session(parts)
    advance(bare, 2)
    bare.push_tracks(Tracks.from_arrays(np.full((20, 1, 2), 9.0), np.ones((20, 1), bool), 16, 16))
    np.testing.assert_array_equal(again, bare.next_chunk())


@pytest.mark.parametrize(
    ("mode", "cfg"),
    [
        ("edit", DragConfig()),
        ("animate", DragConfig(iterations=1)),
        ("animate", DragConfig(step=0)),  # what the student predicts there was not kept
    ],
)
def test_where_undo_ended_nothing_is_left_to_drag_until_the_next_chunk(parts, mode: str, cfg: DragConfig) -> None:
    session = open_session(parts, drag=cfg)
    advance(session, 5)
    session.undo()
    refused(session, drag(mode, LEFT), r"chunk 3 cannot be read or made again.*call next_chunk\(\) first")
    session.next_chunk()
    session.drag(drag(mode, LEFT))


def test_a_chunk_that_fails_leaves_the_session_as_it_was(parts, monkeypatch) -> None:
    plain, session = tracked_session(parts), tracked_session(parts)
    expected = advance(plain, 4)
    advance(session, 2)
    before = ways(session)
    with monkeypatch.context() as patched, pytest.raises(MemoryError, match="full"):
        patched.setattr(session._decoder, "push", lambda _: (_ for _ in ()).throw(MemoryError("full")))
        session.next_chunk()
    assert ways(session) == before and session.chunk_index == 2
    for found, wanted in zip(advance(session, 2), expected[2:]):
        np.testing.assert_array_equal(found, wanted)


@pytest.mark.parametrize("undo_chunks", [1, 2])
def test_after_a_chunk_that_failed_a_drag_is_refused_or_right(parts, monkeypatch, undo_chunks: int) -> None:
    plain, session = (open_session(parts, undo_chunks=undo_chunks) for _ in range(2))
    expected = advance(plain, 6)
    advance(session, 5)
    with monkeypatch.context() as patched, pytest.raises(MemoryError, match="full"):
        patched.setattr(session._decoder, "push", lambda _: (_ for _ in ()).throw(MemoryError("full")))
        session.next_chunk()
    if undo_chunks == 1:
        refused(session, drag("edit", LEFT), r"chunk 4 cannot be read or made again.*larger undo_chunks")
        with pytest.raises(ValueError, match="nothing can be taken back now.*chunk that failed"):
            session.undo()
    else:
        session.undo(2)
        for wanted in expected[3:5]:
            np.testing.assert_array_equal(session.next_chunk(), wanted)
    np.testing.assert_array_equal(session.next_chunk(), expected[5])
    session.undo()
    np.testing.assert_array_equal(session.next_chunk(), expected[5])


def test_an_edit_that_fails_leaves_its_chunk_taken_back(parts, monkeypatch) -> None:
    session = tracked_session(parts)
    session.next_chunk()
    before = ways(session)
    shown = session.next_chunk()
    with monkeypatch.context() as patched, pytest.raises(MemoryError, match="full"):
        patched.setattr(session._decoder, "push", lambda _: (_ for _ in ()).throw(MemoryError("full")))
        session.drag(drag("edit", LEFT))
    assert ways(session) == before and session.chunk_index == 1
    np.testing.assert_array_equal(session.next_chunk(), shown)


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("edits", [False, True])
def test_motion_pushed_while_a_chunk_is_made_waits_for_the_next(parts, monkeypatch, edits: bool, fails: bool) -> None:
    """From another thread. It used to be lost with an edit, and with a chunk that failed."""
    session = tracked_session(parts)
    advance(session, 2)
    push, more = session._decoder.push, Tracks.from_arrays(np.full((5, 1, 2), 9.0), np.ones((5, 1), bool), 16, 16)

    def meanwhile(latents):
        session.push_tracks(more)
        if fails:
            raise MemoryError("full")
        return push(latents)

    with monkeypatch.context() as patched, suppress(MemoryError):
        patched.setattr(session._decoder, "push", meanwhile)
        session.drag(drag("edit", LEFT)) if edits else session.next_chunk()
    assert session.num_pending_track_frames == 5
    session.next_chunk()
    assert session.num_pending_track_frames == 0
    session.push_tracks(more)
    session.undo()
    assert session.num_pending_track_frames == 5, "what came since is taken back, what waited waits again"


def test_a_snapshot_goes_on_in_another_session(parts) -> None:
    session, other = open_session(parts), open_session(parts)
    advance(session, 4)
    other.restore(session.snapshot())
    for found, wanted in zip(advance(other, 2), advance(session, 2)):
        np.testing.assert_array_equal(found, wanted)


@pytest.mark.parametrize("mode", ["edit", "animate"])
def test_a_snapshot_is_dragged_in_another_session_whatever_the_first_one_does(parts, mode: str) -> None:
    """The remembered passes used to read the keys and values of the session that they came from."""
    first, other = (open_session(parts, undo_chunks=2, drag=DragConfig(iterations=1)) for _ in range(2))
    advance(first, 4)
    state = first.snapshot()

    def dragged(session) -> np.ndarray:
        shown = session.drag(drag(mode, LEFT)).frames
        return session.next_chunk() if shown is None else shown

    other.restore(state)
    expected = dragged(other)
    other.restore(state)
    advance(first, 2)
    np.testing.assert_array_equal(dragged(other), expected)
    first.undo(2)  # to where the snapshot was taken, and on in another way
    first.set_prompt("a green disc on a red background")
    advance(first, 2)
    other.restore(state)
    np.testing.assert_array_equal(dragged(other), expected)


def with_rollout(parts, **changes):
    """The same parts under another rollout."""
    student, codecs = parts
    return student, codecs.under(replace(codecs.model_cfg, rollout=replace(codecs.model_cfg.rollout, **changes)))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"step_indices": [0]}, r"at the noise levels \[1.0, .*same model.rollout.step_indices"),
        ({"step_indices": [0, 8, 20]}, "same model.rollout.step_indices, num_inference_steps and shift"),
        ({"sink_chunks": 0}, r"cache with CacheSpec\(.*sink_chunks=1.*, this one has CacheSpec\(.*sink_chunks=0"),
        ({"positions": "absolute"}, "positions='slot'.*positions='absolute'"),
    ],
)
@pytest.mark.parametrize("is_fresh", [True, False])
def test_a_snapshot_of_another_rollout_is_refused_and_changes_nothing(parts, changes, message, is_fresh: bool) -> None:
    first, other = open_session(parts), open_session(with_rollout(parts, **changes))
    advance(first, 4)
    if not is_fresh:
        advance(other, 1)
    other.push_tracks(Tracks.from_arrays(np.full((12, 2, 2), 9.0), np.ones((12, 2), bool), 16, 16))
    before = (other.chunk_index, other.num_pending_track_frames)
    with pytest.raises(ValueError, match=message):
        other.restore(first.snapshot())
    assert (other.chunk_index, other.num_pending_track_frames) == before


def test_a_snapshot_without_a_window_goes_on_where_there_is_room(parts) -> None:
    parts = with_rollout(parts, window_chunks=None)
    first, larger, smaller = (open_session(parts, num_frames=frames) for frames in (45, 69, 33))
    advance(first, 4)
    state = first.snapshot()
    with pytest.raises(ValueError, match="holds 4 chunks, this cache has room for 3"):
        smaller.restore(state)
    larger.restore(state)
    reference = open_session(parts, num_frames=69)
    for found, wanted in zip(advance(larger, 2), advance(reference, 6)[4:]):
        np.testing.assert_array_equal(found, wanted)


def test_what_is_shown_comes_along_with_a_snapshot_and_the_noise_does_not(parts) -> None:
    first = tracked_session(parts)
    same = open_session(parts, first_frame=255 - first_frame(), prompt="a green ring")
    changed = open_session(parts, seed=7)
    advance(first, 3)
    state = first.snapshot()
    more = Tracks.from_arrays(np.full((12, 2, 2), 9.0), np.ones((12, 2), bool), 16, 16)
    for session in (same, changed):
        session.restore(state)
    for session in (first, same, changed):
        session.push_tracks(more)
    assert ways(first) == ways(same) == ways(changed), "columns keep their identities"
    expected = first.next_chunk()
    np.testing.assert_array_equal(same.next_chunk(), expected)
    assert (changed.next_chunk() != expected).any()


def test_the_logs_of_an_animation_are_those_of_its_own_session_without_chunks_taken_back(parts) -> None:
    session, fork = (open_session(parts, undo_chunks=2, drag=DragConfig(iterations=1)) for _ in range(2))
    advance(session, 2)
    poses = tuple(Pose(dx=-0.5 * n) for n in range(1, 10))
    logs = session.drag(Drag("animate", (Handle(mask(), (7.0, 7.0), poses, (7.0, 7.0)),))).logs
    session.next_chunk()
    fork.restore(session.snapshot())
    assert [advance(each, 2) for each in (fork, session)] and [log.chunk for log in logs] == [2, 3, 4]
    session.undo()
    assert [log.chunk for log in logs] == [2, 3]
    session.drag(drag("animate", Pose()))
    session.undo()
    assert [log.chunk for log in logs] == [2]
    fork.undo(2)
    assert [log.chunk for log in logs] == [2]


def test_after_undo_timing_and_latents_are_those_of_the_chunk_before(parts) -> None:
    session = open_session(parts, undo_chunks=2)
    session.next_chunk()
    first, latents = session.timing, session.latents
    session.next_chunk()
    session.undo()
    assert session.timing is first and session.latents is latents
    session.undo()
    with pytest.raises(RuntimeError, match="made no chunk yet"):
        _ = session.latents


def test_a_restored_stream_can_be_edited(parts) -> None:
    session = open_session(parts)
    advance(session, 5)
    state = session.snapshot()
    expected = session.drag(drag("edit", LEFT)).frames
    advance(session, 3)
    session.restore(state)
    np.testing.assert_array_equal(session.drag(drag("edit", LEFT)).frames, expected)


def test_undo_says_how_far_it_can_go(parts) -> None:
    session = open_session(parts, undo_chunks=2)
    with pytest.raises(ValueError, match="nothing can be taken back now: no chunk was made since the start"):
        session.undo()
    advance(session, 4)
    with pytest.raises(ValueError, match=r"chunks=3 must be in 1..2.*larger undo_chunks"):
        session.undo(3)
    with pytest.raises(ValueError, match="undo_chunks=0 must be at least 1"):
        open_session(parts, undo_chunks=0)
