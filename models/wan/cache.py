"""Key/value cache of the streaming student: sink chunks + a rolling window of chunks (MotionStream section
3.3).

Two implementations of one interface, proved equal by tests:

* `KVCache`, here, is immutable. Context keys and values are detached inputs of a chunk and the next cache is a
  new object, so gradients are truncated exactly and activation checkpointing recomputes what the forward pass
  saw. The public Self-Forcing code writes its cache in place under autograd, which leaks gradient between
  chunks.
* `StaticKVCache` (static_cache.py) is for inference: preallocated ring buffers with fixed addresses.

Positions: with "slot", a chunk's temporal position is its rank among the chunks in view, so positions never
exceed the window; sinks hold slots 0 .. S-1 and window keys are rotated anew when they age. With "absolute",
it is its place in the video. All indices are Python integers: no pass reads anything back from the device.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from models.wan.attention import ChunkMask, attend
from models.wan.rope import apply_rope, rope_table
from models.wan.split_attention import split_attention

POSITIONS = ("slot", "absolute")
Grid = tuple[int, int]  # rows and columns of tokens in a frame


@dataclass(frozen=True)
class CacheSpec:
    """What a cache keeps and where its chunks stand. Raises ValueError where a value is out of range."""

    chunk_frames: int  # latent frames denoised together
    sink_chunks: int  # first chunks, kept forever
    window_chunks: int | None  # latest past chunks; None: all
    positions: str = "slot"  # slot | absolute

    def __post_init__(self) -> None:
        if self.positions not in POSITIONS:
            raise ValueError(f"positions='{self.positions}' must be one of {', '.join(POSITIONS)}")
        ChunkMask(self.chunk_frames, self.sink_chunks, self.window_chunks)

    @property
    def mask(self) -> ChunkMask:
        """The rule of visibility that the cache realises."""
        return ChunkMask(self.chunk_frames, self.sink_chunks, self.window_chunks)

    def start_frame(self, chunk: int, current: int) -> int:
        """Temporal RoPE position of ``chunk`` while chunk ``current`` is computed."""
        if self.positions == "absolute":
            return chunk * self.chunk_frames
        return self.mask.visible_to(current).index(chunk) * self.chunk_frames


@dataclass(frozen=True, eq=False)
class LayerKV:
    """One chunk in one layer, each [B, heads, L, head_dim]; the key is normalised but not rotated."""

    key: Tensor
    value: Tensor


class KVContext(ABC):
    """What one chunk attends to beside itself. ``start_frame`` is the chunk's own temporal RoPE position."""

    start_frame: int
    chunk_frames: int

    @property
    def is_current(self) -> bool:
        """Whether the chunk is still being made, so that a pass may extend this context."""
        return True

    @abstractmethod
    def extend(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Rotated key and value of the current chunk -> those of all in view; [B, heads, L, head_dim]."""

    @abstractmethod
    def past(self, layer: int) -> list[LayerKV]:
        """Rotated keys and values before the current chunk, as views: nothing is copied or written."""

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, backend: str) -> Tensor:
        """Attention of the current chunk to all in view."""
        return attend(q, *self.extend(layer, k, v), backend)


@dataclass(frozen=True, eq=False)
class ReadOnlyContext(KVContext):
    """Another context, read and never written: for gradients of a chunk that is not to enter the cache."""

    inner: KVContext

    @property
    def start_frame(self) -> int:  # type: ignore[override]
        return self.inner.start_frame

    @property
    def chunk_frames(self) -> int:  # type: ignore[override]
        return self.inner.chunk_frames

    def extend(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        parts = self.inner.past(layer)
        return (
            _concatenate([*(part.key for part in parts), key]),
            _concatenate([*(part.value for part in parts), value]),
        )

    def past(self, layer: int) -> list[LayerKV]:
        return self.inner.past(layer)

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, backend: str) -> Tensor:
        return split_attention(q, k, v, [(part.key, part.value) for part in self.past(layer)])


@dataclass(frozen=True, eq=False)
class DetachedContext(KVContext):
    """Constant rotated keys and values of the past, put before the current chunk's: safe under autograd."""

    start_frame: int
    chunk_frames: int
    layers: tuple[LayerKV, ...]  # one per layer; empty before the first chunk

    def extend(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        if not self.layers:
            return key, value
        past = self.layers[layer]
        return _concatenate([past.key, key]), _concatenate([past.value, value])

    def past(self, layer: int) -> list[LayerKV]:
        return [self.layers[layer]] if self.layers else []


@dataclass(frozen=True, eq=False)
class KVCache:
    """Immutable cache: `append` returns the next one."""

    spec: CacheSpec
    num_layers: int
    chunk_index: int = 0  # chunks appended so far = index of the current chunk
    kept: tuple[tuple[int, tuple[LayerKV, ...]], ...] = ()  # (chunk, its layers) in time order

    @classmethod
    def empty(cls, spec: CacheSpec, num_layers: int) -> KVCache:
        return cls(spec, num_layers)

    def context(self, grid: Grid) -> DetachedContext:
        """Context of the current chunk, keys rotated for all its passes; ``grid``: token rows, columns."""
        spec, current = self.spec, self.chunk_index
        if not self.kept:
            return DetachedContext(spec.start_frame(current, current), spec.chunk_frames, ())
        starts = [spec.start_frame(chunk, current) for chunk, _ in self.kept]
        past = []
        for layer in range(self.num_layers):
            parts = [layers[layer] for _, layers in self.kept]
            keys = [rotate_chunk(part.key, start, grid, spec.chunk_frames) for part, start in zip(parts, starts)]
            past.append(LayerKV(_concatenate(keys), _concatenate([part.value for part in parts])))
        return DetachedContext(spec.start_frame(current, current), spec.chunk_frames, tuple(past))

    def append(self, layers: Sequence[LayerKV]) -> KVCache:
        """The cache after the current chunk, whose clean keys and values these are. They are detached."""
        check_layers(layers, self.num_layers)
        detached = tuple(LayerKV(kv.key.detach(), kv.value.detach()) for kv in layers)
        visible = self.spec.mask.visible_to(self.chunk_index + 1)
        kept = [entry for entry in (*self.kept, (self.chunk_index, detached)) if entry[0] in visible]
        return KVCache(self.spec, self.num_layers, self.chunk_index + 1, tuple(kept))

    def snapshot(self) -> KVCache:
        """State to come back to: the object itself."""
        return self

    def restore(self, snapshot: KVCache) -> KVCache:
        return snapshot


def rotate_chunk(key: Tensor, start_frame: int, grid: Grid, frames: int) -> Tensor:
    """Raw keys [B, heads, L, head_dim] of one chunk, rotated for a temporal position."""
    table = rope_table(frames, *grid, key.shape[-1], start_frame=start_frame, device=key.device)
    ordered = key.transpose(1, 2).contiguous()  # the last bit of a complex product depends on its layout
    return apply_rope(ordered, table).transpose(1, 2)


def _concatenate(parts: list[Tensor]) -> Tensor:
    """Along tokens; in memory [B, L, heads, head_dim], as projections write and kernels read."""
    return torch.cat([part.transpose(1, 2) for part in parts], dim=1).transpose(1, 2)


def check_layers(layers: Sequence[LayerKV], num_layers: int) -> None:
    if len(layers) != num_layers:
        raise ValueError(f"{len(layers)} layers of keys and values; the cache holds {num_layers}; use cache_pass's")
