"""From a batch of the data set to what a DiT is trained on: latents and a `Condition`.

Latents, text embeddings and CLIP features stored in the shards are used where there are; what is missing is
made by the frozen encoders, which are built when first needed. The first frame's latent is a clip's own
latent 0: the Wan VAEs are causal, so it depends on frame 0 alone.

Left out: what is drawn at random about a condition (the stages).
"""

from __future__ import annotations

import logging
from pathlib import Path

import torch
from torch import Tensor

from data.batch import Batch
from models.assemble import ModelConfig, build_clip_encoder, build_text_encoder, build_vae
from models.condition import Condition, build_condition
from models.motion.rgb import draw_tracks
from models.motion.tracks import Tracks
from models.vae.wan_vae import WanVae
from models.wan.image_encoder import ClipImageEncoder
from models.wan.text_encoder import TextEncoder

log = logging.getLogger(__name__)


class ClipEncoder:
    """The frozen encoders of a model, on one device."""

    def __init__(self, model_cfg: ModelConfig, device: torch.device) -> None:
        self.model_cfg, self.device = model_cfg, device
        self._vae: WanVae | None = None
        self._text: TextEncoder | None = None
        self._image: ClipImageEncoder | None = None
        self._null: Tensor | None = None

    @property
    def can_decode(self) -> bool:
        """Whether there is a VAE: without one, stored latents can be trained on but not looked at."""
        path = self.model_cfg.vae.path
        return path is not None and Path(path).exists()

    @property
    def vae(self) -> WanVae:
        """Raises ValueError where model.vae.path is not set."""
        if self._vae is None:
            self._vae = build_vae(self.model_cfg).to(self.device).eval().requires_grad_(False)
        return self._vae

    @property
    def null_prompt_embeds(self) -> Tensor:
        """[1, text_len, text_dim]: what a dropped text means.

        A text encoder that is built for this alone is not kept: UMT5 has 11 GB.
        """
        if self._null is None:
            before = self._text
            self._null = self._text_encoder().null().to(self.device)
            self._text = before
        return self._null

    def latents(self, batch: Batch) -> Tensor:
        """Normalised latents [B, C, F, h, w] float32, stored or encoded."""
        return batch.latents.float() if batch.latents is not None else self._encode(batch.model_pixels())

    def prompt_embeds(self, batch: Batch) -> Tensor:
        """[B, text_len, text_dim], stored or encoded from the captions."""
        if batch.prompt_embeds is not None:
            return batch.prompt_embeds
        return self._text_encoder().encode(batch.captions).to(self.device)

    def clip_embeds(self, batch: Batch) -> Tensor | None:
        """[B, 257, 1280] of the first frame, stored or encoded; None for a model without image cross-
        attention.
        """
        if self.model_cfg.dit.clip_dim is None or batch.clip_embeds is not None:
            return batch.clip_embeds
        if batch.pixels is None:
            raise ValueError(
                "the shards hold neither clip_embeds nor loaded pixels, and model.dit.clip_dim is set; run "
                "`python -m data step=encode` and step=pack with model.clip_encoder set"
            )
        if self._image is None:
            self._image = build_clip_encoder(self.model_cfg)
            assert self._image is not None, "validate() has checked that clip_encoder comes with dit.clip_dim"
            self._image.to(self.device).eval().requires_grad_(False)
        return self._image.encode(batch.model_pixels()[:, :, 0])

    def condition(self, batch: Batch, latents: Tensor, tracks: Tracks | None) -> Condition:
        """Condition of whole clips: `latents` are their own, tracks of the size of model.clip, as shards must be."""
        dit, track_latents = self.model_cfg.dit, None
        if tracks is not None and dit.track_channels and dit.track_encoding == "rgb":  # MotionStream Table 3
            track_latents = self._encode(draw_tracks(tracks))
        return build_condition(
            prompt_embeds=self.prompt_embeds(batch),
            null_prompt_embeds=self.null_prompt_embeds,
            tracks=tracks,
            dit=dit,
            latent_size=(latents.shape[-2], latents.shape[-1]),
            cell_px=self.model_cfg.vae.spatial_stride,
            image_latents=None if dit.image_conditioning == "none" else latents[:, :, :1],
            clip_embeds=self.clip_embeds(batch),
            track_latents=track_latents,
        )

    def _encode(self, pixels: Tensor) -> Tensor:
        with torch.autocast(self.device.type, enabled=False):  # as stored latents were made
            return self.vae.encode(pixels)

    def _text_encoder(self) -> TextEncoder:
        if self._text is None:
            self._text = build_text_encoder(self.model_cfg)
            if isinstance(self._text, torch.nn.Module):
                self._text.to(self.device)
        return self._text
