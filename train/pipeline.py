"""Chains of commands: what `make quickstart`, `make zoo` and `make ablations` are made of.

A step is a command that a user could type; it runs in a process of its own (or several, under torchrun), with one
progress line, its output in a log and a record of what it took. A finished step is not run again, and an interrupted
one resumes, because every command does; where its arguments or the configuration that they compose have changed, that
step and all after it are made anew. A chain that is told to stop waits for its command, which may be saving.
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
from dataclasses import asdict, dataclass
from datetime import datetime
from functools import cached_property
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from omegaconf import OmegaConf

from data.app import CONF_DIR, EXIT_CONFIG, EXIT_INTERRUPTED, compose_config
from data.config_errors import ConfigError
from models.device import usable_cores
from models.files import write_json
from stream.provenance import git_commit
from train.checkpoint import changed_fields

ROOT = Path(__file__).resolve().parents[1]
REFRESH_SECONDS = 0.5
RECORD_SECONDS = 10.0  # between two records of a step in work
LINE_WIDTH = 110  # characters of the progress line
EXIT_TERMINATED = 143  # exit code after TERM, as shells have it
SHUTDOWN_SECONDS = 600  # in which processes under torchrun must have saved when they are told to stop; else it has 30


def processes_of(gpus: int, cores: int) -> int:
    """How many processes a training stage gets: NCCL wants a GPU for each, without GPUs two on one thread each beat
    one on two by far.
    """
    return min(2, gpus or cores)


PROCESSES = processes_of(torch.cuda.device_count(), usable_cores())


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

    @cached_property
    def config(self) -> dict[str, Any] | None:
        """What the arguments compose, interpolations unresolved; None for a command without a configuration.

        Raises ConfigError.
        """
        app, *overrides = self.arguments
        if not (CONF_DIR / f"{app}.yaml").is_file():
            return None
        try:
            composed = OmegaConf.to_container(compose_config(app, overrides))
        except ConfigError as error:
            raise ConfigError(f"{self.name}: {error}") from error
        return json.loads(_in_checkout([json.dumps(composed)])[0])

    @property
    def environment(self) -> dict[str, str]:
        """The cores are shared among the processes, which get the time to save; what the user has set of that stays."""
        threads = max(1, usable_cores() // self.processes)
        own = {"OMP_NUM_THREADS": str(threads), "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": str(SHUTDOWN_SECONDS)}
        return {**own, **os.environ, "PYTHONUNBUFFERED": "1"}

    @property
    def product(self) -> Path | None:
        """Where it leaves what it makes; None for a command that names no place."""
        key = "output_dir=" if self.arguments[0] == "train" else "out="
        found = [given.removeprefix(key) for given in self.arguments if given.startswith(key)]
        return Path(found[0]) if found else None

    @property
    def training_run(self) -> Path | None:
        """Folder of the checkpoints that the command would go on from; None where it does not train."""
        return self.product if self.arguments[0] == "train" else None

    def record_files(self, out: Path) -> tuple[Path, Path]:
        """Where its record is when it is finished, and while it is in work: by name, as steps may come before it."""
        name = f"{self.name.replace(' ', '_')}.json"
        return out / "done" / name, out / "spent" / name


@dataclass
class Record:
    """What is kept of a step, in a file."""

    arguments: list[str]  # paths below the checkout are relative to it
    seconds: float  # wall time of all its starts, with what was done again after a kill
    git_commits: list[str]  # checked out at its starts, each once
    config: dict[str, Any] | None = None  # composed of the arguments; None where that is not known

    def changes(self, step: Step) -> list[str]:
        """What of the step's arguments or configuration is different; empty where it is the step of this record."""
        if self.config is not None and step.config is not None:
            return changed_fields(self.config, step.config)
        return [] if _in_checkout(self.arguments) == _in_checkout(step.arguments) else ["other arguments"]


def _in_checkout(arguments: Iterable[str]) -> list[str]:
    return [argument.replace(f"{ROOT}/", "") for argument in arguments]


def record_of(step: Step, out: Path) -> Record | None:
    """Of a step that was finished or begun; None where it was not."""
    for file in step.record_files(out):
        if file.exists():
            return Record(**json.loads(file.read_text()))
    return None


# ------------------------------------------------------------------------------------------ running
def run_chain(main: Callable[[], None]) -> None:
    """Run the ``main`` of a chain. After Ctrl-C and TERM exit with 130 and 143, and one line that says where it was;
    with 2 and one line for a configuration that does not compose.
    """

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
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(EXIT_CONFIG) from None


def run_all(
    steps: Sequence[Step], out: Path, remark: Callable[[Step], Iterable[str]] = lambda step: ()
) -> dict[str, Record]:
    """Every step in order -> its record by name; ``remark`` has lines to print of a step that is done."""
    forget_outdated(steps, out)
    records = {}
    for number, step in enumerate(steps, start=1):
        records[step.name] = run(step, number, len(steps), out)
        for line in remark(step):
            print(line, flush=True)
    return records


def forget_outdated(steps: Sequence[Step], out: Path) -> None:
    """Where a step was begun or finished with other settings, forget it and all after it, which may depend on it.

    Their training runs get another name: the commands would go on from the checkpoints.
    """
    reasons = [_why_outdated(step, out) for step in steps]
    first = next((number for number, found in enumerate(reasons) if found), len(steps))
    if first < len(steps):
        print(f"made anew from {steps[first].name} on, {reasons[first]}", flush=True)
    for step in reversed(steps[first:]):  # backwards: what is forgotten last tells of the rest
        folder = step.training_run
        if folder is not None and folder.exists():
            aside = folder.with_name(f"{folder.name}_until_{datetime.now():%Y%m%d_%H%M%S}")
            folder.rename(aside)
            print(f"what {step.name} had made is in {aside}", flush=True)
        for file in step.record_files(out):
            file.unlink(missing_ok=True)


def _why_outdated(step: Step, out: Path) -> str:
    """Empty for a step that was not begun, or as it is now and with what it made in its place."""
    if (record := record_of(step, out)) is None:
        return ""
    if changes := record.changes(step):
        return f"where settings differ: {'; '.join(changes)}"
    is_done = step.record_files(out)[0].exists()
    return f"as {step.product} is gone" if is_done and step.product and not step.product.exists() else ""


def run(step: Step, number: int, total: int, out: Path) -> Record:
    """Run one step, its output at the end of its log -> its record; a finished one is skipped.

    Raises SystemExit with the end of the output where the command fails; KeyboardInterrupt or Terminated, with the
    step's name, where the chain is told to stop, once the command has ended.
    """
    done, spent = step.record_files(out)
    record = record_of(step, out)
    if record is None or record.changes(step):
        record = Record(_in_checkout(step.arguments), 0.0, [], step.config)
    elif done.exists():
        _say(number, total, step.name, record.seconds, "done before\n")
        return record
    record.git_commits = list(dict.fromkeys([*record.git_commits, git_commit()]))
    log_path = out / "logs" / f"{number:02d}_{done.stem}.log"
    for file in (done, spent, log_path):
        file.parent.mkdir(parents=True, exist_ok=True)
    done.unlink(missing_ok=True)
    write_json(spent, asdict(record))

    def show() -> None:
        if sys.stdout.isatty():
            _say(number, total, step.name, record.seconds, last_line(log_path))

    begin = log_path.stat().st_size if log_path.exists() else 0
    if code := _run_command(step, log_path, record, spent, show):
        raise SystemExit(_failure(step, code, log_path, begin))
    write_json(done, asdict(record))
    spent.unlink()
    _say(number, total, step.name, record.seconds, "\n")
    return record


def _run_command(step: Step, log_path: Path, record: Record, spent: Path, show: Callable[[], None]) -> int:
    """Exit code of the command. The seconds of the record go on while it runs, and are written now and then."""
    started, written = time.monotonic() - record.seconds, record.seconds
    with log_path.open("a") as log:
        print(f"\n== {step.name}, started {datetime.now():%Y-%m-%d %H:%M:%S}", file=log, flush=True)
        process = subprocess.Popen(
            [sys.executable, *step.command],
            cwd=ROOT, stdout=log, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, env=step.environment,
        )  # fmt: skip
    try:
        while process.poll() is None:
            time.sleep(REFRESH_SECONDS)
            record.seconds = time.monotonic() - started
            if record.seconds - written >= RECORD_SECONDS:
                write_json(spent, asdict(record))
                written = record.seconds
            show()
    except (KeyboardInterrupt, Terminated) as stop:
        _wait_for_end(process, stop)
        raise type(stop)(step.name) from None
    finally:
        record.seconds = time.monotonic() - started
        write_json(spent, asdict(record))
    return process.returncode


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


def _failure(step: Step, code: int, log_path: Path, begin: int) -> str:
    """What to say of a command that failed: itself and the end of what it wrote, from byte ``begin`` of the log on."""
    written = log_path.read_bytes()[begin:].decode(errors="replace")
    lines = written.replace("\r", "\n").splitlines()
    refusals = [
        line for line in dict.fromkeys(lines[:-25]) if line.startswith("error: ")
    ]  # a launcher tells its own after
    tail = "\n".join([*refusals, *lines[-25:]])
    command = shlex.join(["python", *step.command])
    return f"\n{step.name} failed with code {code}\n$ {command}\n{tail}\n\nlog: {log_path}"


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
