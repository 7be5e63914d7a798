"""Slicing by chunk, nulls, clip geometry, and what an architecture is given."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from models.condition import (
    ClipGeometry,
    Condition,
    build_condition,
    num_latent_frames,
    num_pixel_frames,
    pixel_frames_of,
)
from models.motion.tracks import Tracks


def condition(num_latents: int = 9, batch: int = 2) -> Condition:
    frames = torch.arange(num_pixel_frames(num_latents), dtype=torch.float32)
    return Condition(
        prompt_embeds=torch.ones(batch, 4, 3),
        null_prompt_embeds=torch.full((1, 4, 3), 0.5),
        track_map=(1 + frames).view(1, 1, -1, 1, 1).expand(batch, 6, -1, 2, 3).contiguous(),
        image_latents=torch.ones(batch, 5, 1, 2, 3),
        clip_embeds=torch.ones(batch, 257, 8),
    )


def frames_in(part: Condition) -> list[int]:
    return [int(value) - 1 for value in part.track_map[0, 0, :, 0, 0]]


def test_first_chunk_has_nine_frames_and_the_image():
    chunk = condition().chunk(0, 3)
    assert frames_in(chunk) == list(range(9))
    assert chunk.image_latents is not None and chunk.clip_embeds is not None


def test_later_chunks_have_twelve_frames_and_no_image():
    for index in (1, 2):
        chunk = condition().chunk(3 * index, 3)
        assert frames_in(chunk) == list(range(9 + 12 * (index - 1), 9 + 12 * index))
        assert chunk.image_latents is None and chunk.clip_embeds is not None


@given(st.lists(st.integers(1, 5), min_size=1, max_size=6))
def test_chunks_cover_each_frame_once(counts):
    covered, first = [], 0
    for count in counts:
        frames = pixel_frames_of(first, count)
        covered += range(frames.start, frames.stop)
        first += count
    assert covered == list(range(num_pixel_frames(sum(counts))))


@given(st.integers(1, 400))
def test_latent_and_pixel_counts_are_inverse(num_latents):
    assert num_latent_frames(num_pixel_frames(num_latents)) == num_latents


def test_wrong_frame_count_names_the_nearest_valid():
    with pytest.raises(ValueError, match=r"num_frames=80 must be 1 \+ 4k; nearest valid: 81"):
        num_latent_frames(80)
    with pytest.raises(ValueError, match="nearest valid: 1"):
        num_latent_frames(0)


def test_latent_track_maps_are_sliced_by_latent_frame():
    drawn = Condition(
        prompt_embeds=torch.ones(1, 4, 3),
        null_prompt_embeds=torch.zeros(1, 4, 3),
        track_map=torch.arange(9.0).view(1, 1, 9, 1, 1),
        track_map_is_latent=True,
    )
    assert drawn.chunk(3, 3).track_map.flatten().tolist() == [3, 4, 5]


def test_a_padded_image_is_given_in_the_first_chunk_alone():
    padded = replace(condition(), image_latents=torch.ones(2, 5, 9, 2, 3))
    assert [padded.chunk(first, 3).num_given_latents for first in (0, 3, 6)] == [1, 0, 0]
    assert padded.chunk(3, 3).image_latents.shape[2] == 3


@pytest.mark.parametrize("frames", [33, 36])
def test_drawn_tracks_that_nobody_sees_are_the_null(frames):
    """Latents of an empty picture are not zero; no motion must be the same however it came about."""
    dit = SimpleNamespace(clip_dim=None, track_channels=5, track_encoding="rgb", image_conditioning="none")
    visibility = torch.zeros(1, frames, 2, dtype=torch.bool)
    visibility[0, frames - 12 : frames - 8, 1] = True  # the four frames of the last latent but two
    points = torch.zeros(1, frames, 2, 2)
    visibility[0, :, 0], points[0, :, 0, 0] = True, 6.0  # beside the frame, where it is not drawn
    tracks = Tracks(points, visibility, torch.ones(1, 2, dtype=torch.long), 4, 6)
    built = build_condition(
        prompt_embeds=torch.ones(1, 4, 3), null_prompt_embeds=torch.ones(1, 4, 3), tracks=tracks, dit=dit,
        latent_size=(2, 3), cell_px=2, track_latents=torch.ones(1, 5, 9, 2, 3),
    )  # fmt: skip
    assert built.track_map[0, 0, :, 0, 0].tolist() == [0, 0, 0, 0, 0, 0, 1, 0, 0]


def test_slicing_a_slice_or_past_the_end_is_refused():
    with pytest.raises(ValueError, match="already a chunk"):
        condition().chunk(3, 3).chunk(0, 1)
    with pytest.raises(ValueError, match="need 45 track frames; the clip has 33"):
        condition().chunk(9, 3)


def test_drops_are_independent_and_leave_the_original():
    full = condition()
    no_text, no_motion = full.drop("text"), full.drop("motion")
    assert (no_text.prompt_embeds == 0.5).all() and torch.equal(no_text.track_map, full.track_map)
    assert not no_motion.track_map.any() and (no_motion.prompt_embeds == 1).all()
    neither = full.drop("text", "motion")
    assert not neither.track_map.any() and (neither.prompt_embeds == 0.5).all()
    assert (full.prompt_embeds == 1).all() and full.track_map.all()


def test_dropping_some_samples_leaves_the_others():
    part = condition().drop("text", "motion", where=torch.tensor([False, True]))
    assert (part.prompt_embeds[0] == 1).all() and (part.prompt_embeds[1] == 0.5).all()
    assert part.track_map[0].all() and not part.track_map[1].any()


def test_masked_motion_equals_the_dropped_motion_of_those_frames():
    masked = torch.zeros(2, 9, dtype=torch.bool)
    masked[1, 3:6] = True
    part = condition().mask_motion(masked)
    assert torch.equal(part.track_map[0], condition().track_map[0])
    assert not part.chunk(3, 3).track_map[1].any()
    assert part.chunk(0, 3).track_map[1].all() and part.chunk(6, 3).track_map[1].all()
    with pytest.raises(ValueError, match="8 frames, 29 track frames"):
        condition().mask_motion(masked[:, :8])


def test_unknown_or_absent_parts_cannot_be_dropped():
    with pytest.raises(ValueError, match="cannot drop 'image'"):
        condition().drop("image")
    plain = Condition(prompt_embeds=torch.ones(1, 4, 3), null_prompt_embeds=torch.zeros(1, 4, 3))
    with pytest.raises(ValueError, match="no track_map"):
        plain.drop("motion")


def test_parts_must_agree():
    with pytest.raises(ValueError, match="track_map has batch 3; it must be 2"):
        Condition(torch.ones(2, 4, 3), torch.ones(1, 4, 3), track_map=torch.ones(3, 1, 1, 1, 1))
    with pytest.raises(ValueError, match="null_prompt_embeds"):
        Condition(torch.ones(2, 4, 3), torch.ones(1, 5, 3))


def test_to_moves_every_part():
    moved = condition().to(dtype=torch.bfloat16)
    parts = (
        moved.prompt_embeds,
        moved.null_prompt_embeds,
        moved.track_map,
        moved.image_latents,
        moved.clip_embeds,
    )
    assert {part.dtype for part in parts} == {torch.bfloat16}


@pytest.mark.parametrize(("field", "value"), [("height", 0), ("fps", -1), ("num_frames", 80)])
def test_geometry_is_checked(field, value):
    valid = {"height": 64, "width": 64, "num_frames": 33, "fps": 16}
    assert ClipGeometry(**valid).num_latents == 9
    with pytest.raises(ValueError, match=f"{field}={value}"):
        ClipGeometry(**(valid | {field: value}))


def architecture(**changes) -> SimpleNamespace:
    fields = {
        "track_channels": 4,
        "track_id_dim": 8,
        "track_offsets": False,
        "track_encoding": "head",
        "image_conditioning": "none",
        "clip_dim": None,
    }
    return SimpleNamespace(**(fields | changes))


def build(dit: SimpleNamespace, **parts) -> Condition:
    given = {"tracks": Tracks.empty(1, 9, 16, 24), "image_latents": torch.ones(1, 5, 1, 2, 3)} | parts
    embeds = torch.ones(1, 4, 3)
    return build_condition(
        prompt_embeds=embeds, null_prompt_embeds=embeds, dit=dit, latent_size=(2, 3), cell_px=8, **given
    )


def test_an_architecture_gets_what_it_reads():
    plain = build(architecture())
    assert plain.track_map.shape == (1, 8, 9, 2, 3) and not plain.track_map.any()
    assert plain.image_latents is None and plain.clip_embeds is None
    assert build(architecture(track_channels=0), tracks=None).track_map is None
    assert build(architecture(image_conditioning="first_frame")).image_latents is not None
    drawn = build(architecture(track_encoding="rgb"), track_latents=torch.ones(1, 5, 3, 2, 3))
    assert drawn.track_map_is_latent and drawn.track_map.shape[1] == 5


@pytest.mark.parametrize(
    ("changes", "parts", "match"),
    [
        ({}, {"tracks": None}, "tracks=None"),
        ({"clip_dim": 8}, {}, "clip_embeds=None"),
        ({"track_encoding": "rgb"}, {}, "track_latents=None"),
        ({}, {"tracks": Tracks.empty(1, 9, 16, 16)}, "16x16 px"),
    ],
)
def test_what_is_missing_is_named(changes, parts, match):
    with pytest.raises(ValueError, match=match):
        build(architecture(**changes), **parts)
