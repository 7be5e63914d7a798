"""Does a long stream keep following its tracks, and does it keep its looks? Error and drift over time.

Paper: MotionStream table 4 and figure 6 (EPE and LPIPS of long streams, drift with and without a sink). Sprites
clips are rendered at the full length and streamed by the student from their first frame. Two ways to give
tracks: one grid at frame 0 for the whole video (`requery_frames=0`, the paper's), or a fresh grid with new
identities every so many frames, so that there is something to follow after the first points have left. Errors
are measured from each grid's own frame; the registration judge gives the absolute position, likeness to the
ground truth (PSNR, LPIPS) all that has gone astray. Drift is the change of colour saturation and of the
latents' mean and spread between the first and the last 15 %; the ground truth's own is given beside it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import torch
from torch import Tensor

from data.sprites import SpritesConfig
from data.trackers import TrackerConfig, build_tracker, require_available
from eval.benchmarks.context import EvalContext, Outcome, progress_bar
from eval.benchmarks.motion_transfer import draw_clip
from eval.clips import EvalClip, sprites_clips
from eval.judge import check_tracker, check_workers, worker_pool, workers_for
from eval.metrics.drift import drift, frame_saturation, latent_moments, window_means
from eval.metrics.epe import endpoint_error
from eval.metrics.image import frame_psnr
from eval.metrics.lpips import load_lpips
from eval.metrics.registration import RegistrationConfig, register_sprites
from eval.metrics.sprites_network import SpritesNetwork, check_frame_size
from eval.report import Figure, Section, line_figure, video_side_by_side
from eval.results import Results
from models.condition import FRAMES_PER_LATENT, ClipGeometry, num_pixel_frames
from models.motion.tracks import NUM_TRACK_IDS, Tracks, sample_track_ids
from models.wan.dit import WanDiT
from stream.session import StreamSession
from stream.track_source import query_grid


@dataclass
class LongVideoConfig:
    """How long, how many, and how they are judged."""

    num_frames: int = 241  # frames streamed; any length
    num_clips: int = 4
    num_floor_clips: int = 4  # clips on which the tracker's own error is measured, at most num_clips
    num_workers: int | None = None  # processes that judge; null: one a core, at most 16; 0: this one
    split: str = "test"  # which seeds of the sprites world
    requery_frames: int = 48  # a fresh grid of tracks every so many frames; 0: one grid at frame 0
    window_frames: int = 48  # span of one figure over time
    frame_stride: int = 1  # the tracker sees every n-th frame
    world: SpritesConfig = field(default_factory=SpritesConfig)  # the sprites world; frame size comes from model.clip
    tracker: TrackerConfig = field(default_factory=TrackerConfig)
    registration: RegistrationConfig = field(default_factory=RegistrationConfig)
    lpips_weights: str | None = None  # folder with the two LPIPS files; null: reported as unavailable
    features: str | None = None  # folder of the sprites feature network: lpips_sprites; null: without
    num_shown: int = 2  # clips shown in the report

    def __post_init__(self) -> None:
        check_tracker(self.tracker)
        check_workers(self.num_workers)
        if self.num_frames < 2:
            raise ValueError(f"bench.num_frames={self.num_frames} must be at least 2")
        for name in ("num_clips", "num_floor_clips", "window_frames", "frame_stride"):
            if vars(self)[name] < 1:
                raise ValueError(f"bench.{name}={vars(self)[name]} must be at least 1")
        if self.requery_frames < 0 or self.requery_frames == 1:
            raise ValueError(f"bench.requery_frames={self.requery_frames} must be 0 (one grid) or at least 2")
        if self.frame_stride >= (shortest := min(span.stop - span.start for span in self.segments())):
            raise ValueError(
                f"bench.frame_stride={self.frame_stride} must be below {shortest}, the fewest frames that share a grid "
                "of tracks (bench.requery_frames, bench.num_frames)"
            )

    def segments(self) -> list[slice]:
        """The stretches of frames that share one grid of tracks; the last holds at least two frames."""
        step = self.requery_frames or self.num_frames
        starts = [start for start in range(0, self.num_frames, step) if self.num_frames - start >= 2]
        return [slice(a, b) for a, b in zip(starts, [*starts[1:], self.num_frames], strict=True)]


@dataclass(frozen=True)
class _Course:
    """One video over time; error is nan where nothing is visible, at the first frame of each segment and where the
    tracker does not look.
    """

    error_px: Tensor  # [T]
    saturation: Tensor  # [T]


def _course(cfg: LongVideoConfig, segments: list[Tracks], frames: np.ndarray) -> _Course:
    errors = torch.full((cfg.num_frames,), math.nan)
    for span, tracks in zip(cfg.segments(), segments, strict=True):
        seen = slice(None, None, cfg.frame_stride)
        found, _ = build_tracker(cfg.tracker).track(frames[span][seen], tracks.points[0, 0].numpy())
        predicted = torch.from_numpy(np.asarray(found, dtype=np.float32))[None]
        error = endpoint_error(predicted, tracks.points[:, seen], tracks.visibility[:, seen])
        errors[span][seen] = error.per_frame_px[0]
    return _Course(errors, frame_saturation(torch.from_numpy(frames[: cfg.num_frames])))


@dataclass(frozen=True)
class _Likeness:
    """How like the ground truth the frames of a stream are, by one measure."""

    metric: str
    unit: str  # ends the keys of its figures
    measure: Callable[[Tensor, Tensor], Tensor]  # uint8 [T, H, W, 3] twice -> [T - 1]: frame 0 is given

    def of(self, frames: np.ndarray, reference: np.ndarray) -> Tensor:  # [T], nan at frame 0
        judged = self.measure(torch.from_numpy(frames), torch.from_numpy(reference))
        return torch.cat([torch.tensor([math.nan]), judged])

    def figure(self, streams: list[Tensor]) -> Figure:
        """Their mean over time; streams: [T] each, as `of` gives them."""
        mean = torch.stack(streams)[:, 1:].mean(0).tolist()
        return line_figure(
            {"student": (list(range(1, 1 + len(mean))), mean)},
            x_label="frame",
            y_label=f"{self.metric}{self.unit}",
            caption="Likeness to the ground truth over time.",
        )


class LongVideo:
    """The benchmark; see the module's docstring."""

    Config = LongVideoConfig

    def __init__(self, cfg: LongVideoConfig) -> None:
        self.cfg = cfg

    def run(self, context: EvalContext) -> Outcome:
        """Stream every clip and follow error and drift over time."""
        require_available(self.cfg.tracker, has_scene=False)
        cfg, student, results = self.cfg, context.load("student"), Results(seed=context.seed)
        measures = self._measures(context.model_cfg.clip, results)
        clips = self._clips(context)
        results.clips = [clip.key for clip in clips]
        tracks = [[self._segment_tracks(context, clip, span) for span in cfg.segments()] for clip in clips]
        videos, moments = [], []
        with progress_bar(len(clips) * cfg.num_frames, "stream", "frame") as bar:
            for clip, segments in zip(clips, tracks, strict=True):
                frames, latents = self._stream(context, student, clip, segments, bar.update)
                videos.append(frames)
                moments.append(latent_moments(latents))
        floor = clips[: cfg.num_floor_clips]
        with progress_bar((1 + len(measures)) * len(clips) + len(floor), "judge") as bar:
            courses = {
                "student": self._courses(tracks, videos, bar.update),
                "noise_floor": self._courses(tracks[: len(floor)], [clip.frames for clip in floor], bar.update),
            }
            likeness = {one: self._likeness(one, clips, videos, bar.update) for one in measures}
        for name, found in courses.items():
            self._put_course(results, name, found)
        for one, found in likeness.items():
            self._put_over_time(results, f"student.{one.metric}", one.unit, found)
        self._put_registration(results, clips, videos)
        results.add("student.latent_mean_drift", [drift(mean) for mean, _ in moments])
        results.add("student.latent_std_drift", [drift(std) for _, std in moments])
        return Outcome(results, lambda: self._sections(context, results, clips, videos, courses, likeness, moments))

    def _measures(self, clip: ClipGeometry, results: Results) -> list[_Likeness]:
        """Of likeness; what is wrong with the weights of one shows before anything is streamed."""
        lpips = load_lpips(self.cfg.lpips_weights)
        measures = [_Likeness("psnr", "_db", frame_psnr)]
        if isinstance(lpips, str):
            results.put("student.lpips", lpips)
        else:
            measures.append(_Likeness("lpips", "", lpips.frame_distances))
        if self.cfg.features is not None:
            network = SpritesNetwork.from_folder(self.cfg.features)
            check_frame_size(clip.height, clip.width)
            measures.append(_Likeness("lpips_sprites", "", network.frame_distances))
        return measures

    def _clips(self, context: EvalContext) -> list[EvalClip]:
        clip = context.model_cfg.clip
        num_latents = 1 + math.ceil((self.cfg.num_frames - 1) / FRAMES_PER_LATENT)  # the last frames may go unused
        geometry = ClipGeometry(clip.height, clip.width, num_pixel_frames(num_latents), clip.fps)
        queries = query_grid(context.model_cfg, self.cfg.tracker)
        return sprites_clips(
            self.cfg.world,
            geometry,
            num_clips=self.cfg.num_clips,
            split=self.cfg.split,
            queries=queries,
            noise=context.noise,
        )

    def _segment_tracks(self, context: EvalContext, clip: EvalClip, span: slice) -> Tracks:
        """Exact tracks of a grid at the segment's first frame; identities differ between segments."""
        queries = np.column_stack([np.full(len(clip.queries), span.start), clip.queries])
        points, visibility = clip.sprites.scene.track(queries)
        tracks = Tracks.from_arrays(points[span], visibility[span], clip.tracks.height, clip.tracks.width)
        drawn = sample_track_ids(1, NUM_TRACK_IDS, context.noise.generator("track_ids", clip.sample_id))
        number = self.cfg.segments().index(span)
        return tracks.with_ids(drawn.roll(-number * tracks.num_tracks, dims=1)[:, : tracks.num_tracks])

    def _stream(
        self, context: EvalContext, student: WanDiT, clip: EvalClip, segments: list[Tracks], progress
    ) -> tuple[np.ndarray, Tensor]:
        session = StreamSession(
            student,
            context.codecs,
            first_frame=clip.frames[0],
            prompt=clip.caption,
            num_frames=self.cfg.num_frames,
            seed=context.seed,
            sample_id=clip.sample_id,
        )
        for tracks in segments:
            session.push_tracks(tracks)
        frames, latents = [], []
        for chunk in session:
            frames.append(chunk)
            latents.append(session.latents[0].float().cpu())
            progress(len(chunk))
        return np.concatenate(frames), torch.cat(latents, dim=1)

    def _courses(
        self, tracks: list[list[Tracks]], videos: list[np.ndarray], progress: Callable[[int], None]
    ) -> list[_Course]:
        follow, found = partial(_course, self.cfg), []
        workers = workers_for(self.cfg.num_workers, len(tracks), self.cfg.tracker)
        with worker_pool(workers) or nullcontext() as pool:
            for course in (map if pool is None else pool.map)(follow, tracks, videos):
                found.append(course)
                progress(1)
        return found

    def _likeness(
        self, measure: _Likeness, clips: list[EvalClip], videos: list[np.ndarray], progress: Callable[[int], None]
    ) -> list[Tensor]:
        found = []
        for clip, video in zip(clips, videos, strict=True):
            found.append(measure.of(video[: self.cfg.num_frames], clip.frames[: self.cfg.num_frames]))
            progress(1)
        return found

    def _put_course(self, results: Results, name: str, courses: list[_Course]) -> None:
        self._put_over_time(results, f"{name}.epe", "_px", [course.error_px for course in courses])
        results.add(f"{name}.saturation_drift", [drift(course.saturation) for course in courses])

    def _put_over_time(self, results: Results, key: str, unit: str, per_frame: list[Tensor]) -> None:
        """Means over each stream, and over its spans of window_frames; per_frame: [T] of each stream."""
        results.add(f"{key}{unit}", [float(values.nanmean()) for values in per_frame])
        windows = torch.stack([window_means(values, self.cfg.window_frames) for values in per_frame])
        for number, per_clip in enumerate(windows.T):
            end = min((number + 1) * self.cfg.window_frames, self.cfg.num_frames) - 1
            results.add(f"{key}_frames_{number * self.cfg.window_frames}_to_{end}{unit}", per_clip.tolist())

    def _put_registration(self, results: Results, clips: list[EvalClip], videos: list[np.ndarray]) -> None:
        """The second judge, on the first and on the last window."""
        last = slice(max(0, self.cfg.num_frames - self.cfg.window_frames), self.cfg.num_frames)
        for name, span in (("first", slice(0, self.cfg.window_frames)), ("last", last)):
            found = [
                register_sprites(
                    video[span],
                    clip.frames[: self.cfg.num_frames][span],
                    clip.sprites.masks[:, : self.cfg.num_frames][:, span],
                    self.cfg.registration,
                )
                for clip, video in zip(clips, videos, strict=True)
            ]
            for metric in ("position_px", "angle_deg", "lost_ratio"):
                results.add(f"student.registration_{metric}_{name}_window", [vars(one)[metric] for one in found])

    def _sections(
        self,
        context: EvalContext,
        results: Results,
        clips: list[EvalClip],
        videos: list[np.ndarray],
        courses: dict[str, list[_Course]],
        likeness: dict[_Likeness, list[Tensor]],
        moments: list[tuple[Tensor, Tensor]],
    ) -> list[Section]:
        cfg, rollout = self.cfg, context.model_cfg.rollout
        frames = list(range(cfg.num_frames))
        error = {}
        for name, found in courses.items():
            course = torch.stack([one.error_px for one in found]).nanmean(0)
            judged = course.isfinite()  # a line would break at the others
            error[name] = (judged.nonzero().flatten().tolist(), course[judged].tolist())
        colour = {
            name: (frames, torch.stack([one.saturation for one in found]).mean(0).tolist())
            for name, found in courses.items()
        }
        mean, std = (torch.stack(values).mean(0).tolist() for values in zip(*moments, strict=True))
        latent_frames = list(range(len(mean)))
        figures = [
            line_figure(error, x_label="frame", y_label="end-point error (px)", caption="Error over time."),
            *(one.figure(found) for one, found in likeness.items()),
            line_figure(colour, x_label="frame", y_label="saturation", caption="Colour saturation over time."),
            line_figure(
                {"mean": (latent_frames, mean), "std": (latent_frames, std)},
                x_label="latent frame",
                y_label="latent value",
                caption="Mean and spread of the student's latents over time.",
            ),
        ]
        shown = [
            video_side_by_side(
                draw_clip(clip, {"student": video}), context.model_cfg.clip.fps, f"{clip.key}: {clip.caption}"
            )
            for clip, video in zip(clips[: cfg.num_shown], videos, strict=False)
        ]
        text = (
            f"{len(clips)} clips of {cfg.num_frames} frames; a fresh grid of tracks every "
            f"{cfg.requery_frames} frames (0: only at frame 0); {rollout.sink_chunks} sink and "
            f"{rollout.window_chunks} window chunks."
        )
        return [
            Section("Long video", "\n".join([text, *results.notes()]), results.by_role()),
            Section("Further figures", table=results.others()),
            Section("Over time", figures=figures),
            Section("Clips", "The tracks of the grid in frame 0 are drawn over both videos.", videos=shown),
        ]
