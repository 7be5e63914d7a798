"""The Wan video diffusion transformer: one class for teacher, critic and student.

Wan 2.1 / 2.2 (arXiv 2503.20314) with the names of the official weights, plus MotionStream's track head. What
a token may attend to is an argument: everything (bidirectional teacher and critic), a chunk mask (causal
initialisation), or a KV context (streaming student). Image, track and CLIP conditioning follow `WanConfig`.

The training path takes a `Condition` and a timestep, and keeps the graph to every parameter. For inference,
what does not change between passes is computed once: text keys and values per prompt (`prepare_text`),
control channels per chunk (`prepare`), modulation per timestep (`modulation`). No path reads a value back
from the device.

Leaves out noise schedules, guidance and the chunk loop (models/diffusion, models/rollout.py).
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import replace

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from models.condition import Condition
from models.diffusion.prediction import velocity_to_x0
from models.motion.track_head import TrackHead
from models.vae.latent_space import LatentSpace
from models.wan.attention import ChunkMask
from models.wan.blocks import (
    AttentionContext,
    AttentionTaps,
    Head,
    TextTokens,
    TimeEmbedding,
    WanBlock,
    compute_dtype,
    without_autocast,
)
from models.wan.cache import KVContext, LayerKV
from models.wan.config import WanConfig
from models.wan.prepared import (
    Modulation,
    PreparedCondition,
    TextContext,
    check_condition,
    check_latents,
    clean_first_frame,
    model_input,
    of_layer,
)
from models.wan.rope import rope_table

Attention = ChunkMask | KVContext | None
MAX_PERIOD = 10_000.0  # of the sinusoidal timestep encoding


class WanDiT(nn.Module):
    """noisy latents, timestep, condition -> velocity."""

    # Methods beside forward that read parameters; a sharding wrapper has to be told of them.
    ENTRY_POINTS = (
        "predict_x0", "predict_x0_and_cache", "cache_pass", "prepare_text", "prepare", "modulation", "tap_attention",
    )  # fmt: skip

    def __init__(self, config: WanConfig, rng: torch.Generator | None = None):
        """Fresh weights (head and track head output zero), drawn from ``rng`` or the global generator."""
        super().__init__()
        self.config = config
        self.latent_space: LatentSpace | None = None  # that it was made in; kept in its files. None: not known
        dim = config.dim
        self.patch_embedding = nn.Conv3d(
            config.in_channels, dim, kernel_size=tuple(config.patch_size), stride=tuple(config.patch_size)
        )
        self.text_embedding = nn.Sequential(
            nn.Linear(config.text_dim, dim), nn.GELU(approximate="tanh"), nn.Linear(dim, dim)
        )
        self.time_embedding = nn.Sequential(nn.Linear(config.freq_dim, dim), nn.SiLU(), nn.Linear(dim, dim))
        self.time_projection = nn.Sequential(nn.SiLU(), nn.Linear(dim, 6 * dim))
        self.blocks = nn.ModuleList([WanBlock(config) for _ in range(config.num_layers)])
        self.head = Head(config)
        if config.clip_dim is not None:
            self.img_emb = ClipProjection(config.clip_dim, dim)
        if config.has_track_head:
            self.track_head = TrackHead(config.track_map_dim, config.track_hidden, config.track_channels)
        if not self.patch_embedding.weight.is_meta:
            self.reset_parameters(rng)

    def forward(
        self,
        noisy_latents: Tensor,
        timestep: Tensor | Modulation,
        condition: Condition | PreparedCondition,
        *,
        attention: Attention = None,
        start_frame: int = 0,
        taps: AttentionTaps | None = None,
    ) -> Tensor:
        """Velocity [B, C, F, H, W] in float32.

        noisy_latents [B, C, F, H, W]; timestep [B] or [B, F] (one per latent frame) in 0..1000, or a
        `Modulation`. ``start_frame`` is the temporal position of the first frame; a KV context brings its
        own. In a first_frame model a condition with an image makes latent frame 0 that image, clean: its
        timestep is 0, for every caller. ``taps`` collects the self-attention of its layers. Raises ValueError
        where shapes, condition and config disagree.
        """
        x, time, prepared, context = self._enter(noisy_latents, timestep, condition, attention, start_frame)
        context = replace(context, taps=taps)
        x = self._run(self.blocks, x, time, prepared, context, recompute=self.config.activation_checkpointing)
        return self._leave(x, time, noisy_latents)

    def predict_x0(
        self,
        noisy_latents: Tensor,
        sigma: Tensor | float,
        condition: Condition | PreparedCondition,
        *,
        attention: Attention = None,
        start_frame: int = 0,
        modulation: Modulation | None = None,
        taps: AttentionTaps | None = None,
    ) -> Tensor:
        """Clean latents [B, C, F, H, W] in float32; sigma [B], [B, F] or a number in [0, 1].

        A clean first frame is returned as it is. ``modulation``: precomputed for 1000 * sigma.
        """
        sigma = _per_sample(sigma, noisy_latents.shape[0], noisy_latents.device)
        timestep = 1000.0 * sigma if modulation is None else modulation
        velocity = self(noisy_latents, timestep, condition, attention=attention, start_frame=start_frame, taps=taps)
        return self._x0(noisy_latents, velocity, sigma, condition)

    def tap_attention(
        self,
        noisy_latents: Tensor,
        timestep: Tensor | Modulation,
        condition: Condition | PreparedCondition,
        taps: AttentionTaps,
        *,
        attention: Attention = None,
        start_frame: int = 0,
        recompute: bool = False,
    ) -> None:
        """Fills ``taps`` and stops at the last layer that it asks for.

        ``recompute``: keep only each block's input for the backward pass. Raises ValueError for a layer that
        the model does not have.
        """
        x, time, prepared, context = self._enter(noisy_latents, timestep, condition, attention, start_frame)
        context, last = replace(context, taps=taps), max(taps.layers, default=-1)
        if not 0 <= min(taps.layers, default=-1) <= last < len(self.blocks):
            raise ValueError(f"layers={sorted(taps.layers)} must be in 0..{len(self.blocks) - 1}, the blocks")
        x = self._run(self.blocks[:last], x, time, prepared, context, recompute=recompute)
        self.blocks[last].attend_only(x, last, of_layer(time, last), context)

    @torch.no_grad()
    def cache_pass(
        self,
        latents: Tensor,
        condition: Condition | PreparedCondition,
        context: KVContext,
        timestep: float | Tensor | Modulation = 0.0,
    ) -> list[LayerKV]:
        """Keys and values of a finished chunk [B, C, c, H, W], for the cache; no gradient.

        The cache must hold clean context, hence timestep 0. The last layer stops after its keys and values:
        nothing reads the rest.
        """
        if not isinstance(timestep, Modulation):
            timestep = _per_sample(timestep, latents.shape[0], latents.device)
        x, time, prepared, shared = self._enter(latents, timestep, condition, context, 0)
        *blocks, last_block = self.blocks
        layers: list[LayerKV] = []
        x = self._run(blocks, x, time, prepared, shared, layers=layers)
        return [*layers, last_block.project_key_value(x, of_layer(time, len(blocks)))]

    @torch.no_grad()
    def predict_x0_and_cache(
        self,
        noisy_latents: Tensor,
        sigma: float,
        condition: Condition | PreparedCondition,
        context: KVContext,
        modulation: Modulation,
    ) -> tuple[Tensor, list[LayerKV]]:
        """`predict_x0` of a chunk, and the keys and values of that very pass (of noisy context); no gradient."""
        x, time, prepared, shared = self._enter(noisy_latents, modulation, condition, context, 0)
        layers: list[LayerKV] = []
        x = self._run(self.blocks, x, time, prepared, shared, layers=layers)
        velocity = self._leave(x, time, noisy_latents)
        return self._x0(noisy_latents, velocity, sigma, prepared), layers

    def prepare_text(self, prompt_embeds: Tensor, clip_embeds: Tensor | None = None) -> TextContext:
        """Text keys and values of all layers, for inference; a training step passes the `Condition`."""
        tokens = self._embed_text(prompt_embeds, clip_embeds)
        return TextContext(tuple(block.project_text(tokens) for block in self.blocks))

    def prepare(self, condition: Condition, text: TextContext | None = None) -> PreparedCondition:
        """Everything that the passes of one chunk share; ``text`` from `prepare_text` if it is at hand."""
        check_condition(condition, self.config)
        if text is None:
            text = self.prepare_text(condition.prompt_embeds, condition.clip_embeds)
        return self._encode(condition, text)

    def modulation(self, timestep: Tensor | float) -> Modulation:
        """Modulation of all layers at a timestep in 0..1000: a number, [B] or [B, F]."""
        device = self.patch_embedding.weight.device
        batch = timestep.shape[0] if isinstance(timestep, Tensor) and timestep.ndim else 1
        tables = self._modulation(_per_sample(timestep, batch, device))
        if self.config.image_conditioning != "first_frame":
            return tables
        return replace(tables, clean=self._modulation(torch.zeros(1, device=device)))

    def fuse_projections(self) -> None:
        """For inference on weights that do not move any more: fewer, larger products in self-attention, and on a CPU
        weights laid out once.
        """
        for block in self.blocks:
            block.fuse_projections()

    def generated_frames(self, condition: Condition | PreparedCondition, num_frames: int) -> Tensor:
        """Bool [F]: False for a first frame given clean, which losses and normalisers must leave out."""
        generated = torch.ones(num_frames, dtype=torch.bool, device=self.patch_embedding.weight.device)
        if clean_first_frame(condition, self.config) is not None:
            generated[0] = False
        return generated

    def token_grid(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of tokens of a latent frame; raises ValueError where patches do not fit."""
        _, patch_h, patch_w = self.config.patch_size
        if height % patch_h or width % patch_w:
            raise ValueError(f"latent size {height} x {width} must be a multiple of the patch {patch_h} x {patch_w}")
        return height // patch_h, width // patch_w

    def tokens_per_frame(self, height: int, width: int) -> int:
        return math.prod(self.token_grid(height, width))

    @torch.no_grad()
    def reset_parameters(self, rng: torch.Generator | None = None) -> None:
        """Wan's initial weights: Xavier, N(0, 0.02²) in the embeddings, zero head; N(0, 1/dim) modulation."""
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Conv3d)):
                nn.init.xavier_uniform_(module.weight.flatten(1), generator=rng)
                nn.init.zeros_(module.bias)
        for module in (*self.text_embedding, *self.time_embedding):
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=0.02, generator=rng)
        for module in (*self.blocks, self.head):
            nn.init.normal_(module.modulation, std=self.config.dim**-0.5, generator=rng)
        nn.init.zeros_(self.head.head.weight)
        if self.config.has_track_head:
            self.track_head.reset_output()

    def _enter(
        self,
        latents: Tensor,
        timestep: Tensor | Modulation,
        condition: Condition | PreparedCondition,
        attention: Attention,
        start_frame: int,
    ) -> tuple[Tensor, TimeEmbedding | Modulation, PreparedCondition, AttentionContext]:
        """Tokens [B, F, S, D] and what the blocks read beside them."""
        if isinstance(condition, Condition):
            check_condition(condition, self.config)
            text = self._embed_text(condition.prompt_embeds, condition.clip_embeds)
            condition = self._encode(condition, text)
        check_latents(latents, condition, self.config)
        context = self._attention_context(attention, latents, start_frame)
        time = self._time(timestep, latents, clean_first_frame(condition, self.config) is not None)
        tokens = self._patchify(model_input(latents, condition, self.config))
        return tokens, time, condition, context

    @staticmethod
    def _run(
        blocks: Iterable[nn.Module],
        x: Tensor,
        time: TimeEmbedding | Modulation,
        prepared: PreparedCondition,
        context: AttentionContext,
        recompute: bool = False,
        layers: list[LayerKV] | None = None,
    ) -> Tensor:
        """Tokens after these blocks, the model's first ones.

        ``recompute``: keep only each block's input for the backward pass. ``layers``: takes keys and values of each.
        """
        for layer, block in enumerate(blocks):
            args = (x, layer, of_layer(time, layer), of_layer(prepared.text, layer), context)
            if layers is not None:
                x, key_value = block.forward_with_key_value(*args)
                layers.append(key_value)
            elif recompute and torch.is_grad_enabled():
                x = checkpoint(block, *args, use_reentrant=False, preserve_rng_state=False)
            else:
                x = block(*args)
        return x

    def _leave(self, x: Tensor, time: TimeEmbedding | Modulation, latents: Tensor) -> Tensor:
        """Tokens after the last block -> velocity [B, C, F, H, W]."""
        table = time.head if isinstance(time, Modulation) else self.head.modulation_table(time)
        return self._unpatchify(self.head(x, table), latents.shape[-2])

    def _x0(
        self,
        noisy_latents: Tensor,
        velocity: Tensor,
        sigma: Tensor | float,
        condition: Condition | PreparedCondition,
    ) -> Tensor:
        x0 = velocity_to_x0(noisy_latents, velocity, sigma)
        image = clean_first_frame(condition, self.config)
        return x0 if image is None else torch.cat([image.to(x0), x0[:, :, 1:]], dim=2)

    def _attention_context(self, attention: Attention, latents: Tensor, start_frame: int) -> AttentionContext:
        frames, grid = latents.shape[2], self.token_grid(*latents.shape[-2:])
        mask, cache, num_chunks = None, None, 1
        if isinstance(attention, ChunkMask):
            mask, num_chunks = attention, attention.num_chunks(frames)
        elif attention is not None:
            cache = attention
            if frames != cache.chunk_frames or start_frame not in (0, cache.start_frame):
                raise ValueError(
                    f"{frames} latent frames from start_frame={start_frame}, but the KV context is for "
                    f"{cache.chunk_frames} frames from {cache.start_frame}; pass a chunk, no start_frame"
                )
            start_frame = cache.start_frame
        rope = rope_table(frames, *grid, self.config.head_dim, start_frame=start_frame, device=latents.device)
        return AttentionContext(rope, self.config.attention_backend, mask, num_chunks, cache)

    def _embed_text(self, prompt_embeds: Tensor, clip_embeds: Tensor | None) -> TextTokens:
        config = self.config
        if tuple(prompt_embeds.shape[1:]) != (config.text_len, config.text_dim):
            raise ValueError(
                f"prompt_embeds has shape {tuple(prompt_embeds.shape)}; it must be [B, {config.text_len}, "
                f"{config.text_dim}], zero-padded after the text encoder"
            )
        dtype = compute_dtype(self.patch_embedding.weight)
        text = self.text_embedding(prompt_embeds.to(dtype))
        if config.clip_dim is None:
            return TextTokens(text, None)
        if clip_embeds is None:
            raise ValueError(
                f"clip_embeds=None, but this model attends to CLIP tokens (clip_dim={config.clip_dim}); pass "
                f"[B, 257, {config.clip_dim}], zeros for no image"
            )
        return TextTokens(text, self.img_emb(clip_embeds.to(dtype)))

    def _encode(self, condition: Condition, text: TextContext | TextTokens) -> PreparedCondition:
        track = condition.track_map
        if track is not None and self.config.has_track_head:
            track = self.track_head(track.to(self.patch_embedding.weight.dtype))
        return PreparedCondition(text, track, condition.image_latents, condition.num_given_latents)

    def _patchify(self, latents: Tensor) -> Tensor:
        """[B, in_channels, F, H, W] -> tokens [B, F, S, D]; the strided convolution as one matrix product."""
        _, patch_h, patch_w = self.config.patch_size
        weight = self.patch_embedding.weight
        patches = rearrange(latents, "b c f (h p) (w q) -> b f (h w) (c p q)", p=patch_h, q=patch_w)
        tokens = F.linear(patches.to(compute_dtype(weight)), weight.flatten(1), self.patch_embedding.bias)
        return tokens.to(weight.dtype)  # the residual stream has the weights' dtype, float32 under autocast

    def _unpatchify(self, patches: Tensor, height: int) -> Tensor:
        _, patch_h, patch_w = self.config.patch_size
        pattern = "b f (h w) (p q c) -> b c f (h p) (w q)"
        return rearrange(patches.float(), pattern, h=height // patch_h, p=patch_h, q=patch_w)

    def _time(
        self, timestep: Tensor | Modulation, latents: Tensor, clean_first_frame: bool
    ) -> TimeEmbedding | Modulation:
        batch, frames = latents.shape[0], latents.shape[2]
        if isinstance(timestep, Modulation):
            if timestep.head.shape[1] not in (1, frames):
                raise ValueError(f"modulation of {timestep.head.shape[1]} frames for latents of {frames} frames")
            return timestep.with_clean_first_frame(batch, frames) if clean_first_frame else timestep
        if timestep.shape not in ((batch,), (batch, frames), (batch, 1)):
            raise ValueError(f"timestep has shape {tuple(timestep.shape)}; it must be [{batch}] or [{batch}, {frames}]")
        timestep = timestep.reshape(batch, -1)
        if clean_first_frame:
            rest = timestep.expand(-1, frames)[:, 1:]
            timestep = torch.cat([torch.zeros_like(timestep[:, :1]), rest], dim=1)
        return self._embed_time(timestep)

    def _modulation(self, timestep: Tensor) -> Modulation:
        time = self._embed_time(timestep.reshape(timestep.shape[0], -1))
        tables = tuple(block.modulation_table(time) for block in self.blocks)
        return Modulation(tables, self.head.modulation_table(time))

    def _embed_time(self, timestep: Tensor) -> TimeEmbedding:
        """Timesteps [B, F] -> their features, in float32 whatever the model's dtype."""
        if timestep.dtype in (torch.bfloat16, torch.float16):
            raise ValueError(f"timestep has dtype {timestep.dtype}, which cannot hold 927.27; pass float32")
        with without_autocast(timestep.device):
            encoding = timestep_encoding(timestep, self.config.freq_dim)
            hidden = F.silu(_linear32(self.time_embedding[0], encoding))
            time = _linear32(self.time_embedding[2], hidden)
            projected = _linear32(self.time_projection[1], F.silu(time)).unflatten(-1, (6, -1))
            shift1, scale1, gate1, shift2, scale2, gate2 = projected.unbind(-2)
            blocks = torch.stack([shift1, 1 + scale1, gate1, shift2, 1 + scale2, gate2], dim=-2)
            return TimeEmbedding(blocks, torch.stack([time, 1 + time], dim=-2))


class ClipProjection(nn.Module):
    """CLIP image tokens -> model width."""

    def __init__(self, clip_dim: int, dim: int):
        super().__init__()
        self.proj = nn.Sequential(
            nn.LayerNorm(clip_dim),
            nn.Linear(clip_dim, clip_dim),
            nn.GELU(),
            nn.Linear(clip_dim, dim),
            nn.LayerNorm(dim),
        )

    def forward(self, clip_embeds: Tensor) -> Tensor:
        return self.proj(clip_embeds)


def timestep_encoding(timestep: Tensor, dim: int) -> Tensor:
    """[...] in 0..1000 -> [..., dim] float32: cosines, then sines, of angles computed in float64."""
    exponents = torch.arange(dim // 2, dtype=torch.float64, device=timestep.device) / (dim // 2)
    angles = timestep.double().unsqueeze(-1) * MAX_PERIOD**-exponents
    return torch.cat([angles.cos(), angles.sin()], dim=-1).float()


def _linear32(layer: nn.Linear, x: Tensor) -> Tensor:
    return F.linear(x, layer.weight.float(), layer.bias.float())


def _per_sample(value: Tensor | float, batch: int, device: torch.device) -> Tensor:
    """A number becomes [B], filled on the device (no copy from the host); a tensor gets its batch size."""
    if not isinstance(value, Tensor):
        return torch.full((batch,), float(value), device=device)
    return value.expand(batch, *value.shape[1:]) if value.ndim else value.expand(batch)
