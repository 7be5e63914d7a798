"""What every benchmark is given, and what it hands back."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from data.encode import fingerprint, fingerprints
from eval.report import Section
from eval.results import Results
from models.assemble import ModelConfig, load_for_inference, located
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

    def made_with(self, roles: Sequence[str], *, tiny: bool = False) -> dict[str, Any]:
        """What figures depend on beside a benchmark's settings, as JSON; weights are known by their content.

        Args:
            roles: "teacher" and/or "student", whose weights are read.
            tiny: the decoder will be model.tiny_vae; otherwise it is that of `codecs`.
        """
        cfg, tiny = self.model_cfg, tiny or self.codecs.decoder is not self.codecs.vae
        paths = {role: {"teacher": cfg.teacher, "student": cfg.student}[role] for role in roles}
        paths |= {"tiny_vae": cfg.tiny_vae} if tiny else {}
        return {
            "model": str(cfg),
            "seed": self.seed,
            "device": self.device.type,
            "decoder": "tiny" if tiny else "full",
            "weights": fingerprints(cfg) | {name: content_of(path) for name, path in paths.items()},
        }


@dataclass(frozen=True)
class Outcome:
    """Figures, and what makes the pages that show them: called when the figures are safe."""

    results: Results
    sections: Callable[[], list[Section]]


def content_of(path: str | None) -> str | None:
    """Hash of the files at a path, cheap for large ones; None where nothing is there."""
    path = path and located(path)
    return fingerprint(path) if path is not None and Path(path).exists() else None


@contextmanager
def progress_bar(total: int, what: str, unit: str = "clip") -> Iterator[tqdm]:
    """A bar on a terminal, a line every LOG_INTERVAL seconds in a log file."""
    look: dict[str, Any] = {"leave": False}
    if not sys.stderr.isatty():
        line = f"{{desc}}: {{n_fmt}} of {{total_fmt}} {unit}s after {{elapsed}}, {{remaining}} left\n"
        look = {"mininterval": LOG_INTERVAL, "maxinterval": LOG_INTERVAL, "bar_format": line}
    with tqdm(total=total, desc=what, unit=unit, **look) as bar:
        yield bar
