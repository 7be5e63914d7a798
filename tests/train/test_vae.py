"""stage=vae: it learns, its export is a WanVae folder with measured normalisation, its crops are valid."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from data.app import compose_config
from data.batch import Batch, collate
from data.shards import ShardDataset
from models.assemble import build_vae
from models.diffusion.noise import KeyedNoise
from models.vae.wan_vae import WanVae
from train.build import build_trainer, read_settings
from train.stage import SetupContext, StepContext
from train.vae import VaeStage, VaeStageConfig, edge_difference, psnr_db, start_near_linear

GOLDEN = Path(__file__).resolve().parents[1] / "golden/vae.json"


def run(shards, folder, *overrides):
    cfg = compose_config("train", [
        "model=tiny", "model.clip.height=32", "model.clip.width=32", "stage=vae", "stage.num_frames=5",
        "optim=scratch", "precision=fp32", "device=cpu", "global_batch=2", "micro_batch=2", "log_every=1",
        "logger.progress=false", "stage.normalisation_clips=4", f"shards={shards}",
        f"output_dir={folder}", *overrides,
    ])  # fmt: skip
    trainer = build_trainer(read_settings(cfg))
    assert trainer.fit() == 0
    return [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]


def test_golden_losses(tiny_model, tmp_path):
    """Five steps on pixels that come from no renderer and no codec."""
    stage = VaeStage(VaeStageConfig(num_frames=5, channels_last=False))
    stage.setup(SetupContext(tiny_model, torch.device("cpu"), torch.float32, tmp_path, KeyedNoise(0)))
    optimizer = torch.optim.AdamW(stage.vae.parameters(), lr=1e-3)
    rng, losses = np.random.default_rng(0), []
    coarse = rng.integers(0, 256, (2, 3, 33, 4, 4), dtype=np.uint8)
    pixels = torch.from_numpy(coarse.repeat(4, axis=-1).repeat(4, axis=-2))
    for step in range(5):
        batch = Batch([0, 1], ["a", "b"], ["", ""], pixels=pixels)
        loss = stage.train_step(batch, StepContext(step, "vae", 0, 0, 1, 0)).losses
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    if os.environ.get("UPDATE_GOLDEN"):
        GOLDEN.write_text(json.dumps({"losses": losses}, indent=1) + "\n")
    np.testing.assert_allclose(losses, json.loads(GOLDEN.read_text())["losses"], atol=1e-5)


def test_learns_and_exports_a_normalised_vae(pixel_shards, tmp_path):
    records = run(
        pixel_shards,
        tmp_path,
        "steps=25",
        "optim=muon",
        "optim.warmup_updates=0",
        "optim.ema_decay=0.5",
        "model.vae.base_dim=8",
        f"validation_shards={pixel_shards}",
        "validation_clips=2",
    )
    assert np.mean([r["vae/psnr_db"] for r in records[20:25]]) > np.mean([r["vae/psnr_db"] for r in records[:5]]) + 1
    assert records[-1]["validation/psnr_db"] > 0
    assert len(list((tmp_path / "validation/step_00000025").glob("*.mp4"))) == 2

    vae = WanVae.from_folder(tmp_path / "export/vae")
    dataset = ShardDataset(pixel_shards, ["pixels"])
    pixels = collate([dataset[n] for n in (0, 2, 5, 7)]).model_pixels()  # the four evenly spaced ones
    latents = vae.encode(pixels)
    torch.testing.assert_close(latents.mean((0, 2, 3, 4)), torch.zeros(4), atol=1e-3, rtol=0)
    torch.testing.assert_close(latents.std((0, 2, 3, 4)), torch.ones(4), atol=1e-2, rtol=0)
    assert vae.decode(latents).shape == pixels.shape


def test_a_finished_run_keeps_its_export_where_settings_differ(pixel_shards, tmp_path):
    other_shards, folder = tmp_path / "other", tmp_path / "run/export/vae"
    shutil.copytree(pixel_shards, other_shards)
    index = json.loads((other_shards / "index.json").read_text())
    (other_shards / "index.json").write_text(json.dumps(index | {"samples": index["samples"][:3]}))
    run(pixel_shards, tmp_path / "run", "steps=1")
    exported = {file.name: file.read_bytes() for file in folder.iterdir()}
    run(other_shards, tmp_path / "run", "steps=1", "optim.ema_decay=0.0")
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == exported
    shutil.rmtree(folder)
    run(pixel_shards, tmp_path / "run", "steps=1")
    assert (folder / "config.json").read_bytes() == exported["config.json"]  # measured on the same clips


def test_a_frozen_encoder_keeps_the_latent_space(pixel_shards, tmp_path, tiny_model):
    run(pixel_shards, tmp_path / "first", "steps=1")
    before = tmp_path / "first/export/vae"
    others = "stage.normalisation_clips=2"  # measured anew the space would be another
    run(pixel_shards, tmp_path / "second", "steps=2", f"stage.init_from={before}", "stage.freeze_encoder=true", others)
    first, second = (WanVae.from_folder(folder) for folder in (before, tmp_path / "second/export/vae"))
    pixels = torch.rand(1, 3, 5, 32, 32) * 2 - 1
    assert first.latent_space == second.latent_space
    assert torch.equal(first.encode(pixels), second.encode(pixels))
    assert not torch.equal(first.decode(first.encode(pixels)), second.decode(first.encode(pixels)))


def test_a_frozen_encoder_stays_that_of_the_run_when_its_start_has_changed(pixel_shards, tmp_path):
    """The encoder is the checkpoint's; the normalisation of another one would move its latents."""
    run(pixel_shards, tmp_path / "first", "steps=1")
    start, frozen = tmp_path / "first/export/vae", tmp_path / "frozen/export/vae"
    settings = (f"stage.init_from={start}", "stage.freeze_encoder=true")
    run(pixel_shards, tmp_path / "frozen", "steps=1", *settings)
    space = WanVae.from_folder(frozen).latent_space
    run(pixel_shards, tmp_path / "first", "steps=2")
    assert WanVae.from_folder(start).latent_space != space
    run(pixel_shards, tmp_path / "frozen", "steps=2", *settings)
    assert WanVae.from_folder(frozen).latent_space == space
    with pytest.raises(ValueError, match="stage.freeze_encoder=false must stay as the run began"):
        run(pixel_shards, tmp_path / "frozen", "steps=3", settings[0])


def test_the_start_is_a_function_of_the_seed_and_its_residual_branches_are_silent(tiny_model):
    def started(seed: int):
        vae = build_vae(tiny_model, seed=0)
        start_near_linear(vae, torch.Generator().manual_seed(seed))
        return vae

    pixels = torch.rand(1, 3, 5, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    vae, same, other = started(0), started(0), started(1)
    latents = vae.encode(pixels)
    assert torch.equal(latents, same.encode(pixels)) and not torch.equal(latents, other.encode(pixels))
    branches = [parameter for name, parameter in same.named_parameters() if ".conv1." in name]
    assert branches
    with torch.no_grad():
        for parameter in branches:
            parameter.normal_()
    assert torch.equal(latents, same.encode(pixels))


def test_crops_are_of_the_stated_length_and_keyed_by_sample():
    stage = VaeStage(VaeStageConfig(num_frames=5))
    stage.noise = KeyedNoise(0)
    numbers = torch.arange(33, dtype=torch.uint8).view(1, 1, 33, 1, 1).expand(2, 3, 33, 1, 1)

    def crop(ids: list[int], step: int) -> torch.Tensor:  # numbers of the frames
        batch = Batch(ids, [""] * len(ids), [""] * len(ids), pixels=numbers[: len(ids)])
        return ((stage.crop(batch, step) + 1) * 127.5).round()

    both = crop([4, 9], step=3)
    assert both.shape == (2, 3, 5, 1, 1)
    assert torch.equal(both[:, 0, :, 0, 0].diff(), torch.ones(2, 4))
    assert torch.equal(crop([9], step=3)[0], both[1])
    starts = {float(crop([1], step)[0, 0, 0]) for step in range(300)}
    assert starts == set(map(float, range(29)))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_frames": 6}, "num_frames=6 must be 1 . 4k; nearest valid: 5"),
        ({"freeze_encoder": True}, "stage.freeze_encoder=true needs stage.init_from"),
        ({"kl_weight": -1.0}, "stage.kl_weight=-1.0 must be >= 0"),
    ],
)
def test_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        VaeStageConfig(**settings)


def test_crop_longer_than_the_clip_is_refused(tiny_model):
    with pytest.raises(ValueError, match=r"stage.num_frames=37 must be at most model.clip.num_frames=33"):
        VaeStage(VaeStageConfig(num_frames=37)).check(replace(tiny_model))


def test_terms():
    flat, step = torch.zeros(1, 3, 1, 4, 4), torch.zeros(1, 3, 1, 4, 4)
    step[..., 2:] = 1.0
    assert float(edge_difference(step, flat)) == pytest.approx(1 / 3)
    assert float(edge_difference(step + 5, step)) == pytest.approx(0.0)
    assert float(psnr_db(flat + 0.2, flat)) == pytest.approx(20.0, abs=1e-4)
