"""A chain of commands: a failure shows its log, a finished step is not repeated, processes share the cores."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import pytest

from train.pipeline import ROOT, Step, last_line, processes_of, run, run_all, run_chain


def test_training_stages_share_the_cores_among_processes(monkeypatch):
    monkeypatch.setattr("os.cpu_count", lambda: 4)
    step = Step("teacher", ("train", "steps=1"), processes=2)
    assert step.environment["OMP_NUM_THREADS"] == "2"
    assert step.command[:2] == ["-m", "torch.distributed.run"] and "--nproc_per_node=2" in step.command
    assert step.command[-3:] == ["-m", "train", "steps=1"]
    assert Step("eval", ("eval",)).command == ["-m", "eval"]
    assert Step("eval", ("eval",)).environment["OMP_NUM_THREADS"] == "4"


def test_processes_under_torchrun_get_the_time_to_save(monkeypatch):
    monkeypatch.delenv("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", raising=False)
    assert Step("vae", ("train",), 2).environment["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"] == "600"
    monkeypatch.setenv("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "90")
    assert Step("vae", ("train",), 2).environment["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"] == "90"


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


SAVES = """
import signal, sys, time
from pathlib import Path

def save(number, frame):
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    time.sleep(1)
    Path(sys.argv[1]).touch()
    sys.exit(130)

signal.signal(signal.SIGINT, save)
print("at work", flush=True)
time.sleep(60)
"""


@pytest.mark.parametrize(
    ("number", "code", "word"), [(signal.SIGINT, 130, "interrupted"), (signal.SIGTERM, 143, "terminated")]
)
def test_a_chain_told_to_stop_waits_for_its_command_and_says_how_to_go_on(tmp_path, number, code, word):
    """A terminal sends Ctrl-C to the command as well; `kill` sends TERM to the chain alone."""
    (tmp_path / "saves.py").write_text(SAVES)
    step = f"Step('saves', ('saves', {str(tmp_path / 'saved')!r}))"
    script = (
        "from pathlib import Path; from train.pipeline import Step, run_all, run_chain\n"
        f"run_chain(lambda: run_all([{step}], Path({str(tmp_path)!r})))"
    )
    environment = os.environ | {"PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"}
    process = subprocess.Popen(
        [sys.executable, "-c", script],
        cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip
    log, deadline = tmp_path / "logs/01_saves.log", time.monotonic() + 60
    while not (log.is_file() and "at work" in log.read_text()) and time.monotonic() < deadline:
        time.sleep(0.1)
    for _ in range(2):  # the second press must not end the waiting
        os.killpg(process.pid, number) if number == signal.SIGINT else process.send_signal(number)
        time.sleep(0.3)
        number = signal.SIGINT
    _, said = process.communicate(timeout=60)
    assert said.strip() == f"{word} in saves: the same command goes on from there" and process.returncode == code
    assert (tmp_path / "saved").exists() and not list((tmp_path / "done").iterdir())


@pytest.mark.parametrize(
    ("number", "code", "word"), [(signal.SIGINT, 130, "interrupted"), (signal.SIGTERM, 143, "terminated")]
)
def test_between_the_steps_it_ends_at_once(capsys, number, code, word):
    former = signal.getsignal(signal.SIGTERM)
    try:
        with pytest.raises(SystemExit) as end:
            run_chain(lambda: (os.kill(os.getpid(), number), time.sleep(60)))
    finally:
        signal.signal(signal.SIGTERM, former)
    assert end.value.code == code
    assert capsys.readouterr().err == f"\n{word}: the same command goes on from there\n"
