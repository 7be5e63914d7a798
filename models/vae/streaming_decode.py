"""Exact decoding and encoding of an endless video, chunk by chunk, for any causal VAE.

A model offers pure functions from (chunk, state) to (result, next state), and no state of its own, so that
any number of streams may interleave on one model. A stream holds the state of one video. States are
immutable: a snapshot is a reference, and restoring one replays bit for bit.

Frames: latent 0 is one frame, every later latent four. So the first push of n latents gives 1 + 4(n - 1)
frames, and each later one 4n. Left out: when to decode (``stream/``).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

State = Any  # what a model carries from one chunk to the next; immutable, opaque to the stream


class ChunkDecoder(Protocol):
    """A causal decoder. ``state`` None means that the chunk opens the video."""

    def decode_chunk(self, latents: Tensor, state: State | None) -> tuple[Tensor, State]: ...


class ChunkEncoder(Protocol):
    """A causal encoder. ``state`` None means that the chunk opens the video."""

    def encode_chunk(self, pixels: Tensor, state: State | None) -> tuple[Tensor, State]: ...


@dataclass(frozen=True, eq=False)
class StreamState:
    """A position in a stream, to return to with ``restore``."""

    model_state: State | None
    shape: tuple[int, ...] | None  # [B, C, ., h, w] of the stream
    pushed: int  # latents or frames so far


class _Stream:
    """State and bookkeeping of one video."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Forget the video: the next push opens a new one."""
        self._now = StreamState(None, None, 0)

    def snapshot(self) -> StreamState:
        return self._now

    def restore(self, state: StreamState) -> None:
        self._now = state

    def _check(self, chunk: Tensor, name: str) -> tuple[int, ...]:
        if chunk.ndim != 5 or chunk.shape[2] == 0:
            raise ValueError(f"{name} has shape {tuple(chunk.shape)}; a push takes [B, C, n >= 1, height, width]")
        shape = (*chunk.shape[:2], *chunk.shape[3:])
        if self._now.shape is not None and shape != self._now.shape:
            raise ValueError(
                f"{name} has batch, channels, height, width {shape}, but this stream began with "
                f"{self._now.shape}; open a new stream, or call reset()"
            )
        return shape


class StreamingDecoder(_Stream):
    """Decodes one video from successive chunks of latents; equal to decoding the whole clip at once."""

    def __init__(self, model: ChunkDecoder) -> None:
        super().__init__()
        self._model = model

    @torch.no_grad()
    def push(self, latents: Tensor) -> Tensor:
        """Normalised latents [B, C, n, h, w] -> pixels [B, 3, 1 + 4(n-1) on the first push, else 4n, H, W] in
        [-1, 1].

        Raises ValueError where batch or size changed within the stream.
        """
        shape = self._check(latents, "latents")
        pixels, state = self._model.decode_chunk(latents, self._now.model_state)
        self._now = StreamState(state, shape, self._now.pushed + latents.shape[2])
        return pixels


class StreamingEncoder(_Stream):
    """Encodes one video from successive chunks of frames; equal to encoding the whole clip at once."""

    def __init__(self, model: ChunkEncoder) -> None:
        super().__init__()
        self._model = model

    @torch.no_grad()
    def push(self, pixels: Tensor) -> Tensor:
        """Pixels [B, 3, n, H, W] in [-1, 1] -> normalised latents; n is 1 + 4k on the first push, else 4k.

        Raises ValueError where n does not fill latents, or where batch or size changed within the stream.
        """
        shape = self._check(pixels, "pixels")
        latents, state = self._model.encode_chunk(pixels, self._now.model_state)
        self._now = StreamState(state, shape, self._now.pushed + pixels.shape[2])
        return latents
