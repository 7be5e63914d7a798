"""What a training stage is. The trainer knows no stage, and no stage knows accelerate.

The loop (`train/trainer.py`), for each step:

    for name in stage.updates(step):                    # ["critic"], every fifth time ["student", "critic"]
        for micro in range(accumulation):
            output = stage.train_step(batch, context)   # under autocast
            for loss in output.losses:                  # lazily: one graph at a time
                backward(loss / accumulation)
        clip, optimizer[name].step(), EMA[name].update()

A stage holds its modules unwrapped in `setup`, lists the trainable ones in `modules`, and gets them back,
possibly sharded, through `use`. All its randomness comes from `SetupContext.noise`, keyed by purpose, step
and sample id, so that a resumed run, and a run on another number of processes, draws the same numbers.

Left out: the config dataclass of a stage (`Stage.Config`, beside each stage).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor, nn

from data.app import RunFailedError
from data.batch import Batch
from models.diffusion.noise import KeyedNoise

if TYPE_CHECKING:
    from models.assemble import ModelConfig


class RunEndedError(RunFailedError):
    """A stage ends the run, on all processes at once; the message says why, and what to try."""


@dataclass(frozen=True)
class SetupContext:
    """What a stage is built from."""

    model_cfg: ModelConfig
    device: torch.device
    dtype: torch.dtype  # of the autocast: torch.bfloat16 or torch.float32; weights stay float32
    output_dir: Path
    noise: KeyedNoise  # the only source of randomness of the stage
    validation_batch: Batch | None = None  # fixed held-out clips on the CPU; None: nothing to validate on
    sample_clips: Callable[[int], Iterator[Batch]] | None = None  # n training clips, evenly spaced, in micro-batches
    data: str | None = None  # tells the training clips and their order from others; None: without data


@dataclass(frozen=True)
class StepContext:
    """Where the loop is when `train_step` is called."""

    step: int  # optimizer step, from 0
    update: str  # module that is updated by this pass
    micro: int  # micro-batch within the accumulation, from 0
    rank: int
    world: int
    seed: int
    micro_batch: int = 1  # clips per process and pass, for stages that bring their own data
    accumulation: int = 1  # micro-batches of the update

    @property
    def is_last_micro(self) -> bool:
        return self.micro == self.accumulation - 1


@dataclass
class StepOutput:
    """losses: one scalar, or an iterator of scalars whose sum is the loss; each is differentiated when
    yielded.

    metrics: scalars to log (averaged over micro-batches and processes); may be filled while the iterator
    runs. num_losses: how many the iterator yields, if known: gradients are then exchanged once, after the
    last one.
    """

    losses: Tensor | Iterator[Tensor]
    metrics: dict[str, float | Tensor] = field(default_factory=dict)
    num_losses: int | None = None


@dataclass
class ValidationOutput:
    metrics: dict[str, float] = field(default_factory=dict)
    videos: dict[str, np.ndarray] = field(default_factory=dict)  # name -> uint8 [T, H, W, 3]
    fps: int = 16  # frames per second of the videos


class Stage(Protocol):
    """One training stage: constructed from its `Config`, then `setup`, then driven by the loop above."""

    needs_data: bool  # False: train_step is called with an empty batch

    def setup(self, context: SetupContext) -> None:
        """Load or build every module, on context.device. Raises ValueError for what does not fit together."""

    def modules(self) -> dict[str, nn.Module]:
        """The trainable modules by name; each gets its own optimizer, schedule and EMA."""

    def use(self, modules: Mapping[str, nn.Module]) -> None:
        """Take the modules back as prepared for this launch (same names)."""

    def updates(self, step: int) -> list[str]:
        """Which modules are updated in this step, in this order. The same on all processes."""

    def train_step(self, batch: Batch, context: StepContext) -> StepOutput:
        """The loss of one micro-batch for the module context.update."""

    def validate(self, step: int) -> ValidationOutput | None:
        """Metrics and videos of the held-out batch; under no_grad, with EMA weights where they are on."""

    def state_dict(self) -> dict[str, Any]:
        """What else must survive a resume: tensors, numbers, strings, lists and dicts of them."""

    def load_state_dict(self, state: Mapping[str, Any]) -> None: ...

    def export(self, folder: Path, weights: Mapping[str, nn.Module]) -> None:
        """Write the result for the next stage to `folder`/<module name>, whole or not at all (main process
        only).

        `weights` are the modules, with EMA values where the EMA is on.
        """


@runtime_checkable
class ReadsFields(Protocol):
    """For a stage that needs data: which fields it wants of shards that hold `available`. Called before `setup`."""

    def data_fields(self, model_cfg: ModelConfig, available: Sequence[str]) -> list[str]: ...


@runtime_checkable
class DescribesItself(Protocol):
    """Optional for a stage: lines for the plan printed at the start (guidance, frozen parts, tokens per
    clip).
    """

    def describe(self) -> list[str]: ...


@runtime_checkable
class ChecksConfig(Protocol):
    """Optional for a stage: refuse a configuration before anything is built, by ValueError."""

    def check(self, model_cfg: ModelConfig) -> None: ...
