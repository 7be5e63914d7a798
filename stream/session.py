"""One running stream: an image, a prompt and tracks that may still change, turned into frames chunk by chunk.

Paper: MotionStream section 4 (rolling KV cache with an attention sink). A chunk of c latent frames takes K
denoising passes and one cache pass, then the VAE decodes it: 1 + 4(c-1) frames first, 4c ever after. Cost and
memory per chunk do not depend on the length of the stream. A snapshot at a chunk boundary can be returned to,
bit for bit.

The chunk loop is `models.rollout.Rollout`; here it gets its conditions and its decoder. Leaves out drawing,
transport and editing.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from models.condition import FRAMES_PER_LATENT, Condition, pixel_frames_of
from models.diffusion.noise import KeyedNoise
from models.motion.tracks import Tracks
from models.rollout import LatentEdit, Rollout, RolloutSnapshot
from models.vae.streaming_decode import StreamState
from models.wan.dit import WanDiT
from stream.codecs import Codecs, to_frames
from stream.track_buffer import TrackBuffer, TrackBufferState


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
class SessionState:
    """A chunk boundary to return to with `StreamSession.restore`."""

    rollout: RolloutSnapshot
    decoder: StreamState
    track_encoder: StreamState
    tracks: TrackBufferState
    prompt_embeds: Tensor
    chunk_index: int
    num_frames: int


class StreamSession:
    """A stream of one video.

    Args:
        student: the causal model, in eval mode on the codecs' device.
        codecs: VAE, text encoder and configuration; `codecs.model_cfg.rollout` says chunk, sink and window.
        first_frame: uint8 [H, W, 3] at the model's clip size.
        prompt: text; may be changed later.
        tracks: motion of the frames from 0 on (one clip, B = 1); more may be pushed later. None: unspecified.
        num_frames: where iteration ends; None: never.
        ending: what tracks do beyond their end, "hold" or "release".
        seed, sample_id: name the noise; the same pair gives the same frames.

    Raises:
        ValueError: first frame or tracks of another resolution, a prompt that cannot be encoded.
    """

    def __init__(
        self,
        student: WanDiT,
        codecs: Codecs,
        *,
        first_frame: np.ndarray,
        prompt: str,
        tracks: Tracks | None = None,
        num_frames: int | None = None,
        ending: str = "hold",
        seed: int = 0,
        sample_id: int = 0,
    ) -> None:
        if num_frames is not None and num_frames < 1:
            raise ValueError(f"num_frames={num_frames} must be at least 1, or null for an endless stream")
        clip, noise = codecs.model_cfg.clip, KeyedNoise(seed)
        self.codecs = codecs
        self.num_frames_limit = num_frames
        self._buffer = TrackBuffer(
            clip.height, clip.width, ending=ending, rng=noise.generator("track_ids", sample_id)
        )
        if tracks is not None:
            self._buffer.push(tracks)
        self._prompt_embeds = codecs.encode_prompts([prompt])
        self._first_frame = codecs.encode_first_frames(first_frame[None])
        self._rollout = Rollout(
            student,
            codecs.model_cfg.rollout,
            noise=noise,
            sample_ids=[sample_id],
            latent_shape=codecs.frame_latent_shape,
            cache="static",
            max_chunks=_num_chunks(num_frames, codecs.model_cfg.rollout.chunk_frames),
        )
        self._decoder = codecs.streaming_decoder()
        self._track_encoder = codecs.vae.streaming_encoder()
        self._chunk_index = 0
        self._num_frames = 0
        self._latest: tuple[ChunkTiming, Tensor] | None = None

    # ------------------------------------------------------------------ steering
    def push_tracks(self, tracks: Tracks) -> None:
        """Motion of the frames that follow the pushed ones (or, if those are used up, of the next frames).

        Identities stay constant: tracks whose ids are all 0 are told apart by column.
        """
        self._buffer.push(tracks)

    def set_prompt(self, prompt: str) -> None:
        """Another text from the next chunk on."""
        self._prompt_embeds = self.codecs.encode_prompts([prompt])

    # ------------------------------------------------------------------ position
    @property
    def chunk_index(self) -> int:
        """Number of the next chunk."""
        return self._chunk_index

    @property
    def num_frames(self) -> int:
        """Frames generated so far."""
        return self._num_frames

    @property
    def num_pending_track_frames(self) -> int:
        """Frames of motion that were pushed and not used yet."""
        return self._buffer.num_pending

    @property
    def frames_in_next_chunk(self) -> int:
        """Frames that the next chunk gives: 1 + 4(c-1), then 4c."""
        span = self._next_frames()
        return span.stop - span.start

    def snapshot(self) -> SessionState:
        """This chunk boundary, to return to."""
        return SessionState(
            self._rollout.snapshot(),
            self._decoder.snapshot(),
            self._track_encoder.snapshot(),
            self._buffer.snapshot(),
            self._prompt_embeds,
            self._chunk_index,
            self._num_frames,
        )

    def restore(self, state: SessionState) -> None:
        """Return to a chunk boundary; what follows repeats bit for bit unless tracks or prompt differ."""
        self._rollout.restore(state.rollout)
        self._decoder.restore(state.decoder)
        self._track_encoder.restore(state.track_encoder)
        self._buffer.restore(state.tracks)
        self._prompt_embeds = state.prompt_embeds
        self._chunk_index, self._num_frames = state.chunk_index, state.num_frames

    @property
    def timing(self) -> ChunkTiming:
        """Of the latest chunk."""
        return self._chunk()[0]

    @property
    def latents(self) -> Tensor:
        """Of the latest chunk: [1, C, c, h, w], normalised."""
        return self._chunk()[1]

    # ------------------------------------------------------------------ frames
    def __iter__(self) -> Iterator[np.ndarray]:
        """Chunks of frames, uint8 [n, H, W, 3], until `num_frames`; the last one is cut to it."""
        while self.num_frames_limit is None or self._num_frames < self.num_frames_limit:
            left = None if self.num_frames_limit is None else self.num_frames_limit - self._num_frames
            yield self.next_chunk()[:left]

    @torch.no_grad()
    def next_chunk(self, edit: LatentEdit | None = None) -> np.ndarray:  # uint8 [n, H, W, 3]
        """Generate and decode one chunk; `timing` and `latents` then describe it.

        `edit` may change the input of each denoising pass (see `Rollout.next_chunk`).
        """
        started = self.codecs.clock()
        condition = self._next_condition()
        conditioned = self.codecs.clock()
        chunk = self._rollout.next_chunk(condition, edit=edit)
        denoised = self.codecs.clock()
        frames = to_frames(self._decoder.push(chunk.x0))[0]
        decoded = self.codecs.clock()
        timing = ChunkTiming(
            self._chunk_index, len(frames), conditioned - started, denoised - conditioned, decoded - denoised
        )
        self._latest = (timing, chunk.x0)
        self._chunk_index += 1
        self._num_frames += len(frames)
        return frames

    def _next_condition(self) -> Condition:
        opens = self._chunk_index == 0
        return self.codecs.condition(
            self._prompt_embeds,
            self._buffer.take(self.frames_in_next_chunk),
            self._first_frame,
            opens_video=opens,
            track_encoder=self._track_encoder,
        )

    def _chunk(self) -> tuple[ChunkTiming, Tensor]:
        if self._latest is None:
            raise RuntimeError("the session has made no chunk yet; call next_chunk() first")
        return self._latest

    def _next_frames(self) -> slice:
        count = self.codecs.model_cfg.rollout.chunk_frames
        return pixel_frames_of(self._chunk_index * count, count)


def _num_chunks(num_frames: int | None, chunk_frames: int) -> int | None:
    """Chunks that hold so many frames, 1 + 4(c-1) in the first and 4c in each other; None: endless."""
    if num_frames is None:
        return None
    num_latents = 1 + math.ceil((num_frames - 1) / FRAMES_PER_LATENT)
    return math.ceil(num_latents / chunk_frames)
