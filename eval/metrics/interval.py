"""Confidence intervals over clips: a percentile bootstrap, seeded, and its paired form for a difference.

The clip is the unit that is resampled: frames and points of one clip are not independent. Values that are nan
(a clip in which nothing could be measured) are left out, and `count` says how many were used. Nor are several seeds
on one clip independent: their mean (`mean_over_seeds`) is the clip's figure. Where each seed is a training, the
trainings are drawn again too (`seeded_interval`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

BLOCK_SIZE = 2**22  # values drawn at a time


@dataclass(frozen=True)
class Interval:
    """A mean with its interval; `low` and `high` are None where fewer than two clips were measured."""

    mean: float | None
    low: float | None
    high: float | None
    count: int

    def __str__(self) -> str:
        if self.mean is None:
            return "n/a"
        if self.low is None or self.high is None:
            return f"{self.mean:.3g}"
        return f"{self.mean:.3g} [{self.low:.3g}, {self.high:.3g}]"


def bootstrap_interval(values: Sequence[float], *, seed: int, level: float = 0.95, resamples: int = 4000) -> Interval:
    """Mean of `values` over clips with its percentile-bootstrap interval.

    Args:
        values: one figure per clip; nan means not measured.
        seed: of the resampling; the same values and seed give the same interval.
        level: coverage aimed at, in (0, 1).
        resamples: number of bootstrap resamples.
    """
    if not 0.0 < level < 1.0:
        raise ValueError(f"level={level} must lie between 0 and 1; use 0.95")
    finite = np.array([value for value in values if math.isfinite(value)], dtype=np.float64)
    if finite.size == 0:
        return Interval(None, None, None, 0)
    if finite.size == 1:
        return Interval(float(finite[0]), None, None, 1)
    rng, rows = np.random.default_rng(seed), max(1, BLOCK_SIZE // finite.size)  # in blocks: streams have many chunks
    counts = [min(rows, resamples - start) for start in range(0, resamples, rows)]
    means = [finite[rng.integers(0, finite.size, size=(count, finite.size))].mean(axis=1) for count in counts]
    low, high = np.quantile(np.concatenate(means), [(1 - level) / 2, (1 + level) / 2])
    return Interval(float(finite.mean()), float(low), float(high), int(finite.size))


def seeded_interval(
    seeds: Sequence[Sequence[float]], *, seed: int, level: float = 0.95, resamples: int = 4000
) -> Interval:
    """Interval of a mean over trainings and clips: both are drawn again, so that what one training happened to learn
    does not pass for what its recipe does. `count` is that of the clips.

    Args:
        seeds: for each training, at least one, the figures of the same clips in the same order; nan: not measured.

    Returns:
        Of one training, or one clip, an interval without bounds: nothing tells how much another would differ.
    """
    means = mean_over_seeds(seeds)
    measured = [n for n, value in enumerate(means) if math.isfinite(value)]
    whole = bootstrap_interval(means, seed=seed, level=level, resamples=resamples)
    if len(seeds) < 2 or len(measured) < 2:
        return Interval(whole.mean, None, None, whole.count)
    figures = np.array(seeds, dtype=np.float64)[:, measured]
    found, rng, (trainings, clips) = np.isfinite(figures), np.random.default_rng(seed), figures.shape
    means = []
    for _ in range(resamples):
        drawn = np.ix_(rng.integers(0, trainings, trainings), rng.integers(0, clips, clips))
        if found[drawn].any():
            means.append(figures[drawn][found[drawn]].mean())
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return Interval(whole.mean, float(low), float(high), whole.count)


def mean_over_seeds(seeds: Sequence[Sequence[float]]) -> list[float]:
    """One figure per clip: its mean over the seeds in which it was measured.

    Args:
        seeds: for each seed, at least one, the figures of the same clips in the same order; nan means not measured.

    Returns:
        One figure per clip, nan where no seed measured it.

    Raises:
        ValueError: the seeds have different numbers of clips.
    """
    if len(counts := {len(values) for values in seeds}) > 1:
        raise ValueError(f"a mean over seeds needs the same clips in each; got {sorted(counts)} values")
    finite = [[value for value in clip if math.isfinite(value)] for clip in zip(*seeds, strict=True)]
    return [math.fsum(values) / len(values) if values else math.nan for values in finite]


def paired_difference(
    first: Sequence[float], second: Sequence[float], *, seed: int, level: float = 0.95, resamples: int = 4000
) -> Interval:
    """Interval of mean(first - second), the two measured on the same clips in the same order.

    Pairing removes the variance between clips, which is much larger than that between methods. It is an error
    to pass lists of different lengths.
    """
    if len(first) != len(second):
        raise ValueError(
            f"a paired difference needs the same clips on both sides; got {len(first)} and {len(second)} values"
        )
    differences = [a - b for a, b in zip(first, second, strict=True)]
    return bootstrap_interval(differences, seed=seed, level=level, resamples=resamples)
