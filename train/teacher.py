"""The motion-conditioned bidirectional teacher (MotionStream 3.1-3.2): both of its training stages, by
config.

Rectified flow on latents x0 with noise eps and level sigma (eq. A1, A2):

    x_sigma = (1 - sigma) x0 + sigma eps          sigma = shift(r), r uniform, shift 6
    loss    = w(sigma) * mean |v(x_sigma, sigma, c_t, c_m) - (eps - x0)|^2     over generated frames

Tracks become the map c_m (eq. 1): a random subset of them, with identities drawn anew for each sample and
step. Text and motion are dropped independently, so that joint guidance (eq. 2) has its two partial branches.
Stage 2 masks the motion of random chunks (mid_mask_probability) and freezes the track head.

Unspecified in the paper and chosen here: dropout rates, w (the bell of the Self-Forcing code base), the
identity range. Left out: the choice of data and resolution per stage (conf/experiment).
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from data.batch import Batch
from models.assemble import ModelConfig, build_dit
from models.condition import FRAMES_PER_LATENT, Condition, num_latent_frames
from models.diffusion.guidance import Guidance
from models.diffusion.noise import KeyedNoise
from models.diffusion.prediction import add_noise, velocity_target
from models.diffusion.schedule import NUM_TRAIN_TIMESTEPS, bell_weight, training_sigmas
from models.motion.tracks import NUM_TRACK_IDS, Tracks, sample_track_ids
from models.vae.latent_space import LatentSpace
from models.wan.checkpoint import load_pretrained, save_dit
from models.wan.dit import WanDiT
from train.conditioning import ClipEncoder
from train.stage import SetupContext, StepContext, StepOutput, ValidationOutput
from train.validation import show_clips, teacher_clips

log = logging.getLogger(__name__)

TEACHER = "teacher"


@dataclass
class TeacherConfig:
    """Settings of stage=teacher. Defaults: stage 1 of the paper where it says, else the module's choices."""

    init_from: str | None = None  # folder or file of a DiT in any known format; null: fresh weights from the seed
    num_frames: int | None = None  # pixel frames trained on, from a clip's first, 1 + 4k; null: the whole clip
    shift: float = 6.0  # of the noise levels, k
    bell_weighting: bool = True  # w(sigma); false: every level counts the same
    text_dropout: float = 0.1  # probability per sample
    motion_dropout: float = 0.1  # probability per sample; zeros at the input of the track head
    mid_mask_probability: float = 0.0  # per chunk but the first; stage 2: 0.2
    freeze_track_head: bool = False  # stage 2: true
    tracks_min: int = 1000  # tracks shown per sample, drawn uniformly up to tracks_max (or as many as there are)
    tracks_max: int | None = 2500  # null: all
    loss_buckets: int = 5  # intervals of sigma in [0, 1] with a loss of their own in the log
    validation_steps: int | None = None  # Euler steps of validation clips; null: model.rollout.num_inference_steps

    def __post_init__(self) -> None:
        for name in ("text_dropout", "motion_dropout", "mid_mask_probability"):
            if not 0 <= vars(self)[name] <= 1:
                raise ValueError(f"stage.{name}={vars(self)[name]} must be a probability, 0..1")
        if self.tracks_min < 1 or (self.tracks_max is not None and self.tracks_max < self.tracks_min):
            raise ValueError(f"stage.tracks_min={self.tracks_min} must be >= 1 and <= tracks_max={self.tracks_max}")
        if self.num_frames is not None and (self.num_frames < 1 or (self.num_frames - 1) % FRAMES_PER_LATENT):
            nearest = 1 + FRAMES_PER_LATENT * max(0, round((self.num_frames - 1) / FRAMES_PER_LATENT))
            raise ValueError(f"stage.num_frames={self.num_frames} must be 1 + 4k; nearest valid: {nearest}")
        if self.shift <= 0 or self.loss_buckets < 1:
            raise ValueError(f"stage.shift={self.shift} must be > 0 and loss_buckets={self.loss_buckets} >= 1")
        if self.validation_steps is not None and self.validation_steps < 1:
            raise ValueError(
                f"stage.validation_steps={self.validation_steps} must be at least 1, or null for model.rollout's"
            )


class Teacher:
    """The stage; see the module's text."""

    Config = TeacherConfig
    needs_data = True

    def __init__(self, cfg: TeacherConfig) -> None:
        self.cfg = cfg
        self.steps_done = 0

    @property
    def starts_fresh(self) -> bool:
        """Whether the weights are drawn anew."""
        return self.cfg.init_from is None

    def check(self, model_cfg: ModelConfig) -> None:
        """Refuses what the architecture cannot do, and a start that is not there."""
        dit = model_cfg.dit
        if self.cfg.mid_mask_probability and not dit.track_channels:
            raise ValueError(
                f"stage.mid_mask_probability={self.cfg.mid_mask_probability} needs a model with tracks, "
                "but model.dit.track_channels=0; set it to 0"
            )
        if self.cfg.freeze_track_head and not dit.has_track_head:
            raise ValueError("stage.freeze_track_head=true, but the model has no track head; set it to false")
        if self.cfg.freeze_track_head and self.starts_fresh:
            raise ValueError("stage.freeze_track_head=true keeps a trained head: set stage.init_from, or false here")
        clip_frames = model_cfg.clip.num_frames
        if self.cfg.num_frames is not None and self.cfg.num_frames > clip_frames:
            raise ValueError(f"stage.num_frames={self.cfg.num_frames} must be at most {clip_frames}, model.clip's")
        if (self.cfg.num_frames or clip_frames) == 1 and dit.image_conditioning == "first_frame":
            field = "model.clip.num_frames" if self.cfg.num_frames is None else "stage.num_frames"
            raise ValueError(
                f"{field}=1 leaves nothing to learn: this model is given its first frame (model.dit.image_conditioning="
                "first_frame); set at least 5"
            )
        if self.cfg.mid_mask_probability:
            self.require_whole_chunks(model_cfg, f"stage.mid_mask_probability={self.cfg.mid_mask_probability}")
        if self.cfg.init_from is not None and not Path(self.cfg.init_from).exists():
            raise FileNotFoundError(
                f"stage.init_from={self.cfg.init_from}: there is nothing; pass the folder or file "
                "of a DiT, or null for fresh weights"
            )

    def require_whole_chunks(self, model_cfg: ModelConfig, needed_by: str) -> None:
        """Raises ValueError, naming the setting, where the frames trained on are no whole number of chunks."""
        field = "model.clip.num_frames" if self.cfg.num_frames is None else "stage.num_frames"
        frames = self.cfg.num_frames or model_cfg.clip.num_frames
        try:
            model_cfg.rollout.validate_clip(num_latent_frames(frames))
        except ValueError as error:
            raise ValueError(f"{field}={frames} must be whole chunks, as {needed_by} draws for each: {error}") from None

    def data_fields(self, model_cfg: ModelConfig, available: Sequence[str]) -> list[str]:
        """Stored latents, text and CLIP features where there are, else pixels and captions."""
        wanted = ["latents" if "latents" in available else "pixels"]
        optional = ["prompt_embeds", *(["clip_embeds"] if model_cfg.dit.clip_dim else [])]
        needed = ["tracks"] if model_cfg.dit.track_channels else []
        return wanted + [name for name in optional if name in available] + needed

    def setup(self, context: SetupContext) -> None:
        self.check(context.model_cfg)
        self.model_cfg, self.noise, self.held_out = context.model_cfg, context.noise, context.validation_batch
        self.dit = self.start(context.model_cfg, context.noise.seed)
        if self.cfg.freeze_track_head:
            self.dit.track_head.requires_grad_(False)
        before, self.dit.latent_space = self.dit.latent_space, context.model_cfg.latent_space
        if before is not None and self.dit.latent_space not in (None, before):
            told = "stage.init_from=%s was made for another latent space than that of model.vae; it has to learn anew"
            log.warning(told, self.cfg.init_from)
        self.dit.to(context.device).train()
        self.encoder = ClipEncoder(context.model_cfg, context.device)
        self.sigmas = training_sigmas(self.cfg.shift)

    def start(self, model_cfg: ModelConfig, seed: int) -> WanDiT:
        """The weights to train. Raises ValueError for a frozen track head that the start does not have."""
        dit = build_dit(model_cfg, seed)
        absent = load_pretrained(dit, self.cfg.init_from) if self.cfg.init_from is not None else []
        if absent and self.cfg.freeze_track_head:
            raise ValueError(
                f"stage.init_from={self.cfg.init_from} lacks {', '.join(absent)}: with stage.freeze_track_head="
                "true its tracks would never be seen; set it to false, or start from a teacher that knows tracks"
            )
        return dit

    def modules(self) -> dict[str, nn.Module]:
        return {TEACHER: self.dit}

    def use(self, modules: Mapping[str, nn.Module]) -> None:
        self.dit = modules[TEACHER]  # type: ignore[assignment]

    def updates(self, step: int) -> list[str]:
        return [TEACHER]

    # ------------------------------------------------------------------------------------------ the step
    def train_step(self, batch: Batch, context: StepContext) -> StepOutput:
        self.steps_done = context.step + 1
        batch = batch if self.cfg.num_frames is None else first_frames(batch, self.cfg.num_frames)
        x0 = self.encoder.latents(batch)
        condition = self.training_condition(batch, x0, context.step)
        sigma = self.draw_sigma(batch.sample_ids, context.step).to(x0.device)  # [B]
        eps = self.noise.normal(x0.shape[1:], batch.sample_ids, TEACHER, "noise", context.step, device=x0.device)

        per_sample = self.flow_error(x0, eps, sigma, condition)  # [B]
        weight = bell_weight(sigma, self.cfg.shift) if self.cfg.bell_weighting else torch.ones_like(sigma)
        loss = (weight * per_sample).mean()  # eq. A2
        return StepOutput(loss, bucket_means("loss_sigma", per_sample.detach(), sigma.cpu(), self.cfg.loss_buckets))

    def flow_error(self, x0: Tensor, eps: Tensor, sigma: Tensor, condition: Condition) -> Tensor:
        """mean |v - (eps - x0)|^2 over channels, space and generated frames (a given clean frame 0 is none)
        -> [B].
        """
        noisy_latents = add_noise(x0, eps, sigma)  # eq. A1
        velocity = self.dit(noisy_latents, NUM_TRAIN_TIMESTEPS * sigma, condition)
        error = (velocity.float() - velocity_target(x0, eps)).square().mean(dim=(1, 3, 4))  # [B, F]
        return error[:, self.dit.generated_frames(condition, x0.shape[2])].mean(dim=1)

    def training_condition(self, batch: Batch, x0: Tensor, step: int) -> Condition:
        """What the model sees: a subset of the tracks under new identities, with text and motion dropped at
        random.
        """
        tracks = batch.tracks
        if self.model_cfg.dit.track_channels and tracks is not None:
            limits = (self.cfg.tracks_min, self.cfg.tracks_max)
            tracks = draw_track_subset(tracks, self.noise, batch.sample_ids, step, limits)  # eq. 1
        condition = self.encoder.condition(batch, x0, tracks)
        condition = condition.drop("text", where=self._draw("drop_text", self.cfg.text_dropout, batch, step))
        if condition.track_map is None:
            return condition
        if self.cfg.mid_mask_probability:
            condition = condition.mask_motion(self.draw_mid_mask(batch.sample_ids, step, x0.shape[2]))
        return condition.drop("motion", where=self._draw("drop_motion", self.cfg.motion_dropout, batch, step))

    def draw_sigma(self, sample_ids: Sequence[int], step: int) -> Tensor:
        """Noise levels [B] float32, uniform over the 1000 levels of the shifted grid."""
        index = [self.noise.integers(NUM_TRAIN_TIMESTEPS, TEACHER, "sigma", step, sample) for sample in sample_ids]
        return self.sigmas[index].float()

    def draw_mid_mask(self, sample_ids: Sequence[int], step: int, num_frames: int) -> Tensor:
        """Bool [B, F]: chunks whose motion is left unspecified, each but chunk 0 with its own draw."""
        chunk_frames = self.model_cfg.rollout.chunk_frames
        draws = [
            [
                chunk > 0 and self._chance("mid_mask", self.cfg.mid_mask_probability, step, sample, chunk)
                for chunk in range(num_frames // chunk_frames)
            ]
            for sample in sample_ids
        ]
        return torch.tensor(draws).repeat_interleave(chunk_frames, dim=1)

    def _draw(self, purpose: str, probability: float, batch: Batch, step: int) -> Tensor:
        return torch.tensor([self._chance(purpose, probability, step, sample) for sample in batch.sample_ids])

    def _chance(self, purpose: str, probability: float, *key: int) -> bool:
        return self.noise.uniform(TEACHER, purpose, *key) < probability

    # ------------------------------------------------------------------------------- around the loop
    def validate(self, step: int) -> ValidationOutput | None:
        """Loss at fixed noise levels; clips sampled with guidance, their tracks compared with those asked
        for.
        """
        if self.held_out is None:
            return None
        batch = self.held_out.to(self.encoder.device)
        x0 = self.encoder.latents(batch)
        condition = self.encoder.condition(batch, x0, fixed_identities(batch.tracks, self.noise, batch.sample_ids))
        eps = self.noise.normal(x0.shape[1:], batch.sample_ids, TEACHER, "validation", device=x0.device)
        levels = [(bucket + 0.5) / self.cfg.loss_buckets for bucket in range(self.cfg.loss_buckets)]
        losses = [self.flow_error(x0, eps, torch.full((batch.size,), s, device=x0.device), condition) for s in levels]
        output = ValidationOutput({"loss": float(torch.stack(losses).mean())}, fps=self.model_cfg.clip.fps)
        if self.encoder.can_decode:
            steps = self.cfg.validation_steps or self.model_cfg.rollout.num_inference_steps
            x0 = teacher_clips(
                self.dit, condition, self.model_cfg, self.noise, batch.sample_ids, num_steps=steps, shift=self.cfg.shift
            )
            show_clips(x0, batch, self.encoder, output)
        return output

    def describe(self) -> list[str]:
        channels, frames, height, width = self.model_cfg.latent_shape
        tokens = frames * self.dit.tokens_per_frame(height, width)
        return [
            f"latents {channels} x {frames} x {height} x {width}: {tokens} tokens per clip",
            f"validation: {'loss, clips, EPE' if self.encoder.can_decode else 'loss only, no VAE'}",
            f"guidance in validation: {Guidance(self.model_cfg.guidance).describe()}",
            f"start: {self.cfg.init_from or 'fresh weights'}; track head "
            f"{'frozen' if self.cfg.freeze_track_head else 'trained'}; shift {self.cfg.shift:g}",
        ]

    def state_dict(self) -> dict[str, Any]:
        space = self.dit.latent_space
        return {"steps_done": self.steps_done, "latent_space": None if space is None else space.to_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Raises ValueError where the VAE is another one than the run began with."""
        self.steps_done = int(state["steps_done"])
        if saved := state["latent_space"]:
            owner = "the checkpoint of this run"
            self.dit.latent_space = LatentSpace.shared(self.dit.latent_space, LatentSpace(**saved), owner)

    def export(self, folder: Path, weights: Mapping[str, nn.Module]) -> None:
        save_dit(
            weights[TEACHER],
            folder / TEACHER,
            stage=TEACHER,
            steps=self.steps_done,  # type: ignore[arg-type]
            init_from=self.cfg.init_from,
            shift=self.cfg.shift,
            mid_mask_probability=self.cfg.mid_mask_probability,
        )


def first_frames(batch: Batch, num_frames: int) -> Batch:
    """The batch with its clips cut to their first frames; a causal VAE's latents can be cut as well."""
    num_latents = 1 + (num_frames - 1) // FRAMES_PER_LATENT
    return replace(
        batch,
        pixels=None if batch.pixels is None else batch.pixels[:, :, :num_frames],
        latents=None if batch.latents is None else batch.latents[:, :, :num_latents],
        tracks=None if batch.tracks is None else batch.tracks.frames(slice(0, num_frames)),
    )


def draw_track_subset(
    tracks: Tracks, noise: KeyedNoise, sample_ids: Sequence[int], step: int, limits: tuple[int, int | None]
) -> Tracks:
    """A random number of tracks per sample, in random order, under new identities -> [B, T, M, 2].

    limits (least, most or None), as far as the sample has tracks that are visible at all, and there are
    identities. Of two tracks in one cell the first in order is seen, so the random order is the random
    priority. Each sample is drawn on its own: the result does not depend on its neighbours in the batch.
    """
    drawn = []
    for row, sample in enumerate(sample_ids):
        rng = noise.generator(TEACHER, "tracks", step, sample)
        seen = tracks.visibility[row].any(dim=0).nonzero().flatten().cpu()
        there = min(len(seen), NUM_TRACK_IDS)
        least, most = min(limits[0], there), min(limits[1] or there, there)
        count = least + int(torch.randint(most - least + 1, (), generator=rng))
        chosen = seen[torch.randperm(len(seen), generator=rng)[:count]]
        one = Tracks(
            tracks.points[row : row + 1],
            tracks.visibility[row : row + 1],
            tracks.ids[row : row + 1],
            tracks.height,
            tracks.width,
        )
        drawn.append(one.select(chosen).with_ids(sample_track_ids(1, count, rng)))
    return Tracks.stack(drawn)


def fixed_identities(tracks: Tracks | None, noise: KeyedNoise, sample_ids: Sequence[int]) -> Tracks | None:
    """All tracks, or as many, evenly spaced, as there are identities, under ones that depend on the sample only."""
    if tracks is None:
        return None
    if tracks.num_tracks > NUM_TRACK_IDS:
        tracks = tracks.select(torch.linspace(0, tracks.num_tracks - 1, NUM_TRACK_IDS).long())
    ids = [sample_track_ids(1, tracks.num_tracks, noise.generator(TEACHER, "identities", s)) for s in sample_ids]
    return tracks.with_ids(torch.cat(ids))


def bucket_means(name: str, values: Tensor, sigma: Tensor, num_buckets: int) -> dict[str, Tensor]:
    """Mean of values [B] per interval of sigma [B] (on the CPU), for the intervals that have any."""
    bucket = (sigma * num_buckets).long().clamp(max=num_buckets - 1)
    return {
        f"{name}_{index / num_buckets:.2g}_{(index + 1) / num_buckets:.2g}": values[
            (bucket == index).to(values.device)
        ].mean()
        for index in sorted(set(bucket.tolist()))
    }
