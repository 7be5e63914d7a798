"""Track augmentations: counts, invariants, and that the generator decides everything."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from data.augment import drop_visibility, jitter, random_subset, sparse_object_subset
from models.motion.tracks import Tracks


def two_objects(batch_size: int = 2, num_frames: int = 9) -> Tracks:
    """20 still tracks on the left, 20 that move right on the right."""
    x = torch.cat([torch.linspace(2, 20, 20), torch.linspace(40, 60, 20)])
    start = torch.stack([x, torch.linspace(20, 40, 40)], dim=-1)
    motion = torch.arange(num_frames)[:, None, None] * torch.tensor([3.0, 0.0])
    moving = (torch.arange(40) >= 20)[None, :, None]
    points = (start + motion * moving).expand(batch_size, -1, -1, -1).contiguous()
    visibility = torch.ones(points.shape[:3], dtype=torch.bool)
    return Tracks(points, visibility, torch.arange(40).expand(batch_size, -1), 64, 64)


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def kept(tracks: Tracks) -> torch.Tensor:
    return tracks.visibility.any(1).sum(1)


@given(st.integers(0, 50), st.integers(0, 50), st.integers(0, 1000))
def test_random_subset_keeps_between_min_and_max(low, high, seed):
    low, high = sorted((low, high))
    subset = random_subset(two_objects(), low, high, rng(seed))
    assert subset.num_tracks == min(high, 40)
    assert ((kept(subset) >= min(low, 40)) & (kept(subset) <= min(high, 40))).all()
    for b in range(2):
        assert len(set(subset.ids[b].tolist())) == subset.num_tracks, "no track twice"


def test_subsets_hold_original_tracks():
    tracks = two_objects()
    subset = random_subset(tracks, 5, 5, rng())
    for b in range(2):
        assert torch.equal(subset.points[b], tracks.points[b][:, subset.ids[b]])


@given(st.integers(0, 1000))
def test_sparse_subset_stays_on_one_object(seed):
    subset = sparse_object_subset(two_objects(), rng(seed), 1, 20)
    shown = subset.visibility.any(1)
    assert ((kept(subset) >= 1) & (kept(subset) <= 20)).all()
    for b in range(2):
        right = shown[b].nonzero()[:, 0] >= 20
        assert right.all() or not right.any()


def test_sparse_subset_prefers_what_moves():
    moving = [int(sparse_object_subset(two_objects(1), rng(s)).visibility[0, :, 20:].any()) for s in range(40)]
    assert sum(moving) > 30


def test_drop_visibility_hides_single_stretches_and_moves_nothing():
    tracks = two_objects(num_frames=33)
    dropped = drop_visibility(tracks, 0.5, rng(), max_frames=6)
    assert torch.equal(dropped.points, tracks.points)
    hidden = tracks.visibility & ~dropped.visibility
    assert 0.3 < hidden.any(1).float().mean() < 0.7
    assert hidden.sum(1).max() <= 6
    edges = (hidden[:, 1:] & ~hidden[:, :-1]).sum(1) + hidden[:, 0].long()
    assert edges.max() == 1
    assert torch.equal(drop_visibility(tracks, 0.0, rng()).visibility, tracks.visibility)


def test_jitter_is_constant_in_time_and_bounded():
    tracks = two_objects()
    offset = jitter(tracks, 2.0, rng()).points - tracks.points
    assert offset.abs().max() <= 2.0 and offset.std() > 0.5
    assert torch.allclose(offset, offset[:, :1].expand_as(offset), atol=1e-5)
    assert torch.equal(jitter(tracks, 0.0, rng()).points, tracks.points)


@pytest.mark.parametrize(
    "augment",
    [
        lambda t, g: random_subset(t, 3, 30, g),
        lambda t, g: sparse_object_subset(t, g),
        lambda t, g: drop_visibility(t, 0.5, g),
        lambda t, g: jitter(t, 1.0, g),
    ],
)
def test_the_generator_decides(augment):
    first, again, other = (augment(two_objects(), rng(seed)) for seed in (1, 1, 2))
    assert torch.equal(first.points, again.points) and torch.equal(first.visibility, again.visibility)
    assert not (torch.equal(first.points, other.points) and torch.equal(first.visibility, other.visibility))


def test_refusals():
    with pytest.raises(ValueError, match="min_tracks=5, max_tracks=2"):
        random_subset(two_objects(), 5, 2, rng())
    with pytest.raises(ValueError, match=r"ratio=1\.5"):
        drop_visibility(two_objects(), 1.5, rng())
    with pytest.raises(ValueError, match="max_px=-1"):
        jitter(two_objects(), -1, rng())
    with pytest.raises(ValueError, match="min_points=0"):
        sparse_object_subset(two_objects(), rng(), 0)


def test_a_clip_without_tracks_passes_through():
    empty = Tracks.empty(2, 9, 64, 64)
    assert random_subset(empty, 1, 5, rng()).num_tracks == 0
    assert sparse_object_subset(empty, rng()).num_tracks == 0
    assert drop_visibility(empty, 0.5, rng()).num_tracks == 0
