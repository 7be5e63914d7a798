"""Low-pass filters over the token grid, for the switchable frequency selection (SFS, DragStream eq. 7).

Cutoffs are in cycles per token, as in the official code (a cutoff of 0.5 is the grid's Nyquist frequency; SG-I2V
counts relative to it). The filter is applied to keys and values frame by frame. The official code filters keys
after their rotation, where even a constant key is not a constant image; "pre" takes the rotation off first.
"""

from __future__ import annotations

import torch
from einops import rearrange
from torch import Tensor

from models.wan.rope import apply_rope, rope_table

BUTTERWORTH_ORDER = 4


def butterworth(rows: int, cols: int, cutoff: float, device: torch.device | str = "cpu") -> Tensor:
    """1 / (1 + (R / cutoff)^8) on the grid of an fft2: [rows, cols]; R in cycles per cell."""
    y, x = (torch.fft.fftfreq(n, device=device) for n in (rows, cols))
    radius = torch.hypot(*torch.meshgrid(y, x, indexing="ij"))
    return 1 / (1 + (radius / cutoff) ** (2 * BUTTERWORTH_ORDER))


def low_pass(images: Tensor, cutoff: float) -> Tensor:
    """Images [..., rows, cols] of any dtype, filtered in float32."""
    response = butterworth(images.shape[-2], images.shape[-1], cutoff, images.device)
    return torch.fft.ifft2(torch.fft.fft2(images.float()) * response).real.to(images.dtype)


def low_pass_tokens(tokens: Tensor, grid: tuple[int, int], cutoff: float) -> Tensor:
    """Tokens [B, heads, frames * rows * cols, head_dim], filtered over each frame."""
    rows, cols = grid
    images = rearrange(tokens, "b h (f r c) d -> b h f d r c", r=rows, c=cols)
    return rearrange(low_pass(images, cutoff), "b h f d r c -> b h (f r c) d")


def low_pass_keys(keys: Tensor, grid: tuple[int, int], cutoff: float, rope: str) -> Tensor:
    """Rotated keys; rope="post" filters them as they are, "pre" as they were before their rotation in space.

    The rotation in time is the same over a frame and does not matter.
    """
    if rope == "post":
        return low_pass_tokens(keys, grid, cutoff)
    rows, cols = grid
    frames = keys.shape[2] // (rows * cols)
    table = rope_table(1, rows, cols, keys.shape[-1], device=keys.device).repeat(frames, 1, 1, 1)
    back = table * table.new_tensor([1.0, -1.0])  # (cos, sin) of the opposite rotation
    return _rotate(low_pass_tokens(_rotate(keys.float(), back), grid, cutoff), table).to(keys.dtype)


def _rotate(keys: Tensor, table: Tensor) -> Tensor:
    return apply_rope(keys.transpose(1, 2), table).transpose(1, 2)
