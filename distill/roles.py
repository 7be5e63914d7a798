"""The three models of distillation, all of one class.

* student: the causal few-step generator that is being made    (Self-Forcing: generator)
* teacher: the frozen bidirectional model, with guidance       (Self-Forcing: real_score)
* critic:  follows the student's own distribution, no guidance (Self-Forcing: fake_score)

Left out: training them.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from models.assemble import ModelConfig, load_exported, load_role
from models.rollout import RolloutConfig
from models.wan.dit import WanDiT

log = logging.getLogger(__name__)

STUDENT = "student"
TEACHER = "teacher"
CRITIC = "critic"


def require_weights(model_cfg: ModelConfig, init_from: str | None = None, needs_teacher: bool = True) -> None:
    """Refuses, before anything is built, a teacher or ``init_from`` that is not there."""
    if needs_teacher and not model_cfg.teacher:
        raise ValueError("model.teacher is not set; set it to the folder that stage=teacher exported")
    if needs_teacher and not Path(str(model_cfg.teacher)).exists():
        raise FileNotFoundError(f"model.teacher={model_cfg.teacher} does not exist; run stage=teacher first")
    if init_from and not Path(init_from).exists():
        raise FileNotFoundError(
            f"stage.init_from={init_from} does not exist; pass the folder of a student, as stage=causal_init exports"
        )


def contexts_of(
    rollout: RolloutConfig, sink_chunks: Sequence[int], window_chunks: Sequence[int | None]
) -> list[RolloutConfig]:
    """The rollout with each pair of a stage's sinks and windows. Raises ValueError where one of them cannot be."""
    if any(window is not None and window < 1 for window in window_chunks):
        raise ValueError(
            f"stage.window_chunks={list(window_chunks)} must be at least 1, or null for all past chunks: a chunk that "
            "does not see the one before it cannot continue it"
        )
    try:
        return [
            replace(rollout, sink_chunks=sink, window_chunks=window) for sink in sink_chunks for window in window_chunks
        ]
    except ValueError as error:
        raise ValueError(
            f"stage.sink_chunks={list(sink_chunks)}, stage.window_chunks={list(window_chunks)}: {error}"
        ) from error


def load_frozen_teacher(model_cfg: ModelConfig, device: torch.device) -> WanDiT:
    """model.teacher, without gradients, in model.dtype."""
    teacher = load_role(model_cfg, TEACHER).requires_grad_(False).eval()
    return teacher.to(device=device, dtype=model_cfg.torch_dtype)


def load_student(model_cfg: ModelConfig, init_from: str | None) -> WanDiT:
    """The student to start from: ``init_from`` (an export of causal_init), else a copy of the teacher."""
    if init_from:
        return load_exported(model_cfg, init_from, owner=f"stage.init_from={init_from}")
    log.warning("stage.init_from is empty: the student starts as the teacher, which has never seen causal attention")
    return copy_of_teacher(model_cfg)


def copy_of_teacher(model_cfg: ModelConfig) -> WanDiT:
    """What the critic starts as, and the student of causal_init."""
    return load_role(model_cfg, TEACHER)


def trainable(dit: WanDiT, device: torch.device, train_track_head: bool) -> WanDiT:
    """All weights train in float32; the track head only where told (MotionStream keeps the teacher's)."""
    dit.to(device=device, dtype=torch.float32).requires_grad_(True).train()
    if dit.config.has_track_head:
        dit.track_head.requires_grad_(train_track_head)
    return dit
