"""Training of the feature network of the sprites world (eval/metrics/sprites_network.py), from pixels.

    loss = BCE(shapes) + BCE(colours at the start) + BCE(colours at the end)
           + bearer_weight CE(what has each colour at the end) + motion_weight |v - v'|^2

What a clip shows is read from its caption, which knows it exactly; how it moves, from its tracks. v is in units of
`MOTION_UNIT` per frame, so that it is about 1. Asked only which shapes are there, the network learned to count them and
little more in 400 steps; asked what has each colour, it has to tell them apart.

Generated clips are softer and noisier than rendered ones and must be judged too: a share of the training clips is
shrunk, enlarged again and given some noise. In most steps the clips are thinned to every fourth frame, with the
same labels: a network that must learn shapes needs many clips more than many frames of each.

Left out: generated clips in training, so that no model is judged by a network that has seen its errors.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from data.batch import Batch
from eval.metrics.sprites_network import (
    BEARERS,
    LABELS,
    MIN_FRAMES,
    MIN_PX,
    MOTION_UNIT,
    SPATIAL_STRIDE,
    CaptionLabels,
    SpritesNetwork,
    SpritesNetworkConfig,
    event_accuracy,
    labels_of_caption,
)
from models.assemble import ModelConfig
from models.motion.tracks import Tracks
from train.stage import SetupContext, StepContext, StepOutput, ValidationOutput

FEATURES = "features"
LABEL_HEADS = ("shapes", "start_colors", "end_colors")
STILL = 0.002  # heights per frame: a track that is slower on average stands still (0.13 px of 64)
VALIDATED_TOGETHER = 16  # clips


@dataclass
class FeatureStageConfig:
    """Settings of stage=features."""

    init_from: str | None = None  # folder of a network to continue from; null: fresh weights from the seed
    network: SpritesNetworkConfig = field(default_factory=SpritesNetworkConfig)  # of fresh weights
    bearer_weight: float = 3.0  # of the cross entropy of what has each colour, mean over colours
    motion_weight: float = 0.2  # of the squared error of the motion, in units of 1 % of the height per frame
    frame_strides: list[int] = field(default_factory=lambda: [1, 4, 4])  # each step takes every n-th frame, n from here
    soften_ratio: float = 0.5  # share of the clips that are softened
    max_shrink: float = 3.0  # softened clips are shrunk by 1 to this and enlarged again
    max_noise: float = 0.1  # they get white noise of a spread from 0 to this; pixels are in [-1, 1]

    def __post_init__(self) -> None:
        if not 0 <= self.soften_ratio <= 1:
            raise ValueError(f"stage.soften_ratio={self.soften_ratio} must be in 0..1")
        if not self.frame_strides or min(self.frame_strides) < 1:
            strides = list(self.frame_strides)
            raise ValueError(f"stage.frame_strides={strides} must name strides >= 1; [1] takes all frames")
        if self.max_shrink < 1:
            raise ValueError(f"stage.max_shrink={self.max_shrink} must be >= 1; 1 leaves the size")
        for name in ("bearer_weight", "motion_weight", "max_noise"):
            if vars(self)[name] < 0:
                raise ValueError(f"stage.{name}={vars(self)[name]} must be >= 0")


class FeatureStage:
    """The stage; see the module's text."""

    Config = FeatureStageConfig
    needs_data = True

    def __init__(self, cfg: FeatureStageConfig) -> None:
        self.cfg = cfg

    def check(self, model_cfg: ModelConfig) -> None:
        """Refuses clips of a size that the network does not read, and a stride that leaves too few frames."""
        height, width = model_cfg.clip.height, model_cfg.clip.width
        if min(height, width) < MIN_PX or height % SPATIAL_STRIDE or width % SPATIAL_STRIDE:
            raise ValueError(
                f"model.clip.height={height}, model.clip.width={width}: the network reads multiples of "
                f"{SPATIAL_STRIDE} px from {MIN_PX} on; use a model with such clips"
            )
        most = (model_cfg.clip.num_frames - 1) // (MIN_FRAMES - 1)
        if max(self.cfg.frame_strides) > most:
            raise ValueError(
                f"stage.frame_strides={list(self.cfg.frame_strides)} must be at most {most}: the network reads "
                f"{MIN_FRAMES} frames or more, model.clip.num_frames={model_cfg.clip.num_frames}"
            )

    def data_fields(self, model_cfg: ModelConfig, available: Sequence[str]) -> list[str]:
        return ["pixels", "tracks"]

    def setup(self, context: SetupContext) -> None:
        self.check(context.model_cfg)
        self.noise, self.device = context.noise, context.device
        self.held_out = context.validation_batch
        if self.cfg.init_from is None:
            self.network = SpritesNetwork.from_config(self.cfg.network, seed=context.noise.seed)
        else:
            self.network = SpritesNetwork.from_folder(self.cfg.init_from)
        self.network.to(context.device).train()

    def modules(self) -> dict[str, nn.Module]:
        return {FEATURES: self.network}

    def use(self, modules: Mapping[str, nn.Module]) -> None:
        self.network = modules[FEATURES]  # type: ignore[assignment]

    def updates(self, step: int) -> list[str]:
        return [FEATURES]

    def train_step(self, batch: Batch, context: StepContext) -> StepOutput:
        strides = self.cfg.frame_strides
        stride = strides[self.noise.integers(len(strides), FEATURES, "stride", context.step)]
        batch = every_nth_frame(batch, stride)
        outputs = self.network(self.soften(batch.model_pixels(), batch.sample_ids, context.step))
        targets = targets_of(batch)
        terms = {name: F.binary_cross_entropy_with_logits(outputs[name], targets[name]) for name in LABEL_HEADS}
        terms["end_bearers"] = F.cross_entropy(outputs["end_bearers"].transpose(1, 2), targets["end_bearers"])
        terms["motion"] = F.mse_loss(outputs["motion"], targets["motion"]) / (MOTION_UNIT * stride) ** 2
        weights = {"end_bearers": self.cfg.bearer_weight, "motion": self.cfg.motion_weight}
        loss = torch.stack([weights.get(name, 1.0) * term for name, term in terms.items()]).sum()
        return StepOutput(loss, terms)

    def soften(self, pixels: Tensor, sample_ids: Sequence[int], step: int) -> Tensor:
        """cfg.soften_ratio of the clips [B, 3, T, H, W], blurred and noisy; the others as they are."""
        clips = []
        for clip, sample in zip(pixels, sample_ids, strict=True):
            drawn = {what: self.noise.uniform(FEATURES, what, step, sample) for what in ("soften", "shrink", "noise")}
            if drawn["soften"] < self.cfg.soften_ratio:
                clip = blurred(clip, 1 + drawn["shrink"] * (self.cfg.max_shrink - 1))
                grain = self.noise.normal(clip.shape, [sample], FEATURES, "grain", step, device=clip.device)[0]
                clip = clip + drawn["noise"] * self.cfg.max_noise * grain
            clips.append(clip)
        return torch.stack(clips)

    def validate(self, step: int) -> ValidationOutput | None:
        """How often each head is right about the held-out clips, and the error of the motion."""
        if self.held_out is None:
            return None
        pixels = self.held_out.to(self.device).pixels
        if pixels is None:
            raise ValueError("validation clips have no pixels; pack them with step=pack")
        found = [self.network(clips) for clips in pixels.split(VALIDATED_TOGETHER)]
        outputs = {name: torch.cat([each[name] for each in found]).cpu() for name in found[0]}
        return ValidationOutput(accuracies(outputs, self.held_out))

    def describe(self) -> list[str]:
        size, cfg = sum(parameter.numel() for parameter in self.network.parameters()) / 1e6, self.cfg
        return [
            f"feature network {size:.2f} M; {cfg.soften_ratio:.0%} of the clips softened, shrunk up to "
            f"{cfg.max_shrink:g} times, noise up to {cfg.max_noise:g}"
        ]

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Nothing to restore: the noise is keyed by the step."""

    def export(self, folder: Path, weights: Mapping[str, nn.Module]) -> None:
        network = weights[FEATURES]
        assert isinstance(network, SpritesNetwork), "the module of stage=features is a SpritesNetwork"
        network.save(folder / FEATURES)


# --------------------------------------------------------------------------------------------- targets
def every_nth_frame(batch: Batch, stride: int) -> Batch:
    """Frames 0, stride, 2 stride … of pixels and tracks: the same scenes, filmed at a lower rate."""
    if batch.pixels is None or batch.tracks is None:
        raise ValueError("batch.pixels or batch.tracks is None; add 'pixels' and 'tracks' to the loader's fields")
    tracks = batch.tracks.frames(slice(None, None, stride))
    return replace(batch, pixels=batch.pixels[:, :, ::stride], tracks=tracks)


def targets_of(batch: Batch) -> dict[str, Tensor]:
    """What each head should say: multi-hot [B, labels] and an index [B, 8] into BEARERS, motion [B, 2]."""
    if batch.tracks is None:
        raise ValueError("batch.tracks is None; add 'tracks' to the loader's fields")
    motion = mean_motion(batch.tracks)
    labels = [labels_of_caption(caption) for caption in batch.captions]
    targets = {name: torch.stack([multi_hot(each, name) for each in labels]) for name in LABEL_HEADS}
    targets["end_bearers"] = torch.stack([bearer_numbers(each) for each in labels])
    return {name: values.to(motion.device) for name, values in targets.items()} | {"motion": motion}


def bearer_numbers(labels: CaptionLabels) -> Tensor:
    """For each colour, the index into BEARERS of what has it at the end: [8]."""
    return torch.tensor([BEARERS.index(labels.end_bearers.get(color, "nothing")) for color in LABELS["colors"]])


def multi_hot(labels: CaptionLabels, head: str) -> Tensor:
    """1.0 for each shape or colour of `head` that the caption names, 0.0 for the others."""
    present: Collection[str] = getattr(labels, head)
    return torch.tensor([float(word in present) for word in LABELS["shapes" if head == "shapes" else "colors"]])


def mean_motion(tracks: Tracks) -> Tensor:
    """Mean displacement (x, y) in heights per frame of what moves -> [B, 2]; zero where nothing does.

    A displacement counts where its track is seen in both frames; a track moves if its own mean speed reaches STILL.
    """
    steps = tracks.points.diff(dim=1) / tracks.height  # [B, T - 1, N, 2]
    seen = (tracks.visibility[:, 1:] & tracks.visibility[:, :-1]).float()
    speed = (steps.norm(dim=-1) * seen).sum(dim=1) / seen.sum(dim=1).clamp_min(1)  # [B, N]
    counted = (seen * (speed >= STILL)[:, None].float())[..., None]
    return (steps * counted).sum(dim=(1, 2)) / counted.sum(dim=(1, 2)).clamp_min(1)


def blurred(clip: Tensor, shrink: float) -> Tensor:
    """[3, T, H, W] shrunk by a factor >= 1 and enlarged again, frame by frame."""
    height, width = clip.shape[2:]
    size = (max(1, round(height / shrink)), max(1, round(width / shrink)))
    small = F.interpolate(clip.transpose(0, 1), size, mode="bilinear", antialias=True)
    return F.interpolate(small, (height, width), mode="bilinear").transpose(0, 1)


# --------------------------------------------------------------------------------------------- accuracies
def accuracies(outputs: Mapping[str, Tensor], batch: Batch) -> dict[str, float]:
    """Share of the clips whose labels are all right, by head; of the events seen; motion error in px per frame.

    false_event_ratio: how often an event's colour is seen at the start already, where it cannot be.
    """
    assert batch.tracks is not None, "targets_of needs tracks"
    targets = targets_of(batch)
    metrics = {
        f"{name}_accuracy": float(((outputs[name] > 0) == (targets[name] > 0.5)).all(dim=1).float().mean())
        for name in LABEL_HEADS
    }
    bearers_right = outputs["end_bearers"].argmax(dim=2) == targets["end_bearers"]
    metrics["end_bearers_accuracy"] = float(bearers_right.all(dim=1).float().mean())
    error = (outputs["motion"] - targets["motion"]).norm(dim=1) * batch.tracks.height
    metrics["motion_error_px"] = float(error.mean())
    metrics["still_error_px"] = float(targets["motion"].norm(dim=1).mean() * batch.tracks.height)
    for name, head in (("event_accuracy", "end_colors"), ("false_event_ratio", "start_colors")):
        judged = [value for value in event_accuracy(outputs[head], batch.captions) if math.isfinite(value)]
        if judged:
            metrics[name] = sum(judged) / len(judged)
    return metrics
