"""Ablations of training: every command composes, runs hand their weights on, results are collected by observation."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from data.app import compose_config
from eval.benchmarks.claim_rows import ROWS, RUNS
from eval.benchmarks.claims import Observations
from eval.benchmarks.context import EvalContext
from train.ablations import JUDGED, TRAININGS, ZOO_STARTS, chain, collect
from train.zoo import chain as zoo_chain


@pytest.mark.parametrize("step", chain(Path("out"), Path("zoo"), seed=1), ids=lambda step: step.name)
def test_every_command_composes(step):
    app, *overrides = step.arguments
    compose_config(app, list(overrides))


def test_runs_use_weights_of_runs_before_them():
    done: set[str] = set()
    for training in TRAININGS:
        assert training.init_from is None or training.init_from in done | set(ZOO_STARTS), training.name
        done.add(training.name)
    assert {judged.training for judged in JUDGED} <= done
    commands = {step.name: " ".join(step.arguments) for step in chain(Path("out"), Path("zoo"), seed=3)}
    assert "zoo/causal_init/export/student" in commands["base_student"] and "seed=3" in commands["base_student"]
    assert "out/seed_3/chunk_1_init/export/student" in commands["chunk_1"]
    assert "zoo/ode_pairs/pairs" in commands["chunk_1_init"]
    assert "init_from" not in commands["no_ode"] and "model.teacher=zoo" in commands["no_ode"]


def test_the_zoo_has_the_runs_that_variants_start_from():
    stages = {step.name for step in zoo_chain(Path("zoo"))}
    assert {where.split("/")[0] for where in ZOO_STARTS.values()} | {"ode_pairs"} <= stages


class Asked(Observations):
    """Remembers which observations a row asks for."""

    def __init__(self) -> None:
        self.names: set[str] = set()
        self.context = EvalContext(None, None, None, 0, Path())  # type: ignore[arg-type]

    def values(self, name, key):
        self.names.add(name)
        return [1.0, 2.0]

    def figure(self, name, key):
        return 1.0

    def track_encoding_seconds(self):
        return [1.0], [40.0]


def test_what_the_rows_ask_for_is_measured_by_the_claims_or_made_here():
    asked = Asked()
    for row in ROWS:
        row.find(asked)
    assert asked.names - set(RUNS) == {judged.name for judged in JUDGED}


def test_results_are_collected_by_observation_and_seed(tmp_path):
    for seed in (0, 1):
        for judged in JUDGED:
            folder = tmp_path / f"seed_{seed}/judged/{judged.name}"
            folder.mkdir(parents=True)
            values = {"student.epe_px": [seed + 0.123456, None], "noise_floor.epe_px": [1.0], "student.ssim": [0.5]}
            (folder / "per_clip.json").write_text(json.dumps(values))
            (folder / "meta.json").write_text(json.dumps({"git_commit": "abc"}))
    found = collect(tmp_path, [0, 1])
    assert set(found) == {judged.name for judged in JUDGED}
    assert found["chunk_1"]["per_clip"] == [{"student.epe_px": [0.12346, None]}, {"student.epe_px": [1.12346, None]}]
    assert found["chunk_1"]["training"]["overrides"] == ["model.rollout.chunk_frames=1"]
