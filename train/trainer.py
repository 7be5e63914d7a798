"""The one training loop. It knows no stage; a stage knows no accelerate.

Batch sizes are stated once, globally: `global_batch` clips per update whatever the number of processes, made
of `micro_batch` clips at a time; the accumulation follows, and a combination that has none is refused. The
same command run again resumes from the last good checkpoint and continues as if it had not been interrupted.

Left out: what is learned (stages), sharding (`accelerator.py`), the files of a checkpoint (`checkpoint.py`).
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from data.app import EXIT_INTERRUPTED, RunFailedError
from data.batch import Batch
from data.loader import Loader
from train import checkpoint
from train.accelerator import Parallel
from train.ema import Ema
from train.monitor import AlarmError, MetricWindow, Monitor
from train.optim import OptimConfig, build_optimizer, learning_rate
from train.preemption import PreemptionSignal
from train.stage import RunEndedError, Stage, StepContext, StepOutput
from train.state import fill_optimizer, full_state, optimizer_state, plain
from train.timing import Clock, Timer

log = logging.getLogger(__name__)

EXIT_REQUEUE = 75  # EX_TEMPFAIL: preempted with a checkpoint on the disk, run the same command again
EXPORT = "export"  # folder in output_dir of what the next stage reads
MAX_NONFINITE = 10  # skipped updates of a module in a row before the run is given up


@dataclass
class TrainConfig:
    """conf/train.yaml."""

    model: Any = None  # models.assemble.ModelConfig
    stage: Any = None  # the Config of a stage
    data: Any = None  # data.loader.LoaderConfig
    optim: Any = None  # train.optim.OptimConfig
    logger: Any = None  # train.monitor.LoggerConfig
    shards: str = ""  # folder of shards with index.json, made by `python -m data`
    validation_shards: str | None = None  # held-out clips; null = no validation
    name: str = "run"  # of the run, within model.name
    output_dir: str = "outputs/run"  # everything the run writes
    seed: int = 0  # of weights, data order and noise
    steps: int = 1000
    global_batch: int = 8  # clips per update, over all processes
    micro_batch: int = 8  # clips per process and backward pass
    precision: str = "auto"  # of the autocast: bf16 | fp32 | auto, the faster on the device; weights are always float32
    device: str = "auto"  # auto | cpu | cuda
    log_every: int = 10  # steps
    validate_every: int = 0  # steps; 0 = at the end only, negative = never
    validation_clips: int = 4  # held-out clips
    checkpoint_every: int = 500  # steps; the end always writes one
    keep_last: int = 2  # checkpoints
    keep_every: int = 0  # steps: checkpoints at multiples of it are kept, and exported to exports/step_…; 0 = none
    resume: str = "auto"  # auto: continue from the last good checkpoint | never: refuse a used output_dir

    def __post_init__(self) -> None:
        if self.seed < 0:
            raise ValueError(f"seed={self.seed} must be >= 0")
        counts = ("steps", "global_batch", "micro_batch", "log_every", "checkpoint_every", "keep_last")
        for name in (*counts, "validation_clips"):
            if vars(self)[name] < 1:
                raise ValueError(f"{name}={vars(self)[name]} must be at least 1")
        if self.keep_every % self.checkpoint_every:
            raise ValueError(
                f"keep_every={self.keep_every} must be a multiple of checkpoint_every={self.checkpoint_every}, or 0: "
                "only a checkpoint that is written can be kept"
            )
        if self.resume not in ("auto", "never"):
            raise ValueError(f"resume={self.resume} must be auto or never")


def accumulation_of(global_batch: int, micro_batch: int, world: int) -> int:
    """Micro-batches per update and process. Raises ValueError, naming what would work, if there is none."""
    accumulation, rest = divmod(global_batch, micro_batch * world)
    if rest == 0 and accumulation:
        return accumulation
    if global_batch % world == 0:
        share = global_batch // world
        fitting = [n for n in range(1, share + 1) if share % n == 0]
        raise ValueError(
            f"micro_batch={micro_batch} must divide global_batch={global_batch} / {world} processes = "
            f"{share}; valid: {', '.join(map(str, fitting))}"
        )
    unit = micro_batch * world
    nearest = [n for n in (global_batch // unit * unit, (global_batch // unit + 1) * unit) if n]
    raise ValueError(
        f"global_batch={global_batch} must be a multiple of micro_batch={micro_batch} x {world} processes = "
        f"{unit}; valid: global_batch={' or '.join(map(str, nearest))}, or a number of processes that "
        f"divides {global_batch}"
    )


@dataclass
class _Counters:
    step: int = 0  # finished steps
    updates: dict[str, int] = field(default_factory=dict)  # per module
    nonfinite: dict[str, int] = field(default_factory=dict)  # per module: skipped updates in a row


class Trainer:
    """Runs one stage: `Trainer(cfg, …).fit()` returns the exit code of the process."""

    def __init__(
        self,
        cfg: TrainConfig,
        optim: OptimConfig,
        stage: Stage,
        parallel: Parallel,
        loader: Loader | None,
        monitor: Monitor | None = None,
        identity: dict[str, Any] | None = None,
        config: dict[str, Any] | None = None,
    ) -> None:
        """`stage` has been set up; `loader` is None where it needs no data; `monitor` only on the main
        process.

        `identity`: what must not change between a checkpoint and its resume (stage, architecture, seed).
        `config`: the whole configuration; what of it has changed is told at a resume.
        """
        self.cfg, self.optim_cfg, self.stage, self.parallel = cfg, optim, stage, parallel
        self.loader, self.monitor, self.identity = loader, monitor, identity or {}
        self.config = config or {}
        self.output_dir = Path(cfg.output_dir)
        self.accumulation = accumulation_of(cfg.global_batch, cfg.micro_batch, parallel.world)
        self.modules: dict[str, nn.Module] = parallel.prepare(stage.modules())
        self.stage.use(self.modules)
        self.settings = {name: optim.of(name) for name in self.modules}
        self.optimizers = {name: self._optimizer(name) for name in self.modules}
        self.num_updates = {name: self._num_updates(name) for name in self.modules}
        self.emas = {n: Ema(s.ema_decay, s.ema_start) for n, s in self.settings.items() if s.ema_decay > 0}
        self.counters = _Counters(updates=dict.fromkeys(self.modules, 0))
        self.store = checkpoint.CheckpointStore(self.output_dir / "checkpoints", cfg.keep_last, cfg.keep_every)
        self.window = MetricWindow()
        self._clock = Clock(0)  # of the steps, without checkpoints and validations
        self._saved: int | None = None  # step of the last checkpoint
        self._exported: int | None = None  # step of the last export, finished and still there; the same on all ranks
        self._settings_differ = False  # from those of the checkpoint that the run goes on from; the same on all ranks
        self._validated: int | None = None  # step of the last validation
        self._seconds = {"data": 0.0, "forward_backward": 0.0, "optimizer": 0.0}

    # ------------------------------------------------------------------------------------------ the loop
    def fit(self) -> int:
        """Train up to cfg.steps, then save, export and validate. Returns 0, EXIT_REQUEUE after a preemption, or
        EXIT_INTERRUPTED after Ctrl-C.
        """
        self.resume()
        if self.monitor is not None:
            self.monitor.start(self.counters.step)
        self._validated = self.parallel.from_main(self.monitor.last_validation if self.monitor is not None else None)
        batches = self._batches()
        clock = self._clock = Clock(self.counters.step)
        with PreemptionSignal() as signal, self._progress() as bar:
            while (code := self._between_steps(signal)) is None:
                try:
                    self.train_one_step(batches)
                except RunEndedError:
                    self._log(clock, bar, self.counters.step + 1)  # what led to it
                    raise
                self.counters.step += 1
                bar.update(1)
                if self.counters.step % self.cfg.log_every == 0 or self.counters.step == self.cfg.steps:
                    self._log(clock, bar, self.counters.step)
        return code

    def _between_steps(self, signal: PreemptionSignal) -> int | None:
        """Save, then validate, where the step is due; the exit code where the run ends here.

        A run that was stopped between the two resumes here, and so makes up for the validation.
        """
        step, is_last = self.counters.step, self.counters.step >= self.cfg.steps
        if is_last or (step > 0 and step % self.cfg.checkpoint_every == 0):
            self.save()
        if self._is_validation_due() and not self.parallel.any(signal.received):
            self.validate()
        if is_last and not self._is_validation_due():
            return 0
        if not self.parallel.any(signal.received):
            return None
        if step != self._saved:
            self.save()
        by_user = self.parallel.any(signal.interrupted is not None)
        log.warning(
            "%s: step %d is saved; the same command continues it", "interrupted" if by_user else "preempted", step
        )
        if self.monitor is not None:
            self.monitor.close()  # may upload for a while
        self.parallel.barrier()  # a launcher stops the others, one of whom exports and uploads, when one has left
        return EXIT_INTERRUPTED if by_user else EXIT_REQUEUE

    def _is_validation_due(self) -> bool:
        step, every = self.counters.step, self.cfg.validate_every
        if every < 0 or step in (0, self._validated):
            return False
        return step >= self.cfg.steps or (every > 0 and step % every == 0)

    def train_one_step(self, batches: Iterator[Batch]) -> None:
        """One pass over the modules that this step updates."""
        for name in self.stage.updates(self.counters.step):
            with Timer(self._seconds, "forward_backward", self.parallel):
                for micro in range(self.accumulation):
                    with Timer(self._seconds, "data", exclude="forward_backward"):
                        batch = next(batches)
                    self._micro_step(name, micro, batch)
            if name in self.modules:
                with Timer(self._seconds, "optimizer", self.parallel):
                    self._apply(name)

    def _micro_step(self, name: str, micro: int, batch: Batch) -> None:
        context = StepContext(
            self.counters.step, name, micro, self.parallel.rank, self.parallel.world, self.cfg.seed,
            self.cfg.micro_batch, self.accumulation,
        )  # fmt: skip
        with self.parallel.autocast():
            output = self.stage.train_step(batch, context)
        total: Tensor | None = None
        for loss, last in self._losses(output):
            if name in self.modules:
                self.parallel.backward(self.modules[name], loss / self.accumulation, last and context.is_last_micro)
            total = loss.detach() if total is None else total + loss.detach()
        measured: dict[str, float | Tensor] = {} if total is None else {"loss": total}
        self.window.add(measured | output.metrics, prefix=f"{name}/")

    def _losses(self, output: StepOutput) -> Iterator[tuple[Tensor, bool]]:
        """(loss, whether gradients are exchanged after it); a lazy loss is built under autocast when asked
        for.
        """
        if isinstance(output.losses, Tensor):
            yield output.losses, True
            return
        index = 0
        losses = iter(output.losses)
        while True:
            with self.parallel.autocast():
                loss = next(losses, None)
            if loss is None:
                break
            index += 1
            yield loss, output.num_losses is None or index == output.num_losses
        if output.num_losses not in (None, index):
            raise RuntimeError(f"the stage announced num_losses={output.num_losses} and gave {index}")

    def _apply(self, name: str) -> None:
        module, optimizer, settings = self.modules[name], self.optimizers[name], self.settings[name]
        rate = learning_rate(self.counters.updates[name], settings, self.num_updates[name])
        self.parallel.finish_gradients(module)
        norm = self.parallel.clip(module, settings.grad_clip)
        self.window.add({"grad_norm": norm, "lr": rate}, prefix=f"{name}/")
        if not math.isfinite(norm):
            self._skip(name, norm)
        else:
            self.counters.nonfinite[name] = 0
            if self.parallel.mode != "deepspeed":  # there the engine stepped in `backward`
                optimizer.step()
            self.counters.updates[name] += 1
            if name in self.emas:
                self.emas[name].update(module)
        optimizer.zero_grad(set_to_none=True)
        self._set_rate(name)

    def _skip(self, name: str, norm: float) -> None:
        self.window.add({"skipped": 1.0}, prefix=f"{name}/")
        in_a_row = self.counters.nonfinite.get(name, 0) + 1
        self.counters.nonfinite[name] = in_a_row
        log.warning("step %d: gradient norm of %s is %s; update skipped", self.counters.step, name, norm)
        if in_a_row >= MAX_NONFINITE:
            raise RunFailedError(
                f"{MAX_NONFINITE} updates in a row had a gradient that is not finite ({name}, step "
                f"{self.counters.step}); lower optim.lr or try precision=fp32. Last good checkpoint: "
                f"{self.store.last_good()}"
            )

    # ------------------------------------------------------------------------------------------ building
    def _optimizer(self, name: str) -> Any:
        whole = self.parallel.mode in ("single", "ddp")
        optimizer = build_optimizer(self.modules[name], self.settings[name], whole)
        return self.parallel.prepare_optimizer(self.modules[name], optimizer, self.settings[name].grad_clip)

    def _num_updates(self, name: str) -> int:
        """Of a module in the whole run: where its schedule ends. Not every step updates every module."""
        return sum(name in self.stage.updates(step) for step in range(self.cfg.steps))

    def _set_rate(self, name: str) -> None:
        """Before each update, not after the last: under DeepSpeed the step is made inside `backward`."""
        rate = learning_rate(self.counters.updates[name], self.settings[name], self.num_updates[name])
        for group in self.optimizers[name].param_groups:
            group["lr"] = rate * group["lr_ratio"]

    def _batches(self) -> Iterator[Batch]:
        if self.loader is None:
            while True:
                yield Batch([], [], [])
        for batch in self.loader:
            yield batch.to(self.parallel.device)

    def _progress(self) -> Any:
        from tqdm import tqdm

        shown = self.monitor is not None and self.monitor.cfg.progress
        return tqdm(
            total=self.cfg.steps, initial=self.counters.step, desc=self.cfg.name, unit="step",
            dynamic_ncols=True,
            disable=None if shown else True,
        )  # fmt: skip

    # ------------------------------------------------------------------------------------------ telling
    def _log(self, clock: Clock, bar: Any, done: int) -> None:
        """Means of the steps up to number ``done`` since the last time. A collective."""
        metrics = MetricWindow.merge(self.parallel.gather(self.window.state_dict()))
        self.window.clear()
        steps, seconds = clock.lap(done)
        metrics["samples_per_second"] = steps * self.cfg.global_batch / seconds
        metrics["seconds_per_step"] = seconds / steps
        for part, spent in self._seconds.items():
            metrics[f"time/{part}_seconds"] = spent / steps
            self._seconds[part] = 0.0
        with self.parallel.raised_everywhere(AlarmError):
            if self.monitor is not None:
                self.monitor.log_steps(done, self.cfg.steps, metrics, len(self.modules) > 1, bar)

    def validate(self) -> None:
        """The stage's validation with EMA weights, written by the main process."""
        self._validated = self.counters.step
        with self._clock.paused():
            self._validate()

    def _validate(self) -> None:
        with self._ema_weights(), torch.no_grad(), self.parallel.autocast():
            output = self.stage.validate(self.counters.step)
        with self.parallel.raised_everywhere(AlarmError):
            if output is not None and self.monitor is not None:
                self.monitor.log_validation(self.counters.step, output)

    # ------------------------------------------------------------------------------------------ state
    def save(self) -> None:
        """Write a checkpoint, unless this step has one, and export the weights. A collective.

        Where settings are not those of the checkpoint, what was exported with those stays: these may give other weights
        (optim.ema_decay) or measure other data (the latents of stage=vae).
        """
        step = self.counters.step
        if step == self._saved == self._exported and self._settings_differ:
            return
        with self._clock.paused():
            if step != self._saved:
                self._write_checkpoint(step)
                self._saved = step
            with self.store.exporting(step) if self.parallel.is_main else nullcontext():
                self.export()
                if self.cfg.keep_every and step % self.cfg.keep_every == 0:
                    self.export(Path("exports") / self.store.path(step).name)
            self._exported = step

    def _write_checkpoint(self, step: int) -> None:
        keep = self.parallel.is_main
        tensors = {
            "modules": {name: full_state(module.state_dict(), keep) for name, module in self.modules.items()},
            "optimizers": {} if self.parallel.mode == "deepspeed" else {
                name: optimizer_state(self.modules[name], self.optimizers[name], keep) for name in self.modules
            },
            "ema": {name: full_state(ema.values, keep) for name, ema in self.emas.items()},
            "stage": plain(self.stage.state_dict(), keep),
        }  # fmt: skip
        windows = self.parallel.gather(self.window.state_dict())
        trainer = {
            "step": step, "updates": self.counters.updates, "nonfinite": self.counters.nonfinite,
            "ema_updates": {name: ema.updates for name, ema in self.emas.items()},
            "loader": self.loader.state_dict() if self.loader is not None else None,
            "windows": windows, "identity": self.identity, "config": self.config, "mode": self.parallel.mode,
            "world": self.parallel.world,
        }  # fmt: skip
        if self.parallel.is_main:
            self.store.clear_partial(step)
        self.parallel.barrier()
        self.parallel.save_engine(self.store.partial_path(step))
        self.parallel.barrier()
        if self.parallel.is_main:
            path = self.store.save(step, tensors, trainer)
            log.info("checkpoint %s", path)
        self.parallel.barrier()

    def resume(self) -> None:
        """Continue from the last good checkpoint, if there is one and cfg.resume allows it."""
        path = self.parallel.from_main(self.store.last_good() if self.parallel.is_main else None)
        if path is None:
            for name in self.modules:
                self._set_rate(name)
            return
        if self.cfg.resume == "never":
            raise ValueError(f"resume=never, but {path} exists; choose another output_dir or use resume=auto")
        tensors, trainer = checkpoint.load(path)
        self._require_same(path, trainer["identity"])
        self.stage.load_state_dict(tensors["stage"])  # first, for it may refuse to go on
        self.parallel.load_modules(self.modules, tensors["modules"])
        self._load_optimizers(path, tensors, trainer)
        for name, ema in self.emas.items():
            ema.load(self.modules[name], tensors["ema"].get(name, {}), trainer["ema_updates"].get(name, 0))
        if self.loader is not None:
            self.loader.load_state_dict(trainer["loader"])
        windows = trainer["windows"]
        self.window.load_state_dict(windows[self.parallel.rank] if self.parallel.rank < len(windows) else {})
        self.counters = _Counters(trainer["step"], dict(trainer["updates"]), dict(trainer["nonfinite"]))
        self._saved = step = self.counters.step
        is_exported = self.parallel.is_main and self.store.is_exported(step) and (self.output_dir / EXPORT).is_dir()
        self._exported = step if self.parallel.from_main(is_exported) else None
        for name in self.modules:
            self._set_rate(name)
        log.info("resumed from %s at step %d", path, step)
        changed = checkpoint.changed_fields(trainer["config"], self.config)
        self._settings_differ = self.parallel.from_main(bool(changed))
        if self.parallel.is_main:
            self._tell_changes(path, "; ".join(changed))

    def _tell_changes(self, path: Path, changed: str) -> None:
        """Say which settings are not those of the checkpoint, and that a run which is finished does not train."""
        step = self.counters.step
        if step >= self.cfg.steps:
            exported = " or exported, though" if step == self._exported else "; what is not exported yet is now, where"
            log.warning(
                "the run in %s is finished at step %d: nothing is trained%s. To train on set steps to more than %d; to "
                "train anew set another output_dir",
                self.output_dir, step, f"{exported} settings differ ({changed})" if changed else "", step,
            )  # fmt: skip
        elif changed:
            log.warning("settings differ from those of %s and hold from here on: %s", path, changed)
            if "stage.init_from" in changed:
                log.warning("stage.init_from changes nothing: the weights are those of %s", path)

    def _load_optimizers(self, path: Path, tensors: dict[str, Any], trainer: dict[str, Any]) -> None:
        if self.parallel.mode == "deepspeed" or trainer["mode"] == "deepspeed":
            if trainer["mode"] != self.parallel.mode:
                raise ValueError(
                    f"{path} was written in launch mode {trainer['mode']}, this is {self.parallel.mode}; "
                    "DeepSpeed's optimizer state can only be resumed by DeepSpeed"
                )
            if trainer["world"] != self.parallel.world:
                raise ValueError(
                    f"{path} was written by {trainer['world']} processes, these are {self.parallel.world}; DeepSpeed's "
                    "optimizer state can only be resumed by as many"
                )
            self.parallel.load_engine(path)
            return
        there, here = ((config.get("optim") or {}).get("kind") for config in (trainer["config"], self.config))
        if there and here and there != here:
            raise ValueError(
                f"{path} was trained with optim.kind={there}, this is {here}, whose moments mean something else; set "
                f"another output_dir, and stage.init_from to what {self.output_dir} exported"
            )
        for name, optimizer in self.optimizers.items():
            fill_optimizer(self.modules[name], optimizer, tensors["optimizers"][name])

    def _require_same(self, path: Path, identity: dict[str, Any]) -> None:
        # an encoder whose weights were not on the machine that wrote it has no fingerprint there
        there = {key: identity.get(key, own) for key, own in self.identity.items()}
        if differing := checkpoint.changed_fields(there, self.identity):
            raise ValueError(f"{path} is of another run ({'; '.join(differing)}); choose another name or output_dir")

    def export(self, folder: str | Path = EXPORT) -> None:
        """Write <output_dir>/<folder> with EMA weights where they are on. A collective."""
        with self._ema_weights(), self.parallel.whole_modules(self.modules) as whole:
            if self.parallel.is_main:
                self.stage.export(self.output_dir / folder, whole)
        self.parallel.barrier()

    def close(self, failed: bool = False) -> None:
        """End the logs and leave the process group."""
        if self.monitor is not None:
            self.monitor.close(failed)
        self.parallel.close()

    def _ema_weights(self) -> ExitStack:
        stack = ExitStack()
        for name, ema in self.emas.items():
            stack.enter_context(ema.swapped(self.modules[name]))
        return stack
