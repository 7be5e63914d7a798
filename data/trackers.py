"""Point trackers behind one interface: exact (sprites), Lucas-Kanade, CoTracker3.

Coordinates are those of `models.motion.tracks`: pixel column i covers x in [i, i + 1). OpenCV and CoTracker
put the centre of the first pixel at 0, so their adapters shift by half a pixel.
CoTracker3 (CC-BY-NC 4.0) is not on PyPI; it comes from torch.hub or an installed `cotracker` package.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, fields, replace
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from data.lucas_kanade import LucasKanadeConfig, LucasKanadeTracker
from data.sprites import Scene
from models.device import pick_device

log = logging.getLogger(__name__)

TRACKERS = ("exact", "lucas_kanade", "cotracker3")
MODES = ("offline", "online")  # of cotracker3
COTRACKER_HELP = (
    "let torch.hub fetch code and weights with tracker.allow_download=true and tracker.checkpoint=null, or set "
    "tracker.checkpoint to a weights file and install the code with "
    "`pip install git+https://github.com/facebookresearch/co-tracker` (its licence is CC-BY-NC 4.0)"
)


class Tracker(Protocol):
    def track(self, frames: np.ndarray, queries: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """frames uint8 [T, H, W, 3], queries [N, 2] (x, y) px on frame 0.

        -> points float32 [T, N, 2] px, visibility bool [T, N].
        """
        ...


@dataclass
class TrackerConfig(LucasKanadeConfig):
    """Which tracker, on which queries, and the settings of each. Raises ValueError, naming the field."""

    name: str = "lucas_kanade"  # exact (sprites only) | lucas_kanade | cotracker3
    rows: int = 50  # query grid on frame 0
    cols: int = 50
    mode: str = "offline"  # cotracker3: offline (whole clip, more accurate) | online (windows of 16 frames)
    checkpoint: str | None = None  # cotracker3: weights file for an installed `cotracker`
    allow_download: bool = False  # cotracker3: may torch.hub fetch code and weights
    device: str = "cpu"  # cotracker3: cpu | cuda | auto (workers share the devices) | cuda:1 and so on

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.name not in TRACKERS:
            raise ValueError(f"tracker.name={self.name!r} must be one of {TRACKERS}")
        if self.rows < 1 or self.cols < 1:
            raise ValueError(f"tracker.rows={self.rows} and tracker.cols={self.cols} must be >= 1")
        if self.mode not in MODES:
            raise ValueError(f"tracker.mode={self.mode!r} must be one of {MODES}")

    def decisive(self) -> dict[str, Any]:
        """The settings that its tracks depend on: not those of other trackers, nor where it runs."""
        own = {"lucas_kanade": [f.name for f in fields(LucasKanadeConfig)], "cotracker3": ["mode", "checkpoint"]}
        return {name: vars(self)[name] for name in ("name", "rows", "cols", *own.get(self.name, ()))}


def require_available(cfg: TrackerConfig, has_scene: bool) -> None:
    """Refuse a tracker that cannot work here, before it is needed; has_scene: whether the clips are of sprites.

    Raises ValueError for `exact` without a scene and for a device that is not there, ImportError where CoTracker3 has
    neither weights nor leave to fetch them or its package is absent, FileNotFoundError where its weights are.
    """
    if cfg.name == "exact" and not has_scene:
        raise ValueError("tracker.name=exact needs sprites clips; use lucas_kanade or cotracker3 for real video")
    if cfg.name != "cotracker3":
        return
    pick_device(cfg.device, "tracker.device")
    if cfg.checkpoint is None:
        if not cfg.allow_download:  # the predictors of the package would come with random weights
            raise ImportError(
                "tracker.name=cotracker3 has no weights: tracker.checkpoint=null and tracker.allow_download=false; "
                f"{COTRACKER_HELP}"
            )
    elif find_spec("cotracker") is None:
        raise ImportError(f"tracker.checkpoint={cfg.checkpoint} needs the package `cotracker`; {COTRACKER_HELP}")
    elif not Path(cfg.checkpoint).is_file():
        raise FileNotFoundError(f"tracker.checkpoint={cfg.checkpoint}: no such file; {COTRACKER_HELP}")


def build_tracker(cfg: TrackerConfig | str, scene: Scene | None = None) -> Tracker:
    """The tracker of a config, or of a name with default settings.

    `exact` needs the scene of the clip, simulated again from the seed stored beside the video. CoTracker3 is loaded
    once per process and kept. Raises what `require_available` does.
    """
    cfg = TrackerConfig(name=cfg) if isinstance(cfg, str) else cfg
    require_available(cfg, scene is not None)
    if cfg.name == "lucas_kanade":
        return LucasKanadeTracker(cfg)
    if cfg.name == "cotracker3":
        return _kept_cotracker3(cfg.mode, cfg.checkpoint, str(pick_device(cfg.device, "tracker.device")))
    assert scene is not None, "require_available refuses exact without a scene"
    return ExactTracker(scene)


def on_own_device(cfg: TrackerConfig, worker: int) -> TrackerConfig:
    """The config with one GPU for worker n of a pool in place of "cuda" or "auto", which would be the first for all."""
    import torch

    if cfg.device not in ("cuda", "auto") or not torch.cuda.is_available():
        return cfg
    return replace(cfg, device=f"cuda:{worker % torch.cuda.device_count()}")


@lru_cache(maxsize=1)  # at most one model in device memory
def _kept_cotracker3(mode: str, checkpoint: str | None, device: str) -> CoTracker3:
    return CoTracker3(mode, checkpoint, device)


def grid_queries(height: int, width: int, rows: int, cols: int) -> np.ndarray:
    """Cell centres of a rows x cols grid over the frame: [rows * cols, 2] (x, y) px, row by row."""
    x = (np.arange(cols) + 0.5) * width / cols
    y = (np.arange(rows) + 0.5) * height / rows
    return np.stack(np.meshgrid(x, y), axis=-1).reshape(-1, 2).astype(np.float32)


class ExactTracker:
    """Reads the motion off the scene; the frames only have to be as many as the scene's."""

    def __init__(self, scene: Scene) -> None:
        self.scene = scene

    def track(self, frames: np.ndarray, queries: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        cfg = self.scene.cfg
        if frames.shape[:3] != (cfg.num_frames, cfg.height, cfg.width):
            raise ValueError(
                f"frames {frames.shape[:3]} must be {(cfg.num_frames, cfg.height, cfg.width)} (T, H, W), the scene's"
            )
        at_start = np.concatenate([np.zeros((len(queries), 1)), queries], axis=1)
        return self.scene.track(at_start)


class CoTracker3:
    """Adapter for facebookresearch/co-tracker, offline (window 60, both directions) or online (window 16,
    step 8).

    The predictors take [B, T, 3, H, W] float 0..255 and queries (frame, x, y) in input pixels, and return
    visibility that is already boolean (offline score > 0.9, online visibility * confidence > 0.6).
    Without a checkpoint torch.hub fetches code and weights.
    """

    def __init__(self, mode: str = "offline", checkpoint: str | None = None, device: str = "cpu") -> None:
        self.mode, self.device = mode, device
        self.model = (self._from_hub() if checkpoint is None else self._installed(checkpoint)).to(device)

    def _from_hub(self) -> Any:
        import fcntl

        import torch

        hub = Path(torch.hub.get_dir())
        hub.mkdir(parents=True, exist_ok=True)
        with (hub / "cotracker.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # torch.hub does not reckon with other processes that download the same
            return torch.hub.load("facebookresearch/co-tracker", f"cotracker3_{self.mode}")

    def _installed(self, checkpoint: str) -> Any:
        from cotracker.predictor import CoTrackerOnlinePredictor, CoTrackerPredictor

        if self.mode == "online":
            return CoTrackerOnlinePredictor(checkpoint=checkpoint)
        return CoTrackerPredictor(checkpoint=checkpoint)

    def track(self, frames: np.ndarray, queries: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        import torch

        video = torch.from_numpy(np.ascontiguousarray(frames)).permute(0, 3, 1, 2)[None].float().to(self.device)
        at_start = np.concatenate([np.zeros((len(queries), 1)), queries - 0.5], axis=1)
        query = torch.from_numpy(at_start).float()[None].to(self.device)
        with torch.no_grad():
            points, visibility = (
                self._online(video, query) if self.mode == "online" else self.model(video, queries=query)
            )
        points, visibility = points[0, : len(frames)].float() + 0.5, visibility[0, : len(frames)]
        return points.cpu().numpy(), visibility.reshape(points.shape[:2]).bool().cpu().numpy()

    def _online(self, video: Any, query: Any) -> tuple[Any, Any]:
        """First call only sets the queries; then windows of 2 * step that overlap by step."""
        step, num_frames = self.model.step, video.shape[1]
        self.model(video_chunk=video, is_first_step=True, queries=query)
        points, visibility = None, None
        for start in range(0, max(1, num_frames - step), step):
            window = video[:, start : start + 2 * step]
            points, visibility = self.model(video_chunk=window)
        return points, visibility
