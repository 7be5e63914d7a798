"""Ablations of training: every command composes, runs hand their weights on, nothing is made twice."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from data.app import CONF_DIR, compose_config
from eval.benchmarks.claim_rows import ROWS, RUNS
from eval.benchmarks.claims import Observations
from eval.benchmarks.context import EvalContext
from models.wan.checkpoint import read_dit_config
from train import ablations
from train.ablations import JUDGED, TRAININGS, VIDEO_MODEL, Plan, outdated, read_results, schedule, store
from train.zoo import ZOO


@pytest.mark.parametrize("step", [step for step, _ in schedule(Plan(Path("out")), {}, seed=1)], ids=lambda s: s.name)
def test_every_command_composes(step):
    app, *overrides = step.arguments
    compose_config(app, list(overrides))


def test_runs_use_weights_of_runs_before_them():
    steps = schedule(Plan(Path("out")), {}, seed=3)
    commands = {step.name: " ".join(step.arguments) for step, _ in steps}
    assert len(commands) == len(steps) == 3 + len(TRAININGS) + len(JUDGED)
    written = [str(Plan(Path("out")).weights(VIDEO_MODEL, 3))]  # made before the steps
    for step, _ in steps:
        for read in (part.split("=", 1)[1] for part in step.arguments if "init_from=" in part or "pairs=" in part):
            assert str(ZOO) in read or any(read.startswith(folder) for folder in written), step.name
        written += [part.split("=", 1)[1] for part in step.arguments if part.startswith("output_dir=")]
    folder = {training.name: str(Plan(Path("out")).folder(training, 3)) for training in TRAININGS}
    assert folder["causal_init"].startswith("out/shared/") and folder["chunk_1"].startswith("out/seed_3/")
    assert f"{folder['causal_init']}/export/student" in commands["base_student"]
    assert "seed=3" in commands["base_student"]
    assert f"{folder['chunk_1_init']}/export/student" in commands["chunk_1"]
    assert f"{folder['ode_pairs']}/pairs" in commands["chunk_1_init"] and "seed=" not in commands["causal_init"]
    assert "init_from" not in commands["no_ode"] and f"init_from={ZOO / 'teacher'}" in commands["no_mid_mask"]
    assert f"model.student={folder['zoo_student']}/export/student" in commands["judge zoo_longer"]


def test_a_run_of_other_settings_and_those_that_go_on_from_it_have_other_folders(monkeypatch):
    def folders() -> dict[str, Path]:
        return {training.name: Plan(Path("out")).folder(training, 0) for training in TRAININGS}

    before = folders()
    monkeypatch.setattr(ablations, "PAIRS", replace(ablations.PAIRS, steps=11))
    changed = {name for name, folder in folders().items() if folder != before[name]}
    assert {"causal_init", "base_student", "chunk_1_init", "chunk_1"} <= changed
    assert not {"offsets", "mid_mask", "no_ode", "causal_teacher_student"} & changed


def test_an_edited_recipe_makes_its_runs_and_what_goes_on_from_them_anew(tmp_path, monkeypatch):
    def steps() -> dict[str, tuple[str, ...]]:
        ablations.recipe.cache_clear()
        planned = schedule(Plan(Path("out")), {}, seed=0, only=["base_long_window_2", "chunk_1_long", "no_ode"])
        return {step.name: step.arguments for step, _ in planned}

    conf = shutil.copytree(CONF_DIR, tmp_path / "conf")
    monkeypatch.setattr("data.app.CONF_DIR", conf)
    before, edited = steps(), conf / "experiment/sprites/causal_init.yaml"
    edited.write_text(edited.read_text().replace("warmup_updates: 20", "warmup_updates: 5"))
    changed = {name for name, arguments in steps().items() if arguments != before[name]}
    begun = {"render, track", "encode", "pack"}  # these compose anew under the same arguments
    assert set(before) - changed == begun | {"ode_pairs", "no_ode", "judge no_ode"}

    edited = conf / "experiment/sprites/data.yaml"
    edited.write_text(edited.read_text().replace("num_workers: 2", "num_workers: 1"))
    assert {name for name, arguments in steps().items() if arguments != before[name]} == set(before) - begun
    ablations.recipe.cache_clear()


class Asked(Observations):
    """Remembers which observations a row asks for."""

    def __init__(self) -> None:
        self.names: set[str] = set()
        self.runs = RUNS
        self.context = EvalContext(None, None, None, 0, Path())  # type: ignore[arg-type]

    def values(self, name, key, seeds=None):
        self.names.add(name)
        return [1.0, 2.0]

    def common_seeds(self, names):
        return ["0", "1"]

    def figure(self, name, key):
        return 1.0

    def track_encoding_seconds(self):
        return [1.0], [40.0]


def test_what_the_rows_ask_for_is_measured_by_the_claims_or_made_here():
    asked = Asked()
    for row in ROWS:
        row.find(asked)
    assert asked.names - set(RUNS) == {judged.name for judged in JUDGED}


def _judge(folder: Path, value: float) -> Path:
    """The files of an observation."""
    folder.mkdir(parents=True, exist_ok=True)
    values = {"student.epe_px": [value, None], "noise_floor.epe_px": [1.0], "student.ssim": [0.5]}
    (folder / "per_clip.json").write_text(json.dumps(values))
    (folder / "meta.json").write_text(json.dumps({"git_commit": "abc"}))
    return folder


def test_what_is_judged_by_looks_is_judged_anew_by_other_features(tmp_path, monkeypatch):
    result = tmp_path / "ablations.json"
    for judged in JUDGED:
        store(result, judged, 0, _judge(tmp_path / judged.name, 1.0))
    assert outdated(read_results(result)) == []
    monkeypatch.setattr(ablations, "FEATURES", ZOO / "vae")
    by_looks = {judged.name for judged in JUDGED if ablations.BY_LOOKS in judged.settings}
    assert set(outdated(read_results(result))) == by_looks >= {"chunk_1_long", "zoo_longer"}


def test_what_is_stored_under_the_same_settings_is_not_made_again(tmp_path):
    result, plan = tmp_path / "zoo" / "ablations.json", Plan(tmp_path / "out")
    for judged in JUDGED:
        store(result, judged, 0, _judge(tmp_path / judged.name, 0.123456))
    by_name = {judged.name: judged for judged in JUDGED}
    store(result, by_name["no_ode"], 1, _judge(tmp_path / "no_ode", 2.0))
    found = read_results(result)
    assert found["no_ode"]["seeds"]["0"] == {"git_commit": "abc", "per_clip": {"student.epe_px": [0.12346, None]}}
    assert found["no_ode"]["seeds"]["1"]["per_clip"] == {"student.epe_px": [2.0, None]}
    assert found["chunk_1_long"]["training"]["overrides"] == ["model.rollout.chunk_frames=1"]
    assert found["chunk_1_long"]["training"]["init_from"]["stage"] == "causal_init"
    assert schedule(plan, found, 0) == []

    names = [step.name for step, _ in schedule(plan, found, 1)]
    assert "no_ode" not in names and "judge no_ode" not in names and "judge zoo_longer" in names
    del found["chunk_1_long"]
    found["merged_cache"]["training"]["steps"] = 7  # other settings
    assert [step.name for step, _ in schedule(plan, found, 0)] == [
        "render, track", "encode", "pack", "ode_pairs", "causal_init", "chunk_1_init", "chunk_1", "judge chunk_1_long",
        "merged_cache", "judge merged_cache",
    ]  # fmt: skip
    assert [step.name for step, _ in schedule(plan, found, 0, only=["merged_cache", "no_ode"])] == [
        "render, track", "encode", "pack", "ode_pairs", "causal_init", "merged_cache", "judge merged_cache",
    ]  # fmt: skip
    found["offsets"]["evaluation"]["overrides"] = []  # judged otherwise: it cannot be compared with the others any more
    result.write_text(json.dumps({**found, "of_old": found["no_ode"]}))  # an observation that there is no more
    assert set(outdated(read_results(result))) == {"merged_cache", "offsets", "of_old"}
    store(result, by_name["merged_cache"], 1, _judge(tmp_path / "merged_cache", 3.0))
    kept = read_results(result)
    assert list(kept["merged_cache"]["seeds"]) == ["1"]
    assert set(found) - set(kept) == {"offsets"} and "of_old" not in kept


def test_other_shipped_weights_make_everything_again(tmp_path, monkeypatch):
    result, plan = tmp_path / "ablations.json", Plan(tmp_path / "out")
    for judged in JUDGED:
        store(result, judged, 0, _judge(tmp_path / judged.name, 1.0))
    assert schedule(plan, read_results(result), 0) == []
    monkeypatch.setattr(ablations, "shipped_weights", lambda: "others")
    assert len(schedule(plan, read_results(result), 0)) == 3 + len(TRAININGS) + len(JUDGED)


def test_the_video_model_that_teachers_start_from_has_no_tracks_and_is_made_once(tmp_path):
    plan = Plan(tmp_path)
    plan.make_video_model()
    folder = plan.weights(VIDEO_MODEL, 0)
    assert read_dit_config(folder).track_channels == 0
    made = (folder / "model.safetensors").stat().st_mtime_ns
    plan.make_video_model()
    assert (folder / "model.safetensors").stat().st_mtime_ns == made
