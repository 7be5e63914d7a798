"""Judges generated videos against the clips they were asked to be: motion by two judges, likeness by three
metrics.

First judge: a point tracker from the grid in frame 0, and the end-point error; also over the points that were
never hidden, since a tracker without memory loses the others for good, in any video. Second judge, sprites
only: each sprite found by its appearance. Likeness: PSNR, SSIM and, where weights are given, LPIPS against
the ground truth.
"""

from __future__ import annotations

import pickle
import signal
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from copy import copy
from dataclasses import dataclass
from functools import partial
from itertools import islice
from multiprocessing import get_context
from typing import Any, TypeVar

import cv2
import numpy as np
import torch
from torch import Tensor

from data.trackers import TrackerConfig, build_tracker
from eval.clips import EvalClip
from eval.metrics.epe import EndpointError, endpoint_error
from eval.metrics.image import frame_psnr, frame_ssim
from eval.metrics.lpips import Lpips
from eval.metrics.registration import Registration, RegistrationConfig, register_sprites
from eval.results import Results
from models.device import usable_cores

T = TypeVar("T")
MAX_WORKERS = 16  # a quarter of a minute and a gigabyte of memory each to start


@dataclass(frozen=True)
class Verdict:
    """What was found in one set of videos, clip by clip."""

    endpoint: EndpointError
    unoccluded: EndpointError  # over points that the ground truth shows in every frame so far
    psnr_db: list[float]
    ssim: list[float]
    lpips: list[float] | str  # the text says how to get the weights
    registration: list[Registration] | None  # None where the clips have no masks

    @property
    def epe_px(self) -> list[float]:
        return self.endpoint.per_video_px.tolist()

    def add_to(self, results: Results, prefix: str, *, likeness: bool = True) -> None:
        """Every figure of this verdict as `prefix.metric_unit`; likeness is left out for the truth itself."""
        results.add(f"{prefix}.epe_px", self.epe_px)
        results.add(f"{prefix}.epe_unoccluded_px", self.unoccluded.per_video_px.tolist())
        results.add(f"{prefix}.epe_median_px", self.endpoint.median_px.tolist())
        for px, ratios in self.endpoint.pck.items():
            results.add(f"{prefix}.pck_{px}px_ratio", ratios.tolist())
        if likeness:
            self._add_likeness(results, prefix)
        if self.registration is not None:
            for name in ("position_px", "angle_deg", "correlation", "lost_ratio"):
                results.add(f"{prefix}.registration_{name}", [vars(found)[name] for found in self.registration])

    def _add_likeness(self, results: Results, prefix: str) -> None:
        results.add(f"{prefix}.psnr_db", self.psnr_db)
        results.add(f"{prefix}.ssim", self.ssim)
        if isinstance(self.lpips, str):
            results.put(f"{prefix}.lpips", self.lpips)
        else:
            results.add(f"{prefix}.lpips", self.lpips)


@dataclass(frozen=True)
class ClipVerdict:
    """What was found in one video."""

    points: Tensor  # [T, N, 2] px, where the tracker sees the query points go
    psnr_db: float
    ssim: float
    registration: Registration | None


def check_tracker(cfg: TrackerConfig) -> None:
    """Raises ValueError for a tracker that reads the scene: by it no video would have an error."""
    if cfg.name == "exact":
        raise ValueError(
            "bench.tracker.name=exact reads the scene, not the video, and finds no error in any; use lucas_kanade or "
            "cotracker3"
        )


def check_workers(num_workers: int | None) -> None:
    """Raises ValueError for a number of judging processes that cannot be."""
    if num_workers is not None and num_workers < 0:
        raise ValueError(
            f"bench.num_workers={num_workers} must be at least 0; 0 judges in this process, null on every core"
        )


def judge_clip(
    clip: EvalClip, frames: np.ndarray, tracker: TrackerConfig, registration: RegistrationConfig
) -> ClipVerdict:
    """Both judges of motion and the likeness without weights, for frames uint8 [T, H, W, 3]."""
    points, _ = build_tracker(tracker).track(frames, clip.queries)
    ours, truth = torch.from_numpy(frames), torch.from_numpy(clip.frames)
    found = None
    if clip.rendered is not None:
        found = register_sprites(frames, clip.frames, clip.rendered.masks, registration)
    return ClipVerdict(
        torch.from_numpy(np.asarray(points, dtype=np.float32)),
        float(frame_psnr(ours, truth).mean()),
        float(frame_ssim(ours, truth).mean()),
        found,
    )


def workers_for(num_workers: int | None, num_clips: int, tracker: TrackerConfig) -> int:
    """How many processes share the judging of some clips; 0: this one does it.

    num_workers None: one a core, at most MAX_WORKERS and one a clip; CoTracker3 uses all cores, or the GPU, by itself.
    """
    if num_workers is not None:
        return num_workers
    cores = min(usable_cores(), MAX_WORKERS, num_clips)
    return cores if cores > 1 and tracker.name == "lucas_kanade" else 0


class _WorkerPool(ProcessPoolExecutor):
    """What goes to a worker is pickled by the caller, to plain bytes.

    The executor's own thread would copy tensors to shared memory, with threads of OpenMP beside those of the caller.
    More of them than cores, and OpenMP lets all sleep between operations for as long as the process lives: the
    generation that goes on, and whose time is a figure, then takes a third to a half longer (sprites, two cores).
    """

    def submit(self, fn: Callable[..., T], /, *args: Any, **kwargs: Any) -> Future[T]:
        return super().submit(_call, pickle.dumps(partial(fn, *args, **kwargs)))


def _call(pickled: bytes) -> Any:
    return pickle.loads(pickled)()


def worker_pool(num_workers: int) -> ProcessPoolExecutor | None:
    """So many processes; None for 0."""
    return _WorkerPool(num_workers, get_context("spawn"), _one_thread) if num_workers else None


def _one_thread() -> None:
    """A worker is one of several that share the cores; Ctrl-C ends it without a traceback."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    torch.set_num_threads(1)
    cv2.setNumThreads(1)


class Judge:
    """Judges videos of a fixed list of clips; ``num_workers`` processes share them (`workers_for`)."""

    def __init__(
        self,
        clips: Sequence[EvalClip],
        tracker: TrackerConfig,
        registration: RegistrationConfig,
        lpips: Lpips | str,
        num_workers: int | None = 0,
    ) -> None:
        check_tracker(tracker)
        self.clips = clips
        self.tracker = tracker
        self.registration = registration
        self.lpips = lpips
        self.num_workers = workers_for(num_workers, len(clips), tracker)
        self.pool = worker_pool(self.num_workers)

    def first(self, count: int) -> Judge:
        """The same judge, for the first ``count`` clips."""
        fewer = copy(self)
        fewer.clips = self.clips[:count]
        return fewer

    def judge(self, videos: Iterable[np.ndarray], progress: Callable[[int], None] | None = None) -> Verdict:
        """videos: one uint8 [T, H, W, 3] per clip, in the clips' order, taken a few at a time, so that they need not
        exist at once; progress is called once per clip.
        """
        found, lpips = [], []
        for clip, frames, verdict in self._verdicts(videos):
            found.append(verdict)
            if isinstance(self.lpips, Lpips):
                ours, truth = torch.from_numpy(frames), torch.from_numpy(clip.frames)
                lpips.append(float(self.lpips.frame_distances(ours, truth).mean()))
            if progress is not None:
                progress(1)
        points = torch.cat([clip.tracks.points for clip in self.clips])
        visibility = torch.cat([clip.tracks.visibility for clip in self.clips])
        predicted = torch.stack([verdict.points for verdict in found])
        registration = [verdict.registration for verdict in found if verdict.registration is not None]
        return Verdict(
            endpoint_error(predicted, points, visibility),
            endpoint_error(predicted, points, visibility.cumprod(dim=1).bool()),
            [verdict.psnr_db for verdict in found],
            [verdict.ssim for verdict in found],
            lpips if isinstance(self.lpips, Lpips) else self.lpips,
            registration if len(registration) == len(self.clips) else None,
        )

    def _verdicts(self, videos: Iterable[np.ndarray]) -> Iterator[tuple[EvalClip, np.ndarray, ClipVerdict]]:
        run = partial(judge_clip, tracker=self.tracker, registration=self.registration)
        pairs = zip(self.clips, videos, strict=True)
        while pair := list(islice(pairs, self.num_workers or 1)):
            clips, frames = zip(*pair)
            verdicts = (map if self.pool is None else self.pool.map)(run, clips, frames)
            yield from zip(clips, frames, verdicts, strict=True)


def still_error(clips: Sequence[EvalClip]) -> EndpointError:
    """The error of a video in which nothing moves: the scale that the others are read against."""
    points = torch.cat([clip.tracks.points for clip in clips])
    visibility = torch.cat([clip.tracks.visibility for clip in clips])
    return endpoint_error(points[:, :1].expand_as(points), points, visibility)
