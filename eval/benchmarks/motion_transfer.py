"""Does the video follow the tracks it was given? Held-out clips, teacher and student, with and without
tracks.

Paper: MotionStream tables 1 and 2 (motion transfer: EPE, PSNR, SSIM, LPIPS against the source video). Each
clip's first frame, caption and ground-truth tracks go in; the generated video is judged by `eval.judge`. What
a figure means is bounded on both sides: `noise_floor` is the tracker's own error on the ground truth,
`noise_floor_vae` that after a VAE round trip (no model of these latents can do better), `still` the error if
nothing moved. Of real video the ground truth is what the tracker finds, so that `noise_floor` would be 0 and is left
out. `<role>_withheld` is the same run with the tracks dropped, `<role>.epe_gain_from_tracks_px` the
paired difference. Leaves out FVD and FID: they need thousands of clips.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
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
from eval.metrics.sprites_network import SpritesNetwork, check_frame_size, event_accuracy
from eval.report import Figure, Section, contact_sheet, enlarge, line_figure, video_side_by_side
from eval.results import Results
from eval.roles import ROLES, Generated, SamplingConfig, generate
from models.diffusion.guidance import Guidance
from models.wan.dit import WanDiT
from models.wan.text_encoder import VocabularyEncoder
from stream.codecs import Codecs, to_pixels
from stream.track_source import query_grid

MAX_DRAWN_TRACKS = 24  # more hide the picture
SPRITES_LAYERS = 3  # of a tracker: background and two sprites


@dataclass
class MotionTransferConfig(SamplingConfig):
    """What is generated, and how it is judged."""

    source: str = "sprites"  # sprites, or a folder of videos, captions as for `python -m data source=folder`
    whole_video: bool = False  # folder: frames spread over all of a video, as the paper takes DAVIS; false: its start
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
        for name, least in (("num_clips", 1), ("batch_size", 1), ("num_floor_clips", 1), ("num_shown", 0)):
            if vars(self)[name] < least:
                raise ValueError(f"bench.{name}={vars(self)[name]} must be at least {least}")
        if not self.roles:
            raise ValueError(f"bench.roles=[] judges nothing; roles are {', '.join(ROLES)}")
        if unknown := [role for role in self.roles if role not in ROLES]:
            raise ValueError(f"bench.roles={list(self.roles)} has {unknown[0]}; roles are {', '.join(ROLES)}")
        if self.source != "sprites" and not Path(self.source).is_dir():
            raise ValueError(f"bench.source={self.source} must be sprites, or a folder that exists, of videos")
        if self.tracker.max_layers is None:
            self.tracker = replace(self.tracker, max_layers=SPRITES_LAYERS if self.source == "sprites" else 0)


@dataclass
class _Kept:
    """What is kept of the videos of one role: a clip of 81 frames at 832 x 480 takes 97 MB."""

    network: SpritesNetwork | None
    num_shown: int
    shown: list[np.ndarray] = field(default_factory=list)
    text_accuracy: list[float] = field(default_factory=list)
    lpips_sprites: list[float] = field(default_factory=list)
    num_frames: int = 0
    seconds: float = 0.0

    def add(self, found: Generated) -> None:
        """A batch."""
        self.shown += list(found.frames[: self.num_shown - len(self.shown)])
        self.num_frames += found.frames.shape[0] * found.frames.shape[1]
        self.seconds += found.seconds
        if self.network is not None:
            self.text_accuracy += text_accuracy(self.network, found.clips, found.frames)
            self.lpips_sprites += perceptual_distances(self.network, found.clips, found.frames)

    def add_to(self, results: Results, name: str) -> None:
        if self.network is not None:
            results.add(f"{name}.text_accuracy", self.text_accuracy)
            results.add(f"{name}.lpips_sprites", self.lpips_sprites)


class MotionTransfer:
    """The benchmark; see the module's docstring."""

    Config = MotionTransferConfig

    def __init__(self, cfg: MotionTransferConfig) -> None:
        self.cfg = cfg

    def run(self, context: EvalContext) -> Outcome:
        """Generate and judge every role, and write down what bounds the figures."""
        cfg = self.cfg
        if cfg.release_frame is not None and cfg.release_frame >= context.model_cfg.clip.num_frames:
            raise ValueError(
                f"bench.release_frame={cfg.release_frame} must be less than model.clip.num_frames="
                f"{context.model_cfg.clip.num_frames}"
            )
        dits = {role: context.load(role) for role in cfg.roles}  # wrong weights show at once
        lpips = load_lpips(cfg.lpips_weights)
        network = None if cfg.features is None else SpritesNetwork.from_folder(cfg.features)
        if network is not None:
            check_frame_size(context.model_cfg.clip.height, context.model_cfg.clip.width)
        clips = load_clips(cfg, context)
        judge = Judge(clips, cfg.tracker, cfg.registration, lpips, cfg.num_workers)
        results = Results(seed=context.seed)
        results.clips = [clip.key for clip in clips]
        results.put("num_clips", len(clips))
        results.put("latent_cell_px", context.codecs.cell_px)
        results.put("visible_ratio", float(still_error(clips).visible_ratio.mean()))
        verdicts = self._floors(context.codecs, judge, results)
        kept: dict[str, _Kept] = {}
        for role, dit in dits.items():
            for with_tracks in (True, False) if cfg.withhold_tracks else (True,):
                name = role if with_tracks else f"{role}_withheld"
                kept[name] = _Kept(network, cfg.num_shown)
                verdicts[name] = self._judge_role(role, dit, context, judge, kept[name], with_tracks)
                verdicts[name].add_to(results, name)
                kept[name].add_to(results, name)
                if with_tracks:
                    results.put(f"{role}.frames_per_second", kept[name].num_frames / kept[name].seconds)
            if cfg.withhold_tracks:
                without, given = verdicts[f"{role}_withheld"].epe_px, verdicts[role].epe_px
                results.add(f"{role}.epe_without_tracks_px", without)
                results.add_difference(f"{role}.epe_gain_from_tracks_px", without, given)
        if {"teacher", "student"} <= set(verdicts):
            results.add_difference(
                "student.epe_over_teacher_px", verdicts["student"].epe_px, verdicts["teacher"].epe_px
            )
        shown = {name: one.shown for name, one in kept.items()}
        return Outcome(results, lambda: self._sections(context, clips, results, verdicts, shown))

    def _floors(self, codecs: Codecs, judge: Judge, results: Results) -> dict[str, Verdict]:
        """The tracker on the ground truth and on its VAE round trip, and a video that stands still."""
        results.add("still.epe_px", still_error(judge.clips).per_video_px.tolist())
        judge = judge.first(self.cfg.num_floor_clips)
        videos = {"noise_floor_vae": (round_trip(codecs, clip) for clip in judge.clips)}
        if self.cfg.source == "sprites":  # elsewhere the truth is this tracker's
            videos = {"noise_floor": (clip.frames for clip in judge.clips)} | videos
        floors = {}
        with progress_bar(len(videos) * len(judge.clips), "noise floors") as bar:
            for name, frames in videos.items():
                floors[name] = judge.judge(frames, bar.update)
                floors[name].add_to(results, name, likeness=name != "noise_floor")
        return floors

    def _judge_role(
        self, role: str, dit: WanDiT, context: EvalContext, judge: Judge, kept: _Kept, with_tracks: bool
    ) -> Verdict:
        """Generates and judges a few clips at a time."""
        batches = generate(
            role,
            dit,
            context.codecs,
            judge.clips,
            self.cfg,
            with_tracks=with_tracks,
            noise=context.noise,
            batch_size=self.cfg.batch_size,
        )

        def videos() -> Iterator[np.ndarray]:
            for found in batches:
                kept.add(found)
                yield from found.frames

        with progress_bar(len(judge.clips), role if with_tracks else f"{role}, tracks withheld") as bar:
            return judge.judge(videos(), bar.update)

    def _sections(
        self,
        context: EvalContext,
        clips: list[EvalClip],
        results: Results,
        verdicts: Mapping[str, Verdict],
        videos: Mapping[str, Sequence[np.ndarray]],
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
    encoder = context.codecs.text_encoder
    is_closed = isinstance(encoder, VocabularyEncoder)  # others read any words
    with progress_bar(cfg.num_clips, "ground truth") as bar:
        return folder_clips(
            FolderSource(FolderSource.Config(cfg.source, cfg.captions)),
            geometry,
            num_clips=cfg.num_clips,
            tracker=cfg.tracker,
            queries=queries,
            noise=context.noise,
            whole=cfg.whole_video,
            check_caption=(lambda caption: encoder.encode([caption])) if is_closed else str,
            progress=bar.update,
        )


def text_accuracy(network: SpritesNetwork, clips: Sequence[EvalClip], frames: np.ndarray) -> list[float]:
    """Per clip whether it ends with the colour that only its caption tells; nan where the caption tells none."""
    with torch.no_grad():
        logits = network(to_pixels(frames))["end_colors"]
    return event_accuracy(logits, [clip.caption for clip in clips])


def perceptual_distances(network: SpritesNetwork, clips: Sequence[EvalClip], frames: np.ndarray) -> list[float]:
    """Per clip the distance from the ground truth in the features of the sprites network."""
    pairs = (
        (torch.from_numpy(video), torch.from_numpy(clip.frames)) for video, clip in zip(frames, clips, strict=True)
    )
    return [float(network.frame_distances(*pair).mean()) for pair in pairs]


def round_trip(codecs: Codecs, clip: EvalClip) -> np.ndarray:
    """The ground truth after VAE encoding and decoding: uint8 [T, H, W, 3]."""
    return codecs.decode(codecs.vae.encode(to_pixels(clip.frames[None], codecs.device)))[0]


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
