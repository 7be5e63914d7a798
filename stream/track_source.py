"""What a command line names, as a first frame and tracks at the model's size: pictures, track files, other
videos.

A track file (.npz or .json) must be at the model's clip size; another size is refused before anything is
built, unless resizing is asked for. A video as the source of tracks means motion transfer: its points are
followed from a grid in its first frame. Leaves out drags: those come through a running session.
"""

from __future__ import annotations

import logging
import math
import re
from pathlib import Path

import numpy as np

from data.trackers import TrackerConfig, build_tracker, grid_queries
from data.video import VideoError, probe_video, read_video, resize_frame
from models.assemble import ModelConfig
from models.condition import FRAMES_PER_LATENT, ClipGeometry, num_pixel_frames
from models.motion.tracks import Tracks

log = logging.getLogger(__name__)

PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
TRACK_FILES = (".npz", ".json")
JPEG_START, JPEG_END = b"\xff\xd8", b"\xff\xd9"
JPEG_MARKER = re.compile(rb"\xff[^\x00\x01\xd0-\xd8\xff]")  # but those without a length


def query_grid(model_cfg: ModelConfig, tracker: TrackerConfig) -> np.ndarray:  # -> [N, 2] px
    """Points to follow from frame 0: one per latent cell, at most tracker.rows x tracker.cols."""
    rows, cols = model_cfg.latent_size
    return grid_queries(model_cfg.clip.height, model_cfg.clip.width, min(tracker.rows, rows), min(tracker.cols, cols))


def load_first_frame(path: str | Path, clip: ClipGeometry) -> np.ndarray:  # -> uint8 [H, W, 3]
    """A picture, or the first frame of a video, cropped about its centre and resized to the clip's size.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not a picture and not a video, or a JPEG that is cut off.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"image={path}: no such file; give a picture ({', '.join(PICTURES)}) or a video")
    if path.suffix.lower() not in PICTURES:
        try:
            return read_video(path, ClipGeometry(clip.height, clip.width, 1, clip.fps))[0]
        except VideoError as error:
            raise ValueError(
                f"image={path} is neither a picture ({', '.join(PICTURES)}) nor a video: {error}"
            ) from error
    picture = _read_picture(path)
    if picture.shape[:2] != (clip.height, clip.width):
        log.info(
            "%s: %dx%d is cropped and resized to %dx%d",
            path.name,
            *picture.shape[:2],
            clip.height,
            clip.width,
        )
    return resize_frame(picture, clip.height, clip.width)


def _read_picture(path: Path) -> np.ndarray:  # -> uint8 [H, W, 3]
    import cv2

    if _is_cut_off(path.read_bytes()):
        raise ValueError(f"image={path} is cut off, and the rest would be grey; give the whole file, or save it anew")
    try:
        picture = cv2.imread(str(path), cv2.IMREAD_COLOR)
    except cv2.error as error:  # more pixels than OpenCV takes
        raise ValueError(f"image={path} cannot be decoded as a picture ({error.err}); make it smaller") from error
    if picture is None:
        raise ValueError(f"image={path} cannot be decoded as a picture; convert it to PNG")
    return cv2.cvtColor(picture, cv2.COLOR_BGR2RGB)


def _is_cut_off(content: bytes) -> bool:
    """Whether a JPEG has no end, which decoders do not tell; of other formats they do (ITU-T T.81, B.1)."""
    if not content.startswith(JPEG_START):
        return False
    position = len(JPEG_START)
    while found := JPEG_MARKER.search(content, position):  # of the next segment, behind the scan if there was one
        if found[0] == JPEG_END:
            return False
        position = found.end() + int.from_bytes(content[found.end() : found.end() + 2], "big")
    return True


def load_track_source(
    path: str | Path, model_cfg: ModelConfig, tracker: TrackerConfig, *, resize: bool = False, wanted: int | None = None
) -> Tracks:
    """Tracks (B = 1, identities not drawn) from a track file or by following the points of a video.

    wanted: frames of a video to follow, rounded up to whole latents; None: all that it has.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a picture, a track file without frames or of another resolution without `resize`, or a file that
            cannot be read.
    """
    path, clip = Path(path), model_cfg.clip
    if not path.is_file():
        raise FileNotFoundError(
            f"tracks={path}: no such file; give {' or '.join(TRACK_FILES)}, or a video to take the motion from"
        )
    if path.suffix.lower() in PICTURES:
        raise ValueError(
            f"tracks={path} is a picture, in which nothing moves; give {' or '.join(TRACK_FILES)}, or a video"
        )
    if path.suffix.lower() not in TRACK_FILES:
        try:
            return _follow(path, model_cfg, tracker, wanted)
        except VideoError as error:
            raise ValueError(f"tracks={path} is neither {' nor '.join(TRACK_FILES)} nor a video: {error}") from error
    tracks = Tracks.load(path)
    if not tracks.num_frames:
        raise ValueError(f"tracks={path} has no frame; leave tracks out to have the motion unspecified")
    if (tracks.height, tracks.width) == (clip.height, clip.width):
        return tracks
    if not resize:
        raise ValueError(
            f"tracks={path} is at {tracks.height}x{tracks.width} px, the model needs "
            f"{clip.height}x{clip.width} (model.clip); add tracks_resize=true to crop and scale it as the picture is"
        )
    return tracks.resize_to(clip.height, clip.width)


def _follow(path: Path, model_cfg: ModelConfig, tracker: TrackerConfig, wanted: int | None) -> Tracks:
    """Motion transfer: the points of a video at the clip's rate and size, of the first ``wanted`` frames or all."""
    clip, info = model_cfg.clip, probe_video(path)
    seconds = (info.num_frames - 1) / info.fps
    num_latents = 1 + int(seconds * clip.fps + 1e-6) // FRAMES_PER_LATENT
    if wanted is not None:
        num_latents = min(num_latents, 1 + math.ceil((wanted - 1) / FRAMES_PER_LATENT))
    geometry = ClipGeometry(clip.height, clip.width, num_pixel_frames(num_latents), clip.fps)
    points, visibility = build_tracker(tracker).track(read_video(path, geometry), query_grid(model_cfg, tracker))
    return Tracks.from_arrays(np.nan_to_num(points), visibility, clip.height, clip.width)
