"""The small network that turns the track map into control channels, one latent frame at a time.

MotionStream section 3.1: 4x temporal compression, then a 1x1x1 convolution. Frame 0 is repeated four times,
so that latent 0 sees frame 0 and latent j >= 1 sees exactly frames 4j-3 .. 4j, as in the VAE. The groups do
not overlap: encoding chunk by chunk equals encoding the whole clip, with no state between calls, and the
head can stay frozen.
"""

from __future__ import annotations

import torch
from einops import rearrange
from torch import Tensor, nn

from models.condition import FRAMES_PER_LATENT


class TrackHead(nn.Module):
    """Track map -> control channels on the latent grid; starts as the zero map."""

    def __init__(self, id_dim: int = 64, hidden: int = 128, out_channels: int = 16):
        super().__init__()
        group = (FRAMES_PER_LATENT, 1, 1)
        self.compress = nn.Conv3d(id_dim, hidden, kernel_size=group, stride=group)
        self.activation = nn.SiLU()
        self.project = nn.Conv3d(hidden, out_channels, kernel_size=1)
        self.reset_output()

    def reset_output(self) -> None:
        """Zero last convolution: training starts from the model without tracks."""
        nn.init.zeros_(self.project.weight)
        nn.init.zeros_(self.project.bias)

    def forward(self, track_map: Tensor) -> Tensor:
        """[B, id_dim, T, h, w] -> [B, out_channels, F, h, w]; T = 1 + 4(F-1) with frame 0, 4F without it."""
        num_frames = track_map.shape[2]
        if num_frames % FRAMES_PER_LATENT == 1:
            first = track_map[:, :, :1].expand(-1, -1, FRAMES_PER_LATENT - 1, -1, -1)
            track_map = torch.cat([first, track_map], 2)
        elif num_frames % FRAMES_PER_LATENT or num_frames == 0:
            raise ValueError(f"track map has {num_frames} frames; it must be 1 + 4k (from frame 0) or 4k >= 4 (later)")
        batch, _, _, height, width = track_map.shape
        frames = rearrange(track_map, "b d (f g) h w -> (b f) (d g) (h w)", g=FRAMES_PER_LATENT)
        hidden = self.activation(_per_frame(self.compress, frames))
        control = _per_frame(self.project, hidden)
        return rearrange(control, "(b f) c (h w) -> b c f h w", b=batch, h=height, w=width)


def _per_frame(conv: nn.Conv3d, frames: Tensor) -> Tensor:
    """The convolution as one product of fixed size per latent frame: [B F, in, h w] -> [B F, out, h w].

    A convolution kernel is chosen by the length of the clip, and another kernel rounds otherwise; a batched
    product treats each frame alike, so that chunks reproduce the whole clip bit for bit (and it is faster
    on the CPU).
    """
    weight = conv.weight.flatten(1).expand(len(frames), -1, -1)
    return torch.baddbmm(conv.bias[:, None], weight, frames)
