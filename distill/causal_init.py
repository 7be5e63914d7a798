"""Causal initialisation: the student learns the teacher's ODE under a block-causal mask (CausVid;
MotionStream 3.2).

The student is the teacher's weights with causal attention over chunks. For each chunk of a stored
trajectory one of its states is drawn, independently of the other chunks (as in diffusion forcing); the
clean end is one of them, so that some chunks are clean context, as in streaming. The student predicts the
clean latents of the noisy chunks:

    loss = mean |x0(states at sigma_i, c | sinks, window) - x0|^2    over generated frames with sigma_i > 0

The mean divides by the expected number of such frames. Self-Forcing's code divides by the number drawn, which makes
the gradient depend on how a batch is split over micro-batches and processes.

Sink and window sizes are drawn per step, the same on all ranks, so that one initialisation serves every
rollout.

Left out: slot positions (a mask has absolute ones; the rollout of self_forcing.py teaches the slots) and
self-made context. Needs no data but the pairs of stage=ode_pairs.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from data.batch import Batch
from data.encode import fingerprint
from data.loader import ResumableSampler
from distill.health import has_seams, seam_score
from distill.pair_store import PairStore, stack_condition, stack_states
from distill.roles import STUDENT, contexts_of, copy_of_teacher, load_student, require_weights, trainable
from distill.validation import compare_latents, generate_clips
from models.assemble import ModelConfig
from models.condition import Condition
from models.diffusion.noise import KeyedNoise
from models.wan.attention import ChunkMask
from models.wan.checkpoint import save_dit
from train.stage import SetupContext, StepContext, StepOutput, ValidationOutput

TINY = 1e-8
log = logging.getLogger(__name__)


@dataclass
class CausalInitConfig:
    """Settings of stage=causal_init."""

    pairs: str = ""  # folder written by stage=ode_pairs
    init_from: str | None = None  # folder of a student to go on with; null: the teacher's weights
    sink_chunks: list[int] = field(default_factory=lambda: [0, 1, 2])  # drawn per step
    window_chunks: list[int | None] = field(default_factory=lambda: [1, 2, 3, 6, None])  # null: all
    train_track_head: bool = False  # false: keep the teacher's track head
    validation_pairs: int = 4  # pairs whose conditions the student is rolled out under; 0: no validation


class CausalInit:
    """The stage; see the module's text."""

    Config = CausalInitConfig
    needs_data = False

    def __init__(self, cfg: CausalInitConfig) -> None:
        if not cfg.sink_chunks or not cfg.window_chunks:
            raise ValueError("stage.sink_chunks and stage.window_chunks must each list at least one value")
        self.cfg = cfg
        self.sampler: ResumableSampler | None = None
        self.position: dict[str, int] = {}  # of the sampler; the same on all ranks

    def check(self, model_cfg: ModelConfig) -> None:
        """Refuses what cannot train: no teacher, no pairs, or pairs of another clip or step list."""
        require_weights(model_cfg, self.cfg.init_from, needs_teacher=not self.cfg.init_from)
        contexts_of(model_cfg.rollout, self.cfg.sink_chunks, self.cfg.window_chunks)
        if not self.cfg.pairs:
            raise ValueError("stage.pairs is empty; set it to the folder that stage=ode_pairs wrote")
        store = PairStore.open(self.cfg.pairs)
        for name, wanted in (("sigmas", model_cfg.rollout.sigmas), ("latent_shape", list(model_cfg.latent_shape))):
            if (found := store.recipe[name]) != wanted:
                raise ValueError(
                    f"stage.pairs={self.cfg.pairs} has {name}={found}, this model has {wanted}; make pairs with it"
                )
        if store.recipe["guidance"] != dict(model_cfg.guidance):
            log.warning("%s: pairs of guidance %s, not model.guidance", self.cfg.pairs, store.recipe["guidance"])
        if model_cfg.teacher and not Path(model_cfg.teacher).exists():
            log.warning("model.teacher=%s is not here; whether the pairs are its own is not checked", model_cfg.teacher)
        elif model_cfg.teacher and store.recipe["teacher"] != fingerprint(model_cfg.teacher):
            log.warning("%s: pairs of another teacher than model.teacher=%s", self.cfg.pairs, model_cfg.teacher)
        model_cfg.rollout.validate_clip(model_cfg.clip.num_latents)

    def setup(self, context: SetupContext) -> None:
        self.check(context.model_cfg)
        self.model_cfg, self.device, self.noise = context.model_cfg, context.device, context.noise
        self.store = PairStore.open(self.cfg.pairs)
        self.sigmas = torch.tensor([*context.model_cfg.rollout.sigmas, 0.0], device=context.device)
        found = self.cfg.init_from
        student = load_student(context.model_cfg, found) if found else copy_of_teacher(context.model_cfg)
        self.student = trainable(student, context.device, self.cfg.train_track_head)

    def describe(self) -> list[str]:
        """Lines for the plan that is printed at the start."""
        states = ", ".join(f"{sigma:.4g}" for sigma in self.sigmas.tolist())
        return [
            f"{self.store.num_pairs} pairs from {self.cfg.pairs}, states at sigma {states}",
            f"masks: sink_chunks in {self.cfg.sink_chunks}, window_chunks in {self.cfg.window_chunks}",
        ]

    def modules(self) -> dict[str, nn.Module]:
        return {STUDENT: self.student}

    def use(self, modules: Mapping[str, nn.Module]) -> None:
        self.student = modules[STUDENT]  # type: ignore[assignment]

    def updates(self, step: int) -> list[str]:
        return [STUDENT]

    def train_step(self, batch: Batch, context: StepContext) -> StepOutput:
        numbers = self._next_numbers(context)
        states, condition = self._load(numbers)
        chunk_frames, num_frames = self.model_cfg.rollout.chunk_frames, states.shape[3]

        index = draw_indices(self.noise, numbers, context.step, num_frames // chunk_frames, len(self.sigmas))
        index = index.repeat_interleave(chunk_frames, dim=1).to(self.device)  # [B, F]
        noisy_latents, sigma = select_states(states, index), self.sigmas[index]
        mask = draw_mask(self.noise, context.step, self.cfg.sink_chunks, self.cfg.window_chunks, chunk_frames)
        x0 = self.student.predict_x0(noisy_latents, sigma, condition, attention=mask)

        generated = self.student.generated_frames(condition, num_frames).to(self.device)
        error = (x0 - states[:, -1]).square().mean(dim=(1, 3, 4))  # [B, F]
        loss = noisy_mean(error, sigma > 0, generated, noisy_ratio=1 - 1 / len(self.sigmas))
        return StepOutput(loss, self._metrics(error, index, (sigma > 0) & generated, x0, states[:, -1]))

    def validate(self, step: int) -> ValidationOutput | None:
        """Rollouts under the conditions of some pairs, compared with the teacher's clips.

        A good initialisation has ratios near 1; seam_ratio well above 1 means jumps between chunks.
        """
        numbers = list(range(min(self.cfg.validation_pairs, self.store.num_pairs)))
        if not numbers:
            return None
        states, condition = self._load(numbers)
        x0 = generate_clips(self.student, condition, self.model_cfg, self.noise, numbers)
        return ValidationOutput(compare_latents(x0, states[:, -1], self.model_cfg.rollout.chunk_frames))

    def state_dict(self) -> dict[str, Any]:
        return dict(self.position)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.position = {name: int(value) for name, value in state.items()}
        self.sampler = None

    def export(self, folder: Path, weights: Mapping[str, nn.Module]) -> None:
        save_dit(weights[STUDENT], folder / STUDENT, stage="causal_init", pairs=str(self.cfg.pairs))

    def _next_numbers(self, context: StepContext) -> list[int]:
        """Numbers of this rank's next pairs."""
        if self.sampler is None:
            global_batch = context.micro_batch * context.world
            self.sampler = ResumableSampler(
                self.store.num_pairs, global_batch, context.seed, context.rank, context.world
            )
            each, there = global_batch * context.accumulation, self.store.num_pairs
            if there < each:
                log.warning(
                    "an update takes its %d trajectories from %d, some of them again with the same states: "
                    "global_batch=%d or less learns the same at less cost", each, there, there,
                )  # fmt: skip
            if self.position:
                self.sampler.load_state_dict(self.position)
            self.batches = iter(self.sampler)
        numbers = next(self.batches)
        self.sampler.advance()
        self.position = self.sampler.state_dict()
        return numbers

    def _load(self, numbers: Sequence[int]) -> tuple[Tensor, Condition]:
        """Trajectories [B, K + 1, C, F, h, w] and what the teacher was conditioned on."""
        pairs = [self.store.read(number) for number in numbers]
        condition = stack_condition(pairs, self.store.null_prompt_embeds, self.model_cfg, self.device)
        return stack_states(pairs).to(self.device), condition

    def _metrics(self, error: Tensor, index: Tensor, counted: Tensor, x0: Tensor, target: Tensor) -> dict[str, Tensor]:
        """Loss per step of the student's list; visibility of the seams between chunks (1 = the teacher's)."""
        metrics = {"loss": masked_mean(error, counted).detach()}
        for step in range(len(self.sigmas) - 1):
            chosen = counted & (index == step)
            if bool(chosen.any()):
                metrics[f"loss_step_{step}"] = masked_mean(error, chosen).detach()
        chunk_frames = self.model_cfg.rollout.chunk_frames
        if has_seams(x0.shape[2], chunk_frames):
            seam = seam_score(x0.detach(), chunk_frames) / seam_score(target, chunk_frames).clamp_min(TINY)
            metrics["seam_ratio"] = seam
        return metrics


def draw_indices(noise: KeyedNoise, numbers: Sequence[int], step: int, num_chunks: int, num_states: int) -> Tensor:
    """State of each chunk, [B, num_chunks] long, uniform on 0..num_states-1 (the last is the clean end)."""
    draws = [
        [noise.integers(num_states, "state", step, number, chunk) for chunk in range(num_chunks)] for number in numbers
    ]
    return torch.tensor(draws)


def draw_mask(
    noise: KeyedNoise,
    step: int,
    sink_chunks: Sequence[int],
    window_chunks: Sequence[int | None],
    chunk_frames: int,
) -> ChunkMask:
    """Sinks and window of this step, one of each list: keyed by the step alone, so all ranks agree."""
    sink = sink_chunks[noise.integers(len(sink_chunks), "sink", step)]
    window = window_chunks[noise.integers(len(window_chunks), "window", step)]
    return ChunkMask(chunk_frames, sink, window)


def select_states(states: Tensor, index: Tensor) -> Tensor:
    """The chosen state of each frame: states [B, K + 1, C, F, h, w], index [B, F] -> [B, C, F, h, w]."""
    batch, _, channels, frames, height, width = states.shape
    picks = index.view(batch, 1, 1, frames, 1, 1).expand(-1, -1, channels, -1, height, width)
    return states.gather(1, picks)[:, 0]


def noisy_mean(values: Tensor, noisy: Tensor, generated: Tensor, noisy_ratio: float) -> Tensor:
    """Sum over the noisy generated frames over their expected number.

    values, noisy [B, F]; generated bool [F]; noisy_ratio: how likely a frame is noisy.
    """
    return (values * (noisy & generated)).sum() / (len(values) * generated.sum() * noisy_ratio)


def masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    """Mean of the values where mask is set; 0 where it is nowhere set."""
    return (values * mask).sum() / mask.sum().clamp_min(1)
