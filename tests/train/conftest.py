"""Shards of the tiny model."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from data.app import build_config, compose_config
from data.shards import npy_bytes, write_shards
from data.sprites import SpritesConfig, render_clip
from data.video import write_video
from models.condition import ClipGeometry
from models.wan.text_encoder import VocabularyEncoder

NUM_CLIPS, NUM_TRACKS = 10, 16
CAPTIONS = ["a red disc", "a blue square turns", "the ring stops", "a green cross moves left"]


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    """Sums are split by the number of threads: equal bit for bit means an equal number."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def tiny_model():
    return build_config(compose_config("train", ["model=tiny"]).model)


def write_tiny_shards(folder: Path, model, size_px: int, with_video: bool) -> Path:
    """Ten clips with made-up latents of the model's shape and points that walk at random."""
    clip = ClipGeometry(size_px, size_px, model.clip.num_frames, model.clip.fps)
    text = VocabularyEncoder(model.dit.text_len)

    def samples():
        for number in range(NUM_CLIPS):
            rng, caption = np.random.default_rng(number), CAPTIONS[number % len(CAPTIONS)]
            start = rng.uniform(0, size_px, (1, NUM_TRACKS, 2))
            steps = rng.normal(0, size_px / 40, (clip.num_frames - 1, NUM_TRACKS, 2))
            points = np.concatenate([start, start + steps.cumsum(0)])
            visibility = (points >= 0).all(-1) & (points < size_px).all(-1)
            latents = 0.3 * rng.standard_normal(model.latent_shape)
            parts = {
                "tracks.npy": npy_bytes(points.astype(np.float32)),
                "visibility.npy": npy_bytes(visibility),
                "latents.npy": npy_bytes(latents.astype(np.float16)),
                "text.npy": npy_bytes(text.encode([caption])[0].numpy().astype(np.float16)),
                "json": json.dumps({"caption": caption}).encode(),
            }
            if with_video:
                world = SpritesConfig(height=size_px, width=size_px, num_frames=clip.num_frames, fps=clip.fps)
                write_video(folder / "clip.mp4", render_clip(world, seed=number).frames, clip.fps)
                parts["mp4"] = (folder / "clip.mp4").read_bytes()
            yield f"clip{number:03d}", parts

    write_shards(samples(), folder / "shards", clip, text_len=text.text_len)
    return folder / "shards"


@pytest.fixture(scope="session")
def tiny_shards(tmp_path_factory, tiny_model) -> Path:
    """16 x 16 px, the size of the tiny model; nothing in it depends on a renderer or a codec."""
    return write_tiny_shards(tmp_path_factory.mktemp("shards"), tiny_model, 16, with_video=False)


@pytest.fixture(scope="session")
def pixel_shards(tmp_path_factory, tiny_model) -> Path:
    """32 x 32 px sprites: decord reads no narrower video."""
    return write_tiny_shards(tmp_path_factory.mktemp("pixels"), tiny_model, 32, with_video=True)
