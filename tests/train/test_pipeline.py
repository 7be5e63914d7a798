"""A chain of commands: what is done and unchanged is not repeated, a failure shows its log, signals end it in order."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import asdict

import pytest

from data import app
from data.app import CONF_DIR
from models.files import write_json
from stream.provenance import git_commit
from train import pipeline
from train.pipeline import ROOT, Record, Step, forget_outdated, last_line, processes_of, run, run_all, run_chain


def test_training_stages_share_the_cores_among_processes(monkeypatch):
    monkeypatch.setattr(pipeline, "usable_cores", lambda: 4)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    step = Step("teacher", ("train", "steps=1"), processes=2)
    assert step.environment["OMP_NUM_THREADS"] == "2"
    assert step.command[:2] == ["-m", "torch.distributed.run"] and "--nproc_per_node=2" in step.command
    assert step.command[-3:] == ["-m", "train", "steps=1"]
    assert Step("eval", ("eval",)).command == ["-m", "eval"]
    assert Step("eval", ("eval",)).environment["OMP_NUM_THREADS"] == "4"
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # two chains beside each other
    assert Step("eval", ("eval",)).environment["OMP_NUM_THREADS"] == "1"


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
    step = Step("broken", ("no_such_module",))
    told = r"(?s)broken failed with code.*python -m no_such_module.*No module named"
    for _ in range(2):
        with pytest.raises(SystemExit, match=told) as end:
            run(step, 1, 1, tmp_path)
        assert str(end.value).count("No module named") == 1
    assert (tmp_path / "logs/01_broken.log").read_text().count("No module named") == 2


def test_a_finished_step_is_not_run_again(tmp_path, capsys):
    step = Step("version", ("this",))
    record = run(step, 1, 1, tmp_path)
    assert record.seconds > 0 and record.git_commits == [git_commit()]
    assert run(step, 1, 1, tmp_path) == record
    assert "done before" in capsys.readouterr().out and not list((tmp_path / "spent").iterdir())


def test_steps_run_in_order_and_give_what_they_took(tmp_path, capsys):
    steps = [Step("one", ("this",)), Step("two", ("this",))]
    records = run_all(steps, tmp_path, lambda step: [f"{step.name} is good"] if step.name == "one" else [])
    assert list(records) == ["one", "two"] and all(record.seconds > 0 for record in records.values())
    said = capsys.readouterr().out
    assert 0 < said.index("one is good") < said.index("[ 2/2] two") and "two is good" not in said


def write_record(step: Step, out, folder: str, **changes) -> None:
    (out / folder).mkdir(parents=True, exist_ok=True)
    record = asdict(Record(list(step.arguments), 100.0, ["abc"])) | changes
    write_json(out / folder / f"{step.name}.json", record)


@pytest.mark.parametrize(("changes", "seconds", "commits"), [({}, 100, ["abc"]), ({"arguments": ["that"]}, 0, [])])
def test_the_seconds_and_commits_of_all_starts_count(tmp_path, changes, seconds, commits):
    step, log = Step("version", ("this",)), tmp_path / "logs/01_version.log"
    write_record(step, tmp_path, "spent", **changes)
    log.parent.mkdir()
    log.write_text("of the first start\n")
    record = run(step, 1, 1, tmp_path)
    assert seconds < record.seconds < seconds + 60 and record.git_commits == [*commits, git_commit()]
    said = log.read_text()
    assert said.startswith("of the first start\n") and "== version, started 20" in said and "Zen of Python" in said


def test_the_seconds_are_on_the_disk_while_the_command_runs(tmp_path, monkeypatch):
    """Where a kill leaves them."""
    (tmp_path / "watch.py").write_text("import sys, time; time.sleep(2); print(*open(sys.argv[1]).read().split())")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setattr(pipeline, "RECORD_SECONDS", 0.1)
    run(Step("watch", ("watch", str(tmp_path / "spent/watch.json"))), 1, 1, tmp_path)
    seen = json.loads(last_line(tmp_path / "logs/01_watch.log"))
    assert seen["seconds"] > 0.4 and seen["arguments"][0] == "watch"


def test_a_step_with_other_arguments_and_all_after_it_are_made_anew(tmp_path, capsys):
    def steps(vae_steps):
        names = {"render": ("data",), "vae": ("train", f"steps={vae_steps}"), "teacher": ("train",)}
        return [Step(name, (*given, f"output_dir={tmp_path / name}")) for name, given in names.items()]

    for step in steps(1):
        write_record(step, tmp_path, "spent" if step.name == "teacher" else "done")
        (tmp_path / step.name).mkdir()
    forget_outdated(steps(1), tmp_path)
    assert len(list(tmp_path.glob("*/*.json"))) == 3 and capsys.readouterr().out == ""
    forget_outdated(steps(2), tmp_path)
    assert [file.name for file in tmp_path.glob("*/*.json")] == ["render.json"]
    names = sorted(folder.name.split("_until_")[0] for folder in tmp_path.iterdir())
    assert names == ["done", "render", "spent", "teacher", "vae"] and (tmp_path / "render").exists()
    assert not (tmp_path / "vae").exists() and not (tmp_path / "teacher").exists()
    said = capsys.readouterr().out
    assert "made anew from vae on, where settings differ: other arguments" in said and "what vae had made is in" in said


def test_a_step_is_made_anew_where_a_file_of_its_configuration_has_changed(tmp_path, monkeypatch, capsys):
    conf = tmp_path / "conf"
    shutil.copytree(CONF_DIR, conf)
    for module in (app, pipeline):
        monkeypatch.setattr(module, "CONF_DIR", conf)
    arguments = ("data", "experiment=quickstart_zoo/data", f"out={ROOT}/outputs/there")
    write_record(Step("render", arguments), tmp_path, "done", config=Step("render", arguments).config)
    assert run(Step("render", arguments), 1, 1, tmp_path).seconds == 100
    experiment = conf / "experiment/quickstart_zoo/data.yaml"
    experiment.write_text(experiment.read_text().replace("num_workers: 2", "num_workers: 13"))
    forget_outdated([Step("render", arguments)], tmp_path)
    assert re.search(r"made anew from render on.*num_workers: 2 there, 13 here", capsys.readouterr().out)
    assert not (tmp_path / "done/render.json").exists()


def test_a_step_whose_product_is_gone_is_made_anew_with_all_after_it(tmp_path, capsys):
    steps = [Step(name, ("train", f"output_dir={tmp_path / name}")) for name in ("vae", "teacher", "student")]
    for step in steps:
        write_record(step, tmp_path, "done")
        step.product.mkdir()
    forget_outdated(steps, tmp_path)
    assert all(step.record_files(tmp_path)[0].exists() for step in steps)
    (tmp_path / "teacher").rmdir()
    forget_outdated(steps, tmp_path)
    assert [step.record_files(tmp_path)[0].exists() for step in steps] == [True, False, False]
    assert f"made anew from teacher on, as {tmp_path / 'teacher'} is gone" in capsys.readouterr().out
    assert not (tmp_path / "student").exists() and list(tmp_path.glob("student_until_*")), "it would go on from there"


LAUNCHER = """
W1125 10:00:00.0 77 torch/distributed/elastic/multiprocessing/api.py:1010] Sending process 79 closing signal SIGTERM
E1125 10:00:00.1 77 torch/distributed/elastic/multiprocessing/api.py:984] failed (exitcode: 1) local_rank: 0 (pid: 78)
Traceback (most recent call last):
  File "<frozen runpy>", line 198, in _run_module_as_main
  File "<frozen runpy>", line 88, in _run_code
  File "torch/distributed/run.py", line 990, in <module>
    main()
  File "torch/distributed/elastic/multiprocessing/errors/__init__.py", line 362, in wrapper
    return f(*args, **kwargs)
           ^^^^^^^^^^^^^^^^^^
  File "torch/distributed/run.py", line 986, in main
    run(args)
  File "torch/distributed/run.py", line 977, in run
    elastic_launch(
  File "torch/distributed/launcher/api.py", line 162, in __call__
    return launch_agent(self._config, self._entrypoint, list(args))
           ^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^
  File "torch/distributed/launcher/api.py", line 311, in launch_agent
    raise ChildFailedError(
torch.distributed.elastic.multiprocessing.errors.ChildFailedError:
============================================================
train FAILED
------------------------------------------------------------
Failures:
  <NO_OTHER_FAILURES>
------------------------------------------------------------
Root Cause (first observed failure):
[0]:
  time      : 2026-11-25_10:00:00
  host      : node
  rank      : 0 (local_rank: 0)
  exitcode  : 1 (pid: 78)
  error_file: <N/A>
  traceback : To enable traceback see: https://pytorch.org/docs/stable/elastic/errors.html
============================================================
"""


def test_why_a_command_ended_is_shown_above_what_a_launcher_says_of_it(tmp_path, tiny_shards):
    """A run whose checkpoint cannot be written: it says so in a line that the chain looks for."""
    (tmp_path / "run").mkdir()
    (tmp_path / "run/checkpoints").touch()
    overrides = ["model=tiny", "device=cpu", "steps=1", "global_batch=1", "micro_batch=1", "logger.progress=false"]
    failed = subprocess.run(
        [sys.executable, "-m", "train", *overrides, f"shards={tiny_shards}", f"output_dir={tmp_path / 'run'}"],
        cwd=ROOT, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, check=False,
    )  # fmt: skip
    said = next(line for line in failed.stderr.splitlines() if line.startswith("error: "))
    assert said.startswith("error: the checkpoint of step 1 cannot be written to") and failed.returncode == 1
    assert "Traceback" not in failed.stderr
    log = tmp_path / "vae.log"
    log.write_text(f"step 1/1\n{failed.stderr}{LAUNCHER}")
    shown = pipeline._failure(Step("vae", ("train",)), 1, log, 0).splitlines()
    assert shown.count(said) == 1 and shown.index(said) < shown.index("train FAILED") and "step 1/1" not in shown


def test_records_of_paths_in_the_checkout_hold_where_it_is_moved():
    step = Step("render", ("data", "experiment=quickstart_zoo/data", f"out={ROOT}/outputs/there"))
    assert step.config["out"] == "outputs/there"


def test_a_configuration_that_does_not_compose_is_told_in_a_line(tmp_path, capsys):
    with pytest.raises(SystemExit) as end:
        run_chain(lambda: run_all([Step("render", ("data", "num_wokers=1"))], tmp_path))
    said = capsys.readouterr().err
    assert end.value.code == 2 and said.count("\n") == 1
    assert said.startswith("error: render: ") and "num_workers" in said


def test_a_record_holds_where_the_checkout_is_moved(tmp_path):
    step = Step("vae", ("train", f"output_dir={ROOT}/train"))  # a folder that is there
    write_record(step, tmp_path, "done", arguments=["train", "output_dir=train"])
    forget_outdated([step], tmp_path)
    assert run(step, 1, 1, tmp_path).seconds == 100


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
    assert json.loads((tmp_path / "spent/saves.json").read_text())["seconds"] > 1


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
