"""Shards: what is written is read back, and what is broken or made for another model is refused by name."""

from __future__ import annotations

import itertools
import json
import os

import numpy as np
import pytest
import torch

from data.batch import collate
from data.loader import LoaderConfig, build_loader
from data.shards import (
    SampleEntry,
    SampleTable,
    ShardDataset,
    ShardError,
    ShardIndex,
    npy_bytes,
    trim_text,
    write_shards,
)
from data.video import write_video
from models.condition import ClipGeometry

GEOMETRY = ClipGeometry(32, 48, 5, 8)
ALL_FIELDS = ("pixels", "latents", "prompt_embeds", "tracks")


def members(n: int, folder) -> dict[str, bytes]:
    rng = np.random.default_rng(n)
    frames = np.full((5, 32, 48, 3), 40 * n + 20, np.uint8)
    write_video(folder / "clip.mp4", frames, 8)
    text = np.zeros((6, 4), np.float16)
    text[: n + 1] = n + 1
    return {
        "mp4": (folder / "clip.mp4").read_bytes(),
        "json": json.dumps({"caption": f"clip number {n}", "seed": n}).encode(),
        "tracks.npy": npy_bytes(rng.uniform(0, 32, (5, 7, 2)).astype(np.float32)),
        "visibility.npy": npy_bytes(rng.uniform(size=(5, 7)) < 0.5),
        "latents.npy": npy_bytes(rng.normal(size=(4, 2, 8, 12)).astype(np.float16)),
        "text.npy": npy_bytes(trim_text(text)),
    }


@pytest.fixture
def shards(tmp_path):
    samples = [(f"clip-{n}", members(n, tmp_path)) for n in range(4)]
    write_shards(samples, tmp_path / "shards", GEOMETRY, max_shard_bytes=5e3, text_len=6, fingerprints={"vae": "v1"})
    return tmp_path / "shards", dict(samples)


def test_round_trip(shards):
    folder, written = shards
    dataset = ShardDataset(folder, ALL_FIELDS)
    assert len(dataset) == 4 and len(dataset.index.shards) > 1
    assert dataset.index.fields == ["pixels", "latents", "prompt_embeds", "tracks"]
    for n in (3, 0, 2, 1):  # any order
        sample = dataset[n]
        assert (sample.sample_id, sample.key, sample.caption) == (n, f"clip-{n}", f"clip number {n}")
        assert dataset.read_part(n, "latents.npy") == written[f"clip-{n}"]["latents.npy"]
        assert sample.pixels.shape == (3, 5, 32, 48) and sample.pixels.dtype == torch.uint8
        assert abs(float(sample.pixels.float().mean()) - (40 * n + 20)) < 3
        assert sample.prompt_embeds.shape == (6, 4)
        assert (sample.prompt_embeds[: n + 1] == n + 1).all() and (sample.prompt_embeds[n + 1 :] == 0).all()
        assert (sample.tracks.height, sample.tracks.width) == (32, 48)


def test_batches(shards):
    batch = collate([ShardDataset(shards[0], ALL_FIELDS)[n] for n in (2, 0)])
    assert batch.sample_ids == [2, 0] and batch.captions[0] == "clip number 2"
    assert batch.latents.shape == (2, 4, 2, 8, 12) and batch.latents.dtype == torch.float32
    assert batch.tracks.points.shape == (2, 5, 7, 2) and (batch.tracks.ids == 0).all()
    assert batch.model_pixels().min() >= -1 and batch.model_pixels().max() <= 1
    assert batch.to("cpu").tracks is not None


def test_only_asked_fields_are_loaded(shards):
    sample = ShardDataset(shards[0], ["latents"])[1]
    assert sample.latents is not None and sample.pixels is None and sample.tracks is None
    with pytest.raises(ValueError, match="add 'pixels'"):
        collate([sample]).model_pixels()


def test_cache_returns_the_loaded_sample(shards):
    dataset = ShardDataset(shards[0], ["latents"], cache=True)
    first = dataset[0]
    (shards[0] / dataset.index.shards[0]).unlink()
    assert dataset[0] is first


def test_same_samples_give_the_same_bytes(tmp_path):
    for name in ("a", "b"):
        write_shards([("k", {"json": b"{}"})], tmp_path / name, GEOMETRY)
    assert (tmp_path / "a/clips-000000.tar").read_bytes() == (tmp_path / "b/clips-000000.tar").read_bytes()


@pytest.mark.parametrize("name", ["best50%set", "top_50%/shards", "a:1/x"])
def test_folders_of_any_name(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    write_shards([("k", {"json": b"{}"})], name, GEOMETRY)
    assert sorted(path.name for path in (tmp_path / name).iterdir()) == ["clips-000000.tar", "index.json"]


def test_the_table_gives_back_the_entries(shards):
    entries = [SampleEntry("a", 0, {"json": (512, 7), "mp4": (1536, 9)}), SampleEntry("b", 1, {"json": (0, 5)})]
    table = SampleTable(entries)
    assert list(table) == entries and table[1] == entries[1] and len(table) == 2
    assert table.all_have("json") and not table.all_have("mp4") and not SampleTable([]).all_have("json")
    assert table.beyond([1545, 5]) is None and table.beyond([1544, 5]) == (entries[0], "mp4")
    index = ShardIndex.load(shards[0])
    before = (shards[0] / "index.json").read_bytes()
    index.save(shards[0])
    assert (shards[0] / "index.json").read_bytes() == before


def test_the_identity_is_of_the_keys_in_their_order(tmp_path):
    found = []
    for keys in ("ab", "ba", "abc", "ab"):
        index = write_shards([(key, {"json": b"{}"}) for key in keys], tmp_path, GEOMETRY)
        found.append(index.identity)
    assert found[0] == found[3] and len(set(found)) == 3


def test_webdataset_reads_them(shards):
    wds = pytest.importorskip("webdataset")
    paths = sorted(str(path) for path in shards[0].glob("*.tar"))
    found = {sample["__key__"]: sample for sample in wds.WebDataset(paths, shardshuffle=False)}
    assert set(found) == set(shards[1])
    assert found["clip-1"]["latents.npy"] == shards[1]["clip-1"]["latents.npy"]


def test_truncated_shard_is_named_with_its_key(shards):
    folder, _ = shards
    last = sorted(folder.glob("*.tar"))[-1]
    last.write_bytes(last.read_bytes()[:3000])
    with pytest.raises(ShardError, match=rf"{last.name}: truncated in sample clip-\d"):
        ShardDataset(folder, ["latents"])


def test_shard_cut_while_open(shards):
    dataset = ShardDataset(shards[0], ["latents"])
    shard = shards[0] / dataset.index.shards[0]
    shard.write_bytes(shard.read_bytes()[:600])
    with pytest.raises(ShardError, match="truncated in sample clip-0"):
        dataset[0]


@pytest.mark.parametrize("part", ["mp4", "latents.npy", "text.npy", "json", "visibility.npy"])
def test_damaged_bytes_are_named_with_their_sample(shards, part):
    dataset = ShardDataset(shards[0], ALL_FIELDS)
    _overwrite(dataset, 2, part)
    dataset[1]
    with pytest.raises(ShardError, match=r"^clips-\d+\.tar: sample clip-2: .*; copy the shard again or run step=pack"):
        dataset[2]


def _overwrite(dataset: ShardDataset, position: int, part: str) -> None:
    entry = dataset.index.samples[position]
    offset, size = entry.parts[part]
    with (dataset.folder / dataset.index.shards[entry.shard]).open("r+b") as file:
        file.seek(offset)
        file.write(b"\xff" * size)


def test_a_loading_process_says_no_more_than_this_one_would(shards):
    _overwrite(ShardDataset(shards[0], ["latents"]), 2, "latents.npy")
    told = []
    for workers in (0, 1):
        with pytest.raises(ShardError) as refused:
            list(itertools.islice(build_loader(LoaderConfig(str(shards[0]), workers), ["latents"], 4), 1))
        told.append(str(refused.value))
    assert told[0] == told[1] and "\n" not in told[0]


@pytest.mark.parametrize("content", ['{"version": 1, "samples": [{"key', "[]", "{}"])
def test_a_damaged_index_is_refused(shards, content):
    (shards[0] / "index.json").write_text(content)
    with pytest.raises(ShardError, match="index.json.* run step=pack again"):
        ShardDataset(shards[0])


def test_missing_shard_and_missing_index(shards, tmp_path):
    next(iter(shards[0].glob("*.tar"))).unlink()
    with pytest.raises(ShardError, match="absent"):
        ShardDataset(shards[0], ["latents"])
    with pytest.raises(FileNotFoundError, match="step=pack"):
        ShardDataset(tmp_path / "nowhere")


def test_data_of_another_model_is_refused(shards):
    with pytest.raises(ShardError, match="clip_embeds"):
        ShardDataset(shards[0], ["clip_embeds"])
    with pytest.raises(ShardError, match="unknown|must be among"):
        ShardDataset(shards[0], ["latent"])
    with pytest.raises(ShardError, match=r"model\.clip"):
        ShardDataset(shards[0], ["latents"], geometry=ClipGeometry(64, 64, 33, 16))
    with pytest.raises(ShardError, match="vae fingerprint of the shards is v1, the model's is v2"):
        ShardDataset(shards[0], ["latents"], fingerprints={"vae": "v2"})
    ShardDataset(shards[0], ["latents"], geometry=GEOMETRY, fingerprints={"vae": "v1", "clip": "unused"})


@pytest.mark.parametrize("keys", [["a.b"], ["a", "a"]])
def test_bad_keys(tmp_path, keys):
    with pytest.raises(ValueError, match="no dot and be unique"):
        write_shards([(key, {"json": b"{}"}) for key in keys], tmp_path, GEOMETRY)


def test_interrupted_packing_leaves_no_index(shards):
    def broken():
        yield "clip-9", {"json": b"{}"}
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_shards(broken(), shards[0], GEOMETRY)
    with pytest.raises(FileNotFoundError):
        ShardDataset(shards[0])


def test_build_loader(shards):
    loader = build_loader(LoaderConfig(str(shards[0])), ["latents"], 2, rank=1, world=2)
    assert next(iter(loader)).size == 2
    assert loader.state_dict()["identity"] == ShardDataset(shards[0]).index.identity
    with pytest.raises(ValueError, match="path is empty"):
        build_loader(LoaderConfig(), ["latents"], 2)


def test_samples_that_do_not_fit_together_are_named(shards):
    dataset = ShardDataset(shards[0], ["latents"])
    first, second = dataset[0], dataset[1]
    second.latents = second.latents[:, :1]
    with pytest.raises(ValueError, match="latents shapes differ.*clip-0"):
        collate([first, second])
    second.latents = None
    with pytest.raises(ValueError, match="latents is present in 1 of 2"):
        collate([first, second])


@pytest.mark.parametrize("keys, fingerprints", [("0123", {"vae": "v2"}), ("1203", {"vae": "v1"}), ("0", {"vae": "v1"})])
def test_shards_packed_anew_are_not_read_by_the_old_index(shards, keys, fingerprints):
    folder, written = shards
    dataset = ShardDataset(folder, ["latents"])
    last = dataset[3].latents
    settings = {"max_shard_bytes": 5e3, "text_len": 6}
    write_shards(written.items(), folder, GEOMETRY, **settings, fingerprints={"vae": "v1"})
    for shard in dataset.index.shards:
        os.utime(folder / shard, (0, 0))
    assert torch.equal(dataset[3].latents, last), "the same samples again"
    samples = [(f"clip-{n}", written[f"clip-{n}"]) for n in keys]
    write_shards(samples, folder, GEOMETRY, **settings, fingerprints=fingerprints)
    with pytest.raises(
        ShardError, match=r"clips-\d+\.tar was packed anew while it was in use; start the command again"
    ):
        dataset[3]
