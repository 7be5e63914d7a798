"""Distillation through the Trainer: an interrupted run ends where an uninterrupted one does, bit for bit."""

from __future__ import annotations

import signal
import time
from multiprocessing import get_context
from pathlib import Path

import pytest
import torch
from tiny_distill import make_batch, setup_context
from torch.utils.data import Dataset

from data.batch import Sample
from data.loader import Loader, ResumableSampler
from distill.causal_init import CausalInit, CausalInitConfig
from distill.ode_pairs import OdePairs, OdePairsConfig
from distill.pair_store import PairStore
from distill.self_forcing import SelfForcing, SelfForcingConfig
from train.accelerator import Parallel
from train.optim import ModuleOptim, OptimConfig
from train.trainer import TrainConfig, Trainer

NUM_CLIPS = 5
TRACKS = {"tracks_min": 3, "tracks_max": 5}


class Clips(Dataset):
    """Clips made up from their number."""

    def __init__(self, model_cfg) -> None:
        self.model_cfg = model_cfg

    def __len__(self) -> int:
        return NUM_CLIPS

    def __getitem__(self, number: int) -> Sample:
        batch = make_batch(self.model_cfg, [int(number)])
        return Sample(
            int(number), batch.keys[0], batch.captions[0],
            latents=batch.latents[0], prompt_embeds=batch.prompt_embeds[0], tracks=batch.tracks,
        )  # fmt: skip


def trainer_of(model_cfg, stage, folder: Path, steps: int) -> Trainer:
    cfg = TrainConfig(
        output_dir=str(folder), steps=steps, global_batch=4, micro_batch=2, precision="bf16", device="cpu",
        log_every=100, checkpoint_every=2, validate_every=-1,
    )  # fmt: skip
    critic = ModuleOptim(ema_decay=0.0)
    optim = OptimConfig(lr=1e-3, betas=[0.0, 0.999], ema_decay=0.9, modules={"critic": critic})
    stage.setup(setup_context(model_cfg, folder))
    loader = None
    if stage.needs_data:
        loader = Loader(Clips(model_cfg), ResumableSampler(NUM_CLIPS, cfg.micro_batch, seed=0))
    return Trainer(cfg, optim, stage, Parallel(device="cpu", precision="bf16"), loader)


def stop_after(trainer: Trainer, steps: int) -> None:
    """Runs the trainer and kills it before its step number `steps`."""
    train_one_step = trainer.train_one_step

    def killed(batches):
        if trainer.counters.step == steps:
            raise KeyboardInterrupt
        train_one_step(batches)

    trainer.train_one_step = killed
    with pytest.raises(KeyboardInterrupt):
        trainer.fit()


def assert_equal_runs(whole: Trainer, resumed: Trainer) -> None:
    for name, module in whole.modules.items():
        for key, value in module.state_dict().items():
            assert torch.equal(value, resumed.modules[name].state_dict()[key]), f"{name}.{key}"
    for name, ema in whole.emas.items():
        assert all(torch.equal(value, resumed.emas[name].values[key]) for key, value in ema.values.items())
    assert whole.stage.state_dict() == resumed.stage.state_dict()


@pytest.fixture(scope="module")
def pairs(model_cfg, tmp_path_factory) -> Path:
    """Pairs of an interrupted and resumed run of the stage, through the trainer."""
    folder = tmp_path_factory.mktemp("ode_pairs")
    cfg = OdePairsConfig(steps=3, global_batch=4, **TRACKS)
    stop_after(trainer_of(model_cfg, OdePairs(cfg), folder, steps=3), 1)  # before the first checkpoint
    assert trainer_of(model_cfg, OdePairs(cfg), folder, steps=3).fit() == 0
    return folder / "pairs"


def test_interrupted_pairs_equal_a_clean_run(model_cfg, pairs, tmp_path):
    cfg = OdePairsConfig(steps=3, global_batch=4, **TRACKS)
    assert trainer_of(model_cfg, OdePairs(cfg), tmp_path, steps=3).fit() == 0
    clean, found = PairStore.open(tmp_path / "pairs"), PairStore.open(pairs)
    for number in range(12):
        one, other = vars(clean.read(number)), vars(found.read(number))
        assert all(value is None or torch.equal(value, other[name]) for name, value in one.items())


def test_causal_init(model_cfg, pairs, tmp_path):
    cfg = CausalInitConfig(pairs=str(pairs))

    def make(folder: str) -> Trainer:
        return trainer_of(model_cfg, CausalInit(cfg), tmp_path / folder, steps=4)

    whole = make("whole")
    assert whole.fit() == 0
    stop_after(make("cut"), 3)
    resumed = make("cut")
    resumed.fit()
    assert_equal_runs(whole, resumed)
    assert (tmp_path / "cut" / "export" / "student" / "model.safetensors").exists()


@pytest.mark.parametrize("reuse_rollout", [False, True])
def test_self_forcing(model_cfg, tmp_path, reuse_rollout):
    cfg = SelfForcingConfig(student_every=2, reuse_rollout=reuse_rollout, **TRACKS)

    def make(folder: str) -> Trainer:
        return trainer_of(model_cfg, SelfForcing(cfg), tmp_path / folder, steps=4)

    whole = make("whole")
    assert whole.fit() == 0
    assert whole.counters.updates == {"student": 2, "critic": 4}
    stop_after(make("cut"), 3)
    resumed = make("cut")
    resumed.fit()
    assert_equal_runs(whole, resumed)


def fit_self_forcing(model_cfg, folder: Path, steps: int) -> Trainer:
    torch.set_num_threads(1)  # a sum over two threads has another order
    trainer = trainer_of(model_cfg, SelfForcing(SelfForcingConfig(student_every=2, **TRACKS)), folder, steps=steps)
    trainer.fit()
    return trainer


def test_self_forcing_after_kill_9(model_cfg, tmp_path):
    """Killed at whatever it was doing: a rollout, an update, a checkpoint."""
    process = get_context("spawn").Process(target=fit_self_forcing, args=(model_cfg, tmp_path / "cut", 12))
    process.start()
    deadline = time.monotonic() + 120
    while not (tmp_path / "cut/checkpoints/last_good").exists() and time.monotonic() < deadline:
        time.sleep(0.005)
    process.kill()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert not (tmp_path / "cut/checkpoints/step_00000012").exists()  # it had not come to the end
    assert_equal_runs(*(fit_self_forcing(model_cfg, tmp_path / name, 12) for name in ("whole", "cut")))
