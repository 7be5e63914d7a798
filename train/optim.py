"""The optimizer per module, its learning rate as a function of that module's own updates, gradient clipping,
EMA settings.

The schedule is a pure function of the update counter, so a resume needs the counter only. In distillation the
student is updated every fifth step: its warm-up, its cosine and its EMA count its own updates, not steps.

Left out: parameter groups. Weight decay applies to every parameter, as in the public Wan recipes.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass, field, fields, replace

import torch
from torch import nn


@dataclass
class ModuleOptim:
    """Settings of one module that differ from the rest; null takes the value of all modules."""

    lr: float | None = None  # peak learning rate
    betas: list[float] | None = None
    weight_decay: float | None = None
    grad_clip: float | None = None  # largest gradient norm; 0 = no clipping
    warmup_updates: int | None = None
    ema_decay: float | None = None  # 0 = no EMA
    ema_start: int | None = None  # updates


@dataclass
class OptimConfig:
    kind: str = "adamw"  # adamw | muon (train/muon.py: matrices by Muon, the rest by AdamW; not under sharding)
    lr: float = 1e-5  # peak learning rate
    matrix_lr_ratio: float = 10.0  # muon: learning rate of matrices over lr
    betas: list[float] = field(default_factory=lambda: [0.9, 0.999])
    eps: float = 1e-8
    weight_decay: float = 0.01
    grad_clip: float = 1.0  # largest gradient norm; 0 = no clipping
    warmup_updates: int = 0  # updates with a linearly rising learning rate
    schedule: str = "constant"  # constant | cosine, after the warm-up
    decay_updates: int | None = None  # updates until the cosine ends; null = as many as the run makes of the module
    min_lr_ratio: float = 0.0  # of the peak, where the cosine ends
    ema_decay: float = 0.999  # 0 = no EMA
    ema_start: int = 0  # updates before the average starts
    modules: dict[str, ModuleOptim] = field(default_factory=dict)  # exceptions by module name

    def __post_init__(self) -> None:
        if self.kind not in ("adamw", "muon"):
            raise ValueError(f"optim.kind={self.kind} must be adamw or muon")
        if self.schedule not in ("constant", "cosine"):
            raise ValueError(f"optim.schedule={self.schedule} must be constant or cosine")
        _check("optim.", self)
        for name, settings in self.modules.items():
            _check(f"optim.modules.{name}.", settings)

    def require_trained(self, modules: Collection[str]) -> None:
        """Raises ValueError for an exception of a module that is not among `modules`, those that a stage trains."""
        for name in self.modules:
            if name not in modules:
                trained = ", ".join(modules) or "none"
                raise ValueError(f"optim.modules.{name}: this stage trains no module '{name}'; it trains: {trained}")

    def of(self, module: str) -> OptimConfig:
        """The settings of one module, its exceptions merged in."""
        exceptions = self.modules.get(module, ModuleOptim())
        changed = {f.name: vars(exceptions)[f.name] for f in fields(exceptions)}
        return replace(self, modules={}, **{k: v for k, v in changed.items() if v is not None})


def _check(prefix: str, settings: OptimConfig | ModuleOptim) -> None:
    def require(name: str, ok: bool, rule: str) -> None:
        value = vars(settings)[name]
        if value is not None and not ok:
            raise ValueError(f"{prefix}{name}={value} must be {rule}")

    require("lr", (settings.lr or 0) >= 0, ">= 0")
    require("weight_decay", (settings.weight_decay or 0) >= 0, ">= 0")
    require("grad_clip", (settings.grad_clip or 0) >= 0, ">= 0; 0 switches clipping off")
    require("ema_decay", 0 <= (settings.ema_decay or 0) < 1, "in [0, 1); 0 switches the EMA off")
    require("warmup_updates", (settings.warmup_updates or 0) >= 0, ">= 0")
    if isinstance(settings, OptimConfig):
        require("matrix_lr_ratio", settings.matrix_lr_ratio > 0, "> 0")
        require("eps", settings.eps > 0, "> 0")
        require("min_lr_ratio", 0 <= settings.min_lr_ratio <= 1, "in [0, 1]")
        decay_updates = settings.decay_updates
        require("decay_updates", decay_updates is None or decay_updates >= 1, "at least 1, or null")
    require("ema_start", (settings.ema_start or 0) >= 0, ">= 0")
    betas = [0.0, 0.0] if settings.betas is None else settings.betas
    require("betas", len(betas) == 2 and all(0 <= beta < 1 for beta in betas), "two numbers in [0, 1)")


def learning_rate(update: int, cfg: OptimConfig, total_updates: int) -> float:
    """Learning rate of update `update` (from 0) of a module."""
    if update < cfg.warmup_updates:
        return cfg.lr * (update + 1) / cfg.warmup_updates
    if cfg.schedule == "constant":
        return cfg.lr
    end = max(cfg.decay_updates or total_updates, cfg.warmup_updates + 1)
    progress = min(1.0, (update - cfg.warmup_updates) / (end - cfg.warmup_updates))
    return cfg.lr * (cfg.min_lr_ratio + (1 - cfg.min_lr_ratio) * 0.5 * (1 + math.cos(math.pi * progress)))


def build_optimizer(module: nn.Module, cfg: OptimConfig, whole: bool) -> torch.optim.Optimizer:
    """Optimizer over the parameters of `module` that require a gradient; `whole`: they are not sharded.

    Each parameter group keeps lr_ratio, its learning rate relative to cfg.lr. Raises ValueError if there is
    nothing to train, or for muon on shards.
    """
    if not any(parameter.requires_grad for parameter in module.parameters()):
        raise ValueError(f"{type(module).__name__} has no parameter that requires a gradient; nothing to train")
    if cfg.kind == "muon":
        optimizer = _build_muon(module, cfg, whole)
    else:
        parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(
            parameters, lr=cfg.lr, betas=(cfg.betas[0], cfg.betas[1]), eps=cfg.eps,
            weight_decay=cfg.weight_decay, fused=whole,
        )  # fmt: skip
    for group in optimizer.param_groups:
        group["lr_ratio"] = group["lr"] / cfg.lr if cfg.lr else 1.0
    return optimizer


def _build_muon(module: nn.Module, cfg: OptimConfig, whole: bool) -> torch.optim.Optimizer:
    from train.muon import Muon

    if not whole:
        raise ValueError("optim.kind=muon needs whole matrices on each process; use optim.kind=adamw with this launch")
    return Muon(
        module.named_parameters(), cfg.lr, matrix_lr_ratio=cfg.matrix_lr_ratio,
        betas=(cfg.betas[0], cfg.betas[1]),
        weight_decay=cfg.weight_decay, eps=cfg.eps,
    )  # fmt: skip
