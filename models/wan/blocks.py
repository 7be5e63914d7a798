"""One Wan transformer block and the output head.

Wan 2.1 (arXiv 2503.20314), with the attribute names of the official weights. Order of a block: self-attention
and feed-forward are modulated by the timestep (shift, scale, gate each); cross-attention to the text, with a
second branch for CLIP image tokens, is not. Tokens are kept as [B, F, S, D] (S per latent frame), so that
per-frame modulation [B, F or 1, D] broadcasts and is never expanded to tokens. Norms and modulation are
computed in float32, products in the dtype of the weights or of autocast; the residual stream keeps the dtype
it enters with.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.wan.attention import ChunkMask, attend, chunk_causal_attention
from models.wan.cache import KVContext, LayerKV
from models.wan.config import WanConfig
from models.wan.packed_linear import Linear, PackedWeight, pack
from models.wan.rope import apply_rope


@dataclass(frozen=True, eq=False)
class TimeEmbedding:
    """Timestep features before a block adds its own modulation; float32, F is 1 where all frames share a
    timestep.

    A dataclass, not tensors: sharding wrappers cast tensor arguments to the parameter dtype, and these must
    not be.
    """

    blocks: Tensor  # [B, F, 6, D]: shift, 1 + scale, gate of attention, then of the feed-forward network
    head: Tensor  # [B, F, 2, D]: shift, 1 + scale


@dataclass(frozen=True, eq=False)
class TextTokens:
    """Embedded conditioning tokens, before each layer's own projection."""

    text: Tensor  # [B, text_len, D]
    image: Tensor | None  # [B, 257, D] where the model has the CLIP branch


@dataclass(frozen=True, eq=False)
class TextKV:
    """One layer's projected conditioning tokens, each [B, heads, tokens, head_dim]."""

    key: Tensor
    value: Tensor
    image_key: Tensor | None = None
    image_value: Tensor | None = None


@dataclass(frozen=True, eq=False)
class AttentionTap:
    """What one self-attention computed for the current tokens, each [B, heads, L, head_dim]."""

    query: Tensor  # rotated
    key: Tensor  # rotated
    value: Tensor
    output: Tensor  # before the output projection


class AttentionTaps:
    """Collects the self-attention of chosen layers during a pass. Features for drag editing; no extra work."""

    def __init__(self, layers: Iterable[int]) -> None:
        self.layers = frozenset(layers)
        self.seen: dict[int, AttentionTap] = {}

    def see(self, layer: int, query: Tensor, key: Tensor, value: Tensor, output: Tensor) -> None:
        if layer in self.layers and layer not in self.seen:  # again where a pass is recomputed
            self.seen[layer] = AttentionTap(query, key, value, output)


@dataclass(frozen=True, eq=False)
class AttentionContext:
    """What all layers of one forward pass share: rotations of the current tokens and what these may see."""

    rope: Tensor  # see rope_table
    backend: str
    mask: ChunkMask | None = None
    num_chunks: int = 1
    cache: KVContext | None = None
    taps: AttentionTaps | None = None


@contextmanager
def without_autocast(device: torch.device) -> Iterator[None]:
    if torch.amp.is_autocast_available(device.type):
        with torch.autocast(device.type, enabled=False):
            yield
    else:
        yield


def compute_dtype(weight: Tensor) -> torch.dtype:
    """Dtype of matrix products: autocast's where it is on, else the weights'."""
    kind = weight.device.type
    if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):
        return torch.get_autocast_dtype(kind)
    return weight.dtype


def modulated_norm(x: Tensor, shift: Tensor, scale: Tensor, eps: float) -> Tensor:
    """LayerNorm(x) * scale + shift in float32. x [B, F, S, D]; shift, scale [B or 1, F or 1, D]."""
    width = x.shape[-1:]
    if scale.numel() == x.shape[-1] and (x.dtype == scale.dtype or x.device.type == "cpu"):
        # One timestep for all tokens (streaming): the modulation is the norm's own affine, one kernel less. Only
        # the CPU's kernel takes a float32 affine for bfloat16 tokens.
        return F.layer_norm(x, width, scale.reshape(width), shift.reshape(width), eps)
    return torch.addcmul(shift.unsqueeze(2), F.layer_norm(x.float(), width, None, None, eps), scale.unsqueeze(2))


def gated_residual(x: Tensor, y: Tensor, gate: Tensor) -> Tensor:
    """x + y * gate in float32, kept in x's dtype. x, y [B, F, S, D]; gate [B or 1, F or 1, D]."""
    return torch.addcmul(x, y, gate.unsqueeze(2)).to(x.dtype)


class RMSNorm(nn.Module):
    """Root-mean-square norm over all heads together; float32 out."""

    def __init__(self, dim: int, eps: float):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x.float(), self.weight.shape, self.weight.float(), self.eps)


def _qk_norm(config: WanConfig) -> nn.Module:
    return RMSNorm(config.dim, config.eps) if config.qk_norm else nn.Identity()


class SelfAttention(nn.Module):
    """Attention among video tokens, with rotary positions."""

    def __init__(self, config: WanConfig):
        super().__init__()
        self.num_heads = config.num_heads
        self.q = Linear(config.dim, config.dim)
        self.k = Linear(config.dim, config.dim)
        self.v = Linear(config.dim, config.dim)
        self.o = Linear(config.dim, config.dim)
        self.norm_q = _qk_norm(config)
        self.norm_k = _qk_norm(config)
        self._fused: FusedProjections | None = None

    def fuse_projections(self) -> None:
        """For inference: one product for query, key and value; see `FusedProjections`. Adapters are left alone."""
        are_plain = all(type(layer) is Linear for layer in (self.q, self.k, self.v))
        if are_plain and (self._fused is None or self._fused.places != _places(self)):
            self._fused = FusedProjections.of(self)

    def project_key_value(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens [B, L, D] -> normalised, unrotated key and value, each [B, L, heads, head_dim]."""
        key, value = self.norm_k(self.k(x)), self.v(x)
        return self._split_heads(key), self._split_heads(value)

    def forward(self, x: Tensor, layer: int, context: AttentionContext) -> tuple[Tensor, Tensor, Tensor]:
        """Tokens [B, L, D] -> (output [B, L, D], unrotated key, value), the last two for a cache."""
        raw_key, value, rotated = self._project(x, context.rope)
        q, k, v = (heads.transpose(1, 2) for heads in (*rotated, value))
        if context.cache is not None:
            out = context.cache.attend(layer, q, k, v, context.backend)
        elif context.mask is not None:
            out = chunk_causal_attention(q, k, v, context.mask, context.num_chunks, context.backend)
        else:
            out = attend(q, k, v, context.backend)
        if context.taps is not None:
            context.taps.see(layer, q, k, v, out)
        return self.o(out.transpose(1, 2).flatten(2)), raw_key, value

    def _project(self, x: Tensor, rope: Tensor) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor]]:
        """(unrotated key, value, (query, key) rotated), each [B, L, heads, head_dim]."""
        if self._fused is not None and self._fused.apply_to(self):
            both, value = self._fused.project(self, x)  # query's heads, then key's
            query, key = apply_rope(both, rope).to(value.dtype).chunk(2, dim=2)
            return both[:, :, self.num_heads :], self._split_heads(value), (query, key)
        raw_key, value = self.project_key_value(x)
        query = self._split_heads(self.norm_q(self.q(x)))
        query, key = (apply_rope(heads, rope).to(value.dtype) for heads in (query, raw_key))
        return raw_key, value, (query, key)

    def _split_heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.num_heads, -1))


@dataclass(frozen=True, eq=False)
class FusedProjections:
    """The weights of query, key and value in one piece of memory, read by one product.

    The layers keep their weights, as parts of it: what is written to them in place is read here (not by their
    ``.data`` once the weight is packed). Ends by itself where they get other memory, as by `.to(...)`, and pauses where
    gradients are wanted.
    """

    weight: Tensor  # [3 D, D]
    bias: Tensor  # [3 D]
    places: tuple[int, int, int]  # addresses of the three weights in it
    packed: PackedWeight | None  # the weight in a layout that is faster to read

    @classmethod
    @torch.no_grad()
    def of(cls, attention: SelfAttention) -> FusedProjections:
        layers = (attention.q, attention.k, attention.v)
        weight, bias = torch.cat([layer.weight for layer in layers]), torch.cat([layer.bias for layer in layers])
        for layer, its_weight, its_bias in zip(layers, weight.chunk(3), bias.chunk(3), strict=True):
            layer.weight.data, layer.bias.data = its_weight, its_bias
        return cls(weight, bias, _places(attention), PackedWeight.of(weight, _weights(attention)))

    def apply_to(self, attention: SelfAttention) -> bool:
        """Whether no gradient is wanted, which the value would keep the memory of all three for, and the layers still
        have their weights here.
        """
        if torch.is_grad_enabled():
            return False
        return torch.compiler.is_compiling() or _places(attention) == self.places  # compiled: of the weights then

    def project(self, attention: SelfAttention, x: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens [B, L, D] -> query's and key's heads [B, L, 2 heads, head_dim], normalised, and value [B, L, D]."""
        if self.packed is not None and self.packed.serves(x, _weights(attention)):
            joined = self.packed.product(x, self.bias)
        else:
            joined = F.linear(x, self.weight, self.bias)
        both, value = joined.split([2 * x.shape[-1], x.shape[-1]], dim=-1)
        both = both.unflatten(-1, (2, -1))
        if isinstance(attention.norm_q, RMSNorm):
            scale = torch.stack([attention.norm_q.weight, attention.norm_k.weight]).float()
            both = F.rms_norm(both.float(), both.shape[-1:], None, attention.norm_q.eps) * scale
        return both.flatten(-2).unflatten(-1, (2 * attention.num_heads, -1)), value


def _weights(attention: SelfAttention) -> tuple[Tensor, Tensor, Tensor]:
    return attention.q.weight, attention.k.weight, attention.v.weight


def _places(attention: SelfAttention) -> tuple[int, int, int]:
    query, key, value = _weights(attention)
    return query.data_ptr(), key.data_ptr(), value.data_ptr()


class CrossAttention(nn.Module):
    """Attention to text tokens; CLIP image tokens have their own keys, values and softmax."""

    def __init__(self, config: WanConfig):
        super().__init__()
        self.num_heads, self.backend = config.num_heads, config.attention_backend
        self.q = Linear(config.dim, config.dim)
        self.k = Linear(config.dim, config.dim)
        self.v = Linear(config.dim, config.dim)
        self.o = Linear(config.dim, config.dim)
        self.norm_q = _qk_norm(config)
        self.norm_k = _qk_norm(config)
        self.has_image_branch = config.clip_dim is not None
        if self.has_image_branch:
            self.k_img = Linear(config.dim, config.dim)
            self.v_img = Linear(config.dim, config.dim)
            self.norm_k_img = _qk_norm(config)

    def project(self, tokens: TextTokens) -> TextKV:
        value = self._heads(self.v(tokens.text))
        key = self._heads(self.norm_k(self.k(tokens.text)).to(value.dtype))
        if not self.has_image_branch:
            return TextKV(key, value)
        image_value = self._heads(self.v_img(tokens.image))
        image_key = self._heads(self.norm_k_img(self.k_img(tokens.image)).to(value.dtype))
        return TextKV(key, value, image_key, image_value)

    def forward(self, x: Tensor, text: TextTokens | TextKV) -> Tensor:
        kv = self.project(text) if isinstance(text, TextTokens) else text
        query = self._heads(self.norm_q(self.q(x)).to(kv.value.dtype))
        out = attend(query, kv.key, kv.value, self.backend)
        if kv.image_key is not None:
            out = out + attend(query, kv.image_key, kv.image_value, self.backend)
        return self.o(out.transpose(1, 2).flatten(2))

    def _heads(self, x: Tensor) -> Tensor:
        """[B, L, D] -> [B, heads, L, head_dim]."""
        return x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)


class WanBlock(nn.Module):
    """Self-attention, cross-attention, feed-forward.

    ``time`` is a `TimeEmbedding` (training), or this layer's modulation table, made once by
    `modulation_table`; ``text`` is `TextTokens` (training), or this layer's `TextKV`, made once by
    `project_text`.
    """

    # Methods beside forward that read parameters; a sharding wrapper has to be told of them.
    ENTRY_POINTS = ("modulation_table", "project_text", "project_key_value", "forward_with_key_value", "attend_only")

    def __init__(self, config: WanConfig):
        super().__init__()
        self.eps = config.eps
        self.modulation = nn.Parameter(torch.zeros(1, 6, config.dim))
        self.self_attn = SelfAttention(config)
        self.norm3 = nn.LayerNorm(config.dim, config.eps) if config.cross_attn_norm else nn.Identity()
        self.cross_attn = CrossAttention(config)
        self.ffn = nn.Sequential(
            Linear(config.dim, config.ffn_dim),
            nn.GELU(approximate="tanh"),
            Linear(config.ffn_dim, config.dim),
        )

    def fuse_projections(self) -> None:
        """For inference: see `WanDiT.fuse_projections`."""
        self.self_attn.fuse_projections()
        pack([self.self_attn.o, self.cross_attn.q, self.cross_attn.o, self.ffn[0], self.ffn[2]])

    def modulation_table(self, time: TimeEmbedding) -> Tensor:
        """[B, F, 6, D] float32: shift1, 1 + scale1, gate1, shift2, 1 + scale2, gate2."""
        return time.blocks + self.modulation.float()

    def project_text(self, tokens: TextTokens) -> TextKV:
        return self.cross_attn.project(tokens)

    def project_key_value(self, x: Tensor, time: TimeEmbedding | Tensor) -> LayerKV:
        """Keys and values of this layer, and nothing else: all that a cache needs of the last layer."""
        shift, scale = self._table(time).unbind(2)[:2]
        key, value = self.self_attn.project_key_value(self._norm(x, shift, scale))
        return _layer_kv(key, value)

    def forward(
        self,
        x: Tensor,
        layer: int,
        time: TimeEmbedding | Tensor,
        text: TextTokens | TextKV,
        context: AttentionContext,
    ) -> Tensor:
        """x [B, F, S, D] -> [B, F, S, D]."""
        return self._forward(x, layer, time, text, context)[0]

    def forward_with_key_value(
        self,
        x: Tensor,
        layer: int,
        time: TimeEmbedding | Tensor,
        text: TextTokens | TextKV,
        context: AttentionContext,
    ) -> tuple[Tensor, LayerKV]:
        """As forward, and the keys and values that this layer computed."""
        x, key, value = self._forward(x, layer, time, text, context)
        return x, _layer_kv(key, value)

    def attend_only(self, x: Tensor, layer: int, time: TimeEmbedding | Tensor, context: AttentionContext) -> None:
        """The self-attention and nothing after it, for the sake of what ``context.taps`` sees."""
        shift, scale = self._table(time).unbind(2)[:2]
        self.self_attn(self._norm(x, shift, scale), layer, context)

    def _forward(
        self,
        x: Tensor,
        layer: int,
        time: TimeEmbedding | Tensor,
        text: TextTokens | TextKV,
        context: AttentionContext,
    ) -> tuple[Tensor, Tensor, Tensor]:
        shift1, scale1, gate1, shift2, scale2, gate2 = self._table(time).unbind(2)
        y, key, value = self.self_attn(self._norm(x, shift1, scale1), layer, context)
        x = gated_residual(x, y.view(x.shape), gate1)
        x = x + self.cross_attn(self.norm3(x).flatten(1, 2), text).view(x.shape)
        x = gated_residual(x, self._feed_forward(self._norm(x, shift2, scale2)).view(x.shape), gate2)
        return x, key, value

    def _feed_forward(self, x: Tensor) -> Tensor:
        """Tokens [B, L, D] -> [B, L, D]."""
        widen, _, narrow = self.ffn
        return narrow(widen.with_gelu(x)) if type(widen) is Linear and widen.is_packed_for(x) else self.ffn(x)

    def _table(self, time: TimeEmbedding | Tensor) -> Tensor:
        return self.modulation_table(time) if isinstance(time, TimeEmbedding) else time

    def _norm(self, x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
        """Modulated norm, as tokens [B, L, D] in the dtype of the products that follow."""
        return modulated_norm(x, shift, scale, self.eps).flatten(1, 2).to(compute_dtype(self.self_attn.q.weight))


def _layer_kv(key: Tensor, value: Tensor) -> LayerKV:
    return LayerKV(key.to(value.dtype).transpose(1, 2), value.transpose(1, 2))


class Head(nn.Module):
    """Last norm, modulated by the timestep, and the projection to patches."""

    def __init__(self, config: WanConfig):
        super().__init__()
        self.eps = config.eps
        _, patch_h, patch_w = config.patch_size
        self.head = nn.Linear(config.dim, patch_h * patch_w * config.out_channels)
        self.modulation = nn.Parameter(torch.zeros(1, 2, config.dim))

    def modulation_table(self, time: TimeEmbedding) -> Tensor:
        """[B, F, 2, D] float32: shift, 1 + scale."""
        return time.head + self.modulation.float()

    def forward(self, x: Tensor, table: Tensor) -> Tensor:
        """x [B, F, S, D] -> [B, F, S, patch * out_channels], in the weights' dtype even under autocast."""
        shift, scale = table.unbind(2)
        with without_autocast(x.device):
            x = modulated_norm(x, shift, scale, self.eps)
            return self.head(x.to(self.head.weight.dtype))
