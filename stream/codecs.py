"""All that stands around the DiT when a video is generated: VAE, text encoder, CLIP, on one device.

Turns what a user has (uint8 frames, prompts, tracks) into a `Condition`, and latents back into uint8 frames.
The streaming session, the teacher's sampling and every benchmark use this one class, so they cannot disagree
about normalisation or rounding. Leaves out the DiT itself, which is passed where it is used.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from models.assemble import ModelConfig, build_clip_encoder, build_text_encoder, build_tiny_vae, build_vae
from models.condition import Condition, build_condition
from models.motion.rgb import draw_tracks
from models.motion.tracks import Tracks
from models.vae.streaming_decode import StreamingDecoder, StreamingEncoder
from models.vae.tiny_vae import TinyVae
from models.vae.wan_vae import WanVae
from models.wan.image_encoder import ClipImageEncoder
from models.wan.text_encoder import TextEncoder

DECODERS = ("full", "tiny")
CPU_CLIPS = 2  # decoded together: features of eight leave a CPU's caches: a third more time (sprites)


@dataclass(frozen=True)
class FirstFrame:
    """What the model reads of the given image; a batch of them."""

    image_latents: Tensor  # [B, C, 1, h, w] normalised
    clip_embeds: Tensor | None  # [B, 257, 1280] where the architecture has a CLIP branch


class Codecs:
    """Frames, prompts and tracks to conditions; latents to frames. Inference only."""

    def __init__(
        self,
        model_cfg: ModelConfig,
        vae: WanVae,
        text_encoder: TextEncoder,
        *,
        image_encoder: ClipImageEncoder | None = None,
        tiny_vae: TinyVae | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        self.device = torch.device(device)
        self.model_cfg = model_cfg.on(self.device)
        where = (self.device, self.model_cfg.torch_dtype)
        self.vae = vae.eval().requires_grad_(False).to(*where)
        self.decoder = self.vae if tiny_vae is None else tiny_vae.eval().requires_grad_(False).to(*where)
        if self.device.type == "cpu":
            self.vae.use_channels_last()
            self.decoder.use_channels_last()
        self.text_encoder = text_encoder.to(self.device) if isinstance(text_encoder, nn.Module) else text_encoder
        self.image_encoder = None if image_encoder is None else image_encoder.to(self.device)
        self._null_prompt = self.text_encoder.null().to(self.device)

    @classmethod
    def load(cls, model_cfg: ModelConfig, *, device: torch.device | str = "cpu", tiny: bool = False) -> Codecs:
        """Build or load every part the configuration names.

        Raises:
            ValueError: a path that is needed is not set, or parts do not fit together.
            FileNotFoundError: weights named in the configuration are missing.
        """
        model_cfg, vae = model_cfg.on(torch.device(device)), build_vae(model_cfg)
        return cls(
            model_cfg,
            vae,
            build_text_encoder(model_cfg),
            device=device,
            image_encoder=build_clip_encoder(model_cfg),
            tiny_vae=build_tiny_vae(model_cfg, vae.latent_space) if tiny else None,
        )

    def under(self, model_cfg: ModelConfig) -> Codecs:
        """The same weights under another configuration of the model (guidance, rollout); nothing is loaded again."""
        other = copy(self)
        other.model_cfg = model_cfg
        return other

    @property
    def cell_px(self) -> int:
        """Side of a latent cell in pixels: the VAE's spatial stride."""
        return self.vae.spatial_stride

    @property
    def latent_size(self) -> tuple[int, int]:
        """Latent rows and columns of the model's clip."""
        return self.model_cfg.latent_size

    @property
    def frame_latent_shape(self) -> tuple[int, int, int]:
        """(C, h, w) of one latent frame."""
        return (self.vae.latent_channels, *self.latent_size)

    def encode_prompts(self, prompts: Sequence[str]) -> Tensor:  # -> [B, text_len, text_dim]
        """Text features; unknown words of a closed vocabulary are a ValueError."""
        return self.text_encoder.encode(list(prompts)).to(self.device)

    @torch.no_grad()
    def encode_first_frames(self, images: np.ndarray) -> FirstFrame:
        """uint8 [B, H, W, 3] at the model's clip size -> image latents and, where read, CLIP features.

        Raises:
            ValueError: not uint8 RGB, or another size than model.clip.
        """
        clip = self.model_cfg.clip
        if images.dtype != np.uint8 or images.ndim != 4 or images.shape[1:] != (clip.height, clip.width, 3):
            raise ValueError(
                f"first frame {images.shape[1:]} {images.dtype} must be uint8 "
                f"({clip.height}, {clip.width}, 3), the model's clip size; resize it first"
            )
        pixels = to_pixels(images[:, None], self.device)
        clip_embeds = None if self.image_encoder is None else self.image_encoder.encode(pixels[:, :, 0])
        return FirstFrame(self.vae.encode(pixels), clip_embeds)

    def condition(
        self,
        prompt_embeds: Tensor,
        tracks: Tracks,
        first_frame: FirstFrame,
        *,
        opens_video: bool = True,
        track_encoder: StreamingEncoder | None = None,
    ) -> Condition:
        """Everything the DiT reads for a clip, or for one chunk of a stream.

        Args:
            prompt_embeds: [B, text_len, text_dim].
            tracks: at the model's clip size; 1 + 4k frames where the video opens, else 4k.
            first_frame: the given image; its latents are used only where `opens_video`.
            track_encoder: carries the VAE's state between chunks where tracks are drawn as RGB.
        """
        dit = self.model_cfg.dit
        track_latents = None
        if dit.track_channels and dit.track_encoding == "rgb":
            pixels = draw_tracks(tracks).to(self.device)
            track_latents = self.vae.encode(pixels) if track_encoder is None else track_encoder.push(pixels)
        return build_condition(
            prompt_embeds=prompt_embeds,
            null_prompt_embeds=self._null_prompt,
            tracks=tracks.to(self.device),
            dit=dit,
            latent_size=self.latent_size,
            cell_px=self.cell_px,
            track_latents=track_latents,
            image_latents=first_frame.image_latents if opens_video else None,
            clip_embeds=first_frame.clip_embeds,
        )

    def streaming_decoder(self) -> StreamingDecoder:
        """A decoder for one stream (or one batch of streams in step)."""
        return self.decoder.streaming()

    def decode(self, latents: Tensor) -> np.ndarray:  # [B, C, F, h, w] -> uint8 [B, T, H, W, 3]
        """Whole clips from normalised latents; those of damaged weights are refused (`require_finite`)."""
        groups = latents.split(CPU_CLIPS) if self.device.type == "cpu" else [latents]
        with torch.no_grad():
            return np.concatenate([to_frames(require_finite(self.decoder.decode(group))) for group in groups])

    def clock(self) -> float:
        """Wall-clock seconds, after everything queued on the device has finished."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()


def to_pixels(frames: np.ndarray, device: torch.device | str = "cpu") -> Tensor:
    """uint8 [B, T, H, W, 3] -> float32 [B, 3, T, H, W] in [-1, 1]."""
    writable = np.require(frames, requirements=("C", "W"))  # what PIL gives is not, and torch warns of it
    return torch.from_numpy(writable).to(device).permute(0, 4, 1, 2, 3).float() / 127.5 - 1.0


def to_frames(pixels: Tensor) -> np.ndarray:
    """[B, 3, T, H, W] in [-1, 1] -> uint8 [B, T, H, W, 3], rounded to nearest."""
    scaled = ((pixels.float() + 1.0) * 127.5).round().clamp(0, 255).to(torch.uint8)
    return scaled.permute(0, 2, 3, 4, 1).contiguous().cpu().numpy()


def require_finite(pixels: Tensor) -> Tensor:
    """The same; ValueError where one is nan or infinite: as uint8 it would be a black pixel, to be seen and judged."""
    if not pixels.isfinite().all():
        raise ValueError(
            "generated frames hold values that are nan or infinite: the weights of the DiT or of the VAE do, or a "
            "product overflowed; look at the loss of the run that made them, or try model.dtype=float32"
        )
    return pixels
