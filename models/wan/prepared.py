"""What a `WanDiT` reads beside its latents, encoded once and shared by passes, and the input channels made of
it.

Text keys and values belong to a prompt, modulation to a timestep, control channels to a chunk. Leaves out how
they are computed (dit.py): here are the values, the checks between them, and the order of the input channels.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from models.condition import Condition
from models.wan.blocks import TextKV, TextTokens, TimeEmbedding
from models.wan.config import MASK_CHANNELS, WanConfig


@dataclass(frozen=True, eq=False)
class TextContext:
    """Text (and CLIP) keys and values of every layer. Made under no_grad, they are constants."""

    layers: tuple[TextKV, ...]


@dataclass(frozen=True, eq=False)
class Modulation:
    """Modulation tables of every layer at one timestep; float32. F is 1 where all frames share it."""

    layers: tuple[Tensor, ...]  # each [B or 1, F or 1, 6, D]
    head: Tensor  # [B or 1, F or 1, 2, D]
    clean: Modulation | None = None  # the same at timestep 0, where the first frame can be clean

    def with_clean_first_frame(self, batch: int, frames: int) -> Modulation:
        """Frame 0 at timestep 0, the others as they are: tables of ``frames`` frames."""

        def join(clean: Tensor, table: Tensor) -> Tensor:
            rest = table[:, 1:] if table.shape[1] == frames else table.expand(-1, frames - 1, -1, -1)
            return torch.cat([part.expand(batch, -1, -1, -1) for part in (clean, rest)], dim=1)

        assert self.clean is not None, "Modulation.clean is set by WanDiT.modulation for first_frame models"
        layers = tuple(join(clean, table) for clean, table in zip(self.clean.layers, self.layers))
        return Modulation(layers, join(self.clean.head, self.head))


@dataclass(frozen=True, eq=False)
class PreparedCondition:
    """A `Condition` of one clip or chunk, encoded for a model."""

    text: TextContext | TextTokens
    track: Tensor | None  # [B, track_channels, F, h, w]
    image_latents: Tensor | None  # [B, C, 1, h, w]; [B, C, F, h, w] where image_conditioning is "inp"
    num_given_latents: int = 1  # see Condition


def of_layer(
    shared: TimeEmbedding | Modulation | TextTokens | TextContext, layer: int
) -> TimeEmbedding | TextTokens | Tensor | TextKV:
    """One layer's part of what was prepared for all; what was not is passed on whole."""
    return shared.layers[layer] if isinstance(shared, (Modulation, TextContext)) else shared


def clean_first_frame(condition: Condition | PreparedCondition, config: WanConfig) -> Tensor | None:
    """The image [B, C, 1, h, w] that latent frame 0 is, in a first_frame model that was given one."""
    return condition.image_latents if config.image_conditioning == "first_frame" else None


def check_condition(condition: Condition, config: WanConfig) -> None:
    """Raises ValueError where the condition lacks what the model reads, or has what it cannot read."""
    if config.track_channels and condition.track_map is None:
        raise ValueError(
            f"track_map=None, but this model has track_channels={config.track_channels}; for no motion pass "
            "zeros, as condition.drop('motion') does"
        )
    if not config.track_channels and condition.track_map is not None:
        raise ValueError("track_map given to a model without tracks; set track_channels, or leave it out")
    if config.image_conditioning == "none" and condition.image_latents is not None:
        raise ValueError("image_latents given to a model with image_conditioning='none'; leave them out")


def check_latents(latents: Tensor, condition: PreparedCondition, config: WanConfig) -> None:
    """Raises ValueError where latents [B, C, F, H, W] and condition do not fit together."""
    if latents.ndim != 5 or latents.shape[1] != config.latent_channels:
        raise ValueError(
            f"latents have shape {tuple(latents.shape)}; they must be [B, {config.latent_channels}, F, H, W]"
        )
    batch, channels, frames, height, width = latents.shape
    text = condition.text
    text_batch = (text.layers[0].key if isinstance(text, TextContext) else text.text).shape[0]
    if text_batch != batch:
        raise ValueError(f"the condition has batch {text_batch}, the latents have {batch}; they must agree")
    track, expected = condition.track, (batch, config.track_channels, frames, height, width)
    if track is not None and tuple(track.shape) != expected:
        raise ValueError(
            f"the tracks cover [B, C, F, h, w] = {tuple(track.shape)}, the latents need {expected}; "
            "a track map has 1 + 4(F-1) frames from frame 0, 4F later"
        )
    image, allowed = condition.image_latents, [(batch, channels, 1, height, width)]
    if config.image_conditioning == "inp":
        allowed.append(tuple(latents.shape))
    if image is not None and tuple(image.shape) not in allowed:
        raise ValueError(
            f"image_latents have shape {tuple(image.shape)}; for these latents it must be "
            f"{' or '.join(map(str, allowed))}"
        )


def model_input(latents: Tensor, condition: PreparedCondition, config: WanConfig) -> Tensor:
    """[B, in_channels, F, H, W]: the parts that config.input_layout names, in its order.

    Where there is no image, and in the frames it does not cover, image and mask channels are zero.
    """
    image = condition.image_latents
    if (first_frame := clean_first_frame(condition, config)) is not None:
        latents = torch.cat([first_frame.to(latents), latents[:, :, 1:]], dim=2)
    known = {
        "noisy": latents,
        "track": condition.track,
        "image": image,
        "mask": None if image is None else _given_mask(image, condition.num_given_latents),
    }
    parts = [_padded(known[part], width, latents) for part, width in config.input_layout]
    return torch.cat(parts, dim=1) if len(parts) > 1 else parts[0]


def _given_mask(image: Tensor, num_given: int) -> Tensor:
    """1 where the image is given: [B, MASK_CHANNELS, frames, h, w]."""
    mask = torch.zeros_like(image[:, :1]).expand(-1, MASK_CHANNELS, -1, -1, -1).clone()
    mask[:, :, :num_given] = 1
    return mask


def _padded(part: Tensor | None, channels: int, latents: Tensor) -> Tensor:
    """The part's first frames as they are, the rest zero: [B, channels, F, H, W]."""
    batch, _, frames, *size = latents.shape
    if part is None:
        return latents.new_zeros(batch, channels, frames, *size)
    part = part.to(latents.dtype)
    if part.shape[2] == frames:
        return part
    return torch.cat([part, part.new_zeros(batch, channels, frames - part.shape[2], *size)], dim=2)
