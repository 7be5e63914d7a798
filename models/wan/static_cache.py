"""The key/value cache in preallocated ring buffers, for inference: nothing is shifted or concatenated.

Same rule of visibility and positions as `KVCache` (cache.py), proved equal by tests. Beyond it: the stream can
be rewound to earlier chunk boundaries at the cost of one slot per chunk. Left out: gradients.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from models.wan.cache import CacheSpec, Grid, KVContext, LayerKV, check_layers, rotate_chunk


@dataclass(eq=False)
class RingContext(KVContext):
    """Writes the current chunk into its ring slot and lets attention read the buffer itself."""

    cache: StaticKVCache
    start_frame: int
    chunk_frames: int
    chunk_index: int

    @property
    def is_current(self) -> bool:
        return self.cache.is_making(self.chunk_index)

    def extend(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        if torch.is_grad_enabled() and key.requires_grad:
            raise RuntimeError("StaticKVCache is overwritten in place and cannot carry gradients; train with KVCache")
        if not self.is_current:
            raise RuntimeError(
                f"this context is of chunk {self.chunk_index}, but the cache is at chunk "
                f"{self.cache.chunk_index}; call cache.context() again"
            )
        return self.cache.write(layer, key, value)

    def past(self, layer: int) -> list[LayerKV]:
        return self.cache.past(layer, self.chunk_index)


@dataclass(frozen=True, eq=False)
class RingSnapshot:
    """Copy of a `StaticKVCache`'s state."""

    spec: CacheSpec
    num_slots: int
    chunk_index: int
    begun: int
    grid: Grid
    buffers: tuple[Tensor, ...]


class StaticKVCache:
    """Cache in preallocated ring buffers, for inference.

    Physical order: sinks, then a ring of W + 1 slots that holds the window and the current chunk. Until the
    ring wraps the valid part is a prefix; afterwards it is the whole buffer. Softmax does not mind the order
    of its keys. Keys lie in the buffer rotated for their next use. With W <= 1, or absolute positions, that
    is their only position; otherwise a second buffer keeps raw window keys, which `context` rotates once per
    chunk as they age. Buffers [B, tokens, heads, head_dim] are allocated by the first chunk, then keep their
    addresses.
    """

    def __init__(self, spec: CacheSpec, num_layers: int, max_chunks: int | None = None, history_chunks: int = 1):
        self.spec, self.num_layers = spec, num_layers
        self.num_slots = _num_slots(spec, max_chunks)
        self.history_chunks = history_chunks
        self._oldest = 0  # the first boundary that can be returned to
        self._overwritten: dict[int, list[Tensor]] = {}  # chunk -> what its slot held before
        self.rerotates = spec.positions == "slot" and (spec.window_chunks or 0) > 1
        self.chunk_index = 0
        self._begun = -1  # the latest chunk whose context was asked for
        self._grid: Grid = (0, 0)
        self._keys: list[Tensor] = []
        self._values: list[Tensor] = []
        self._raw_keys: list[Tensor] = []

    @classmethod
    def empty(
        cls, spec: CacheSpec, num_layers: int, max_chunks: int | None = None, history_chunks: int = 1
    ) -> StaticKVCache:
        """``max_chunks``: capacity, for window_chunks=None only. ``history_chunks``: how far `rewind` goes."""
        return cls(spec, num_layers, max_chunks, history_chunks)

    def context(self, grid: Grid) -> RingContext:
        """Context of the current chunk; ``grid``: token rows and columns."""
        spec, current = self.spec, self.chunk_index
        if spec.window_chunks is None and current >= self.num_slots:
            raise ValueError(f"chunk {current} exceeds max_chunks={self.num_slots}; allocate more, or set a window")
        if current != self._begun:
            self._remember_slot(current, grid)
        self._grid, self._begun = grid, current
        if self.rerotates and current >= self.num_slots:  # the window moved: its chunks have new positions
            for chunk in spec.mask.visible_to(current)[spec.sink_chunks : -1]:
                self._rotate_in_place(chunk, spec.start_frame(chunk, current))
        return RingContext(self, spec.start_frame(current, current), spec.chunk_frames, current)

    def is_making(self, chunk: int) -> bool:
        """Whether the context of ``chunk`` was the last one asked for and the chunk is not finished or taken back."""
        return chunk == self.chunk_index == self._begun

    def write(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Puts the current chunk's rotated keys and values into its slot; returns all that it sees."""
        if layer == len(self._keys):
            batch, heads, length, head_dim = key.shape
            self._allocate((batch, self.num_slots * length, heads, head_dim), key)
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

    def past(self, layer: int, chunk: int) -> list[LayerKV]:
        """Views of what ``chunk`` attends to before itself: up to two, around its own slot.

        At a chunk boundary the finished chunk's context is still whole, until the next one asks for its own.
        Raises RuntimeError once it is gone.
        """
        if chunk != self._begun:
            raise RuntimeError(
                f"the context of chunk {chunk} is gone: the cache has begun chunk {self._begun}; restore the "
                "boundary before it"
            )
        if layer >= len(self._keys):
            return []
        keys, values = self._keys[layer], self._values[layer]
        length = keys.shape[1] // self.num_slots
        own = self._slot(chunk, length)
        parts = (slice(0, own.start), slice(own.stop, min(chunk + 1, self.num_slots) * length))
        return [
            LayerKV(keys[:, part].transpose(1, 2), values[:, part].transpose(1, 2))
            for part in parts
            if part.start < part.stop
        ]

    def append(self, layers: Sequence[LayerKV]) -> StaticKVCache:
        """Fixes the current chunk's clean keys and values, in place, and moves on to the next chunk."""
        check_layers(layers, self.num_layers)
        chunk = self.chunk_index
        if chunk in self.spec.mask.visible_to(chunk + 1):
            start = self.spec.start_frame(chunk, chunk + 1)
            for layer, kv in enumerate(layers):
                self.write(layer, rotate_chunk(kv.key, start, self._grid, self.spec.chunk_frames), kv.value)
                if self.rerotates:
                    self._raw_keys[layer][:, self._slot(chunk, kv.key.shape[2])] = kv.key.transpose(1, 2)
        self.chunk_index += 1
        return self

    @property
    def earliest_boundary(self) -> int:
        """The first chunk that `rewind` can return to the boundary before."""
        return self._oldest

    def rewind(self, chunk: int) -> StaticKVCache:
        """Back to the boundary before ``chunk``, bit for bit.

        The last chunk needs no memory of its own, each one before it takes one slot. At the furthest boundary
        the context of the chunk before it may be gone. Raises ValueError for a chunk that does not exist
        yet, or is further back than ``history_chunks``.
        """
        if not self._oldest <= chunk <= self.chunk_index:
            raise ValueError(
                f"chunk={chunk} must be in {self._oldest}..{self.chunk_index}: the cache remembers "
                f"history_chunks={self.history_chunks} chunks"
            )
        if self._begun < chunk:
            return self
        is_whole = chunk < self.num_slots or chunk in self._overwritten
        for index in range(self._begun, chunk - 1, -1):
            for buffer, held in zip(self._all_buffers(), self._overwritten.pop(index, ())):
                buffer[:, self._slot(index, held.shape[1])] = held
        if self.rerotates and chunk > 0:
            self._rotate_window_of(chunk - 1)
        self.chunk_index, self._begun = chunk, chunk - 1 if is_whole else -1
        return self

    def snapshot(self) -> RingSnapshot:
        """A copy of everything, to return to however far the stream has gone on."""
        buffers = tuple(buffer.clone() for buffer in self._all_buffers())
        return RingSnapshot(self.spec, self.num_slots, self.chunk_index, self._begun, self._grid, buffers)

    def restore(self, snapshot: RingSnapshot) -> StaticKVCache:
        """Back to a snapshot of this cache, or of another with the same settings; the buffers keep their addresses.

        Without a window the other may have had another capacity. Raises ValueError where the snapshot does not fit.
        """
        self._check(snapshot)
        if not self._keys:
            for buffer in snapshot.buffers[: self.num_layers]:  # the keys: values and raw keys are as large
                batch, tokens, *rest = buffer.shape
                self._allocate((batch, tokens // snapshot.num_slots * self.num_slots, *rest), buffer)
        for buffer, copy in zip(self._all_buffers(), snapshot.buffers):
            tokens = min(buffer.shape[1], copy.shape[1])
            buffer[:, :tokens].copy_(copy[:, :tokens])
        self.chunk_index, self._begun, self._grid = snapshot.chunk_index, snapshot.begun, snapshot.grid
        has_latest = snapshot.begun == snapshot.chunk_index - 1  # with its context: it can be taken back
        self._oldest = max(0, snapshot.chunk_index - has_latest)
        self._overwritten.clear()
        return self

    def _check(self, snapshot: RingSnapshot) -> None:
        """Whether this cache can go on from there; raises ValueError before anything is changed."""
        remedy = "restore it with the settings that it was taken with"
        if snapshot.spec != self.spec:
            raise ValueError(f"the snapshot is of a cache with {snapshot.spec}, this one has {self.spec}; {remedy}")
        if snapshot.chunk_index > self.num_slots and self.spec.window_chunks is None:
            raise ValueError(
                f"the snapshot holds {snapshot.chunk_index} chunks, this cache has room for {self.num_slots}; give it "
                "room for more, or set a window"
            )
        found = [_per_slot(buffer, snapshot.num_slots) for buffer in snapshot.buffers]
        own = [_per_slot(buffer, self.num_slots) for buffer in self._all_buffers()]
        if found and own and found != own:
            raise ValueError(
                f"the snapshot holds {len(found)} buffers of {found[0]} a chunk, this cache {len(own)} of {own[0]}; "
                f"{remedy}"
            )

    @property
    def num_bytes(self) -> int:
        """Of the ring buffers."""
        return sum(buffer.nbytes for buffer in self._all_buffers())

    def _all_buffers(self) -> list[Tensor]:
        return [*self._keys, *self._values, *self._raw_keys]

    def _remember_slot(self, chunk: int, grid: Grid) -> None:
        """Keeps what ``chunk`` is about to overwrite, as long as `rewind` may want it."""
        self._oldest = max(self._oldest, chunk + 1 - self.history_chunks)
        self._overwritten = {index: held for index, held in self._overwritten.items() if index > self._oldest}
        if chunk > self._oldest and chunk >= self.num_slots and self._begun == chunk - 1:
            slot = self._slot(chunk, self.spec.chunk_frames * grid[0] * grid[1])
            self._overwritten[chunk] = [buffer[:, slot].clone() for buffer in self._all_buffers()]

    def _slot(self, chunk: int, length: int) -> slice:
        sinks = self.spec.sink_chunks
        index = chunk if chunk < self.num_slots else sinks + (chunk - sinks) % (self.num_slots - sinks)
        return slice(index * length, (index + 1) * length)

    @torch.compiler.disable  # in a compiled block the buffers would be of inference mode after all
    def _allocate(self, shape: tuple[int, ...], like: Tensor) -> None:
        """The next layer's buffers, each [B, tokens, heads, head_dim]."""
        with torch.inference_mode(False):  # else only inference mode could write to them later
            for group in (self._keys, self._values, self._raw_keys) if self.rerotates else (self._keys, self._values):
                group.append(torch.zeros(shape, dtype=like.dtype, device=like.device))

    def _rotate_window_of(self, current: int) -> None:
        """Rotates what ``current`` saw in its window for its view again, and ``current`` for the view after it."""
        spec = self.spec
        for chunk in spec.mask.visible_to(current)[spec.sink_chunks : -1]:
            self._rotate_in_place(chunk, spec.start_frame(chunk, current))
        if spec.sink_chunks <= current and current in spec.mask.visible_to(current + 1):
            self._rotate_in_place(current, spec.start_frame(current, current + 1))

    def _rotate_in_place(self, chunk: int, start_frame: int) -> None:
        frames = self.spec.chunk_frames
        slot = self._slot(chunk, frames * self._grid[0] * self._grid[1])
        for keys, raw_keys in zip(self._keys, self._raw_keys):
            raw = raw_keys[:, slot].transpose(1, 2)
            keys[:, slot] = rotate_chunk(raw, start_frame, self._grid, frames).transpose(1, 2)


def _per_slot(buffer: Tensor, num_slots: int) -> tuple[int, ...]:
    batch, tokens, *rest = buffer.shape
    return (batch, tokens // num_slots, *rest)


def _num_slots(spec: CacheSpec, max_chunks: int | None) -> int:
    if spec.window_chunks is not None:
        return spec.sink_chunks + spec.window_chunks + 1
    if max_chunks is None:
        raise ValueError("window_chunks=None keeps the whole past; StaticKVCache then needs max_chunks")
    return max_chunks
