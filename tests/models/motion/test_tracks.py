"""The Tracks type: shapes, geometry, selection and files."""

from __future__ import annotations

import json
import zipfile

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from models.motion.tracks import Tracks, centre_crop, sample_track_ids


def random_tracks(batch: int = 2, num_frames: int = 5, num_tracks: int = 7, seed: int = 0) -> Tracks:
    rng = torch.Generator().manual_seed(seed)
    return Tracks(
        points=torch.rand(batch, num_frames, num_tracks, 2, generator=rng) * torch.tensor([64.0, 48.0]),
        visibility=torch.rand(batch, num_frames, num_tracks, generator=rng) > 0.3,
        ids=sample_track_ids(batch, num_tracks, rng),
        height=48,
        width=64,
    )


def same(first: Tracks, second: Tracks) -> bool:
    size = (first.height, first.width) == (second.height, second.width)
    tensors = [(first.points, second.points), (first.visibility, second.visibility), (first.ids, second.ids)]
    return size and all(torch.equal(a, b) for a, b in tensors)


@settings(max_examples=40, deadline=None)  # the first comparison imports for long
@given(st.integers(1, 12))
def test_resizing_at_the_same_aspect_keeps_relative_positions_and_comes_back(factor):
    tracks = random_tracks()
    resized = tracks.resize_to(48 * factor, 64 * factor)
    torch.testing.assert_close(resized.points, tracks.points * factor)
    assert (resized.height, resized.width) == (48 * factor, 64 * factor)
    torch.testing.assert_close(resized.resize_to(48, 64).points, tracks.points, atol=1e-4, rtol=1e-5)


def test_another_aspect_is_cropped_in_the_middle():
    tracks = Tracks.from_arrays(np.array([[[16.0, 8.0], [2.0, 5.0]]]), np.array([[True, True]]), height=10, width=20)
    assert tracks.resize_to(20, 20).points[0, 0].tolist() == [[22.0, 16.0], [-6.0, 10.0]]  # columns 5 to 14 are kept


@given(st.tuples(st.integers(1, 500), st.integers(1, 500)), st.tuples(st.integers(1, 500), st.integers(1, 500)))
def test_a_crop_lies_in_the_frame(have, want):
    top, left, height, width = centre_crop(have, want)
    assert 0 <= top <= top + height <= have[0] and 0 <= left <= left + width <= have[1] and min(height, width) >= 1


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"points": np.zeros((3, 4, 2)).tolist()}, r"points \(3, 4, 2\) must be \[T, N, 2\] and visibility \(4, 3\)"),
        ({"points": [["a"]]}, "could not convert string to float"),
        ({"height": "64px"}, "height and width whole pixels"),
        ({"height": float("inf")}, "height and width whole pixels"),
        ({"height": 64.5}, "height=64.5; .* height and width whole pixels"),
        ({"height": 0}, "height=0 and width=64 must be at least 1 px"),
        ({"points": [[[1, 2]]], "visibility": []}, r"points \(1, 1, 2\) must be \[T, N, 2\] and visibility \(0,\)"),
        ({"visibility": [["no"] * 3] * 4}, "visibility holds 'no'.*must be true or false"),
        ({"visibility": [[1, 0, 0.97]] * 4}, "visibility holds '0.97'.*compare them with its threshold"),
    ],
)
def test_a_track_file_that_cannot_be_read_is_named(tmp_path, fields, message):
    content = {"height": 64, "width": 64, "points": np.zeros((4, 3, 2)).tolist(), "visibility": [[True] * 3] * 4}
    (tmp_path / "t.json").write_text(json.dumps(content | fields))
    with pytest.raises(ValueError, match=f"t.json: .*{message}"):
        Tracks.load(tmp_path / "t.json")


@pytest.mark.parametrize("name", ["t.json", "t.npz"])
def test_a_broken_track_file_is_named(tmp_path, name):
    (tmp_path / name).write_bytes(b"{broken")
    with pytest.raises(ValueError, match=f"{name}: n"):
        Tracks.load(tmp_path / name)


@pytest.mark.parametrize(
    ("name", "content", "kind"),
    [("t.json", np.zeros((4, 3, 2)).tolist(), "list"), ("t.json", 7, "int"), ("t.npz", np.zeros((4, 3, 2)), "ndarray")],
)
def test_a_file_without_fields_is_told_what_it_must_hold(tmp_path, name, content, kind):
    with (tmp_path / name).open("wb") as file:
        np.save(file, content) if name == "t.npz" else file.write(json.dumps(content).encode())
    message = f"{name}: holds one {kind}; a track file has points, visibility, height, width"
    with pytest.raises(ValueError, match=message):
        Tracks.load(tmp_path / name)


@pytest.mark.parametrize("name", ["t.json", "t.npz"])
def test_an_empty_and_a_missing_track_file_are_told_apart(tmp_path, name):
    with pytest.raises(FileNotFoundError, match=name):
        Tracks.load(tmp_path / name)
    (tmp_path / name).touch()
    with pytest.raises(ValueError, match=f"{name}: not"):
        Tracks.load(tmp_path / name)


@settings(max_examples=40)
@given(st.integers(0, 5), st.integers(0, 5))
def test_stretches_of_frames_join_to_the_whole(first, second):
    tracks = random_tracks()
    low, high = sorted((first, second))
    parts = [tracks.frames(s) for s in (slice(0, low), slice(low, high), slice(high, None))]
    assert torch.equal(torch.cat([part.points for part in parts], 1), tracks.points)
    assert torch.equal(torch.cat([part.visibility for part in parts], 1), tracks.visibility)


@settings(max_examples=40)
@given(st.lists(st.integers(0, 6), min_size=1, max_size=9))
def test_selection_takes_points_visibility_and_ids_together(index):
    tracks = random_tracks()
    chosen = tracks.select(torch.tensor(index))
    assert torch.equal(chosen.points, tracks.points[:, :, index])
    assert torch.equal(chosen.visibility, tracks.visibility[:, :, index])
    assert torch.equal(chosen.ids, tracks.ids[:, index])


def test_selection_per_clip():
    tracks = random_tracks()
    chosen = tracks.select(torch.tensor([[0, 1], [6, 2]]))
    assert torch.equal(chosen.points[1], tracks.points[1][:, [6, 2]])
    assert torch.equal(chosen.ids[0], tracks.ids[0, [0, 1]])


def test_padding_is_invisible_and_stacking_pads():
    small, large = random_tracks(1, num_tracks=3), random_tracks(1, num_tracks=5)
    batch = Tracks.stack([small, large])
    assert batch.points.shape == (2, 5, 5, 2)
    assert not batch.visibility[0, :, 3:].any()
    assert torch.equal(batch.points[0, :, :3], small.points[0])
    assert torch.equal(batch.ids[0, :3], small.ids[0]) and torch.equal(batch.ids[1], large.ids[0])
    with pytest.raises(ValueError, match="num_tracks=4 must be at least the 5"):
        Tracks.pad(large, 4)


def test_released_tracks_are_seen_until_that_frame_and_not_in_it():
    tracks = random_tracks()
    released = tracks.released_at(3)
    assert torch.equal(released.visibility[:, :3], tracks.visibility[:, :3]) and not released.visibility[:, 3:].any()
    assert torch.equal(released.points, tracks.points)


def test_a_move_to_another_device_takes_all():
    moved = random_tracks().to("meta")
    assert {part.device.type for part in (moved.points, moved.visibility, moved.ids)} == {"meta"}


def test_joining_tracks_of_the_same_clips():
    tracks = random_tracks()
    halves = [tracks.select(torch.arange(0, 3)), tracks.select(torch.arange(3, 7))]
    assert same(halves[0].beside(halves[1]), tracks)


def test_joining_other_sizes_is_refused():
    with pytest.raises(ValueError, match="beside: num_frames differs"):
        random_tracks().beside(random_tracks(num_frames=4))
    with pytest.raises(ValueError, match="stack: height differs"):
        Tracks.stack([random_tracks(), random_tracks().resize_to(10, 64)])


@pytest.mark.parametrize("suffix", [".npz", ".json", ".NPZ", ".Json"])
def test_files_round_trip(tmp_path, suffix):
    tracks = random_tracks(batch=1).with_ids(torch.zeros(1, 7, dtype=torch.long))
    tracks.save(tmp_path / f"clip{suffix}")
    assert same(Tracks.load(tmp_path / f"clip{suffix}"), tracks)


@pytest.mark.parametrize("suffix", [".npz", ".json"])
def test_files_without_tracks_round_trip(tmp_path, suffix):
    Tracks.empty(1, 5, 48, 64).save(tmp_path / f"clip{suffix}")
    assert same(Tracks.load(tmp_path / f"clip{suffix}"), Tracks.empty(1, 5, 48, 64))


def test_a_damaged_npz_is_named(tmp_path):
    random_tracks(batch=1).save(path := tmp_path / "clip.npz")
    content = bytearray(path.read_bytes())
    with zipfile.ZipFile(path) as archive:
        start = archive.getinfo("points.npy").header_offset + 60
    content[start : start + 20] = b"\xff" * 20
    path.write_bytes(content)
    with pytest.raises(ValueError, match=f"{path}: not npz"):
        Tracks.load(path)


def test_broken_files_are_named(tmp_path):
    (tmp_path / "clip.json").write_text(json.dumps({"points": [], "height": 4, "width": 4}))
    with pytest.raises(ValueError, match=r"clip.json: no field \['visibility'\]"):
        Tracks.load(tmp_path / "clip.json")
    with pytest.raises(ValueError, match=r"suffix '\.csv' must be"):
        Tracks.load(tmp_path / "clip.csv")
    with pytest.raises(ValueError, match="batch_size=2 must be 1"):
        random_tracks().save(tmp_path / "clip.npz")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("points", torch.zeros(2, 5, 7, 3)),
        ("points", torch.zeros(2, 5, 7, 2, dtype=torch.float64)),
        ("visibility", torch.zeros(2, 5, 7)),
        ("visibility", torch.zeros(2, 5, 6, dtype=torch.bool)),
        ("ids", torch.zeros(2, 6, dtype=torch.long)),
        ("ids", torch.zeros(2, 7, dtype=torch.int32)),
    ],
)
def test_wrong_shapes_and_types_are_named(field, value):
    tracks = random_tracks()
    parts = {"points": tracks.points, "visibility": tracks.visibility, "ids": tracks.ids} | {field: value}
    with pytest.raises(ValueError, match=field):
        Tracks(**parts, height=48, width=64)


def test_ids_are_distinct_integers_and_reproducible():
    ids = sample_track_ids(3, 2500, torch.Generator().manual_seed(5))
    assert ids.shape == (3, 2500) and ids.dtype == torch.long
    assert all(len(set(row.tolist())) == 2500 for row in ids)
    assert ids.min() >= 0 and ids.max() <= 9999
    assert not torch.equal(ids[0], ids[1])
    assert torch.equal(ids, sample_track_ids(3, 2500, torch.Generator().manual_seed(5)))
    with pytest.raises(ValueError, match="num_tracks=10001"):
        sample_track_ids(1, 10_001, torch.Generator())
