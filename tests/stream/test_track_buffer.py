from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from models.motion.tracks import NUM_TRACK_IDS, Tracks
from stream.track_buffer import TrackBuffer


def _tracks(frames: int, count: int = 3, start: int = 0, ids: list[int] | None = None, size: int = 32) -> Tracks:
    """Track n stands at (n, frame number): a point tells which frame it came from."""
    time = torch.arange(start, start + frames, dtype=torch.float32)
    points = torch.stack([torch.arange(count).float()[None].expand(frames, -1), time[:, None].expand(-1, count)], -1)
    ids_tensor = torch.tensor([ids if ids is not None else [0] * count])
    return Tracks(points[None], torch.ones(1, frames, count, dtype=torch.bool), ids_tensor, size, size)


def _buffer(ending: str = "hold") -> TrackBuffer:
    return TrackBuffer(32, 32, ending=ending, rng=torch.Generator().manual_seed(0))


@settings(max_examples=30, deadline=None)
@given(pushes=st.lists(st.integers(1, 9), min_size=1, max_size=5), chunk=st.integers(1, 12))
def test_pieces_pushed_equal_the_whole_clip_pushed(pushes: list[int], chunk: int) -> None:
    whole, pieces = _buffer(), _buffer()
    whole.push(_tracks(sum(pushes)))
    for number, frames in enumerate(pushes):
        pieces.push(_tracks(frames, start=sum(pushes[:number])))
    for _ in range(sum(pushes) // chunk + 2):  # beyond the end as well
        a, b = whole.take(chunk), pieces.take(chunk)
        torch.testing.assert_close(a.points, b.points)
        assert torch.equal(a.visibility, b.visibility) and torch.equal(a.ids, b.ids)


def test_identities_are_constant_and_distinct() -> None:
    buffer = _buffer()
    buffer.push(_tracks(2, count=4))
    first = buffer.take(2).ids
    buffer.push(_tracks(2, count=4, start=2))
    assert torch.equal(buffer.take(2).ids, first)
    assert len(first.unique()) == 4


def test_hold_repeats_and_release_forgets() -> None:
    for ending, visible in (("hold", True), ("release", False)):
        buffer = _buffer(ending)
        buffer.push(_tracks(3))
        taken = buffer.take(5)
        assert taken.visibility[0, :3].all() and bool(taken.visibility[0, 4].any()) is visible
        if ending == "hold":
            assert taken.points[0, :, 0, 1].tolist() == [0, 1, 2, 2, 2]
            assert buffer.take(2).points[0, :, 0, 1].tolist() == [2, 2]
        else:
            assert not buffer.take(2).visibility.any()


def test_a_late_push_starts_at_the_next_frame() -> None:
    buffer = _buffer()
    buffer.push(_tracks(2))
    buffer.take(4)
    buffer.push(_tracks(3, start=10))
    assert buffer.num_pending == 3
    assert buffer.take(3).points[0, :, 0, 1].tolist() == [10, 11, 12]


def test_points_come_and_go_by_identity() -> None:
    buffer = _buffer()
    buffer.push(_tracks(2, count=2, ids=[7, 8]))
    buffer.push(_tracks(2, count=2, start=2, ids=[8, 9]))
    taken = buffer.take(4)
    seen = {int(i): taken.visibility[0, :, n].tolist() for n, i in enumerate(taken.ids[0])}
    assert seen == {7: [True, True, False, False], 8: [True] * 4, 9: [False, False, True, True]}
    assert 7 not in buffer.take(1).ids  # released for good: the buffer does not grow
    with pytest.raises(ValueError, match="twice"):
        buffer.push(_tracks(1, count=2, ids=[5, 5]))


@pytest.mark.parametrize("ending", ["hold", "release"])
def test_dropping_what_is_pending_ends_the_motion_where_it_was_read(ending: str) -> None:
    buffer, ended = _buffer(ending), _buffer(ending)
    buffer.drop_pending()  # nothing was pushed: nothing happens
    buffer.push(_tracks(8))
    ended.push(_tracks(5))
    for each in (buffer, ended):
        each.take(5)
    buffer.drop_pending()
    assert buffer.num_pending == 0 and buffer.unused_ids(1).equal(ended.unused_ids(1))
    for found, wanted in zip((buffer.take(2), _then_other(buffer)), (ended.take(2), _then_other(ended))):
        assert torch.equal(found.points, wanted.points) and torch.equal(found.visibility, wanted.visibility)
        assert torch.equal(found.ids, wanted.ids)


def test_what_was_dropped_before_it_was_read_leaves_no_tracks() -> None:
    buffer = _buffer()
    buffer.push(_tracks(3))
    buffer.drop_pending()
    assert buffer.take(1).num_tracks == 0
    buffer.push(_tracks(2, count=1, ids=[7]))
    assert buffer.take(2).ids.tolist() == [[7]]


def _then_other(buffer: TrackBuffer) -> Tracks:
    buffer.push(_tracks(3, start=20))
    return buffer.take(4)


def test_what_was_pushed_does_not_change_with_the_arrays_that_it_came_from() -> None:
    buffer, tracks = _buffer(), _tracks(4, ids=[4, 5, 6])
    buffer.push(tracks)
    tracks.points.zero_(), tracks.visibility.zero_(), tracks.ids.zero_()
    taken = buffer.take(4)
    assert taken.points[0, :, 0, 1].tolist() == [0, 1, 2, 3] and taken.visibility.all()
    assert taken.ids[0].tolist() == [4, 5, 6]


def test_motion_pushed_ahead_is_not_copied_with_each_chunk() -> None:
    buffer = _buffer()
    buffer.push(_tracks(1000))

    def storage() -> int:
        return buffer.snapshot().pushed.parts[0].points.untyped_storage().data_ptr()

    before = storage()
    buffer.take(9)
    buffer.push(_tracks(5, count=4))
    taken = buffer.take(12)
    assert storage() == before and buffer.num_pending == 984
    assert taken.points[0, :, 0, 1].tolist() == list(range(9, 21)) and taken.num_tracks == 4


def test_snapshot_and_restore() -> None:
    buffer = _buffer()
    buffer.push(_tracks(6))
    buffer.take(2)
    state = buffer.snapshot()
    first = buffer.take(3).points
    buffer.push(_tracks(4, start=50))
    buffer.restore(state)
    torch.testing.assert_close(buffer.take(3).points, first)
    assert buffer.num_pending == 1


def test_what_is_returned_to_knows_nothing_of_later_drags() -> None:
    """The same drag takes the same identities again: it would else make another chunk."""
    buffer = _buffer()
    state, first = buffer.snapshot(), buffer.unused_ids(2)
    buffer.lead(_tracks(2, count=2, ids=first.tolist()))
    buffer.take(2)
    buffer.stop_leading()
    buffer.restore(state)
    assert buffer.unused_ids(2).equal(first)


def test_of_two_tracks_in_one_cell_the_led_and_then_the_later_is_in_front() -> None:
    """Tracks are told in this order, and the first wins the cell."""
    buffer = _buffer()
    buffer.push(_tracks(2, count=2, ids=[7, 8]))
    buffer.push(_tracks(2, count=2, start=2, ids=[9, 8]))
    assert buffer.take(3).ids.tolist() == [[9, 8, 7]]
    buffer.lead(_tracks(1, count=1, ids=[8]))
    assert buffer.take(1).ids.tolist() == [[8, 9]]


def test_new_tracks_take_no_identity_of_the_columns_to_come() -> None:
    buffer = _buffer()
    reserved = buffer.reserve_ids(5)
    buffer.push(_tracks(2, count=5))
    assert not set(reserved.tolist()) & set(buffer.take(2).ids[0].tolist())


def test_an_empty_buffer_gives_no_tracks_and_another_resolution_is_refused() -> None:
    buffer = _buffer()
    assert buffer.take(9).num_tracks == 0
    with pytest.raises(ValueError, match=r"64x64 px must be at 32x32.*resize_to"):
        buffer.push(_tracks(2, size=64))
    with pytest.raises(ValueError, match="ending='stop'"):
        TrackBuffer(8, 8, ending="stop", rng=torch.Generator())


def test_no_frames_and_more_tracks_than_identities_are_refused() -> None:
    with pytest.raises(ValueError, match="tracks hold 0 frames; push at least one"):
        _buffer().push(_tracks(0))
    with pytest.raises(ValueError, match="tracks hold 10001 tracks; a stream follows at most 10000"):
        _buffer().push(_tracks(1, count=10_001))


@pytest.mark.parametrize("identity", [-1, NUM_TRACK_IDS, 2**40])
def test_identities_that_no_student_has_learned_are_refused(identity: int) -> None:
    buffer = _buffer()
    with pytest.raises(ValueError, match=rf"tracks.ids holds {identity}; identities are 0..9999.*unused_track_ids"):
        buffer.push(_tracks(2, ids=[1, identity, 3]))
    buffer.push(_tracks(2, ids=[0, NUM_TRACK_IDS - 1, 3]))
    assert buffer.num_pending == 2


def _seen(buffer: TrackBuffer, count: int) -> dict[int, list[list[float]]]:
    """Points of each identity in the frames to come, where it is seen in all of them."""
    tracks = buffer.peek(count)
    shown = tracks.visibility[0].all(0).tolist()
    return {n: tracks.points[0, :, i].tolist() for i, n in enumerate(tracks.ids[0].tolist()) if shown[i]}


def test_a_track_that_is_led_goes_there_whatever_is_pushed_and_holds_in_the_end() -> None:
    buffer = _buffer()
    buffer.push(_tracks(6, ids=[1, 2, 3]))
    buffer.take(2)
    buffer.lead(_tracks(3, count=1, start=20, ids=[2]))
    state, found = buffer.snapshot(), _seen(buffer, 5)
    assert found[2] == [[0, 20], [0, 21], [0, 22], [0, 22], [0, 22]]  # held beyond its end
    assert found[1][-1] == [0, 5] and set(found) == {1, 2, 3}  # the others follow what is pushed
    buffer.take(1)
    buffer.lead(_tracks(1, count=1, start=30, ids=[3]))  # beside one that is still on its way
    assert _seen(buffer, 2) == {1: [[0, 3], [0, 4]], 2: [[0, 21], [0, 22]], 3: [[0, 30], [0, 30]]}
    buffer.release([2])
    assert set(_seen(buffer, 2)) == {1, 3}
    buffer.restore(state)
    assert _seen(buffer, 5) == found


def test_what_is_seen_is_where_it_was_led() -> None:
    buffer = _buffer()
    buffer.push(_tracks(2, count=2, ids=[1, 2]))
    buffer.take(2)
    assert buffer.seen().ids[0].tolist() == [1, 2] and buffer.seen().points[0, 0, :, 1].tolist() == [1, 1]
    buffer.lead(_tracks(2, count=1, start=19, ids=[2]))
    buffer.take(2)
    assert buffer.seen().ids[0].tolist() == [1, 2] and buffer.seen().points[0, 0, :, 1].tolist() == [1, 20]
    assert not {1, 2} & set(buffer.unused_ids(50).tolist()) and len(set(buffer.unused_ids(50).tolist())) == 50


def test_an_identity_that_alone_would_stand_for_none_is_given_to_nobody() -> None:
    buffer = _buffer()
    assert 0 not in buffer.unused_ids(NUM_TRACK_IDS - 1).tolist()


def test_reserved_identities_are_given_out_again_only_when_no_others_are_left() -> None:
    buffer = _buffer()
    state = buffer.snapshot()
    first = buffer.reserve_ids(10).tolist()
    buffer.restore(state)
    rest = buffer.reserve_ids(NUM_TRACK_IDS - 11).tolist()
    assert not set(first) & set(rest)
    assert len(buffer.unused_ids(NUM_TRACK_IDS - 1)) == NUM_TRACK_IDS - 1
    buffer.push(_tracks(2, count=1, ids=first[:1]))
    buffer.take(2)
    buffer.push(_tracks(2, count=1, ids=[first[1]]))
    buffer.take(2)
    assert buffer.unused_ids(1).tolist() == first[:1], "its stroke has come and ended; the others' may come"


def test_the_identity_of_a_stroke_that_ended_is_given_to_no_other_while_there_are_new_ones() -> None:
    buffer = _buffer()
    (first,) = buffer.unused_ids(1).tolist()
    buffer.push(_tracks(2, count=1, ids=[first]))
    buffer.take(2)
    buffer.push(_tracks(2, count=1, ids=[7]))  # without the first, which is released
    buffer.take(4)
    assert first not in buffer.unused_ids(NUM_TRACK_IDS - 3).tolist()
    assert first == buffer.unused_ids(NUM_TRACK_IDS - 2)[-1]
    with pytest.raises(ValueError, match=f"{NUM_TRACK_IDS - 1} new tracks need identities, and {NUM_TRACK_IDS - 2} of"):
        buffer.unused_ids(NUM_TRACK_IDS - 1)
    buffer.release([first])  # what is pushed for it is not followed any more
    with pytest.raises(ValueError, match=f"and {NUM_TRACK_IDS - 3} of"):
        buffer.reserve_ids(NUM_TRACK_IDS - 2)
