"""The quickstart's chain: every command composes, a failure shows its log, a finished step is not repeated."""

from __future__ import annotations

from pathlib import Path

import pytest

from data.app import compose_config
from train.quickstart import Step, chain, last_line, run


@pytest.mark.parametrize("step", chain(Path("out")), ids=lambda step: step.name)
def test_every_command_composes(step):
    app, *overrides = step.arguments
    compose_config(app, list(overrides))


def test_stages_hand_their_results_on():
    written = {"data": "out/data", "vae": "out/vae_whole/export/vae", "teacher": "out/teacher/export/teacher"}
    commands = {step.name: " ".join(step.arguments) for step in chain(Path("out"))}
    assert written["vae"] in commands["teacher"] and written["teacher"] in commands["ode_pairs"]
    assert "out/ode_pairs/pairs" in commands["causal_init"]
    assert "out/causal_init/export/student" in commands["self_forcing"]
    assert "out/self_forcing/export/student" in commands["eval"]


def test_training_stages_share_the_cores_among_processes(monkeypatch):
    monkeypatch.setattr("os.cpu_count", lambda: 4)
    step = Step("teacher", ("train", "steps=1"), processes=2)
    assert step.environment["OMP_NUM_THREADS"] == "2"
    assert step.command[:2] == ["-m", "torch.distributed.run"] and "--nproc_per_node=2" in step.command
    assert step.command[-3:] == ["-m", "train", "steps=1"]
    assert Step("eval", ("eval",)).command == ["-m", "eval"]
    assert Step("eval", ("eval",)).environment["OMP_NUM_THREADS"] == "4"


def test_last_line_reads_through_progress_bars(tmp_path):
    log = tmp_path / "log"
    log.write_text("started\nencode:  10%|#   \rencode:  50%|##  \r\n\n")
    assert last_line(log) == "encode:  50%|##"
    log.write_text("")
    assert last_line(log) == ""


def test_a_failing_step_shows_command_and_log(tmp_path):
    with pytest.raises(SystemExit, match=r"(?s)broken failed with code.*python -m no_such_module.*No module named"):
        run(Step("broken", ("no_such_module",)), 1, 1, tmp_path)


def test_a_finished_step_is_not_run_again(tmp_path, capsys):
    step = Step("version", ("this",))
    seconds = run(step, 1, 1, tmp_path)
    assert run(step, 1, 1, tmp_path) == seconds
    assert "done before" in capsys.readouterr().out
