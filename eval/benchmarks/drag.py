"""Drags on a running stream: does the region go where it should, and what does it cost? DragStream against its peers.

Paper: DragStream section 5 and appendix C (REVEL). Every scenario (drag_scenarios.py) is streamed once up to its
first drag; from there each method goes on from the same state with the same noise, "no_drag" among them: the same
stream with the region's tracks released, from the method's step on, and nothing optimised. "ideal" is that stream
with the region cut out and pasted where it should be: what to compare a figure with that is not 0 for it. ObjMC, DAI
(drag.py), PSNR outside the editable region against the stream without a drag, Fréchet distances to those streams, and
the time of a dragged chunk over that of one that nobody drags. A sprites region is found again by its appearance; in
real video by a point tracker.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from data.app import CONF_DIR, build_config, compose_config
from data.sprites import SpritesConfig
from data.trackers import TrackerConfig, build_tracker, grid_queries, require_available
from eval.benchmarks.context import EvalContext, Outcome, progress_bar
from eval.benchmarks.drag_pictures import SHEET_TEXT, drag_sheet, handle_at, pick_shown, with_handles
from eval.benchmarks.drag_runs import DraggedChunks, Replay, Run, pasted
from eval.benchmarks.drag_scenarios import DragScenario, labelled_scenarios, sprites_scenarios
from eval.metrics.detectors import Detectors, Distances
from eval.metrics.drag import (
    LocatorConfig,
    RegionLocator,
    dragging_accuracy,
    largest_radius,
    moved_map,
    objmc,
    psnr_outside,
)
from eval.metrics.sprites_network import check_frame_size
from eval.report import Section, Table, video_side_by_side
from eval.results import Results
from models.condition import FRAMES_PER_LATENT, num_pixel_frames
from models.files import write_json
from models.motion.tracks import Tracks
from models.rollout import ChunkPass
from models.wan.dit import WanDiT
from stream.codecs import to_pixels
from stream.dragstream.config import DragConfig
from stream.dragstream.drag import Handle, Pose
from stream.dragstream.editor import DragEditor, read_references
from stream.dragstream.features import FeatureReader
from stream.dragstream.geometry import moved
from stream.provenance import extra_peak_bytes
from stream.session import StreamSession

NO_DRAG, OURS, IDEAL = "no_drag", "drag", "ideal"
log = logging.getLogger(__name__)

UNTOUCHED = DragConfig(iterations=0, warm_rounds=0, tracks="release")  # nothing is dragged
MAX_POINTS = 64  # followed in a handle
MIN_SEEN = 0.5  # share of a handle that must be in the frame at its target to be judged
WARM_CHUNKS = 4  # before memory is measured: the cache is full
LOST_CORRELATION = 0.5  # a region found with less is not there
DAI_RADIUS = 20  # cells; smaller where the patch would not fit
DAI_RADII = (1, 5, 10, 20)  # of GoodDrag's script; patches are cropped
DAI_KEYS = [
    f"dai_{of}{kind}"
    for of in ("latent", "rgb")
    for kind in ("", "_squared", "_warped", *(f"_r{r}" for r in DAI_RADII))
]  # fmt: skip


@dataclass
class DragBenchConfig:
    """Which drags, which methods, how they are judged."""

    num_scenarios: int = 204
    baselines: list[str] = field(default_factory=lambda: ["paper", "sg_i2v", "dragvideo"])  # of conf/drag
    labels: str | None = None  # folder of official labels instead of sprites scenarios
    hold_tracks: bool = True  # sprites: a grid of still tracks holds what is not dragged; false: until the drag only
    tracks_per_side: int = 16
    scenario_seed: int = 0
    opening_chunks: int = 1  # before the first that is dragged; the first of a video holds the given image
    world: SpritesConfig = field(default_factory=SpritesConfig)
    locator: LocatorConfig = field(default_factory=LocatorConfig)
    tracker: TrackerConfig = field(default_factory=TrackerConfig)  # for labels
    features: str | None = None  # folder of the sprites network: fvd_sprites, fid_sprites
    i3d_weights: str | None = None
    inception_weights: str | None = None
    num_shown: int = 12  # scenarios in the report

    def __post_init__(self) -> None:
        if min(self.num_scenarios, self.tracks_per_side, self.opening_chunks) < 1:
            raise ValueError(
                f"bench.num_scenarios={self.num_scenarios}, bench.tracks_per_side={self.tracks_per_side} and "
                f"bench.opening_chunks={self.opening_chunks} must be at least 1"
            )
        if self.num_shown < 0:
            raise ValueError(f"bench.num_shown={self.num_shown} must be at least 0")
        known = sorted(path.stem for path in (CONF_DIR / "drag").glob("*.yaml"))
        for name in self.baselines:
            if name not in known:
                raise ValueError(f"bench.baselines has '{name}'; conf/drag has {', '.join(known)}")


@dataclass(frozen=True)
class Verdict:
    """Figures of one run."""

    objmc_px: float  # of the mean of the points; per point where a handle turns, which moves no mean
    objmc_per_point_px: float
    lost_ratio: float
    dai_latent: float  # of the largest patch that lies in the frame
    dai_rgb: float
    background_psnr_db: float
    seconds: float  # of a dragged chunk, median
    plain_seconds: float  # of a chunk that nobody drags, median
    dai_latent_squared: float  # the same patch, squared norm
    dai_rgb_squared: float  # as GoodDrag's script has it
    dai_latent_warped: float  # the same, against the frame that the drag found moved as the handle is
    dai_rgb_warped: float
    dai_latent_r1: float
    dai_latent_r5: float
    dai_latent_r10: float
    dai_latent_r20: float
    dai_rgb_r1: float
    dai_rgb_r5: float
    dai_rgb_r10: float
    dai_rgb_r20: float


class DragBenchmark:
    """The benchmark; see the module's docstring."""

    Config = DragBenchConfig

    def __init__(self, cfg: DragBenchConfig) -> None:
        self.cfg = cfg

    def run(self, context: EvalContext) -> Outcome:
        """Stream every scenario with every method, and judge."""
        for remark in context.drag.remarks():
            log.warning(remark)
        detectors = Detectors.load(self.cfg.features, self.cfg.i3d_weights, self.cfg.inception_weights)
        if self.cfg.features is not None:
            check_frame_size(context.model_cfg.clip.height, context.model_cfg.clip.width)
        if self.cfg.labels is not None:
            require_available(self.cfg.tracker, has_scene=False)
        settings = {OURS: context.drag} | {name: baseline_settings(name) for name in self.cfg.baselines}
        scenarios, student = self.scenarios(context), context.load("student")
        length = min(each.num_frames(context.model_cfg.rollout.chunk_frames) for each in scenarios)
        to_show = pick_shown(scenarios, self.cfg.num_shown)
        verdicts: dict[str, list[Verdict]] = {name: [] for name in (NO_DRAG, *settings, IDEAL)}
        shown: dict[int, dict[str, Run]] = {}
        distances = {name: Distances(detectors) for name in settings}
        for number, (runs, bases) in enumerate(self.stream(context, student, scenarios, settings)):
            plain = bases[OURS]
            ideal = pasted(plain, lambda frames: _encoded(context, frames))
            for name, run in {NO_DRAG: plain, **runs, IDEAL: ideal}.items():
                verdicts[name].append(self.judge(run, bases.get(name, plain)))
            for name, run in runs.items():  # to the streams without a drag, all cut to the shortest
                distances[name].add(run.frames[-length:], bases[name].frames[-length:])
            if number in to_show:  # of the others no frame is kept
                shown[number] = {NO_DRAG: plain, **runs}
        results = Results(seed=context.seed, unit="scenarios")
        results.clips = [scenario.key for scenario in scenarios]
        for name, found in verdicts.items():
            put_verdicts(results, name, found)
        self._put_ratios(results, verdicts)
        for name in settings:
            for key, distance in distances[name].found().items():
                results.put(f"{name}.{key}", distance)
        for name, cfg in settings.items():
            results.put(f"{name}.extra_memory_ratio", self._extra_memory(context, student, scenarios, cfg))
        write_scenarios(context.out / "scenarios.json", scenarios, verdicts)
        shown = {number: shown[number] for number in to_show}
        return Outcome(results, lambda: self._sections(context, results, scenarios, shown, verdicts))

    def scenarios(self, context: EvalContext) -> list[DragScenario]:
        clip, chunk_frames = context.model_cfg.clip, context.model_cfg.rollout.chunk_frames
        if self.cfg.labels is not None:
            return labelled_scenarios(Path(self.cfg.labels), clip, chunk_frames)[: self.cfg.num_scenarios]
        return sprites_scenarios(
            self.cfg.world, clip, chunk_frames=chunk_frames, count=self.cfg.num_scenarios,
            seed=self.cfg.scenario_seed, opening_chunks=self.cfg.opening_chunks,
        )  # fmt: skip

    # ------------------------------------------------------------------ streaming
    def stream(
        self,
        context: EvalContext,
        student: WanDiT,
        scenarios: Sequence[DragScenario],
        settings: Mapping[str, DragConfig],
    ) -> Iterator[tuple[dict[str, Run], dict[str, Run]]]:
        """For each scenario its runs by method, and the same streams without a drag.

        What a drag releases is released from its step on: there is a stream without a drag for each step.
        """
        depth = context.model_cfg.rollout.num_steps, student.config.num_layers
        step_of = {name: cfg.for_student(*depth).step for name, cfg in settings.items()}
        ways = {step: replace(UNTOUCHED, step=step) for step in sorted(set(step_of.values()))} | dict(settings)
        far = DragConfig(adsr_frames=max(cfg.adsr_frames for cfg in settings.values()))  # what is remembered
        with progress_bar(len(scenarios) * len(ways), "drag", "stream") as bar:
            for scenario in scenarios:
                session = self._open(context, student, scenario, far)
                opening = [session.next_chunk() for _ in range(scenario.events[0].after_chunks)]
                state, latents = session.snapshot(), session.latents
                runs: dict[str | int, Run] = {}
                for way, cfg in ways.items():
                    session.restore(state)
                    session.drag_cfg = cfg
                    runs[way] = Replay(session, scenario, self.cfg.locator, opening[-1], latents).run()
                    bar.update()
                yield {name: runs[name] for name in settings}, {name: runs[step_of[name]] for name in settings}

    def _open(self, context: EvalContext, student: WanDiT, scenario: DragScenario, drag: DragConfig) -> StreamSession:
        clip, per_side = context.model_cfg.clip, self.cfg.tracks_per_side
        chunk_frames, tracks = context.model_cfg.rollout.chunk_frames, None
        num_chunks = max(scenario.num_chunks, WARM_CHUNKS) + 1  # room, should the cache keep all; one is timed alone
        if self.cfg.labels is None:
            points = grid_queries(clip.height, clip.width, per_side, per_side)
            opening = num_pixel_frames(scenario.events[0].after_chunks * chunk_frames)
            still = np.repeat(points[None], opening, axis=0)
            tracks = Tracks.from_arrays(still, np.ones(still.shape[:2], bool), clip.height, clip.width)
        return StreamSession(
            student, context.codecs, first_frame=scenario.first_frame, prompt=scenario.prompt, tracks=tracks,
            num_frames=num_pixel_frames(num_chunks * chunk_frames),
            ending="hold" if self.cfg.hold_tracks else "release", seed=context.seed, sample_id=scenario.sample_id,
            undo_chunks=1, drag=drag,
        )  # fmt: skip

    # ------------------------------------------------------------------ judging
    def judge(self, run: Run, base: Run) -> Verdict:
        """One run against the stream without a drag."""
        found = [self._judge_drag(dragged) for dragged in run.drags]
        outside = [
            psnr_outside(ours.frames, plain.frames, ours.drag.editable)
            for ours, plain in zip(run.drags, base.drags)
            if ours.drag.editable is not None
        ]
        seconds = [value for dragged in run.drags for value in dragged.seconds]
        figures = {key: _mean(one[key] for one in found) for key in found[0]}
        return Verdict(
            **figures, background_psnr_db=_mean(outside), seconds=_median(seconds),
            plain_seconds=_median(run.plain_seconds),
        )  # fmt: skip

    def _judge_drag(self, dragged: DraggedChunks) -> dict[str, float]:
        """The figures of a `Verdict` that are those of one drag."""
        size = dragged.before.shape[0], dragged.before.shape[1]
        distances, lost, accuracies = [], [], []
        for index, handle in enumerate(dragged.drag.handles):
            seen = [(frame, poses[index]) for frame, poses in dragged.poses if _is_seen(handle, poses[index])]
            if not seen:
                continue
            points, correlations = self._follow(dragged, handle, [frame for frame, _ in seen])
            found = objmc(points, [pose for _, pose in seen], handle.center)
            distances.append((found.per_point_px if handle.is_rotation else found.displacement_px, found.per_point_px))
            lost += [float(value < LOST_CORRELATION) for value in correlations]
            for frame, pose in seen:
                after = dragged.latents[:, _latent_of(frame, dragged)]
                before, now = _unit(dragged.before), _unit(dragged.frames[frame])
                accuracies.append(
                    _accuracies("dai_latent", dragged.before_latent, after, handle, pose, size)
                    | _accuracies("dai_rgb", before, now, handle, pose, size)
                )
        return {
            "objmc_px": _mean(mean for mean, _ in distances),
            "objmc_per_point_px": _mean(per_point for _, per_point in distances),
            "lost_ratio": _mean(lost),
            **{key: _mean(one[key] for one in accuracies) for key in DAI_KEYS},
        }

    def _follow(self, dragged: DraggedChunks, handle: Handle, frames: list[int]) -> tuple[np.ndarray, list[float]]:
        """Points of the handle in the frame dragged in and in the judged ones: [1 + T, N, 2], and how sure."""
        rows, cols = np.nonzero(handle.mask)
        picked = np.linspace(0, len(rows) - 1, min(len(rows), MAX_POINTS)).astype(int)
        start = np.stack([cols[picked] + 0.5, rows[picked] + 0.5], axis=-1)
        if self.cfg.labels is not None:
            video = np.concatenate([dragged.before[None], dragged.frames])
            points, visible = build_tracker(self.cfg.tracker).track(video, start.astype(np.float32))
            judged = [1 + frame for frame in frames]
            kept = visible[judged].all(0)  # a lost point stays where it was lost; all of them are better than none
            points = points[:, kept] if kept.any() else points
            return points[[0, *judged]], visible[judged].mean(1).tolist()
        locator = RegionLocator(dragged.before, handle.mask, self.cfg.locator)
        located = [locator.locate(dragged.frames[frame]) for frame in frames]
        return np.stack([start, *(_moved(start, each.pose, locator.center) for each in located)]), [
            each.correlation for each in located
        ]

    # ------------------------------------------------------------------ figures
    def _put_ratios(self, results: Results, verdicts: Mapping[str, Sequence[Verdict]]) -> None:
        """Each method's figures over those of the stream without a drag; its time over that of its other chunks."""
        for role in (OURS, *self.cfg.baselines, IDEAL):
            for key in ("objmc", *DAI_KEYS):
                name_of = f"{key}_px" if key == "objmc" else key
                ours, plain = results.values[f"{role}.{name_of}"], results.values[f"{NO_DRAG}.{name_of}"]
                results.put(f"{role}.{key}_ratio", _ratio(ours, plain))
            if role != IDEAL:
                results.add(f"{role}.seconds_ratio", seconds_ratios(verdicts[role]))

    def _extra_memory(
        self, context: EvalContext, student: WanDiT, scenarios: Sequence[DragScenario], cfg: DragConfig
    ) -> float:
        """How much more a dragged chunk holds at its peak than a plain one, as a share of the cache beside it.

        Plain: a denoising pass. Latents are edited before a pass, so the larger of the two counts.
        """
        scenario = next((each for each in scenarios if each.mode == "animate"), scenarios[0])
        session, clip = self._open(context, student, scenario, cfg), context.model_cfg.clip
        for _ in range(WARM_CHUNKS):
            session.next_chunk()
        source = session.latest_passes[session.drag_cfg.step]
        reader, drag = FeatureReader(student, session.drag_cfg, source.sigma), scenario.events[0].drag
        references = read_references(reader, session.drag_cfg, drag, source, context.noise)
        editor = DragEditor(
            student, session.drag_cfg, drag, size=(clip.height, clip.width), noise=context.noise,
            first_chunk=session.chunk_index, references=references,
        )  # fmt: skip
        extra: list[int] = []

        def weigh(shown: ChunkPass) -> Tensor:
            if shown.step == session.drag_cfg.step:
                extra.append(
                    extra_peak_bytes(
                        lambda: editor(shown), lambda: reader.x0(shown, shown.noisy_latents), context.device
                    )
                )
            return shown.noisy_latents

        session.next_chunk(edit=weigh)
        return max(extra) / session.cache_bytes

    def _sections(
        self, context: EvalContext, results: Results, scenarios: Sequence[DragScenario],
        shown: Mapping[int, Mapping[str, Run]], verdicts: Mapping[str, Sequence[Verdict]],
    ) -> list[Section]:  # fmt: skip
        videos = [
            video_side_by_side({name: with_handles(run) for name, run in runs.items()},
                               context.model_cfg.clip.fps, f"{scenarios[n].key}: {scenarios[n].prompt}")
            for n, runs in shown.items()
        ]  # fmt: skip
        sheets = [
            drag_sheet({name: runs[name] for name in (NO_DRAG, OURS)}, scenarios[n].key) for n, runs in shown.items()
        ]
        text = (
            f"{len(scenarios)} scenarios; every method goes on from the same state with the same noise. White: the "
            "handle's outline at its target."
        )
        return [
            Section("Drags", text, results.by_role()),
            Section("By kind of drag", table=by_kind(scenarios, verdicts)),
            Section("Further figures", "\n".join(results.notes()), results.others()),
            Section("Before and after", SHEET_TEXT, figures=sheets),
            Section("Streams", videos=videos),
        ]


# ------------------------------------------------------------------------------------------ small pieces
def baseline_settings(profile: str) -> DragConfig:
    """conf/drag/<profile>.yaml as it is."""
    return build_config(compose_config("stream", ["image=unused", f"drag={profile}"]).drag)


def put_verdicts(results: Results, role: str, verdicts: Sequence[Verdict]) -> None:
    for key in Verdict.__dataclass_fields__:
        results.add(f"{role}.{key}", [getattr(verdict, key) for verdict in verdicts])


def seconds_ratios(verdicts: Sequence[Verdict]) -> list[float]:
    """Of a dragged chunk over one of the same stream that nobody drags."""
    return [verdict.seconds / verdict.plain_seconds for verdict in verdicts]


def by_kind(scenarios: Sequence[DragScenario], verdicts: Mapping[str, Sequence[Verdict]]) -> Table:
    """ObjMC per combination of mode, kind and variant, one column a method."""
    names = list(verdicts)
    groups: dict[tuple[str, str], list[int]] = {}
    for number, scenario in enumerate(scenarios):
        for group in ((scenario.mode, scenario.kind), (scenario.mode, scenario.variant)):
            groups.setdefault(group, []).append(number)
    rows = [
        [f"{mode}, {what}", str(len(members)),
         *(mean_cell((verdicts[name][n].objmc_px for n in members), ".2f") for name in names)]
        for (mode, what), members in sorted(groups.items())
    ]  # fmt: skip
    return Table(["ObjMC px", "scenarios", *names], rows)


def write_scenarios(path: Path, scenarios: Sequence[DragScenario], verdicts: Mapping[str, Sequence[Verdict]]) -> None:
    """Every figure of every scenario, for another table than ours."""
    content = [
        {"key": scenario.key, "prompt": scenario.prompt}
        | {name: {k: _or_none(v) for k, v in vars(found[n]).items()} for name, found in verdicts.items()}
        for n, scenario in enumerate(scenarios)
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, content)


def _is_seen(handle: Handle, pose: Pose) -> bool:
    return bool(handle_at(handle, pose).sum() >= MIN_SEEN * handle.mask.sum())


def _moved(points: np.ndarray, pose: Pose, center: tuple[float, float]) -> np.ndarray:
    return moved(torch.from_numpy(points), pose, center).numpy()


def _latent_of(frame: int, dragged: DraggedChunks) -> int:
    """Latent frame whose last pixel frame this is, counted in the dragged chunks."""
    return dragged.latents.shape[1] - 1 - (len(dragged.frames) - 1 - frame) // FRAMES_PER_LATENT


def _encoded(context: EvalContext, frames: np.ndarray) -> Tensor:
    """Normalised latents [C, F, h, w] of frames uint8 [1 + 4k, H, W, 3]."""
    return context.codecs.vae.encode(to_pixels(frames[None], context.device))[0].float().cpu()


def _unit(frame: np.ndarray) -> Tensor:
    return torch.from_numpy(frame).permute(2, 0, 1).float() / 255


def _accuracies(
    name: str, before: Tensor, after: Tensor, handle: Handle, pose: Pose, size: tuple[int, int]
) -> dict[str, float]:
    """DAI of the largest patch that fits, upright, squared and warped, and of each radius: figures of a `Verdict`."""
    start = handle.point
    target = _moved(np.array(start), pose, handle.center).tolist()
    fits = largest_radius(start, target, (before.shape[-2], before.shape[-1]), size, DAI_RADIUS)
    radii = {name: fits} | {f"{name}_r{radius}": radius for radius in DAI_RADII}
    found = {key: dragging_accuracy(before, after, start, target, radius, size) for key, radius in radii.items()}
    found[f"{name}_squared"] = dragging_accuracy(before, after, start, target, fits, size, squared=True)
    warped = moved_map(before, pose, handle.center, size)
    return found | {f"{name}_warped": dragging_accuracy(warped, after, target, target, fits, size)}


def _mean(values: Iterable[float]) -> float:
    finite = [value for value in values if np.isfinite(value)]
    return float(np.mean(finite)) if finite else float("nan")


def mean_cell(values: Iterable[float], digits: str) -> str:
    """Their mean in a table, in the digits of a format."""
    mean = _mean(values)
    return format(mean, digits) if np.isfinite(mean) else "n/a"


def _median(values: Sequence[float]) -> float:
    return float(np.median(values)) if values else float("nan")


def _ratio(value: Any, base: Any) -> float | None:
    return value / base if isinstance(value, float) and isinstance(base, float) and base else None


def _or_none(value: float) -> float | None:
    return value if np.isfinite(value) else None
