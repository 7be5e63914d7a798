"""What a stream session tells of its chunks, remembers of them, and returns to; whether a drag can go on from there.

All of it is immutable: a session replaces these and never changes one, so a boundary costs nothing to keep but the
tensors that it names. Only the logs of an outcome are filled later. Leaves out the keys and values of the cache
(models/wan/static_cache.py) and the loop (session.py).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from models.condition import FRAMES_PER_LATENT
from models.rollout import ChunkPass, CleanEdit, RolloutSnapshot
from models.vae.streaming_decode import StreamState
from models.wan.static_cache import RingContext, StaticKVCache
from stream.codecs import FirstFrame
from stream.dragstream.config import DragConfig
from stream.dragstream.drag import Drag
from stream.dragstream.editor import DragLog
from stream.dragstream.features import Reference
from stream.dragstream.geometry import covered
from stream.dragstream.statistics import match_clean
from stream.track_buffer import TrackBufferState


@dataclass(frozen=True)
class ChunkTiming:
    """Wall-clock seconds of one chunk, the accelerator waited for."""

    index: int
    num_frames: int
    condition_seconds: float  # tracks to the track map, image and text features
    denoise_seconds: float  # denoising passes and cache pass
    decode_seconds: float

    @property
    def total_seconds(self) -> float:
        return self.condition_seconds + self.denoise_seconds + self.decode_seconds


@dataclass(frozen=True, eq=False)
class DragOutcome:
    """What a drag did at once; an animation does the rest in the chunks that follow."""

    frames: np.ndarray | None  # edit: the latest chunk as it is now, uint8 [n, H, W, 3]; animate: None
    references: tuple[Reference, ...]  # features of each handle, for a later drag to bring them back
    logs: list[DragLog]  # one per chunk, filled as this session makes chunks; without those that it took back


@dataclass(frozen=True, eq=False)
class Animation:
    """A drag of the chunks to come."""

    drag: Drag
    cfg: DragConfig
    references: tuple[Reference, ...]
    first_chunk: int
    end_chunk: int  # the first that it does not concern any more
    tracks_before: TrackBufferState  # of the stream, without it

    def region_after(self, chunk: int) -> np.ndarray:
        """Where its handles are at the end of a chunk that it bends: bool [H, W]."""
        chunks_done, chunks = chunk + 1 - self.first_chunk, self.end_chunk - self.first_chunk
        frame = chunks_done * self.drag.num_frames // chunks - 1
        return covered([(handle, handle.poses[frame]) for handle in self.drag.handles])


@dataclass(frozen=True, eq=False)
class Steering:
    """What the user has asked for."""

    prompt_embeds: Tensor
    tracks: TrackBufferState
    animation: Animation | None  # that goes on, or waits to begin


@dataclass(frozen=True, eq=False)
class Memory:
    """What drags need of the chunks before."""

    passes: tuple[ChunkPass, ...] = ()  # of the latest chunk, one per denoising step
    edited_step: int = 0  # the one at which a drag changed that chunk; the passes before it know nothing of the drag
    noisy: tuple[tuple[Tensor, ...], ...] = ()  # inputs of the latest chunks' steps, [1, C, c, h, w] at most
    clean: tuple[Tensor, ...] = ()  # latents of the latest two chunks but the stream's first
    asked: Steering | None = None  # what the latest chunk was made with

    def neighbours(self, cfg: DragConfig) -> Tensor | None:
        """Inputs of a drag's step in the latest cfg.adsr_frames latent frames: [1, C, n, h, w]; None: none known."""
        if not self.noisy or not cfg.adsr_frames:
            return None
        found = torch.cat([chunk[cfg.step] for chunk in self.noisy], dim=2)[:, :, -cfg.adsr_frames :]
        return found if found.shape[2] else None

    def read_from(self, cache: StaticKVCache) -> Memory:
        """The same for another cache of the same content: the passes look at that one."""
        passes = []
        for shown in self.passes:
            assert isinstance(shown.context, RingContext), "a session's cache is static"
            passes.append(replace(shown, context=replace(shown.context, cache=cache)))
        return replace(self, passes=tuple(passes))

    def clean_edit(self, cfg: DragConfig) -> CleanEdit | None:
        """The shift of clean latents to those of the chunks before, where the settings ask for it."""
        if not cfg.match_clean or not self.clean:
            return None
        previous = torch.cat(self.clean, dim=2)
        return lambda x0: match_clean(x0, previous)

    def after(
        self,
        passes: Sequence[ChunkPass],
        x0: Tensor,
        asked: Steering,
        *,
        edited_step: int,
        adsr_frames: int,
        opens: bool,
        generated: Tensor | None,
    ) -> Memory:
        """With one chunk more; ``adsr_frames``: how many latent frames neighbours may ask for; ``opens`` the video.

        ``generated``: bool [c], None for all: a first frame that is given is clean at every step, and no neighbour.
        """
        own = slice(None) if generated is None else generated
        noisy = (*self.noisy, tuple(shown.noisy_latents[:, :, own] for shown in passes))
        chunks = math.ceil(adsr_frames / x0.shape[2])
        return Memory(
            passes=(*passes[:-1], replace(passes[-1], x0=x0)),
            edited_step=edited_step,
            noisy=noisy[-chunks:] if chunks else (),
            clean=() if opens else (*self.clean, x0)[-2:],
            asked=asked,
        )


@dataclass(frozen=True, eq=False)
class Boundary:
    """A chunk boundary, but for the cache."""

    decoder: StreamState
    track_encoder: StreamState
    steering: Steering
    settled: Steering  # as it was when the chunk before it was done
    chunk_index: int
    num_frames: int
    memory: Memory
    latest: tuple[ChunkTiming, Tensor] | None  # of the chunk before it; None: the stream's first

    def read_from(self, cache: StaticKVCache) -> Boundary:
        return replace(self, memory=self.memory.read_from(cache))


@dataclass(frozen=True, eq=False)
class SessionState:
    """A chunk boundary to return to with `StreamSession.restore`."""

    rollout: RolloutSnapshot
    first_frame: FirstFrame
    boundary: Boundary
    previous: Boundary | None  # before the latest chunk, so that it can be made again
    decoder: str  # its class: another's state means nothing to it

    def check_decoder(self, other: str) -> None:
        """Raises ValueError where a session of this decoder cannot go on from here."""
        if self.decoder != other and self.boundary.chunk_index:
            raise ValueError(
                f"the snapshot is of a session that decodes by {self.decoder}, this one by {other}; restore it with "
                "the decoder that it was taken with (tiny=… of Codecs.load)"
            )

    def read_from(self, cache: StaticKVCache) -> SessionState:
        """The same for the session of another cache, which was restored from this one's."""
        previous = None if self.previous is None else self.previous.read_from(cache)
        return replace(self, boundary=self.boundary.read_from(cache), previous=previous)


def num_chunks(num_frames: int | None, chunk_frames: int) -> int | None:
    """Chunks that hold so many frames, 1 + 4(c-1) in the first and 4c in each other; None: endless."""
    if num_frames is None:
        return None
    num_latents = 1 + math.ceil((num_frames - 1) / FRAMES_PER_LATENT)
    return math.ceil(num_latents / chunk_frames)


def check_target(drag: Drag, cfg: DragConfig, now: Boundary, num_back: int) -> None:
    """Raises ValueError where a drag cannot read, or make again, the latest chunk now.

    num_back: how many chunks can be taken back.
    """
    memory, latest = now.memory, now.chunk_index - 1
    if latest < 0:
        raise ValueError("nothing to drag: the session has made no chunk yet; call next_chunk() first")
    if drag.chunk is not None and drag.chunk > latest:
        raise ValueError(f"chunk={drag.chunk} does not exist yet; the latest is {latest}")
    if drag.chunk is not None and drag.chunk < latest:
        back = latest - drag.chunk
        remedy = f"undo({back}) first" if back <= num_back else f"it is gone; drag chunk {latest}"
        raise ValueError(f"chunk={drag.chunk} is not the latest, {latest}: {remedy}")
    reads_context = cfg.iterations or memory.passes[cfg.step].x0 is None
    if not num_back and (drag.mode == "edit" or reads_context):
        raise ValueError(
            f"chunk {latest} cannot be read or made again: undo(), or a chunk that failed, went back as far as "
            "this session remembers; call next_chunk() first, or open it with a larger undo_chunks"
        )
    if drag.mode == "edit" and now.num_frames == 1:
        raise ValueError("chunk 0 is the given first frame alone, which no drag changes; call next_chunk() first")
    if cfg.step < memory.edited_step:
        raise ValueError(
            f"drag.step={cfg.step} must be at least {memory.edited_step}: chunk {latest} was edited there; set "
            "drag_cfg, or call next_chunk() first"
        )
    animation = now.steering.animation
    if drag.mode == "edit" and animation is not None and animation.first_chunk > latest:
        raise ValueError(
            f"a drag that animates begins with chunk {latest + 1}, after chunk {latest} that this one would edit; "
            "call next_chunk() first, or end it by an animation that goes nowhere"
        )
