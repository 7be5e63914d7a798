"""The identity map against a slow reference, and each known trap by name."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from models.motion.embedding import id_encoding, scatter_tracks
from models.motion.tracks import Tracks, sample_track_ids

SIZE = (32, 48)  # px
CELLS = {"height_cells": 4, "width_cells": 6, "cell_px": 8}


def tracks_at(points: list, visibility: list | None = None, ids: list[int] | None = None) -> Tracks:
    """One clip from [T][N] points."""
    points = torch.tensor(points, dtype=torch.float32)[None]
    visible = torch.ones(points.shape[:3], dtype=torch.bool) if visibility is None else torch.tensor(visibility)[None]
    ids = torch.tensor([ids if ids is not None else list(range(1, points.shape[2] + 1))])
    return Tracks(points, visible, ids, *SIZE)


def scatter(tracks: Tracks, dim: int = 16, rng: torch.Generator | None = None) -> torch.Tensor:
    return scatter_tracks(tracks, dim=dim, rng=rng, **CELLS)


def reference(tracks: Tracks, dim: int) -> torch.Tensor:
    """Loop over points, last written wins, hence from the highest index down."""
    batch, num_frames, num_tracks, _ = tracks.points.shape
    codes = id_encoding(tracks.ids, dim)
    result = torch.zeros(batch, dim, num_frames, CELLS["height_cells"], CELLS["width_cells"])
    for b in range(batch):
        for t in range(num_frames):
            for n in reversed(range(num_tracks)):
                x, y = tracks.points[b, t, n].tolist()
                inside = 0 <= x < tracks.width and 0 <= y < tracks.height
                if tracks.visibility[b, t, n] and inside:
                    result[b, :, t, math.floor(y / 8), math.floor(x / 8)] = codes[b, n]
    return result


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 2), st.integers(1, 4), st.integers(0, 40))
def test_equals_the_slow_reference(seed, batch, num_frames, num_tracks):
    rng = torch.Generator().manual_seed(seed)
    points = torch.rand(batch, num_frames, num_tracks, 2, generator=rng) * 80 - 16  # many outside
    visibility = torch.rand(batch, num_frames, num_tracks, generator=rng) > 0.4
    tracks = Tracks(points, visibility, sample_track_ids(batch, num_tracks, rng), *SIZE)
    assert torch.equal(scatter(tracks), reference(tracks, 16))


def test_x_is_the_column_and_y_the_row():
    image = scatter(tracks_at([[[41.0, 9.0]]]))
    assert image.any(1).nonzero().tolist() == [[0, 0, 1, 5]]


def test_an_occluded_track_never_erases_a_visible_one():
    points = [[[9.0, 9.0], [10.0, 10.0], [11.0, 11.0]]]
    for visible in range(3):
        visibility = [[index == visible for index in range(3)]]
        image = scatter(tracks_at(points, visibility))
        assert torch.equal(image[0, :, 0, 1, 1], id_encoding(torch.tensor(visible + 1), 16))


@pytest.mark.parametrize(
    "point",
    [[-3.0, 4.0], [4.0, -0.01], [48.0, 4.0], [4.0, 32.0], [1e9, 1.0], [-1e30, 1.0], [float("nan"), 1.0]],
)
def test_points_outside_the_frame_are_dropped_not_clamped(point):
    assert not scatter(tracks_at([[point]])).any()


@pytest.mark.parametrize("point", [[0.0, 0.0], [47.999, 31.999]])
def test_points_on_the_border_of_the_frame_are_kept(point):
    assert scatter(tracks_at([[point]])).any(1).sum() == 1


def test_identities_are_constant_over_time():
    moving = [[[1.0 + 8 * t, 1.0]] for t in range(4)]
    image = scatter(tracks_at(moving, ids=[777]))
    code = id_encoding(torch.tensor(777), 16)
    for t in range(4):
        assert torch.equal(image[0, :, t, 0, t], code)


def test_a_stretch_of_frames_gives_the_same_map_as_the_whole_stream():
    rng = torch.Generator().manual_seed(1)
    points = torch.rand(2, 9, 30, 2, generator=rng) * 40
    tracks = Tracks(points, torch.ones(2, 9, 30, dtype=torch.bool), sample_track_ids(2, 30, rng), *SIZE)
    whole = scatter(tracks)
    assert torch.equal(scatter(tracks.frames(slice(5, 9))), whole[:, :, 5:9])


def test_the_lowest_index_wins_without_a_generator():
    image = scatter(tracks_at([[[9.0, 9.0], [9.0, 9.0]]], ids=[42, 7]))
    assert torch.equal(image[0, :, 0, 1, 1], id_encoding(torch.tensor(42), 16))


def test_a_generator_lets_each_track_win_sometimes_but_one_per_clip():
    points = [[[9.0, 9.0]] * 3, [[20.0, 20.0]] * 3]
    tracks = Tracks.stack([tracks_at(points)] * 64)
    image = scatter(tracks, rng=torch.Generator().manual_seed(0))
    codes = id_encoding(torch.tensor([1, 2, 3]), 16)
    first, second = image[:, :, 0, 1, 1], image[:, :, 1, 2, 2]
    assert torch.equal(first, second)  # the priority of a clip does not change with time
    winners = torch.cdist(first, codes).argmin(1)
    assert set(winners.tolist()) == {0, 1, 2}
    assert torch.equal(first, codes[winners])  # never a mixture
    assert torch.equal(image, scatter(tracks, rng=torch.Generator().manual_seed(0)))


def test_order_of_the_tracks_does_not_matter_where_none_collide():
    points = [[[8.0 * n + 1, 1.0] for n in range(6)]]
    tracks = tracks_at(points, ids=[5, 3, 9, 100, 2, 70])
    assert torch.equal(scatter(tracks), scatter(tracks.select(torch.tensor([3, 1, 0, 5, 4, 2]))))


def test_no_tracks_is_the_null():
    image = scatter(Tracks.empty(2, 5, *SIZE))
    assert image.shape == (2, 16, 5, 4, 6) and not image.any()


def test_codes_of_integer_ids_have_one_norm_and_stay_apart():
    ids = sample_track_ids(1, 2500, torch.Generator().manual_seed(0))[0]
    codes = id_encoding(ids)
    torch.testing.assert_close(codes.norm(dim=1), torch.full((2500,), math.sqrt(32)), atol=1e-4, rtol=0)
    distances = torch.cdist(codes, codes, compute_mode="donot_use_mm_for_euclid_dist")
    assert distances.fill_diagonal_(9.0).min() > 1.0
    with pytest.raises(ValueError, match="dim=5 must be even"):
        id_encoding(ids, 5)


def test_tracks_in_another_resolution_are_refused_with_the_remedy():
    with pytest.raises(ValueError, match=r"32x48 px.*needs 64x96; use tracks.resize_to\(64, 96\)"):
        scatter_tracks(tracks_at([[[1.0, 1.0]]]), dim=16, height_cells=8, width_cells=12, cell_px=8)


def test_offsets_tell_where_in_its_cell_the_winner_lies() -> None:
    """Two tracks share a cell: the winner's offset is written; an unseen track at infinity leaves nothing."""
    points = [[[3.0, 20.0], [5.0, 17.0], [float("inf"), 4.0], [47.9, 8.0]]]
    tracks = tracks_at(points, [[True, True, False, True]])
    features = scatter_tracks(tracks, dim=16, with_offsets=True, **CELLS)
    assert torch.equal(features[:, :16], scatter(tracks))
    offsets = features[0, 16:, 0]
    assert offsets[:, 2, 0].tolist() == [3 / 8 * 2 - 1, 4 / 8 * 2 - 1]
    assert offsets[:, 1, 5].tolist() == pytest.approx([7.9 / 8 * 2 - 1, -1.0], abs=1e-5)
    offsets[:, 2, 0] = offsets[:, 1, 5] = 0
    assert not offsets.any()


@settings(deadline=None, max_examples=25)
@given(st.integers(0, 2**31 - 1))
def test_cell_and_offset_give_the_point_back(seed: int) -> None:
    rng = torch.Generator().manual_seed(seed)
    points = torch.rand(1, 3, 1, 2, generator=rng) * torch.tensor([SIZE[1], SIZE[0]])
    tracks = Tracks(points, torch.ones(1, 3, 1, dtype=torch.bool), torch.tensor([[7]]), *SIZE)
    features = scatter_tracks(tracks, dim=16, with_offsets=True, rng=rng, **CELLS)
    for frame, (x, y) in enumerate(points[0, :, 0].tolist()):
        row, column = features[0, :16, frame].abs().sum(0).nonzero()[0].tolist()
        found = (features[0, 16:, frame, row, column] + 1) / 2 * 8 + torch.tensor([column, row]) * 8
        assert found.tolist() == pytest.approx([x, y], abs=1e-4)
