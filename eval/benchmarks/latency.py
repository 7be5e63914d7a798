"""How long a chunk takes, how long until the first frame, and whether either grows with the stream.

Paper: MotionStream section 5 (latency = wall clock of one chunk with its decoding; throughput = frames over
that time). One stream of `num_chunks` chunks runs through `StreamSession`, as a user's would. The cost of
chunk n over that of chunk 20 (medians of 20 chunks each) and the growth of memory between them say whether an
endless stream is possible. Random weights give the same timings as trained ones. Leaves out the network and
the browser.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import psutil
import torch

from eval.benchmarks.context import EvalContext, Outcome, progress_bar
from eval.report import Section, line_figure
from eval.results import Results
from models.condition import FRAMES_PER_LATENT
from models.motion.tracks import Tracks
from stream.session import StreamSession
from stream.session_state import ChunkTiming

REFERENCE_CHUNK = 20  # early, but past warm-up and the filling of the cache
SPAN = 20  # chunks whose median stands for one
MIB = 2**20


@dataclass
class LatencyConfig:
    """Length of the stream."""

    num_chunks: int = 400  # chunks streamed and timed
    warmup_chunks: int = 3  # at the start, left out of the percentiles (allocation, kernel selection)

    def __post_init__(self) -> None:
        least = REFERENCE_CHUNK + SPAN // 2 + SPAN
        if self.num_chunks < least:
            raise ValueError(
                f"bench.num_chunks={self.num_chunks} must be at least {least}, to compare the last {SPAN} with those "
                f"around chunk {REFERENCE_CHUNK}"
            )
        if not 0 <= self.warmup_chunks < self.num_chunks:
            raise ValueError(f"bench.warmup_chunks={self.warmup_chunks} must be in 0..{self.num_chunks - 1}")


class Latency:
    """The benchmark; see the module's docstring."""

    Config = LatencyConfig

    def __init__(self, cfg: LatencyConfig) -> None:
        self.cfg = cfg

    def run(self, context: EvalContext) -> Outcome:
        """Stream, and report percentiles, throughput and growth."""
        return self.run_in_turn([context])[0]

    def run_in_turn(self, contexts: Sequence[EvalContext]) -> list[Outcome]:
        """A stream of each, on one device, a chunk of each in turn: what else the machine does meets them alike.

        One more stream makes the same chunk again in every round: growth is growth beyond that one's. The memory is
        that of all, and reported only where there is one stream.
        """
        device = contexts[0].device
        if device.type == "cuda":  # the peak is that of these streams, not that of what ran before them
            torch.cuda.reset_peak_memory_stats(device)
        opened = [self._open(context) for context in contexts]
        control = Control(self._open(contexts[0])[0]) if len(contexts) > 1 else None
        timings, pace, memory = self._stream([session for session, _ in opened], control, device)
        outcomes = []
        for context, (_, seconds), of_chunks in zip(contexts, opened, timings, strict=True):
            results = Results(seed=context.seed, unit="chunks")
            self._put_times(results, of_chunks, pace, seconds)
            if len(contexts) == 1:
                self._put_memory(results, memory, device)
            outcomes.append(Outcome(results, partial(self._sections, context, results, of_chunks, memory)))
        return outcomes

    def _open(self, context: EvalContext) -> tuple[StreamSession, float]:
        """A session, and the seconds that it took to open."""
        codecs, clip = context.codecs, context.model_cfg.clip
        student = context.load("student")
        started = codecs.clock()
        num_latents = self.cfg.num_chunks * context.model_cfg.rollout.chunk_frames
        session = StreamSession(
            student,
            codecs,
            first_frame=np.full((clip.height, clip.width, 3), 127, np.uint8),
            prompt="",
            tracks=_still_grid(context),
            num_frames=1 + FRAMES_PER_LATENT * (num_latents - 1),  # a growing window needs a cache for all of them
            seed=context.seed,
        )
        return session, codecs.clock() - started

    def _stream(
        self, sessions: Sequence[StreamSession], control: Control | None, device: torch.device
    ) -> tuple[list[list[ChunkTiming]], list[float], list[int]]:
        """The timings of each session's chunks; seconds of the control's chunk, 1 without one, and the memory in use,
        both after each round.
        """
        timings: list[list[ChunkTiming]] = [[] for _ in sessions]
        pace, memory = [], []
        with progress_bar(self.cfg.num_chunks, "stream", "chunk") as bar:
            for _ in range(self.cfg.num_chunks):
                for session, of_chunks in zip(sessions, timings):
                    session.next_chunk()
                    of_chunks.append(session.timing)
                pace.append(1.0 if control is None else control.seconds())
                memory.append(used_memory(device))
                bar.update()
        return timings, pace, memory

    def _put_times(self, results: Results, timings: list[ChunkTiming], pace: Sequence[float], opened: float) -> None:
        steady = timings[self.cfg.warmup_chunks :]
        seconds = np.array([timing.total_seconds for timing in steady])
        frames = sum(timing.num_frames for timing in steady)
        results.add("student.chunk_seconds", seconds.tolist())
        results.add("student.denoise_seconds", [timing.denoise_seconds for timing in steady])
        results.add("student.seconds_per_frame", [timing.total_seconds / timing.num_frames for timing in steady])
        for percent in (50, 95, 99):
            results.put(f"student.chunk_seconds_p{percent}", float(np.percentile(seconds, percent)))
        results.put("student.first_frame_seconds", opened + timings[0].total_seconds)
        results.put("student.frames_per_second", frames / float(seconds.sum()))
        without_decode = sum(timing.total_seconds - timing.decode_seconds for timing in steady)
        results.put("student.frames_per_second_without_decoding", frames / without_decode)
        for part in ("condition", "denoise", "decode"):
            results.put(
                f"student.{part}_seconds_p50",
                statistics.median(vars(timing)[f"{part}_seconds"] for timing in steady),
            )
        results.put(growth_key(len(timings)), growth(timings, pace))
        results.put("num_chunks", len(timings))

    def _put_memory(self, results: Results, memory: list[int], device: torch.device) -> None:
        kind = "device" if device.type == "cuda" else "resident"
        peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else max(memory)
        results.put(f"student.peak_{kind}_mib", peak / MIB)
        reference = statistics.median(memory[REFERENCE_CHUNK - SPAN // 2 : REFERENCE_CHUNK + SPAN // 2])
        results.put(f"student.{kind}_growth_mib", (statistics.median(memory[-SPAN:]) - reference) / MIB)

    def _sections(
        self, context: EvalContext, results: Results, timings: list[ChunkTiming], memory: list[int]
    ) -> list[Section]:
        rollout: Any = context.model_cfg.rollout
        index = list(range(len(timings)))
        curves = [
            line_figure(
                {
                    "chunk": (index, [timing.total_seconds for timing in timings]),
                    "denoise": (index, [timing.denoise_seconds for timing in timings]),
                    "decode": (index, [timing.decode_seconds for timing in timings]),
                },
                x_label="chunk",
                y_label="seconds",
                caption="Wall clock of every chunk.",
            ),
            line_figure(
                {"memory": (index, [used / MIB for used in memory])},
                x_label="chunk",
                y_label="MiB",
                caption="Memory in use after every chunk.",
            ),
        ]
        cached = ", the last of which is cached" if rollout.merged_cache else " and one cache pass"
        text = (
            f"One stream, {rollout.chunk_frames} latent frames a chunk, {rollout.sink_chunks} sink and "
            f"{rollout.window_chunks} window chunks, {len(rollout.step_indices)} denoising passes{cached}, on "
            f"{context.device.type}."
        )
        return [Section("Latency", text, results.others(), curves)]


class Control:
    """A stream that is set back after each chunk: what its time does is the machine's doing, not the stream's."""

    def __init__(self, session: StreamSession) -> None:
        for _ in range(REFERENCE_CHUNK // 2):
            session.next_chunk()
        self._session, self._state = session, session.snapshot()

    def seconds(self) -> float:
        """Of the chunk, made again."""
        self._session.restore(self._state)
        self._session.next_chunk()
        return self._session.timing.total_seconds


def growth(timings: Sequence[ChunkTiming], pace: Sequence[float]) -> float:
    """Median of the last chunks' seconds over the median around chunk `REFERENCE_CHUNK`, each by the control's then."""
    seconds = [timing.total_seconds / control for timing, control in zip(timings, pace, strict=True)]
    around = seconds[REFERENCE_CHUNK - SPAN // 2 : REFERENCE_CHUNK + SPAN // 2]
    return statistics.median(seconds[-SPAN:]) / statistics.median(around)


def growth_key(num_chunks: int) -> str:
    """Name of the figure `growth` of a stream of so many chunks."""
    return f"student.chunk_{num_chunks}_over_chunk_{REFERENCE_CHUNK}"


def used_memory(device: torch.device) -> int:
    """Bytes in use now: allocated on the accelerator, or resident in this process."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    return psutil.Process().memory_info().rss


def _still_grid(context: EvalContext) -> Tracks:
    """A grid of tracks that stands still and is held: the cost does not depend on where tracks go."""
    clip, cell = context.model_cfg.clip, context.codecs.cell_px
    y, x = torch.meshgrid(
        torch.arange(cell / 2, clip.height, 2 * cell),
        torch.arange(cell / 2, clip.width, 2 * cell),
        indexing="ij",
    )
    points = torch.stack([x.flatten(), y.flatten()], dim=-1)[None]
    return Tracks.from_arrays(points, torch.ones(points.shape[:2], dtype=torch.bool), clip.height, clip.width)
