"""The tiny model of the distillation tests: config, weights, synthetic batches, a plain training loop."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from data.batch import Batch
from models.assemble import ModelConfig, TextConfig, build_text_encoder
from models.condition import ClipGeometry
from models.diffusion.noise import KeyedNoise
from models.motion.tracks import Tracks
from models.rollout import RolloutConfig
from models.vae.wan_vae import VaeConfig
from models.wan.config import WanConfig
from models.wan.dit import WanDiT
from models.wan.text_encoder import VocabularyEncoder
from train.stage import SetupContext, Stage, StepContext

SEED = 7
TEXT_LEN = 8
CAPTIONS = ["a red disc moves left", "a blue square turns", "the ring stops", "a green cross"]


def tiny_model(**dit_overrides: object) -> ModelConfig:
    """9 latents of 4 x 4 cells in 3 chunks, a 4-step grid of which the student takes 3."""
    sizes = {
        "dim": 40,
        "ffn_dim": 48,
        "num_heads": 2,
        "num_layers": 2,
        "text_dim": VocabularyEncoder.dim_for(TEXT_LEN),
        "text_len": TEXT_LEN,
        "image_conditioning": "first_frame",
        "track_channels": 4,
    }
    return ModelConfig(
        clip=ClipGeometry(16, 16, 33, 16),
        dit=WanConfig.tiny(**(sizes | dit_overrides)),
        vae=VaeConfig(
            base_dim=4,
            z_dim=4,
            dim_mult=[1, 2, 4],
            num_res_blocks=1,
            temporal_downsample=[True, True],
            latents_per_call=None,
        ),
        text=TextConfig(),
        rollout=RolloutConfig(num_inference_steps=4, step_indices=[0, 1, 3]),
        guidance={"text": 3.0, "motion": 1.5},
    )


def perturbed(dit: WanDiT, seed: int = 0) -> WanDiT:
    """Fresh weights predict zero (zero-initialised head); these predict something."""
    rng = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in dit.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=rng)
    return dit


def make_batch(cfg: ModelConfig, sample_ids: list[int]) -> Batch:
    """Latents, prompt and tracks of these samples, each a function of its id."""
    samples = [torch.Generator().manual_seed(sample_id) for sample_id in sample_ids]
    captions = [CAPTIONS[sample_id % len(CAPTIONS)] for sample_id in sample_ids]
    frames, tracks = cfg.clip.num_frames, 5
    points = torch.stack([torch.rand(frames, tracks, 2, generator=rng) * 16 for rng in samples])
    visibility = torch.stack([torch.rand(frames, tracks, generator=rng) > 0.2 for rng in samples])
    return Batch(
        sample_ids=sample_ids,
        keys=[f"sample{sample_id}" for sample_id in sample_ids],
        captions=captions,
        latents=torch.stack([torch.randn(cfg.latent_shape, generator=rng) for rng in samples]),
        prompt_embeds=build_text_encoder(cfg).encode(captions),
        tracks=Tracks(points, visibility, torch.zeros(len(sample_ids), tracks, dtype=torch.long), 16, 16),
    )


def setup_context(cfg: ModelConfig, output_dir: Path) -> SetupContext:
    def sample_clips(count: int) -> Iterator[Batch]:
        return (make_batch(cfg, [sample_id]) for sample_id in range(count))

    device = torch.device("cpu")
    return SetupContext(cfg, device, torch.float32, output_dir, KeyedNoise(SEED), sample_clips=sample_clips)


def step_context(
    step: int, update: str, micro: int = 0, rank: int = 0, world: int = 1, micro_batch: int = 2
) -> StepContext:
    return StepContext(step, update, micro, rank, world, SEED, micro_batch)


def train(stage: Stage, steps: range) -> list[float]:
    """Plain SGD on all updates of the steps; the loss of the first update of each."""
    losses = []
    for step in steps:
        for position, update in enumerate(stage.updates(step)):
            batch = make_batch(stage.model_cfg, [2 * step + position, 2 * step + position + 1])
            output = stage.train_step(batch, step_context(step, update))
            module = stage.modules()[update]
            for loss in [output.losses] if isinstance(output.losses, torch.Tensor) else output.losses:
                loss.backward()
            with torch.no_grad():
                for parameter in module.parameters():
                    if parameter.grad is not None:
                        parameter -= 0.01 * parameter.grad
            module.zero_grad()
            if position == 0:
                losses.append(float(output.metrics["loss"]))
    return losses


def check_golden(name: str, measured: dict[str, list[float]]) -> None:
    """Compare with tests/golden/<name>.json; UPDATE_GOLDEN=1 writes it anew."""
    path = Path(__file__).parents[1] / "golden" / f"{name}.json"
    if os.environ.get("UPDATE_GOLDEN"):
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(measured, indent=1) + "\n")
    expected = json.loads(path.read_text())
    assert measured.keys() == expected.keys()
    for key, values in expected.items():
        assert measured[key] == pytest.approx(values, rel=1e-3), key
