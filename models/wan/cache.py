"""Key/value caches of the streaming student: sink chunks + a rolling window of chunks (MotionStream section
3.3).

Two implementations of one interface, proved equal by tests:

* `KVCache` is immutable. Context keys and values are detached inputs of a chunk and the next cache is a new
  object, so gradients are truncated exactly and activation checkpointing recomputes what the forward pass
  saw. The public Self-Forcing code writes its cache in place under autograd, which leaks gradient between
  chunks.
* `StaticKVCache` is for inference: preallocated ring buffers with fixed addresses. Nothing is shifted or
  concatenated.

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

from models.wan.attention import ChunkMask
from models.wan.rope import apply_rope, rope_table

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

    @abstractmethod
    def extend(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Rotated key and value of the current chunk -> those of all in view; [B, heads, L, head_dim]."""


@dataclass(frozen=True, eq=False)
class DetachedContext(KVContext):
    """Constant rotated keys and values of the past, put before the current chunk's: safe under autograd."""

    start_frame: int
    chunk_frames: int
    past: tuple[LayerKV, ...]  # one per layer; empty before the first chunk

    def extend(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        if not self.past:
            return key, value
        past = self.past[layer]
        return _concatenate([past.key, key]), _concatenate([past.value, value])


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
            keys = [_rotate(part.key, start, grid, spec.chunk_frames) for part, start in zip(parts, starts)]
            past.append(LayerKV(_concatenate(keys), _concatenate([part.value for part in parts])))
        return DetachedContext(spec.start_frame(current, current), spec.chunk_frames, tuple(past))

    def append(self, layers: Sequence[LayerKV]) -> KVCache:
        """The cache after the current chunk, whose clean keys and values these are. They are detached."""
        _check_layers(layers, self.num_layers)
        detached = tuple(LayerKV(kv.key.detach(), kv.value.detach()) for kv in layers)
        visible = self.spec.mask.visible_to(self.chunk_index + 1)
        kept = [entry for entry in (*self.kept, (self.chunk_index, detached)) if entry[0] in visible]
        return KVCache(self.spec, self.num_layers, self.chunk_index + 1, tuple(kept))

    def reset(self) -> KVCache:
        return KVCache.empty(self.spec, self.num_layers)

    def snapshot(self) -> KVCache:
        """State to come back to: the object itself."""
        return self

    def restore(self, snapshot: KVCache) -> KVCache:
        return snapshot


@dataclass(eq=False)
class RingContext(KVContext):
    """Writes the current chunk into its ring slot and lets attention read the buffer itself."""

    cache: StaticKVCache
    start_frame: int
    chunk_frames: int
    chunk_index: int

    def extend(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        if torch.is_grad_enabled() and key.requires_grad:
            raise RuntimeError(
                "StaticKVCache is overwritten in place and cannot carry gradients; train with KVCache"
            )
        if self.chunk_index != self.cache.chunk_index:
            raise RuntimeError(
                f"this context is of chunk {self.chunk_index}, but the cache is at chunk "
                f"{self.cache.chunk_index}; call cache.context() again"
            )
        return self.cache.write(layer, key, value)


@dataclass(frozen=True, eq=False)
class RingSnapshot:
    """Copy of a `StaticKVCache`'s state."""

    chunk_index: int
    buffers: tuple[tuple[Tensor, ...], ...]


class StaticKVCache:
    """Cache in preallocated ring buffers, for inference.

    Physical order: sinks, then a ring of W + 1 slots that holds the window and the current chunk. Until the
    ring wraps the valid part is a prefix; afterwards it is the whole buffer. Softmax does not mind the order
    of its keys. Keys lie in the buffer rotated for their next use. With W <= 1, or absolute positions, that
    is their only position; otherwise a second buffer keeps raw window keys, which `context` rotates once per
    chunk as they age. Buffers [B, tokens, heads, head_dim] are allocated by the first chunk, then keep their
    addresses.
    """

    def __init__(self, spec: CacheSpec, num_layers: int, max_chunks: int | None = None):
        self.spec, self.num_layers = spec, num_layers
        self.num_slots = _num_slots(spec, max_chunks)
        self.rerotates = spec.positions == "slot" and (spec.window_chunks or 0) > 1
        self.chunk_index = 0
        self._grid: Grid = (0, 0)
        self._keys: list[Tensor] = []
        self._values: list[Tensor] = []
        self._raw_keys: list[Tensor] = []

    @classmethod
    def empty(cls, spec: CacheSpec, num_layers: int, max_chunks: int | None = None) -> StaticKVCache:
        """``max_chunks``: capacity, for window_chunks=None only."""
        return cls(spec, num_layers, max_chunks)

    def reset(self) -> StaticKVCache:
        """Forgets the stream, keeps the memory."""
        self.chunk_index = 0
        return self

    def context(self, grid: Grid) -> RingContext:
        """Context of the current chunk; ``grid``: token rows and columns."""
        spec, current = self.spec, self.chunk_index
        if spec.window_chunks is None and current >= self.num_slots:
            raise ValueError(
                f"chunk {current} exceeds max_chunks={self.num_slots}; allocate more, or set a window"
            )
        self._grid = grid
        if self.rerotates and current >= self.num_slots:  # the window moved: its chunks have new positions
            for chunk in spec.mask.visible_to(current)[spec.sink_chunks : -1]:
                self._rotate_in_place(chunk, spec.start_frame(chunk, current))
        return RingContext(self, spec.start_frame(current, current), spec.chunk_frames, current)

    def write(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Puts the current chunk's rotated keys and values into its slot; returns all that it sees."""
        if layer == len(self._keys):
            self._allocate(key)
        keys, values = self._keys[layer], self._values[layer]
        length = key.shape[2]
        if keys.shape[1] != self.num_slots * length or keys.shape[0] != key.shape[0]:
            raise ValueError(
                f"the cache holds batch {keys.shape[0]} and {keys.shape[1] // self.num_slots} tokens per "
                f"chunk, this chunk has {key.shape[0]} and {length}; make a new cache for another size"
            )
        slot = self._slot(self.chunk_index, length)
        keys[:, slot] = key.transpose(1, 2)
        values[:, slot] = value.transpose(1, 2)
        valid = min(self.chunk_index + 1, self.num_slots) * length
        return keys[:, :valid].transpose(1, 2), values[:, :valid].transpose(1, 2)

    def append(self, layers: Sequence[LayerKV]) -> StaticKVCache:
        """Fixes the current chunk's clean keys and values, in place, and moves on to the next chunk."""
        _check_layers(layers, self.num_layers)
        chunk = self.chunk_index
        if chunk in self.spec.mask.visible_to(chunk + 1):
            start = self.spec.start_frame(chunk, chunk + 1)
            for layer, kv in enumerate(layers):
                self.write(layer, _rotate(kv.key, start, self._grid, self.spec.chunk_frames), kv.value)
                if self.rerotates:
                    self._raw_keys[layer][:, self._slot(chunk, kv.key.shape[2])] = kv.key.transpose(1, 2)
        self.chunk_index += 1
        return self

    def snapshot(self) -> RingSnapshot:
        buffers = (self._keys, self._values, self._raw_keys)
        return RingSnapshot(self.chunk_index, tuple(tuple(t.clone() for t in group) for group in buffers))

    def restore(self, snapshot: RingSnapshot) -> StaticKVCache:
        """Back to a snapshot of this cache; the buffers keep their addresses."""
        for group, saved in zip((self._keys, self._values, self._raw_keys), snapshot.buffers):
            for buffer, copy in zip(group, saved):
                buffer.copy_(copy)
        self.chunk_index = snapshot.chunk_index
        return self

    def _slot(self, chunk: int, length: int) -> slice:
        sinks = self.spec.sink_chunks
        index = chunk if chunk < self.num_slots else sinks + (chunk - sinks) % (self.num_slots - sinks)
        return slice(index * length, (index + 1) * length)

    def _allocate(self, key: Tensor) -> None:
        batch, heads, length, head_dim = key.shape
        with torch.inference_mode(False):  # else only inference mode could write to them later
            shape = (batch, self.num_slots * length, heads, head_dim)
            for group in (
                (self._keys, self._values, self._raw_keys) if self.rerotates else (self._keys, self._values)
            ):
                group.append(torch.zeros(shape, dtype=key.dtype, device=key.device))

    def _rotate_in_place(self, chunk: int, start_frame: int) -> None:
        frames = self.spec.chunk_frames
        slot = self._slot(chunk, frames * self._grid[0] * self._grid[1])
        for keys, raw_keys in zip(self._keys, self._raw_keys):
            raw = raw_keys[:, slot].transpose(1, 2)
            keys[:, slot] = _rotate(raw, start_frame, self._grid, frames).transpose(1, 2)


def _num_slots(spec: CacheSpec, max_chunks: int | None) -> int:
    if spec.window_chunks is not None:
        return spec.sink_chunks + spec.window_chunks + 1
    if max_chunks is None:
        raise ValueError("window_chunks=None keeps the whole past; StaticKVCache then needs max_chunks")
    return max_chunks


def _rotate(key: Tensor, start_frame: int, grid: Grid, frames: int) -> Tensor:
    """Raw keys [B, heads, L, head_dim] of one chunk, rotated for a temporal position."""
    table = rope_table(frames, *grid, key.shape[-1], start_frame=start_frame, device=key.device)
    return apply_rope(key.transpose(1, 2), table).transpose(1, 2)


def _concatenate(parts: list[Tensor]) -> Tensor:
    """Along tokens; in memory [B, L, heads, head_dim], as projections write and kernels read."""
    return torch.cat([part.transpose(1, 2) for part in parts], dim=1).transpose(1, 2)


def _check_layers(layers: Sequence[LayerKV], num_layers: int) -> None:
    if len(layers) != num_layers:
        raise ValueError(
            f"{len(layers)} layers of keys and values; the cache holds {num_layers}; use cache_pass's"
        )
