"""Self-Forcing distillation of the causal student (MotionStream 3.3, eq. 3 and 4; Huang et al. 2025).

Student update, every `student_every`-th step:
    x0   = rollout of the student with its own rolling cache, stopped at a random step, no gradient
    g    = (x0_critic - x0_teacher) / mean |x0 - x0_teacher| at one noise level, teacher under joint guidance
    loss = sum over chunks of <x0_chunk, g_chunk> / numel, each chunk's exit step run again with gradient
Critic update, every step: flow matching on a rollout of its own.

The two passes give the gradient of the whole clip with one chunk's graph in memory at a time; the cache is
a constant of each chunk, so nothing flows from a chunk into the ones before it. All three models see one
condition. Which step the rollout stops at, and with which sinks and window, is keyed by the step alone:
all ranks run the same branches.

Left out: clips longer than the teacher's horizon, GAN terms, and the metrics on pixels (eval/).
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from torch import Tensor, nn

from data.batch import Batch
from distill.conditions import check_track_limits, condition_fields, draw_condition
from distill.critic import critic_loss
from distill.dmd import (
    TINY,
    DmdGradient,
    chunk_surrogate,
    dmd_gradient,
    dmd_loss,
    generated_numel,
    score_sigma,
)
from distill.health import HealthThresholds, LatentReference, check_health, has_seams, seam_score, smooth
from distill.roles import (
    CRITIC,
    STUDENT,
    contexts_of,
    copy_of_teacher,
    load_frozen_teacher,
    load_student,
    require_weights,
    trainable,
)
from distill.validation import compare_latents, generate_clips
from models.assemble import ModelConfig
from models.condition import Condition
from models.diffusion.guidance import Guidance
from models.diffusion.noise import KeyedNoise, KeyPart
from models.diffusion.prediction import add_noise
from models.diffusion.schedule import NUM_TRAIN_TIMESTEPS
from models.rollout import (
    CONTEXT_FIELDS,
    Chunk,
    GradientPolicy,
    RolloutConfig,
    draw_exit_step,
    replay_exit_step,
    rollout,
)
from models.wan.checkpoint import save_dit
from models.wan.dit import WanDiT
from train.accelerator import average_measures, kept_whole
from train.conditioning import ClipEncoder
from train.stage import SetupContext, StepContext, StepOutput, ValidationOutput
from train.teacher import fixed_identities
from train.validation import show_clips

log = logging.getLogger(__name__)


@dataclass
class SelfForcingConfig:
    """Settings of stage=self_forcing. Rollout (steps, chunk, sinks, window) and guidance are the model's."""

    init_from: str | None = None  # folder exported by stage=causal_init; null: the teacher's weights
    student_every: int = 5  # steps; the critic is updated in each
    min_timestep: float = 20.0  # 0..1000, least noise level at which scores are compared
    max_timestep: float = 980.0  # 0..1000
    score_shift: float | None = None  # shift of the score timesteps; null: model.rollout.shift
    sink_chunks: list[int] = field(default_factory=list)  # drawn per step; empty: the model.rollout's
    window_chunks: list[int | None] = field(default_factory=list)  # the same; null in it: all past chunks
    two_pass: bool = True  # false: the graph of the whole clip at once (a check; memory grows with it)
    reuse_rollout: bool = False  # the critic learns from the student's rollout where there is one
    train_track_head: bool = False  # false: keep the track head of causal_init
    tracks_min: int = 1000  # tracks per sample, drawn uniformly up to tracks_max (or as many as there are)
    tracks_max: int | None = 2500  # null: all
    reference_clips: int = 16  # training clips that health is measured against; 0: only the score gap
    health: HealthThresholds = field(default_factory=HealthThresholds)

    def __post_init__(self) -> None:
        if self.student_every < 1:
            raise ValueError(f"student_every={self.student_every} must be at least 1 step")
        if self.score_shift is not None and self.score_shift <= 0:
            raise ValueError(f"stage.score_shift={self.score_shift} must be > 0, or null for model.rollout.shift")
        if not 0 <= self.min_timestep < self.max_timestep <= NUM_TRAIN_TIMESTEPS:
            raise ValueError(
                f"min_timestep={self.min_timestep}, max_timestep={self.max_timestep} must satisfy "
                f"0 <= min < max <= {NUM_TRAIN_TIMESTEPS}"
            )


@dataclass(frozen=True)
class Clip:
    """One rollout of the student and what it was conditioned on."""

    x0: Tensor  # [B, C, F, h, w] float32; carries a graph only with two_pass=false
    chunks: list[Chunk]
    condition: Condition
    sample_ids: list[int]
    generated: Tensor  # bool [F]

    def detach(self) -> Clip:
        """Without graph and without the records of its chunks."""
        return replace(self, x0=self.x0.detach(), chunks=[])


class SelfForcing:
    """The stage; see the module's text."""

    Config = SelfForcingConfig
    needs_data = True

    def __init__(self, cfg: SelfForcingConfig) -> None:
        self.cfg = cfg
        self.limits = check_track_limits(cfg.tracks_min, cfg.tracks_max)
        self.reference: LatentReference | None = None  # of the training data
        self.smoothed: dict[str, float] = {}
        self.measured: list[dict[str, float]] = []  # of the micro-batches of this update
        self.shared_clips: list[Clip] = []  # rollouts of this step that the critic may reuse

    def check(self, model_cfg: ModelConfig) -> None:
        """Refuses absent weights and a clip that is no whole number of chunks, before anything is built. Tells of a
        model.rollout that training leaves out.
        """
        require_weights(model_cfg, self.cfg.init_from)
        contexts = self._contexts(model_cfg.rollout)
        for cfg in contexts:
            cfg.validate_clip(model_cfg.clip.num_latents)
        if model_cfg.rollout not in contexts:
            log.warning(
                "model.rollout has sink_chunks=%s and window_chunks=%s, which stage.sink_chunks=%s and "
                "stage.window_chunks=%s leave out: the student is validated, and streams, with a context that it does "
                "not train with",
                model_cfg.rollout.sink_chunks, model_cfg.rollout.window_chunks,
                list(self.cfg.sink_chunks), list(self.cfg.window_chunks),
            )  # fmt: skip

    def setup(self, context: SetupContext) -> None:
        model_cfg = context.model_cfg
        self.model_cfg, self.noise, self.device = model_cfg, context.noise, context.device
        self.held_out = context.validation_batch
        self.guidance = Guidance(model_cfg.guidance)
        self.encoder = ClipEncoder(model_cfg, context.device)
        self.teacher = load_frozen_teacher(model_cfg, context.device)
        student = load_student(model_cfg, self.cfg.init_from)
        self.student = trainable(student, context.device, self.cfg.train_track_head)
        self.critic = trainable(copy_of_teacher(model_cfg), context.device, self.cfg.train_track_head)
        if context.sample_clips is not None and self.cfg.reference_clips:
            clips = (clip.to(context.device) for clip in context.sample_clips(self.cfg.reference_clips))
            with torch.no_grad():
                self.reference = LatentReference.measure(self.encoder.latents(clip) for clip in clips)

    def describe(self) -> list[str]:
        return [f"guidance of the teacher: {self.guidance.describe()}"]

    def modules(self) -> dict[str, nn.Module]:
        return {STUDENT: self.student, CRITIC: self.critic}

    def use(self, modules: Mapping[str, nn.Module]) -> None:
        self.student, self.critic = modules[STUDENT], modules[CRITIC]

    def data_fields(self, model_cfg: ModelConfig, available: Sequence[str]) -> list[str]:
        return condition_fields(model_cfg, available)

    def updates(self, step: int) -> list[str]:
        return [STUDENT, CRITIC] if step % self.cfg.student_every == 0 else [CRITIC]

    def train_step(self, batch: Batch, context: StepContext) -> StepOutput:
        update = self.student_update if context.update == STUDENT else self.critic_update
        return update(batch, context)

    # ------------------------------------------------------------------------------------------ student
    def student_update(self, batch: Batch, context: StepContext) -> StepOutput:
        """One micro-batch of eq. 3: the losses are built one chunk at a time, as they are asked for."""
        clip = self.roll_out(batch, context)
        gradient = self.dmd_gradient(clip, context)
        metrics = self._student_metrics(clip, gradient, context)
        if self.cfg.reuse_rollout:
            self.shared_clips.append(clip.detach())
        if not self.cfg.two_pass:
            return StepOutput(dmd_loss(clip.x0, gradient.direction, clip.generated), metrics)
        return StepOutput(self.chunk_losses(clip, gradient.direction), metrics, num_losses=len(clip.chunks))

    def roll_out(self, batch: Batch, context: StepContext) -> Clip:
        """The student generates the clip as when streaming, each chunk stopped at this step's exit."""
        condition, _ = draw_condition(self.encoder, batch, self.noise, batch.sample_ids, context.step, self.limits)
        key = (context.update, context.step)
        cfg = draw_rollout(self.noise, self._contexts(self.model_cfg.rollout), *key)
        channels, _, height, width = self.model_cfg.latent_shape
        graded = context.update == STUDENT
        policy = GradientPolicy.EXIT_STEP if graded and not self.cfg.two_pass else GradientPolicy.NONE
        with kept_whole(self.student) if policy is GradientPolicy.NONE else nullcontext():
            chunks = list(
                rollout(
                    self.student,
                    condition,
                    cfg,
                    num_chunks=self.model_cfg.num_chunks,
                    noise=self.noise,
                    noise_key=key,
                    sample_ids=batch.sample_ids,
                    latent_shape=(channels, height, width),
                    exit_step=draw_exit_step(self.noise, cfg, *key),
                    record=graded and self.cfg.two_pass,
                    gradient=policy,
                )
            )
        x0 = torch.cat([chunk.x0 for chunk in chunks], dim=2)
        generated = self.student.generated_frames(condition, x0.shape[2])
        return Clip(x0, chunks, condition, batch.sample_ids, generated)

    @torch.no_grad()
    def dmd_gradient(self, clip: Clip, context: StepContext) -> DmdGradient:
        """Both scores at one noise level per sample, over the whole contiguous clip."""
        noisy_latents, _, sigma = self._noised(clip, context)

        def predict_real(given: Condition) -> Tensor:
            return self.teacher.predict_x0(noisy_latents, sigma, given)

        x0_real = self.guidance(predict_real, clip.condition)
        x0_fake = self.critic.predict_x0(noisy_latents, sigma, clip.condition)
        return dmd_gradient(clip.x0, x0_real, x0_fake, clip.generated)

    def chunk_losses(self, clip: Clip, direction: Tensor) -> Iterator[Tensor]:
        """The second pass: each chunk's exit step with gradient, from the inputs the rollout recorded."""
        numel = generated_numel(clip.x0, clip.generated)
        directions = direction.split(self.model_cfg.rollout.chunk_frames, dim=2)
        for chunk, part in zip(clip.chunks, directions, strict=True):
            assert chunk.record is not None, "the rollout of a two-pass update records its chunks"
            yield chunk_surrogate(replay_exit_step(self.student, chunk.record), part, numel)

    # ------------------------------------------------------------------------------------------ critic
    def critic_update(self, batch: Batch, context: StepContext) -> StepOutput:
        """Flow matching on the student's clips, unweighted, without guidance."""
        if self.shared_clips and self.cfg.reuse_rollout:
            clip = self.shared_clips.pop(0)
        else:
            clip = self.roll_out(batch, context)
        noisy_latents, noise, sigma = self._noised(clip, context)
        velocity = self.critic(noisy_latents, NUM_TRAIN_TIMESTEPS * sigma, clip.condition)
        loss = critic_loss(velocity, clip.x0, noise, clip.generated)
        metrics = self._health(self.reference.compare(clip.x0) if self.reference else {}, context)
        return StepOutput(loss, {"loss": loss.detach(), "sigma": sigma.mean(), **metrics})

    # ------------------------------------------------------------------------------------------ noise levels
    def _noised(self, clip: Clip, context: StepContext) -> tuple[Tensor, Tensor, Tensor]:
        """The clip at its score noise level: noisy latents, the noise, sigma [B]; no graph."""
        shift = self.model_cfg.rollout.shift if self.cfg.score_shift is None else self.cfg.score_shift
        sigma = draw_score_sigma(self.noise, context, clip.sample_ids, shift, self.cfg).to(self.device)
        x0 = clip.x0.detach()
        key = (context.update, context.step, "score")
        noise = self.noise.normal(x0.shape[1:], clip.sample_ids, *key, device=self.device)
        return add_noise(x0, noise, sigma), noise, sigma

    def _contexts(self, base: RolloutConfig) -> list[RolloutConfig]:
        """The rollout with each context that training draws from."""
        sinks, windows = self.cfg.sink_chunks, self.cfg.window_chunks
        return contexts_of(base, sinks or [base.sink_chunks], windows or [base.window_chunks])

    # ------------------------------------------------------------------------------------------ health
    def _student_metrics(self, clip: Clip, gradient: DmdGradient, context: StepContext) -> dict[str, float | Tensor]:
        chunk_frames = self.model_cfg.rollout.chunk_frames
        metrics: dict[str, float | Tensor] = {
            "loss": dmd_loss(clip.x0.detach(), gradient.direction, clip.generated),
            "normaliser": gradient.normaliser.mean(),
            "gradient_ratio": (gradient.score_gap / gradient.normaliser.clamp_min(TINY)).mean(),
        }
        if has_seams(clip.x0.shape[2], chunk_frames):
            metrics["seam_score"] = seam_score(clip.x0.detach(), chunk_frames)
        return metrics | self._health({"score_gap": float(gradient.score_gap.mean())}, context)

    def _health(self, measures: dict[str, float], context: StepContext) -> dict[str, float]:
        """Means over the processes. After the last micro-batch raises CollapseError where those of the update, smoothed
        over updates, are beyond the limits of the config: on all processes or on none.
        """
        measures = average_measures(measures, context.world, self.device)
        self.measured.append(measures)
        if context.is_last_micro:
            means = {name: mean(one[name] for one in self.measured) for name in measures}
            self.measured.clear()
            self.smoothed = smooth(self.smoothed, means, self.cfg.health.smoothing)
            if context.step >= self.cfg.health.warmup_steps:
                check_health(self.smoothed, self.cfg.health)
        return measures

    # ------------------------------------------------------------------------------------------ the rest
    def validate(self, step: int) -> ValidationOutput | None:
        """Rollouts by all steps under held-out conditions: latents, videos and track error."""
        if self.held_out is None:
            return None
        batch = self.held_out.to(self.device)
        latents = self.encoder.latents(batch)
        tracks = fixed_identities(batch.tracks, self.noise, batch.sample_ids)
        condition = self.encoder.condition(batch, latents, tracks)
        x0 = generate_clips(self.student, condition, self.model_cfg, self.noise, batch.sample_ids)
        metrics = compare_latents(x0, latents, self.model_cfg.rollout.chunk_frames)
        output = ValidationOutput(metrics, fps=self.model_cfg.clip.fps)
        if self.encoder.can_decode:
            show_clips(x0, batch, self.encoder, output)
        return output

    def state_dict(self) -> dict[str, Any]:
        return {"smoothed": dict(self.smoothed)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.smoothed = dict(state["smoothed"])

    def export(self, folder: Path, weights: Mapping[str, nn.Module]) -> None:
        """The student is the result; the critic stays in the checkpoints."""
        student: WanDiT = weights[STUDENT]  # type: ignore[assignment]
        contexts = self._contexts(self.model_cfg.rollout)
        seen = {name: list(dict.fromkeys(vars(cfg)[name] for cfg in contexts)) for name in CONTEXT_FIELDS}
        trained_with = asdict(self.model_cfg.rollout) | seen
        save_dit(
            student, folder / STUDENT, stage="self_forcing", guidance=self.guidance.describe(), rollout=trained_with
        )


def draw_rollout(noise: KeyedNoise, choices: Sequence[RolloutConfig], *key: KeyPart) -> RolloutConfig:
    """One of the rollouts; the key makes it the same on all ranks."""
    return choices[noise.integers(len(choices), *key, "context")]


def draw_score_sigma(
    noise: KeyedNoise, context: StepContext, sample_ids: list[int], shift: float, cfg: SelfForcingConfig
) -> Tensor:
    """One noise level per sample -> [B] float32, shared by all frames."""
    index = [
        noise.integers(NUM_TRAIN_TIMESTEPS, "score", context.update, context.step, sample_id)
        for sample_id in sample_ids
    ]
    bounds = {"min_timestep": cfg.min_timestep, "max_timestep": cfg.max_timestep}
    return score_sigma(torch.tensor(index), shift=shift, **bounds).float()
