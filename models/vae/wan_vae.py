"""The causal video VAE of Wan 2.1 and Wan 2.2, and of the sprites world at small width.

Architecture: diffusers' ``AutoencoderKLWan``. That class does not apply the latent normalisation; here it is
applied exactly once, in ``encode``, and undone exactly once, in ``decode``. Latents are z = (posterior mode -
mean) / std per channel, computed in float32.

The network is driven through its feature caches by pure functions, (chunk, state) -> (result, state), with a
cache that the caller owns; the module itself never remembers a video. The first network call of a video must
hold exactly one latent (or one frame): the first call skips temporal resampling. After it, any number of
latents per call is exact, so a whole clip takes two calls; ``latents_per_call`` bounds the memory instead.

Left out: spatial tiling, and the losses of VAE training (``train/vae.py``).
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from einops import rearrange
from safetensors.torch import save_file
from torch import Tensor, nn

from models.pretrained import load_whole
from models.vae.channel_norm import replace_norms
from models.vae.folder import replace_folder
from models.vae.latent_space import WAN_2_1_MEAN, WAN_2_1_STD, LatentSpace
from models.vae.streaming_decode import StreamingDecoder, StreamingEncoder

if TYPE_CHECKING:
    from diffusers import AutoencoderKLWan
    from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution

log = logging.getLogger(__name__)

NETWORK = "AutoencoderKLWan"  # diffusers' class, as its folders name it
TEMPORAL_STRIDE = 4
DEAD_CHANNEL_RATIO = 1e-3  # a channel whose std is below this share of the largest carries nothing
Cache = tuple[Tensor | str | None, ...]  # one slot per causal convolution; "Rep" marks a first call, as diffusers does


@dataclass
class VaeConfig:
    """Architecture of a Wan VAE. The defaults are Wan 2.1's."""

    path: str | None = None  # folder in diffusers format (config.json and weights); None: fresh weights from the seed
    base_dim: int = 96  # channels of the encoder at full resolution
    decoder_base_dim: int | None = None  # the same of the decoder; None: as the encoder
    z_dim: int = 16  # latent channels
    dim_mult: list[int] = field(default_factory=lambda: [1, 2, 4, 4])  # channel factor per resolution
    num_res_blocks: int = 2  # per resolution
    temporal_downsample: list[bool] = field(default_factory=lambda: [False, True, True])  # per spatial halving
    is_residual: bool = False  # Wan 2.2: shortcuts around each resolution
    patch_size: int | None = None  # Wan 2.2: pixel unshuffle before the encoder
    latents_per_call: int | None = 1  # latent frames per network call: memory against speed; None: all at once

    def __post_init__(self) -> None:
        for name in ("base_dim", "decoder_base_dim", "z_dim", "num_res_blocks", "patch_size"):
            if (count := vars(self)[name]) is not None and count < 1:
                raise ValueError(f"vae.{name}={count} must be at least 1")
        if min(self.dim_mult, default=0) < 1:
            raise ValueError(f"vae.dim_mult={list(self.dim_mult)} must be factors of at least 1, one per resolution")
        if len(self.temporal_downsample) != len(self.dim_mult) - 1:
            raise ValueError(
                f"vae.temporal_downsample={list(self.temporal_downsample)} must have one entry per spatial "
                f"halving: {len(self.dim_mult) - 1} for dim_mult={list(self.dim_mult)}"
            )
        if 2 ** sum(self.temporal_downsample) != TEMPORAL_STRIDE:
            raise ValueError(
                f"vae.temporal_downsample={list(self.temporal_downsample)} must be true exactly twice: a "
                f"latent frame covers {TEMPORAL_STRIDE} frames"
            )
        if self.latents_per_call is not None and self.latents_per_call < 1:
            raise ValueError(
                f"vae.latents_per_call={self.latents_per_call} must be at least 1, or null for all at once"
            )

    @property
    def spatial_stride(self) -> int:  # pixels per latent cell, each way
        return 2 ** len(self.temporal_downsample) * (self.patch_size or 1)

    @classmethod
    def wan_2_1(cls, path: str | None = None) -> VaeConfig:
        return cls(path=path)

    @classmethod
    def wan_2_2(cls, path: str | None = None) -> VaeConfig:
        return cls(path=path, base_dim=160, decoder_base_dim=256, z_dim=48, is_residual=True, patch_size=2)


class WanVae(nn.Module):
    """Pixels [B, 3, T, H, W] in [-1, 1] <-> normalised latents [B, C, F, h, w], F = 1 + (T-1)/4."""

    ENTRY_POINTS = ("_encode_moments", "_decode_raw")  # every public method reads parameters through these two

    def __init__(self, autoencoder: AutoencoderKLWan, latents_per_call: int | None = 1) -> None:
        super().__init__()
        replace_norms(autoencoder)
        self.autoencoder = autoencoder
        self.latents_per_call = latents_per_call
        settings = autoencoder.config
        self.latent_channels: int = settings.z_dim
        self.spatial_stride: int = 2 ** len(settings.temperal_downsample) * (settings.patch_size or 1)
        self._patch = settings.patch_size or 1

    # ------------------------------------------------------------------ construction
    @classmethod
    def from_config(cls, cfg: VaeConfig, seed: int = 0) -> WanVae:
        """Fresh weights, drawn from the seed, with the identity as normalisation."""
        from diffusers import AutoencoderKLWan

        rgb_channels = 3 * (cfg.patch_size or 1) ** 2
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            autoencoder = AutoencoderKLWan(
                base_dim=cfg.base_dim,
                decoder_base_dim=cfg.decoder_base_dim,
                z_dim=cfg.z_dim,
                dim_mult=list(cfg.dim_mult),
                num_res_blocks=cfg.num_res_blocks,
                temperal_downsample=list(cfg.temporal_downsample),
                latents_mean=[0.0] * cfg.z_dim,
                latents_std=[1.0] * cfg.z_dim,
                is_residual=cfg.is_residual,
                in_channels=rgb_channels,
                out_channels=rgb_channels,
                patch_size=cfg.patch_size,
                scale_factor_temporal=TEMPORAL_STRIDE,
                scale_factor_spatial=cfg.spatial_stride,
            )
        return cls(autoencoder, cfg.latents_per_call)

    @classmethod
    def from_folder(cls, folder: str | Path, expected: VaeConfig | None = None) -> WanVae:
        """Loads a folder in diffusers format, ours or a published one, in float32.

        Raises FileNotFoundError where there is none, ValueError where it is of another network or its architecture is
        not as expected.
        """
        from diffusers import AutoencoderKLWan

        folder = Path(folder)
        if not (folder / "config.json").is_file():
            raise FileNotFoundError(
                f"no VAE in {folder}: there is no config.json. Train one with `python -m train stage=vae`, "
                "or download the vae/ folder of a Wan model in diffusers format (such as "
                "Wan-AI/Wan2.1-T2V-1.3B-Diffusers)"
            )
        settings = _read_settings(folder)
        if expected is not None:
            _require_architecture(settings, expected, folder)
        autoencoder = load_whole(AutoencoderKLWan, folder)
        return cls(autoencoder, expected.latents_per_call if expected is not None else 1)

    def save(self, folder: str | Path) -> None:
        """Writes a diffusers folder: weights in safetensors, config.json with the normalisation. Atomic.

        Not where it was loaded from: shards know a VAE by the content of its files.
        """
        settings = json.loads(self.autoencoder.to_json_string())
        settings.pop("_name_or_path", None)
        with replace_folder(Path(folder)) as fresh:
            (fresh / "config.json").write_text(json.dumps(settings, indent=2) + "\n")
            weights = {name: value.contiguous() for name, value in self.autoencoder.state_dict().items()}
            save_file(weights, fresh / "diffusion_pytorch_model.safetensors", metadata={"format": "pt"})

    def use_channels_last(self) -> WanVae:
        """Channels last throughout: on a CPU a quarter faster to decode; results differ by rounding only."""
        from models.vae.channels_last import use_channels_last

        use_channels_last(self.autoencoder)
        return self

    # ------------------------------------------------------------------ latent space
    @property
    def latents_mean(self) -> tuple[float, ...]:
        return tuple(self.autoencoder.config.latents_mean)

    @property
    def latents_std(self) -> tuple[float, ...]:
        return tuple(self.autoencoder.config.latents_std)

    @property
    def latent_space(self) -> LatentSpace:
        return LatentSpace.of(self.latents_mean, self.latents_std, self.spatial_stride)

    def normalise(self, raw_latents: Tensor) -> Tensor:
        """Posterior values -> latents, in float32."""
        mean, std = self._statistics(raw_latents.device)
        return (raw_latents.float() - mean) / std

    def denormalise(self, latents: Tensor) -> Tensor:
        """Latents -> posterior values, in float32."""
        mean, std = self._statistics(latents.device)
        return latents.float() * std + mean

    def _statistics(self, device: torch.device) -> tuple[Tensor, Tensor]:
        both = torch.tensor([self.latents_mean, self.latents_std], device=device)
        mean, std = rearrange(both, "two c -> two c 1 1 1")
        return mean, std

    @torch.no_grad()
    def measure_normalisation(self, batches: Iterable[Tensor]) -> None:
        """Sets mean and std per channel from the posterior modes of pixels [B, 3, T, H, W]; kept by ``save``.

        A channel that hardly varies would be blown up to unit noise, so its std is bounded from below.
        """
        count = 0
        total, squares = torch.zeros(2, self.latent_channels, dtype=torch.float64)
        for pixels in batches:
            mode = rearrange(self.posterior(pixels).mode(), "b c f h w -> c (b f h w)").double().cpu()
            count += mode.shape[1]
            total += mode.sum(1)
            squares += mode.square().sum(1)
        if count < 2:
            raise ValueError("measure_normalisation got no pixels; pass at least one batch of clips")
        mean = total / count
        std = (squares / count - mean.square()).clamp(min=0.0).sqrt()
        floor = DEAD_CHANNEL_RATIO * float(std.max())
        if dead := [index for index, value in enumerate(std.tolist()) if value <= floor]:
            log.warning("latent channels %s carry no information: lower the KL weight or z_dim", dead)
        std = std.clamp(min=floor if floor > 0 else 1.0)
        self.normalise_by(mean.tolist(), std.tolist())

    def normalise_by(self, mean: Sequence[float], std: Sequence[float]) -> None:
        """Sets mean and std per channel; kept by ``save``."""
        self.autoencoder.register_to_config(latents_mean=list(mean), latents_std=list(std))

    # ------------------------------------------------------------------ whole clips
    @torch.no_grad()
    def encode(self, pixels: Tensor) -> Tensor:
        """Pixels [B, 3, 1 + 4k, H, W] in [-1, 1] -> normalised latents [B, C, 1 + k, h, w], float32."""
        return self.normalise(self.posterior(pixels).mode())

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Normalised latents [B, C, F, h, w] -> pixels [B, 3, 1 + 4(F-1), H, W] in [-1, 1], float32."""
        return self.reconstruct(self.denormalise(latents)).float().clamp(-1.0, 1.0)

    def posterior(self, pixels: Tensor) -> DiagonalGaussianDistribution:
        """q(z | pixels) with raw (not normalised) moments; differentiable, for training the VAE."""
        from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution

        return DiagonalGaussianDistribution(self._encode_moments(pixels, None)[0].float())

    def reconstruct(self, raw_latents: Tensor) -> Tensor:
        """Posterior values -> pixels, neither normalised nor clamped; differentiable, for training."""
        return self._decode_raw(raw_latents, None)[0]

    # ------------------------------------------------------------------ streams
    def streaming(self) -> StreamingDecoder:
        """A decoder for one video that arrives in chunks of latents."""
        return StreamingDecoder(self)

    def streaming_encoder(self) -> StreamingEncoder:
        """An encoder for one video that arrives in chunks of frames."""
        return StreamingEncoder(self)

    def decode_chunk(self, latents: Tensor, state: Cache | None) -> tuple[Tensor, Cache]:
        """Normalised latents [B, C, n, h, w] -> pixels in [-1, 1]; state None: the chunk opens the video."""
        pixels, state = self._decode_raw(self.denormalise(latents), state)
        return pixels.float().clamp(-1.0, 1.0), state

    def encode_chunk(self, pixels: Tensor, state: Cache | None) -> tuple[Tensor, Cache]:
        """Pixels [B, 3, n, H, W], n = 1 + 4k where state is None and 4k after -> normalised latents."""
        moments, state = self._encode_moments(pixels, state)
        return self.normalise(moments.chunk(2, dim=1)[0]), state

    def _encode_moments(self, pixels: Tensor, state: Cache | None) -> tuple[Tensor, Cache]:
        self._check_pixels(pixels, first=state is None)
        frames = rearrange(pixels.to(self._dtype), "b c t (h q) (w r) -> b (c r q) t h w", q=self._patch, r=self._patch)
        cache = list(state) if state is not None else [None] * _count_slots(self.autoencoder.encoder)
        calls = self._calls(pixels.shape[2], state is None, frames_per_latent=TEMPORAL_STRIDE)
        parts = [
            self.autoencoder.quant_conv(self.autoencoder.encoder(frames[:, :, at], feat_cache=cache, feat_idx=[0]))
            for at in calls
        ]
        return torch.cat(parts, dim=2), tuple(cache)

    def _decode_raw(self, raw_latents: Tensor, state: Cache | None) -> tuple[Tensor, Cache]:
        if raw_latents.ndim != 5 or raw_latents.shape[1] != self.latent_channels:
            raise ValueError(
                f"latents have shape {tuple(raw_latents.shape)}; this VAE takes [B, {self.latent_channels}, F, h, w]"
            )
        raw_latents = raw_latents.to(self._dtype)
        cache = list(state) if state is not None else [None] * _count_slots(self.autoencoder.decoder)
        parts = []
        for index, at in enumerate(self._calls(raw_latents.shape[2], state is None, frames_per_latent=1)):
            features = self.autoencoder.post_quant_conv(raw_latents[:, :, at])
            first = state is None and index == 0
            parts.append(self.autoencoder.decoder(features, feat_cache=cache, feat_idx=[0], first_chunk=first))
        patches = torch.cat(parts, dim=2)
        pixels = rearrange(patches, "b (c r q) t h w -> b c t (h q) (w r)", q=self._patch, r=self._patch)
        return pixels, tuple(cache)

    def _calls(self, length: int, first: bool, frames_per_latent: int) -> Iterator[slice]:
        """Frames of each network call: the first of a video alone, then latents_per_call latents each."""
        if first:
            yield slice(0, 1)
        step = length if self.latents_per_call is None else self.latents_per_call * frames_per_latent
        for start in range(1 if first else 0, length, step):
            yield slice(start, min(start + step, length))

    def _check_pixels(self, pixels: Tensor, first: bool) -> None:
        if pixels.ndim != 5 or pixels.shape[1] != 3:
            raise ValueError(f"pixels have shape {tuple(pixels.shape)}; the VAE takes [B, 3, T, H, W]")
        num_frames, (height, width) = pixels.shape[2], pixels.shape[3:]
        if (num_frames - first) % TEMPORAL_STRIDE or num_frames == 0:
            rule = "1 + 4k at the start of a video" if first else "4k within a stream"
            raise ValueError(f"num_frames={num_frames} must be {rule}; add or drop frames")
        if height % self.spatial_stride or width % self.spatial_stride:
            raise ValueError(f"pixels of {height} x {width} must divide by the VAE's stride {self.spatial_stride}")

    @property
    def _dtype(self) -> torch.dtype:
        return self.autoencoder.quant_conv.weight.dtype


def latent_space_of(folder: str | Path) -> LatentSpace | None:
    """The latent space of the VAE in a folder, read of its config.json alone; None where there is none.

    Raises ValueError where that is of another network.
    """
    if not (Path(folder) / "config.json").is_file():
        return None
    defaults = {"latents_mean": WAN_2_1_MEAN, "latents_std": WAN_2_1_STD, "temperal_downsample": [False, True, True]}
    settings = defaults | _read_settings(Path(folder))
    stride = 2 ** len(settings["temperal_downsample"]) * (settings.get("patch_size") or 1)
    return LatentSpace.of(tuple(settings["latents_mean"]), tuple(settings["latents_std"]), stride)


def _read_settings(folder: Path) -> dict[str, Any]:
    """config.json of a VAE; ValueError where it is damaged, or of another network."""
    path = folder / "config.json"
    try:
        settings = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}; get it again") from error
    kind = settings.get("_class_name") if isinstance(settings, dict) else None
    if kind != NETWORK:
        raise ValueError(
            f"{path} is of {kind or 'another network'}, not of {NETWORK}; give the vae/ folder of a Wan model in "
            "diffusers format, or one that `python -m train stage=vae` wrote"
        )
    return settings


def _count_slots(part: nn.Module) -> int:
    """Cache slots of an encoder or decoder: one per causal convolution."""
    from diffusers.models.autoencoders.autoencoder_kl_wan import WanCausalConv3d

    return sum(isinstance(module, WanCausalConv3d) for module in part.modules())


def _require_architecture(settings: dict[str, Any], expected: VaeConfig, folder: Path) -> None:
    """Raises ValueError naming each field of ``expected`` that the saved settings contradict."""
    wanted = {
        "base_dim": expected.base_dim,
        "decoder_base_dim": expected.decoder_base_dim or expected.base_dim,
        "z_dim": expected.z_dim,
        "dim_mult": list(expected.dim_mult),
        "num_res_blocks": expected.num_res_blocks,
        "temporal_downsample": list(expected.temporal_downsample),
        "is_residual": expected.is_residual,
        "patch_size": expected.patch_size or 1,
    }
    saved = dict(settings, temporal_downsample=settings["temperal_downsample"])
    saved["decoder_base_dim"] = settings.get("decoder_base_dim") or settings["base_dim"]
    saved["patch_size"] = settings.get("patch_size") or 1
    saved["is_residual"] = bool(settings.get("is_residual"))
    differing = [
        f"vae.{name}: {saved[name]} saved, {value} asked" for name, value in wanted.items() if saved[name] != value
    ]
    if differing:
        raise ValueError(
            f"the VAE in {folder} has another architecture ({'; '.join(differing)}); change the model config"
        )
