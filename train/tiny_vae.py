"""Training of a tiny VAE against the latents of a full one: MotionStream appendix A.

The full VAE is frozen and encodes the clip; the tiny decoder learns to turn those latents back into it:

    loss = |x - x'| + edge_weight |grad x - grad x'| + perceptual_weight LPIPS(x, x')
           + gan_weight (-D(x')) + feature_weight |f_D(x) - f_D(x')| + encoder_weight (z - z')^2

D is a patch discriminator with a replay buffer (`discriminator.py`), trained by the hinge loss from step
`gan_start` on; f_D are its features, a perceptual term that needs no weights from elsewhere. LPIPS is used where
its weights are given. The paper states no weights; these are ours. The tiny encoder regresses the same latents
and shares nothing with the decoder.

Every draw is a crop in space and time, encoded as a clip of its own: a decoder without attention or norms then
works on larger frames and longer clips.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from data.batch import Batch
from eval.metrics.lpips import MIN_SIDE_PX, Lpips, load_lpips, require_lpips
from models.assemble import ModelConfig, build_vae
from models.condition import num_latent_frames
from models.vae.latent_space import LatentSpace
from models.vae.tiny_vae import PRESETS, TinyVae, TinyVaeConfig
from stream.codecs import to_frames
from train.discriminator import STRETCH_FRAMES, PatchDiscriminator, ReplayBuffer, norm_groups, stretch_of
from train.stage import SetupContext, StepContext, StepOutput, ValidationOutput
from train.vae import edge_difference, psnr_db, random_crops

TINY_VAE = "tiny_vae"
DISCRIMINATOR = "discriminator"


@dataclass
class TinyVaeStageConfig:
    """Settings of stage=tiny_vae."""

    preset: str = "taew2_1"  # architecture: taew2_1 | taew2_2 | wan_2_2_large | sprites
    init_from: str | None = None  # folder of a tiny VAE of this preset to continue from; null: fresh weights
    num_frames: int = 21  # of a crop in time, 1 + 4k (paper: 21, i.e. 6 latents)
    crop_px: int = 144  # side of a square crop, a multiple of the VAE's stride (paper: 144)
    edge_weight: float = 0.5  # of the spatial gradient term
    perceptual_weight: float = 1.0  # of LPIPS, where its weights are given
    lpips_weights: str | None = None  # folder of the two LPIPS files; null: without
    gan_weight: float = 0.05  # of the adversarial term
    feature_weight: float = 1.0  # of the discriminator's features
    gan_start: int = 10_000  # step at which the discriminator joins
    encoder_weight: float = 1.0  # of the encoder's own loss; 0: it learns nothing (the paper trains the decoder alone)
    discriminator_widths: list[int] = field(default_factory=lambda: [64, 128, 256])  # per halving
    replay_size: int = 4096  # decoded stretches that the discriminator sees again, per process

    def __post_init__(self) -> None:
        num_latent_frames(self.num_frames)
        if self.preset not in PRESETS:
            raise ValueError(f"stage.preset='{self.preset}' must be one of {', '.join(PRESETS)}")
        if self.num_frames < STRETCH_FRAMES:
            raise ValueError(f"stage.num_frames={self.num_frames} must be at least 5")
        for name in ("edge_weight", "perceptual_weight", "gan_weight", "feature_weight", "encoder_weight", "gan_start"):
            if vars(self)[name] < 0:
                raise ValueError(f"stage.{name}={vars(self)[name]} must be >= 0")
        for name in ("crop_px", "replay_size"):
            if vars(self)[name] < 1:
                raise ValueError(f"stage.{name}={vars(self)[name]} must be >= 1")
        widths = list(self.discriminator_widths)
        if not widths or any(width < 1 or width % norm_groups(width) for width in widths):
            raise ValueError(
                f"stage.discriminator_widths={widths} must name at least one width, each below 32 or a multiple of 16, "
                "as its norm has a group for 16 channels"
            )
        if self.crop_px < 2 ** len(widths):
            raise ValueError(
                f"stage.discriminator_widths={widths} halves stage.crop_px={self.crop_px} {len(widths)} times, to "
                f"nothing; name fewer widths, or set crop_px to at least {2 ** len(widths)}"
            )

    @property
    def has_discriminator(self) -> bool:
        return self.gan_weight > 0 or self.feature_weight > 0


class TinyVaeStage:
    """The stage; see the module's text."""

    Config = TinyVaeStageConfig
    needs_data = True

    def __init__(self, cfg: TinyVaeStageConfig) -> None:
        self.cfg = cfg

    def check(self, model_cfg: ModelConfig) -> None:
        """Refuses a crop that the clip does not hold or a network cannot read, another VAE's preset, absent weights."""
        cfg, clip, stride = self.cfg, model_cfg.clip, model_cfg.vae.spatial_stride
        if cfg.num_frames > clip.num_frames:
            raise ValueError(
                f"stage.num_frames={cfg.num_frames} must be at most model.clip.num_frames={clip.num_frames}"
            )
        largest = min(clip.height, clip.width) // stride * stride
        if cfg.crop_px % stride or cfg.crop_px > largest:
            nearest = min(largest, max(1, round(cfg.crop_px / stride)) * stride)
            raise ValueError(
                f"stage.crop_px={cfg.crop_px} must be a multiple of {stride}, the VAE's stride, and at most "
                f"{largest}, the clip's; nearest valid: {nearest}"
            )
        shapes = {name: TinyVaeConfig.preset(name, model_cfg.vae.z_dim).latent_shape for name in PRESETS}
        wanted = (model_cfg.vae.z_dim, stride)
        if shapes[cfg.preset] != wanted:
            fitting = [name for name, shape in shapes.items() if shape == wanted]
            raise ValueError(
                f"stage.preset={cfg.preset} decodes {shapes[cfg.preset]}, latent channels and stride in px, model.vae "
                f"has {wanted}; fitting presets: {', '.join(fitting) or 'none'}"
            )
        if cfg.lpips_weights is not None:
            require_lpips(cfg.lpips_weights, "stage.lpips_weights")
            if cfg.crop_px < MIN_SIDE_PX:
                raise ValueError(
                    f"stage.crop_px={cfg.crop_px} must be at least {MIN_SIDE_PX} with stage.lpips_weights: the "
                    "network reads no smaller images; or set lpips_weights to null"
                )

    def data_fields(self, model_cfg: ModelConfig, available: Sequence[str]) -> list[str]:
        return ["pixels"]

    def setup(self, context: SetupContext) -> None:
        self.check(context.model_cfg)
        cfg, device = self.cfg, context.device
        self.model_cfg, self.noise, self.device = context.model_cfg, context.noise, device
        self.held_out = context.validation_batch
        self.vae = build_vae(context.model_cfg).eval().requires_grad_(False).to(device)
        space = self.vae.latent_space
        architecture = TinyVaeConfig.preset(cfg.preset, space.channels)
        if cfg.init_from is None:
            self.tiny_vae = TinyVae.from_config(architecture, space, seed=context.noise.seed)
        else:
            self.tiny_vae = TinyVae.from_folder(cfg.init_from, expected=space)
            if self.tiny_vae.config != architecture:
                raise ValueError(
                    f"stage.init_from={cfg.init_from} is not of stage.preset={cfg.preset}: it holds "
                    f"{self.tiny_vae.config}; set the preset that it was made with"
                )
        self.tiny_vae.to(device).train()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(context.noise.seed)
            self.discriminator = PatchDiscriminator(space.channels, cfg.discriminator_widths).to(device).train()
        self.replay = ReplayBuffer(cfg.replay_size)
        self.lpips: Lpips | None = None
        if cfg.lpips_weights is not None:
            found = load_lpips(cfg.lpips_weights, "stage.lpips_weights")
            assert isinstance(found, Lpips), "a folder is given"
            self.lpips = found.to(device)

    def modules(self) -> dict[str, nn.Module]:
        return {TINY_VAE: self.tiny_vae, DISCRIMINATOR: self.discriminator}

    def use(self, modules: Mapping[str, nn.Module]) -> None:
        self.tiny_vae, self.discriminator = modules[TINY_VAE], modules[DISCRIMINATOR]  # type: ignore[assignment]

    def updates(self, step: int) -> list[str]:
        return [TINY_VAE, DISCRIMINATOR] if self._is_adversarial(step) else [TINY_VAE]

    def _is_adversarial(self, step: int) -> bool:
        return self.cfg.has_discriminator and step >= self.cfg.gan_start

    def train_step(self, batch: Batch, context: StepContext) -> StepOutput:
        pixels = self.crop(batch, context.step)
        latents = self._encode(pixels)
        starts = [
            self.noise.integers(pixels.shape[2] - STRETCH_FRAMES + 1, TINY_VAE, "stretch", context.step, sample)
            for sample in batch.sample_ids
        ]
        if context.update == DISCRIMINATOR:
            return self._discriminator_step(pixels, latents, starts, batch.sample_ids, context.step)
        return self._decoder_step(pixels, latents, starts, context.step)

    def _decoder_step(self, pixels: Tensor, latents: Tensor, starts: list[int], step: int) -> StepOutput:
        cfg = self.cfg
        rgb, _ = self.tiny_vae.reconstruct(latents)
        decoded = rgb.float() * 2 - 1
        terms = {"l1": (decoded - pixels).abs().mean(), "edge": edge_difference(decoded, pixels)}
        loss = terms["l1"] + cfg.edge_weight * terms["edge"]
        if cfg.encoder_weight > 0:
            terms["encoder"] = F.mse_loss(self.tiny_vae.approximate_latents(pixels).float(), latents)
            loss = loss + cfg.encoder_weight * terms["encoder"]
        if self.lpips is not None:
            terms["lpips"] = self.lpips(*(video.transpose(1, 2).flatten(0, 1) for video in (decoded, pixels))).mean()
            loss = loss + cfg.perceptual_weight * terms["lpips"]
        if self._is_adversarial(step):
            self.discriminator.requires_grad_(False)  # its gradient is the other pass's business
            logits, ours = self.discriminator(*stretch_of(decoded, latents, starts))
            _, theirs = self.discriminator(*stretch_of(pixels, latents, starts))
            self.discriminator.requires_grad_(True)
            gaps = [(a - b).abs().mean() for a, b in zip(ours, theirs, strict=True)]
            terms |= {"gan": -logits.float().mean(), "feature": torch.stack(gaps).mean()}
            loss = loss + cfg.gan_weight * terms["gan"] + cfg.feature_weight * terms["feature"]
        return StepOutput(loss, {**terms, "psnr_db": psnr_db(decoded.detach().clamp(-1, 1), pixels).mean()})

    def _discriminator_step(
        self, pixels: Tensor, latents: Tensor, starts: list[int], sample_ids: Sequence[int], step: int
    ) -> StepOutput:
        with torch.no_grad():
            rgb, _ = self.tiny_vae.reconstruct(latents)
        picks = [self.noise.integers(2**31, TINY_VAE, "replay", step, sample) for sample in sample_ids]
        decoded = self.replay.exchange(*stretch_of(rgb.float() * 2 - 1, latents, starts), picks)
        filmed_logits, _ = self.discriminator(*stretch_of(pixels, latents, starts))
        decoded_logits, _ = self.discriminator(*decoded)
        loss = F.relu(1 - filmed_logits.float()).mean() + F.relu(1 + decoded_logits.float()).mean()
        return StepOutput(loss, {"filmed": filmed_logits.mean(), "decoded": decoded_logits.mean()})

    def _encode(self, pixels: Tensor) -> Tensor:
        with torch.autocast(self.device.type, enabled=False):  # as stored latents were made
            return self.vae.encode(pixels)

    def crop(self, batch: Batch, step: int) -> Tensor:
        """num_frames x crop_px x crop_px of each clip, from a place of its own: [B, 3, T, H, W] in [-1, 1]."""
        lengths = dict(enumerate((self.cfg.num_frames, self.cfg.crop_px, self.cfg.crop_px), start=1))
        return random_crops(
            batch, lengths, lambda places, *key: self.noise.integers(places, TINY_VAE, "crop", step, *key)
        )

    def validate(self, step: int) -> ValidationOutput | None:
        """PSNR of held-out clips, whole, beside that of the full VAE; original, full and tiny side by side."""
        if self.held_out is None:
            return None
        assert self.held_out.pixels is not None, "data_fields asks for pixels"
        videos, psnr = {}, []
        for number, clip in enumerate(self.held_out.pixels.split(1)):  # one at a time, for they are large
            pixels = replace(self.held_out, pixels=clip.to(self.device)).model_pixels()
            latents = self._encode(pixels)
            tiny, full = self.tiny_vae.decode(latents), self.vae.decode(latents)
            psnr.append(torch.cat([psnr_db(tiny, pixels), psnr_db(full.float(), pixels)]))
            videos[f"clip_{number}"] = np.concatenate([to_frames(each)[0] for each in (pixels, full, tiny)], axis=2)
        means = torch.stack(psnr).mean(dim=0).tolist()
        metrics = dict(zip(("psnr_db", "full_psnr_db"), means, strict=True))
        return ValidationOutput(metrics, videos, self.model_cfg.clip.fps)

    def describe(self) -> list[str]:
        cfg = self.cfg
        start = f"from step {cfg.gan_start}" if cfg.has_discriminator else "off"
        decoder = sum(parameter.numel() for parameter in self.tiny_vae.decoder.parameters()) / 1e6
        return [
            f"decoder {decoder:.2f} M; crops of {cfg.num_frames} x {cfg.crop_px} x {cfg.crop_px}; "
            f"discriminator {start}; LPIPS {'on' if self.lpips else 'off'}"
        ]

    def state_dict(self) -> dict[str, Any]:
        """The replay buffer of the main process, from which others restart too, and what the weights decode."""
        return {"replay": self.replay.state_dict(), "latent_space": self.vae.latent_space.to_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Raises ValueError where the VAE is another one than the run began with."""
        self.vae.latent_space.require(LatentSpace(**state["latent_space"]), "the checkpoint of this run")
        self.replay.load_state_dict(state["replay"])

    def export(self, folder: Path, weights: Mapping[str, nn.Module]) -> None:
        tiny_vae = weights[TINY_VAE]
        assert isinstance(tiny_vae, TinyVae), "the module of stage=tiny_vae is a TinyVae"
        tiny_vae.save(folder / TINY_VAE)
