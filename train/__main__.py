"""`python -m train stage=vae|teacher|… experiment=… field=value …`; `--help` lists what there is.

Under `accelerate launch --config_file conf/launch/<mode>.yaml -m train …` or torchrun on many GPUs. Exit
codes: 0 done, 2 configuration refused, 75 preempted with a checkpoint (run the same command again).
"""

from __future__ import annotations

import logging
import os

from omegaconf import DictConfig

from data.app import run_app


def main(cfg: DictConfig) -> int:
    """Check everything, build, train. Returns the exit code."""
    from train.build import build_trainer, read_settings

    if int(os.environ.get("RANK", "0")) > 0:
        logging.getLogger().setLevel(logging.WARNING)  # one process tells the story
    trainer = build_trainer(read_settings(cfg))
    try:
        return trainer.fit()
    finally:
        trainer.close()


if __name__ == "__main__":
    run_app("train", main)
