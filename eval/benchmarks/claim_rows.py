"""The rows of the claims table: what the paper says, its figures, and the observations that decide.

A row says in code what counts as holding, before anything is measured. Thresholds come from the paper's own figures
(MotionStream, arXiv 2511.01266; rows 15 to 18 go beyond it). Names are those of RUNS below and of the ablations in
train/ablations.py, "base" being the student and teacher that these vary.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass

from eval.benchmarks.claims import Effect, Finding, NotMeasuredError, Observations, Run
from eval.benchmarks.latency import REFERENCE_CHUNK, growth_key

TEACHER, STUDENT = {"roles": ["teacher"]}, {"roles": ["student"]}
PAPER_TEACHER = {  # as table 1 times it; judged between its clips, not beside them: a stream is timed alone too
    **TEACHER, "num_inference_steps": 50, "num_clips": 8, "batch_size": 1, "num_workers": 0,
}  # fmt: skip
WINDOWS = (1, 2, 3, 6)  # chunks
PAPER_WEIGHTS = {"text": 3.0, "motion": 1.5}  # its setting; the zoo's own is model.guidance

RUNS = {
    "joint": Run("motion_transfer", TEACHER),
    "paper_teacher": Run("motion_transfer", PAPER_TEACHER, is_timed=True),
    "both_weights": Run("motion_transfer", TEACHER, guidance=PAPER_WEIGHTS),
    "text_only": Run("motion_transfer", TEACHER, guidance={**PAPER_WEIGHTS, "motion": 0.0}),
    "motion_only": Run("motion_transfer", TEACHER, guidance={**PAPER_WEIGHTS, "text": 0.0}),
    "student": Run("motion_transfer", {**STUDENT, "withhold_tracks": True}),
    "steps_1": Run("motion_transfer", STUDENT, rollout={"step_indices": [0]}),
    "steps_2": Run("motion_transfer", STUDENT, rollout={"step_indices": [0, 12]}),
    "steps_4": Run("motion_transfer", STUDENT, rollout={"step_indices": [0, 6, 12, 18]}),
    "tiny": Run("motion_transfer", STUDENT, tiny=True),
    "latency": Run("latency"),
    "latency_growing": Run("latency", rollout={"window_chunks": None}),
    "latency_tiny": Run("latency", tiny=True),
    "latency_own_pass": Run("latency", rollout={"merged_cache": False}),
    "latency_merged": Run("latency", rollout={"merged_cache": True}),
}


@dataclass(frozen=True)
class Row:
    """One finding: ``effects`` measures it."""

    number: int
    claim: str
    paper: str
    effects: Callable[[Observations], list[Effect]]

    def find(self, observations: Observations) -> Finding:
        """Measure it; what is absent is said in the finding."""
        try:
            return Finding(self.number, self.claim, self.paper, self.effects(observations))
        except NotMeasuredError as absent:
            return Finding(self.number, self.claim, self.paper, (), str(absent))


def _guidance(seen: Observations) -> list[Effect]:
    """At the paper's weights: at the zoo's, whose text weight was chosen by its error, neither has much to correct."""
    accuracy = "text accuracy, joint minus motion guidance alone"
    return [
        seen.less("EPE without motion guidance minus joint (px)", "both_weights", "text_only", "teacher.epe_px"),
        seen.more(accuracy, "both_weights", "motion_only", "teacher.text_accuracy"),
    ]


def _student(seen: Observations) -> list[Effect]:
    teacher, student = seen.values("joint", "teacher.epe_px"), seen.values("student", "student.epe_px")
    psnr = zip(seen.values("student", "student.psnr_db"), seen.values("joint", "teacher.psnr_db"), strict=True)
    slow = seen.figure("paper_teacher", "teacher.frames_per_second")
    speed = seen.figure("latency", "student.frames_per_second") / slow
    return [
        seen.effect("1.46 x teacher EPE minus student EPE (px)", _margin(teacher, student, 1.46)),
        seen.effect("student PSNR minus teacher PSNR + 1.15 (dB)", [ours - theirs + 1.15 for ours, theirs in psnr]),
        seen.figure_effect("a stream's frames per second over the paper's teacher's, minus 21", speed - 21),
    ]


def _track_encoding(seen: Observations) -> list[Effect]:
    by_head, by_vae = seen.track_encoding_seconds()
    return [
        seen.less("EPE of RGB tracks minus track head (px)", "base_teacher", "rgb_tracks", "teacher.epe_px"),
        seen.effect("encoding time, RGB over head, minus 1", _ratio_margin(by_vae, by_head, 1.0)),
    ]


def _sink(seen: Observations) -> list[Effect]:
    """One student trained with random sinks and windows, as figure 6 has it: it knows streams without a sink."""
    return [
        seen.less(what, f"random_context_{length}", f"random_context_{length}_no_sink", "student.epe_px")
        for what, length in (("EPE without sink minus with, 241 frames (px)", "long"),
                             ("the same over 1,000 frames (px)", "very_long"))
    ]  # fmt: skip


def _window(seen: Observations) -> list[Effect]:
    """The student of `_sink`; over all windows at once, by the slope of the least squares."""
    names = [f"random_context_long{'' if window == 1 else f'_window_{window}'}" for window in WINDOWS]
    middle = statistics.mean(WINDOWS)
    spread = sum((window - middle) ** 2 for window in WINDOWS)

    def slope(*errors: float) -> float:
        return sum((window - middle) * error for window, error in zip(WINDOWS, errors, strict=True)) / spread

    what = "EPE over 241 frames for each further window chunk, of 1, 2, 3 and 6 (px)"
    return [
        seen.compared(what, names, "student.epe_px", slope),
        seen.less("EPE over 241 frames with window 6 minus window 1 (px)", names[0], names[-1], "student.epe_px"),
    ]


def _chunk(seen: Observations) -> list[Effect]:
    fast, slow = (seen.values(f"{name}_latency", "student.seconds_per_frame") for name in ("base", "chunk_1"))
    return [
        seen.less("EPE of chunk 1 minus chunk 3, 241 frames (px)", "chunk_3_long", "chunk_1_long", "student.epe_px"),
        seen.less("lpips_sprites of the same", "chunk_3_long", "chunk_1_long", "student.lpips_sprites"),
        seen.effect("seconds a frame, chunk 1 over chunk 3, minus 1", _ratio_margin(slow, fast, 1.0)),
    ]


def _latency(seen: Observations) -> list[Effect]:
    """What c3s1w1 grows by is beyond what a stream does that makes the same chunk in every round."""
    fixed, growing = (seen.values(name, "student.chunk_seconds") for name in ("latency", "latency_growing"))
    late = seen.figure("latency", growth_key(int(seen.figure("latency", "num_chunks"))))
    return [
        seen.effect("relative spread of chunk times, growing window minus c3s1w1",
                    _differences(_spread(growing), _spread(fixed))),
        seen.figure_effect(f"1.05 minus the last chunks' time over those around chunk {REFERENCE_CHUNK}, c3s1w1",
                           1.05 - late),
    ]  # fmt: skip


def _steps(seen: Observations) -> list[Effect]:
    """The figure shows LPIPS; here its counterpart in the sprites network's features."""
    one, two, four = (seen.values(f"steps_{n}", "student.lpips_sprites") for n in (1, 2, 4))
    three = seen.values("student", "student.lpips_sprites")
    second = [(a - b) - (b - c) for a, b, c in zip(two, three, four, strict=True)]
    return [
        seen.effect("lpips_sprites of 1 step minus 3 steps", _differences(one, three)),
        seen.effect("lpips_sprites of 2 steps minus 3 steps", _differences(two, three)),
        seen.effect("gain of the third step minus gain of the fourth", second),
    ]


def _tiny(seen: Observations) -> list[Effect]:
    full, tiny = (seen.values(name, "student.chunk_seconds") for name in ("latency", "latency_tiny"))
    return [
        seen.effect("throughput, tiny over full, minus 1.75", _paired_margin(full, tiny, 1.75)),
        seen.compared(
            "PSNR, tiny minus full, + 0.3 (dB)",
            ("tiny", "student"),
            "student.psnr_db",
            lambda tiny, full: tiny - full + 0.3,
        ),
    ]


def _release(seen: Observations) -> list[Effect]:
    key = "teacher.registration_correlation"
    return [seen.more("likeness of the sprite after release, with minus without", "mid_mask", "no_mid_mask", key)]


def _ode(seen: Observations) -> list[Effect]:
    return [seen.less("EPE without ODE initialisation minus with (px)", "base_student", "no_ode", "student.epe_px")]


def _rolling(seen: Observations) -> list[Effect]:
    """The section has no figures. It is about drift, which a picture shows: a stream that has drifted may well follow
    its tracks, so table 4's other metric decides.
    """
    what = "lpips_sprites of chunk 1 over 241 frames, trained with all the past minus rolling cache"
    return [seen.less(what, "chunk_1_long", "chunk_1_all_the_past_long", "student.lpips_sprites")]


def _positions(seen: Observations) -> list[Effect]:
    """As `_rolling`."""
    what = "lpips_sprites over 481 frames, absolute minus slot positions"
    return [seen.less(what, "zoo_longer", "zoo_longer_absolute", "student.lpips_sprites")]


def _withheld(seen: Observations) -> list[Effect]:
    pairs = zip(
        seen.values("student", "student.epe_without_tracks_px"), seen.values("student", "student.epe_px"), strict=True
    )
    return [seen.effect("EPE without tracks minus with (px)", [without - given for without, given in pairs])]


def _merged(seen: Observations) -> list[Effect]:
    slow, fast = (seen.values(f"latency_{name}", "student.denoise_seconds") for name in ("own_pass", "merged"))
    return [
        seen.compared(
            "1.1 x EPE with its own cache pass minus merged (px)",
            ("base_student", "merged_cache"),
            "student.epe_px",
            _within_a_tenth,
        ),
        seen.effect("denoising time, own pass over merged, minus 1", _paired_margin(slow, fast, 1.0)),
    ]


def _causal_teacher(seen: Observations) -> list[Effect]:
    what = "1.1 x EPE from ODE pairs minus EPE from a causal teacher (px)"
    return [seen.compared(what, ("base_student", "causal_teacher"), "student.epe_px", _within_a_tenth)]


def _random_contexts(seen: Observations) -> list[Effect]:
    return [
        seen.compared("1.1 x EPE of the c3s1w1 student minus the random one's, at c3s1w1 (px)",
                      ("base_student", "random_context"), "student.epe_px", _within_a_tenth),
        seen.less("EPE over 241 frames at window 2, c3s1w1 student minus the random one (px)",
                  "random_context_long_window_2", "base_long_window_2", "student.epe_px"),
    ]  # fmt: skip


def _offsets(seen: Observations) -> list[Effect]:
    return [seen.less("EPE of floored tracks minus sub-cell (px)", "offsets", "base_teacher", "teacher.epe_px")]


def _within_a_tenth(reference: float, ours: float) -> float:
    return 1.1 * reference - ours


def _margin(reference: list[float], ours: list[float], factor: float) -> list[float]:
    """factor * reference - ours, clip by clip."""
    return [factor * theirs - mine for theirs, mine in zip(reference, ours, strict=True)]


def _differences(first: list[float], second: list[float]) -> list[float]:
    return [a - b for a, b in zip(first, second, strict=True)]


def _ratio_margin(numerator: list[float], denominator: list[float], factor: float) -> list[float]:
    """Each numerator over the median denominator, minus factor."""
    middle = statistics.median(denominator)
    return [value / middle - factor for value in numerator]


def _paired_margin(numerator: list[float], denominator: list[float], factor: float) -> list[float]:
    """Of what was timed in turn: each numerator over its own denominator, minus factor."""
    return [above / below - factor for above, below in zip(numerator, denominator, strict=True)]


def _spread(seconds: list[float]) -> list[float]:
    """Distance of each from the median, relative to it."""
    middle = statistics.median(seconds)
    return [abs(value - middle) / middle for value in seconds]


ROWS = [
    Row(1, "Motion guidance lowers EPE, text guidance makes what only the text says happen; joint has both",
        "Fig. 4, 5: w_t = 3, w_m = 1.5", _guidance),
    Row(2, "The student keeps the teacher's quality at a multiple of its speed",
        "Table 1: EPE 7.80 / 5.35 = 1.46, PSNR -0.41 and -1.15 dB, 16.7 / 0.79 = 21 x", _student),
    Row(3, "A track head beats drawing tracks as RGB through the VAE, at a fraction of the time",
        "Table 3: EPE 6.54 against 8.57, 24.8 against 1,053 ms", _track_encoding),
    Row(4, "Without a sink long videos degrade",
        "Table 4: EPE 25.34 with, 26.64 without; Fig. 6, A3", _sink),
    Row(5, "A longer window degrades long videos", "Fig. 6 (a): window 1 is best", _window),
    Row(6, "Chunk size 1 is worse than 3 over long videos, and slower",
        "Table 4: EPE 76.21 against 25.34, LPIPS 0.597 against 0.464", _chunk),
    Row(7, "c3s1w1 has a constant latency, a growing context has not", "Table 4: 0.70 +- 0.01 s; Fig. 6 (b, c)",
        _latency),
    Row(8, "Three steps: fewer are worse, a fourth adds little", "Fig. A2 (b), by LPIPS", _steps),
    Row(9, "The tiny VAE raises throughput and hardly changes quality",
        "Table A2: 1.75 x, PSNR 16.67 and 16.68", _tiny),
    Row(10, "Mid-frame masking in training keeps an object whose tracks are released", "Section 3.1", _release),
    Row(11, "ODE initialisation helps Self-Forcing", "Section 3.2", _ode),
    Row(12, "The rolling cache and sink must be used in training, not only at inference", "Section 3.3", _rolling),
    Row(13, "Slot positions outlast absolute ones past the training length", "Section 3.3", _positions),
    Row(14, "Withholding the motion raises the error", "Table A4", _withheld),
    Row(15, "Beyond the paper: the cache pass merged into the last denoising step costs at most a tenth of the EPE",
        "four passes a chunk", _merged),
    Row(16, "Beyond the paper: a causal teacher, which needs no ODE pairs, is as good a start within a tenth",
        "public reports call causal ODE targets ill-posed", _causal_teacher),
    Row(17, "Beyond the paper: one student trained with random sinks and windows serves several of them", "Fig. 6",
        _random_contexts),
    Row(18, "Beyond the paper: sub-cell track offsets lower EPE", "eq. 1 floors a track to its cell", _offsets),
]  # fmt: skip
