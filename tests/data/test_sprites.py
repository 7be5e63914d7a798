"""The sprites world: determinism, exact tracks, occlusion, captions, and that Lucas-Kanade can measure it."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf

from data.app import compose_config
from data.sprites import (
    COLORS,
    SHAPES,
    SPLITS,
    TEXTURES,
    SpritesConfig,
    render_clip,
    shape_distance,
    simulate,
    split_seed,
)
from data.trackers import TrackerConfig, build_tracker, grid_queries
from models.wan.text_encoder import SPRITES_VOCABULARY

CAPTION_WORDS = {"a", "an", "and", "on", "background", "then", "the", "turns", *COLORS, *TEXTURES, *SHAPES}


def queries_at(frame: int, points: np.ndarray) -> np.ndarray:
    return np.concatenate([np.full((len(points), 1), frame), points], axis=1)


def test_same_seed_same_bytes_and_other_seed_other_clip():
    cfg = SpritesConfig(height=32, width=32, num_frames=9)
    first, again, other = render_clip(cfg, 5), render_clip(cfg, 5), render_clip(cfg, 6)
    assert np.array_equal(first.frames, again.frames) and first.caption == again.caption
    assert not np.array_equal(first.frames, other.frames)


def test_shapes_and_types():
    clip = render_clip(SpritesConfig(height=32, width=48, num_frames=5, min_sprites=2, max_sprites=2), 1)
    assert clip.frames.shape == (5, 32, 48, 3) and clip.frames.dtype == np.uint8
    assert clip.masks.shape == (2, 5, 32, 48) and clip.masks.dtype == bool
    assert clip.poses.shape == (2, 5, 5)


@given(st.integers(0, 10**9), st.sampled_from(SPLITS), st.integers(0, 10**9), st.sampled_from(SPLITS))
def test_splits_never_share_a_seed(index, split, other_index, other_split):
    same = (index, split) == (other_index, other_split)
    assert (split_seed(split, index) == split_seed(other_split, other_index)) == same


@pytest.mark.parametrize(
    "field, value",
    [
        ("min_sprites", 0),
        ("max_sprites", 6),
        ("background", "starry"),
        ("height", 8),
        ("min_speed", 0.0),
        ("shapes", ["disc", "sphere"]),
        ("leave_margin", -0.5),
        ("rest_ratio", 1.5),
    ],
)
def test_config_is_refused_by_field(field, value):
    with pytest.raises(ValueError, match=field):
        SpritesConfig(**{field: value})


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10**6))
def test_tracks_agree_whichever_frame_they_are_queried_at(seed):
    """A visible point taken up again at a later frame continues on the same path."""
    scene = simulate(SpritesConfig(height=64, width=64, num_frames=17), seed)
    points, visibility = scene.track(queries_at(0, grid_queries(64, 64, 6, 6)))
    again, seen_again = scene.track(queries_at(9, points[9]))
    held = visibility[9] & seen_again[9]  # seen, and not on an outline, at frame 9
    assert held.any()
    assert np.allclose(again[:, held], points[:, held], atol=1e-3)


def test_pixels_move_with_the_tracks():
    """The colour at a track stays: the renderer and the tracks describe the same motion."""
    cfg = SpritesConfig(events=False)
    errors, still_errors = [], []
    for seed in range(6):
        clip = render_clip(cfg, seed)
        points, visibility = clip.track(queries_at(0, grid_queries(64, 64, 12, 12)))
        pixel = np.floor(points).astype(int).clip(0, 63)
        colors = np.stack([clip.frames[t, pixel[t, :, 1], pixel[t, :, 0]] for t in range(33)]).astype(float)
        still = np.broadcast_to(pixel[:1], pixel.shape)
        unmoved = np.stack([clip.frames[t, still[t, :, 1], still[t, :, 0]] for t in range(33)]).astype(float)
        errors.append(np.abs(colors - colors[0])[visibility].mean())
        still_errors.append(np.abs(unmoved - unmoved[0])[visibility].mean())
    assert np.mean(errors) < 10 < 0.5 * np.mean(still_errors)  # nearest pixel: the rest is rounding


def test_masks_and_visibility_agree_with_z_order():
    clip = render_clip(SpritesConfig(min_sprites=3, max_sprites=3), 3)
    assert (clip.masks.sum(0) <= 1).all(), "masks show the visible part: they never overlap"
    grid = grid_queries(64, 64, 32, 32)
    for t in (0, 20):
        points, visibility = clip.track(queries_at(t, grid))
        assert np.allclose(points[t], grid, atol=1e-3)
        column, row = np.floor(grid).astype(int).T
        owner = np.where(clip.masks[:, t, row, column].any(0), clip.masks[:, t, row, column].argmax(0), -1)
        later = (t + 8) % 33
        column, row = np.floor(points[later]).astype(int).clip(0, 63).T
        owner_later = np.where(
            clip.masks[:, later, row, column].any(0), clip.masks[:, later, row, column].argmax(0), -1
        )
        seen = visibility[t] & visibility[later]
        assert (owner == owner_later)[seen].mean() > 0.97  # pixels on outlines may round either way


def test_points_outside_the_frame_are_invisible():
    clip = render_clip(SpritesConfig(background="panning", max_pan_speed=1.0), 2)
    points, visibility = clip.track(queries_at(0, grid_queries(64, 64, 8, 8)))
    outside = (points < 0).any(-1) | (points >= 64).any(-1)
    assert outside.any() and not visibility[outside].any()


def test_no_occlusion_keeps_sprites_apart():
    cfg = SpritesConfig(occlusion=False, min_sprites=2, max_sprites=2, max_speed=0.4, max_size=0.32)
    for seed in range(10):
        scene = simulate(cfg, seed)
        if len(scene.sprites) == 2:
            first, second = scene.sprites
            gap = np.linalg.norm(first.pose.center - second.pose.center, axis=1)
            assert (gap > first.radius_px + second.radius_px).all()


def test_a_negative_margin_keeps_paths_inside():
    cfg = SpritesConfig(leave_margin=-0.25, max_sprites=1, max_speed=0.4)
    for seed in range(20):
        center = simulate(cfg, seed).sprites[0].pose.center
        assert center.min() > 0.25 * 64 - 4 and center.max() < 0.75 * 64 + 4  # a spline swings past its knots


def test_same_look_makes_a_name_an_appearance():
    cfg = SpritesConfig(same_look=True, shapes=["disc", "square"], max_sprites=1)
    looks: dict[tuple[str, str], list] = {}
    for seed in range(30):
        sprite = simulate(cfg, seed).sprites[0]
        assert sprite.shape in cfg.shapes and sprite.pose.angle[0] == 0
        looks.setdefault((sprite.shape, sprite.texture), []).append(sprite.waves)
    assert len(looks) == 6 and max(map(len, looks.values())) > 1
    for waves in looks.values():
        assert all(np.array_equal(waves[0].phases, other.phases) for other in waves)
    assert len({waves[0].phases[0] for waves in looks.values()}) == 6


def test_events_change_colour_but_not_motion_and_are_told():
    cfg = SpritesConfig(event_ratio=1.0)
    seed = next(s for s in range(50) if "background turns" not in simulate(cfg, s).caption)
    clip, plain = render_clip(cfg, seed), render_clip(SpritesConfig(events=False), seed)
    assert clip.caption.startswith(plain.caption) and " turns " in clip.caption
    assert np.array_equal(clip.poses, plain.poses)
    assert np.array_equal(clip.frames[0], plain.frames[0])
    assert not np.array_equal(clip.frames[-1], plain.frames[-1])


def test_captions_use_the_vocabulary():
    assert set(SPRITES_VOCABULARY) >= CAPTION_WORDS
    words = {w for s in range(100) for w in simulate(SpritesConfig(event_ratio=0.8), s).caption.split()}
    assert words <= CAPTION_WORDS and {"turns", "an", "background"} <= words


def test_long_clips_continue_short_ones():
    short = simulate(SpritesConfig(num_frames=17, events=False), 4)
    long = simulate(SpritesConfig(num_frames=200, events=False), 4)
    assert len(long.sprites[0].pose.angle) == 200
    assert np.isfinite(long.sprites[0].pose.center).all()
    assert short.sprites[0].shape == long.sprites[0].shape


def centers(seed: int, **world: object) -> list[np.ndarray]:
    return [sprite.pose.center for sprite in simulate(SpritesConfig(background="static", **world), seed).sprites]


def test_the_asked_share_of_the_sprites_rests():
    def rests(path: np.ndarray) -> bool:
        return bool(np.any(np.all(np.diff(path, axis=0) == 0, axis=1)))

    counts = [rests(path) for seed in range(150) for path in centers(seed, rest_ratio=0.4)]
    assert 0.33 < np.mean(counts) < 0.47
    assert not any(rests(path) for seed in range(20) for path in centers(seed))
    assert all(rests(path) for seed in range(20) for path in centers(seed, rest_ratio=1.0))


def test_a_sprite_that_rests_stays_on_its_path_and_its_tracks_stand_still():
    for seed in range(10):
        for moving, resting in zip(centers(seed), centers(seed, rest_ratio=1.0), strict=True):
            distance = np.linalg.norm(resting[:, None] - moving[None], axis=-1)
            assert (distance.min(axis=1) == 0).all() and (np.diff(distance.argmin(axis=1)) >= 0).all()
    alone = SpritesConfig(max_sprites=1, rest_ratio=1.0, events=False, background="static")
    clip = render_clip(alone, 3)
    still = np.flatnonzero(np.all(np.diff(clip.poses[0], axis=0) == 0, axis=1))
    inside = np.argwhere(clip.masks[0, 0])[:, ::-1]
    tracks, _ = clip.track(queries_at(0, inside))
    assert len(still) and np.array_equal(tracks[still], tracks[still + 1])
    assert np.array_equal(clip.frames[still], clip.frames[still + 1])


def test_rests_do_not_depend_on_the_length_of_the_clip():
    cfg = {"rest_ratio": 0.5, "fps": 8}
    for seed in range(10):
        for short, long in zip(centers(seed, num_frames=25, **cfg), centers(seed, num_frames=60, **cfg), strict=True):
            rest_short, rest_long = (np.all(np.diff(path, axis=0) == 0, axis=1) for path in (short, long))
            assert np.array_equal(rest_short, rest_long[:24])


def test_query_beyond_the_clip_is_refused():
    with pytest.raises(ValueError, match="0..8"):
        simulate(SpritesConfig(num_frames=9), 0).track(np.array([[9, 1, 1]]))


def test_shape_distance_sign():
    zero = np.zeros(1)
    for shape in ("disc", "square", "triangle", "cross"):
        assert shape_distance(shape, zero, zero) < 0
    assert shape_distance("ring", zero, zero) > 0  # the hole shows what is behind
    for shape in ("disc", "square", "triangle", "ring", "cross"):
        assert shape_distance(shape, zero + 1.31, zero) > 0


def zoo_world() -> SpritesConfig:
    cfg = compose_config("data", ["source=sprites", "model=sprites"])
    return SpritesConfig(**OmegaConf.to_container(cfg.source.world, resolve=True))


@pytest.mark.parametrize("world", [lambda: SpritesConfig(max_sprites=2), zoo_world], ids=["default", "zoo"])
def test_lucas_kanade_measures_the_world_within_a_tenth_of_a_cell(world):
    """Mean end-point error against exact tracks: <= 0.4 px where a latent cell is 4 px."""
    cfg, errors = world(), []
    queries = grid_queries(64, 64, 16, 16)
    for index in range(3):
        clip = render_clip(cfg, split_seed("val", index))
        exact, visibility = clip.track(queries_at(0, queries))
        found, _ = build_tracker(TrackerConfig(max_layers=6)).track(clip.frames, queries)
        errors.append(np.linalg.norm(found - exact, axis=-1)[1:][visibility[1:]].mean())
    assert np.mean(errors) <= 0.4, errors
