"""Training of a causal video VAE from scratch, for the sprites world (Wan's own VAEs are used as published).

    loss = |x - x'| + edge_weight * |grad x - grad x'| + kl_weight * KL(q(z | x) || N(0, 1))

with z drawn from the posterior, means over pixels and over latent values. At each export the mean and spread of
each latent channel are measured on training clips and stored with the weights: `WanVae` normalises by them. With a
frozen encoder they are kept, and a DiT or a tiny VAE of the old VAE goes with the new one. Shards do not: they know a
VAE by its files. Train on with model.vae.path at the old folder, or encode again; decode with the new one.

Left out: adversarial and perceptual terms; the spatial gradient term keeps the sprites' edges sharp without
them.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from data.batch import Batch
from models.assemble import ModelConfig, build_vae
from models.condition import num_latent_frames
from models.vae.wan_vae import WanVae
from stream.codecs import to_frames
from train.stage import SetupContext, StepContext, StepOutput, ValidationOutput

log = logging.getLogger(__name__)

VAE = "vae"
TIME_AXIS = 1  # of a clip [3, T, H, W]


@dataclass
class VaeStageConfig:
    """Settings of stage=vae."""

    init_from: str | None = None  # folder of a VAE to continue from; null: fresh weights from the seed
    freeze_encoder: bool = False  # train the decoder alone, in the same latent space
    num_frames: int | None = None  # random temporal crop of each clip, 1 + 4k; null: whole clips
    edge_weight: float = 0.5  # of the spatial gradient term
    kl_weight: float = 1e-5  # per latent value
    initial_log_variance: float = -6.0  # of the posterior with fresh weights; 0 would drown the first signal in noise
    channels_last: bool = True  # memory layout: faster on CPU, and spared a fault of oneDNN (FEW_FRAMES)
    normalisation_clips: int = 64  # training clips that mean and spread of the latents are measured on

    def __post_init__(self) -> None:
        if self.num_frames is not None:
            num_latent_frames(self.num_frames)
        for name in ("edge_weight", "kl_weight"):
            if vars(self)[name] < 0:
                raise ValueError(f"stage.{name}={vars(self)[name]} must be >= 0")
        if self.normalisation_clips < 1:
            raise ValueError(f"stage.normalisation_clips={self.normalisation_clips} must be >= 1")
        if self.freeze_encoder and self.init_from is None:
            raise ValueError("stage.freeze_encoder=true needs stage.init_from, the VAE whose encoder is kept")


class VaeStage:
    """The stage; see the module's text."""

    Config = VaeStageConfig
    needs_data = True

    def __init__(self, cfg: VaeStageConfig) -> None:
        self.cfg = cfg

    def check(self, model_cfg: ModelConfig) -> None:
        """Refuses a crop longer than the clip."""
        frames = self.cfg.num_frames
        if frames is not None and frames > model_cfg.clip.num_frames:
            raise ValueError(
                f"stage.num_frames={frames} must be at most model.clip.num_frames="
                f"{model_cfg.clip.num_frames}; null takes whole clips"
            )

    def data_fields(self, model_cfg: ModelConfig, available: Sequence[str]) -> list[str]:
        return ["pixels"]

    def setup(self, context: SetupContext) -> None:
        self.check(context.model_cfg)
        self.model_cfg, self.noise, self.device = context.model_cfg, context.noise, context.device
        self.held_out, self.sample_clips = context.validation_batch, context.sample_clips
        if self.cfg.init_from is None:
            self.vae = build_vae(context.model_cfg, seed=context.noise.seed)
            start_near_linear(self.vae, context.noise.generator(VAE, "weights"))
            moments = self.vae.autoencoder.quant_conv  # mean | log variance
            nn.init.constant_(moments.bias[self.vae.latent_channels :], self.cfg.initial_log_variance)
        else:
            self.vae = WanVae.from_folder(self.cfg.init_from, expected=context.model_cfg.vae)
        if self.cfg.channels_last:
            self.vae.use_channels_last()
        self.vae.to(context.device).train()
        self.normalisation = [self.vae.latents_mean, self.vae.latents_std]  # of a frozen encoder
        if self.cfg.freeze_encoder:
            self.vae.autoencoder.encoder.requires_grad_(False)
            self.vae.autoencoder.quant_conv.requires_grad_(False)

    def modules(self) -> dict[str, nn.Module]:
        return {VAE: self.vae}

    def use(self, modules: Mapping[str, nn.Module]) -> None:
        self.vae = modules[VAE]  # type: ignore[assignment]

    def updates(self, step: int) -> list[str]:
        return [VAE]

    def train_step(self, batch: Batch, context: StepContext) -> StepOutput:
        pixels = self.crop(batch, context.step)
        posterior = self.vae.posterior(pixels)
        shape = posterior.mean.shape[1:]
        eps = self.noise.normal(shape, batch.sample_ids, VAE, "posterior", context.step, device=pixels.device)
        reconstruction = self.vae.reconstruct(posterior.mean + posterior.std * eps).float()

        l1 = (reconstruction - pixels).abs().mean()
        edges = edge_difference(reconstruction, pixels)
        kl = 0.5 * (posterior.mean.square() + posterior.var - 1.0 - posterior.logvar).mean()
        loss = l1 + self.cfg.edge_weight * edges + self.cfg.kl_weight * kl
        psnr = psnr_db(reconstruction.detach(), pixels).mean()
        return StepOutput(loss, {"l1": l1, "edge": edges, "kl": kl, "psnr_db": psnr})

    def crop(self, batch: Batch, step: int) -> Tensor:
        """cfg.num_frames consecutive frames of each clip, from a random first one: [B, 3, T, H, W] in [-1, 1]."""
        lengths = {} if self.cfg.num_frames is None else {TIME_AXIS: self.cfg.num_frames}
        return random_crops(
            batch, lengths, lambda places, sample, _: self.noise.integers(places, VAE, "crop", step, sample)
        )

    def validate(self, step: int) -> ValidationOutput | None:
        """PSNR of held-out clips through the posterior mode; original beside reconstruction."""
        if self.held_out is None:
            return None
        pixels = self.held_out.to(self.device).model_pixels()
        reconstruction = self.vae.reconstruct(self.vae.posterior(pixels).mode()).float().clamp(-1, 1)
        pairs = zip(to_frames(pixels), to_frames(reconstruction), strict=True)
        videos = {f"clip_{row}": np.concatenate(pair, axis=2) for row, pair in enumerate(pairs)}
        psnr = float(psnr_db(reconstruction, pixels).mean())
        return ValidationOutput({"psnr_db": psnr}, videos, self.model_cfg.clip.fps)

    def describe(self) -> list[str]:
        cfg, frames = self.cfg, self.cfg.num_frames or self.model_cfg.clip.num_frames
        return [f"{frames} frames per clip; edge weight {cfg.edge_weight:g}, KL weight {cfg.kl_weight:g}"]

    def state_dict(self) -> dict[str, Any]:
        return {"freeze_encoder": self.cfg.freeze_encoder, "normalisation": self.normalisation}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """The folder at init_from may hold another VAE by now; a frozen encoder is the checkpoint's."""
        if state["freeze_encoder"] != self.cfg.freeze_encoder:
            raise ValueError(
                f"stage.freeze_encoder={str(self.cfg.freeze_encoder).lower()} must stay as the run began; to change it "
                "set another output_dir and stage.init_from to this run's export/vae"
            )
        self.normalisation = state["normalisation"]

    def export(self, folder: Path, weights: Mapping[str, nn.Module]) -> None:
        vae = weights[VAE]
        assert isinstance(vae, WanVae), "the module of stage=vae is a WanVae"
        if self.cfg.freeze_encoder:
            vae.normalise_by(*self.normalisation)
        else:
            device = next(vae.parameters()).device  # an unsharded copy may live on the CPU
            vae.measure_normalisation(self._normalisation_pixels(device))
        vae.save(folder / VAE)

    def _normalisation_pixels(self, device: torch.device) -> Iterator[Tensor]:
        if self.sample_clips is None:
            raise ValueError("the VAE's latents cannot be normalised without training clips: no sample_clips given")
        for batch in self.sample_clips(self.cfg.normalisation_clips):
            yield batch.to(device).model_pixels()


def random_crops(batch: Batch, lengths: Mapping[int, int], draw: Callable[[int, int, int], int]) -> Tensor:
    """A piece of each clip, [B, 3, T, H, W] in [-1, 1]; cut out as uint8, for most of a long clip is thrown away.

    lengths: by axis of a clip [3, T, H, W]. draw: (number of places, sample id, axis) -> place.
    """
    assert batch.pixels is not None, "data_fields asks for pixels"
    clips = []
    for clip, sample in zip(batch.pixels, batch.sample_ids, strict=True):
        for axis, length in lengths.items():
            clip = clip.narrow(axis, draw(clip.shape[axis] - length + 1, sample, axis), length)
        clips.append(clip)
    return replace(batch, pixels=torch.stack(clips)).model_pixels()


@torch.no_grad()
def start_near_linear(vae: WanVae, rng: torch.Generator) -> None:
    """Fresh weights of a short training run: residual branches start at zero, other convolutions orthogonal.

    The first network is almost a linear autoencoder, which keeps the signal's size over its depth. On the sprites
    world it reached 22.4 dB in the 50 steps in which the default weights reached 20.5 dB.
    """
    for name, module in vae.named_modules():
        if not isinstance(module, (nn.Conv2d, nn.Conv3d)):
            continue
        part = name.rsplit(".", 1)[-1]
        if part in ("conv2", "proj"):  # the last layer of a residual block, of an attention
            nn.init.zeros_(module.weight)
        elif part not in ("conv1", "to_qkv"):
            nn.init.orthogonal_(module.weight, generator=rng)


def edge_difference(first: Tensor, second: Tensor) -> Tensor:
    """Mean |difference of the spatial gradients| of [B, 3, T, H, W]."""
    difference = first - second
    return difference.diff(dim=-1).abs().mean() + difference.diff(dim=-2).abs().mean()


def psnr_db(first: Tensor, second: Tensor) -> Tensor:
    """Peak signal to noise ratio per clip, [B, 3, T, H, W] in [-1, 1] -> [B], at most 100 dB."""
    error = (first - second).square().mean(dim=(1, 2, 3, 4))
    return 10 * torch.log10(4.0 / error.clamp_min(4e-10))
