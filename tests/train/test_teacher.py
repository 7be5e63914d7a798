"""The teacher: its objective, what is drawn at random, golden losses, validation, export, a real kill -9."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from data.app import build_target, compose_config
from data.batch import collate
from data.shards import ShardDataset
from models.assemble import build_dit, build_vae
from models.condition import num_pixel_frames
from models.diffusion.noise import KeyedNoise
from models.motion.tracks import NUM_TRACK_IDS, Tracks
from models.wan.checkpoint import load_dit, save_dit, without_tracks
from models.wan.config import IMAGE_CONDITIONING
from train.build import build_trainer, fingerprints_of, read_settings
from train.stage import SetupContext, StepContext
from train.teacher import Teacher, TeacherConfig, bucket_means, draw_track_subset, first_frames, fixed_identities

REPO = Path(__file__).resolve().parents[2]
GOLDEN = REPO / "tests/golden/teacher.json"
FAST = [
    "model=tiny",
    "precision=fp32",
    "device=cpu",
    "optim=scratch",
    "global_batch=4",
    "micro_batch=2",
    "log_every=1",
    "stage.tracks_min=2",
    "stage.tracks_max=8",
    "logger.progress=false",
]


def batch_of(shards, numbers, fields=("latents", "prompt_embeds", "tracks")):
    dataset = ShardDataset(shards, fields)
    return collate([dataset[n] for n in numbers])


def stage_of(model, tmp_path, held_out=None, **settings):
    stage = Teacher(TeacherConfig(**({"tracks_min": 2, "tracks_max": 8} | settings)))
    stage.setup(SetupContext(model, torch.device("cpu"), torch.float32, tmp_path, KeyedNoise(0), held_out))
    with torch.no_grad():
        rng = torch.Generator().manual_seed(1)
        for parameter in stage.dit.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=rng)
    return stage


def at(step=0):
    return StepContext(step, "teacher", 0, 0, 1, 0)


class Recorder(torch.nn.Module):
    """Stands for the DiT: returns a given velocity and keeps what it was called with."""

    def __init__(self, dit, velocity):
        super().__init__()
        self.dit, self.velocity = dit, velocity

    def forward(self, noisy_latents, timestep, condition):
        self.seen = (noisy_latents, timestep, condition)
        return self.velocity(noisy_latents, timestep, condition)

    def generated_frames(self, condition, num_frames):
        return self.dit.generated_frames(condition, num_frames)


def test_the_loss_is_the_weighted_flow_matching_error(tiny_model, tiny_shards, tmp_path):
    stage = stage_of(tiny_model, tmp_path, bell_weighting=False)
    batch = batch_of(tiny_shards, [0, 3])
    stage.use({"teacher": Recorder(stage.dit, lambda x, t, c: torch.zeros_like(x))})
    loss = stage.train_step(batch, at()).losses
    noisy, timestep, condition = stage.dit.seen
    sigma = (timestep / 1000).view(-1, 1, 1, 1, 1)
    eps = (noisy - (1 - sigma) * batch.latents) / sigma
    target = eps - batch.latents
    assert condition.image_latents is not None
    torch.testing.assert_close(loss, target[:, :, 1:].square().mean(), rtol=1e-4, atol=1e-5)  # frame 0 is given

    exact = Recorder(stage.dit.dit, lambda x, t, c: (x - batch.latents) / sigma)  # v = (x_sigma - x0) / sigma
    stage.use({"teacher": exact})
    assert float(stage.train_step(batch, at()).losses) < 1e-6


def test_given_first_frame_is_no_part_of_the_loss(tiny_model, tiny_shards, tmp_path):
    stage = stage_of(tiny_model, tmp_path)

    def only_frame_0_wrong(x, t, c):
        right = (x - batch.latents) / (t / 1000).view(-1, 1, 1, 1, 1)
        right[:, :, 0] += 100
        return right

    batch = batch_of(tiny_shards, [0, 3])
    stage.use({"teacher": Recorder(stage.dit, only_frame_0_wrong)})
    assert float(stage.train_step(batch, at()).losses) < 1e-6


def test_what_is_drawn_does_not_depend_on_the_neighbours(tiny_model, tiny_shards, tmp_path):
    stage = stage_of(tiny_model, tmp_path, mid_mask_probability=0.5, text_dropout=0.5, motion_dropout=0.3)
    both, alone = batch_of(tiny_shards, [2, 5]), batch_of(tiny_shards, [5])
    for step in range(6):
        seen = [stage.training_condition(b, b.latents, step) for b in (both, alone)]
        assert torch.equal(seen[0].track_map[1:], seen[1].track_map)
        assert torch.equal(seen[0].prompt_embeds[1:], seen[1].prompt_embeds)
        assert torch.equal(stage.draw_sigma([2, 5], step)[1:], stage.draw_sigma([5], step))


def test_dropout_rates_and_masks(tiny_model, tiny_shards, tmp_path):
    stage = stage_of(tiny_model, tmp_path, text_dropout=0.25, motion_dropout=0.0, mid_mask_probability=0.4)
    batch = batch_of(tiny_shards, [0])
    dropped = [not stage.training_condition(batch, batch.latents, s).prompt_embeds.any() for s in range(200)]
    assert 0.15 < np.mean(dropped) < 0.35
    masks = torch.cat([stage.draw_mid_mask([7], step, 9) for step in range(300)])
    assert not masks[:, :3].any()  # chunk 0 always shows its motion
    assert torch.equal(masks[:, 3], masks[:, 5]) and not torch.equal(masks[:, 3], masks[:, 6])
    assert abs(masks[:, 3:].float().mean() - 0.4) < 0.08

    stage.cfg = replace(stage.cfg, text_dropout=0.5, motion_dropout=0.5, mid_mask_probability=0.0)
    drawn = [stage.training_condition(batch, batch.latents, s) for s in range(200)]
    kinds = Counter((bool(each.prompt_embeds.any()), bool(each.track_map.any())) for each in drawn)
    assert len(kinds) == 4 and min(kinds.values()) > 30  # independent: guidance needs each without the other

    stage.cfg = replace(stage.cfg, text_dropout=1.0, motion_dropout=1.0)
    condition = stage.training_condition(batch, batch.latents, 0)
    assert not condition.track_map.any() and not condition.prompt_embeds.any()
    assert condition.image_latents is not None  # the image is never dropped


def test_masked_chunks_are_exactly_those_of_the_mask(tiny_model, tiny_shards, tmp_path):
    stage = stage_of(tiny_model, tmp_path, motion_dropout=0.0, mid_mask_probability=1.0)
    batch = batch_of(tiny_shards, [1])
    shown = stage.training_condition(batch, batch.latents, 0).track_map.abs().sum(dim=(0, 1, 3, 4)) > 0
    first = num_pixel_frames(tiny_model.rollout.chunk_frames)
    assert shown[:first].any() and not shown[first:].any()


def test_short_clips_are_the_first_frames_of_whole_ones(tiny_model, tiny_shards, tmp_path):
    batch = batch_of(tiny_shards, [0, 1])
    short = first_frames(batch, 9)
    assert torch.equal(short.latents, batch.latents[:, :, :3]) and short.tracks.num_frames == 9
    stage = stage_of(tiny_model, tmp_path, num_frames=9)
    whole = stage_of(tiny_model, tmp_path)
    assert torch.equal(stage.train_step(batch, at()).losses, whole.train_step(short, at()).losses)


def test_track_subset():
    visibility = torch.zeros(2, 3, 20, dtype=torch.bool)
    visibility[0, 1, ::2] = True  # ten tracks are ever seen
    visibility[1, 0, :4] = True
    points = torch.arange(2 * 3 * 20 * 2).float().view(2, 3, 20, 2)
    tracks = Tracks(points, visibility, torch.zeros(2, 20, dtype=torch.long), 8, 8)
    counts, orders = set(), set()
    for step in range(60):
        drawn = draw_track_subset(tracks, KeyedNoise(0), [4, 9], step, (2, 6))
        counts.add(int(drawn.visibility[0].any(0).sum()))
        shown = drawn.points[0, 0, drawn.visibility[0].any(0), 0]
        assert set(shown.tolist()) <= set(points[0, 0, ::2, 0].tolist())
        orders.add(tuple(shown.tolist()))
        ids = drawn.ids[0, drawn.visibility[0].any(0)]
        assert len(set(ids.tolist())) == len(ids)
        assert int(drawn.visibility[1].any(0).sum()) <= 4
    assert counts == {2, 3, 4, 5, 6} and len(orders) > 50
    everything = draw_track_subset(tracks, KeyedNoise(0), [4, 9], 0, (100, None))
    assert int(everything.visibility[0].any(0).sum()) == 10


def test_no_more_tracks_are_drawn_than_there_are_identities():
    shape = (1, 1, NUM_TRACK_IDS + 50)
    tracks = Tracks(torch.zeros(*shape, 2), torch.ones(shape, dtype=torch.bool), torch.zeros(1, shape[2]).long(), 8, 8)
    for limits in ((NUM_TRACK_IDS + 1, None), (NUM_TRACK_IDS + 1, NUM_TRACK_IDS + 20)):
        drawn = draw_track_subset(tracks, KeyedNoise(0), [4], 0, limits)
        assert sorted(drawn.ids[0].tolist()) == list(range(NUM_TRACK_IDS))


def test_one_frame_is_learnt_where_it_is_not_given(tiny_model):
    Teacher(TeacherConfig(num_frames=1)).check(
        replace(tiny_model, dit=replace(tiny_model.dit, image_conditioning="fun_control"))
    )


def test_buckets():
    means = bucket_means("loss", torch.tensor([1.0, 3.0, 5.0]), torch.tensor([0.05, 0.1, 1.0]), 2)
    assert {name: float(value) for name, value in means.items()} == {"loss_0_0.5": 2.0, "loss_0.5_1": 5.0}


def test_encodes_pixels_and_captions_where_the_shards_hold_no_latents(tiny_model, tiny_shards, tmp_path):
    build_vae(tiny_model, seed=0).save(tmp_path / "vae")
    model = replace(tiny_model, vae=replace(tiny_model.vae, path=str(tmp_path / "vae")))
    stage = stage_of(model, tmp_path)
    assert stage.data_fields(model, ["pixels", "tracks"]) == ["pixels", "tracks"]
    batch = batch_of(tiny_shards, [0, 1], ("tracks",))
    batch.pixels = torch.randint(256, (2, 3, 33, 16, 16), dtype=torch.uint8)
    assert torch.isfinite(stage.train_step(batch, at()).losses)


def test_rgb_tracks_go_through_the_vae(tiny_model, tiny_shards, tmp_path):
    build_vae(tiny_model, seed=0).save(tmp_path / "vae")
    dit = replace(tiny_model.dit, track_encoding="rgb", track_channels=4)
    model = replace(tiny_model, dit=dit, vae=replace(tiny_model.vae, path=str(tmp_path / "vae")))
    stage = stage_of(model, tmp_path, motion_dropout=0.0, mid_mask_probability=1.0)
    batch = batch_of(tiny_shards, [0, 1])
    condition = stage.training_condition(batch, batch.latents, 0)
    assert condition.track_map.shape == batch.latents.shape
    assert condition.track_map[:, :, :3].any() and not condition.track_map[:, :, 3:].any()
    assert torch.isfinite(stage.train_step(batch, at()).losses)
    with torch.autocast("cpu", dtype=torch.bfloat16):  # a VAE encodes tracks in full precision, as it does clips
        assert torch.equal(stage.training_condition(batch, batch.latents, 0).track_map, condition.track_map)


def test_a_text_encoder_needed_for_the_dropped_text_alone_is_not_kept(tiny_model, tiny_shards, tmp_path):
    encoder = stage_of(tiny_model, tmp_path).encoder
    batch = batch_of(tiny_shards, [0, 1])
    stored = encoder.condition(batch, batch.latents, batch.tracks)
    assert encoder._text is None
    without = batch_of(tiny_shards, [0, 1], ("latents", "tracks"))
    assert torch.equal(
        encoder.condition(without, batch.latents, batch.tracks).null_prompt_embeds, stored.null_prompt_embeds
    )
    assert encoder._text is not None  # captions are encoded: it stays
    assert encoder.condition(batch, batch.latents, batch.tracks) is not None and encoder._text is not None


@pytest.mark.parametrize("conditioning", IMAGE_CONDITIONING)
@pytest.mark.parametrize("grown", [False, True], ids=["fresh", "from a video model without tracks"])
def test_every_weight_learns(conditioning, grown, tiny_model, tiny_shards, tmp_path):
    """Two parts that both start at zero would wait for each other for ever."""
    model = replace(tiny_model, dit=replace(tiny_model.dit, image_conditioning=conditioning))
    if grown:
        save_dit(without_tracks(stage_of(model, tmp_path).dit), tmp_path / "video_model")
    stage = Teacher(TeacherConfig(tracks_min=2, init_from=str(tmp_path / "video_model") if grown else None))
    stage.setup(SetupContext(model, torch.device("cpu"), torch.float32, tmp_path, KeyedNoise(0), None))
    before = {name: value.detach().clone() for name, value in stage.dit.named_parameters()}
    optimizer = torch.optim.AdamW(stage.dit.parameters(), lr=1e-3, weight_decay=0.0)
    for step in range(4):
        optimizer.zero_grad()
        stage.train_step(batch_of(tiny_shards, range(4)), at(step)).losses.backward()
        optimizer.step()
    changes = {name: value.detach() - before[name] for name, value in stage.dit.named_parameters()}
    assert [name for name, change in changes.items() if not change.any()] == []
    assert changes["patch_embedding.weight"].flatten(2).any(dim=2).any(dim=0).all(), "every input channel is read"


def test_frozen_track_head_and_start_from_a_folder(tiny_model, tmp_path):
    dit = build_dit(tiny_model, seed=5)
    torch.nn.init.normal_(dit.head.head.weight)
    save_dit(dit, tmp_path / "start")
    stage = Teacher(TeacherConfig(init_from=str(tmp_path / "start"), freeze_track_head=True))
    stage.setup(SetupContext(tiny_model, torch.device("cpu"), torch.float32, tmp_path, KeyedNoise(0)))
    assert torch.equal(stage.dit.head.head.weight, dit.head.head.weight)
    assert not any(p.requires_grad for p in stage.dit.track_head.parameters())
    assert all(p.requires_grad for n, p in stage.dit.named_parameters() if not n.startswith("track_head"))


def test_more_tracks_than_identities_are_thinned():
    tracks = Tracks.from_arrays(np.zeros((2, 10_100, 2), np.float32), np.ones((2, 10_100), bool), 8, 8)
    shown = fixed_identities(tracks, KeyedNoise(0), [3])
    assert shown.num_tracks == 10_000 and len(set(shown.ids[0].tolist())) == 10_000


def test_a_new_track_head_is_not_frozen(tiny_model, tmp_path):
    """It is the zero map: no track would ever be seen."""
    bare = replace(tiny_model, dit=replace(tiny_model.dit, track_channels=0))
    save_dit(build_dit(bare, seed=5), tmp_path / "video_model")
    stage = Teacher(TeacherConfig(init_from=str(tmp_path / "video_model"), freeze_track_head=True))
    with pytest.raises(ValueError, match=r"init_from=.*video_model lacks track_head.* its tracks would never be seen"):
        stage.setup(SetupContext(tiny_model, torch.device("cpu"), torch.float32, tmp_path, KeyedNoise(0)))


@pytest.mark.parametrize(
    ("settings", "model_settings", "message"),
    [
        ({"freeze_track_head": True}, {}, "freeze_track_head=true keeps a trained head: set stage.init_from"),
        ({"text_dropout": 1.5}, {}, "stage.text_dropout=1.5 must be a probability"),
        ({"tracks_min": 9, "tracks_max": 3}, {}, "stage.tracks_min=9 must be >= 1 and <= tracks_max=3"),
        ({"mid_mask_probability": 0.2}, {"track_channels": 0}, "needs a model with tracks"),
        ({"freeze_track_head": True}, {"track_encoding": "rgb"}, "has no track head"),
        ({"num_frames": 8}, {}, "stage.num_frames=8 must be 1 \\+ 4k; nearest valid: 9"),
        (
            {"num_frames": 13, "mid_mask_probability": 0.2},
            {},
            r"stage.num_frames=13 must be whole chunks, as stage.mid_mask_probability=0.2 .*chunk_frames=3; nearest",
        ),
        ({"num_frames": 41}, {}, "stage.num_frames=41 must be at most 33"),
        ({"num_frames": 1}, {}, r"stage.num_frames=1 leaves nothing to learn: .*first_frame\); set at least 5"),
        ({"validation_steps": 0}, {}, "stage.validation_steps=0 must be at least 1, or null"),
        ({"init_from": "/nowhere"}, {}, "stage.init_from=/nowhere: there is nothing"),
    ],
)
def test_refused(tiny_model, settings, model_settings, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        model = replace(tiny_model, dit=replace(tiny_model.dit, **model_settings))
        Teacher(TeacherConfig(**settings)).check(model)


def test_validation_samples_tracks_and_measures(tiny_model, tiny_shards, tmp_path):
    build_vae(tiny_model, seed=0).save(tmp_path / "vae")
    model = replace(tiny_model, vae=replace(tiny_model.vae, path=str(tmp_path / "vae")))
    stage = stage_of(model, tmp_path, held_out=batch_of(tiny_shards, [0, 1]), validation_steps=2)
    with torch.no_grad():
        output = stage.validate(3)
    assert set(output.metrics) == {"loss", "epe_px"} and all(np.isfinite(list(output.metrics.values())))
    assert output.videos["clip_1"].shape == (33, 16, 16, 3) and output.videos["clip_1"].dtype == np.uint8


# ------------------------------------------------------------------------------------------ whole runs
def run(shards, folder, *overrides):
    cfg = compose_config("train", [*FAST, f"shards={shards}", f"output_dir={folder}", *overrides])
    trainer = build_trainer(read_settings(cfg))
    assert trainer.fit() == 0
    trainer.close()
    return trainer


def records(folder):
    return [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]


def test_golden_losses(tiny_shards, tmp_path):
    run(tiny_shards, tmp_path, "steps=5", "micro_batch=4")
    losses = [record["teacher/loss"] for record in records(tmp_path)]
    if os.environ.get("UPDATE_GOLDEN"):
        GOLDEN.write_text(json.dumps({"losses": losses}, indent=1) + "\n")
    np.testing.assert_allclose(losses, json.loads(GOLDEN.read_text())["losses"], atol=1e-5)


def test_a_run_learns_writes_and_exports(tiny_shards, tmp_path, tiny_model):
    trainer = run(
        tiny_shards,
        tmp_path,
        "steps=30",
        "optim.warmup_updates=0",
        "optim.ema_decay=0.8",
        f"validation_shards={tiny_shards}",
        "validate_every=10",
        "validation_clips=2",
    )
    kept = records(tmp_path)
    validation = [record["validation/loss"] for record in kept if "validation/loss" in record]
    assert len(validation) == 3 and validation[-1] < validation[0]
    stored = json.loads((tmp_path / "checkpoints/step_00000030/trainer.json").read_text())["config"]
    assert (stored["optim"]["ema_decay"], stored["shards"]) == (0.8, str(tiny_shards)), "to tell what a resume changes"
    assert {
        "teacher/grad_norm",
        "teacher/lr",
        "samples_per_second",
        "time/data_seconds",
        "time/forward_backward_seconds",
        "time/optimizer_seconds",
    } <= set(kept[0])
    exported = load_dit(tmp_path / "export/teacher", expected=tiny_model.dit)
    average = trainer.emas["teacher"].values
    assert all(torch.equal(value, average[name]) for name, value in exported.named_parameters())
    assert not torch.equal(average["head.head.weight"], trainer.modules["teacher"].head.head.weight)


def test_the_plan_says_what_each_process_holds_and_when_it_validates(tiny_shards, tmp_path, caplog):
    caplog.set_level("INFO")
    trainer = run(tiny_shards, tmp_path, "steps=1", "validate_every=-1", f"validation_shards={tiny_shards}")
    size = 20 * sum(parameter.numel() for parameter in trainer.modules["teacher"].parameters())
    assert f"memory: {size / 1e9:.3g} GB of weights, gradients, moments and EMA per process" in caplog.text
    assert "checkpoint every 500; validation off (validate_every=-1)" in caplog.text
    assert "an update takes" not in caplog.text
    run(tiny_shards, tmp_path / "large", "steps=1", "global_batch=16", "micro_batch=8")
    assert "an update takes its 16 clips from 10, each again with the same noise" in caplog.text


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("+optim.modules={critic:{lr:1e-4}}", r"optim.modules.critic: .* it trains: teacher"),
        ("+logger.alarms={student/loss:{max:9}}", r"logger.alarms.student/loss: .* they begin with teacher/,"),
    ],
)
def test_settings_of_a_module_that_does_not_train_are_refused(tiny_shards, tmp_path, override, message):
    with pytest.raises(ValueError, match=message):
        run(tiny_shards, tmp_path, "steps=1", override)


def test_micro_batches_do_not_change_the_run(tiny_shards, tmp_path):
    for micro in (1, 4):
        run(tiny_shards, tmp_path / str(micro), "steps=3", f"micro_batch={micro}")
    first, second = ([r["teacher/loss"] for r in records(tmp_path / name)] for name in ("1", "4"))
    np.testing.assert_allclose(first, second, rtol=1e-4)


def test_shards_of_another_clip_size_are_refused(tiny_shards):
    cfg = compose_config("train", ["model=sprites", f"shards={tiny_shards}"])
    with pytest.raises(ValueError, match=r"shards hold .*height=16.* model.clip is .*height=64"):
        read_settings(cfg)


def test_latents_of_another_vae_are_refused(tiny_model, tiny_shards, tmp_path):
    for seed in (0, 1):
        build_vae(tiny_model, seed=seed).save(tmp_path / str(seed))
    prints = []
    for path in (str(tmp_path / "0"), str(tmp_path / "1"), "/nowhere", None):
        model = replace(tiny_model, vae=replace(tiny_model.vae, path=path))
        prints.append(fingerprints_of(model, ["latents", "prompt_embeds", "tracks"]))
    assert prints[0]["vae"] != prints[1]["vae"] and prints[0]["text"] == prints[1]["text"]
    assert set(prints[2]) == set(prints[3]) == {"text"}  # not here: not compared
    assert fingerprints_of(tiny_model, ["pixels"]) == {}

    index = json.loads((tiny_shards / "index.json").read_text())
    shutil.copytree(tiny_shards, tmp_path / "shards")
    (tmp_path / "shards/index.json").write_text(json.dumps(index | {"fingerprints": prints[0]}))
    with pytest.raises(ValueError, match=r"vae fingerprint of the shards is .* run step=encode"):
        run(tmp_path / "shards", tmp_path / "out", "steps=1", f"model.vae.path={tmp_path / '1'}")


def test_kill_9_and_resume_is_bit_for_bit(tiny_shards, tmp_path):
    overrides = [f"shards={tiny_shards}", "steps=40", "checkpoint_every=4", "micro_batch=2"]
    run(tiny_shards, tmp_path / "whole", *overrides)
    command = [sys.executable, "-m", "train", *FAST, *overrides, f"output_dir={tmp_path / 'cut'}"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, cwd=REPO, env=environment, stderr=subprocess.PIPE)
    pointer = tmp_path / "cut/checkpoints/last_good"
    deadline = time.time() + 60
    while not pointer.exists() and process.poll() is None and time.time() < deadline:
        time.sleep(0.005)
    process.kill()  # at whatever it was doing: a step, a checkpoint, an export
    process.wait()
    assert process.returncode == -9, process.stderr.read().decode()
    run(tiny_shards, tmp_path / "cut", *overrides)
    first, second = ([r["teacher/loss"] for r in records(tmp_path / name)] for name in ("whole", "cut"))
    assert first == second and len(first) == 40
    kept = [load_dit(tmp_path / name / "export/teacher") for name in ("whole", "cut")]
    assert all(torch.equal(a, b) for a, b in zip(kept[0].parameters(), kept[1].parameters()))


def test_it_knows_its_latent_space_and_goes_on_in_no_other(tiny_model, tiny_shards, tmp_path, caplog):
    vae = build_vae(tiny_model, seed=0)
    vae.save(tmp_path / "vae")
    settings = ("steps=1", f"model.vae.path={tmp_path / 'vae'}")
    run(tiny_shards, tmp_path / "run", *settings)
    assert load_dit(tmp_path / "run/export/teacher").latent_space == vae.latent_space
    run(tiny_shards, tmp_path / "run", "steps=2", "model.vae.path=null")
    assert load_dit(tmp_path / "run/export/teacher").latent_space == vae.latent_space, "the checkpoint knows it"
    vae.normalise_by([0.5] * 4, [1.0] * 4)
    vae.save(tmp_path / "vae")
    with pytest.raises(ValueError, match="the checkpoint of this run was made for another latent space"):
        run(tiny_shards, tmp_path / "run", *settings)
    run(tiny_shards, tmp_path / "next", *settings, f"stage.init_from={tmp_path / 'run/export/teacher'}")
    assert "was made for another latent space than that of model.vae;" in caplog.text
    assert load_dit(tmp_path / "next/export/teacher").latent_space == vae.latent_space


def test_stage_of_the_yaml():
    assert isinstance(build_target(compose_config("train", ["stage=teacher"]).stage), Teacher)
