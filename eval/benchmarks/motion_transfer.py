"""Does the video follow the tracks it was given? Held-out clips, teacher and student, with and without
tracks.

Paper: MotionStream tables 1 and 2 (motion transfer: EPE, PSNR, SSIM, LPIPS against the source video). Each
clip's first frame, caption and ground-truth tracks go in; the generated video is judged by `eval.judge`. What
a figure means is bounded on both sides: `noise_floor` is the tracker's own error on the ground truth,
`noise_floor_vae` that after a VAE round trip (no model of these latents can do better), `still` the error if
nothing moved. `<role>_withheld` is the same run with the tracks dropped, `<role>.epe_gain_from_tracks_px` the
paired difference. Leaves out FVD and FID: they need thousands of clips.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from data.sources import FolderSource
from data.sprites import SpritesConfig
from data.trackers import TrackerConfig
from data.video import draw_tracks_on
from eval.benchmarks.context import EvalContext, Outcome, progress_bar
from eval.clips import EvalClip, folder_clips, sprites_clips
from eval.judge import Judge, Verdict, check_workers, still_error
from eval.metrics.lpips import load_lpips
from eval.metrics.registration import RegistrationConfig
from eval.metrics.sprites_network import SpritesNetwork, event_accuracy
from eval.report import Figure, Section, contact_sheet, enlarge, line_figure, video_side_by_side
from eval.results import Results
from eval.roles import ROLES, SamplingConfig, generate
from models.diffusion.guidance import Guidance
from models.wan.dit import WanDiT
from stream.codecs import Codecs, to_pixels
from stream.track_source import query_grid

MAX_DRAWN_TRACKS = 24  # more hide the picture
NETWORK_BATCH = 16  # clips that the feature network sees at a time


@dataclass
class MotionTransferConfig(SamplingConfig):
    """What is generated, and how it is judged."""

    source: str = "sprites"  # sprites, or a folder of videos, captions as for `python -m data source=folder`
    captions: str | None = None  # folder: CSV with the columns file and caption, for videos without name.txt or .json
    split: str = "test"  # sprites: which seeds
    num_clips: int = 32  # clips judged; an interval needs at least 2
    batch_size: int = 8  # clips generated at a time
    roles: list[str] = field(default_factory=lambda: list(ROLES))  # teacher and/or student
    withhold_tracks: bool = True  # also generate without tracks
    world: SpritesConfig = field(
        default_factory=SpritesConfig
    )  # the sprites world; size and length come from model.clip
    tracker: TrackerConfig = field(default_factory=TrackerConfig)  # the first judge
    registration: RegistrationConfig = field(default_factory=RegistrationConfig)  # the second judge
    lpips_weights: str | None = None  # folder with the two LPIPS files; null: reported as unavailable
    features: str | None = None  # folder of the sprites feature network: text accuracy, lpips_sprites; null: without
    num_floor_clips: int = 32  # clips on which the tracker's own error is measured, at most num_clips
    num_workers: int | None = None  # processes that judge; null: one a core, at most 16; 0: this one
    num_shown: int = 4  # clips shown in the report

    def __post_init__(self) -> None:
        super().__post_init__()
        check_workers(self.num_workers)
        for name in ("num_clips", "batch_size", "num_floor_clips"):
            if vars(self)[name] < 1:
                raise ValueError(f"bench.{name}={vars(self)[name]} must be at least 1")
        if unknown := [role for role in self.roles if role not in ROLES]:
            raise ValueError(f"bench.roles={list(self.roles)} has {unknown[0]}; roles are {', '.join(ROLES)}")
        if self.source != "sprites" and not Path(self.source).is_dir():
            raise ValueError(f"bench.source={self.source} must be sprites, or a folder that exists, of videos")


class MotionTransfer:
    """The benchmark; see the module's docstring."""

    Config = MotionTransferConfig

    def __init__(self, cfg: MotionTransferConfig) -> None:
        self.cfg = cfg

    def run(self, context: EvalContext) -> Outcome:
        """Generate and judge every role, and write down what bounds the figures."""
        dits = {role: context.load(role) for role in self.cfg.roles}  # a wrong checkpoint shows at once
        clips = load_clips(self.cfg, context)
        lpips = load_lpips(self.cfg.lpips_weights)
        judge = Judge(clips, self.cfg.tracker, self.cfg.registration, lpips, self.cfg.num_workers)
        network = None if self.cfg.features is None else SpritesNetwork.from_folder(self.cfg.features)
        results = Results(seed=context.seed)
        results.put("num_clips", len(clips))
        results.put("latent_cell_px", context.codecs.cell_px)
        results.put("visible_ratio", float(still_error(clips).visible_ratio.mean()))
        verdicts = self._floors(context.codecs, judge, results)
        videos: dict[str, np.ndarray] = {}
        for role, dit in dits.items():
            self._judge_role(role, dit, context, judge, results, verdicts, videos)
        if network is not None:
            for name, frames in videos.items():
                results.add(f"{name}.text_accuracy", text_accuracy(network, clips, frames))
                results.add(f"{name}.lpips_sprites", perceptual_distances(network, clips, frames))
        if {"teacher", "student"} <= set(verdicts):
            results.add_difference(
                "student.epe_over_teacher_px", verdicts["student"].epe_px, verdicts["teacher"].epe_px
            )
        return Outcome(results, self._sections(context, clips, results, verdicts, videos))

    def _floors(self, codecs: Codecs, judge: Judge, results: Results) -> dict[str, Verdict]:
        """The tracker on the ground truth and on its VAE round trip, and a video that stands still."""
        results.add("still.epe_px", still_error(judge.clips).per_video_px.tolist())
        judge = judge.first(self.cfg.num_floor_clips)
        with progress_bar(2 * len(judge.clips), "noise floors") as bar:
            floors = {
                "noise_floor": judge.judge([clip.frames for clip in judge.clips], bar.update),
                "noise_floor_vae": judge.judge(round_trip(codecs, judge.clips), bar.update),
            }
        for name, verdict in floors.items():
            verdict.add_to(results, name, likeness=name != "noise_floor")
        return floors

    def _judge_role(
        self,
        role: str,
        dit: WanDiT,
        context: EvalContext,
        judge: Judge,
        results: Results,
        verdicts: dict[str, Verdict],
        videos: dict[str, np.ndarray],
    ) -> None:
        cfg = self.cfg
        for with_tracks in (True, False) if cfg.withhold_tracks else (True,):
            name = role if with_tracks else f"{role}_withheld"
            with progress_bar(2 * len(judge.clips), name.replace("_", ", tracks ")) as bar:
                found = generate(
                    role,
                    dit,
                    context.codecs,
                    judge.clips,
                    cfg,
                    with_tracks=with_tracks,
                    noise=context.noise,
                    batch_size=cfg.batch_size,
                    progress=bar.update,
                )
                verdicts[name] = judge.judge(list(found.frames), bar.update)
            videos[name] = found.frames
            verdicts[name].add_to(results, name)
            if with_tracks:
                results.put(f"{role}.frames_per_second", found.frames_per_second)
        if cfg.withhold_tracks:
            results.add(f"{role}.epe_without_tracks_px", verdicts[f"{role}_withheld"].epe_px)
            results.add_difference(
                f"{role}.epe_gain_from_tracks_px", verdicts[f"{role}_withheld"].epe_px, verdicts[role].epe_px
            )

    def _sections(
        self,
        context: EvalContext,
        clips: list[EvalClip],
        results: Results,
        verdicts: Mapping[str, Verdict],
        videos: Mapping[str, np.ndarray],
    ) -> list[Section]:
        guidance = Guidance(context.model_cfg.guidance).describe()
        text = (
            f"{len(clips)} clips from {self.cfg.source}; teacher: {self.cfg.num_inference_steps} steps, "
            f"{guidance}. EPE: query frame 0, points visible in the ground truth, frame 0 excluded, mean "
            f"over points, then over clips. Tracker: {self.cfg.tracker.name}."
        )
        shown = {
            f"{clip.key}: {clip.caption}": draw_clip(clip, {name: frames[i] for name, frames in videos.items()})
            for i, clip in enumerate(clips[: self.cfg.num_shown])
        }
        fps = context.model_cfg.clip.fps
        return [
            Section("Motion transfer", "\n".join([text, *results.notes()]), results.by_role()),
            Section("Further figures", table=results.others()),
            Section("Error over time", figures=[error_over_time(verdicts)]),
            Section(
                "Clips",
                "The tracks that were asked for are drawn over every video.",
                figures=[contact_sheet(rows, caption=caption) for caption, rows in list(shown.items())[:1]],
                videos=[video_side_by_side(rows, fps, caption) for caption, rows in shown.items()],
            ),
        ]


def load_clips(cfg: MotionTransferConfig, context: EvalContext) -> list[EvalClip]:
    """The clips that a configuration names, at the model's clip size."""
    geometry = context.model_cfg.clip
    queries = query_grid(context.model_cfg, cfg.tracker)
    if cfg.source == "sprites":
        return sprites_clips(
            cfg.world,
            geometry,
            num_clips=cfg.num_clips,
            split=cfg.split,
            queries=queries,
            noise=context.noise,
        )
    return folder_clips(
        FolderSource(FolderSource.Config(cfg.source, cfg.captions)),
        geometry,
        num_clips=cfg.num_clips,
        tracker=cfg.tracker,
        queries=queries,
        noise=context.noise,
    )


def text_accuracy(network: SpritesNetwork, clips: Sequence[EvalClip], frames: np.ndarray) -> list[float]:
    """Per clip whether it ends with the colour that only its caption tells; nan where the caption tells none."""
    found: list[float] = []
    for start in range(0, len(clips), NETWORK_BATCH):
        part = slice(start, start + NETWORK_BATCH)
        with torch.no_grad():
            logits = network(to_pixels(frames[part]))["end_colors"]
        found += event_accuracy(logits, [clip.caption for clip in clips[part]])
    return found


def perceptual_distances(network: SpritesNetwork, clips: Sequence[EvalClip], frames: np.ndarray) -> list[float]:
    """Per clip the distance from the ground truth in the features of the sprites network."""
    pairs = ((to_pixels(video[None]), to_pixels(clip.frames[None])) for video, clip in zip(frames, clips, strict=True))
    return [float(network.perceptual_distance(*pair)) for pair in pairs]


def round_trip(codecs: Codecs, clips: Sequence[EvalClip]) -> list[np.ndarray]:
    """The ground truth after VAE encoding and decoding: uint8 [T, H, W, 3] each."""
    return [codecs.decode(codecs.vae.encode(to_pixels(clip.frames[None], codecs.device)))[0] for clip in clips]


def error_over_time(verdicts: Mapping[str, Verdict]) -> Figure:
    """End-point error of each frame, averaged over clips."""
    lines = {}
    for name, verdict in verdicts.items():
        per_frame = verdict.endpoint.per_frame_px.nanmean(0)
        lines[name.replace("_", " ")] = (list(range(len(per_frame))), per_frame.tolist())
    return line_figure(
        lines,
        x_label="frame",
        y_label="end-point error (px)",
        caption="Mean over clips of the error at each frame.",
    )


def draw_clip(clip: EvalClip, videos: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Ground truth and generated videos by name, enlarged, the asked-for tracks drawn over each."""
    points, visibility = clip.tracks.points[0].numpy(), clip.tracks.visibility[0].numpy()
    travel = np.linalg.norm(np.diff(points, axis=0), axis=-1).sum(0)
    moving = np.flatnonzero(travel >= np.median(travel))
    drawn = moving[np.linspace(0, len(moving) - 1, min(MAX_DRAWN_TRACKS, len(moving))).round().astype(int)]
    rows = {}
    for name, frames in {"ground truth": clip.frames, **videos}.items():
        large, factor = enlarge(frames)
        rows[name.replace("_", ", tracks ")] = draw_tracks_on(large, points[:, drawn] * factor, visibility[:, drawn])
    return rows
