"""stage=tiny_vae: golden losses, the discriminator's input, the replay buffer, what it learns and exports."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from data.app import compose_config
from data.batch import Batch
from eval.metrics.lpips import BACKBONE_FILE, HEADS_FILE, MIN_SIDE_PX, Lpips
from models.assemble import build_vae
from models.diffusion.noise import KeyedNoise
from models.vae.latent_space import LatentSpace
from models.vae.tiny_vae import PRESETS, TinyVae, TinyVaeConfig
from train.build import build_trainer, plan, read_settings
from train.discriminator import STRETCH_FRAMES, PatchDiscriminator, ReplayBuffer, stretch_of
from train.stage import SetupContext, StepContext
from train.tiny_vae import DISCRIMINATOR, TINY_VAE, TinyVaeStage, TinyVaeStageConfig
from train.vae import psnr_db

GOLDEN = Path(__file__).resolve().parents[1] / "golden/tiny_vae.json"
SMALL = {"preset": "sprites", "num_frames": 9, "crop_px": 16, "discriminator_widths": [8, 16], "replay_size": 4}


@pytest.fixture(scope="module")
def model(tiny_model, tmp_path_factory):
    """The tiny model with a VAE on disk, whose fresh latents are normalised by measurement."""
    vae = build_vae(tiny_model, seed=0)
    rng = torch.Generator().manual_seed(0)
    vae.measure_normalisation([torch.rand(2, 3, 9, 16, 16, generator=rng) * 2 - 1])
    vae.save(tmp_path_factory.mktemp("vae") / "vae")
    path = str(next(tmp_path_factory.getbasetemp().glob("vae*/vae")))
    return replace(tiny_model, vae=replace(tiny_model.vae, path=path))


def pixel_batch(ids: list[int]) -> Batch:
    rng = np.random.default_rng(0)
    coarse = rng.integers(0, 256, (len(ids), 3, 33, 4, 4), dtype=np.uint8)
    pixels = torch.from_numpy(coarse.repeat(4, axis=-1).repeat(4, axis=-2))
    return Batch(ids, [str(each) for each in ids], [""] * len(ids), pixels=pixels)


def set_up(model, tmp_path, **changes) -> TinyVaeStage:
    stage = TinyVaeStage(TinyVaeStageConfig(**(SMALL | changes)))
    stage.setup(SetupContext(model, torch.device("cpu"), torch.float32, tmp_path, KeyedNoise(0)))
    return stage


def test_golden_losses(model, tmp_path):
    """Four steps, the discriminator from the third on."""
    stage, losses = set_up(model, tmp_path, gan_start=2), []
    optimizers = {name: torch.optim.AdamW(module.parameters(), lr=1e-3) for name, module in stage.modules().items()}
    for step in range(4):
        for update in stage.updates(step):
            loss = stage.train_step(pixel_batch([0, 1]), StepContext(step, update, 0, 0, 1, 0)).losses
            optimizers[update].zero_grad()
            loss.backward()
            optimizers[update].step()
            losses.append(float(loss.detach()))
    assert len(losses) == 2 + 2 * 2
    if os.environ.get("UPDATE_GOLDEN"):
        GOLDEN.write_text(json.dumps({"losses": losses}, indent=1) + "\n")
    np.testing.assert_allclose(losses, json.loads(GOLDEN.read_text())["losses"], atol=1e-5)


def test_each_update_leaves_the_other_module_alone(model, tmp_path):
    stage = set_up(model, tmp_path, gan_start=0)
    for update, other in ((TINY_VAE, DISCRIMINATOR), (DISCRIMINATOR, TINY_VAE)):
        stage.train_step(pixel_batch([0, 1]), StepContext(0, update, 0, 0, 1, 0)).losses.backward()
        assert any(parameter.grad is not None for parameter in stage.modules()[update].parameters())
        assert all(parameter.grad is None for parameter in stage.modules()[other].parameters())
        stage.modules()[update].zero_grad()
        assert all(parameter.requires_grad for parameter in stage.modules()[other].parameters())


def test_a_stretch_comes_with_the_latent_of_its_middle_frame():
    """Latent 0 covers frame 0, latent j >= 1 frames 4j - 3 .. 4j."""
    video = torch.arange(9.0).view(1, 1, 9, 1, 1).expand(1, 3, 9, 4, 4)
    latents = torch.arange(3.0).view(1, 1, 3, 1, 1).expand(1, 2, 3, 1, 1)
    for start, latent in ((0, 1), (2, 1), (3, 1), (4, 2), (6, 2)):
        stretch, of = stretch_of(video, latents, [start])
        assert stretch.shape == (1, 3 * STRETCH_FRAMES, 4, 4)
        assert stretch[0, :STRETCH_FRAMES, 0, 0].tolist() == [start, start + 1, start + 2]
        assert float(of[0, 0]) == latent


def test_the_replay_buffer_gives_back_older_ones_where_the_pick_is_odd():
    buffer = ReplayBuffer(size=3)
    first = torch.full((4, 9, 2, 2), 1.0)
    latents = torch.arange(4.0).view(4, 1, 1, 1)
    stretches, of = buffer.exchange(first, latents, [0, 1, 2, 3])
    assert torch.equal(stretches, first) and torch.equal(of, latents)  # nothing to give back yet
    assert len(buffer.stored) == 3  # the fourth replaced the first
    mixed, of = buffer.exchange(2 * first, latents + 10, [3, 0, 2, 11])
    assert mixed[:, 0, 0, 0].tolist() == [1, 2, 2, 1]
    assert of.flatten().tolist() == [1, 11, 12, 2]  # numbers 1 and 5 of the stored latents 3, 1, 2
    again, state = ReplayBuffer(size=3), buffer.state_dict()
    again.load_state_dict(state)
    storages = {stretch.untyped_storage().data_ptr() for stretch, _ in again.stored}
    assert len(storages) == 3 and state["stretches"].untyped_storage().data_ptr() not in storages
    for one, other in zip(again.exchange(first, latents, [5] * 4), buffer.exchange(first, latents, [5] * 4)):
        assert torch.equal(one, other)


@pytest.mark.parametrize(("size", "kept"), [(2, [3, 4]), (3, [2, 3, 4]), (5, [2, 3, 4, 5, 6]), (4, [2, 3, 4, 5])])
def test_a_replay_buffer_of_another_size_goes_on_with_the_newest(size, kept):
    def store(buffer: ReplayBuffer, *numbers: float) -> None:
        for number in numbers:
            buffer.exchange(torch.full((1, 1, 1, 1), number), torch.zeros(1, 1, 1, 1), [0])

    buffer, other = ReplayBuffer(size=3), ReplayBuffer(size)
    store(buffer, 0.0, 1.0, 2.0, 3.0, 4.0)
    other.load_state_dict(buffer.state_dict())
    if size == 3:
        assert [float(stretch) for stretch, _ in other.stored] == [3, 4, 2], "each in its place"
    store(other, *(5.0, 6.0)[: max(0, size - 3)])
    assert sorted(float(stretch) for stretch, _ in other.stored) == kept
    store(other, 7.0)
    assert sorted(float(stretch) for stretch, _ in other.stored) == [*kept[1:], 7], "the oldest is replaced"


def test_a_replay_buffer_forgets_stretches_of_another_crop():
    buffer = ReplayBuffer(size=3)
    buffer.exchange(torch.zeros(2, 9, 4, 4), torch.zeros(2, 4, 1, 1), [0, 0])
    larger, latents = torch.ones(2, 9, 8, 8), torch.ones(2, 4, 2, 2)
    assert torch.equal(buffer.exchange(larger, latents, [1, 3])[0], larger)
    assert [stretch.shape for stretch, _ in buffer.stored] == [(9, 8, 8)] * 2


@pytest.mark.parametrize("micro_batch", [1, 3, 8])
def test_half_of_what_the_discriminator_reads_is_replayed_at_any_micro_batch(micro_batch):
    buffer, noise, samples = ReplayBuffer(size=16), KeyedNoise(0), 480
    picks = torch.tensor([noise.integers(2**31, "replay", sample) for sample in range(samples)])
    fresh = torch.arange(float(samples)).view(-1, 1, 1, 1)  # float16 holds integers up to 2048
    parts = zip(fresh.split(micro_batch), picks.split(micro_batch), strict=True)
    read = torch.cat([buffer.exchange(part, part, chosen.tolist())[0] for part, chosen in parts])
    assert float((read != fresh).float().mean()) == pytest.approx(0.5, abs=0.08)


def test_the_discriminator_judges_patches_and_reads_the_latent():
    torch.manual_seed(0)
    judge = PatchDiscriminator(latent_channels=4, widths=[8, 16])
    stretch, latent = torch.rand(2, 9, 16, 16), torch.randn(2, 4, 4, 4)
    logits, features = judge(stretch, latent)
    assert logits.shape == (2, 1, 4, 4) and [each.shape[2] for each in features] == [8, 4]
    assert not torch.allclose(judge(stretch, -latent)[0], logits)


def test_crops_in_space_and_time_are_keyed_by_sample(model, tmp_path):
    stage = set_up(model, tmp_path, crop_px=8)
    batch = Batch([4, 9], ["", ""], ["", ""], pixels=torch.randint(256, (2, 3, 33, 16, 16), dtype=torch.uint8))
    both = stage.crop(batch, step=3)
    assert both.shape == (2, 3, 9, 8, 8)
    assert torch.equal(stage.crop(replace(batch, sample_ids=[9], pixels=batch.pixels[1:]), step=3)[0], both[1])
    windows = batch.model_pixels()[0].unfold(1, 9, 1).unfold(2, 8, 1).unfold(3, 8, 1).permute(1, 2, 3, 0, 4, 5, 6)
    assert (windows == both[0]).flatten(3).all(-1).sum() == 1  # a piece of the clip, as it is


def test_it_learns_and_its_export_knows_its_latent_space(model, pixel_shards, tmp_path):
    cfg = compose_config("train", [
        "model=tiny", "model.clip.height=32", "model.clip.width=32", f"model.vae.path={model.vae.path}",
        "stage=tiny_vae", "stage.preset=sprites", "stage.num_frames=9", "stage.crop_px=16", "stage.gan_start=25",
        "stage.discriminator_widths=[8,16]", "optim=muon", "optim.warmup_updates=0", "optim.ema_decay=0.5",
        "steps=30", "precision=fp32", "device=cpu", "global_batch=2", "micro_batch=2", "log_every=1",
        "logger.progress=false", f"shards={pixel_shards}", f"validation_shards={pixel_shards}",
        "validation_clips=2", f"output_dir={tmp_path}",
    ])  # fmt: skip
    assert build_trainer(read_settings(cfg)).fit() == 0
    records = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    psnr = [record["tiny_vae/psnr_db"] for record in records if "tiny_vae/psnr_db" in record]
    assert np.mean(psnr[20:25]) > np.mean(psnr[:5]) + 1
    assert "discriminator/filmed" in records[-2] and "discriminator/filmed" not in records[10]
    assert records[-1]["validation/psnr_db"] > 0 and "validation/full_psnr_db" in records[-1]
    space = build_vae(model).latent_space
    assert TinyVae.from_folder(tmp_path / "export/tiny_vae", expected=space).latent_space == space
    with pytest.raises(ValueError, match="fingerprint"):
        TinyVae.from_folder(tmp_path / "export/tiny_vae", expected=replace(space, fingerprint="other"))


def test_the_plan_tells_whether_there_is_a_discriminator_and_no_settings_of_other_stages(model, pixel_shards, tmp_path):
    cfg = compose_config("train", [
        "model=tiny", "stage=tiny_vae", "device=cpu", f"model.vae.path={model.vae.path}", f"shards={pixel_shards}",
        "model.clip.height=32", "model.clip.width=32", "stage.preset=sprites", "stage.num_frames=9",
        "stage.crop_px=16", f"output_dir={tmp_path}",
    ])  # fmt: skip
    settings = read_settings(cfg)
    text = "\n".join(plan(settings, build_trainer(settings)))
    assert "discriminator from step 10000" in text and "optim=dmd" not in text  # which has settings of a critic
    without = set_up(model, tmp_path, gan_weight=0.0, feature_weight=0.0, gan_start=0)
    assert "discriminator off" in without.describe()[0] and without.updates(0) == [TINY_VAE]


def test_a_run_goes_on_with_another_crop_but_with_no_other_vae(model, tmp_path):
    """Weights that decode one latent space must not be exported as those of another."""
    first = set_up(model, tmp_path, gan_start=0)
    for update in first.updates(0):
        first.train_step(pixel_batch([0, 1]), StepContext(0, update, 0, 0, 1, 0))
    state, again = first.state_dict(), set_up(model, tmp_path, gan_start=0, crop_px=8)
    again.load_state_dict(state)
    again.train_step(pixel_batch([1, 3]), StepContext(1, DISCRIMINATOR, 0, 0, 1, 0))
    vae = build_vae(model)
    vae.normalise_by([0.5] * 4, [1.0] * 4)
    vae.save(tmp_path / "other")
    other = set_up(replace(model, vae=replace(model.vae, path=str(tmp_path / "other"))), tmp_path)
    with pytest.raises(ValueError, match="the checkpoint of this run was made for another latent space"):
        other.load_state_dict(state)


def test_validation_is_of_single_clips(model, tmp_path, monkeypatch):
    stage, sizes, decode = set_up(model, tmp_path), [], TinyVae.decode
    monkeypatch.setattr(TinyVae, "decode", lambda vae, latents: sizes.append(len(latents)) or decode(vae, latents))
    stage.held_out = batch = pixel_batch([0, 1, 2])
    found = stage.validate(0)
    with torch.no_grad():
        latents = stage.vae.encode(batch.model_pixels())
        expected = psnr_db(decode(stage.tiny_vae, latents), batch.model_pixels()).mean()
    assert sizes == [1, 1, 1] and found.metrics["psnr_db"] == pytest.approx(float(expected), abs=1e-4)
    assert [video.shape for video in found.videos.values()] == [(33, 16, 48, 3)] * 3


def test_a_start_of_another_preset_and_absent_lpips_are_refused(model, tmp_path):
    TinyVae.from_config(replace(TinyVaeConfig.sprites(4), encoder_width=8), build_vae(model).latent_space).save(
        tmp_path / "tiny"
    )
    with pytest.raises(ValueError, match="stage.init_from=.*tiny is not of stage.preset=sprites: .*encoder_width=8"):
        set_up(model, tmp_path, init_from=str(tmp_path / "tiny"))
    with pytest.raises(FileNotFoundError, match="stage.lpips_weights=/nowhere holds no alexnet"):
        TinyVaeStage(TinyVaeStageConfig(**SMALL, lpips_weights="/nowhere")).check(model)
    with pytest.raises(ValueError, match=r"stage.preset=taew2_1 decodes \(16, 8\), .* has \(4, 4\); .*: sprites"):
        TinyVaeStage(TinyVaeStageConfig(**(SMALL | {"preset": "taew2_1"}))).check(model)


def test_a_crop_that_lpips_cannot_read_is_refused(model, tmp_path):
    for name in (BACKBONE_FILE, HEADS_FILE):
        (tmp_path / name).touch()
    with pytest.raises(ValueError, match="stage.crop_px=16 must be at least 31 with stage.lpips_weights"):
        TinyVaeStage(TinyVaeStageConfig(**SMALL, lpips_weights=str(tmp_path))).check(model)
    assert len(Lpips()(torch.zeros(2, 3, MIN_SIDE_PX, MIN_SIDE_PX), torch.ones(2, 3, 31, 31))) == 2
    with pytest.raises(RuntimeError, match="too small"):
        Lpips()(torch.zeros(2, 3, MIN_SIDE_PX - 1, MIN_SIDE_PX), torch.ones(2, 3, 30, 31))


def test_lpips_of_each_frame_is_part_of_the_loss(model, tmp_path):
    large = replace(model, clip=replace(model.clip, height=32, width=32))
    torch.manual_seed(0)
    lpips, batch = Lpips().requires_grad_(False), pixel_batch([0, 1])
    batch = replace(batch, pixels=batch.pixels.repeat_interleave(2, -1).repeat_interleave(2, -2))
    torch.save(
        {name: value for name, value in lpips.state_dict().items() if "features" in name}, tmp_path / BACKBONE_FILE
    )
    torch.save({f"lin{i}.model.1.weight": head.weight for i, head in enumerate(lpips.heads)}, tmp_path / HEADS_FILE)
    changes = {"crop_px": 32, "num_frames": 5, "perceptual_weight": 0.5}
    with_it, without = (set_up(large, tmp_path, lpips_weights=path, **changes) for path in (str(tmp_path), None))
    found, plain = (stage.train_step(batch, StepContext(0, TINY_VAE, 0, 0, 1, 0)) for stage in (with_it, without))
    pixels = with_it.crop(batch, 0)
    decoded = with_it.tiny_vae.reconstruct(with_it.vae.encode(pixels))[0].detach() * 2 - 1
    each = [lpips(decoded[:, :, frame], pixels[:, :, frame]) for frame in range(5)]
    term = found.metrics["lpips"].detach()
    torch.testing.assert_close(term, torch.stack(each).mean(), rtol=1e-4, atol=0)
    torch.testing.assert_close((found.losses - plain.losses).detach(), 0.5 * term, rtol=1e-3, atol=0)


@pytest.mark.parametrize("name", PRESETS)
def test_presets_have_their_published_sizes(name):
    decoders = {"taew2_1": 9.84, "taew2_2": 9.92, "wan_2_2_large": 56.7, "sprites": 0.1107}  # M parameters
    config = TinyVaeConfig.preset(name, latent_channels=8)
    space = LatentSpace(config.latent_channels, config.spatial_stride, "any")
    with torch.device("meta"):
        decoder = TinyVae(config, space).decoder
    millions = sum(parameter.numel() for parameter in decoder.parameters()) / 1e6
    assert millions == pytest.approx(decoders[name], rel=0.01)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_frames": 6}, "num_frames=6 must be 1 . 4k; nearest valid: 5"),
        ({"num_frames": 1}, "stage.num_frames=1 must be at least 5"),
        ({"gan_weight": -1.0}, "stage.gan_weight=-1.0 must be >= 0"),
        ({"preset": "taew"}, "stage.preset='taew' must be one of taew2_1"),
        ({"discriminator_widths": []}, r"stage.discriminator_widths=\[\] must name at least one width"),
        ({"discriminator_widths": [16, 100]}, r"\[16, 100\] must name .* below 32 or a multiple of 16"),
        ({"discriminator_widths": [8] * 5, "crop_px": 16}, r"halves stage.crop_px=16 5 times, to nothing.* least 32"),
    ],
)
def test_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        TinyVaeStageConfig(**settings)


def test_a_crop_that_does_not_fit_is_refused(tiny_model):
    with pytest.raises(ValueError, match="stage.crop_px=10 must be a multiple of 4.*nearest valid: 8"):
        TinyVaeStage(TinyVaeStageConfig(num_frames=9, crop_px=10)).check(tiny_model)
    with pytest.raises(ValueError, match="stage.num_frames=37 must be at most"):
        TinyVaeStage(TinyVaeStageConfig(num_frames=37, crop_px=8)).check(tiny_model)
