"""The clips a model is judged on: frames, caption, and the tracks that it is asked to follow.

Two sources. The sprites world renders held-out clips (seeds of its "test" split) of any length with exact
tracks and masks. A folder of real videos, listed and captioned as `python -m data source=folder` does, gives clips
whose ground truth is what a tracker finds in them. Tracks start on a grid in frame 0 with one point per latent
cell, at most tracker.rows x tracker.cols (50 x 50 in MotionStream).
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from data.sources import FolderSource, read_item
from data.sprites import SpritesClip, SpritesConfig, render_clip, split_seed
from data.trackers import TrackerConfig, build_tracker
from models.condition import ClipGeometry
from models.diffusion.noise import KeyedNoise
from models.motion.tracks import Tracks, sample_track_ids

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class EvalClip:
    """One clip with its ground truth."""

    key: str
    sample_id: int  # names the noise and the track identities
    caption: str
    frames: np.ndarray  # uint8 [T, H, W, 3]
    tracks: Tracks  # B = 1, queried on a grid in frame 0, identities drawn
    rendered: SpritesClip | None = field(default=None, repr=False)  # masks and exact tracks; sprites only

    @property
    def sprites(self) -> SpritesClip:
        """What only a sprites clip has. Raises ValueError for a clip of real video."""
        if self.rendered is None:
            raise ValueError(f"clip {self.key} is real video: it has no masks and no exact tracks")
        return self.rendered

    @property
    def queries(self) -> np.ndarray:
        """Where the tracks start: [N, 2] px."""
        return self.tracks.points[0, 0].numpy()


def sprites_clips(
    sprites: SpritesConfig,
    geometry: ClipGeometry,
    *,
    num_clips: int,
    split: str,
    queries: np.ndarray,
    noise: KeyedNoise,
) -> list[EvalClip]:
    """Clips of a split at the given size and length, with exact tracks."""
    cfg = replace(
        sprites,
        height=geometry.height,
        width=geometry.width,
        num_frames=geometry.num_frames,
        fps=geometry.fps,
    )
    clips = []
    for index in range(num_clips):
        clip = render_clip(cfg, split_seed(split, index))
        points, visibility = clip.track(np.column_stack([np.zeros(len(queries)), queries]))
        tracks = identified(points, visibility, cfg.height, cfg.width, noise, index)
        clips.append(EvalClip(f"{split}_{index:05d}", index, clip.caption, clip.frames, tracks, clip))
    return clips


def folder_clips(
    source: FolderSource,
    geometry: ClipGeometry,
    *,
    num_clips: int,
    tracker: TrackerConfig,
    queries: np.ndarray,
    noise: KeyedNoise,
    whole: bool = False,
    check_caption: Callable[[str], object] = str,
    progress: Callable[[int], object] = int,
) -> list[EvalClip]:
    """The first usable videos of a folder, by name; one that cannot be used is skipped with a warning.

    A clip's noise and identities are keyed by its name: they stay when other videos come or go.

    Args:
        whole: frames spread over the whole video (`read_video`).
        check_caption: raises ValueError for a caption that the model cannot read.
        progress: called with 1 for each clip.

    Raises ValueError where the folder holds none, FileNotFoundError where the CSV of captions is not there.
    """
    items = list(source.items()) if source.videos() else []
    clips: list[EvalClip] = []
    for item in items:
        if len(clips) == num_clips:
            break
        try:
            check_caption(item.caption)
            frames = read_item(item, geometry, whole)
        except ValueError as error:  # VideoError is one
            log.warning("%s is left out: %s", item.origin, error)
            continue
        points, visibility = build_tracker(tracker).track(frames, queries)
        number = int.from_bytes(hashlib.sha256(item.key.encode()).digest()[:6])
        tracks = identified(points, visibility, geometry.height, geometry.width, noise, number)
        clips.append(EvalClip(item.key, number, item.caption, frames, tracks))
        progress(1)
    if not clips:
        raise ValueError(
            f"bench.source={source.folder} holds no usable video ({len(items)} found); it needs some of at least "
            f"{geometry.num_frames} frames{'' if whole else f' at {geometry.fps} fps'}"
        )
    return clips


def identified(
    points: np.ndarray, visibility: np.ndarray, height: int, width: int, noise: KeyedNoise, sample_id: int
) -> Tracks:
    """Tracks of one clip under identities keyed by its sample id; lost positions are kept finite."""
    tracks = Tracks.from_arrays(np.nan_to_num(points), visibility, height, width)
    return tracks.with_ids(sample_track_ids(1, tracks.num_tracks, noise.generator("track_ids", sample_id)))


def stack_tracks(clips: Sequence[EvalClip]) -> Tracks:
    """The tracks of a batch of clips."""
    return Tracks.stack([clip.tracks for clip in clips])
