"""Adaptive distribution self-rectification (ADSR, DragStream eq. 4): optimised latents keep the mean and deviation
of latents that nobody touched.

own: of the same latents before the drag, per channel. neighbours: of the latents of the frames before, at the same
noise level, per channel (the paper). compat: of the same latents, per frame and channel, and of the whole in the end
(the official code). The official code also shifts every clean chunk, dragged or not (`match_clean`).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

EPS = 1e-6
PER_CHANNEL, PER_FRAME, WHOLE = (2, 3, 4), (3, 4), (0, 1, 2, 3, 4)  # dimensions of [B, C, F, H, W] averaged over

Rectify = Callable[[Tensor], Tensor]


def match(latents: Tensor, reference: Tensor, dims: tuple[int, ...] = PER_CHANNEL) -> Tensor:
    """Latents [B, C, F, H, W] with the reference's mean and (unbiased) deviation over ``dims``."""
    deviation, mean = torch.std_mean(latents, dims, keepdim=True)
    wanted_deviation, wanted_mean = torch.std_mean(reference, dims, keepdim=True)
    return (latents - mean) / (deviation + EPS) * wanted_deviation + wanted_mean


def rectifiers(kind: str, before: Tensor, neighbours: Tensor | None) -> tuple[Rectify, Rectify]:
    """What follows each iteration, and the last one. ``before``: the latents before the drag.

    The first chunk of a stream has no neighbours and keeps its own statistics.
    """
    if kind == "off":
        return _same, _same
    if kind == "compat":
        return lambda latents: match(latents, before, PER_FRAME), lambda latents: match(latents, before, WHOLE)
    reference = neighbours if kind == "neighbours" and neighbours is not None else before
    return lambda latents: match(latents, reference), _same


def match_clean(x0: Tensor, previous: Tensor) -> Tensor:
    """Clean latents with the mean and deviation of those before them and of themselves: the official code's third
    rectification, of every chunk, dragged or not."""
    return match(x0, torch.cat([previous, x0], dim=2), WHOLE)


def _same(latents: Tensor) -> Tensor:
    return latents
