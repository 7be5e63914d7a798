"""Is the distillation still healthy? Measures of a clip and the alarm that stops a collapsing run.

DMD fails in a few known ways: frozen video (motion energy falls), blown contrast (latents leave the data's
range), grey or noise (their spread shrinks or grows), a critic that lost the student (the two scores
part). Each has a number here, relative to the training data's own, and a threshold in the stage's config.
Pure functions; the running data reference is the only thing with state.

Left out: judging samples by metrics on pixels (eval/).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from train.stage import RunEndedError

MAX_QUANTILE_VALUES = 1_000_000  # a percentile needs no more; torch.quantile stops at 16 M
TINY = 1e-8


class CollapseError(RunEndedError):
    """The run left the range its config allows; the message says by what measure, and what to try."""


@dataclass
class HealthThresholds:
    """Limits on smoothed measures; null switches one off. Ratios are student : training data."""

    min_motion_energy_ratio: float | None = 0.1  # mean |x0[f+1] - x0[f]|, 1 = moves as the data does
    max_saturation_ratio: float | None = 0.2  # share beyond the data's 99.9 percentile, 0..1
    min_latent_std_ratio: float | None = 0.3  # spread of the latents
    max_latent_std_ratio: float | None = 3.0
    max_score_gap: float | None = 2.0  # mean |x0_fake - x0_real|, in latent units
    warmup_steps: int = 20  # no alarm before this step
    smoothing: float = 0.9  # weight of the past in the running mean the limits apply to, 0..1

    def __post_init__(self) -> None:
        if not 0 <= self.smoothing < 1:
            raise ValueError(
                f"stage.health.smoothing={self.smoothing} must be in [0, 1): 1 would never see a new value"
            )

    def limits(self) -> dict[str, float]:
        """The thresholds that are set, by field name."""
        pairs = {f.name: self.__dict__[f.name] for f in fields(self) if f.name[:4] in ("min_", "max_")}
        return {name: value for name, value in pairs.items() if value is not None}


ADVICE = {
    "motion_energy_ratio": "the student is freezing: lower its learning rate or raise stage.student_every",
    "saturation_ratio": "the latents saturate: lower model.guidance or go back to an earlier checkpoint",
    "latent_std_ratio": "the latents lost the data's spread: lower the rates or go back a checkpoint",
    "score_gap": "the critic does not follow the student: raise stage.student_every or its learning rate",
}


def check_health(metrics: Mapping[str, float], thresholds: HealthThresholds) -> None:
    """Raises CollapseError if a measure is beyond its limit or not finite; absent measures are not judged."""
    for field, limit in thresholds.limits().items():
        name = field[4:]
        if name not in metrics:
            continue
        value = float(metrics[name])
        beyond = value < limit if field.startswith("min_") else value > limit
        if beyond or not math.isfinite(value):
            side = "at least" if field.startswith("min_") else "at most"
            limit_text = f"{side} stage.health.{field}={limit:g}"
            raise CollapseError(f"{name}={value:.4g} must be {limit_text}; {ADVICE[name]}")


def smooth(past: dict[str, float], metrics: Mapping[str, float], weight: float) -> dict[str, float]:
    """Exponential running mean per measure; a measure seen for the first time starts at its value.

    Values that are not finite are left out: the trainer skips their updates, and stops where they go on.
    """
    merged = {
        name: weight * past[name] + (1 - weight) * value if name in past else value
        for name, value in metrics.items()
        if math.isfinite(value)
    }
    return past | merged


def motion_energy(x0: Tensor) -> Tensor:
    """Mean |x0[f+1] - x0[f]| of latents [B, C, F, H, W]."""
    return x0.float().diff(dim=2).abs().mean()


def seam_score(x0: Tensor, chunk_frames: int) -> Tensor:
    """How much more a clip changes between chunks than inside them.

    x0 [B, C, F, H, W] with F > chunk_frames > 1 -> mean |difference| across chunk borders over that within
    chunks; 1 = no seam.
    """
    change = x0.float().diff(dim=2).abs().mean(dim=(0, 1, 3, 4))
    border = torch.arange(1, x0.shape[2], device=x0.device) % chunk_frames == 0
    return change[border].mean() / change[~border].mean().clamp_min(TINY)


def has_seams(num_frames: int, chunk_frames: int) -> bool:
    """Whether `seam_score` is defined: more than one chunk, of more than one frame."""
    return num_frames > chunk_frames > 1


@dataclass(frozen=True)
class LatentReference:
    """Spread, 99.9 percentile and motion energy of the training data's latents."""

    std: float
    limit: float
    motion_energy: float

    @classmethod
    def measure(cls, batches: Iterable[Tensor]) -> LatentReference:
        """Means over the clips of batches of latents [B, C, F, h, w]; raises ValueError where there are none."""
        rows = [
            (float(x.std()), float(_percentile(x.abs(), 0.999)), float(motion_energy(x)))
            for batch in batches
            for x in batch.float().split(1)
        ]
        if not rows:
            raise ValueError("no training clips to compare with; set stage.reference_clips to at least 1")
        return cls(*(max(sum(column) / len(rows), TINY) for column in zip(*rows, strict=True)))

    def compare(self, x0: Tensor) -> dict[str, float]:
        """Health measures of clips [B, C, F, h, w] relative to the data, means over the clips."""
        x0 = x0.float()
        return {
            "motion_energy_ratio": float(motion_energy(x0)) / self.motion_energy,
            "saturation_ratio": float((x0.abs() > self.limit).float().mean()),
            "latent_std_ratio": float(x0.flatten(1).std(dim=1).mean()) / self.std,
        }


def _percentile(values: Tensor, quantile: float) -> Tensor:
    stride = max(1, values.numel() // MAX_QUANTILE_VALUES)
    return torch.quantile(values.flatten()[::stride][:MAX_QUANTILE_VALUES], quantile)
