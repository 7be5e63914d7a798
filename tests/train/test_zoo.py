"""`make zoo`: every command composes, weights are shipped in bfloat16, a changed recipe shows in its first losses."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from data.app import compose_config
from train import zoo
from train.pipeline import Record
from train.zoo import PARTS, chain, compared, differences, first_losses, judge, require_one_commit, ship, write_training


@pytest.mark.parametrize("step", [*chain(Path("out")), *judge(Path("out"))], ids=lambda step: step.name)
def test_every_command_composes(step):
    app, *overrides = step.arguments
    compose_config(app, list(overrides))


def test_the_weights_that_were_put_somewhere_are_judged_there():
    (step,) = judge(Path("out"), Path("elsewhere"))
    model = compose_config("eval", list(step.arguments[1:])).model
    found = model.vae.path, model.teacher, model.student
    assert found == ("elsewhere/vae", "elsewhere/teacher", "elsewhere/student")


def test_every_part_is_made_by_a_stage_of_the_chain():
    made = {step.name for step in chain(Path("out"))}
    assert {source.split("/")[0] for source in PARTS.values()} <= made


def test_shipped_weights_are_bfloat16_and_keep_their_description(tmp_path):
    source = tmp_path / "out/teacher/export/teacher"
    source.mkdir(parents=True)
    save_file({"w": torch.randn(3), "n": torch.arange(3)}, source / "model.safetensors", metadata={"config": "{}"})
    (source / "model.json").write_text("{}")
    for _ in range(2):  # again over itself
        ship(tmp_path / "out", tmp_path / "zoo", {"teacher": "teacher/export/teacher"})
    shipped = tmp_path / "zoo/teacher"
    weights = load_file(shipped / "model.safetensors")
    assert weights["w"].dtype == torch.bfloat16 and weights["n"].dtype == torch.int64
    with safe_open(shipped / "model.safetensors", "pt") as opened:
        assert opened.metadata() == {"config": "{}"}
    assert (shipped / "model.json").read_text() == "{}"


def test_the_first_losses_are_those_of_the_log_and_changes_are_named(tmp_path):
    (tmp_path / "vae").mkdir()
    rows = [{"step": step, "vae/loss": 1.0 / step, "vae/lr": 0.1} for step in (10, 50, 60)]
    (tmp_path / "vae/metrics.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    found = first_losses(tmp_path, ["vae", "teacher"])
    assert found == {"vae": {"vae/loss at step 10": 0.1, "vae/loss at step 50": 0.02}}
    assert differences(found, found) == []
    golden = {"vae": {"vae/loss at step 10": 0.101, "vae/loss at step 50": 0.03}, "teacher": {"x at step 10": 1.0}}
    assert differences(found, golden) == [
        "vae: vae/loss at step 50 is 0.02, golden 0.03", "teacher: x at step 10 is None, golden 1.0"
    ]  # fmt: skip
    changed, why = compared(tmp_path, "vae", {"vae": golden["vae"]})
    assert changed == "vae: vae/loss at step 50 is 0.02, golden 0.03" and "another processor" in why
    assert compared(tmp_path, "vae", found) == ["vae: the first losses are those of tests/golden/zoo.json"]
    assert compared(tmp_path, "encode", found) == []


def test_other_weights_are_judged_anew(tmp_path, monkeypatch):
    out, ran = tmp_path / "out", []
    monkeypatch.delenv("UPDATE_GOLDEN", raising=False)
    monkeypatch.setattr(sys, "argv", ["zoo", "--out", str(out), "--zoo", str(tmp_path)])
    monkeypatch.setattr(zoo, "run_all", lambda steps, folder, remark=None: ran.append((steps, folder)) or {})
    monkeypatch.setattr(zoo, "ship", lambda out, zoo: None)

    def judged_in(content: str) -> Path:
        for source in PARTS.values():
            (out / source).mkdir(parents=True, exist_ok=True)
            (out / source / "weights").write_text(content)
        zoo.main()
        (step,), folder = ran[-1]
        assert f"out={folder / 'eval'}" in step.arguments
        return folder

    first = judged_in("1")
    assert judged_in("1") == first != judged_in("2")


def test_training_json_says_which_commits_made_a_step(tmp_path):
    write_training(tmp_path, {"vae": Record([], 60.0, ["abc", "def"]), "pack": Record([], 2.0, ["def"])})
    found = json.loads((tmp_path / "training.json").read_text())
    assert found["seconds"] == {"vae": 60.0, "pack": 2.0}
    assert found["git_commits"] == {"vae": ["abc", "def"], "pack": ["def"]}


def test_golden_losses_are_not_written_of_steps_of_other_commits(monkeypatch):
    records = {"vae": Record([], 60.0, ["abc", "abc-dirty"])}
    monkeypatch.setattr(zoo, "git_commit", lambda: "abc-dirty")
    monkeypatch.setattr(zoo, "record_of", lambda step, out: records.get(step.name))
    require_one_commit(chain(Path("out")), Path("out"))
    for commits in (["def", "abc"], ["unknown"]):
        records["teacher"] = Record([], 60.0, commits)
        with pytest.raises(SystemExit, match="of other commits in out: teacher; train in another --out"):
            require_one_commit(chain(Path("out")), Path("out"))
