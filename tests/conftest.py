"""Fixtures that several layers share: a tiny random model, saved as the stages would save it."""

from __future__ import annotations

import signal
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from data.app import build_config, compose_config
from models.assemble import ModelConfig, build_dit, build_vae
from models.wan.checkpoint import save_dit


def pytest_configure() -> None:
    """Tests press Ctrl-C, which a process in the background of a script ignores, and so do all that it starts."""
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@dataclass(frozen=True)
class TinyWeights:
    """conf/model/tiny.yaml with random weights on disk."""

    folder: Path  # holds vae/, teacher/ and student/
    overrides: list[str]  # that make any command use them
    model_cfg: ModelConfig


@pytest.fixture(scope="session")
def tiny_weights(tmp_path_factory: pytest.TempPathFactory) -> TinyWeights:
    """VAE, teacher and student; all weights are moved off their start, because heads begin at zero."""
    folder = tmp_path_factory.mktemp("tiny")
    overrides = ["model=tiny", f"model.vae.path={folder / 'vae'}"]
    overrides += [f"model.{role}={folder / role}" for role in ("teacher", "student")]
    model_cfg = build_config(compose_config("stream", ["image=unused", *overrides]).model)
    build_vae(model_cfg, seed=0).save(folder / "vae")
    for seed, role in enumerate(("teacher", "student")):
        dit, rng = build_dit(model_cfg, seed), torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in dit.parameters():
                parameter += 0.05 * torch.randn(parameter.shape, generator=rng)
        save_dit(dit, folder / role)
    return TinyWeights(folder, overrides, model_cfg)
