"""One running stream: an image, a prompt and tracks that may still change, turned into frames chunk by chunk.

Paper: MotionStream section 4 (rolling KV cache with an attention sink). A chunk of c latent frames takes K
denoising passes and one cache pass, then the VAE decodes it: 1 + 4(c-1) frames first, 4c ever after. Cost and
memory per chunk do not depend on the length of the stream. The latest chunk boundaries can be returned to, and
any of which a snapshot was taken, bit for bit.

The chunk loop is `models.rollout.Rollout`; here it gets its conditions and its decoder. A drag (DragStream) makes
the latest chunk again or bends the next ones; how is in stream/dragstream, when is here. What a session remembers is
in session_state.py. Leaves out drawing and transport.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import replace
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor

from models.condition import FRAMES_PER_LATENT, Condition, pixel_frames_of
from models.diffusion.noise import KeyedNoise
from models.motion.tracks import Tracks
from models.rollout import ChunkPass, ChunkStart, LatentEdit, Rollout
from models.wan.dit import WanDiT
from models.wan.static_cache import StaticKVCache
from stream.codecs import Codecs, require_finite, to_frames
from stream.dragstream.config import DragConfig
from stream.dragstream.drag import Drag, check_drag
from stream.dragstream.editor import DragEditor, DragLog, read_references
from stream.dragstream.features import FeatureReader, Reference
from stream.dragstream.geometry import swept_region
from stream.dragstream.led_tracks import DragTracks
from stream.session_state import (
    Animation,
    Boundary,
    ChunkTiming,
    DragOutcome,
    Memory,
    SessionState,
    Steering,
    check_target,
    num_chunks,
)  # fmt: skip
from stream.track_buffer import TrackBuffer


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
        undo_chunks: how many chunks `undo` can take back; each keeps a state of the decoder, and each beyond the first
            a chunk of keys and values.
        drag: how drags are made; None: the profile "marionette", the defaults of `DragConfig`.

    Raises:
        ValueError: first frame or tracks of another resolution, a prompt that cannot be encoded, drag settings that
            do not fit the student.
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
        undo_chunks: int = 1,
        drag: DragConfig | None = None,
    ) -> None:
        if undo_chunks < 1:
            raise ValueError(f"undo_chunks={undo_chunks} must be at least 1: a drag makes the latest chunk again")
        if num_frames is not None and num_frames < 1:
            raise ValueError(f"num_frames={num_frames} must be at least 1, or null for an endless stream")
        if num_frames is None and codecs.model_cfg.rollout.window_chunks is None:
            raise ValueError(
                "num_frames=null needs a window: model.rollout.window_chunks=null keeps every chunk of the stream; set "
                "one of the two"
            )
        clip, noise = codecs.model_cfg.clip, KeyedNoise(seed)
        self.codecs, self.num_frames_limit = codecs, num_frames
        self._buffer = TrackBuffer(clip.height, clip.width, ending=ending, rng=noise.generator("track_ids", sample_id))
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
            max_chunks=num_chunks(num_frames, codecs.model_cfg.rollout.chunk_frames),
            history_chunks=1 if undo_chunks == 1 else undo_chunks + 1,  # a chunk that fails takes one; 1 costs nothing
        )
        self.student, self._noise = student, noise
        self.drag_cfg = drag or DragConfig()
        self._memory = Memory()
        self._animation: Animation | None = None
        self._logs: WeakKeyDictionary[Animation, list[DragLog]] = WeakKeyDictionary()  # of those that began here
        self._inbox: deque[Tracks] = deque()  # pushed since the latest call that changed the stream
        self._settled = self._steering()  # as it was when the latest chunk was done
        self._boundaries: deque[Boundary] = deque(maxlen=undo_chunks)
        self._decoder, self._track_encoder = codecs.streaming_decoder(), codecs.vae.streaming_encoder()
        self._chunk_index = self._num_frames = 0
        self._latest: tuple[ChunkTiming, Tensor] | None = None

    # ------------------------------------------------------------------ steering
    def push_tracks(self, tracks: Tracks) -> None:
        """Motion of the frames that follow the pushed ones (or, if those are used up, of the next frames).

        Identities stay constant: tracks whose ids are all 0 are told apart by column. Those that a drag took along or
        released stay with the drag, whatever is pushed for them; a new stroke takes `unused_track_ids`. May be called
        from another thread, while a chunk is made too; everything else belongs to one thread.
        """
        self._inbox.append(self._buffer.checked(tracks))

    def _receive(self) -> None:
        """Put what was pushed behind the motion that waits: before anything that may be taken back."""
        while self._inbox:
            self._buffer.append(self._inbox.popleft())

    def unused_track_ids(self, count: int) -> Tensor:
        """Identities for new tracks, [count] long: neither seen by the stream nor given out yet, while there are such.

        Raises ValueError where so many are not left beside those in use and those that drags have.
        """
        self._receive()
        return self._buffer.reserve_ids(count)

    def set_prompt(self, prompt: str) -> None:
        """Another text from the next chunk on."""
        self._prompt_embeds = self.codecs.encode_prompts([prompt])

    def drop_pending_tracks(self) -> None:
        """Forget the motion that was pushed and not used yet: after `undo`, that of the chunks taken back."""
        self._receive()
        self._buffer.drop_pending()

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
        return self._buffer.num_pending + sum(tracks.num_frames for tracks in tuple(self._inbox))

    @property
    def frames_in_next_chunk(self) -> int:
        """Frames that the next chunk gives: 1 + 4(c-1), then 4c."""
        return self._frames_in(self._chunk_index)

    def snapshot(self) -> SessionState:
        """This chunk boundary, to return to: a copy of everything, cache included."""
        self._receive()
        previous = self._boundaries[-1] if self._boundaries else None
        decoder = type(self.codecs.decoder).__name__
        return SessionState(self._rollout.snapshot(), self._first_frame, self._boundary(), previous, decoder)

    def restore(self, state: SessionState) -> None:
        """Return to a chunk boundary; what follows repeats bit for bit unless tracks or prompt differ.

        The boundary may be another session's of the same student: what it shows and follows comes along (first frame,
        prompt, tracks, drags), noise and settings are this session's own. Give it the same seed to have it repeated.

        Raises ValueError, and changes nothing, where the decoder, or chunks, context, positions or noise levels
        (model.rollout) are others, or the session has too little room (num_frames without a window).
        """
        state.check_decoder(type(self.codecs.decoder).__name__)
        self._rollout.restore(state.rollout)
        self._inbox.clear()
        assert isinstance(self._rollout.cache, StaticKVCache), "a session's cache is static"
        state = state.read_from(self._rollout.cache)
        self._forget_logs(state.boundary.chunk_index)
        self._return_to(state.boundary)
        self._first_frame = state.first_frame
        self._boundaries = deque([state.previous] if state.previous else [], self._boundaries.maxlen)

    def undo(self, chunks: int = 1) -> None:
        """Take back the latest chunks, with the drags and prompts that came for them and all that came since.

        Tracks pushed until the first of them was made wait again (`drop_pending_tracks` forgets them). Going on makes
        the chunks bit for bit as they were before any drag. Raises ValueError beyond `undo_chunks`.
        """
        if not self._boundaries:
            raise ValueError(
                "nothing can be taken back now: no chunk was made since the start, restore(), undo() or a chunk that "
                "failed; keep a snapshot(), or open the session with a larger undo_chunks"
            )
        if not 1 <= chunks <= len(self._boundaries):
            raise ValueError(
                f"chunks={chunks} must be in 1..{len(self._boundaries)}, what this session can take back now; open it "
                "with a larger undo_chunks, or keep a snapshot()"
            )
        self._inbox.clear()
        self._forget_logs(self._boundaries[-chunks].chunk_index)
        self._take_back(chunks)

    def _take_back(self, chunks: int) -> None:
        boundary = self._boundaries[-chunks]
        self._rollout.rewind(boundary.chunk_index)
        self._return_to(boundary)
        for _ in range(chunks):
            self._boundaries.pop()

    def _forget_logs(self, chunk: int) -> None:
        """Of animated chunks from this one on, which are taken back."""
        for logs in self._logs.values():
            logs[:] = [log for log in logs if log.chunk < chunk]

    # ------------------------------------------------------------------ dragging
    @property
    def drag_cfg(self) -> DragConfig:
        """How drags are made from now on."""
        return self._drag_cfg

    @drag_cfg.setter
    def drag_cfg(self, cfg: DragConfig) -> None:
        self._drag_cfg = cfg.for_student(self.codecs.model_cfg.rollout.num_steps, self.student.config.num_layers)

    def drag(self, drag: Drag) -> DragOutcome:
        """Drag regions of the latest frame: edit the latest chunk, or animate the next ones.

        Tracks on a handle go with it, or are released (`drag_cfg.tracks`); those on its way are released. A drag that
        animates ends an earlier one that still goes on, and one that goes nowhere does only that; an edit ends it where
        it meets what that one moves. What stops an edit on its way (memory, an interrupt) leaves the latest chunk
        taken back.

        Raises:
            ValueError: the drag does not fit the frame, names a chunk that is not the latest or cannot be made again,
                or changes an earlier step than an edit of the same chunk; before anything is computed.
        """
        clip, chunk_frames = self.codecs.model_cfg.clip, self.codecs.model_cfg.rollout.chunk_frames
        check_drag(drag, height=clip.height, width=clip.width, chunk_frames=chunk_frames)
        check_target(drag, self.drag_cfg, self._boundary(), num_back=len(self._boundaries))
        self._receive()
        drag = drag.copied()
        if drag.mode == "edit":
            return self._edit(drag)
        return self._animate(drag)

    def _edit(self, drag: Drag) -> DragOutcome:
        step, passes = self.drag_cfg.step, self._memory.passes
        start = ChunkStart(step, passes[step].noisy_latents)  # earlier drags of this chunk included
        asked, boundary, now = self._memory.asked, self._boundaries[-1], self._steering()
        tracks, references = self._tracks_of(drag, self._chunk_index - 1), self._references(drag)
        assert asked is not None, "a chunk that can be edited was made with something"
        self._take_back(1)
        undone = self._steering()
        self._follow(asked)
        tracks.along(self._buffer.peek(self.frames_in_next_chunk)).steer(self._buffer)
        editor = self._editor(drag, self.drag_cfg, self._chunk_index, references)
        try:
            frames = self._attempt_chunk(editor, start, passes[:step])
        except BaseException:
            self._forget_logs(self._chunk_index)
            self._follow(undone)
            raise
        self._boundaries[-1] = boundary  # taking the chunk back takes back what the drag did to the tracks
        self._prompt_embeds = now.prompt_embeds  # what came since the chunk is kept
        self._buffer.restore(replace(self._buffer.snapshot(), pushed=now.tracks.pushed))
        if now.animation is None or (swept_region(drag) & now.animation.region_after(self._chunk_index - 1)).any():
            self._end_animation()
        return DragOutcome(frames, references, editor.logs)

    def _tracks_of(self, drag: Drag, first_chunk: int) -> DragTracks:
        """What the drag will do to the tracks, from the first chunk on that it concerns."""
        count = self._frames_in(first_chunk) if drag.mode == "edit" else FRAMES_PER_LATENT * drag.num_frames
        grid = self.codecs.model_cfg.latent_size if self.drag_cfg.tracks == "follow" else None
        return DragTracks.find(self._buffer, drag, count, opens_video=first_chunk == 0, grid=grid)

    def _animate(self, drag: Drag) -> DragOutcome:
        references, earlier, first = self._references(drag), self._steering(), self._chunk_index
        self._end_animation()
        tracks_before, logs = self._buffer.snapshot(), list[DragLog]()
        if not drag.is_still:
            try:
                self._tracks_of(drag, first).steer(self._buffer)
            except BaseException:  # no identities are left for its tracks: the earlier drag goes on
                self._follow(earlier)
                raise
            end = first + drag.num_frames // self.codecs.model_cfg.rollout.chunk_frames
            self._animation = Animation(drag, self.drag_cfg, references, first, end, tracks_before)
            self._logs[self._animation] = logs
        return DragOutcome(None, references, logs)

    def _end_animation(self) -> None:
        """Tracks stay where a drag that goes on has led them; one that waits to begin leaves no trace."""
        animation, self._animation = self._animation, None
        if animation is None:
            return
        if animation.first_chunk == self._chunk_index:
            pushed = self._buffer.snapshot().pushed
            self._buffer.restore(replace(animation.tracks_before, pushed=pushed))
        else:
            self._buffer.stop_leading()

    def _references(self, drag: Drag) -> tuple[Reference, ...]:
        """What the handles hold: features of the latest frame, or those that they bring."""
        shown = self._memory.passes[self.drag_cfg.step]
        reader = FeatureReader(self.student, self.drag_cfg, shown.sigma)
        return read_references(reader, self.drag_cfg, drag, shown, self._noise)

    def _editor(self, drag: Drag, cfg: DragConfig, first_chunk: int, references: tuple[Reference, ...]) -> DragEditor:
        """Of the next chunk."""
        clip = self.codecs.model_cfg.clip
        editor = DragEditor(
            self.student, cfg, drag, size=(clip.height, clip.width), noise=self._noise, first_chunk=first_chunk,
            references=references,
        )  # fmt: skip
        editor.neighbours = self._memory.neighbours(cfg)
        return editor

    @property
    def latest_passes(self) -> tuple[ChunkPass, ...]:
        """The denoising passes of the latest chunk, whose context can be read until the next one."""
        return self._memory.passes

    @property
    def cache_bytes(self) -> int:
        """Of the keys and values that the stream holds."""
        return self._rollout.cache.num_bytes if isinstance(self._rollout.cache, StaticKVCache) else 0

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

        `edit` may change the input of each denoising pass (see `Rollout.next_chunk`); None: what the drag that
        goes on, if any, makes of it. What stops it on its way (memory, an interrupt) leaves the session as it was,
        but that with undo_chunks=1 nothing can be taken back. Raises ValueError beyond `num_frames` without a window.
        """
        self._check_room()
        self._receive()
        return self._attempt_chunk(edit)

    @torch.no_grad()
    def _attempt_chunk(
        self, edit: LatentEdit | None, start: ChunkStart | None = None, passes: Sequence[ChunkPass] = ()
    ) -> np.ndarray:
        """One more chunk, or everything as it was. ``passes``: those of its earlier making, before ``start``."""
        before = self._boundary()
        try:
            frames = self._make_chunk(edit, start, passes)
        except BaseException:
            self._rollout.rewind(before.chunk_index)
            self._return_to(before)
            earliest = self._rollout.earliest_boundary
            while self._boundaries and self._boundaries[0].chunk_index < earliest:
                self._boundaries.popleft()
            raise
        settled = replace(before.settled, tracks=replace(before.settled.tracks, pushed=before.steering.tracks.pushed))
        self._boundaries.append(replace(before, steering=settled, settled=settled))
        self._settled = self._steering()
        return frames

    def _make_chunk(
        self, edit: LatentEdit | None, start: ChunkStart | None, earlier: Sequence[ChunkPass]
    ) -> np.ndarray:
        asked, started = self._steering(), self.codecs.clock()
        condition = self._next_condition()
        conditioned = self.codecs.clock()
        animated = self._animation_editor() if edit is None else None
        passes, edit = list(earlier), edit or animated
        remembered = self._remembering(edit, passes)
        edit_x0 = self._memory.clean_edit(self.drag_cfg)
        chunk = self._rollout.next_chunk(condition, start=start, edit=remembered, edit_x0=edit_x0)
        denoised = self.codecs.clock()
        frames = to_frames(require_finite(self._decoder.push(chunk.x0)))[0]
        decoded = self.codecs.clock()
        timing = ChunkTiming(
            self._chunk_index, len(frames), conditioned - started, denoised - conditioned, decoded - denoised
        )
        self._latest = (timing, chunk.x0)
        asking = [self.drag_cfg, *([self._animation.cfg] if self._animation else [])]
        opens = self._chunk_index == 0
        self._memory = self._memory.after(
            passes, chunk.x0, asked, edited_step=edit.cfg.step if isinstance(edit, DragEditor) else 0,
            adsr_frames=max(cfg.adsr_frames for cfg in asking), opens=opens,
            generated=self.student.generated_frames(passes[-1].condition, chunk.x0.shape[2]) if opens else None,
        )  # fmt: skip
        self._chunk_index += 1
        self._num_frames += len(frames)
        if self._animation is not None:
            if animated is not None and self._animation in self._logs:
                self._logs[self._animation] += animated.logs
            if self._chunk_index >= self._animation.end_chunk:
                self._animation = None
        return frames

    def _animation_editor(self) -> DragEditor | None:
        now = self._animation
        return None if now is None else self._editor(now.drag, now.cfg, now.first_chunk, now.references)

    def _remembering(self, edit: LatentEdit | None, passes: list[ChunkPass]) -> LatentEdit:
        """The edit, with each pass kept as it was run: a later drag reads its features from there."""

        def run(shown: ChunkPass) -> Tensor:
            latents = shown.noisy_latents if edit is None else edit(shown)
            passes.append(replace(shown, noisy_latents=latents))
            return latents

        return run

    def _boundary(self) -> Boundary:
        return Boundary(
            self._decoder.snapshot(),
            self._track_encoder.snapshot(),
            self._steering(),
            self._settled,
            self._chunk_index,
            self._num_frames,
            self._memory,
            self._latest,
        )

    def _return_to(self, boundary: Boundary) -> None:
        self._decoder.restore(boundary.decoder)
        self._track_encoder.restore(boundary.track_encoder)
        self._follow(boundary.steering)
        self._settled = boundary.settled
        self._chunk_index, self._num_frames = boundary.chunk_index, boundary.num_frames
        self._memory, self._latest = boundary.memory, boundary.latest

    def _steering(self) -> Steering:
        return Steering(self._prompt_embeds, self._buffer.snapshot(), self._animation)

    def _follow(self, steering: Steering) -> None:
        self._prompt_embeds, self._animation = steering.prompt_embeds, steering.animation
        self._buffer.restore(steering.tracks)

    def _check_room(self) -> None:
        """Without a window the cache holds as many chunks as `num_frames` needs."""
        rollout, count = self.codecs.model_cfg.rollout, self.num_frames_limit
        if rollout.window_chunks is None and self._chunk_index == num_chunks(count, rollout.chunk_frames):
            raise ValueError(
                f"num_frames={count} are made, and model.rollout.window_chunks=null keeps every chunk: open a session "
                "with more num_frames, or set a window"
            )

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

    def _frames_in(self, chunk: int) -> int:
        count = self.codecs.model_cfg.rollout.chunk_frames
        frames = pixel_frames_of(chunk * count, count)
        return frames.stop - frames.start
