"""Tracks as pictures: the alternative that MotionStream Table 3 compares the identity map with.

Each visible point is a soft disc in the colour of its identity; the clip is then encoded with the VAE like
any video (about 40 times slower than the track head). A colour depends on the id alone, so it is the same
in every frame and chunk. Where discs overlap the lower index is in front. Left out: trails and anything a
viewer would like to see; this is a network input.
"""

from __future__ import annotations

import torch
from torch import Tensor

from models.motion.embedding import track_priorities, winning_tracks
from models.motion.tracks import NUM_TRACK_IDS, Tracks

GOLDEN_RATIO = 0.6180339887498949  # multiples of it, modulo 1, spread hues evenly for neighbouring ids
RADIUS_PX = 2.0  # of a disc
EDGE_PX = 1.0  # width of a disc's soft edge
BACKGROUND = -1.0  # black


def id_colours(ids: Tensor) -> Tensor:
    """Identity 0..9999 [...] -> saturated colour [..., 3] in [-1, 1]."""
    ids = ids.double()
    hue = ids * GOLDEN_RATIO % 1.0
    value = 0.6 + 0.4 * (ids * 7919 % NUM_TRACK_IDS) / NUM_TRACK_IDS  # 7919 is prime to the count: all values differ
    offsets = torch.tensor([0.0, 2.0 / 3.0, 1.0 / 3.0], dtype=torch.float64, device=ids.device)
    wave = ((hue[..., None] + offsets) % 1.0 * 6.0 - 3.0).abs() - 1.0
    return (wave.clamp(0.0, 1.0) * value[..., None] * 2.0 - 1.0).float()


def draw_tracks(tracks: Tracks) -> Tensor:
    """Draws the visible tracks -> pixels [B, 3, T, height, width] in [-1, 1], deterministic."""
    reach = int(RADIUS_PX + EDGE_PX)
    span = torch.arange(-reach, reach + 1, device=tracks.points.device)
    offsets = torch.cartesian_prod(span, span).to(tracks.points.dtype)  # [stamp, 2] px
    winners = _front_tracks(tracks, offsets)
    batch, num_frames, height, width = winners.shape

    # the winner's own position gives the distance: one more row stands for "no track", far away
    nowhere = tracks.points.new_full((batch, num_frames, 1, 2), float("inf"))
    centres = torch.cat([tracks.points, nowhere], 2)
    index = winners.flatten(2)[..., None].expand(-1, -1, -1, 2)
    centre = centres.gather(2, index).unflatten(2, (height, width))
    opacity = _opacity(centre - _pixel_centres(height, width, centre))

    colours = torch.cat([id_colours(tracks.ids), tracks.points.new_full((batch, 1, 3), BACKGROUND)], 1)
    colour = colours.gather(1, winners.flatten(1)[..., None].expand(-1, -1, 3)).view(
        batch, num_frames, height, width, 3
    )
    pixels = BACKGROUND + opacity[..., None] * (colour - BACKGROUND)
    return pixels.permute(0, 4, 1, 2, 3).contiguous()


def _front_tracks(tracks: Tracks, offsets: Tensor) -> Tensor:
    """Frontmost track at each pixel -> [B, T, height, width], N where none reaches.

    A track whose centre has left the frame is gone, as in the identity map, even where its disc would reach
    in.
    """
    stamped = tracks.points.floor()[:, :, :, None] + offsets  # [B, T, N, stamp, 2]
    reached = _opacity(stamped + 0.5 - tracks.points[:, :, :, None]) > 0
    ranks = track_priorities(tracks)[..., None].expand(-1, -1, len(offsets))
    winners = winning_tracks(
        stamped.flatten(2, 3),
        (reached & tracks.seen[..., None]).flatten(2, 3),
        ranks.flatten(1),
        tracks.height,
        tracks.width,
    )
    return winners.clamp_max(tracks.num_tracks)


def _opacity(offset: Tensor) -> Tensor:
    """Disc with a linear edge: 1 inside, 0 from radius + half an edge outward."""
    return ((RADIUS_PX - offset.norm(dim=-1)) / EDGE_PX + 0.5).clamp(0.0, 1.0)


def _pixel_centres(height: int, width: int, like: Tensor) -> Tensor:
    """(x, y) of each pixel's centre -> [height, width, 2]."""
    y = torch.arange(height, device=like.device, dtype=like.dtype) + 0.5
    x = torch.arange(width, device=like.device, dtype=like.dtype) + 0.5
    return torch.stack(torch.meshgrid(x, y, indexing="xy"), -1)
