"""What a stage trains on: one `Sample` per clip, stacked into a `Batch`. Fields that were not loaded are
None.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from models.motion.tracks import Tracks


@dataclass
class Sample:
    """One clip of a dataset."""

    sample_id: int  # position in the dataset: stable over epochs, workers and world sizes
    key: str
    caption: str
    pixels: Tensor | None = None  # [3, T, H, W] uint8
    latents: Tensor | None = None  # [C, F, h, w] float32, normalised
    prompt_embeds: Tensor | None = None  # [L, D] float32, zero beyond the true length
    clip_embeds: Tensor | None = None  # [257, 1280] float32, CLIP features of the first frame
    tracks: Tracks | None = None  # batch of one


@dataclass
class Batch:
    sample_ids: list[int]  # global: the key of per-sample randomness
    keys: list[str]
    captions: list[str]
    pixels: Tensor | None = None  # [B, 3, T, H, W] uint8
    latents: Tensor | None = None  # [B, C, F, h, w] float32, normalised
    prompt_embeds: Tensor | None = None  # [B, L, D] float32
    clip_embeds: Tensor | None = None  # [B, 257, 1280] float32
    tracks: Tracks | None = None  # ids are zero until a stage draws them

    @property
    def size(self) -> int:
        return len(self.sample_ids)

    def to(self, device: torch.device | str) -> Batch:
        moved: dict[str, Any] = {
            name: value.to(device) for name, value in vars(self).items() if isinstance(value, (Tensor, Tracks))
        }
        return replace(self, **moved)

    def model_pixels(self) -> Tensor:
        """Pixels as models read them: [B, 3, T, H, W] float32 in [-1, 1]. ValueError if they were not
        loaded.
        """
        if self.pixels is None:
            raise ValueError("batch.pixels is None; add 'pixels' to the loader's fields")
        return self.pixels.float() / 127.5 - 1


def collate(samples: Sequence[Sample]) -> Batch:
    """Stack samples; tracks of fewer points are padded with invisible ones.

    Raises ValueError if a field is present in some samples only, or its shapes differ (naming the keys).
    """
    batch = Batch([s.sample_id for s in samples], [s.key for s in samples], [s.caption for s in samples])
    for name in ("pixels", "latents", "prompt_embeds", "clip_embeds"):
        setattr(batch, name, _stack(name, [vars(s)[name] for s in samples], batch.keys))
    tracks = [s.tracks for s in samples if s.tracks is not None]
    if tracks:
        _require_all("tracks", len(tracks), len(samples))
        batch.tracks = Tracks.stack(tracks)
    return batch


def _stack(name: str, values: list[Tensor | None], keys: list[str]) -> Tensor | None:
    present = [value for value in values if value is not None]
    if not present:
        return None
    _require_all(name, len(present), len(values))
    shapes = {tuple(value.shape): key for value, key in zip(present, keys)}
    if len(shapes) > 1:
        raise ValueError(f"{name} shapes differ within a batch: {shapes}; prepare all clips with one model.clip")
    return torch.stack(present)


def _require_all(name: str, found: int, wanted: int) -> None:
    if found != wanted:
        raise ValueError(f"{name} is present in {found} of {wanted} samples; it must be in all or in none")
