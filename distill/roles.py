"""The three models of distillation, all of one class.

* student: the causal few-step generator that is being made   (Self-Forcing: generator) * teacher: the
frozen bidirectional model, with guidance        (Self-Forcing: real_score) * critic:  follows the
student's own distribution, no guidance  (Self-Forcing: fake_score)

Left out: training them.
"""

from __future__ import annotations

import logging
from pathlib import Path

import torch

from models.assemble import ModelConfig, load_role
from models.wan.checkpoint import load_dit
from models.wan.dit import WanDiT

log = logging.getLogger(__name__)

STUDENT = "student"
TEACHER = "teacher"
CRITIC = "critic"


def require_weights(model_cfg: ModelConfig, init_from: str | None = None) -> None:
    """Refuses, before anything is built, a teacher or ``init_from`` that is not there."""
    if not model_cfg.teacher:
        raise ValueError("model.teacher is not set; set it to the folder that stage=teacher exported")
    if not Path(model_cfg.teacher).exists():
        raise FileNotFoundError(f"model.teacher={model_cfg.teacher} does not exist; run stage=teacher first")
    if init_from and not Path(init_from).exists():
        raise FileNotFoundError(
            f"stage.init_from={init_from} does not exist; pass the folder of a student, as stage=causal_init exports"
        )


def load_frozen_teacher(model_cfg: ModelConfig, device: torch.device) -> WanDiT:
    """model.teacher, without gradients, in model.dtype."""
    teacher = load_role(model_cfg, TEACHER).requires_grad_(False).eval()
    return teacher.to(device=device, dtype=model_cfg.torch_dtype)


def load_student(model_cfg: ModelConfig, init_from: str | None) -> WanDiT:
    """The student to start from: ``init_from`` (an export of causal_init), else a copy of the teacher."""
    if init_from:
        return load_dit(init_from, expected=model_cfg.dit)
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
