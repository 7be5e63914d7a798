"""The ablations of the DragStream paper as one sweep, and a line per claim: holds, does not hold, within noise.

Figures 6, 7 and 16, tables 1 and 3 to 7 of arXiv 2510.03550, on the drag benchmark's scenarios (drag.py). Every
variant changes the settings of `drag` in one way and drags the same streams with the same noise, for several seeds.
Every seed drags the same scenarios, so a scenario's figure is its mean over the seeds, and effects are paired
differences over scenarios. A claim of improvement holds where the variant without the part is worse beyond its
interval; a claim of robustness where the variant keeps four fifths of what the full method gains over no drag. No
track holds anything once the drag has begun, unless `hold_tracks` says so: the paper's student takes none. A seed that
is finished is kept in OUT/seed_<n>.json and not dragged again.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from data.sprites import SpritesConfig
from eval.benchmarks.claims import Effect, Finding, as_float, table_of, write_findings
from eval.benchmarks.context import EvalContext, Outcome
from eval.benchmarks.drag import DragBenchConfig, DragBenchmark, Verdict, mean_cell, put_verdicts, seconds_ratios
from eval.metrics.interval import Interval, mean_over_seeds, paired_difference
from eval.report import Section, Table
from eval.results import Results, keep, read_kept
from stream.dragstream.config import DragConfig
from stream.provenance import speed_of_machine

FULL, WITHOUT, WITHOUT_CONTEXT = "full", "I 0", "without context"
KEPT_RATIO = 0.8  # of the gain over no drag, where a part is said to hardly matter
WARM_START = {"warm_rounds": DragConfig.warm_rounds, "step": DragConfig.step, "edit_frames": DragConfig.edit_frames}
VARIANTS: dict[str, dict[str, Any]] = {
    FULL: {},
    "without ADSR": {"adsr": "off"},
    "without SFS": {"cutoffs": [None]},
    "without CSS": {"css_alpha": None},
    "without SFS and CSS": {"cutoffs": [None], "css_alpha": None},
    "without ADSR, SFS and CSS": {"adsr": "off", "cutoffs": [None], "css_alpha": None},
    "cutoff 0.2": {"cutoffs": [0.2]},
    "cutoff 0.4": {"cutoffs": [0.4]},
    "cutoff 0.6": {"cutoffs": [0.6]},
    "cutoffs 0.1 to 0.6": {"cutoff_range": [0.1, 0.6]},
    "cutoffs 0.1 to 0.7": {"cutoff_range": [0.1, 0.7]},
    "cutoffs 0.1 to 0.8": {"cutoff_range": [0.1, 0.8]},
    "Ln 3": {"adsr": "neighbours", "adsr_frames": 3},
    "Ln 9": {"adsr": "neighbours", "adsr_frames": 9},
    "Ln 18": {"adsr": "neighbours", "adsr_frames": 18},
    "SFS before the rotation": {"filter_rope": "pre"},
    "alpha 0.5": {"css_alpha": 0.5},
    "alpha 1.5": {"css_alpha": 1.5},
    "alpha 2": {"css_alpha": 2.0},
    WITHOUT: {"iterations": 0, "warm_rounds": 0, "tracks": "release"},
    "I 2": {"iterations": 2},
    "I 3": {"iterations": 3},
    "one segment": {"segment_ratio": None},
    "without L_rec": {"rec_weight": 0.0},
    "without L_cst": {"cst_weight": 0.0},
    "with tracks": {"tracks": "follow"},
    "with warm start": WARM_START,
    "tracks alone": {"iterations": 0, "warm_rounds": 0, "tracks": "follow"},
    "warm start alone": {"iterations": 0, **WARM_START},
    "tracks and warm start alone": {"iterations": 0, "tracks": "follow", **WARM_START},
    WITHOUT_CONTEXT: {},  # the rollout's sink and window are 0
}
MAX_NEIGHBOURS = max(changes.get("adsr_frames", 0) for changes in VARIANTS.values())  # frames made before a drag
OBJMC, DAI, BACKGROUND = "objmc_px", "dai_latent", "background_psnr_db"


@dataclass
class DragAblationConfig:
    """How much is measured."""

    num_scenarios: int = 24  # per variant and seed
    num_seeds: int = 3
    hold_tracks: bool = False  # until the drag only: the paper's student takes no tracks
    variants: list[str] = field(default_factory=lambda: list(VARIANTS))
    world: SpritesConfig = field(default_factory=SpritesConfig)

    def __post_init__(self) -> None:
        if unknown := [name for name in self.variants if name not in VARIANTS]:
            raise ValueError(f"bench.variants has '{unknown[0]}'; known are {', '.join(VARIANTS)}")
        if FULL not in self.variants:
            raise ValueError(f"bench.variants must have '{FULL}', which the others are compared with")
        if self.num_scenarios < 1 or self.num_seeds < 1:
            raise ValueError(
                f"bench.num_scenarios={self.num_scenarios} and bench.num_seeds={self.num_seeds} must be at least 1"
            )


@dataclass(frozen=True)
class Claim:
    """What the paper says of one variant against the whole."""

    claim: str
    paper: str
    worse: Sequence[tuple[str, str]] = ()  # (variant, figure): worse than the full method
    no_worse: Sequence[tuple[str, str]] = ()  # (variant, figure): keeps four fifths of the gain over no drag
    better: Sequence[tuple[str, str]] = ()  # (variant, figure): better than the full method


CLAIMS = (
    Claim("ADSR: without it objects do not arrive", "fig. 6; table 4: ObjMC 45.09 without, 23.05 with",
          worse=[("without ADSR", OBJMC)]),
    Claim("SFS improves the drag", "fig. 6, bars", worse=[("without SFS", OBJMC)]),
    Claim("CSS improves the drag", "table 5: 26.12 without, 23.65 with", worse=[("without CSS", OBJMC)]),
    Claim("CSS spares the background", "section 4.2.3", worse=[("without CSS", BACKGROUND)]),
    Claim("SFS and CSS together improve it", "fig. 6, bars", worse=[("without SFS and CSS", OBJMC)]),
    Claim("Without all three it is worst", "fig. 6, bars", worse=[("without ADSR, SFS and CSS", OBJMC)]),
    Claim("Switching beats every fixed cutoff", "fig. 7, bars",
          worse=[(f"cutoff {cutoff}", OBJMC) for cutoff in (0.2, 0.4, 0.6)]),
    Claim("Continuous ranges of cutoffs do as well", "table 6: 23.99 to 24.27 against 23.05",
          no_worse=[(f"cutoffs 0.1 to {high}", OBJMC) for high in (0.6, 0.7, 0.8)]),
    Claim("The number of neighbours hardly matters", "table 4: 25.88, 23.05, 24.37 for 3, 9, 18",
          no_worse=[(f"Ln {count}", OBJMC) for count in (3, 9, 18)]),
    Claim("The width of the map hardly matters", "table 5: 24.52, 23.65, 23.50, 24.70 for 0.5, 1, 1.5, 2",
          no_worse=[(f"alpha {alpha}", OBJMC) for alpha in (0.5, 1.5, 2)]),
    Claim("Two iterations already drag", "table 1: 27.67 for I = 2, 90.39 for I = 0",
          worse=[(WITHOUT, OBJMC), (WITHOUT, DAI)], no_worse=[("I 2", OBJMC)]),
    Claim("Four iterations drag further than three and two", "table 1: 23.05, 24.55, 27.67",
          worse=[("I 2", OBJMC), ("I 3", OBJMC)]),
    Claim("Without L_rec nothing is dragged", "table 3: 90.39, as without a drag", worse=[("without L_rec", OBJMC)]),
    Claim("Without L_cst the rest of the frame suffers", "table 3: FVD 949.06 against 596.51",
          worse=[("without L_cst", BACKGROUND)]),
    Claim("Without L_cst the object follows as well", "table 3: 20.87 against 26.12",
          no_worse=[("without L_cst", OBJMC)]),
    Claim("Context frames are needed", "fig. 16", worse=[("without context", DAI)]),
    Claim("Beyond the paper: SFS on keys before their rotation improves it", "the official code filters rotated keys",
          better=[("SFS before the rotation", OBJMC)]),
    Claim("Beyond the paper: tracks that follow the drag improve it", "its student takes no tracks",
          better=[("with tracks", OBJMC)]),
    Claim("Beyond the paper: a warm start improves it", "starts from the latents before the drag",
          better=[("with warm start", OBJMC)]),
    Claim("Beyond the paper: tracks and warm start drag further without the optimisation", "",
          better=[("tracks and warm start alone", OBJMC), ("tracks and warm start alone", DAI)]),
)  # fmt: skip


class DragAblation:
    """The benchmark; see the module's docstring."""

    Config = DragAblationConfig

    def __init__(self, cfg: DragAblationConfig) -> None:
        self.cfg = cfg

    def run(self, context: EvalContext) -> Outcome:
        """Drag every scenario with every variant and seed; a line per claim.

        Raises ValueError where the settings of `drag` optimise nothing: there would be no part to leave out.
        """
        if not context.drag.iterations:
            raise ValueError("drag.iterations=0 leaves nothing to ablate; use drag=paper")
        numbers = range(context.seed, context.seed + self.cfg.num_seeds)
        seeds = [self._of_seed(replace(context, seed=seed)) for seed in numbers]
        found = {name: over_seeds([one[name] for one in seeds]) for name in self.cfg.variants}
        results = Results(seed=context.seed, unit="scenarios")
        results.clips = [scenario.key for scenario in self._bench(context).scenarios(context)]
        for name, verdicts in found.items():
            put_verdicts(results, name.replace(".", ","), verdicts)
            results.add(f"{name.replace('.', ',')}.seconds_ratio", seconds_ratios(verdicts))
        same = same_as_full(context.drag, self.cfg.variants)
        findings = [self.finding(n, claim, found, context.seed, same) for n, claim in enumerate(CLAIMS, 1)]
        write_findings(context.out, findings)
        return Outcome(results, lambda: self._sections(findings, found))

    def _of_seed(self, context: EvalContext) -> dict[str, list[Verdict]]:
        """Verdicts by variant; read from OUT/seed_<n>.json where they were made with the same settings and weights."""
        path = context.out / f"seed_{context.seed}.json"
        variants = {name: VARIANTS[name] for name in self.cfg.variants}
        settings = [str(each) for each in (replace(self.cfg, num_seeds=1), context.drag, variants)]
        figures = list(Verdict.__dataclass_fields__)
        made_with = {"settings": settings, "figures": figures, **context.made_with(["student"])}
        made_with |= {"machine": speed_of_machine(context.device)}  # of `seconds`
        if (kept := read_kept(path, made_with)) is not None:
            return {name: [_verdict(figures) for figures in found] for name, found in kept["verdicts"].items()}
        found = self._verdicts(context)
        verdicts = {name: [_figures_of(each) for each in one] for name, one in found.items()}
        keep(path, made_with, verdicts=verdicts)
        return found

    def _verdicts(self, context: EvalContext) -> dict[str, list[Verdict]]:
        """One seed: verdicts by variant, in the order of the scenarios."""
        same = same_as_full(context.drag, self.cfg.variants)
        names = [name for name in self.cfg.variants if name != WITHOUT_CONTEXT and name not in same]
        found = self._drag(context, {name: replace(context.drag, **VARIANTS[name]) for name in names})
        found |= dict.fromkeys(same, found[FULL])
        if WITHOUT_CONTEXT in self.cfg.variants:
            alone = context.changed(rollout=replace(context.model_cfg.rollout, sink_chunks=0, window_chunks=0))
            found |= self._drag(alone, {WITHOUT_CONTEXT: context.drag})
        return found

    def _bench(self, context: EvalContext) -> DragBenchmark:
        cfg = self.cfg
        frames = MAX_NEIGHBOURS + 1  # the first of a video may be given: it is no neighbour
        opening = math.ceil(frames / context.model_cfg.rollout.chunk_frames)
        return DragBenchmark(
            DragBenchConfig(num_scenarios=cfg.num_scenarios, baselines=[], world=cfg.world,
                            hold_tracks=cfg.hold_tracks, opening_chunks=opening)
        )  # fmt: skip

    def _drag(self, context: EvalContext, settings: Mapping[str, DragConfig]) -> dict[str, list[Verdict]]:
        bench = self._bench(context)
        student, scenarios = context.load("student"), bench.scenarios(context)
        verdicts: dict[str, list[Verdict]] = {name: [] for name in settings}
        for runs, bases in bench.stream(context, student, scenarios, settings):
            for name, run in runs.items():
                verdicts[name].append(bench.judge(run, bases[name]))
        return verdicts

    def finding(
        self, row: int, claim: Claim, found: Mapping[str, Sequence[Verdict]], seed: int, same: Collection[str] = ()
    ) -> Finding:
        """One line of the table; variants that were left out, or are the ``same`` as the full method where a difference
        is asked for, leave their claims unmeasured.
        """
        if equal := sorted({name for name, _ in (*claim.worse, *claim.better)} & set(same)):
            return Finding(row, claim.claim, claim.paper, (), f"not measured: `drag` is itself {', '.join(equal)}")
        needed = {name for name, _ in (*claim.worse, *claim.no_worse, *claim.better)}
        needed |= {WITHOUT} if claim.no_worse else set()
        if missing := sorted(needed - set(found)):
            return Finding(row, claim.claim, claim.paper, (), f"not measured: {', '.join(missing)}")
        effects = [_worse(name, figure, found, seed) for name, figure in claim.worse]
        effects += [_within(name, figure, found, seed) for name, figure in claim.no_worse]
        effects += [_better(name, figure, found, seed) for name, figure in claim.better]
        return Finding(row, claim.claim, claim.paper, effects)

    def _sections(self, findings: Sequence[Finding], found: Mapping[str, Sequence[Verdict]]) -> list[Section]:
        columns = (OBJMC, DAI, BACKGROUND, "lost_ratio", "seconds")
        rows = [
            [name, *(mean_cell(_figures(column, verdicts), ".3g") for column in columns)]
            for name, verdicts in found.items()
        ]
        text = f"{self.cfg.num_scenarios} scenarios, means over {self.cfg.num_seeds} seeds; intervals over scenarios."
        return [Section("Claims", text, table_of(findings)), Section("Variants", table=Table(["", *columns], rows))]


def same_as_full(drag: DragConfig, variants: Sequence[str]) -> list[str]:
    """Variants that change nothing of these settings, as the nine neighbours of drag=paper."""
    others = [name for name in variants if name not in (FULL, WITHOUT_CONTEXT)]
    return [name for name in others if replace(drag, **VARIANTS[name]) == drag]


def over_seeds(seeds: Sequence[Sequence[Verdict]]) -> list[Verdict]:
    """One verdict per scenario, each figure its mean over the seeds that measured it; nan where none did."""
    names = Verdict.__dataclass_fields__
    figures = {name: mean_over_seeds([_figures(name, verdicts) for verdicts in seeds]) for name in names}
    return [Verdict(**{name: figures[name][n] for name in names}) for n in range(len(seeds[0]))]


def _figures_of(verdict: Verdict) -> dict[str, float | None]:
    return {name: value if math.isfinite(value) else None for name, value in asdict(verdict).items()}


def _verdict(figures: Mapping[str, float | None]) -> Verdict:
    return Verdict(**{name: as_float(value) for name, value in figures.items()})


Found = Mapping[str, Sequence[Verdict]]


def _figures(figure: str, verdicts: Sequence[Verdict]) -> list[float]:
    return [getattr(verdict, figure) for verdict in verdicts]


def _worse(name: str, figure: str, found: Found, seed: int) -> Effect:
    """How much worse the variant is than the full method."""
    pair = _figures(figure, found[name]), _figures(figure, found[FULL])
    return Effect(f"{name}, {figure} worse by", _difference(figure, *pair, seed))


def _better(name: str, figure: str, found: Found, seed: int) -> Effect:
    pair = _figures(figure, found[FULL]), _figures(figure, found[name])
    return Effect(f"{name}, {figure} better by", _difference(figure, *pair, seed))


def _within(name: str, figure: str, found: Found, seed: int) -> Effect:
    """How much of the gain over no drag the variant has beyond KEPT_RATIO of the full method's."""
    pairs = zip(_figures(figure, found[WITHOUT]), _figures(figure, found[FULL]))
    limit = [without - KEPT_RATIO * (without - full) for without, full in pairs]
    difference = paired_difference(limit, _figures(figure, found[name]), seed=seed)
    return Effect(f"{name}, {figure} gained beyond {KEPT_RATIO:g} of the full gain", difference)


def _difference(figure: str, worse: Sequence[float], other: Sequence[float], seed: int) -> Interval:
    """Paired; positive where the first is worse."""
    first, second = (other, worse) if figure == BACKGROUND else (worse, other)
    return paired_difference(first, second, seed=seed)
