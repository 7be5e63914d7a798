"""What a run says: metrics.jsonl, W&B, the progress line, alarms.

metrics.jsonl and W&B get the same records. After a resume the records behind the checkpoint are cut off, so that
the file reads as one uninterrupted run. W&B takes none back: its curves are drawn over the value `step` of the
records, and where a resumed run repeats a step they have two points. The id of its run is kept in the output folder,
so that a resumed run continues the same curves. It runs as WANDB_MODE says; without that online where WANDB_API_KEY
is set, else, and where it cannot be reached, offline (`wandb sync` uploads later).

Left out: what is measured (stages, eval/); the health measures of distillation (distill/health.py).
"""

from __future__ import annotations

import json
import logging
import math
import os
import time
import uuid
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from data.app import RunFailedError
from train.stage import ValidationOutput
from train.timing import duration

log = logging.getLogger(__name__)

KINDS = ("jsonl", "wandb")
TIMES = ("time/", "samples_per_second", "seconds_per_step")
VALIDATION = "validation/"  # begins the names of the metrics and videos of held-out clips


class AlarmError(RunFailedError):
    """A metric stayed beyond its limit; the message names it, its value and the limit."""


@dataclass
class Alarm:
    """Limits of one metric. It goes off after `patience` records in a row beyond them."""

    min: float | None = None
    max: float | None = None
    patience: int = 1  # records
    stop: bool = False  # end the run; else a warning and the metric alarm/<name> = 1

    def __post_init__(self) -> None:
        if self.patience < 1:
            raise ValueError(f"patience={self.patience} of an alarm must be at least 1 record")

    def beyond(self, value: float) -> bool:
        low = self.min is not None and value < self.min
        return low or (self.max is not None and value > self.max) or not math.isfinite(value)


@dataclass
class LoggerConfig:
    kind: str = "jsonl"  # jsonl | wandb (which writes metrics.jsonl too)
    project: str = "marionette"  # W&B
    entity: str | None = None  # W&B
    tags: list[str] = field(default_factory=list)  # W&B
    progress: bool = True  # a progress line where the terminal can show one
    alarms: dict[str, Alarm] = field(default_factory=dict)  # by metric name, e.g. teacher/loss

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"logger.kind={self.kind} must be one of {', '.join(KINDS)}")

    def require_measured(self, updates: Iterable[str]) -> None:
        """Raises ValueError for an alarm of a metric that a run which makes `updates` cannot have."""
        beginnings = (*dict.fromkeys(f"{name}/" for name in updates), VALIDATION, *TIMES)
        for name in self.alarms:
            if not name.startswith(beginnings):
                known = ", ".join(beginnings)
                raise ValueError(f"logger.alarms.{name}: this stage has no such metric; they begin with {known}")


class Monitor:
    """Writer of one run's records; made on the main process only. W&B hears of the run from `start` on."""

    def __init__(self, cfg: LoggerConfig, output_dir: Path, run_name: str, config: Any) -> None:
        self.cfg, self.output_dir = cfg, Path(output_dir)
        self.path = self.output_dir / "metrics.jsonl"
        self.last_validation: int | None = None  # step of the last one in the records that `start` kept
        self.run_name, self.config = run_name, config
        self._beyond: dict[str, int] = {}
        self._wandb: Any = None

    def start(self, step: int) -> None:
        """The run begins, or goes on, after `step` finished steps; a command that is refused does not come here."""
        self._cut_after(step)
        if self.cfg.kind == "wandb":
            self._wandb = _start_wandb(self.cfg, self.output_dir, self.run_name, self.config)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """One record after `step` finished steps. Raises AlarmError where an alarm says stop."""
        raised = self._alarms(metrics)
        record = {**metrics, **{f"alarm/{name}": 1.0 for name in raised}}
        finite = {name: value if math.isfinite(value) else None for name, value in record.items()}  # JSON has no nan
        line = {"step": step, "unix_seconds": round(time.time(), 3), **finite}
        with self.path.open("a") as file:
            file.write(json.dumps(line, allow_nan=False) + "\n")
        self._send(lambda run: run.log({"step": step, **record}))
        for name, message in raised.items():
            if self.cfg.alarms[name].stop:
                raise AlarmError(message)
            log.warning(message)

    def log_steps(self, done: int, last: int, metrics: Mapping[str, float], several: bool, bar: Any) -> None:
        """The record of the steps up to ``done`` of ``last``; its losses, of ``several`` modules or one, on the
        progress line, and in the log where there is none.
        """
        self.log(done, metrics)
        shown = {
            name.split("/", 1)[0] if several else "loss": value
            for name, value in metrics.items()
            if name.endswith("/loss")
        }
        bar.set_postfix({name: f"{value:.4g}" for name, value in list(shown.items())[:3]})
        if bar.disable:
            losses = ", ".join(f"{name} {value:.4g}" for name, value in shown.items())
            left = duration((last - done) * metrics["seconds_per_step"])
            told = [losses] if losses else []
            told += [f"{metrics['seconds_per_step']:.3g} s/step", f"{left} left"]
            log.info("step %d/%d: %s", done, last, ", ".join(told))

    def log_validation(self, step: int, output: ValidationOutput) -> None:
        """Its videos and, in a record of their own, its metrics."""
        folder = self.log_videos(step, output.videos, output.fps)
        self.log(step, {VALIDATION + name: float(value) for name, value in output.metrics.items()})
        told = ", ".join(f"{name} {value:.4g}" for name, value in output.metrics.items())
        log.info("validation at step %d: %s%s", step, told, f"; videos in {folder}" if folder else "")

    def log_videos(self, step: int, videos: Mapping[str, np.ndarray], fps: int) -> Path | None:
        """Write uint8 [T, H, W, 3] videos to validation/step_*/<name>.mp4 and to W&B."""
        if not videos:
            return None
        from data.video import write_video

        folder = self.output_dir / "validation" / f"step_{step:08d}"
        folder.mkdir(parents=True, exist_ok=True)
        for name, frames in videos.items():
            write_video(folder / f"{name}.mp4", frames, fps)
        if self._wandb is not None:
            import wandb

            sent = {VALIDATION + name: wandb.Video(str(folder / f"{name}.mp4"), format="mp4") for name in videos}
            self._send(lambda run: run.log({"step": step, **sent}))
        return folder

    def close(self, failed: bool = False) -> None:
        """A second call does nothing."""
        self._send(lambda run: run.finish(exit_code=int(failed)))
        self._wandb = None

    def _send(self, call: Callable[[Any], object]) -> None:
        """To W&B, whose helper process may have been stopped before this one: no reason to end the run."""
        if self._wandb is None:
            return
        try:
            call(self._wandb)
        except Exception as error:  # of any kind, as its transport is
            log.warning("W&B gets no more records (%s: %s); %s has them all", type(error).__name__, error, self.path)
            self._wandb = None

    def _alarms(self, metrics: Mapping[str, float | None]) -> dict[str, str]:
        raised = {}
        for name, alarm in self.cfg.alarms.items():
            if name not in metrics:
                continue
            found = metrics[name]
            value = math.nan if found is None else found  # as metrics.jsonl has it
            self._beyond[name] = self._beyond.get(name, 0) + 1 if alarm.beyond(value) else 0
            if self._beyond[name] >= alarm.patience:
                limits = f"min={alarm.min}, max={alarm.max}"
                raised[name] = f"alarm: {name}={value:.4g} is beyond {limits} ({alarm.patience} records)"
        return raised

    def _cut_after(self, step: int) -> None:
        """Drop records of what a resumed run will do again, and a torn last line; the others count for alarms."""
        if not self.path.exists():
            return
        kept = [line for line in self.path.read_text().splitlines() if self._is_kept(_record(line), step)]
        fresh = self.path.with_suffix(".jsonl.partial")
        fresh.write_text("".join(line + "\n" for line in kept))
        os.replace(fresh, self.path)
        for record in map(_record, kept):
            self._alarms(record)
            if any(name.startswith(VALIDATION) for name in record):
                self.last_validation = record["step"]

    def _is_kept(self, record: Mapping[str, Any], step: int) -> bool:
        """Not of a later step, nor a validation of `step` that stopped the run: the same command stops there again."""
        stopped = any(
            alarm.stop and name.startswith(VALIDATION) and f"alarm/{name}" in record
            for name, alarm in self.cfg.alarms.items()
        )
        at = record.get("step", math.inf)
        return at < step or (at == step and not stopped)


def _record(line: str) -> dict[str, Any]:
    try:
        return json.loads(line)
    except ValueError:
        return {}  # the process was killed while writing this line


def _start_wandb(cfg: LoggerConfig, output_dir: Path, run_name: str, config: Any) -> Any:
    try:
        import wandb
    except ImportError as error:
        raise ImportError("logger=wandb needs the package wandb: pip install wandb, or use logger=jsonl") from error
    start = partial(
        wandb.init, project=cfg.project, entity=cfg.entity, tags=list(cfg.tags), name=run_name, config=config,
        dir=str(output_dir), id=_wandb_id(output_dir), resume="allow",
    )  # fmt: skip
    try:
        run = start(mode=_wandb_mode(os.environ))
    except wandb.Error as error:
        log.warning("W&B refused to start (%s); it runs offline, `wandb sync` uploads later", error)
        wandb.teardown()  # its service still holds the run that failed to start, and refuses the id to another
        run = start(mode="offline")
    run.define_metric("step")
    run.define_metric("*", step_metric="step")
    return run


def _wandb_id(output_dir: Path) -> str:
    """That of the run in this folder; a copy of it is another run, with an id of its own."""
    file, place = output_dir / "wandb_id", str(output_dir.resolve())
    found = file.read_text().splitlines() if file.exists() else []
    if found[1:] == [place]:
        return found[0]
    if found:
        log.warning("%s was copied from %s: it gets a W&B run of its own", output_dir, found[-1])
    own = uuid.uuid4().hex[:8]
    file.write_text(f"{own}\n{place}\n")
    return own


def _wandb_mode(environment: Mapping[str, str]) -> Literal["online", "offline"] | None:
    """None leaves it to WANDB_MODE."""
    if environment.get("WANDB_MODE"):
        return None
    return "online" if environment.get("WANDB_API_KEY") else "offline"


class MetricWindow:
    """Means of scalars since the last record: over micro-batches, steps and (in `merge`) processes."""

    def __init__(self) -> None:
        self._sums: dict[str, tuple[float | Tensor, int | Tensor]] = {}

    def add(self, metrics: Mapping[str, float | Tensor], prefix: str = "") -> None:
        """Tensors are kept on their device: reading them here would stall it. What is not finite is left out: the
        trainer skips such an update, and one would spoil the mean.
        """
        for name, value in metrics.items():
            total, count = self._sums.get(prefix + name, (0.0, 0))
            if isinstance(value, Tensor):
                finite = value.detach().isfinite()
                kept = value.detach().where(finite, torch.zeros_like(value))
                self._sums[prefix + name] = (total + kept, count + finite)
            else:
                known = math.isfinite(value)
                self._sums[prefix + name] = (total + (value if known else 0.0), count + known)

    def state_dict(self) -> dict[str, list[float]]:
        return {name: [float(total), int(count)] for name, (total, count) in self._sums.items()}

    def load_state_dict(self, state: Mapping[str, list[float]]) -> None:
        self._sums = {name: (total, int(count)) for name, (total, count) in state.items()}

    def clear(self) -> None:
        self._sums = {}

    @staticmethod
    def merge(states: list[dict[str, list[float]]]) -> dict[str, float]:
        """Means over the states of all processes; nan where nothing finite was seen."""
        sums: dict[str, list[float]] = {}
        for state in states:
            for name, (total, count) in state.items():
                merged = sums.setdefault(name, [0.0, 0])
                merged[0] += total
                merged[1] += count
        return {name: total / count if count else math.nan for name, (total, count) in sums.items()}
