"""Fréchet distance between two sets of features, and what the features came from.

FID and FVD (arXiv 1706.08500, 1812.01717): |m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2)). The trace of the root is the
sum of the roots of the eigenvalues of C1^(1/2) C2 C1^(1/2), which is symmetric: no complex root has to be cut.
With fewer samples than features the covariance is singular and the figure compares only within one table.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, eq=False)
class Features:
    """Feature vectors and how they were made; sets made in different ways do not compare."""

    values: np.ndarray  # [N, D]
    origin: str  # network and call style


def joined(parts: Sequence[Features]) -> Features:
    """One set of at least one, all of the same origin."""
    if len(origins := {part.origin for part in parts}) != 1:
        raise ValueError(f"features of {' and of '.join(sorted(origins))} do not compare; make all one way")
    return Features(np.concatenate([part.values for part in parts]), parts[0].origin)


def frechet_distance(first: Features, second: Features) -> float:
    """Distance of two sets, 0 for equal ones.

    Raises:
        ValueError: features of different origin or width, fewer than two samples, values that are not finite.
    """
    if first.origin != second.origin:
        raise ValueError(f"features of '{first.origin}' and of '{second.origin}' do not compare; make both one way")
    moments = [_moments(features.values) for features in (first, second)]
    (mean1, covariance1), (mean2, covariance2) = moments
    if mean1.shape != mean2.shape:
        raise ValueError(f"features have widths {len(mean1)} and {len(mean2)}; they must be equal")
    root = _root(covariance1)
    overlap = np.sqrt(np.clip(np.linalg.eigvalsh(root @ covariance2 @ root), 0, None)).sum()
    distance = np.square(mean1 - mean2).sum() + np.trace(covariance1) + np.trace(covariance2) - 2 * overlap
    return float(max(0.0, distance))


def _moments(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    if values.ndim != 2 or len(values) < 2 or not np.isfinite(values).all():
        raise ValueError(f"features {values.shape} must be finite [N, D] with N >= 2; give more videos")
    values = values.astype(np.float64)
    return values.mean(0), np.cov(values, rowvar=False).reshape(values.shape[1], values.shape[1])


def _root(covariance: np.ndarray) -> np.ndarray:
    """Symmetric square root; rounding can leave eigenvalues a little below 0."""
    values, vectors = np.linalg.eigh(covariance)
    return (vectors * np.sqrt(np.clip(values, 0, None))) @ vectors.T
