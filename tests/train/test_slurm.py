"""slurm/train.sbatch with its real launcher, two processes on the CPU; Slurm's own commands are stand-ins."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SRUN = """#!/bin/bash
while [[ "$1" == -* ]]; do shift; done
exec "$@"
"""
SCONTROL = """#!/bin/bash
if [ "$1" = show ]; then echo localhost; else echo "$@" >>"$OUTPUTS/scontrol.log"; fi
"""
SECONDS = 120  # that the run may take to start


@pytest.fixture
def cluster(tmp_path):
    """Environment of a job of one node with two "GPUs"."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    commands = tmp_path / "bin"
    commands.mkdir()
    for name, script in (("srun", SRUN), ("scontrol", SCONTROL)):
        (commands / name).write_text(script)
        (commands / name).chmod(0o755)
    python = Path(sys.executable).parent
    virtual = tmp_path / "venv/bin"  # activated in place of the user's
    virtual.mkdir(parents=True)
    (virtual / "activate").write_text(f'export PATH="{python}:$PATH"\n')
    return {
        **os.environ, "PATH": f"{commands}:{os.environ['PATH']}", "MARIONETTE_VENV": str(virtual.parent),
        "OUTPUTS": str(tmp_path), "SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "localhost", "SLURM_NNODES": "1",
        "SLURM_NODEID": "0", "SLURM_GPUS_ON_NODE": "2", "OMP_NUM_THREADS": "1", "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }  # fmt: skip


@pytest.mark.skipif(shutil.which("git") is None or not (ROOT / ".git").exists(), reason="copies what git tracks")
def test_told_to_stop_it_saves_and_asks_to_be_queued_again(cluster, tiny_shards, tmp_path):
    log = tmp_path / "run/metrics.jsonl"
    script = subprocess.Popen(
        ["bash", "slurm/train.sbatch", "model=tiny", "device=cpu", "precision=fp32", "steps=100000", "global_batch=4",
         "micro_batch=2", "log_every=1", "stage.tracks_min=2", "stage.tracks_max=8", f"shards={tiny_shards}",
         f"output_dir={log.parent}"],
        cwd=ROOT, env=cluster, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    deadline = time.monotonic() + SECONDS
    while not log.is_file() and script.poll() is None and time.monotonic() < deadline:
        time.sleep(0.1)
    script.send_signal(signal.SIGUSR1)  # as Slurm does, to the batch script alone
    said, _ = script.communicate(timeout=SECONDS)
    assert log.is_file(), said
    saved = (log.parent / "checkpoints/last_good").read_text().strip()
    steps = [json.loads(line)["step"] for line in log.read_text().splitlines()]
    assert saved == f"step_{steps[-1]:08d}" and steps[-1] < 100000
    assert script.returncode != 0
    assert (tmp_path / "scontrol.log").read_text() == "requeue 7\n"
    copy = tmp_path / "snapshots/7"
    assert (copy / "train/trainer.py").is_file() and (copy / "COMMIT").read_text().strip()


def test_a_job_queued_again_runs_its_copy_and_a_refused_one_is_not(cluster, tmp_path):
    copy = tmp_path / "snapshots/7"
    for folder in ("conf", "data", "models", "stream", "eval", "train", "slurm"):
        shutil.copytree(ROOT / folder, copy / folder, ignore=shutil.ignore_patterns("zoo"))
    (copy / "COMMIT").write_text("abc\n")
    settings = copy / "conf/train.yaml"
    settings.write_text(settings.read_text().replace('shards: ""', "shards: of_the_copy"))
    script = subprocess.run(
        ["bash", "slurm/train.sbatch", "model=tiny"], cwd=ROOT, env=cluster, capture_output=True, text=True,
        timeout=SECONDS,
    )  # fmt: skip
    assert "of_the_copy" in script.stdout + script.stderr
    assert script.returncode != 0 and not (tmp_path / "scontrol.log").exists()


@pytest.mark.parametrize("cores, option", [("64", ["--cpus-per-task=64"]), (None, [])])
def test_the_cores_of_the_job_are_asked_for_on_each_node(cluster, tmp_path, cores, option):
    copy = tmp_path / "snapshots/7"
    copy.mkdir(parents=True)
    (copy / "COMMIT").write_text("abc\n")
    (tmp_path / "bin/srun").write_text(
        '#!/bin/bash\nprintf "%s\\n" "$@" "$TORCH_ELASTIC_SHUTDOWN_TIMEOUT" >"$OUTPUTS/srun.log"\n'
    )
    cluster.pop("SLURM_CPUS_PER_TASK", None)
    if cores is not None:
        cluster["SLURM_CPUS_PER_TASK"] = cores
    subprocess.run(["bash", "slurm/train.sbatch", "steps=1"], cwd=ROOT, env=cluster, check=True, timeout=SECONDS)
    said = (tmp_path / "srun.log").read_text().splitlines()
    assert said[:-1] == [*option, "--kill-on-bad-exit=1", "bash", f"{copy}/slurm/node.sh", "steps=1"]
    assert int(said[-1]) > 300, "seconds for a checkpoint, where the launcher is told to stop"


LAUNCHER = """
import os, signal, subprocess, sys
signal.signal(signal.SIGTERM, lambda *_: open("said", "a").write("launcher told;"))
sys.exit(subprocess.Popen([sys.executable, "-c", sys.argv[1], str(os.getpid())]).wait())
"""
WORKER = """
import signal, sys
def leave(*_):
    open("said", "a").write("worker told;")
    sys.exit(3)
signal.signal(signal.SIGUSR1, leave)
open("launcher", "w").write(sys.argv[1] + ";")
signal.pause()
"""


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM])
def test_a_node_hands_signals_to_the_training_processes_alone(cluster, tmp_path, number):
    """A stand-in for accelerate, with one training process; USR1 to itself must not end the launcher."""
    (tmp_path / "accelerate.py").write_text(LAUNCHER)
    (tmp_path / "worker.py").write_text(WORKER)
    stand_in = f'#!/bin/bash\ncd {tmp_path}; exec {sys.executable} accelerate.py "$(<worker.py)"\n'
    (tmp_path / "bin/accelerate").write_text(stand_in)
    (tmp_path / "bin/accelerate").chmod(0o755)
    environment = cluster | {"SNAPSHOT": str(ROOT), "LAUNCH": "cpu"}
    node = subprocess.Popen(["bash", "slurm/node.sh"], cwd=ROOT, env=environment)
    launcher, deadline = tmp_path / "launcher", time.monotonic() + SECONDS
    while not (launcher.is_file() and launcher.read_text().endswith(";")) and time.monotonic() < deadline:
        time.sleep(0.05)
    os.kill(int(launcher.read_text()[:-1]), signal.SIGUSR1)
    node.send_signal(number)
    assert node.wait(timeout=SECONDS) == 3
    assert (tmp_path / "said").read_text() == "worker told;"
