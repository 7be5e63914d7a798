"""Attention kernels behind one call, and block-causal attention over chunks of frames.

Rule of visibility (MotionStream section 3.3, CausVid): query chunk i sees key chunk j iff j == i, or j < i
and (j < sink_chunks or j >= i - window_chunks). Attention inside a chunk is bidirectional. Leaves out
positions (rope.py) and what is cached between chunks (cache.py).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from itertools import groupby

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from models.device import cpu_features

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]
SCORE_BYTES = 8 << 20  # scores kept at once by "matmul": about what stays in a core's cache


@dataclass(frozen=True)
class ChunkMask:
    """Which chunks see which. Raises ValueError where a count is out of range."""

    chunk_frames: int  # latent frames denoised together
    sink_chunks: int  # first chunks, seen by all later ones
    window_chunks: int | None  # past chunks seen; None: all

    def __post_init__(self) -> None:
        if self.chunk_frames < 1 or self.sink_chunks < 0 or (self.window_chunks or 0) < 0:
            raise ValueError(
                f"chunk_frames={self.chunk_frames} must be >= 1, sink_chunks={self.sink_chunks} and "
                f"window_chunks={self.window_chunks} >= 0 (window_chunks null: all past chunks)"
            )

    def visible_to(self, chunk: int) -> list[int]:
        """Chunks that ``chunk`` attends to, in time order; the last is itself."""
        sinks = min(self.sink_chunks, chunk)
        window_start = 0 if self.window_chunks is None else chunk - self.window_chunks
        return [*range(sinks), *range(max(sinks, window_start), chunk + 1)]

    def visible(self, num_chunks: int) -> list[list[int]]:
        return [self.visible_to(chunk) for chunk in range(num_chunks)]

    def num_chunks(self, frames: int) -> int:
        if frames % self.chunk_frames:
            raise ValueError(
                f"{frames} latent frames must be a multiple of chunk_frames={self.chunk_frames}; change one"
            )
        return frames // self.chunk_frames


def attend(q: Tensor, k: Tensor, v: Tensor, backend: str = "sdpa") -> Tensor:
    """softmax(q k^T / sqrt(head_dim)) v; q [B, heads, Lq, head_dim], k and v [B, heads, Lk, head_dim]."""
    return _BACKENDS[backend](q, k, v)


def chunk_causal_attention(
    q: Tensor, k: Tensor, v: Tensor, mask: ChunkMask, num_chunks: int, backend: str = "sdpa"
) -> Tensor:
    """Attention of a whole clip under a chunk mask, without computing what the mask hides.

    q, k, v [B, heads, num_chunks * tokens, head_dim]. Query chunks that see equally many chunks form a group:
    after a ramp-up of single chunks, one dense batched call serves the regular band. "flex" uses a block mask
    instead.
    """
    if q.shape[2] % num_chunks:
        raise ValueError(f"{q.shape[2]} tokens must be a multiple of num_chunks={num_chunks}")
    if backend == "flex":
        return _flex(q, k, v, _block_mask(mask, num_chunks, q.shape[2] // num_chunks, q.device))
    q_chunks, k_chunks, v_chunks = (_split_chunks(x, num_chunks) for x in (q, k, v))
    outputs = []
    for _, group in groupby(enumerate(mask.visible(num_chunks)), key=lambda item: len(item[1])):
        queries, seen = zip(*group)
        key_chunks = [past for visible in seen for past in visible]
        q_group = _join_chunks([q_chunks[i] for i in queries], len(queries))
        k_group, v_group = (
            _join_chunks([chunks[i] for i in key_chunks], len(queries)) for chunks in (k_chunks, v_chunks)
        )
        out = attend(q_group, k_group, v_group, backend).transpose(1, 2)
        outputs.append(out.reshape(q.shape[0], -1, *out.shape[2:]))
    return torch.cat(outputs, dim=1).transpose(1, 2)


def _split_chunks(x: Tensor, num_chunks: int) -> tuple[Tensor, ...]:
    """[B, heads, N * L, d] -> N views [B, L, heads, d]."""
    # unbind, not slices: its backward is one stack, where each slice's would fill a whole tensor with zeros
    return x.transpose(1, 2).unflatten(1, (num_chunks, -1)).unbind(1)


def _join_chunks(chunks: list[Tensor], batch_of: int) -> Tensor:
    """Chunks [B, L, heads, d] -> [B * batch_of, heads, len(chunks) / batch_of * L, d]."""
    joined = torch.cat(chunks, dim=1)
    return joined.reshape(joined.shape[0] * batch_of, -1, *joined.shape[2:]).transpose(1, 2)


def _matmul(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Explicit products: on CPUs bfloat16 GEMMs beat the fused kernel's gradients while the scores stay in cache.

    Without gradients it is the fused kernel, unless this CPU makes that the slower one as well. Keys come with
    heads inside tokens; copied before they are transposed, the copy is by rows and cheap.
    """
    score_bytes = q.shape[1] * q.shape[2] * k.shape[2] * q.element_size()
    if not torch.is_grad_enabled() and not (_products_beat_fused(q) and score_bytes <= SCORE_BYTES):
        return F.scaled_dot_product_attention(q, k, v)
    samples = max(1, SCORE_BYTES // score_bytes)
    scale = q.shape[-1] ** -0.5
    parts = [
        torch.softmax((qs * scale) @ ks.contiguous().transpose(-1, -2), dim=-1) @ vs
        for qs, ks, vs in zip(q.split(samples), k.split(samples), v.split(samples))
    ]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _products_beat_fused(q: Tensor) -> bool:
    """Whether this CPU has fast bfloat16 products that torch's fused kernel does not use: it does with AMX only."""
    if q.device.type != "cpu" or q.dtype != torch.bfloat16:
        return False
    features = cpu_features()
    return bool(features.get("avx512_bf16")) and not features.get("amx_bf16")


def _flex(q: Tensor, k: Tensor, v: Tensor, block_mask: BlockMask | None = None) -> Tensor:
    if q.device.type == "cpu" and q.requires_grad:
        raise ValueError("attention_backend='flex' has no backward pass on CPU; use 'sdpa' or 'matmul' there")
    kernel = flex_attention if q.device.type == "cpu" else _compiled_flex()
    return kernel(q, k, v, block_mask=block_mask)


@lru_cache(maxsize=1)
def _compiled_flex() -> Callable[..., Tensor]:
    return torch.compile(flex_attention)


@lru_cache(maxsize=32)
def _block_mask(mask: ChunkMask, num_chunks: int, tokens: int, device: torch.device) -> BlockMask:
    """Block mask of a clip; cached on all it depends on, so a new (S, W) or length gets a new mask."""
    window = num_chunks if mask.window_chunks is None else mask.window_chunks

    def visible(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        query_chunk, key_chunk = query // tokens, key // tokens
        seen_past = (key_chunk < mask.sink_chunks) | (key_chunk >= query_chunk - window)
        return (key_chunk == query_chunk) | ((key_chunk < query_chunk) & seen_past)

    length = num_chunks * tokens
    return create_block_mask(visible, None, None, length, length, device=str(device))


def _flash(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    out = _flash_kernel()(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
    return (out[0] if isinstance(out, tuple) else out).transpose(1, 2)


@lru_cache(maxsize=1)
def _flash_kernel() -> Callable[..., Tensor]:
    """FlashAttention 3 if installed, else 2; raises ImportError that says how to get one."""
    try:
        from flash_attn_interface import flash_attn_func
    except ImportError:
        try:
            from flash_attn import flash_attn_func
        except ImportError as error:
            raise ImportError(
                "attention_backend='flash' needs the package flash_attn_interface (FlashAttention 3, Hopper) "
                "or flash_attn (`pip install flash-attn`); or set attention_backend='sdpa'"
            ) from error
    return flash_attn_func


_BACKENDS: dict[str, Attention] = {
    "sdpa": F.scaled_dot_product_attention,
    "matmul": _matmul,
    "flex": _flex,
    "flash": _flash,
}
ATTENTION_BACKENDS = tuple(_BACKENDS)
