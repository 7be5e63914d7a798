"""The patch discriminator of the tiny VAE: does a short stretch of video look like one that was filmed?

MotionStream appendix A names a PatchGAN with a replay buffer and leaves the rest open; Isola et al. 2017 for the
patches, Shrivastava et al. 2017 for the buffer (of the decoded stretches, half in expectation are older ones, so that
the discriminator does not forget what the decoder did before). A stretch is three successive frames, which shows
flicker, beside the latent that they were decoded from, which shows what they should be.
Left out: spectral normalisation, gradient penalties.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

STRETCH_FRAMES = 3


def norm_groups(width: int) -> int:
    """Groups of the norm of a block; they must divide its width."""
    return max(1, width // 16)


class PatchDiscriminator(nn.Module):
    """Logits per patch, above 0 for a filmed stretch; `len(widths)` blocks of stride 2."""

    def __init__(self, latent_channels: int, widths: Sequence[int]) -> None:
        super().__init__()
        fan_in, blocks = 3 * STRETCH_FRAMES + latent_channels, []
        for width in widths:
            blocks.append(
                nn.Sequential(
                    nn.Conv2d(fan_in, width, 4, stride=2, padding=1),
                    nn.GroupNorm(norm_groups(width), width),
                    nn.LeakyReLU(0.2),
                )
            )
            fan_in = width
        self.blocks = nn.ModuleList(blocks)
        self.head = nn.Conv2d(fan_in, 1, 3, padding=1)

    def forward(self, stretch: Tensor, latent: Tensor) -> tuple[Tensor, list[Tensor]]:
        """stretch [N, 9, H, W] in [-1, 1], latent [N, C, h, w] -> logits [N, 1, H', W'], features of each block."""
        x = torch.cat([stretch, F.interpolate(latent, size=stretch.shape[2:])], dim=1)
        features = []
        for block in self.blocks:
            x = block(x)
            features.append(x)
        return self.head(x), features


class ReplayBuffer:
    """The last `size` decoded stretches with their latents, on the CPU in half precision."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.stored: list[tuple[Tensor, Tensor]] = []
        self.next = 0  # where the next one goes once the buffer is full

    def exchange(self, stretch: Tensor, latent: Tensor, picks: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Store a batch, and return it with the samples of odd picks replaced by stored ones.

        picks: for each sample, any non-negative integer; where it is odd, its half names the stored one modulo
        their number. Each sample is drawn by itself, so that a batch may be split anyhow. Stored ones of another
        size, from before a run was resumed with another crop, are forgotten.
        """
        if self.stored and self.stored[0][0].shape != stretch.shape[1:]:
            self.stored, self.next = [], 0
        mixed, conditions = list(stretch), list(latent)
        for row, pick in enumerate(picks):
            if self.stored and pick % 2:
                older, its_latent = self.stored[pick // 2 % len(self.stored)]
                mixed[row], conditions[row] = older.to(stretch), its_latent.to(latent)
        for one, condition in zip(stretch, latent, strict=True):
            self._store(one.detach().to("cpu", torch.float16), condition.detach().to("cpu", torch.float16))
        return torch.stack(mixed), torch.stack(conditions)

    def _store(self, stretch: Tensor, latent: Tensor) -> None:
        self.stored[self.next : self.next + 1] = [(stretch, latent)]
        self.next = (self.next + 1) % self.size

    def state_dict(self) -> dict[str, Any]:
        if not self.stored:
            return {"next": self.next}
        stretches, latents = (torch.stack(each) for each in zip(*self.stored, strict=True))
        return {"next": self.next, "stretches": stretches, "latents": latents}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Of a buffer of another size, the newest that this one holds."""
        oldest = int(state["next"])
        # copies: views would keep the checkpoint's file mapped, and all of it while one of them is left
        parts = ([each.clone() for each in state.get(name, ())] for name in ("stretches", "latents"))
        stored = list(zip(*parts, strict=True))
        if len(stored) != self.size:  # else each stays in its place, so that the same ones are drawn
            stored = (stored[oldest:] + stored[:oldest])[-self.size :]
            oldest = len(stored)
        self.stored, self.next = stored, oldest % self.size


def stretch_of(video: Tensor, latents: Tensor, starts: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Three successive frames of each clip as channels, and the latent of the middle one.

    video [B, 3, T, H, W], latents [B, C, F, h, w], T = 1 + 4 (F - 1) -> [B, 9, H, W], [B, C, h, w].
    """
    frames = [clip[:, start : start + STRETCH_FRAMES].flatten(0, 1) for clip, start in zip(video, starts, strict=True)]
    middle = [each[:, -(-(start + 1) // 4)] for each, start in zip(latents, starts, strict=True)]
    return torch.stack(frames), torch.stack(middle)
