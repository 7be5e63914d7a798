"""Drags on the student that is shipped: objects go where they are dragged, and come back."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from data.app import build_config, compose_config
from data.trackers import grid_queries
from eval.benchmarks.drag_scenarios import moved_to, sprites_scenarios
from eval.metrics.drag import RegionLocator
from models.assemble import load_role
from models.motion.tracks import Tracks
from stream.codecs import Codecs
from stream.dragstream.drag import Drag, Handle, Pose
from stream.session import StreamSession

ROOT = Path(__file__).resolve().parents[3]
CELL_PX = 4.0


@pytest.fixture(scope="module")
def parts(monkeypatch_module):
    monkeypatch_module.chdir(ROOT)  # the weights' paths are relative to the repository
    model_cfg = build_config(compose_config("stream", ["image=unused", "model=sprites"]).model)
    student = load_role(model_cfg, "student").eval().requires_grad_(False)
    return student.to(model_cfg.torch_dtype), Codecs.load(model_cfg)


@pytest.fixture(scope="module")
def monkeypatch_module():
    with pytest.MonkeyPatch.context() as patch:
        yield patch


@pytest.mark.parametrize("number", [6, 18])  # of seed 1: one sprite, animated
def test_opposite_drags_return_the_object(parts, number: int) -> None:
    student, codecs = parts
    bench = build_config(compose_config("eval", ["bench=drag", "model=sprites"]).bench)
    scenarios = sprites_scenarios(bench.world, codecs.model_cfg.clip, chunk_frames=3, count=number + 1, seed=1)
    scenario = scenarios[number]
    still = np.repeat(grid_queries(64, 64, 16, 16)[None], 9, axis=0)
    tracks = Tracks.from_arrays(still, np.ones(still.shape[:2], bool), 64, 64)
    session = StreamSession(student, codecs, first_frame=scenario.first_frame, prompt=scenario.prompt, tracks=tracks)
    before = session.next_chunk()[-1]
    (handle,) = scenario.events[0].drag.handles
    away = handle.poses[-1]
    locator = RegionLocator(before, handle.mask)
    there = _dragged(session, handle)
    assert _distance(locator.locate(there).pose, away) < CELL_PX < away.distance_px
    held = moved_to(Drag("animate", (handle,)), [away]).handles[0]
    back = tuple(Pose().toward(Pose(-away.dx, -away.dy), (n + 1) / 6) for n in range(6))
    home = _dragged(session, replace(held, poses=back))
    assert _distance(locator.locate(home).pose, Pose()) < CELL_PX


def _dragged(session: StreamSession, handle: Handle) -> np.ndarray:
    session.drag(Drag("animate", (handle,)))
    session.next_chunk()
    return session.next_chunk()[-1]


def _distance(found: Pose, wanted: Pose) -> float:
    return found.minus(wanted).distance_px
