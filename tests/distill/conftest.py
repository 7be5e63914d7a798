"""A tiny teacher on disk, the model config that names it, and a batch."""

from __future__ import annotations

from dataclasses import replace

import pytest
from tiny_distill import SEED, make_batch, perturbed, tiny_model

from data.batch import Batch
from models.assemble import ModelConfig, build_dit
from models.wan.checkpoint import save_dit


@pytest.fixture(scope="session")
def model_cfg(tmp_path_factory: pytest.TempPathFactory) -> ModelConfig:
    """The tiny model with a teacher on disk."""
    cfg = tiny_model()
    folder = tmp_path_factory.mktemp("teacher")
    save_dit(perturbed(build_dit(cfg, SEED)), folder)
    return replace(cfg, teacher=str(folder))


@pytest.fixture
def batch(model_cfg: ModelConfig) -> Batch:
    return make_batch(model_cfg, [3, 8])
