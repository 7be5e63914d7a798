"""A tiny student and its codecs."""

from __future__ import annotations

import pytest

from models.assemble import load_role
from models.wan.dit import WanDiT
from stream.codecs import Codecs


@pytest.fixture(scope="module")
def parts(tiny_weights) -> tuple[WanDiT, Codecs]:
    student = load_role(tiny_weights.model_cfg, "student").eval().requires_grad_(False)
    return student, Codecs.load(tiny_weights.model_cfg)
