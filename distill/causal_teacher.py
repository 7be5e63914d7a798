"""Causal teacher: flow matching under block-causal masks, another start for the student than ODE pairs.

Public reports call the targets of causal ODE regression ill-posed: a bidirectional trajectory depends on frames that
the causal student cannot see. This stage needs none: it goes on training the teacher on data, with causal attention
over chunks and a noise level per chunk (diffusion forcing, Chen et al. 2024):

    loss = w(sigma_i) * mean |v(x_sigma, sigma, c | sinks, window) - (eps - x0)|^2    over generated frames, sigma_i > 0

A chunk is clean with probability `clean_ratio`, which is the context of streaming. Sinks and window are drawn per
step, and the mean is taken, as in causal_init.py. Beyond MotionStream; compared with ODE pairs in row 16 of the claims.
Left out: few-step sampling, which Self-Forcing teaches.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from data.batch import Batch
from distill.causal_init import draw_mask, noisy_mean
from distill.roles import STUDENT, contexts_of, copy_of_teacher, require_weights
from models.assemble import ModelConfig
from models.diffusion.prediction import add_noise, velocity_target
from models.diffusion.schedule import NUM_TRAIN_TIMESTEPS, bell_weight
from models.wan.checkpoint import save_dit
from models.wan.dit import WanDiT
from train.stage import StepContext, StepOutput, ValidationOutput
from train.teacher import TEACHER, Teacher, TeacherConfig, first_frames


@dataclass
class CausalTeacherConfig(TeacherConfig):
    """Settings of stage=causal_teacher: the teacher's, and what the masks are drawn from.

    It logs one loss and makes no validation clips, so loss_buckets and validation_steps must keep their defaults.
    """

    sink_chunks: list[int] = field(default_factory=lambda: [0, 1, 2])  # drawn per step
    window_chunks: list[int | None] = field(default_factory=lambda: [1, 2, 3, 6, None])  # null: all
    clean_ratio: float = 0.25  # share of the chunks that are clean context

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.clean_ratio < 1:
            raise ValueError(f"stage.clean_ratio={self.clean_ratio} must be in [0, 1)")
        if not self.sink_chunks or not self.window_chunks:
            raise ValueError("stage.sink_chunks and stage.window_chunks must each list at least one value")


class CausalTeacher(Teacher):
    """The stage; see the module's text."""

    Config = CausalTeacherConfig
    cfg: CausalTeacherConfig
    starts_fresh = False  # without init_from it goes on from model.teacher

    def check(self, model_cfg: ModelConfig) -> None:
        """Refuses what the teacher refuses, a part of a chunk, and settings that would have no effect."""
        super().check(model_cfg)
        require_weights(model_cfg, self.cfg.init_from, needs_teacher=self.cfg.init_from is None)
        contexts_of(model_cfg.rollout, self.cfg.sink_chunks, self.cfg.window_chunks)
        self.require_whole_chunks(model_cfg, "stage=causal_teacher")
        for name in ("loss_buckets", "validation_steps"):
            value, default = vars(self.cfg)[name], vars(CausalTeacherConfig())[name]
            if value != default:
                raise ValueError(
                    f"stage.{name}={value} has no effect on stage=causal_teacher, which logs one loss and makes no "
                    f"validation clips; leave it at {'null' if default is None else default}"
                )

    def start(self, model_cfg: ModelConfig, seed: int) -> WanDiT:
        return copy_of_teacher(model_cfg) if self.cfg.init_from is None else super().start(model_cfg, seed)

    def describe(self) -> list[str]:
        return [
            f"start: {self.cfg.init_from or self.model_cfg.teacher}; track head "
            f"{'frozen' if self.cfg.freeze_track_head else 'trained'}; shift {self.cfg.shift:g}",
            f"masks: sink_chunks in {self.cfg.sink_chunks}, window_chunks in {self.cfg.window_chunks}; "
            f"{self.cfg.clean_ratio:g} of the chunks clean",
            "no validation: the stages after it make clips",
        ]

    def train_step(self, batch: Batch, context: StepContext) -> StepOutput:
        self.steps_done = context.step + 1
        batch = batch if self.cfg.num_frames is None else first_frames(batch, self.cfg.num_frames)
        x0 = self.encoder.latents(batch)
        condition = self.training_condition(batch, x0, context.step)
        sigma = self.draw_chunk_sigma(batch.sample_ids, context.step, x0.shape[2]).to(x0.device)  # [B, F]
        eps = self.noise.normal(x0.shape[1:], batch.sample_ids, TEACHER, "noise", context.step, device=x0.device)
        choices = (self.cfg.sink_chunks, self.cfg.window_chunks)
        mask = draw_mask(self.noise, context.step, *choices, self.model_cfg.rollout.chunk_frames)

        noisy_latents = add_noise(x0, eps, sigma)
        velocity = self.dit(noisy_latents, NUM_TRAIN_TIMESTEPS * sigma, condition, attention=mask)
        error = (velocity.float() - velocity_target(x0, eps)).square().mean(dim=(1, 3, 4))  # [B, F]
        weight = bell_weight(sigma, self.cfg.shift) if self.cfg.bell_weighting else torch.ones_like(sigma)
        generated = self.dit.generated_frames(condition, x0.shape[2])
        loss = noisy_mean(weight * error, sigma > 0, generated, noisy_ratio=1 - self.cfg.clean_ratio)
        return StepOutput(loss, {"loss": loss.detach()})

    def draw_chunk_sigma(self, sample_ids: Sequence[int], step: int, num_frames: int) -> Tensor:
        """Noise level of each frame, shared within a chunk, 0 for clean ones: [B, F] float32."""
        chunk_frames = self.model_cfg.rollout.chunk_frames
        levels = [
            [self._draw_level(step, sample, chunk) for chunk in range(num_frames // chunk_frames)]
            for sample in sample_ids
        ]
        return torch.tensor(levels).repeat_interleave(chunk_frames, dim=1)

    def _draw_level(self, step: int, sample: int, chunk: int) -> float:
        if self._chance("clean", self.cfg.clean_ratio, step, sample, chunk):
            return 0.0
        return float(self.sigmas[self.noise.integers(NUM_TRAIN_TIMESTEPS, TEACHER, "sigma", step, sample, chunk)])

    def validate(self, step: int) -> ValidationOutput | None:
        """None: its clips are made by the stages after it; a bidirectional sample would say nothing."""
        return None

    def export(self, folder: Path, weights: Mapping[str, nn.Module]) -> None:
        save_dit(
            weights[TEACHER],  # type: ignore[arg-type]
            folder / STUDENT,
            stage="causal_teacher",
            steps=self.steps_done,
            init_from=self.cfg.init_from or self.model_cfg.teacher,
        )
