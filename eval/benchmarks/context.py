"""What every benchmark is given, and what it hands back."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from tqdm import tqdm

from eval.report import Section
from eval.results import Results
from models.assemble import ModelConfig, load_for_inference
from models.diffusion.noise import KeyedNoise
from models.wan.dit import WanDiT
from stream.codecs import Codecs
from stream.dragstream.config import DragConfig

LOG_INTERVAL = 60.0  # seconds between two lines of progress


@dataclass(frozen=True)
class EvalContext:
    """The model under test and the run's settings."""

    model_cfg: ModelConfig
    codecs: Codecs
    device: torch.device
    seed: int
    out: Path  # folder of this run's results
    drag: DragConfig = field(default_factory=DragConfig)  # how drags are made

    def changed(self, **changes: Any) -> EvalContext:
        """The same weights under other settings of the model: guidance, rollout, teacher, student."""
        model_cfg = replace(self.model_cfg, **changes)
        return replace(self, model_cfg=model_cfg, codecs=self.codecs.under(model_cfg))

    def with_tiny_decoder(self) -> EvalContext:
        """The same model, decoding with model.tiny_vae."""
        return replace(self, codecs=Codecs.load(self.model_cfg, device=self.device, tiny=True))

    @property
    def noise(self) -> KeyedNoise:
        return KeyedNoise(self.seed)

    def load(self, role: str) -> WanDiT:
        """The weights of "teacher" or "student" on the device."""
        return load_for_inference(self.model_cfg, role, self.device)


@dataclass(frozen=True)
class Outcome:
    """Figures and the pages that show them."""

    results: Results
    sections: list[Section]


class Benchmark(Protocol):
    """Constructed from its `Config`; conf/bench/<name>.yaml names the class."""

    def run(self, context: EvalContext) -> Outcome: ...


@contextmanager
def progress_bar(total: int, what: str, unit: str = "clip") -> Iterator[tqdm]:
    """A bar on a terminal, a line every LOG_INTERVAL seconds in a log file."""
    look: dict[str, Any] = {"leave": False}
    if not sys.stderr.isatty():
        line = f"{{desc}}: {{n_fmt}} of {{total_fmt}} {unit}s after {{elapsed}}, {{remaining}} left\n"
        look = {"mininterval": LOG_INTERVAL, "maxinterval": LOG_INTERVAL, "bar_format": line}
    with tqdm(total=total, desc=what, unit=unit, **look) as bar:
        yield bar
