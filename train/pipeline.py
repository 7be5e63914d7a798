"""Chains of commands: what `make quickstart`, `make zoo` and `make ablations` are made of.

A step is a command that a user could type; it runs in a process of its own (or several, under torchrun), with one
progress line, its output in a log and a marker when it is done. A finished step is not run again, and an
interrupted one resumes, because every command does. A chain that is told to stop waits for its command, which may be
saving.
Left out: which steps there are (quickstart.py, zoo.py, ablations.py) and every setting (conf/experiment).
"""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

import torch

from data.app import EXIT_INTERRUPTED

ROOT = Path(__file__).resolve().parents[1]
REFRESH_SECONDS = 0.5
LINE_WIDTH = 110  # characters of the progress line
EXIT_TERMINATED = 143  # exit code after TERM, as shells have it
SHUTDOWN_SECONDS = 600  # in which processes under torchrun must have saved when they are told to stop; else it has 30


def processes_of(gpus: int, cores: int) -> int:
    """How many processes a training stage gets: NCCL wants a GPU for each, without GPUs two on one thread each beat
    one on two by far.
    """
    return min(2, gpus or cores)


PROCESSES = processes_of(torch.cuda.device_count(), os.cpu_count() or 1)


class Terminated(BaseException):
    """The chain got TERM; with the name of the step that it was in, if any."""


@dataclass(frozen=True)
class Step:
    """One line of a chain: its name and the arguments after ``python -m``."""

    name: str
    arguments: tuple[str, ...]
    processes: int = 1

    @property
    def command(self) -> list[str]:
        """The arguments of the interpreter: ``-m train …`` or, for more than one process, the same under torchrun."""
        if self.processes == 1:
            return ["-m", *self.arguments]
        launcher = ["torch.distributed.run", "--standalone", f"--nproc_per_node={self.processes}"]
        return ["-m", *launcher, "-m", *self.arguments]

    @property
    def environment(self) -> dict[str, str]:
        """The cores are shared among the processes, which get the time to save; what the user has set of that stays."""
        threads = max(1, (os.cpu_count() or 1) // self.processes)
        own = {"OMP_NUM_THREADS": str(threads), "PYTHONUNBUFFERED": "1"}
        return {"TORCH_ELASTIC_SHUTDOWN_TIMEOUT": str(SHUTDOWN_SECONDS), **os.environ, **own}


def run_chain(main: Callable[[], None]) -> None:
    """Run the ``main`` of a chain. After Ctrl-C and TERM exit with 130 and 143, and one line that says where it was."""

    def terminate(number: int, frame: FrameType | None) -> None:
        raise Terminated

    signal.signal(signal.SIGTERM, terminate)
    try:
        main()
    except (KeyboardInterrupt, Terminated) as stop:
        is_user = isinstance(stop, KeyboardInterrupt)
        where = f" in {stop}" if str(stop) else ""
        word = "interrupted" if is_user else "terminated"
        print(f"\n{word}{where}: the same command goes on from there", file=sys.stderr)
        raise SystemExit(EXIT_INTERRUPTED if is_user else EXIT_TERMINATED) from None


def run_all(
    steps: Sequence[Step], out: Path, remark: Callable[[Step], Iterable[str]] = lambda step: ()
) -> list[tuple[str, float]]:
    """Every step in order -> its name and seconds; ``remark`` has lines to print of a step that is done."""
    times = []
    for number, step in enumerate(steps, start=1):
        times.append((step.name, run(step, number, len(steps), out)))
        for line in remark(step):
            print(line, flush=True)
    return times


def run(step: Step, number: int, total: int, out: Path) -> float:
    """Run one step, its output in a log, and return the seconds it took; a finished one is skipped.

    Raises SystemExit with the end of the log where the command fails; KeyboardInterrupt or Terminated, with the
    step's name, where the chain is told to stop, once the command has ended.
    """
    marker = out / "done" / f"{step.name.replace(' ', '_')}.json"  # by its name: steps may come before it
    if marker.exists():
        finished = json.loads(marker.read_text())
        if finished["arguments"] == list(step.arguments):
            _say(number, total, step.name, finished["seconds"], "done before\n")
            return finished["seconds"]
    log_path = out / "logs" / f"{number:02d}_{marker.stem}.log"
    log_path.parent.mkdir(parents=True, exist_ok=True)
    marker.parent.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    with log_path.open("w") as log:
        process = subprocess.Popen(
            [sys.executable, *step.command],
            cwd=ROOT, stdout=log, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, env=step.environment,
        )  # fmt: skip
        try:
            while process.poll() is None:
                time.sleep(REFRESH_SECONDS)
                if sys.stdout.isatty():
                    _say(number, total, step.name, time.monotonic() - started, last_line(log_path))
        except (KeyboardInterrupt, Terminated) as stop:
            _wait_for_end(process, stop)
            raise type(stop)(step.name) from None
    seconds = time.monotonic() - started
    if process.returncode:
        tail = "\n".join(log_path.read_text(errors="replace").replace("\r", "\n").splitlines()[-25:])
        command = shlex.join(["python", *step.command])
        failure = f"{step.name} failed with code {process.returncode}"
        raise SystemExit(f"\n{failure}\n$ {command}\n{tail}\n\nlog: {log_path}")
    marker.write_text(json.dumps({"arguments": list(step.arguments), "seconds": seconds}))
    _say(number, total, step.name, seconds, "\n")
    return seconds


def _wait_for_end(process: subprocess.Popen, stop: BaseException) -> None:
    """Of a command that may be saving: the next start must not meet it. Further signals do not end the waiting.

    Ctrl-C reaches it from the terminal. For TERM it is sent the same, after which every command keeps what is finished
    and ends its processes, unless it ignores that, as in the background of a script.
    """
    signal.signal(signal.SIGTERM, lambda number, frame: process.terminate())
    former = signal.signal(signal.SIGINT, signal.SIG_IGN)
    if isinstance(stop, Terminated):
        process.send_signal(signal.SIGTERM if former == signal.SIG_IGN else signal.SIGINT)
    process.wait()


def last_line(log_path: Path) -> str:
    """The newest non-empty line of a log, progress bars (ended by a carriage return) included."""
    with log_path.open("rb") as log:
        log.seek(max(0, log_path.stat().st_size - 2000))
        text = log.read().decode(errors="replace")
    lines = [line.strip() for line in re.split(r"[\r\n]", text) if line.strip()]
    return lines[-1] if lines else ""


def _say(number: int, total: int, name: str, seconds: float, text: str) -> None:
    minutes, rest = divmod(int(seconds), 60)
    line = f"[{number:2d}/{total}] {name:<14} {minutes:2d}:{rest:02d}  {text}"
    start = "\r\033[K" if sys.stdout.isatty() else ""
    end = "\n" if line.endswith("\n") else ""
    print(start + line.rstrip("\n")[:LINE_WIDTH], end=end, flush=True)
