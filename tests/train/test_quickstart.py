"""The quickstart's chain: every command composes, and stages hand their results on."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from data.app import compose_config
from eval.report import Video
from train import quickstart
from train.pipeline import Record
from train.quickstart import chain
from train.zoo import ZOO


@pytest.mark.parametrize(
    "step", [*chain(Path("out"), "scratch"), *chain(Path("out"), "zoo")], ids=lambda step: step.name
)
def test_every_command_composes(step):
    app, *overrides = step.arguments
    compose_config(app, list(overrides))


@pytest.mark.parametrize("start", ["scratch", "zoo"])
def test_all_commands_have_one_model(start):
    assert {step.config["model"]["name"] for step in chain(Path("out"), start)} == {quickstart.MODELS[start]}


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


@pytest.mark.parametrize(("start", "told"), [("zoo", "on from the shipped weights"), ("scratch", "from nothing")])
def test_the_report_is_of_this_chain_whatever_another_left_in_the_folder(tmp_path, monkeypatch, start, told):
    monkeypatch.setattr(quickstart, "_video", lambda out: Video(""))
    names = ["epe_gain_from_tracks_px", "epe_px", "epe_without_tracks_px", "psnr_db", "frames_per_second"]
    metrics = {f"{role}.{name}{end}": 1.0 for role in ("teacher", "student") for name in names
               for end in ("", "_low", "_high")}  # fmt: skip
    (tmp_path / "eval").mkdir()
    (tmp_path / "eval/metrics.json").write_text(json.dumps(metrics))
    for stage, keys in quickstart.CURVES.items():
        (tmp_path / stage).mkdir()
        (tmp_path / stage / "metrics.jsonl").write_text(json.dumps({"step": 1, **dict.fromkeys(keys, 0.5)}))
    records = {step.name: Record([], 1.0, []) for step in chain(tmp_path, start)}
    page = quickstart.report(tmp_path, records).read_text()
    assert f"trained {told}" in page and ("<figcaption>vae_whole<" in page) == (start == "scratch")
