"""`python -m train stage=vae|teacher|… experiment=… field=value …`; `--help` lists what there is.

Under `accelerate launch --config_file conf/launch/<mode>.yaml -m train …` or torchrun on many GPUs. Exit
codes: 0 done, 1 the run cannot go on, 2 configuration refused, 75 preempted with a checkpoint (run the same command
again), 130 the same after Ctrl-C. Launchers turn 75 into 1, so the file that MARIONETTE_REQUEUE_FILE names, if it is
set, is made beside it. A launcher that is told to stop kills its processes 30 s later, saved or not;
TORCH_ELASTIC_SHUTDOWN_TIMEOUT=600 (seconds, read by torch 2.13) gives a long step and a big checkpoint the time.
"""

from __future__ import annotations

import fcntl
import logging
import os
import socket
from pathlib import Path
from typing import TextIO

from omegaconf import DictConfig

from data.app import run_app

log = logging.getLogger(__name__)

LOCK_FILE = ".running"  # in output_dir: who writes there
REQUEUE_FILE = "MARIONETTE_REQUEUE_FILE"  # name of the environment variable


def main(cfg: DictConfig) -> int:
    """Check everything, build, train. Returns the exit code."""
    from train.build import build_trainer, read_settings
    from train.trainer import EXIT_REQUEUE

    if int(os.environ.get("RANK", "0")) > 0:
        logging.getLogger().setLevel(logging.WARNING)  # one process tells the story
    settings = read_settings(cfg)
    lock = claim(Path(cfg.output_dir)) if int(os.environ.get("RANK", "0")) == 0 else None
    trainer = build_trainer(settings)
    failed = True
    try:
        code = trainer.fit()
        failed = False
        if code == EXIT_REQUEUE and REQUEUE_FILE in os.environ:
            Path(os.environ[REQUEUE_FILE]).touch()
        return code
    finally:
        trainer.close(failed)
        if lock is not None:
            lock.close()


def claim(output_dir: Path) -> TextIO:
    """A lock on the folder for as long as the file is open; the system lets go of it when the process ends, however.

    Raises ValueError, naming who has it, where another run writes there.
    """
    output_dir.mkdir(parents=True, exist_ok=True)
    lock = (output_dir / LOCK_FILE).open("a+")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        lock.seek(0)
        raise ValueError(
            f"output_dir={output_dir} is being written by {lock.read().strip()}; stop that run, or name another place"
        ) from None
    except OSError as error:  # a file system without locks
        log.debug("%s is not locked: %s", output_dir, error)
    lock.truncate(0)
    job = os.environ.get("SLURM_JOB_ID")
    lock.write(f"process {os.getpid()} on {socket.gethostname()}{f', job {job}' if job else ''}\n")
    lock.flush()
    return lock


if __name__ == "__main__":
    run_app("train", main, kept="the last checkpoint, if there is one, is kept; the same command continues it")
