"""Solution pairs of the teacher's ODE: the data of causal initialisation (CausVid; MotionStream 3.2 and
appendix).

The teacher denoises whole clips by Euler steps under joint guidance (50 steps, shift 6); kept are the
inputs of the steps that the student will take (0, 16, 32: sigma 1, 0.927, 0.771) and the clean end, in
float16, beside the prompt, the tracks with the identities that were drawn, and the first frame. The clips
come from the training data in the loader's order; their pixels are not used beyond the first frame.

Driven by the trainer as a stage that trains nothing: step after step, global_batch pairs each. Pair n is
the same whatever the number of processes; one that exists is not made again. Left out: choosing prompts
and tracks (data/).
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from data.batch import Batch
from data.encode import fingerprint, fingerprints
from distill.conditions import check_track_limits, condition_fields, draw_condition, select_samples
from distill.pair_store import OdePair, PairStore
from distill.roles import load_frozen_teacher, require_weights
from models.assemble import ModelConfig
from models.condition import Condition
from models.diffusion.guidance import Guidance
from models.diffusion.sampler import sample_teacher
from models.motion.tracks import Tracks
from train.build import present_encoders
from train.conditioning import ClipEncoder
from train.stage import SetupContext, StepContext, StepOutput, ValidationOutput

log = logging.getLogger(__name__)

UPDATE = "pairs"  # name of the update; no module has it
FOLDER = "pairs"  # under the run's output_dir


@dataclass
class OdePairsConfig:
    """Settings of stage=ode_pairs. Grid, kept steps and guidance: model.rollout, model.guidance."""

    steps: int = 500  # of the run: steps x global_batch pairs are made (MotionStream: 4,000)
    global_batch: int = 8  # pairs per step, over all processes
    tracks_min: int = 1000  # tracks per sample, drawn uniformly up to tracks_max (or as many as there are)
    tracks_max: int | None = 2500  # null: all


class OdePairs:
    """The stage; see the module's text."""

    Config = OdePairsConfig
    needs_data = True

    def __init__(self, cfg: OdePairsConfig) -> None:
        self.cfg = cfg
        self.limits = check_track_limits(cfg.tracks_min, cfg.tracks_max)

    def check(self, model_cfg: ModelConfig) -> None:
        require_weights(model_cfg)
        model_cfg.rollout.validate_clip(model_cfg.clip.num_latents)

    def setup(self, context: SetupContext) -> None:
        self.model_cfg, self.noise, self.device = context.model_cfg, context.noise, context.device
        self.dtype, self.data = context.dtype, context.data
        self.guidance = Guidance(context.model_cfg.guidance)
        self.teacher = load_frozen_teacher(context.model_cfg, context.device)
        self.encoder = ClipEncoder(context.model_cfg, context.device)
        self.store = PairStore.create(context.output_dir / FOLDER, self._recipe(), self.encoder.null_prompt_embeds)
        missing = len(self.store.missing())
        log.info("%d of %d pairs are left to make in %s", missing, self.store.num_pairs, self.store.folder)

    def describe(self) -> list[str]:
        """Lines for the plan that is printed at the start."""
        rollout = self.model_cfg.rollout
        return [
            f"{self.store.num_pairs} pairs of {rollout.num_inference_steps} steps at shift {rollout.shift:g}",
            f"guidance: {self.guidance.describe()}",
        ]

    def modules(self) -> dict[str, nn.Module]:
        return {}

    def use(self, modules: Mapping[str, nn.Module]) -> None:
        """Nothing trains."""

    def updates(self, step: int) -> list[str]:
        return [UPDATE]

    def data_fields(self, model_cfg: ModelConfig, available: Sequence[str]) -> list[str]:
        return condition_fields(model_cfg, available)

    @torch.no_grad()
    def train_step(self, batch: Batch, context: StepContext) -> StepOutput:
        """Makes the missing ones of this micro-batch's pairs."""
        numbers = pair_numbers(batch.size, context, self.cfg.global_batch)
        left = [i for i, number in enumerate(numbers) if not self.store.has(number)]
        if left:
            self._make([numbers[i] for i in left], select_samples(batch, left))
        return StepOutput(iter(()), {"made": float(len(left))}, num_losses=0)

    def validate(self, step: int) -> ValidationOutput | None:
        return None

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """The folder of pairs is the state."""

    def export(self, folder: Path, weights: Mapping[str, nn.Module]) -> None:
        """The pairs are the result."""

    def _make(self, numbers: list[int], batch: Batch) -> None:
        """Generates and writes these pairs."""
        rollout = self.model_cfg.rollout
        condition, tracks = draw_condition(self.encoder, batch, self.noise, numbers, 0, self.limits)
        x0, kept = sample_teacher(
            self.teacher,
            condition,
            self.guidance,
            num_inference_steps=rollout.num_inference_steps,
            shift=rollout.shift,
            noise=self.noise,
            sample_ids=numbers,
            latent_shape=self.model_cfg.latent_shape,
            keep_steps=rollout.step_indices,
        )
        states = torch.stack([*kept, x0], dim=1).half().cpu()  # [B, K + 1, C, F, h, w]
        for row, number in enumerate(numbers):
            self.store.write(number, pair_of(row, states, condition, tracks))

    def _recipe(self) -> dict[str, Any]:
        """What the pairs depend on."""
        rollout = self.model_cfg.rollout
        return {
            "num_pairs": self.cfg.steps * self.cfg.global_batch,
            "global_batch": self.cfg.global_batch,  # a step's pairs are numbered by it
            "sigmas": rollout.sigmas,
            "step_indices": list(rollout.step_indices),
            "num_inference_steps": rollout.num_inference_steps,
            "shift": rollout.shift,
            "guidance": dict(self.model_cfg.guidance),
            "latent_shape": list(self.model_cfg.latent_shape),
            "tracks": [self.cfg.tracks_min, self.cfg.tracks_max],
            "seed": self.noise.seed,
            "teacher": fingerprint(self.model_cfg.teacher),
            "dtype": self.model_cfg.dtype,
            "precision": str(self.dtype).removeprefix("torch."),  # of the autocast
            "data": self.data,
            "null_caption": self.model_cfg.text.null_caption,
            "encoders": fingerprints(present_encoders(self.model_cfg)[0]),
        }


def pair_numbers(batch_size: int, context: StepContext, global_batch: int) -> list[int]:
    """Numbers of this process's micro-batch: the places of its samples in the loader's global order."""
    first = context.step * global_batch + context.micro * batch_size * context.world + context.rank
    return [first + row * context.world for row in range(batch_size)]


def pair_of(row: int, states: Tensor, condition: Condition, tracks: Tracks | None) -> OdePair:
    """One sample of a batch, without its batch dimension and the padding that its neighbours made needful."""
    one = None
    if tracks is not None:
        one = tracks.select(tracks.visibility[row].any(dim=0).nonzero().flatten())

    def pick(part: Tensor | None) -> Tensor | None:
        return None if part is None else part[row]

    return OdePair(
        states=states[row],
        prompt_embeds=condition.prompt_embeds[row],
        points=None if one is None else one.points[row],
        visibility=None if one is None else one.visibility[row],
        ids=None if one is None else one.ids[row],
        image_latents=pick(condition.image_latents),
        clip_embeds=pick(condition.clip_embeds),
        track_latents=pick(condition.track_map) if condition.track_map_is_latent else None,
    )
