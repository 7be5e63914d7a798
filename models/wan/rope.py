"""Rotary position embedding over (frame, row, column), as in Wan.

A head's width splits into t = d - 4(d // 6) and h = w = 2(d // 6) dimensions; each axis has its own exponent
base, theta^(-2i / axis width), and rotates interleaved pairs (2i, 2i + 1). Rows and columns count from 0;
frames from ``start_frame``, without an upper limit. Tables are real, computed in float64 and cached on
integers.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

THETA = 10_000.0


def axis_widths(head_dim: int) -> tuple[int, int, int]:
    """Dimensions of a head that encode frame, row and column: 44, 42, 42 of 128."""
    spatial = 2 * (head_dim // 6)
    return head_dim - 2 * spatial, spatial, spatial


@lru_cache(maxsize=64)
def rope_table(
    frames: int,
    height: int,
    width: int,
    head_dim: int,
    start_frame: int = 0,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """(cos, sin) of each rotation: [frames * height * width, 1, head_dim / 2, 2], tokens in (f, h, w) order.

    height and width count tokens. The table is shared between callers: never write to it.
    """
    with (
        torch.inference_mode(False),
        torch.no_grad(),
    ):  # usable in training even if first asked for in inference
        starts, sizes = (start_frame, 0, 0), (frames, height, width)
        angles = []
        for axis, (start, size, axis_width) in enumerate(zip(starts, sizes, axis_widths(head_dim))):
            exponents = torch.arange(0, axis_width, 2, dtype=torch.float64, device=device) / axis_width
            positions = torch.arange(start, start + size, dtype=torch.float64, device=device)
            shape = [size if other == axis else 1 for other in range(3)]
            angle = torch.outer(positions, THETA**-exponents).view(*shape, -1)
            angles.append(angle.expand(frames, height, width, -1))
        angle = torch.cat(angles, dim=-1).flatten(0, 2).unsqueeze(1)
        return torch.stack([angle.cos(), angle.sin()], dim=-1).to(dtype)


def apply_rope(x: Tensor, table: Tensor) -> Tensor:
    """x [B, L, heads, head_dim] rotated by a table of L tokens, in the table's precision; keeps x's dtype."""
    pairs = x.to(table.dtype).unflatten(-1, (-1, 2))
    if torch.compiler.is_compiling():  # the compiler fuses real arithmetic, and only calls complex kernels
        rotated = _rotate_real(pairs, table)
    else:  # one pass over memory instead of five
        rotated = torch.view_as_real(torch.view_as_complex(pairs) * torch.view_as_complex(table))
    return rotated.flatten(-2).to(x.dtype)


def _rotate_real(pairs: Tensor, table: Tensor) -> Tensor:
    (even, odd), (cos, sin) = pairs.unbind(-1), table.unbind(-1)
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1)
