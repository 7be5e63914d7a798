"""Tracks as a map the DiT can read: each visible point writes its identity into the latent cell under it.

MotionStream eq. 1: c_m[t, floor(y/s), floor(x/s)] = phi(id), zero where no visible point lies. It is an
assignment, so three things must be settled before anything is written: invisible points and points outside
the frame are removed first (an occluded track may not erase a visible one), coordinates are floored (x = -3
is outside, not cell 0), and of several points in one cell exactly one wins, by a priority per track that is
constant over time. The winner is found with a minimum-scatter, which does not depend on the order of
execution, so the map is deterministic on every device.

Beyond the paper, and off unless asked for: two more channels say where in its cell the point lies, which the
floor forgets (half a cell either way, 4 px at Wan's stride of 8).
"""

from __future__ import annotations

import torch
from torch import Tensor

from models.motion.tracks import Tracks

ID_FREQUENCY_BASE = 10_000.0
OFFSET_DIM = 2  # x, y within the cell, each in [-1, 1]


def id_encoding(ids: Tensor, dim: int = 64) -> Tensor:
    """Sinusoidal code of integer identities [...] -> [..., dim] float32, of norm sqrt(dim / 2)."""
    if dim % 2:
        raise ValueError(f"dim={dim} must be even: half sines, half cosines")
    exponents = torch.arange(dim // 2, dtype=torch.float64, device=ids.device) / (dim // 2)
    angles = ids.double()[..., None] * ID_FREQUENCY_BASE**-exponents
    return torch.cat([angles.sin(), angles.cos()], -1).float()


def track_priorities(tracks: Tracks, rng: torch.Generator | None = None) -> Tensor:
    """Rank of each track in its clip -> [B, N] long; rank 0 wins every cell it enters.

    Without ``rng`` the lowest index wins; with it the order is random per clip, so that training hides no
    track always.
    """
    batch, num_tracks = tracks.batch_size, tracks.num_tracks
    if rng is None:
        return torch.arange(num_tracks, device=tracks.points.device).expand(batch, -1)
    ranks = torch.rand(batch, num_tracks, generator=rng, device=rng.device).argsort(1)
    return ranks.to(tracks.points.device)


def winning_tracks(points: Tensor, visibility: Tensor, ranks: Tensor, height_cells: int, width_cells: int) -> Tensor:
    """Lowest rank in each cell -> [B, T, height_cells, width_cells] long, N where the cell is empty.

    points [B, T, N, 2] in cells (not pixels), visibility [B, T, N] bool, ranks [B, N] long in 0..N-1.
    """
    batch, num_frames, num_tracks, _ = points.shape
    x, y = points.floor().unbind(-1)
    # NaN and infinities fail the comparisons: nothing outside the grid is ever converted to an integer
    seen = visibility & (x >= 0) & (x < width_cells) & (y >= 0) & (y < height_cells)
    cells_per_frame = height_cells * width_cells
    num_cells = batch * num_frames * cells_per_frame
    frame_start = torch.arange(batch * num_frames, device=points.device).view(batch, num_frames, 1) * cells_per_frame
    cell = torch.where(seen, y * width_cells + x, 0.0).long() + frame_start
    cell = torch.where(seen, cell, num_cells)  # the unseen share one spare bin behind the grid
    winners = torch.full((num_cells + 1,), num_tracks, dtype=torch.long, device=points.device)
    winners.scatter_reduce_(0, cell.flatten(), ranks[:, None, :].expand_as(cell).flatten(), "amin")
    return winners[:-1].view(batch, num_frames, height_cells, width_cells)


def scatter_tracks(
    tracks: Tracks,
    *,
    dim: int,
    height_cells: int,
    width_cells: int,
    cell_px: int,
    with_offsets: bool = False,
    rng: torch.Generator | None = None,
) -> Tensor:
    """Identity map of the visible tracks -> [B, dim, T, height_cells, width_cells] float32, zero elsewhere.

    ``cell_px`` is the spatial stride of the VAE in pixels. ``with_offsets`` appends OFFSET_DIM channels: the
    winner's position in its cell. Collisions: random priority with ``rng``, else lowest index. Raises
    ValueError where the tracks are not in the resolution of the grid.
    """
    size = (height_cells * cell_px, width_cells * cell_px)
    if (tracks.height, tracks.width) != size:
        raise ValueError(
            f"tracks are in {tracks.height}x{tracks.width} px, but the grid of {height_cells}x{width_cells} "
            f"cells of {cell_px} px needs {size[0]}x{size[1]}; use tracks.resize_to({size[0]}, {size[1]})"
        )
    ranks = track_priorities(tracks, rng)
    winners = winning_tracks(tracks.points / cell_px, tracks.visibility, ranks, height_cells, width_cells)
    codes = id_encoding(tracks.ids, dim).transpose(1, 2)  # [B, dim, N]
    codes_by_rank = codes.new_zeros(tracks.batch_size, dim, tracks.num_tracks + 1)  # the last one: an empty cell
    codes_by_rank.scatter_(2, ranks[:, None].expand_as(codes), codes)
    features = codes_by_rank.gather(2, winners.flatten(1)[:, None].expand(-1, dim, -1))
    features = features.unflatten(2, winners.shape[1:])
    if not with_offsets:
        return features
    return torch.cat([features, _offsets(tracks.points / cell_px, ranks, winners)], 1)


def _offsets(points: Tensor, ranks: Tensor, winners: Tensor) -> Tensor:
    """Position of each cell's winner within the cell -> [B, 2, T, height_cells, width_cells] in [-1, 1].

    points [B, T, N, 2] in cells, ranks [B, N], winners as from winning_tracks; empty cells are zero.
    """
    batch, num_frames, num_tracks, _ = points.shape
    offsets = (points - points.floor()) * 2 - 1
    by_rank = offsets.new_zeros(batch, num_frames, num_tracks + 1, 2)  # the last one: an empty cell
    by_rank.scatter_(2, ranks[:, None, :, None].expand_as(offsets), offsets.nan_to_num())
    found = by_rank.gather(2, winners.flatten(2)[..., None].expand(-1, -1, -1, 2))
    return found.unflatten(2, winners.shape[2:]).permute(0, 4, 1, 2, 3).float()
