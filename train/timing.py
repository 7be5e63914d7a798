"""Where the seconds of a training step go, and how long the rest will take.

Left out: what is logged of it, and when (trainer.py).
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from train.accelerator import Parallel


class Timer:
    """Adds the seconds of its block to `seconds[part]` (and takes them off `exclude`)."""

    def __init__(
        self,
        seconds: dict[str, float],
        part: str,
        parallel: Parallel | None = None,
        exclude: str | None = None,
    ) -> None:
        self.seconds, self.part, self.parallel, self.exclude = seconds, part, parallel, exclude

    def __enter__(self) -> None:
        self.start = time.perf_counter()

    def __exit__(self, *exc: object) -> None:
        if self.parallel is not None:
            self.parallel.synchronize()
        spent = time.perf_counter() - self.start
        self.seconds[self.part] += spent
        if self.exclude is not None:
            self.seconds[self.exclude] -= spent


class Clock:
    """Steps and seconds since the last lap."""

    def __init__(self, step: int) -> None:
        self.step, self.time = step, time.perf_counter()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """The block is no part of the steps."""
        start = time.perf_counter()
        yield
        self.time += time.perf_counter() - start

    def lap(self, step: int) -> tuple[int, float]:
        steps, seconds = step - self.step, time.perf_counter() - self.time
        self.step, self.time = step, time.perf_counter()
        return steps, max(seconds, 1e-9)


def duration(seconds: float) -> str:
    """Hours and minutes, as in "1 h 05 min"; below an hour the minutes alone."""
    minutes = round(seconds / 60)
    return f"{minutes // 60} h {minutes % 60:02d} min" if minutes >= 60 else f"{minutes} min"
