"""The findings of the paper, one row each, measured on the sprites world: claims.json, claims.md and a report.

A row compares *observations*. Some are made here, from the weights at hand under other settings of the model (a
`Run`); they are kept in OUT/runs, and made again only where what they were made with has changed. The others are
ablations of training, made by `python -m train.ablations` and stored with the run that made them. An effect is a
difference over the same clips that is positive where the finding holds. Its interval is a bootstrap over clips and,
between ablations, over the seeds of training that all of them have; one clip or one training decides nothing.

    holds            every effect's interval lies above zero
    does not hold    some effect's interval lies below zero
    within noise     otherwise

The rows are in claim_rows.py. Leaves out any tuning: no setting is chosen by what a row says.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from data.sprites import SpritesConfig
from data.trackers import TrackerConfig
from eval.benchmarks.context import EvalContext, Outcome, content_of
from eval.benchmarks.latency import Latency, LatencyConfig
from eval.benchmarks.motion_transfer import MotionTransfer, MotionTransferConfig, load_clips
from eval.clips import stack_tracks
from eval.metrics.interval import Interval, bootstrap_interval, mean_over_seeds, seeded_interval
from eval.report import Section, Table
from eval.results import Results, keep, read_kept
from eval.roles import ROLES
from models.assemble import located
from models.files import write_json
from models.motion.embedding import scatter_tracks
from models.motion.rgb import draw_tracks
from models.motion.track_head import TrackHead
from stream.provenance import speed_of_machine

HOLDS, FAILS, NOISE, ABSENT = "holds", "does not hold", "within noise", "not measured"
STEP_GRID = 25  # teacher steps of the grid that the step_indices of a run are points of
TIMED_REPEATS = 20  # of a thing that is timed


@dataclass
class ClaimsConfig:
    """Which clips, and how many."""

    rows: list[int] = field(default_factory=list)  # numbers of the rows wanted; empty: all
    ablations: str = "models/zoo/sprites/ablations.json"  # written by `python -m train.ablations`
    num_clips: int = 512  # of a motion transfer
    batch_size: int = 16
    num_inference_steps: int = 25  # of the teacher
    num_chunks: int = 80  # of a timed stream
    num_workers: int | None = None  # processes that judge; null: one a core, at most 16; 0: this one
    features: str | None = None  # folder of the sprites feature network: text accuracy; null: unavailable
    world: SpritesConfig = field(default_factory=SpritesConfig)
    tracker: TrackerConfig = field(default_factory=TrackerConfig)

    def __post_init__(self) -> None:
        LatencyConfig(num_chunks=self.num_chunks)  # each refuses what it cannot do: now, not after the first runs
        MotionTransferConfig(
            num_clips=self.num_clips, batch_size=self.batch_size, num_inference_steps=self.num_inference_steps,
            num_workers=self.num_workers,
        )  # fmt: skip


@dataclass(frozen=True)
class Run:
    """One benchmark of the weights at hand under changed settings of the model."""

    bench: str  # motion_transfer | latency
    settings: Mapping[str, Any] = field(default_factory=dict)  # fields of a motion transfer's configuration
    guidance: Mapping[str, float] = field(default_factory=dict)  # weights that differ from model.guidance
    rollout: Mapping[str, Any] = field(default_factory=dict)  # fields that differ from model.rollout
    tiny: bool = False  # decode with model.tiny_vae
    is_timed: bool = False  # its figures are of the machine as well; all of latency are

    @property
    def roles(self) -> Sequence[str]:
        """Whose weights it reads; only a motion transfer can name others than the student."""
        return self.settings.get("roles", ROLES if self.bench == "motion_transfer" else ("student",))

    @property
    def keeps_its_pace(self) -> bool:
        """Whether it times a stream whose context does not grow. One that grows takes up more and more of the caches of
        the processor, which the others in turn with it would miss.
        """
        return self.bench == "latency" and self.rollout.get("window_chunks", 1) is not None


@dataclass(frozen=True)
class Effect:
    """A difference that is positive where the finding holds."""

    what: str
    interval: Interval
    num_trainings: int | None = None  # on each side; None: nothing was trained for it
    is_figure: bool = False  # one figure of a whole run, such as a throughput, not a mean over clips

    @property
    def bounds(self) -> tuple[float, float]:
        """What decides: the interval, of a figure the figure itself; nothing where it is of one clip or training."""
        mean, low, high = self.interval.mean, self.interval.low, self.interval.high
        if self.is_figure and mean is not None:
            return (mean, mean)
        return (-math.inf, math.inf) if low is None or high is None else (low, high)

    def __str__(self) -> str:
        return f"{self.what}: {self.interval}{' (one training each)' if self.num_trainings == 1 else ''}"


@dataclass(frozen=True)
class Finding:
    """One line of claims.json."""

    row: int
    claim: str
    paper: str
    effects: Sequence[Effect]
    why_absent: str = ""

    @property
    def verdict(self) -> str:
        if not self.effects:
            return ABSENT
        bounds = [effect.bounds for effect in self.effects]
        if all(low > 0 for low, _ in bounds):
            return HOLDS
        return FAILS if any(high < 0 for _, high in bounds) else NOISE

    def to_json(self) -> dict[str, Any]:
        ours = "; ".join(map(str, self.effects)) or self.why_absent
        intervals = [[bound if math.isfinite(bound) else None for bound in effect.bounds] for effect in self.effects]
        return {
            "row": self.row, "claim": self.claim, "paper": self.paper, "ours": ours,
            "interval": intervals, "verdict": self.verdict,
        }  # fmt: skip


class NotMeasuredError(LookupError):
    """An observation that a row needs is not there; the text says how to make it."""


Values = dict[str, list[float]]  # key -> one value per clip (or per chunk)


class Observations:
    """What has been measured, by name; each is made when it is first asked for."""

    def __init__(self, context: EvalContext, cfg: ClaimsConfig, runs: Mapping[str, Run]) -> None:
        self.context, self.cfg, self.runs = context, cfg, runs
        self.made: dict[str, Values] = {}
        self.figures: dict[str, dict[str, Any]] = {}
        self.stored = _read_ablations(cfg.ablations)

    def values(self, name: str, key: str, seeds: Sequence[str] | None = None) -> list[float]:
        """One value per clip; nan where nothing could be measured.

        Ablations: a clip's mean over ``seeds`` (None: all there are); of timings, which are no clips, those of all
        seeds in turn.
        """
        found = self.values_of(name, seeds)
        if key not in found:
            raise NotMeasuredError(f"{name} has no {key}; it has {', '.join(sorted(found))}")
        return found[key]

    def values_of(self, name: str, seeds: Sequence[str] | None = None) -> Values:
        """Every key of an observation."""
        return self._made(name) if name in self.runs else self._stored(name, seeds)

    def common_seeds(self, names: Sequence[str]) -> list[str]:
        """Seeds that the ablations among the names all have: over these they are compared.

        Raises NotMeasuredError where there is none.
        """
        stored = {name: set(self._entry(name)["seeds"]) for name in names if name not in self.runs}
        if not stored:
            return []
        common = sorted(set.intersection(*stored.values()))
        if not common:
            have = "; ".join(f"{name} has {', '.join(sorted(seeds))}" for name, seeds in stored.items())
            wanted = " ".join(sorted(set.union(*stored.values())))
            raise NotMeasuredError(
                f"no seed in common: {have}; make them with `python -m train.ablations --seeds {wanted}`"
            )
        return common

    def figure(self, name: str, key: str) -> float:
        """One figure of a run made here, such as a throughput."""
        self.values_of(name)
        value = self.figures[name].get(key)
        if value is None:
            raise NotMeasuredError(f"{name} has no {key}")
        return float(value)

    def less(self, what: str, better: str, worse: str, key: str) -> Effect:
        """worse - better, for a metric that should be low."""
        return self.compared(what, (better, worse), key, lambda low, high: high - low)

    def more(self, what: str, better: str, worse: str, key: str) -> Effect:
        """better - worse, for a metric that should be high."""
        return self.compared(what, (better, worse), key, lambda high, low: high - low)

    def compared(self, what: str, names: Sequence[str], key: str, difference: Callable[..., float]) -> Effect:
        """``difference`` of one clip's values, in the order of the names; positive where the finding holds."""

        def clip_by_clip(seeds: Sequence[str] | None = None) -> list[float]:
            return [difference(*clip) for clip in zip(*(self.values(name, key, seeds) for name in names), strict=True)]

        if not (seeds := self.common_seeds(names)):
            return self.effect(what, clip_by_clip())
        by_seed = [clip_by_clip([seed]) for seed in seeds]
        return Effect(what, seeded_interval(by_seed, seed=self.context.seed), len(seeds))

    def effect(self, what: str, values: Sequence[float]) -> Effect:
        """The mean of one value per clip, or per repeat of what is timed."""
        return Effect(what, bootstrap_interval(values, seed=self.context.seed))

    def figure_effect(self, what: str, value: float) -> Effect:
        """A difference of figures that a run has one of."""
        return replace(self.effect(what, [value]), is_figure=True)

    def _stored(self, name: str, seeds: Sequence[str] | None) -> Values:
        by_seed = self._entry(name)["seeds"]
        found = [by_seed[seed]["per_clip"] for seed in (sorted(by_seed) if seeds is None else seeds)]
        keys = set.intersection(*(set(one) for one in found))
        return {key: merged_seeds(key, [[as_float(v) for v in one[key]] for one in found]) for key in sorted(keys)}

    def _entry(self, name: str) -> dict[str, Any]:
        if name not in self.stored:
            raise NotMeasuredError(
                f"{self.cfg.ablations} has no ablation '{name}'; make it with `python -m train.ablations`"
            )
        return self.stored[name]

    def _made(self, name: str) -> Values:
        if not self._can_be_made(self.runs[name]):
            raise NotMeasuredError(f"{name} needs model.tiny_vae; set it to the folder of a trained one")
        if name not in self.made:
            self._make(self._together(name))
        return self.made[name]

    def _together(self, name: str) -> list[str]:
        """Runs that are made at once: streams are timed in turn, or a busy hour of the machine would decide rows."""
        if not self.runs[name].keeps_its_pace:
            return [name]
        return [other for other, run in self.runs.items() if run.keeps_its_pace and self._can_be_made(run)]

    def _can_be_made(self, run: Run) -> bool:
        return not run.tiny or self.context.model_cfg.tiny_vae is not None

    def _make(self, names: Sequence[str]) -> None:
        """Read what is kept of these runs, or else make all of them."""
        places = {name: (self.context.out / "runs" / f"{name}.json", self._made_with(name)) for name in names}
        found = {name: read_kept(*place) for name, place in places.items()}
        if None in found.values():
            for name, results in zip(names, self._run([self.runs[name] for name in names]), strict=True):
                keep(*places[name], metrics=results.values, per_clip=results.finite_per_clip())
            found = {name: read_kept(*place) for name, place in places.items()}
        for name, kept in found.items():
            assert kept is not None, "kept a moment ago"
            self.figures[name] = kept["metrics"]
            self.made[name] = {key: [as_float(value) for value in values] for key, values in kept["per_clip"].items()}

    def _made_with(self, name: str) -> dict[str, Any]:
        run, together = self.runs[name], self._together(name)
        in_turn: dict[str, Any] = {"in turn": together} if len(together) > 1 else {}
        if run.is_timed or run.bench == "latency":
            in_turn |= {"machine": speed_of_machine(self.context.device)}
        return {
            "run": asdict(run), "claims": self._settings(), "features": content_of(self.cfg.features), **in_turn,
            **self.context.made_with(run.roles, tiny=run.tiny),
        }  # fmt: skip

    def _settings(self) -> dict[str, Any]:
        """Settings that the figures of a run depend on."""
        left_out = ("rows", "ablations", "num_workers")
        return {name: value for name, value in asdict(self.cfg).items() if name not in left_out}

    def _run(self, runs: Sequence[Run]) -> list[Results]:
        """The figures of one run, or of several streams in turn."""
        bench, contexts = runs[0].bench, [self._context_of(run) for run in runs]
        if bench == "latency":
            outcomes = Latency(LatencyConfig(**self._defaults(bench))).run_in_turn(contexts)
        else:
            settings = MotionTransferConfig(**(self._defaults(bench) | dict(runs[0].settings)))
            outcomes = [MotionTransfer(settings).run(contexts[0])]
        return [outcome.results for outcome in outcomes]

    def _context_of(self, run: Run) -> EvalContext:
        model_cfg = self.context.model_cfg
        rollout = dict(run.rollout)
        if "step_indices" in rollout:  # at the same noise levels on the model's own grid
            steps = model_cfg.rollout.num_inference_steps
            rollout["step_indices"] = [round(index * steps / STEP_GRID) for index in run.rollout["step_indices"]]
        context = self.context.changed(
            guidance={**model_cfg.guidance, **run.guidance}, rollout=replace(model_cfg.rollout, **rollout)
        )
        return context.with_tiny_decoder() if run.tiny else context

    def _defaults(self, bench: str) -> dict[str, Any]:
        cfg = self.cfg
        world = {"world": cfg.world, "tracker": cfg.tracker}
        if bench == "latency":
            return {"num_chunks": cfg.num_chunks}
        return {
            **world, "num_clips": cfg.num_clips, "batch_size": cfg.batch_size, "num_floor_clips": 1,
            "num_inference_steps": cfg.num_inference_steps, "num_workers": cfg.num_workers,
            "withhold_tracks": False, "features": cfg.features,
        }  # fmt: skip

    def track_encoding_seconds(self) -> tuple[list[float], list[float]]:
        """Seconds to encode a clip's tracks by the track head, and by drawing them and encoding that with the VAE.

        Both on the device and in the dtype of the model.
        """
        codecs, dit = self.context.codecs, self.context.model_cfg.dit
        dtype = self.context.model_cfg.torch_dtype
        settings = MotionTransferConfig(num_clips=1, world=self.cfg.world, tracker=self.cfg.tracker)
        tracks = stack_tracks(load_clips(settings, self.context)).to(codecs.device)
        head = TrackHead(dit.track_map_dim, dit.track_hidden, dit.track_channels or dit.latent_channels)
        head.to(codecs.device, dtype)
        height, width = codecs.latent_size

        def by_head() -> None:
            track_map = scatter_tracks(
                tracks, dim=dit.track_id_dim, height_cells=height, width_cells=width, cell_px=codecs.cell_px,
                with_offsets=dit.track_offsets,
            )  # fmt: skip
            head(track_map.to(dtype))

        def by_vae() -> None:
            codecs.vae.encode(draw_tracks(tracks))

        with torch.no_grad():
            return _timed(by_head, codecs.clock), _timed(by_vae, codecs.clock)


def _read_ablations(file: str) -> dict[str, dict[str, Any]]:
    """Observation -> its settings and values; empty where there is no file."""
    path = Path(located(file))
    try:
        return json.loads(path.read_text()) if path.is_file() else {}
    except ValueError as error:
        raise ValueError(f"bench.ablations={file} is not what `python -m train.ablations` writes: {error}") from error


def merged_seeds(key: str, seeds: Sequence[Sequence[float]]) -> list[float]:
    """The values of several seeds as one list: means of the same clips; timings, which are no clips, in turn."""
    is_timing = "seconds" in key.split(".")[-1]
    return [value for one in seeds for value in one] if is_timing else mean_over_seeds(seeds)


def _timed(call: Callable[[], None], clock: Callable[[], float]) -> list[float]:
    """Seconds of each call after the first, by a clock that waits for the device."""
    call()
    seconds = []
    for _ in range(TIMED_REPEATS):
        started = clock()
        call()
        seconds.append(clock() - started)
    return seconds


def as_float(value: float | None) -> float:
    return math.nan if value is None else float(value)


class Claims:
    """The benchmark; see the module's docstring."""

    Config = ClaimsConfig

    def __init__(self, cfg: ClaimsConfig) -> None:
        from eval.benchmarks.claim_rows import ROWS, RUNS

        numbers = [row.number for row in ROWS]
        if unknown := [number for number in cfg.rows if number not in numbers]:
            raise ValueError(f"bench.rows={list(cfg.rows)} has {unknown[0]}; rows are {numbers}")
        self.cfg, self.runs = cfg, RUNS
        self.rows = [row for row in ROWS if not cfg.rows or row.number in cfg.rows]

    def run(self, context: EvalContext) -> Outcome:
        """Every row wanted; writes claims.json and claims.md into the run's folder.

        Raises ValueError for decoder=tiny: what is compared with the tiny decoder would be itself.
        """
        if context.codecs.decoder is not context.codecs.vae:
            raise ValueError("decoder=tiny, but row 9 compares the tiny decoder with the full one; use decoder=full")
        observations = Observations(context, self.cfg, self.runs)
        findings = [row.find(observations) for row in self.rows]
        write_findings(context.out, findings)
        results = Results(seed=context.seed)
        for finding in findings:
            results.put(f"row_{finding.row}.verdict", finding.verdict)
        for verdict in (HOLDS, FAILS, NOISE, ABSENT):
            results.put(verdict.replace(" ", "_"), sum(finding.verdict == verdict for finding in findings))
        return Outcome(results, lambda: [Section("Findings of the paper", table=table_of(findings))])


def write_findings(out: Path, findings: Sequence[Finding]) -> None:
    """claims.json for programs, claims.md for documents."""
    out.mkdir(parents=True, exist_ok=True)
    write_json(out / "claims.json", [finding.to_json() for finding in findings])
    (out / "claims.md").write_text(table_of(findings).as_markdown(), encoding="utf-8")


def table_of(findings: Sequence[Finding]) -> Table:
    """A line per finding."""
    lines = [finding.to_json() for finding in findings]
    columns = ["row", "claim", "paper", "ours", "verdict"]
    return Table(columns, [[str(line[column]) for column in columns] for line in lines])
