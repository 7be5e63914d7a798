"""A chain of commands: a failure shows its log, a finished step is not repeated, processes share the cores."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import pytest

from train.pipeline import ROOT, Step, last_line, processes_of, run, run_all


def test_training_stages_share_the_cores_among_processes(monkeypatch):
    monkeypatch.setattr("os.cpu_count", lambda: 4)
    step = Step("teacher", ("train", "steps=1"), processes=2)
    assert step.environment["OMP_NUM_THREADS"] == "2"
    assert step.command[:2] == ["-m", "torch.distributed.run"] and "--nproc_per_node=2" in step.command
    assert step.command[-3:] == ["-m", "train", "steps=1"]
    assert Step("eval", ("eval",)).command == ["-m", "eval"]
    assert Step("eval", ("eval",)).environment["OMP_NUM_THREADS"] == "4"


@pytest.mark.parametrize(("gpus", "cores", "processes"), [(0, 1, 1), (0, 64, 2), (1, 64, 1), (2, 64, 2), (8, 1, 2)])
def test_no_two_processes_share_a_gpu(gpus, cores, processes):
    assert processes_of(gpus, cores) == processes


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


def test_steps_run_in_order_and_give_their_times(tmp_path, capsys):
    steps = [Step("one", ("this",)), Step("two", ("this",))]
    times = run_all(steps, tmp_path, lambda step: [f"{step.name} is good"] if step.name == "one" else [])
    assert [name for name, _ in times] == ["one", "two"] and all(seconds > 0 for _, seconds in times)
    said = capsys.readouterr().out
    assert 0 < said.index("one is good") < said.index("[ 2/2] two") and "two is good" not in said


def test_ctrl_c_waits_for_the_command_and_says_how_to_go_on(tmp_path):
    """As a terminal does it: the signal goes to the chain and to its command."""
    code = (
        "import sys; from pathlib import Path; from train.pipeline import ROOT, Step, run_all\n"
        f"run_all([Step('http', ('http.server', '0', '--bind', '127.0.0.1'))], Path({str(tmp_path)!r}))"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code], cwd=ROOT, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    log = tmp_path / "logs" / "01_http.log"
    deadline = time.monotonic() + 60
    while not (log.is_file() and "Serving" in log.read_text()) and time.monotonic() < deadline:
        time.sleep(0.1)
    os.killpg(process.pid, signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130 and said.strip() == "interrupted in http: the same command goes on from there"
    assert "Keyboard interrupt received" in log.read_text() and not list((tmp_path / "done").glob("*"))
