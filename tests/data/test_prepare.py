"""The preparation of a data set from the command's configuration to shards, and its resumption."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from data import encode, prepare, progress
from data.app import build_config, claim, compose_config
from data.encode import EncodeConfig, fingerprint, fingerprints
from data.shards import ShardDataset
from data.sprites import SpritesConfig
from data.trackers import build_tracker
from data.video import probe_video, write_video
from models.assemble import TextConfig
from models.vae.wan_vae import WanVae

CLIPS = Path(__file__).parents[3] / "shared/data/clips"
SMALL = ["model=tiny", "model.vae.path=null"]


def run(*overrides: str) -> int:
    return prepare.main(compose_config("data", [*SMALL, *overrides]))


def rejected(out: Path) -> dict[str, dict]:
    lines = [json.loads(line) for line in (out / "rejected.jsonl").read_text().splitlines()]
    return {line["file"]: line for line in lines}


def noise_video(path: Path, num_frames: int = 40, height: int = 36, width: int = 64) -> None:
    rng = np.random.default_rng(num_frames)
    coarse = rng.integers(0, 255, (num_frames, height // 4, width // 4, 3), dtype=np.uint8)
    write_video(path, coarse.repeat(4, 1).repeat(4, 2), 16)


# ------------------------------------------------------------------------------------------ sprites
def test_sprites_to_shards_without_a_vae(tmp_path, caplog):
    caplog.set_level("INFO")
    assert run("source=sprites", "source.num_clips=3", f"out={tmp_path}", "previews=1") == 0
    assert "encode: skipped, model.vae.path is null" in caplog.text
    dataset = ShardDataset(tmp_path / "shards", ["pixels", "tracks"])
    assert [dataset[n].key for n in range(3)] == ["train-000000", "train-000001", "train-000002"]
    assert dataset[1].pixels.shape == (3, 33, 16, 16) and dataset[1].tracks.num_tracks == 256
    meta = dataset.meta(1)
    assert meta["seed"] == 3 and SpritesConfig(**meta["sprites"]).height == 16
    assert [p.name for p in (tmp_path / "previews").iterdir()] == ["train-000000.preview.mp4"]
    assert (tmp_path / "rejected.jsonl").read_text() == ""


def test_stored_tracks_are_the_exact_ones(tmp_path):
    run(
        "source=sprites",
        "source.num_clips=1",
        f"out={tmp_path}",
        "previews=0",
        "tracker.rows=4",
        "tracker.cols=4",
    )
    dataset = ShardDataset(tmp_path / "shards", ["tracks"])
    scene = prepare.scene_of(dataset.meta(0))
    tracks = dataset[0].tracks
    start = tracks.points[0, 0].numpy()
    points, visibility = scene.track(np.concatenate([np.zeros((16, 1)), start], axis=1))
    assert np.allclose(points, tracks.points[0], atol=1e-3)
    assert np.array_equal(visibility, tracks.visibility[0].numpy())


def test_resuming_does_only_what_is_missing(tmp_path, monkeypatch):
    overrides = ["source=sprites", "source.num_clips=3", f"out={tmp_path}", "previews=0"]
    run(*overrides)
    markers = {p: p.stat().st_mtime_ns for p in tmp_path.glob("markers/*/*.json")}
    run(*overrides)
    assert {p: p.stat().st_mtime_ns for p in tmp_path.glob("markers/*/*.json")} == markers, "nothing to note anew"
    times = {p.name: p.stat().st_mtime_ns for p in (tmp_path / "clips").iterdir()}
    (tmp_path / "markers/render/train-000001.json").unlink()
    called = []
    monkeypatch.setattr(progress, "attempt", lambda call: called.append(call.key))
    run(*overrides, "step=render")
    assert called == ["train-000001"]
    monkeypatch.undo()
    run(*overrides)
    assert {p.name: p.stat().st_mtime_ns for p in (tmp_path / "clips").iterdir()} == times
    run(*overrides, "source.crf=30", "step=render")
    changed = [p.name for p in (tmp_path / "clips").glob("*.mp4") if p.stat().st_mtime_ns != times[p.name]]
    assert len(changed) == 3, "other settings make the clips again"


@pytest.fixture
def attempts(monkeypatch) -> list[tuple[str, str]]:
    """(function, key) of every item that is made from here on."""
    made: list[tuple[str, str]] = []
    attempt = progress.attempt
    monkeypatch.setattr(
        progress, "attempt", lambda call: made.append((call.function.__name__, call.key)) or attempt(call)
    )
    return made


def test_clips_are_tracked_again_only_if_their_tracks_can_change(tmp_path, attempts):
    data = ("source=sprites", "source.num_clips=2", f"out={tmp_path}", "tracker.rows=4", "tracker.cols=4")
    run(*data, "previews=1")
    attempts.clear()
    run(*data, "step=track", "previews=1", "tracker.device=cuda", "tracker.upsample=3", "tracker.allow_download=true")
    assert attempts == []
    run(*data, "step=track", "previews=all")
    assert attempts == [("preview_item", "train-000001")]
    attempts.clear()
    (tmp_path / "previews/train-000000.preview.mp4").unlink()
    run(*data, "step=track", "previews=1")
    assert attempts == [("preview_item", "train-000000")]
    attempts.clear()
    run(*data, "step=track", "previews=1", "tracker.rows=5")
    keys = ("train-000000", "train-000001")
    assert attempts == [*(("track_item", key) for key in keys), ("preview_item", keys[0])]


def test_no_preview_shows_tracks_that_were_made_anew(tmp_path):
    data = ("source=sprites", "source.num_clips=2", f"out={tmp_path}", "step=track", "tracker.cols=4")
    run(*data, "step=all", "tracker.rows=4", "previews=all")
    run(*data, "tracker.rows=4", "previews=1")
    assert len(list((tmp_path / "previews").iterdir())) == 2, "of the same tracks"
    run(*data, "tracker.rows=5", "previews=1")
    assert [path.name for path in (tmp_path / "previews").iterdir()] == ["train-000000.preview.mp4"]
    run(*data, "tracker.rows=6", "previews=0")
    assert not list((tmp_path / "previews").iterdir())


def two_videos(tmp_path):
    """A folder of two captioned videos, where their data set goes, and the settings that make it, latents included."""
    videos, out = tmp_path / "videos", tmp_path / "out"
    for name in "ab":
        noise_video(videos / f"{name}.mp4")
        (videos / f"{name}.txt").write_text("a red disc")
    data = ["source=folder", f"source.path={videos}", f"out={out}", "tracker.rows=2", "tracker.cols=2", "previews=0"]
    return videos, out, [*data, save_vae(tmp_path / "vae", seed=0)]


def test_a_folder_that_moved_makes_nothing_again(tmp_path, attempts):
    videos, out, data = two_videos(tmp_path)
    assert run(*data) == 0
    attempts.clear()
    encoded = {path: path.stat().st_mtime_ns for path in out.glob("encoded/*.npz")}
    videos.rename(tmp_path / "moved")
    assert run(*data, f"source.path={tmp_path / 'moved'}") == 0
    assert attempts == [] and {path: path.stat().st_mtime_ns for path in encoded} == encoded
    assert len(ShardDataset(out / "shards", ["latents", "tracks"])) == 2


def test_another_caption_costs_its_text_alone(tmp_path, attempts, monkeypatch):
    videos, out, data = two_videos(tmp_path)
    run(*data)
    attempts.clear()
    made = {path: path.stat().st_mtime_ns for path in out.glob("*/?.*")}
    (videos / "a.txt").write_text("a blue disc")
    run(*data, "step=render")
    run(*data, "step=pack")
    assert [s.key for s in ShardDataset(out / "shards", ["latents"]).index.samples] == ["b"]
    run(*data)
    assert attempts == []
    changed = {f"{path.parent.name}/{path.name}" for path, time in made.items() if path.stat().st_mtime_ns != time}
    assert changed == {"clips/a.json", "encoded/a.npz"}
    dataset = ShardDataset(out / "shards", ["prompt_embeds"])
    assert dataset[0].caption == "a blue disc"
    assert not torch.equal(dataset[0].prompt_embeds, dataset[1].prompt_embeds)


def test_a_file_more_does_not_shift_the_keys_of_names_that_keys_drop(tmp_path, attempts):
    videos, out = tmp_path / "videos", tmp_path / "out"
    for name in ("犬", "猫"):
        noise_video(videos / f"{name}.mp4")
    data = ["source=folder", f"source.path={videos}", f"out={out}", "step=render"]
    run(*data)
    assert attempts == [("render_item", "clip"), ("render_item", "clip-2")]
    attempts.clear()
    noise_video(videos / "一.mp4")
    for _ in range(2):
        run(*data)
        assert attempts == [("render_item", "clip-3")]
    (videos / "犬.mp4").unlink()
    run(*data)
    assert attempts == [("render_item", "clip-3")]
    assert progress.done_keys(out, "render") == ["clip-2", "clip-3"]


@pytest.mark.parametrize("name", ["clips/{}.mp4", "clips/{}.json", "tracks/{}.npz", "encoded/{}.npz"])
def test_an_item_whose_file_is_gone_is_made_again(encoded_clips, name):
    common, vae, out = encoded_clips
    before = latents(out)
    lost = out / name.format("train-000001")
    lost.unlink()
    assert run(*common, "step=pack") == 0
    keys = [sample.key for sample in ShardDataset(out / "shards", ["latents"]).index.samples]
    assert keys == ["train-000000", "train-000002"]
    assert "run step=" in rejected(out)["seed 3"]["reason"]
    assert run(*common, vae) == 0 and lost.is_file()
    assert torch.equal(latents(out), before) and not rejected(out)


def test_a_broken_clip_that_is_deleted_is_tracked_again(tmp_path):
    data = ("source=sprites", "source.num_clips=2", f"out={tmp_path}", "previews=0")
    run(*data, "step=render")
    clip = tmp_path / "clips/train-000001.mp4"
    clip.write_bytes(b"broken")
    run(*data)
    assert "delete" in rejected(tmp_path)["seed 3"]["reason"]
    clip.unlink()
    run(*data)
    assert not rejected(tmp_path) and len(ShardDataset(tmp_path / "shards", ["tracks"])) == 2


def test_a_clip_that_breaks_does_not_end_encoding(encoded_clips):
    common, vae, out = encoded_clips
    (out / "clips/train-000001.mp4").write_bytes(b"broken")
    (out / "encoded/train-000001.npz").unlink()
    assert run(*common, vae) == 0
    assert rejected(out)["seed 3"]["step"] == "encode"
    assert len(ShardDataset(out / "shards", ["latents"])) == 2


@pytest.mark.parametrize("name", ["clips/{}.json", "tracks/{}.npz", "encoded/{}.npz"])
def test_a_damaged_file_costs_its_clip_alone(encoded_clips, name):
    common, vae, out = encoded_clips
    damaged = out / name.format("train-000001")
    whole = damaged.read_bytes()
    damaged.write_bytes(whole[: len(whole) // 2])
    assert run(*common, "step=pack") == 0
    keys = [sample.key for sample in ShardDataset(out / "shards", ["latents"]).index.samples]
    assert keys == ["train-000000", "train-000002"]
    assert "run step=" in rejected(out)["seed 3"]["reason"]
    if damaged.suffix == ".npz":
        damaged.unlink()
    assert run(*common, vae) == 0
    assert damaged.stat().st_size == len(whole) and not rejected(out)
    assert len(ShardDataset(out / "shards", ["latents"])) == 3


def test_a_damaged_sidecar_ends_neither_tracking_nor_encoding(encoded_clips):
    common, vae, out = encoded_clips
    (out / "clips/train-000001.json").write_text('{"capt')
    assert run(*common, vae, "step=encode", "encode.dtype=bfloat16") == 0
    assert run(*common, "step=track", "tracker.rows=4") == 0
    lines = [json.loads(line) for line in (out / "rejected.jsonl").read_text().splitlines()]
    assert [(line["file"], line["step"]) for line in lines] == [("seed 3", "track"), ("seed 3", "encode")]
    assert all("is damaged" in line["reason"] for line in lines)


def test_tracks_of_another_grid_are_not_mixed(monkeypatch, caplog, encoded_clips):
    common, vae, out = encoded_clips
    cut_short(monkeypatch, prepare, "track_item", calls=1)
    with pytest.raises(KeyboardInterrupt):
        run(*common, "tracker.rows=4", "step=track")
    monkeypatch.undo()
    assert run(*common, "step=pack") == 0
    dataset = ShardDataset(out / "shards", ["tracks"])
    assert [dataset[n].tracks.num_tracks for n in range(len(dataset))] == [4 * 16]
    assert "not by the tracker of the last step=track" in caplog.text
    assert run(*common, vae) == 0
    assert len(ShardDataset(out / "shards", ["latents"])) == 3 and not rejected(out)


def test_a_checkpoint_of_a_tracker_is_known_by_its_content(tmp_path, monkeypatch, attempts):
    monkeypatch.setattr(prepare, "require_available", lambda *args, **kwargs: None)
    monkeypatch.setattr(prepare, "build_tracker", lambda cfg, scene: build_tracker("exact", scene))
    out = tmp_path / "out"
    data = ["source=sprites", "source.num_clips=1", f"out={out}", "previews=1", "tracker.name=cotracker3"]
    for name, content in (("a", "one"), ("b", "one"), ("c", "two")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "weights.pth").write_text(content)

    def made_with(name: str) -> list[str]:
        attempts.clear()
        assert run(*data, f"tracker.checkpoint={tmp_path / name}/weights.pth") == 0
        return [function for function, _ in attempts]

    assert made_with("a") == ["render_item", "track_item", "preview_item"]
    assert made_with("b") == []
    assert made_with("c") == ["track_item", "preview_item"]


def test_fewer_clips_asked_for_are_fewer_packed(tmp_path, caplog):
    """Said, as another source in the same place would take the place of the first one's clips too."""
    run("source=sprites", "source.num_clips=3", f"out={tmp_path}", "previews=0")
    assert "earlier runs" not in caplog.text
    run("source=sprites", "source.num_clips=2", f"out={tmp_path}", "previews=0")
    assert caplog.text.count("1 clips of earlier runs in") == 1 and "not among the 2 of this source" in caplog.text
    assert len(ShardDataset(tmp_path / "shards", ["tracks"])) == 2


def test_clips_asked_for_again_are_not_made_again(tmp_path, attempts):
    out = tmp_path / "out"
    data = ("source=sprites", f"out={out}", "previews=all", save_vae(tmp_path / "vae", seed=0))
    run(*data, "source.num_clips=6")
    made = {path: path.stat().st_mtime_ns for path in out.glob("*/*") if path.parent.name in ("clips", "encoded")}
    attempts.clear()
    for num_clips in (2, 6):
        assert run(*data, f"source.num_clips={num_clips}") == 0
        dataset = ShardDataset(out / "shards", ["latents", "tracks"])
        assert [sample.key for sample in dataset.index.samples] == [f"train-{n:06}" for n in range(num_clips)]
        assert not rejected(out)
    assert attempts == []
    del made[out / "encoded/about.json"]
    assert {path: path.stat().st_mtime_ns for path in made} == made


def test_clips_not_asked_for_are_left_alone_by_every_step(tmp_path):
    """Also where a step was not run since they were asked for."""
    out = tmp_path / "out"
    data = ("source=sprites", f"out={out}", "previews=0", save_vae(tmp_path / "vae", seed=0))
    run(*data, "source.num_clips=3", "step=render")
    run(*data, "source.num_clips=3", "step=track")
    for step in ("render", "encode", "pack"):
        assert run(*data, "source.num_clips=2", f"step={step}") == 0
    assert len(list((out / "encoded").glob("*.npz"))) == 2
    assert len(ShardDataset(out / "shards", ["latents"])) == 2


def test_clips_asked_for_again_with_other_settings_are_made_again(tmp_path, attempts):
    data = ("source=sprites", f"out={tmp_path}", "previews=0")
    run(*data, "source.num_clips=2")
    run(*data, "source.num_clips=1", "source.crf=30")
    attempts.clear()
    run(*data, "source.num_clips=2", "source.crf=30", "step=render")
    assert attempts == [("render_item", "train-000001")]
    run(*data, "step=pack")
    assert [s.key for s in ShardDataset(tmp_path / "shards", ["tracks"]).index.samples] == ["train-000000"]
    assert "tracks are missing, of an earlier rendering" in rejected(tmp_path)["seed 3"]["reason"]


def test_a_data_set_of_a_version_that_noted_no_keys_asked_for(tmp_path, attempts):
    data = ("source=sprites", f"out={tmp_path}", "source.num_clips=2", "previews=0")
    run(*data)
    for path in (tmp_path / "markers").glob("*.json"):
        path.unlink()
    attempts.clear()
    assert run(*data, "step=pack") == 0 and len(ShardDataset(tmp_path / "shards", ["tracks"])) == 2
    assert run(*data) == 0 and attempts == []


def test_worker_processes_make_the_same_clips(tmp_path):
    for workers in (0, 1):
        out = tmp_path / str(workers)
        run(
            "source=sprites",
            "source.num_clips=2",
            "step=render",
            f"out={out}",
            "previews=0",
            f"num_workers={workers}",
        )
    for name in ("train-000000.mp4", "train-000001.json"):
        assert (tmp_path / "0/clips" / name).read_bytes() == (tmp_path / "1/clips" / name).read_bytes()


def test_a_worker_tracks_on_its_own_gpu(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(prepare, "worker_number", lambda: 3)
    monkeypatch.setattr(
        prepare, "build_tracker", lambda cfg, scene: asked.append(cfg.device) or build_tracker(cfg, scene)
    )
    run("source=sprites", "source.num_clips=1", f"out={tmp_path}", "previews=0", "tracker.device=cuda")
    assert asked == ["cuda:1"]


# ------------------------------------------------------------------------------------------ encode
def test_encode_stores_what_the_encoders_give(tmp_path):
    """Fresh VAE weights in a folder stand for trained ones."""
    vae = WanVae.from_config(build_config(compose_config("data", ["model=tiny"]).model).vae, seed=0)
    vae.save(tmp_path / "vae")
    out = tmp_path / "out"
    code = prepare.main(
        compose_config(
            "data",
            [
                "model=tiny",
                f"model.vae.path={tmp_path / 'vae'}",
                "source=sprites",
                "source.num_clips=3",
                f"out={out}",
                "previews=0",
                "encode.batch_size=2",
            ],
        )
    )
    assert code == 0
    dataset = ShardDataset(out / "shards", ["pixels", "latents", "prompt_embeds"])
    assert set(dataset.index.fingerprints) == {"vae", "text"} and dataset.index.text_len == 32
    sample = dataset[2]
    expected = vae.encode(sample.pixels[None].float() / 127.5 - 1)[0]
    assert sample.latents.shape == (4, 9, 4, 4)
    assert torch.allclose(sample.latents, expected, atol=2e-2, rtol=1e-2)
    assert sample.prompt_embeds.shape[0] == 32


def test_processes_share_the_clips_to_encode(tmp_path, monkeypatch):
    """Each takes every second clip; together they leave nothing out, and no other step may be run so."""
    vae = save_vae(tmp_path / "vae", seed=0)
    common = ("source=sprites", "source.num_clips=5", f"out={tmp_path / 'out'}", "previews=0")
    run(*common)
    monkeypatch.setenv("WORLD_SIZE", "2")
    encoded = []
    for rank in (1, 0):
        monkeypatch.setenv("RANK", str(rank))
        assert run(*common, vae, "step=encode") == 0
        encoded.append(len(list((tmp_path / "out/encoded").glob("*.npz"))))
    assert encoded == [2, 5]
    with pytest.raises(ValueError, match="step=pack under 2 processes must be step=encode"):
        run(*common, vae, "step=pack")
    monkeypatch.delenv("WORLD_SIZE")
    assert run(*common, vae, "step=pack") == 0
    assert len(ShardDataset(tmp_path / "out/shards", ["latents"])) == 5


def save_vae(path: Path, seed: int) -> str:
    """Fresh VAE weights in a folder; the override that names them."""
    WanVae.from_config(build_config(compose_config("data", ["model=tiny"]).model).vae, seed=seed).save(path)
    return f"model.vae.path={path}"


@pytest.fixture
def encoded_clips(tmp_path):
    """Three sprites encoded with VAE A and packed: the overrides of data set and VAE, and the folder."""
    out = tmp_path / "out"
    common = ("source=sprites", "source.num_clips=3", f"out={out}", "previews=0", "encode.batch_size=1")
    vae = save_vae(tmp_path / "a", seed=0)
    assert run(*common, vae) == 0
    return common, vae, out


def latents(out: Path) -> torch.Tensor:
    """What the shards hold: [N, C, F, h, w]."""
    dataset = ShardDataset(out / "shards", ["latents"])
    return torch.stack([dataset[n].latents for n in range(len(dataset))])


def cut_short(monkeypatch, module, name: str, calls: int) -> None:
    """Let a function of the module be called so often and then fail, as a killed process would."""
    function, left = getattr(module, name), iter(range(calls))

    def limited(*args, **kwargs):
        if next(left, None) is None:
            raise KeyboardInterrupt
        return function(*args, **kwargs)

    monkeypatch.setattr(module, name, limited)


@pytest.mark.parametrize("function", ["_encode_group", "mark"])
def test_half_encoded_with_another_vae_is_packed_half(tmp_path, monkeypatch, caplog, encoded_clips, function):
    common, vae, out = encoded_clips
    before = latents(out)
    cut_short(monkeypatch, encode, function, calls=1)
    with pytest.raises(KeyboardInterrupt):
        run(*common, save_vae(tmp_path / "b", seed=1), "step=encode")
    monkeypatch.undo()
    assert run(*common, "step=pack") == 0
    dataset = ShardDataset(out / "shards", ["latents"])
    assert [sample.key for sample in dataset.index.samples] == ["train-000000"]
    assert not torch.equal(dataset[0].latents, before[0])
    assert dataset.index.fingerprints["vae"] == fingerprint(str(tmp_path / "b"))
    assert "2 clips left out, e.g. train-000001" in caplog.text
    lines = rejected(out).values()
    assert {(line["key"], line["step"]) for line in lines} == {("train-000001", "pack"), ("train-000002", "pack")}
    assert all("run step=encode, then step=pack" in line["reason"] for line in lines)
    assert run(*common, vae) == 0
    assert torch.equal(latents(out), before) and not rejected(out), "all are of the first weights again"


def test_latents_in_another_dtype_are_not_mixed(monkeypatch, encoded_clips):
    common, vae, out = encoded_clips
    cut_short(monkeypatch, encode, "_encode_group", calls=2)
    with pytest.raises(KeyboardInterrupt):
        run(*common, vae, "step=encode", "encode.dtype=bfloat16")
    monkeypatch.undo()
    run(*common, vae, "step=pack")
    assert len(ShardDataset(out / "shards", ["latents"])) == 2


@pytest.mark.parametrize("faster", ["float32", "bfloat16"])
def test_latents_know_the_dtype_that_auto_stood_for(monkeypatch, faster, encoded_clips):
    common, vae, out = encoded_clips
    monkeypatch.setattr(encode, "fast_dtype", lambda device: faster)
    run(*common, vae, "step=encode", "encode.dtype=auto")
    assert json.loads((out / "encoded/about.json").read_text())["dtype"] == faster


def test_a_clip_rendered_again_is_not_packed_with_its_old_tracks(caplog, encoded_clips):
    common, vae, out = encoded_clips
    (out / "markers/render/train-000001.json").write_text(
        '{"stamp": "new", "origin": "seed 3", "rejected": null, "clip": "new"}'
    )
    assert run(*common, "step=pack") == 0
    assert [s.key for s in ShardDataset(out / "shards", ["latents"]).index.samples] == ["train-000000", "train-000002"]
    assert "1 clips left out, e.g. train-000001" in caplog.text
    assert "run step=track" in rejected(out)["seed 3"]["reason"]
    assert run(*common, vae) == 0
    assert len(ShardDataset(out / "shards", ["latents"])) == 3 and not rejected(out)


def test_clips_of_another_geometry_are_not_packed(caplog, encoded_clips):
    common, _, out = encoded_clips
    sidecar = json.loads((out / "clips/train-000001.json").read_text())
    (out / "clips/train-000001.json").write_text(json.dumps(sidecar | {"num_frames": 17}))
    assert run(*common, "step=pack") == 0
    assert [s.key for s in ShardDataset(out / "shards").index.samples] == ["train-000000", "train-000002"]
    assert rejected(out)["seed 3"]["reason"].startswith("height, width, num_frames or fps is not that of model.clip")
    index = (out / "shards/index.json").read_bytes()
    assert run(*common, "model.clip.fps=8", "step=pack") == 1, "no clip has this rate"
    assert "no clip can be packed" in caplog.text and (out / "shards/index.json").read_bytes() == index


def test_clips_rendered_again_lose_their_old_latents(caplog, encoded_clips):
    common, vae, out = encoded_clips
    old = (out / "shards/index.json").read_bytes()
    run(*common, "source.crf=30", "step=render")
    assert run(*common, "step=pack") == 1, "no clip has tracks"
    assert "no clip can be packed" in caplog.text and (out / "shards/index.json").read_bytes() == old
    assert run(*common, "source.crf=30") == 0
    assert ShardDataset(out / "shards", ["pixels", "tracks"]).index.fields == ["pixels", "tracks"]
    assert "shards without latents, though 3 clips were encoded" in caplog.text
    assert run(*common, "source.crf=30", vae) == 0
    assert len(ShardDataset(out / "shards", ["latents"])) == 3


def test_a_rendering_cut_short_is_not_packed_with_tracks_of_the_last_one(monkeypatch, encoded_clips):
    common, _, out = encoded_clips
    cut_short(monkeypatch, progress, "mark", calls=0)
    with pytest.raises(KeyboardInterrupt):
        run(*common, "source.crf=30", "step=render")
    monkeypatch.undo()
    assert run(*common, "step=pack") == 0
    assert [s.key for s in ShardDataset(out / "shards").index.samples] == ["train-000001", "train-000002"]


def test_encode_alone_needs_a_vae(tmp_path):
    run("source=sprites", "source.num_clips=1", f"out={tmp_path}", "previews=0")
    with pytest.raises(ValueError, match=r"model\.vae\.path is not set"):
        run("source=sprites", "source.num_clips=1", f"out={tmp_path}", "step=encode")


@pytest.fixture
def strange_clips(tmp_path):
    """Two real clips with a word that is not of the sprites world: the overrides, and the folder of the videos."""
    videos = tmp_path / "videos"
    for name in ("a", "b"):
        noise_video(videos / f"{name}.mp4")
        (videos / f"{name}.txt").write_text(f"zebra {name}")
    common = ["source=folder", f"source.path={videos}", f"out={tmp_path / 'out'}", "tracker.rows=2", "tracker.cols=2"]
    return [*common, "previews=0", save_vae(tmp_path / "vae", seed=0)], videos


def test_captions_that_are_all_rejected_end_the_run(tmp_path, caplog, strange_clips):
    common, videos = strange_clips
    assert run(*common) == 1 and not (tmp_path / "out/shards").exists()
    assert "every clip was rejected by encode; first reason: unknown word 'zebra'" in caplog.text
    assert "model.text.kind=hashed or umt5" in caplog.text
    assert {line["step"] for line in rejected(tmp_path / "out").values()} == {"encode"}
    assert run(*common) == 1, "once more, with nothing left to encode"
    assert run(*common, "model.vae.path=null") == 0 and not rejected(tmp_path / "out"), "no caption is encoded"
    assert run(*common) == 1 and len(rejected(tmp_path / "out")) == 2
    assert run(*common, "model.text.kind=hashed") == 0
    assert len(ShardDataset(tmp_path / "out/shards", ["latents"])) == 2
    (videos / "b.txt").write_text("a red disc")
    assert run(*common) == 0
    assert [s.key for s in ShardDataset(tmp_path / "out/shards").index.samples] == ["b"]


def test_a_process_that_ends_first_does_not_judge_for_the_others(monkeypatch, strange_clips):
    common, _ = strange_clips
    run(*common, "step=render")
    run(*common, "step=track")
    monkeypatch.setenv("WORLD_SIZE", "2")
    codes = []
    for rank in (1, 0):
        monkeypatch.setenv("RANK", str(rank))
        codes.append(run(*common, "step=encode"))
    assert codes == [0, 1], "only the last one knows that every clip was rejected"
    monkeypatch.setenv("WORLD_SIZE", "3")
    monkeypatch.setenv("RANK", "2")
    assert run(*common, "step=encode", "model.text.kind=hashed") == 0, "one without clips, before the others begin"


def test_fingerprint_follows_content_not_place(tmp_path):
    for name, content in (("a", b"one"), ("b", b"one"), ("c", b"two")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "weights").write_bytes(content)
    a, b, c = (fingerprint(str(tmp_path / name)) for name in "abc")
    assert a == b != c


def test_fingerprints_in_use_stay(tmp_path):
    """Shards hold them; files are told apart by name, size and content only."""
    (tmp_path / "config.json").write_bytes(b"{}")
    (tmp_path / "weights").write_bytes(b"one")
    assert fingerprint(str(tmp_path)) == "432bc34754d5e20d"
    assert fingerprint(None, "vocabulary", 32) == "14d9cb8b814a25d3"


def test_a_fingerprint_of_nothing_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere does not exist; weights are expected there"):
        fingerprint(str(tmp_path / "nowhere"))


def test_fingerprint_is_of_what_is_read(tmp_path):
    """Not of a download's notes, nor of the DiT beside the text encoder in one repository."""
    model = build_config(compose_config("data", ["model=tiny"]).model)
    model.text = TextConfig("umt5", str(tmp_path))
    for name in ("text_encoder", "tokenizer"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(name)
    text, whole = fingerprints(model)["text"], fingerprint(str(tmp_path))
    notes = tmp_path / "tokenizer/.cache/huggingface/download"
    notes.mkdir(parents=True)
    (notes / "config.json.metadata").write_text("1700000000.0")
    (tmp_path / ".gitattributes").touch()
    assert fingerprint(str(tmp_path)) == whole
    (tmp_path / "transformer").mkdir()
    (tmp_path / "transformer/config.json").write_text("{}")
    assert fingerprints(model)["text"] == text
    (tmp_path / "tokenizer/config.json").write_text("other words")
    assert fingerprints(model)["text"] != text


# ------------------------------------------------------------------------------------------ folders
def test_broken_files_are_rejected_with_reasons(tmp_path):
    videos, out = tmp_path / "videos", tmp_path / "out"
    videos.mkdir()
    noise_video(videos / "good.mp4")
    noise_video(videos / "short.mp4", num_frames=20)
    (videos / "cut.mp4").write_bytes((videos / "good.mp4").read_bytes()[:3000])
    (videos / "empty.mp4").touch()
    (videos / "text.mp4").write_text("hello " * 100)
    arguments = ["source=folder", f"source.path={videos}", f"out={out}", "tracker.rows=5", "tracker.cols=5"]
    assert run(*arguments) == 0
    assert [s.key for s in ShardDataset(out / "shards", ["tracks"]).index.samples] == ["good"]
    reasons = {name: line["reason"] for name, line in rejected(out).items()}
    assert set(reasons) == {"short.mp4", "cut.mp4", "empty.mp4", "text.mp4"}
    assert "too short" in reasons["short.mp4"] and "truncated" in reasons["cut.mp4"]
    assert "empty" in reasons["empty.mp4"] and "not an mp4" in reasons["text.mp4"]
    assert {line["step"] for line in rejected(out).values()} == {"render"}
    noise_video(videos / "short.mp4", num_frames=40)
    run(*arguments)
    assert "short.mp4" not in rejected(out), "a replaced file is tried again"
    assert len(ShardDataset(out / "shards", ["tracks"])) == 2


@pytest.mark.parametrize(
    "source, path, out",
    [
        ("folder", "videos", "videos/prepared"),
        ("folder", "videos", "videos"),
        ("folder", "link", "videos/prepared"),
        ("folder", "videos/clips", "videos"),
        ("folder", "videos/previews", "videos"),
        ("openvid", "videos/clips", "videos"),
    ],
)
def test_a_source_that_would_take_its_own_products_is_refused(tmp_path, source, path, out):
    for name in ("clips", "previews"):
        noise_video(tmp_path / "videos" / name / "a.mp4")
    (tmp_path / "link").symlink_to(tmp_path / "videos")
    (tmp_path / "list.csv").write_text("video,caption,frame\na.mp4,a,82\n")
    given = [f"source={source}", f"source.path={tmp_path / path}", f"out={tmp_path / out}"]
    if source == "openvid":
        given += [f"source.manifest={tmp_path / 'list.csv'}", "tracker.name=lucas_kanade"]
    before = sorted(tmp_path.rglob("*"))
    message = rf"out=\S+/{out} lies below source\.path=\S+/{path} or around it: .*; write somewhere else"
    with pytest.raises(ValueError, match=message):
        run(*given)
    assert sorted(tmp_path.rglob("*")) == before


def test_videos_beside_or_below_the_products_are_taken_once(tmp_path):
    out = tmp_path / "out"
    noise_video(out / "videos/a.mp4")
    data = ["source=folder", f"source.path={out / 'videos'}", f"out={out}", "tracker.rows=2", "tracker.cols=2"]
    for _ in range(2):
        assert run(*data) == 0
        assert len(ShardDataset(out / "shards", ["tracks"])) == 1


def test_other_filters_judge_the_clips_again(tmp_path, attempts):
    """Without tracking those again that pass both."""
    out = tmp_path / "out"
    noise_video(tmp_path / "wide.mp4", num_frames=82)
    noise_video(tmp_path / "odd.mp4", num_frames=82, width=60)
    (tmp_path / "list.csv").write_text("video,caption,frame\nwide.mp4,wide,82\nodd.mp4,odd,82\n")
    data = ["source=openvid", f"source.path={tmp_path}", f"source.manifest={tmp_path / 'list.csv'}", f"out={out}"]
    data += ["tracker.name=lucas_kanade", "tracker.rows=2", "tracker.cols=2", "previews=0"]
    assert run(*data) == 0 and set(rejected(out)) == {"odd.mp4"}
    attempts.clear()
    run(*data, "source.aspect_tolerance=0.1")
    assert not rejected(out) and len(ShardDataset(out / "shards", ["tracks"])) == 2
    assert [made for made in attempts if made[0] == "track_item"] == [("track_item", "odd")]
    run(*data)
    assert set(rejected(out)) == {"odd.mp4"} and len(ShardDataset(out / "shards", ["tracks"])) == 1


def test_nothing_usable_is_an_error_code(tmp_path):
    (tmp_path / "videos").mkdir()
    (tmp_path / "videos/text.mp4").write_text("hello")
    assert run("source=folder", f"source.path={tmp_path / 'videos'}", f"out={tmp_path / 'out'}") == 1


@pytest.mark.skipif(not CLIPS.exists(), reason="the real clips in ../shared/data/clips are absent")
def test_real_clips_with_a_50x50_grid(tmp_path):
    videos, out = tmp_path / "videos", tmp_path / "out"
    shutil.copytree(CLIPS, videos, copy_function=shutil.copyfile)
    for path in sorted(videos.glob("*.mp4")):
        path.with_suffix(".txt").write_text(f"a clip of {path.stem}")
    (videos / "cut.mp4").write_bytes((videos / "bear.mp4").read_bytes()[:400_000])
    (videos / "empty.mp4").touch()
    (videos / "text.mp4").write_text("hello " * 100)
    size = ["model.clip.height=240", "model.clip.width=416", "model.clip.num_frames=9"]
    assert run("source=folder", f"source.path={videos}", f"out={out}", *size) == 0
    dataset = ShardDataset(out / "shards", ["tracks"])
    assert [s.key for s in dataset.index.samples] == ["bear", "cat", "paragliding-launch"]
    assert dataset[0].caption == "a clip of bear" and dataset[0].tracks.num_tracks == 2500
    assert set(rejected(out)) == {"cut.mp4", "empty.mp4", "text.mp4"}
    assert {p.name for p in (out / "previews").iterdir()} == {
        f"{key}.preview.mp4" for key in ("bear", "cat", "paragliding-launch")
    }
    assert probe_video(out / "previews/bear.preview.mp4").num_frames == 9


# ------------------------------------------------------------------------------------------ configuration
@pytest.mark.parametrize(
    "overrides, message",
    [
        (["step=trak"], "step='trak' must be one of"),
        (["step=pack", "out="], "out is empty; set it to the folder"),
        (["previews=some"], "previews='some'"),
        (["previews=²"], "previews='²'"),
        (["source.crf=-1"], r"source\.crf=-1 must lie in 0 \(lossless\) \.\. 51"),
        (["source=folder", "source.path={out}", "source.crf=52"], r"source\.crf=52 must lie in 0"),
        (["tracker.name=kalman"], "tracker.name='kalman'"),
        (["tracker.upsample=9"], r"tracker\.upsample=9 must be in 1\.\.4"),
        (["encode.dtype=float8"], "encode.dtype='float8' must be one of float32, bfloat16, auto"),
        (["encode.device=gpu"], "encode.device=gpu must be auto, cpu or cuda"),
        (["num_workers=-1"], "num_workers=-1 must be at least 0"),
        (["max_shard_mb=0"], "max_shard_mb=0.0 must be above 0"),
    ],
)
def test_values_are_checked(tmp_path, overrides, message):
    with pytest.raises(ValueError, match=message):
        run(f"out={tmp_path}", *(text.format(out=tmp_path) for text in overrides))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "overrides, message",
    [
        ([], r"tracker\.name=cotracker3 has no weights"),
        (["tracker.checkpoint=absent.pth"], r"tracker\.checkpoint=absent\.pth needs the package `cotracker`"),
        (["tracker.allow_download=true", "tracker.device=gpu"], r"tracker\.device=gpu must be auto, cpu or cuda"),
        (["tracker.allow_download=true", "tracker.device=cuda"], r"tracker\.device=cuda, but this machine has no CUDA"),
        (["source=folder", "source.path={tmp_path}", "tracker.name=exact"], r"tracker\.name=exact needs sprites clips"),
    ],
)
def test_a_tracker_that_cannot_work_here_is_refused_before_any_work(tmp_path, monkeypatch, overrides, message):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setitem(sys.modules, "cotracker", None)
    overrides = [text.format(tmp_path=tmp_path) for text in overrides]
    with pytest.raises((ValueError, ImportError), match=message):
        run(f"out={tmp_path / 'out'}", "tracker.name=cotracker3", *overrides)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "overrides, message",
    [
        (
            ["model.vae.path={absent}"],
            r"model\.vae\.path=\S+/absent holds no VAE .*; set it to a folder of one, or to null",
        ),
        (["model.vae.path={vae}", "model.text.kind=umt5"], r"model\.text\.path is null"),
        (["model.vae.path={vae}", "model.text.kind=umt5", "model.text.path={absent}"], r"model\.text\.path=\S+/absent"),
        (["model.vae.path={vae}", "model.clip_encoder={absent}"], r"model\.clip_encoder=\S+/absent: there is nothing"),
    ],
)
def test_encoders_that_are_not_there_are_refused_before_any_work(tmp_path, overrides, message):
    save_vae(tmp_path / "vae", seed=0)
    overrides = [text.format(absent=tmp_path / "absent", vae=tmp_path / "vae") for text in overrides]
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        run(f"out={tmp_path / 'out'}", "source.num_clips=1", *overrides)
    assert not (tmp_path / "out").exists()


def test_a_machine_without_gpu_does_what_needs_none(tmp_path):
    cannot = ("encode.device=cuda:99", "tracker.name=cotracker3", "tracker.device=cuda:99")
    assert run(f"out={tmp_path}", "source.num_clips=1", "step=render", *cannot) == 0


def test_an_out_below_a_file_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"out=\S+/file/x: \S+/file is a file where a folder is needed"):
        run(f"out={tmp_path}/file/x", "source.num_clips=1")


def test_two_commands_do_not_make_one_data_set(tmp_path):
    """Two at step=pack left an index with clips twice."""
    given = (f"out={tmp_path}", "source.num_clips=1", "previews=0")
    with claim(tmp_path, "another"), pytest.raises(ValueError, match=r"out=\S+ is being written by process"):
        run(*given)
    assert run(*given) == 0


def test_the_shipped_vae_encodes_from_any_working_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    given = ["model=sprites", "source.num_clips=1", "previews=0", "out=here"]
    assert prepare.main(compose_config("data", given)) == 0
    assert ShardDataset("here/shards", ["latents"])[0]


def test_unknown_key_is_refused_when_composed():
    with pytest.raises(Exception, match=r"tracker\.row"):
        compose_config("data", ["tracker.row=5"])


def test_encode_config():
    with pytest.raises(ValueError, match=r"encode\.batch_size=0"):
        EncodeConfig(batch_size=0)
