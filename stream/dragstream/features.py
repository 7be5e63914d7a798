"""The features that a drag moves: what chosen self-attentions of the model compute, before their projection.

DragStream reads blocks 12 to 15 of Wan 1.3B at the second noise level. The side that is optimised is read with
gradients, stops at the last block needed, and looks at the cache without writing or copying it; the side that it is
compared with is read once per drag, from frequency-filtered keys and values (SFS, eq. 5 to 8).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from einops import rearrange
from torch import Tensor

from models.diffusion.schedule import NUM_TRAIN_TIMESTEPS
from models.rollout import ChunkPass
from models.wan.attention import attend
from models.wan.blocks import AttentionTap, AttentionTaps
from models.wan.cache import KVContext, LayerKV, ReadOnlyContext
from models.wan.dit import WanDiT
from models.wan.split_attention import split_attention
from stream.dragstream.config import DragConfig
from stream.dragstream.frequency import low_pass_keys, low_pass_tokens


@dataclass(frozen=True)
class ReadAs:
    """What features are of: those of other blocks or of another noise level are not compared with them."""

    method: str
    layers: tuple[int, ...]
    sigma: float

    def __str__(self) -> str:
        return f"drag.method={self.method} in blocks {list(self.layers)} at noise level {self.sigma:.3f}"


@dataclass(frozen=True, eq=False)
class Reference:
    """Features of one latent frame as a drag found it; a later drag may bring them back (appendix R)."""

    clean: Tensor  # [C, h, w]: what the student makes of the frame
    read_as: ReadAs | None = None  # None: no features were read
    variants: dict[float | None, Tensor] = field(default_factory=dict)  # cutoff -> [C, rows, cols]; None: unfiltered
    key_values: tuple[LayerKV, ...] = ()  # sg_i2v: of the frame in each layer read, [1, heads, tokens, head_dim]
    alone: Tensor | None = None  # sg_i2v: [C, rows, cols], of the frame if it attends to nothing but itself


class FeatureReader:
    """Reads one student's attention at one noise level."""

    def __init__(self, student: WanDiT, cfg: DragConfig, sigma: float) -> None:
        self.student, self.cfg, self.sigma = student, cfg, sigma
        self.layers = cfg.layers_of(student.config.num_layers)
        self.read_as = ReadAs(cfg.method, tuple(self.layers), sigma)
        with torch.no_grad():
            self.modulation = student.modulation(NUM_TRAIN_TIMESTEPS * sigma)

    def features(self, shown: ChunkPass, latents: Tensor) -> Tensor:
        """Of the chunk's frames as ``latents`` [1, C, F, h, w] would have them: [F, channels, rows, cols]."""
        return self._joined(self._taps(shown, latents), shown, latents)

    def x0(self, shown: ChunkPass, latents: Tensor, taps: AttentionTaps | None = None) -> Tensor:
        """What the student predicts from ``latents``: [1, C, F, h, w]."""
        return self.student.predict_x0(
            latents, self.sigma, shown.condition, attention=_beside(shown), modulation=self.modulation, taps=taps
        )

    def features_and_x0(self, shown: ChunkPass, latents: Tensor) -> tuple[Tensor, Tensor]:
        """The same from a whole pass, with what the student predicts."""
        taps = AttentionTaps(self.layers)
        x0 = self.x0(shown, latents, taps)
        return self._joined(taps, shown, latents), x0

    def features_of_reference(self, shown: ChunkPass, latents: Tensor, reference: Reference) -> Tensor:
        """As `features`, but every frame attends to the reference frame alone (SG-I2V section 4.2)."""
        taps = self._taps(shown, latents)
        pairs = zip(self.layers, reference.key_values)
        outputs = [split_attention(taps.seen[layer].query, kv.key, kv.value, []) for layer, kv in pairs]
        return self._as_maps(outputs, latents)

    @torch.no_grad()
    def reference(self, shown: ChunkPass, cutoffs: Sequence[float | None], frame: int = -1) -> Reference:
        """Of one latent frame, the chunk's last by default, with each cutoff; without any, no features are read."""
        frame = range(shown.noisy_latents.shape[2])[frame]
        taps, x0 = AttentionTaps(self.layers), shown.x0
        if x0 is None:
            x0 = self.x0(shown, shown.noisy_latents, taps)
        clean = x0[0, :, frame].clone()
        if not cutoffs:
            return Reference(clean)
        if not taps.seen:
            taps = self._taps(shown, shown.noisy_latents)
        latents = shown.noisy_latents[:, :, frame : frame + 1]
        grid = self.student.token_grid(*latents.shape[-2:])
        tokens = grid[0] * grid[1]
        rows = slice(frame * tokens, (frame + 1) * tokens)
        variants = {
            cutoff: self._as_maps(
                [self._filtered(taps.seen[layer], layer, shown, grid, cutoff, rows) for layer in self.layers], latents
            )[0]
            for cutoff in cutoffs
        }
        if self.cfg.method != "sg_i2v":
            return Reference(clean, self.read_as, variants)
        seen = [taps.seen[layer] for layer in self.layers]
        own = [[part[:, :, rows].clone() for part in (tap.query, tap.key, tap.value)] for tap in seen]
        alone = self._as_maps([split_attention(q, k, v, []) for q, k, v in own], latents)[0]
        key_values = tuple(LayerKV(key, value) for _, key, value in own)
        return Reference(clean, self.read_as, variants, key_values, alone)

    def _taps(self, shown: ChunkPass, latents: Tensor) -> AttentionTaps:
        taps = AttentionTaps(self.layers)
        self.student.tap_attention(
            latents, self.modulation, shown.condition, taps, attention=_beside(shown),
            recompute=self.cfg.recompute,
        )  # fmt: skip
        return taps

    def _joined(self, taps: AttentionTaps, shown: ChunkPass, latents: Tensor) -> Tensor:
        outputs = []
        for layer in self.layers:
            tap = taps.seen[layer]
            if self.cfg.detach_key_value and torch.is_grad_enabled():
                past = [] if shown.context is None else [(kv.key, kv.value) for kv in shown.context.past(layer)]
                outputs.append(split_attention(tap.query, tap.key.detach(), tap.value.detach(), past))
            else:
                outputs.append(tap.output)
        return self._as_maps(outputs, latents)

    def _filtered(
        self, tap: AttentionTap, layer: int, shown: ChunkPass, grid: tuple[int, int], cutoff: float | None, rows: slice
    ) -> Tensor:
        """Attention of some queries to all in view, whose keys and values lose what is above the cutoff."""
        if cutoff is None:
            return tap.output[:, :, rows]
        beside = _beside(shown)
        keys, values = (tap.key, tap.value) if beside is None else beside.extend(layer, tap.key, tap.value)
        keys = low_pass_keys(keys, grid, cutoff, self.cfg.filter_rope)
        values = low_pass_tokens(values, grid, cutoff)
        return attend(tap.query[:, :, rows], keys, values, self.student.config.attention_backend)

    def _as_maps(self, outputs: Sequence[Tensor], latents: Tensor) -> Tensor:
        """Outputs of the layers, [1, heads, frames * rows * cols, head_dim] each -> [F, channels, rows, cols]."""
        rows, cols = self.student.token_grid(*latents.shape[-2:])
        maps = [rearrange(out[0], "h (f r c) d -> f (h d) r c", r=rows, c=cols) for out in outputs]
        return torch.cat(maps, dim=1)


def _beside(shown: ChunkPass) -> KVContext | None:
    """What the latents of a pass attend to beside themselves; nothing in a bidirectional model.

    While a chunk is being made, a pass without gradients may use its own slot of the cache, as each of its denoising
    passes does: nothing is copied, and the next pass overwrites it.
    """
    if shown.context is None or (shown.context.is_current and not torch.is_grad_enabled()):
        return shown.context
    return ReadOnlyContext(shown.context)
