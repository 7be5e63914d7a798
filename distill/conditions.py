"""What student, teacher and critic are all conditioned on: drawn once per sample, then the same for the
three.

The prompt, the first frame and a random subset of the tracks under fresh identities, as in the teacher's
training, but nothing is dropped: the student learns the guided teacher, which has already used the dropped
branches. Of a clip only its first frame is encoded. Left out: the encoders (train/conditioning.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from data.batch import Batch
from models.assemble import ModelConfig
from models.condition import Condition
from models.diffusion.noise import KeyedNoise
from models.motion.tracks import Tracks
from train.conditioning import ClipEncoder
from train.teacher import draw_track_subset, first_frames

TrackLimits = tuple[int, int | None]  # least and most tracks shown per sample; None: all


def check_track_limits(tracks_min: int, tracks_max: int | None) -> TrackLimits:
    """Raises ValueError unless 1 <= tracks_min <= tracks_max."""
    if tracks_min < 1 or (tracks_max is not None and tracks_max < tracks_min):
        raise ValueError(f"stage.tracks_min={tracks_min} must be >= 1 and <= tracks_max={tracks_max}")
    return tracks_min, tracks_max


def condition_fields(model_cfg: ModelConfig, available: Sequence[str]) -> list[str]:
    """Fields of the shards that a condition needs; latents, or else pixels, for the first frame."""
    fields = ["latents" if "latents" in available else "pixels"]
    fields += ["prompt_embeds"] if "prompt_embeds" in available else []
    if model_cfg.dit.clip_dim is not None:
        stored = "clip_embeds" in available
        fields += ["clip_embeds"] if stored else ["pixels"] if "pixels" not in fields else []
    return fields + (["tracks"] if model_cfg.dit.track_channels else [])


def draw_condition(
    encoder: ClipEncoder,
    batch: Batch,
    noise: KeyedNoise,
    numbers: Sequence[int],
    step: int,
    limits: TrackLimits,
) -> tuple[Condition, Tracks | None]:
    """Condition of whole clips, and the tracks in it.

    numbers: one key per sample for what is drawn (sample ids, or numbers of pairs).
    """
    tracks = None
    if batch.tracks is not None and encoder.model_cfg.dit.track_channels:
        tracks = draw_track_subset(batch.tracks, noise, numbers, step, limits)
    latents = encoder.latents(first_frames(batch, 1))
    return encoder.condition(batch, latents, tracks), tracks


def select_samples(batch: Batch, rows: Sequence[int]) -> Batch:
    """Some of the samples, by row."""

    def pick(values: list) -> list:
        return [values[row] for row in rows]

    chosen: dict[str, Any] = {name: pick(vars(batch)[name]) for name in ("sample_ids", "keys", "captions")}
    for name in ("pixels", "latents", "prompt_embeds", "clip_embeds"):
        value = vars(batch)[name]
        chosen[name] = None if value is None else value[list(rows)]
    tracks = batch.tracks
    if tracks is not None:
        index = list(rows)
        tracks = replace(
            tracks, points=tracks.points[index], visibility=tracks.visibility[index], ids=tracks.ids[index]
        )
    return Batch(**chosen, tracks=tracks)
