"""Validation clips: what the student would stream under the same noise."""

from __future__ import annotations

import torch
from tiny_distill import SEED

from distill.conditions import draw_condition
from distill.validation import generate_clips
from models.assemble import load_role
from models.diffusion.noise import KeyedNoise
from models.rollout import Rollout
from train.conditioning import ClipEncoder


def test_clips_are_made_by_all_steps_as_when_streaming(model_cfg, batch):
    student, noise = load_role(model_cfg, "teacher"), KeyedNoise(SEED)
    encoder = ClipEncoder(model_cfg, torch.device("cpu"))
    condition, _ = draw_condition(encoder, batch, noise, batch.sample_ids, 0, (3, 5))
    made = generate_clips(student, condition, model_cfg, noise, batch.sample_ids)
    channels, _, height, width = model_cfg.latent_shape
    stream = Rollout(
        student, model_cfg.rollout, noise=noise, sample_ids=batch.sample_ids,
        latent_shape=(channels, height, width), cache="static", noise_key=("validation",),
    )  # fmt: skip
    frames = model_cfg.rollout.chunk_frames
    chunks = [stream.next_chunk(condition.chunk(index * frames, frames)).x0 for index in range(model_cfg.num_chunks)]
    torch.testing.assert_close(made, torch.cat(chunks, dim=2), rtol=1e-4, atol=1e-5)
