"""`python -m eval`: one benchmark of one model; writes metrics.json, meta.json and report.html."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf

from data.app import build_config, build_target, claim, require_folder
from eval.benchmarks.context import EvalContext, Outcome
from eval.report import write_report
from models.assemble import validate
from models.device import pick_device
from stream.codecs import DECODERS, Codecs
from stream.provenance import machine


@dataclass
class EvalConfig:
    """What every benchmark shares; its own fields are in conf/bench."""

    out: str = "outputs/eval"  # folder of metrics.json, meta.json and report.html
    output_dir: str = "outputs/eval/run"  # Hydra's own files
    decoder: str = "full"  # full | tiny (model.tiny_vae)
    device: str = "auto"  # auto | cpu | cuda
    seed: int = 0  # of the noise, the track identities and the bootstrap
    model: Any = None
    bench: Any = None
    drag: Any = None  # conf/drag: how drags are made, for bench=drag
    experiment: Any = None

    def __post_init__(self) -> None:
        if self.decoder not in DECODERS:
            raise ValueError(f"decoder={self.decoder} must be {' or '.join(DECODERS)}")


def main(cfg: DictConfig) -> int:
    """Entry of `python -m eval`."""
    settings, model_cfg = build_config(cfg, EvalConfig), build_config(cfg.model)
    validate(model_cfg)
    require_folder(Path(settings.out), f"out={settings.out}")
    benchmark, device = build_target(cfg.bench), pick_device(settings.device)
    with claim(Path(settings.out), f"out={settings.out}"):
        model_cfg = model_cfg.on(device)
        codecs = Codecs.load(model_cfg, device=device, tiny=settings.decoder == "tiny")
        out = Path(settings.out)
        outcome = benchmark.run(EvalContext(model_cfg, codecs, device, settings.seed, out, build_config(cfg.drag)))
        _show(cfg, outcome, out, device)
    return 0


def _show(cfg: DictConfig, outcome: Outcome, out: Path, device: torch.device) -> None:
    """Write what was found, and print it."""
    config: Any = OmegaConf.to_container(cfg, resolve=True)
    outcome.results.write(out, config, device)
    found = machine(device)
    report = write_report(
        out / "report.html",
        outcome.sections(),
        title=f"{cfg.bench.name}: {cfg.model.name}",
        note=f"{found['gpu'] or found['processor']}, {found['threads']} threads, torch "
        f"{found['torch']}, seed {cfg.seed}",
    )
    for table in (outcome.results.by_role(), outcome.results.others()):
        print(table.as_text())
    print(f"{out / 'metrics.json'}\n{report}")
