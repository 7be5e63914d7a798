"""THE chunk loop of the few-step causal student: distillation, evaluation and live sessions all run this one.

Per chunk (Self-Forcing, arXiv 2506.08009; MotionStream sections 3.2 and 3.3): start from fresh noise;
predict x0 at each noise level of the student and renoise it with *fresh* noise to the next (a consistency
sampler, not an ODE); then one pass over the finished chunk at timestep 0, whose keys and values go to the
rolling cache of sink and window chunks. Beyond the papers, ``merged_cache`` saves that pass: the cache gets the
keys and values of the last denoising pass, a context as noisy as that pass's input, for which the student must
have been trained.

Gradients are truncated by construction: only a chunk's exit step can carry them, the cache holds constants.
They are taken in one pass (``GradientPolicy.EXIT_STEP`` keeps the graphs of all chunks) or in two: roll out
with ``record=True``, then ``replay_exit_step`` one chunk at a time, which needs the memory of a single
chunk's graph.

All noise is keyed by (chunk, step, purpose) per sample: running a chunk again reproduces it bit for bit.
Left out: losses, pixels, and which tracks or prompt come next; the caller hands in each chunk's condition.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

import torch
from torch import Tensor

from models.condition import Condition, num_pixel_frames
from models.diffusion.noise import KeyedNoise, KeyPart
from models.diffusion.prediction import add_noise
from models.diffusion.sampler import first_frame_clamp
from models.diffusion.schedule import NUM_TRAIN_TIMESTEPS, flow_grid
from models.wan.cache import CacheSpec, KVCache, KVContext, LayerKV
from models.wan.dit import Modulation, PreparedCondition, TextContext, WanDiT
from models.wan.static_cache import RingSnapshot, StaticKVCache

CACHES = ("immutable", "static")
CONTEXT_FIELDS = ("sink_chunks", "window_chunks")  # that one student may be trained with several of
LEVEL_FIELDS = ("num_inference_steps", "shift", "step_indices")  # that together make the noise levels


@dataclass
class RolloutConfig:
    """Noise levels of the student and the geometry of its context.

    Raises ValueError where values contradict.
    """

    chunk_frames: int = 3  # latent frames denoised together
    sink_chunks: int = 1  # first chunks, seen by all later ones
    window_chunks: int | None = 1  # past chunks seen; null: all
    num_inference_steps: int = 50  # teacher steps of the grid that the student's steps are taken from
    shift: float = 6.0  # timestep shift of that grid
    step_indices: list[int] = field(default_factory=lambda: [0, 16, 32])  # grid points of the student
    positions: str = "slot"  # slot | absolute: temporal positions of cached chunks
    context_noise: float = 0.0  # noise level (sigma) of the cached context
    merged_cache: bool = False  # cache the last denoising pass; false: a pass of its own at context_noise

    def __post_init__(self) -> None:
        steps = list(self.step_indices)
        ascending = steps == sorted(set(steps))
        if not steps or steps[0] != 0 or not ascending or steps[-1] >= self.num_inference_steps:
            raise ValueError(
                f"step_indices={steps} must ascend from 0 (pure noise) and stay below num_inference_steps="
                f"{self.num_inference_steps}"
            )
        if not 0 <= self.context_noise < 1:
            raise ValueError(f"context_noise={self.context_noise} must be in [0, 1); 0 keeps a clean context")
        if self.merged_cache and self.context_noise:
            raise ValueError(
                f"context_noise={self.context_noise} must be 0 with merged_cache=true: its context is as noisy "
                "as the input of the last step"
            )
        _ = self.sigmas, self.cache_spec  # their own checks

    def differences(self, trained_with: Mapping[str, Any]) -> list[str]:
        """What of it a student has not been trained with: fields as Self-Forcing exports them, contexts as lists."""
        told = set(trained_with)
        if told >= set(LEVEL_FIELDS) and noise_levels(*(trained_with[name] for name in LEVEL_FIELDS)) == self.sigmas:
            told -= set(LEVEL_FIELDS)  # at most another grid with the same levels
        return [
            f"{name}={value} (trained with {trained_with[name]})"
            for name, value in vars(self).items()
            if name in told
            and (value not in trained_with[name] if name in CONTEXT_FIELDS else value != trained_with[name])
        ]

    @property
    def sigmas(self) -> list[float]:
        """Noise level of each step, descending from 1.0; [1.0, 0.92727, 0.77143] by default."""
        return noise_levels(self.num_inference_steps, self.shift, self.step_indices)

    @property
    def num_steps(self) -> int:
        return len(self.step_indices)

    @property
    def cache_spec(self) -> CacheSpec:
        return CacheSpec(self.chunk_frames, self.sink_chunks, self.window_chunks, self.positions)

    def validate_clip(self, num_latents: int) -> int:
        """Number of chunks of a clip; raises ValueError unless it divides into whole chunks."""
        if num_latents < 1 or num_latents % self.chunk_frames:
            nearest = max(1, round(num_latents / self.chunk_frames)) * self.chunk_frames
            raise ValueError(
                f"num_latents={num_latents} must be a multiple of chunk_frames={self.chunk_frames}; nearest "
                f"valid: {nearest} ({num_pixel_frames(nearest)} frames)"
            )
        return num_latents // self.chunk_frames


def noise_levels(num_inference_steps: int, shift: float, step_indices: Sequence[int]) -> list[float]:
    """sigma at some steps of the teacher's grid."""
    grid = flow_grid(num_inference_steps, shift)
    return [grid[index].item() for index in step_indices]


class GradientPolicy(Enum):
    """Which passes of a chunk keep their graph."""

    NONE = "none"
    EXIT_STEP = "exit_step"


@dataclass(frozen=True, eq=False)
class ChunkRecord:
    """What an exit step was given: enough to run it again with gradients (the second of two passes)."""

    index: int  # of the chunk in the video
    noisy_latents: Tensor  # [B, C, c, h, w] float32
    sigma: float
    condition: Condition
    cache: KVCache  # before this chunk; its storage is shared between the records of a rollout
    grid: tuple[int, int]  # rows and columns of tokens

    @property
    def context(self) -> KVContext:
        return self.cache.context(self.grid)


@dataclass(frozen=True, eq=False)
class Chunk:
    """One finished chunk."""

    index: int
    x0: Tensor  # [B, C, c, h, w] float32, normalised latents
    record: ChunkRecord | None = None


@dataclass(frozen=True, eq=False)
class ChunkPass:
    """The input of one denoising pass, as shown to a latent edit."""

    chunk: int
    step: int  # 0 .. num_steps - 1
    sigma: float
    noisy_latents: Tensor  # [B, C, c, h, w] float32
    condition: PreparedCondition
    context: KVContext | None  # None: a whole clip of a bidirectional model
    x0: Tensor | None = None  # what came of it, where that is known: [B, C, c, h, w]


@dataclass(frozen=True, eq=False)
class ChunkStart:
    """Where the denoising of a chunk begins, if not at pure noise: what an earlier making of it had there."""

    step: int  # 0 .. the last step made
    noisy_latents: Tensor  # [B, C, c, h, w] float32, the input of that step


LatentEdit = Callable[[ChunkPass], Tensor]  # returns the noisy latents to go on with
CleanEdit = Callable[[Tensor], Tensor]  # returns the x0 to go on with


@dataclass(frozen=True, eq=False)
class RolloutSnapshot:
    """State of a rollout at a chunk boundary."""

    cache: KVCache | RingSnapshot
    is_open: bool
    sigmas: Sequence[float]  # of its steps


class Rollout:
    """A video in the making, chunk by chunk. The student's weights must not change while it lives.

    ``cache``: "immutable" (training: gradients, records) or "static" (inference: preallocated buffers; the
    same numbers). ``noise_key`` is put before every noise key, e.g. ("update", step) in training, where one
    sample is rolled out many times. ``max_chunks``: capacity of a static cache whose window is unlimited.
    ``history_chunks``: how far a static cache can `rewind`.
    """

    def __init__(
        self,
        student: WanDiT,
        cfg: RolloutConfig,
        *,
        noise: KeyedNoise,
        sample_ids: Sequence[int],
        latent_shape: tuple[int, int, int],
        cache: str = "immutable",
        noise_key: Sequence[KeyPart] = (),
        max_chunks: int | None = None,
        history_chunks: int = 1,
    ):
        if cache not in CACHES:
            raise ValueError(f"cache='{cache}' must be one of {', '.join(CACHES)}")
        self.student, self.cfg, self.sigmas = student, cfg, cfg.sigmas
        self.noise, self.noise_key, self.sample_ids = noise, tuple(noise_key), list(sample_ids)
        channels, height, width = latent_shape
        self.chunk_shape = (channels, cfg.chunk_frames, height, width)
        self.grid = student.token_grid(height, width)
        num_layers = student.config.num_layers
        self.cache: KVCache | StaticKVCache = (
            KVCache.empty(cfg.cache_spec, num_layers)
            if cache == "immutable"
            else StaticKVCache.empty(cfg.cache_spec, num_layers, max_chunks, history_chunks)
        )
        self._is_open = True
        self._text: tuple[Tensor, Tensor | None, TextContext] | None = None
        self._modulations: dict[float, Modulation] = {}

    @property
    def chunk_index(self) -> int:
        """Index of the chunk that comes next."""
        return self.cache.chunk_index

    def next_chunk(
        self,
        condition: Condition,
        *,
        exit_step: int | None = None,
        gradient: GradientPolicy = GradientPolicy.NONE,
        record: bool = False,
        update_cache: bool = True,
        start: ChunkStart | None = None,
        edit: LatentEdit | None = None,
        edit_x0: CleanEdit | None = None,
    ) -> Chunk:
        """Generates the next chunk under its own condition (``Condition.chunk``).

        ``exit_step`` stops at that step, 0 .. num_steps - 1, and takes its x0 (training); None runs all
        steps. ``update_cache=False`` saves the cache pass of a last chunk: none can follow. ``start``
        leaves out the steps before it. ``edit`` may change the input of each pass, ``edit_x0`` what each
        predicts; returning it as it is leaves the chunk the same bit for bit. Raises ValueError for a step
        outside the list, and for gradients or records with a static cache.
        """
        last = self._check_request(condition, exit_step, start, gradient, record)
        before, index = self.cache, self.chunk_index
        with torch.no_grad():
            context = self.cache.context(self.grid)
            prepared = self.student.prepare(condition, text=self._text_context(condition))
            noisy = self._denoise_until(last, condition, prepared, context, start, edit, edit_x0)
            kept = None
            if isinstance(before, KVCache):
                kept = ChunkRecord(index, noisy, self.sigmas[last], condition, before, self.grid)
            layers = None
            if gradient is GradientPolicy.NONE:
                if update_cache and self._is_merged(last):
                    x0, layers = self._predict_and_cache(noisy, last, prepared, context)
                else:
                    x0 = self._predict(noisy, last, prepared, context)
                x0 = x0 if edit_x0 is None else edit_x0(x0)
        if gradient is GradientPolicy.EXIT_STEP:
            assert kept is not None, "a static cache was refused above"
            x0 = replay_exit_step(self.student, kept, context)
        if update_cache:
            if layers is None:
                given = noisy if self._is_merged(last) else None
                layers = self._cache_pass(x0.detach(), given, condition, prepared, context)
            self.cache = self.cache.append(layers)
        self._is_open = update_cache
        return Chunk(index, x0, kept if record else None)

    def snapshot(self) -> RolloutSnapshot:
        """State at this chunk boundary, to come back to with ``restore``."""
        return RolloutSnapshot(self.cache.snapshot(), self._is_open, self.sigmas)

    def restore(self, snapshot: RolloutSnapshot) -> None:
        """Back to a boundary: from here the same conditions give the same chunks bit for bit.

        It may be of another rollout with the same steps and context. Raises ValueError, and changes nothing, where
        these are others.
        """
        if list(snapshot.sigmas) != list(self.sigmas):
            there, here = ([round(sigma, 4) for sigma in each] for each in (snapshot.sigmas, self.sigmas))
            raise ValueError(
                f"the snapshot is of a rollout at the noise levels {there}, this one is at {here}; give both the same "
                "model.rollout.step_indices, num_inference_steps and shift"
            )
        if isinstance(self.cache, KVCache) and isinstance(snapshot.cache, KVCache):
            self.cache = snapshot.cache
        elif isinstance(self.cache, StaticKVCache) and isinstance(snapshot.cache, RingSnapshot):
            self.cache = self.cache.restore(snapshot.cache)
        else:
            raise ValueError("the snapshot is of the other kind of cache; restore it where it was taken")
        self._is_open = snapshot.is_open

    @property
    def earliest_boundary(self) -> int:
        """The first chunk that `rewind` can return to the boundary before."""
        return self.cache.earliest_boundary if isinstance(self.cache, StaticKVCache) else self.chunk_index

    def rewind(self, chunk: int) -> None:
        """Back to the boundary before ``chunk`` with what a static cache remembers; no snapshot is needed.

        Raises ValueError further back than ``history_chunks``, or for an immutable cache.
        """
        if not isinstance(self.cache, StaticKVCache):
            raise ValueError("cache='immutable' has no history to rewind; restore a snapshot, or use 'static'")
        self.cache = self.cache.rewind(chunk)
        self._is_open = True

    def _denoise_until(
        self,
        last: int,
        condition: Condition,
        prepared: PreparedCondition,
        context: KVContext,
        start: ChunkStart | None,
        edit: LatentEdit | None,
        edit_x0: CleanEdit | None,
    ) -> Tensor:
        """Runs the steps before ``last`` and returns the input of step ``last``."""
        clamp = first_frame_clamp(self.student, condition)
        start = start or ChunkStart(0, clamp(self._noise("start", 0)))
        noisy = start.noisy_latents
        for step in range(start.step, last + 1):
            if step > start.step:
                x0 = self._predict(noisy, step - 1, prepared, context)
                x0 = x0 if edit_x0 is None else edit_x0(x0)
                noisy = clamp(add_noise(x0, self._noise("renoise", step), self.sigmas[step]))
            if edit is not None:
                shown = ChunkPass(self.chunk_index, step, self.sigmas[step], noisy, prepared, context)
                noisy = clamp(edit(shown).detach())
        return noisy

    def _predict(self, noisy: Tensor, step: int, prepared: PreparedCondition, context: KVContext) -> Tensor:
        sigma = self.sigmas[step]
        modulation = self._modulation(sigma)
        with self._without_bookkeeping():
            x0 = self.student.predict_x0(noisy, sigma, prepared, attention=context, modulation=modulation)
        return _as_usual(x0)

    def _is_merged(self, step: int) -> bool:
        """Whether the pass of this step is the one to be cached."""
        return self.cfg.merged_cache and step == self.cfg.num_steps - 1

    def _predict_and_cache(
        self, noisy: Tensor, step: int, prepared: PreparedCondition, context: KVContext
    ) -> tuple[Tensor, list[LayerKV]]:
        sigma = self.sigmas[step]
        modulation = self._modulation(sigma)
        with self._without_bookkeeping():
            x0, layers = self.student.predict_x0_and_cache(noisy, sigma, prepared, context, modulation)
        return _as_usual(x0), layers

    def _without_bookkeeping(self) -> AbstractContextManager:
        """For passes with a static cache, which no gradient can want: without autograd's version counters, a twentieth
        of their time on a CPU.
        """
        return torch.inference_mode() if isinstance(self.cache, StaticKVCache) else nullcontext()

    @torch.no_grad()
    def _cache_pass(
        self,
        x0: Tensor,
        last_input: Tensor | None,
        condition: Condition,
        prepared: PreparedCondition,
        context: KVContext,
    ) -> list[LayerKV]:
        """A pass over the finished chunk, clean by default: the cache must hold clean context.

        With ``merged_cache`` it repeats the last denoising pass, on ``last_input`` or, where the chunk stopped
        at an earlier step, on what the last step would have been given.
        """
        sigma, latents, purpose = self.cfg.context_noise, x0, ("context", 0)
        if self.cfg.merged_cache:
            sigma, purpose = self.sigmas[-1], ("renoise", self.cfg.num_steps - 1)
        if last_input is not None:
            latents = last_input
        elif sigma > 0:
            noisy = add_noise(x0, self._noise(*purpose), sigma)
            latents = first_frame_clamp(self.student, condition)(noisy)
        modulation = self._modulation(sigma)
        with self._without_bookkeeping():
            return self.student.cache_pass(latents, prepared, context, modulation)

    def _noise(self, purpose: str, step: int) -> Tensor:
        key = (*self.noise_key, "rollout", self.chunk_index, step, purpose)
        device = self.student.patch_embedding.weight.device
        return self.noise.normal(self.chunk_shape, self.sample_ids, *key, device=device)

    def _modulation(self, sigma: float) -> Modulation:
        """Modulation tables, once per noise level."""
        if sigma not in self._modulations:
            self._modulations[sigma] = self.student.modulation(NUM_TRAIN_TIMESTEPS * sigma)
        return self._modulations[sigma]

    def _text_context(self, condition: Condition) -> TextContext:
        """Text keys and values, once per prompt: made anew only for another tensor."""
        prompt, clip = condition.prompt_embeds, condition.clip_embeds
        if self._text is None or self._text[0] is not prompt or self._text[1] is not clip:
            self._text = (prompt, clip, self.student.prepare_text(prompt, clip))
        return self._text[2]

    def _check_request(
        self,
        condition: Condition,
        exit_step: int | None,
        start: ChunkStart | None,
        gradient: GradientPolicy,
        record: bool,
    ) -> int:
        """The step to stop at."""
        if not self._is_open:
            raise ValueError(
                f"chunk {self.chunk_index} was made with update_cache=False: none can follow; restore() an "
                "earlier boundary, or keep the cache pass"
            )
        if condition.batch_size != len(self.sample_ids):
            raise ValueError(
                f"condition has batch {condition.batch_size}, but there are {len(self.sample_ids)} sample_ids"
            )
        if isinstance(self.cache, StaticKVCache) and (record or gradient is not GradientPolicy.NONE):
            raise ValueError("cache='static' is overwritten in place: no gradients or records; use 'immutable'")
        last = self.cfg.num_steps - 1
        exit_step = last if exit_step is None else exit_step
        if not 0 <= exit_step <= last:
            raise ValueError(f"exit_step={exit_step} must be in 0..{last}, the student's steps")
        if start is not None and not 0 <= start.step <= exit_step:
            raise ValueError(f"start.step={start.step} must be in 0..{exit_step}, the steps up to the last one made")
        return exit_step


def _as_usual(x: Tensor) -> Tensor:
    """A copy that may be part of a graph, of a tensor that may not."""
    return x.clone() if x.is_inference() else x


def replay_exit_step(student: WanDiT, record: ChunkRecord, context: KVContext | None = None) -> Tensor:
    """x0 [B, C, c, h, w] of a recorded exit step, with its graph.

    Text projections and modulation are computed anew: those that the rollout shares between passes were
    made without gradients, and would leave their weights untrained.
    """
    if torch.is_autocast_enabled(record.noisy_latents.device.type):
        torch.clear_autocast_cache()  # older torch reuses casts made under no_grad, which lose the gradient
    context = record.context if context is None else context
    with torch.enable_grad():
        return student.predict_x0(record.noisy_latents, record.sigma, record.condition, attention=context)


def draw_exit_step(noise: KeyedNoise, cfg: RolloutConfig, *key: KeyPart) -> int:
    """Exit step of a training rollout, uniform over the student's steps and equal on all ranks by its key."""
    return noise.integers(cfg.num_steps, *key, "exit_step")


def rollout(
    student: WanDiT,
    condition: Condition,
    cfg: RolloutConfig,
    *,
    num_chunks: int,
    noise: KeyedNoise,
    sample_ids: Sequence[int],
    latent_shape: tuple[int, int, int],
    cache: str = "immutable",
    noise_key: Sequence[KeyPart] = (),
    exit_step: int | None = None,
    gradient: GradientPolicy = GradientPolicy.NONE,
    record: bool = False,
) -> Iterator[Chunk]:
    """A clip under a whole-clip condition; the cache pass of the last chunk is saved. See ``Rollout``."""
    video = Rollout(
        student,
        cfg,
        noise=noise,
        sample_ids=sample_ids,
        latent_shape=latent_shape,
        cache=cache,
        noise_key=noise_key,
        max_chunks=num_chunks,
    )
    for index in range(num_chunks):
        yield video.next_chunk(
            condition.chunk(index * cfg.chunk_frames, cfg.chunk_frames),
            exit_step=exit_step,
            gradient=gradient,
            record=record,
            update_cache=index < num_chunks - 1,
        )
