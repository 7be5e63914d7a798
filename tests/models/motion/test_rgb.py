"""Drawn tracks: colours follow identities, visibility and front-to-back order are respected."""

from __future__ import annotations

import torch

from models.motion.rgb import draw_tracks, id_colours
from models.motion.tracks import Tracks, sample_track_ids


def tracks_at(points: list, ids: list[int], visibility: list | None = None) -> Tracks:
    points = torch.tensor(points, dtype=torch.float32)[None]
    visible = torch.ones(points.shape[:3], dtype=torch.bool) if visibility is None else torch.tensor(visibility)[None]
    return Tracks(points, visible, torch.tensor([ids]), 24, 32)


def test_a_disc_has_its_colour_at_its_place_and_black_elsewhere():
    pixels = draw_tracks(tracks_at([[[20.5, 7.5]]], [31]))
    assert pixels.shape == (1, 3, 1, 24, 32)
    torch.testing.assert_close(pixels[0, :, 0, 7, 20], id_colours(torch.tensor(31)), atol=1e-6, rtol=0)
    rows, columns = (pixels[0, :, 0] > -1).any(0).nonzero().unbind(1)
    assert (rows.min(), rows.max(), columns.min(), columns.max()) == (5, 9, 18, 22)


def test_colours_do_not_change_between_frames_or_neighbours():
    moving = draw_tracks(tracks_at([[[4.5, 4.5], [20.5, 4.5]], [[9.5, 12.5], [20.5, 20.5]]], [5, 9000]))
    alone = draw_tracks(tracks_at([[[9.5, 12.5]]], [5]))
    assert torch.equal(moving[0, :, 0, 4, 4], moving[0, :, 1, 12, 9])
    assert torch.equal(moving[0, :, 1, 12, 9], alone[0, :, 0, 12, 9])


def test_invisible_and_outside_tracks_are_not_drawn():
    points = [[[9.5, 9.5], [-1.0, 9.5], [9.5, 24.0], [float("nan"), 3.0]]]
    pixels = draw_tracks(tracks_at(points, [1, 2, 3, 4], [[False, True, True, True]]))
    assert (pixels == -1).all()


def test_the_lower_index_is_in_front():
    pixels = draw_tracks(tracks_at([[[9.5, 9.5], [9.5, 9.5]]], [100, 200]))
    torch.testing.assert_close(pixels[0, :, 0, 9, 9], id_colours(torch.tensor(100)), atol=1e-6, rtol=0)


def test_colours_are_distinct_bright_and_in_range():
    colours = id_colours(torch.arange(10_000))
    assert colours.min() >= -1 and colours.max() <= 1
    assert colours.max(1).values.min() > 0.1
    assert len(colours.unique(dim=0)) == 10_000
    assert (colours[2584:] - colours[:-2584]).abs().amax(1).min() > 0.1, "of nearly one hue, but not as bright"


def test_a_crowd_is_deterministic_and_in_range():
    rng = torch.Generator().manual_seed(0)
    tracks = Tracks(
        torch.rand(2, 5, 60, 2, generator=rng) * 40 - 4,
        torch.rand(2, 5, 60, generator=rng) > 0.3,
        sample_track_ids(2, 60, rng),
        24,
        32,
    )
    pixels = draw_tracks(tracks)
    assert torch.equal(pixels, draw_tracks(tracks))
    assert torch.isfinite(pixels).all() and pixels.min() >= -1 and pixels.max() <= 1
    assert torch.equal(draw_tracks(tracks.frames(slice(2, 4))), pixels[:, :, 2:4])
    assert (draw_tracks(Tracks.empty(1, 5, 24, 32)) == -1).all()
