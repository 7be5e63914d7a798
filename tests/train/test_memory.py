"""What a process holds of weights, gradients, moments and EMA; a launch that does not fit is refused."""

from __future__ import annotations

import re

import pytest
import torch
from torch import nn

from data.app import CONF_DIR, build_config, compose_config
from models.wan.dit import WanDiT
from train.memory import require_memory, state_bytes
from train.optim import ModuleOptim, OptimConfig

FIVE_BILLION = {"teacher": nn.Linear(50_000, 100_000, bias=False, device="meta")}


@pytest.mark.parametrize(
    ("mode", "world", "bytes_per_parameter"),
    [
        ("single", 1, 4 + 4 + 8 + 4),
        ("ddp", 8, 4 + 4 + 8 + 4),
        ("fsdp", 8, (4 + 4 + 8 + 4) / 8),
        ("deepspeed", 8, 4 + (4 + 8) / 8 + 4),
    ],
)
def test_what_each_launch_holds(mode, world, bytes_per_parameter):
    assert state_bytes(FIVE_BILLION, OptimConfig(), mode, world) == 5e9 * bytes_per_parameter


def test_a_frozen_weight_has_no_gradient_and_an_exception_counts():
    modules = {"student": nn.Linear(3, 5, device="meta"), "critic": nn.Linear(2, 7, bias=False, device="meta")}
    modules["student"].bias.requires_grad_(False)
    optim = OptimConfig(modules={"critic": ModuleOptim(ema_decay=0.0)})
    assert state_bytes(modules, optim, "single", 1) == (15 * 20 + 5 * 4) + 14 * 16


def test_muon_keeps_one_moment_of_a_matrix():
    modules = {"vae": nn.ModuleDict({"hidden": nn.Linear(3, 5, device="meta")})}
    assert state_bytes(modules, OptimConfig(kind="muon", ema_decay=0.0), "ddp", 2) == 15 * 12 + 5 * 16


def test_what_does_not_fit_is_refused_and_told_what_would():
    with pytest.raises(ValueError, match=r"ddp on 32 .* puts 100 GB .* has 80 GB; use launch=fsdp .* 2 or more GPUs"):
        require_memory(FIVE_BILLION, OptimConfig(), "ddp", 32, int(80e9))
    with pytest.raises(ValueError, match=r"fsdp on 4 .* puts 25 GB .* has 24 GB; use 5 or more GPUs"):
        require_memory(FIVE_BILLION, OptimConfig(), "fsdp", 4, int(24e9))
    require_memory(FIVE_BILLION, OptimConfig(), "fsdp", 5, int(24e9))
    with pytest.raises(ValueError, match=r"fsdp on 5 .* puts 40 GB .* has 24 GB; use 25 or more GPUs"):
        require_memory(FIVE_BILLION, OptimConfig(), "fsdp", 5, int(24e9), accumulates=True)
    with pytest.raises(ValueError, match=r"use GPUs of more memory"):
        require_memory(FIVE_BILLION, OptimConfig(), "fsdp", 5, int(20e9), accumulates=True)
    require_memory(FIVE_BILLION, OptimConfig(), "ddp", 8, int(141e9))


@pytest.mark.parametrize("experiment", ["teacher_stage1", "teacher_stage2", "causal_init", "self_forcing"])
@pytest.mark.parametrize("model", ["wan_1_3b", "wan_5b"])
def test_the_command_of_a_recipe_fits_80_gb(model, experiment):
    """On its 32 GPUs, launched as its opening comment says."""
    command = (CONF_DIR / "experiment" / model / f"{experiment}.yaml").read_text()
    launch = re.search(r"#   (?:LAUNCH=(\w+) )?sbatch", command)
    cfg = compose_config("train", [f"experiment={model}/{experiment}"])
    architecture = build_config(cfg.model).dit
    with torch.device("meta"):
        dit = WanDiT(architecture)
    modules = {"student": dit, "critic": dit} if experiment == "self_forcing" else {"teacher": dit}
    require_memory(modules, build_config(cfg.optim), launch[1] or "ddp", 32, int(80e9), accumulates=True)
