"""Track augmentations for training: pure functions of a batch of tracks and a generator.

MotionStream keeps a random 1000 to 2500 of a 50 x 50 grid per sample. The others imitate what a person
draws: few points on one object, points that vanish, an unsteady hand. Each sample of the batch draws for
itself, in order, from the one generator that is passed. Left out: changes of speed or path (the target video
would no longer match).
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from models.motion.tracks import Tracks


def random_subset(tracks: Tracks, min_tracks: int, max_tracks: int, rng: torch.Generator) -> Tracks:
    """Keep a uniformly drawn number of tracks in min..max per sample, the rest become invisible padding.

    The result has max_tracks tracks (fewer if there are fewer). Raises ValueError unless 0 <= min <= max.
    """
    if not 0 <= min_tracks <= max_tracks:
        raise ValueError(f"min_tracks={min_tracks}, max_tracks={max_tracks} must satisfy 0 <= min <= max")
    most = min(max_tracks, tracks.num_tracks)
    least = min(min_tracks, most)
    chosen, counts = [], []
    for _ in range(tracks.batch_size):
        counts.append(least + int(torch.randint(most - least + 1, (1,), generator=rng)))
        chosen.append(torch.randperm(tracks.num_tracks, generator=rng)[:most])
    if not chosen:
        return tracks
    subset = tracks.select(torch.stack(chosen))
    return _keep(subset, torch.arange(most)[None] < torch.tensor(counts)[:, None])


def sparse_object_subset(
    tracks: Tracks, rng: torch.Generator, min_points: int = 1, max_points: int = 20, radius: float = 0.2
) -> Tracks:
    """Keep 1 to 20 tracks of one object: a random moving track and tracks that start near it and move with
    it.

    radius: reach in fractions of the frame height. "With it" means that the displacement over the clip
    differs by less than a quarter of its own length plus 2 % of the height. Tracks that are not kept become
    invisible.
    """
    if not 1 <= min_points <= max_points:
        raise ValueError(f"min_points={min_points}, max_points={max_points} must satisfy 1 <= min <= max")
    keep = torch.zeros(tracks.batch_size, tracks.num_tracks, dtype=torch.bool)
    for b in range(tracks.batch_size if tracks.num_tracks else 0):
        near = _moves_with_one(tracks.points[b].cpu(), tracks.visibility[b].cpu(), tracks.height, radius, rng)
        count = min_points + int(torch.randint(max_points - min_points + 1, (1,), generator=rng))
        keep[b, near[torch.randperm(len(near), generator=rng)[:count]]] = True
    return _keep(tracks, keep)


def _moves_with_one(points: Tensor, visibility: Tensor, height: int, radius: float, rng: torch.Generator) -> Tensor:
    """Indices of the tracks near one track drawn in proportion to its motion: points [T, N, 2] -> [M], M
    >= 1.
    """
    path = points - points[:1]
    weight = (path.norm(dim=-1) * visibility).amax(dim=0) + 1e-3 * visibility.any(dim=0) + 1e-9
    seed = int(torch.multinomial(weight, 1, generator=rng))
    apart = (points[0] - points[0, seed]).norm(dim=-1)
    differs = (path - path[:, seed : seed + 1]).norm(dim=-1).amax(dim=0)
    length = path[:, seed].norm(dim=-1).amax()
    return torch.nonzero((apart <= radius * height) & (differs <= 0.25 * length + 0.02 * height))[:, 0]


def drop_visibility(tracks: Tracks, ratio: float, rng: torch.Generator, max_frames: int = 12) -> Tracks:
    """Hide a stretch of 1..max_frames frames of a share `ratio` (0..1) of the tracks; points stay."""
    if not 0 <= ratio <= 1:
        raise ValueError(f"ratio={ratio} must lie in 0..1")
    shape = (tracks.batch_size, tracks.num_tracks)
    hit = torch.rand(shape, generator=rng) < ratio
    length = torch.randint(1, max_frames + 1, shape, generator=rng)
    begin = torch.randint(0, max(1, tracks.num_frames), shape, generator=rng)
    time = torch.arange(tracks.num_frames)[None, :, None]
    hidden = hit[:, None] & (time >= begin[:, None]) & (time < (begin + length)[:, None])
    return replace(tracks, visibility=tracks.visibility & ~hidden.to(tracks.visibility.device))


def jitter(tracks: Tracks, max_px: float, rng: torch.Generator) -> Tracks:
    """Offset each track by a constant of up to max_px (uniform in the square), as an imprecise click
    would.
    """
    if max_px < 0:
        raise ValueError(f"max_px={max_px} must be >= 0")
    offset = (2 * torch.rand(tracks.batch_size, 1, tracks.num_tracks, 2, generator=rng) - 1) * max_px
    return replace(tracks, points=tracks.points + offset.to(tracks.points.device))


def _keep(tracks: Tracks, keep: Tensor) -> Tracks:
    """keep [B, N] bool: the other tracks become invisible."""
    return replace(tracks, visibility=tracks.visibility & keep[:, None].to(tracks.visibility.device))
