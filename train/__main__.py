"""`python -m train stage=vae|teacher|… experiment=… field=value …`; `--help` lists what there is.

Under `accelerate launch --config_file conf/launch/<mode>.yaml -m train …` or torchrun on many GPUs. Exit
codes: 0 done, 1 the run cannot go on, 2 configuration refused, 75 preempted with a checkpoint (run the same command
again), 130 the same after Ctrl-C. Launchers turn 75 into 1, so the file that MARIONETTE_REQUEUE_FILE names, if it is
set, is made beside it. A launcher that is told to stop kills its processes 30 s later, saved or not;
TORCH_ELASTIC_SHUTDOWN_TIMEOUT=600 (seconds, read by torch 2.13) gives a long step and a big checkpoint the time.
"""

from __future__ import annotations

import logging
import os
from pathlib import Path

from omegaconf import DictConfig

from data.app import claim, run_app

REQUEUE_FILE = "MARIONETTE_REQUEUE_FILE"  # name of the environment variable


def main(cfg: DictConfig) -> int:
    """Check everything, build, train. Returns the exit code."""
    from train.build import build_trainer, read_settings
    from train.trainer import EXIT_REQUEUE

    is_first = int(os.environ.get("RANK", "0")) == 0
    if not is_first:
        logging.getLogger().setLevel(logging.WARNING)  # one process tells the story
    settings = read_settings(cfg)
    lock = claim(Path(cfg.output_dir), f"output_dir={cfg.output_dir}") if is_first else None
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


if __name__ == "__main__":
    run_app("train", main, kept="the last checkpoint, if there is one, is kept; the same command continues it")
