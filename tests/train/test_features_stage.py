"""stage=features: golden losses, its targets, the softening, what it learns and exports."""

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
from data.shards import npy_bytes, write_shards
from data.sprites import SpritesConfig, render_clip
from data.video import write_video
from eval.metrics.sprites_network import BEARERS, LABELS, MOTION_UNIT, SpritesNetwork, SpritesNetworkConfig
from models.condition import ClipGeometry
from models.diffusion.noise import KeyedNoise
from models.motion.tracks import Tracks
from train.build import build_trainer, read_settings
from train.features import (
    FeatureStage,
    FeatureStageConfig,
    accuracies,
    blurred,
    every_nth_frame,
    mean_motion,
    targets_of,
)
from train.stage import SetupContext, StepContext

GOLDEN = Path(__file__).resolve().parents[1] / "golden/features.json"
SMALL = SpritesNetworkConfig([8, 8, 16], [16], 8)
PLAIN = "a red striped disc on a blue background"
TOLD = f"{PLAIN} then the disc turns yellow"


def walking(step_px: tuple[float, float], num_frames: int = 9, num_tracks: int = 4) -> Tracks:
    """All tracks take the same step each frame, in 32 x 32 px."""
    points = 8 + torch.arange(num_frames)[:, None, None] * torch.tensor(step_px) + torch.zeros(1, num_tracks, 1)
    return Tracks.from_arrays(points, torch.ones(num_frames, num_tracks), 32, 32)


def made_up_batch(ids: list[int]) -> Batch:
    rng = np.random.default_rng(0)
    coarse = rng.integers(0, 256, (len(ids), 3, 9, 8, 8), dtype=np.uint8)
    pixels = torch.from_numpy(coarse.repeat(4, axis=-1).repeat(4, axis=-2))
    tracks = Tracks.stack([walking((0.32 * number, 0.0)) for number in range(len(ids))])
    captions = [(PLAIN, TOLD)[number % 2] for number in ids]
    return Batch(ids, [str(each) for each in ids], captions, pixels=pixels, tracks=tracks)


@pytest.fixture(scope="module")
def model(tiny_model):
    """The tiny model with clips that the network reads."""
    return replace(tiny_model, clip=replace(tiny_model.clip, height=32, width=32))


def set_up(model, tmp_path, **changes) -> FeatureStage:
    stage = FeatureStage(FeatureStageConfig(**({"network": SMALL, "frame_strides": [1, 2]} | changes)))
    stage.setup(SetupContext(model, torch.device("cpu"), torch.float32, tmp_path, KeyedNoise(0)))
    return stage


@pytest.fixture(scope="module")
def sprites_shards(tmp_path_factory) -> Path:
    """Sixteen clips of one sprite without texture to speak of, with their tracks and captions."""
    folder = tmp_path_factory.mktemp("sprites")
    world = SpritesConfig(32, 32, 9, max_sprites=1, background="static", event_ratio=0.5, wavelength_px=40.0)
    grid = np.stack(np.meshgrid([0], np.arange(2.0, 32, 4), np.arange(2.0, 32, 4), indexing="ij"), -1).reshape(-1, 3)

    def samples():
        for seed in range(16):
            clip = render_clip(world, seed)
            points, visibility = clip.track(grid)
            write_video(folder / "clip.mp4", clip.frames, world.fps)
            yield f"clip{seed:03d}", {
                "tracks.npy": npy_bytes(points), "visibility.npy": npy_bytes(visibility),
                "json": json.dumps({"caption": clip.caption}).encode(), "mp4": (folder / "clip.mp4").read_bytes(),
            }  # fmt: skip

    write_shards(samples(), folder / "shards", ClipGeometry(32, 32, 9, world.fps))
    return folder / "shards"


def test_golden_losses(model, tmp_path):
    """Five steps on pixels that come from no renderer and no codec."""
    stage, losses = set_up(model, tmp_path), []
    optimizer = torch.optim.AdamW(stage.network.parameters(), lr=1e-2)
    for step in range(5):
        loss = stage.train_step(made_up_batch([0, 1, 2]), StepContext(step, "features", 0, 0, 1, 0)).losses
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    if os.environ.get("UPDATE_GOLDEN"):
        GOLDEN.write_text(json.dumps({"losses": losses}, indent=1) + "\n")
    np.testing.assert_allclose(losses, json.loads(GOLDEN.read_text())["losses"], atol=1e-5)


def test_targets_say_what_the_caption_says():
    targets = targets_of(made_up_batch([0, 1]))
    named = {
        name: [{LABELS["colors"][n] for n in row.nonzero()[:, 0]} for row in targets[name]]
        for name in ("start_colors", "end_colors")
    }
    assert named["start_colors"] == [{"red", "blue"}, {"red", "blue"}]
    assert named["end_colors"] == [{"red", "blue"}, {"yellow", "blue"}]
    assert targets["shapes"].tolist() == [[1.0, 0.0, 0.0, 0.0, 0.0]] * 2
    blue_red_yellow = [LABELS["colors"].index(color) for color in ("blue", "red", "yellow")]
    bearers = [[BEARERS[int(row[n])] for n in blue_red_yellow] for row in targets["end_bearers"]]
    assert bearers == [["background", "disc", "nothing"], ["background", "nothing", "disc"]]
    assert [int((row > 0).sum()) for row in targets["end_bearers"]] == [2, 2]
    torch.testing.assert_close(targets["motion"], torch.tensor([[0.0, 0.0], [0.01, 0.0]]))


def test_motion_is_that_of_visible_moving_tracks():
    still, right, down = (walking(step, num_tracks=1) for step in ((0.0, 0.0), (3.2, 0.0), (0.0, 1.6)))
    torch.testing.assert_close(mean_motion(still.beside(still, right)), torch.tensor([[0.1, 0.0]]))
    torch.testing.assert_close(mean_motion(right.beside(down)), torch.tensor([[0.05, 0.025]]))
    assert mean_motion(still).tolist() == [[0.0, 0.0]]
    assert mean_motion(Tracks.empty(2, 9, 32, 32)).tolist() == [[0.0, 0.0]] * 2
    down.visibility[:, 4:] = False  # then only the three steps before count
    torch.testing.assert_close(mean_motion(right.beside(down)), torch.tensor([[8 * 0.1, 3 * 0.05]]) / 11)
    right.points[:, 4] = 1000.0
    right.visibility[:, 4] = False  # a gap: neither the step into it nor the one out of it
    torch.testing.assert_close(mean_motion(right), torch.tensor([[0.1, 0.0]]))


def test_thinned_clips_move_faster():
    batch = made_up_batch([0, 1])
    thinned = every_nth_frame(batch, 2)
    assert torch.equal(thinned.pixels, batch.pixels[:, :, [0, 2, 4, 6, 8]]) and thinned.tracks.num_frames == 5
    targets, faster = targets_of(batch), targets_of(thinned)
    torch.testing.assert_close(faster.pop("motion"), 2 * targets.pop("motion"))
    assert all(torch.equal(faster[name], value) for name, value in targets.items())


def test_every_stride_is_drawn(model, tmp_path):
    stage, batch = set_up(model, tmp_path), made_up_batch([0])
    seen = []
    stage.network.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape[2]))
    for step in range(12):
        stage.train_step(batch, StepContext(step, "features", 0, 0, 1, 0))
    assert set(seen) == {5, 9}


def test_softening_is_keyed_by_sample_and_step(model, tmp_path):
    stage = set_up(model, tmp_path)
    pixels = made_up_batch([4, 9]).model_pixels()
    several = {step: stage.soften(pixels, [4, 9], step) for step in range(12)}
    for step, both in several.items():
        assert torch.equal(stage.soften(pixels[1:], [9], step)[0], both[1])
    kept = [torch.equal(clip, before) for both in several.values() for clip, before in zip(both, pixels)]
    assert 4 <= sum(kept) <= 20  # about half of 24
    changed = [clip for both in several.values() for clip, before in zip(both, pixels) if not torch.equal(clip, before)]
    assert not torch.equal(changed[0], changed[1])
    assert torch.equal(set_up(model, tmp_path, soften_ratio=0.0).soften(pixels, [4, 9], 0), pixels)


def test_blurring_takes_the_edges_and_keeps_the_mean():
    clip = made_up_batch([0]).model_pixels()[0]
    soft = blurred(clip, 3.0)
    assert soft.shape == clip.shape
    assert float(soft.diff(dim=-1).abs().mean()) < 0.7 * float(clip.diff(dim=-1).abs().mean())
    torch.testing.assert_close(soft.mean(), clip.mean(), atol=0.01, rtol=0)
    torch.testing.assert_close(blurred(clip, 1.0), clip)


def test_accuracies_count_whole_sets_and_events():
    batch = made_up_batch([0, 1])
    targets = targets_of(batch)
    right = {name: values if name == "motion" else 2 * values - 1 for name, values in targets.items()}
    right["end_bearers"] = torch.nn.functional.one_hot(targets["end_bearers"], len(BEARERS)).float()
    metrics = accuracies(right, batch)
    assert all(value == 1.0 for name, value in metrics.items() if name.endswith("accuracy"))
    assert metrics["motion_error_px"] == 0.0 and metrics["false_event_ratio"] == 0.0
    assert metrics["still_error_px"] == pytest.approx(0.16)
    metrics = accuracies(right | {"end_colors": right["start_colors"]}, batch)  # the event does not come
    assert metrics["event_accuracy"] == 0.0 and metrics["end_colors_accuracy"] == 0.5
    metrics = accuracies(right | {"start_colors": right["end_colors"]}, batch)
    assert metrics["false_event_ratio"] == 1.0
    batch.captions = [PLAIN, PLAIN]
    assert "event_accuracy" not in accuracies(right, batch)


def test_it_learns_and_exports(sprites_shards, tmp_path):
    cfg = compose_config("train", [
        "experiment=sprites/features", "model=tiny", "model.clip={height: 32, width: 32, num_frames: 9}",
        "model.vae.path=null", "stage.network={frame_widths: [8, 8, 16], clip_widths: [16], num_features: 16}",
        "stage.soften_ratio=0.25", "stage.frame_strides=[1,2]", "steps=30", "optim.warmup_updates=0",
        "optim.ema_decay=0.5", "precision=fp32", "device=cpu", "global_batch=8", "micro_batch=8", "log_every=1",
        "logger.progress=false",
        f"shards={sprites_shards}", f"validation_shards={sprites_shards}", "validation_clips=16",
        f"output_dir={tmp_path}",
    ])  # fmt: skip
    assert build_trainer(read_settings(cfg)).fit() == 0
    records = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    losses = [record["features/loss"] for record in records if "features/loss" in record]
    assert np.mean(losses[-5:]) < 0.7 * np.mean(losses[:5])
    last = records[-1]
    assert 0 <= last["validation/event_accuracy"] <= 1 and last["validation/motion_error_px"] > 0
    network = SpritesNetwork.from_folder(tmp_path / "export/features")
    assert network.config == SpritesNetworkConfig([8, 8, 16], [16], 16)


def test_the_motion_loss_is_in_motion_units(model, tmp_path):
    stage = set_up(model, tmp_path, soften_ratio=0.0, frame_strides=[2])
    whole = made_up_batch([0, 1])
    batch = every_nth_frame(whole, 2)
    step = stage.train_step(whole, StepContext(0, "features", 0, 0, 1, 0))
    error = stage.network(batch.pixels)["motion"] - mean_motion(batch.tracks)
    torch.testing.assert_close(step.metrics["motion"], (error / MOTION_UNIT / 2).square().mean())
    weights = {"end_bearers": stage.cfg.bearer_weight, "motion": stage.cfg.motion_weight}
    total = sum(weights.get(name, 1.0) * term for name, term in step.metrics.items())
    torch.testing.assert_close(step.losses, total)


def test_it_goes_on_from_a_folder(model, tmp_path):
    first = set_up(model, tmp_path)
    first.export(tmp_path, first.modules())
    second = set_up(model, tmp_path, network=SpritesNetworkConfig(), init_from=str(tmp_path / "features"))
    for name, value in second.network.state_dict().items():
        assert torch.equal(value, first.network.state_dict()[name])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"soften_ratio": 1.5}, "stage.soften_ratio=1.5 must be in 0..1"),
        ({"frame_strides": [1, 0]}, r"stage.frame_strides=\[1, 0\] must name strides >= 1"),
        ({"frame_strides": []}, r"stage.frame_strides=\[\] must name strides >= 1"),
        ({"max_shrink": 0.5}, "stage.max_shrink=0.5 must be >= 1"),
        ({"motion_weight": -1.0}, "stage.motion_weight=-1.0 must be >= 0"),
        ({"max_noise": -0.1}, "stage.max_noise=-0.1 must be >= 0"),
    ],
)
def test_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        FeatureStageConfig(**settings)


def test_clips_that_the_network_does_not_read_are_refused(model, tiny_model):
    with pytest.raises(ValueError, match=r"stage.frame_strides=\[1, 9\] must be at most 8"):
        FeatureStage(FeatureStageConfig(frame_strides=[1, 9])).check(model)
    for clip in (tiny_model.clip, replace(model.clip, width=36)):
        with pytest.raises(ValueError, match=f"width={clip.width}: the network reads multiples of 8 px from 32"):
            FeatureStage(FeatureStageConfig()).check(replace(model, clip=clip))


def test_missing_fields_are_refused():
    with pytest.raises(ValueError, match=r"batch.tracks is None; add 'tracks'"):
        targets_of(Batch([0], ["a"], [PLAIN]))
    with pytest.raises(ValueError, match=r"batch.pixels or batch.tracks is None"):
        every_nth_frame(Batch([0], ["a"], [PLAIN]), 2)
