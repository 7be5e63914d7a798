"""The quickstart's chain: every command composes, and stages hand their results on."""

from __future__ import annotations

from pathlib import Path

import pytest

from data.app import compose_config
from train.quickstart import chain
from train.zoo import ZOO


@pytest.mark.parametrize(
    "step", [*chain(Path("out"), "scratch"), *chain(Path("out"), "zoo")], ids=lambda step: step.name
)
def test_every_command_composes(step):
    app, *overrides = step.arguments
    compose_config(app, list(overrides))


def test_stages_hand_their_results_on():
    written = {"data": "out/data", "vae": "out/vae_whole/export/vae", "teacher": "out/teacher/export/teacher"}
    commands = {step.name: " ".join(step.arguments) for step in chain(Path("out"), "scratch")}
    assert written["vae"] in commands["teacher"] and written["teacher"] in commands["ode_pairs"]
    assert "out/ode_pairs/pairs" in commands["causal_init"]
    assert "out/causal_init/export/student" in commands["self_forcing"]
    assert "out/self_forcing/export/student" in commands["eval"]


def test_from_the_zoo_every_stage_goes_on_from_the_shipped_weights():
    commands = {step.name: " ".join(step.arguments) for step in chain(Path("out"), "zoo")}
    for stage, part in (("vae", "vae"), ("teacher", "teacher"), ("causal_init", "student")):
        assert f"stage.init_from={ZOO / part}" in commands[stage]
    assert "vae_whole" not in commands
    assert compose_config("train", ["experiment=quickstart_zoo/vae"]).stage.freeze_encoder
