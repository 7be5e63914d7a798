"""A tiny video autoencoder that decodes the latents of a Wan VAE for a fraction of its cost.

Architecture: TAEHV (madebyollin/taehv), the base of MotionStream's tiny VAE (App. A). Convolutions without
norms; time is crossed only by memory blocks, which read their own input at the previous time step. Module
names are TAEHV's, so taew2_1 and taew2_2 load as they are. Published decoders have 9.84 M and 9.92 M
parameters; the 56.7 M decoder that MotionStream made for Wan 2.2 has no published architecture, and
``wan_2_2_large`` is our own of that size.

A chunk is decoded in parallel over time: each memory block shifts its input by one step and begins with the
last step of the chunk before, so that chunks equal the whole clip. Latents are normalised ones; the space
they belong to is stored with the weights and asserted on loading (``latent_space.py``). Inside, RGB runs in
[0, 1]; outside in [-1, 1].

Left out: TAEHV's "super" decoder. Training: ``train/tiny_vae.py``.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from models.pretrained import load_state, read_weights
from models.vae.folder import read_model, save_model
from models.vae.latent_space import LatentSpace
from models.vae.streaming_decode import StreamingDecoder

PRESETS = ("taew2_1", "taew2_2", "wan_2_2_large", "sprites")
TEMPORAL_STRIDE = 4
LATENTS_PER_CALL = 3  # of a whole clip
Memory = tuple[Tensor, ...]  # the last input [B, 1, h, w, C] of each memory block


@dataclass
class TinyVaeConfig:
    """Widths and strides. The defaults are taew2_1's."""

    latent_channels: int = 16
    patch_size: int = 1  # pixel shuffle after the decoder
    decoder_widths: list[int] = field(default_factory=lambda: [256, 128, 64, 64])  # per resolution, and last
    time_upscale: list[bool] = field(default_factory=lambda: [False, True, True])  # per spatial doubling
    encoder_width: int = 64  # channels
    time_downscale: list[bool] = field(default_factory=lambda: [True, True, False])  # per spatial halving
    memory_blocks: int = 3  # per resolution

    def __post_init__(self) -> None:
        stages = len(self.time_upscale)
        if (len(self.decoder_widths), len(self.time_downscale)) != (stages + 1, stages):
            raise ValueError(
                f"tiny_vae.decoder_widths={list(self.decoder_widths)} must have {stages + 1} entries and "
                f"time_downscale={list(self.time_downscale)} {stages}, as time_upscale={self.time_upscale}"
            )
        if min(*self.decoder_widths, self.encoder_width, self.latent_channels, self.patch_size) < 1:
            raise ValueError(
                f"tiny_vae.decoder_widths={list(self.decoder_widths)}, encoder_width={self.encoder_width}, "
                f"latent_channels={self.latent_channels} and patch_size={self.patch_size} must be at least 1"
            )
        if self.memory_blocks < 1:
            raise ValueError(f"tiny_vae.memory_blocks={self.memory_blocks} must be >= 1: they alone cross time")
        for name in ("time_upscale", "time_downscale"):
            if 2 ** sum(asdict(self)[name]) != TEMPORAL_STRIDE:
                raise ValueError(
                    f"tiny_vae.{name}={asdict(self)[name]} must be true exactly twice: 4 frames per latent"
                )

    @property
    def spatial_stride(self) -> int:  # pixels per latent cell, each way
        return 2 ** len(self.time_upscale) * self.patch_size

    @property
    def latent_shape(self) -> tuple[int, int]:
        """Channels and spatial stride, as a latent space has them."""
        return self.latent_channels, self.spatial_stride

    @classmethod
    def taew2_1(cls) -> TinyVaeConfig:
        return cls()

    @classmethod
    def taew2_2(cls) -> TinyVaeConfig:
        return cls(latent_channels=48, patch_size=2)

    @classmethod
    def wan_2_2_large(cls) -> TinyVaeConfig:
        return cls(latent_channels=48, patch_size=2, decoder_widths=[592, 336, 176, 64])

    @classmethod
    def sprites(cls, latent_channels: int = 8) -> TinyVaeConfig:
        """Stride 4, as the sprites VAE; an eighth of its decoder's parameters, as taew2_1 of Wan's."""
        return cls(
            latent_channels=latent_channels, decoder_widths=[48, 16, 16], time_upscale=[True, True],
            encoder_width=32, time_downscale=[True, True], memory_blocks=1,
        )  # fmt: skip

    @classmethod
    def preset(cls, name: str, latent_channels: int) -> TinyVaeConfig:
        """The architecture called ``name``; only "sprites" takes the number of channels, the others have theirs."""
        if name not in PRESETS:
            raise ValueError(f"tiny VAE preset '{name}' must be one of {', '.join(PRESETS)}")
        return cls.sprites(latent_channels) if name == "sprites" else getattr(cls, name)()

    @classmethod
    def for_space(cls, space: LatentSpace) -> TinyVaeConfig:
        """The published architecture that decodes a Wan latent space; ValueError for any other space."""
        known = {LatentSpace.wan_2_1(): cls.taew2_1(), LatentSpace.wan_2_2(): cls.taew2_2()}
        if space not in known:
            raise ValueError(f"no published tiny VAE decodes {space}; train one for this VAE and pass its folder")
        return known[space]


class SoftClamp(nn.Module):
    """Bounds latents to (-3, 3), smoothly."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x / 3) * 3


class MemoryBlock(nn.Module):
    """ReLU(conv([x, past]) + x), where past is this block's input one time step earlier."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Sequential(
            _conv3x3(2 * width, width), nn.ReLU(), _conv3x3(width, width), nn.ReLU(), _conv3x3(width, width)
        )

    def forward(self, x: Tensor, past: Tensor) -> Tensor:
        return torch.relu(self.conv(torch.cat([x, past], dim=1)) + x)


class TimePool(nn.Module):
    """[B*T, C, h, w] -> [B*T/stride, C, h, w]: a 1x1 convolution over successive frames."""

    def __init__(self, width: int, stride: int) -> None:
        super().__init__()
        self.stride = stride
        self.conv = nn.Conv2d(width * stride, width, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(rearrange(x, "(n s) c h w -> n (s c) h w", s=self.stride))


class Grow(nn.Module):
    """[B*T, C, h, w] -> [B*T*stride, C, 2h, 2w], oldest frame first.

    The published networks repeat pixels first; a 1x1 convolution commutes with that, and before it costs a quarter.
    """

    def __init__(self, width: int, stride: int) -> None:
        super().__init__()
        self.stride = stride
        self.conv = nn.Conv2d(width, width * stride, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        frames = rearrange(self.conv(x).movedim(1, -1), "n h w (s c) -> (n s) h w c", s=self.stride)
        return F.interpolate(frames.movedim(-1, 1), scale_factor=2, mode="nearest")


class TinyDecoder(nn.Sequential):
    """Normalised latents -> RGB patches in [0, 1]; the first 3 frames of a video are not part of it."""

    def __init__(self, cfg: TinyVaeConfig) -> None:
        widths = cfg.decoder_widths
        layers: list[nn.Module] = [SoftClamp(), _conv3x3(cfg.latent_channels, widths[0]), nn.ReLU()]
        for width, following, grows in zip(widths, widths[1:], cfg.time_upscale):
            layers += [MemoryBlock(width) for _ in range(cfg.memory_blocks)]
            layers += [nn.Identity(), Grow(width, 2 if grows else 1)]  # Identity: the place of an upsampling in files
            layers += [_conv3x3(width, following, bias=False)]
        super().__init__(*layers, nn.ReLU(), _conv3x3(widths[-1], 3 * cfg.patch_size**2))


class TinyEncoder(nn.Sequential):
    """RGB patches in [0, 1] -> normalised latents."""

    def __init__(self, cfg: TinyVaeConfig) -> None:
        width = cfg.encoder_width
        layers: list[nn.Module] = [_conv3x3(3 * cfg.patch_size**2, width), nn.ReLU()]
        for pools in cfg.time_downscale:
            layers += [TimePool(width, 2 if pools else 1), _conv3x3(width, width, stride=2, bias=False)]
            layers += [MemoryBlock(width) for _ in range(cfg.memory_blocks)]
        super().__init__(*layers, _conv3x3(width, cfg.latent_channels))


class TinyVae(nn.Module):
    """Normalised latents [B, C, F, h, w] of one latent space <-> pixels [B, 3, T, H, W] in [-1, 1]."""

    ENTRY_POINTS = ("reconstruct", "approximate_latents")  # every public method reads parameters through these two

    def __init__(self, cfg: TinyVaeConfig, latent_space: LatentSpace) -> None:
        super().__init__()
        if not latent_space.normalised:
            raise ValueError("a tiny VAE reads normalised latents; its latent space says normalised=False")
        mine = cfg.latent_shape
        if mine != (latent_space.channels, latent_space.spatial_stride):
            raise ValueError(
                f"tiny VAE of {mine[0]} channels and stride {mine[1]} cannot decode a latent space of "
                f"{latent_space.channels} channels and stride {latent_space.spatial_stride}; change tiny_vae"
            )
        self.config = cfg
        self.latent_space = latent_space
        self.latent_channels = cfg.latent_channels
        self.spatial_stride = cfg.spatial_stride
        self.encoder = TinyEncoder(cfg)
        self.decoder = TinyDecoder(cfg)

    @classmethod
    def from_config(cls, cfg: TinyVaeConfig, latent_space: LatentSpace, seed: int = 0) -> TinyVae:
        """Fresh weights, drawn from the seed."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return cls(cfg, latent_space)

    # ------------------------------------------------------------------ files
    @classmethod
    def from_file(cls, path: str | Path, latent_space: LatentSpace) -> TinyVae:
        """A published file (taew2_1.pth, taew2_2.pth), strictly; its latent space is the caller's word."""
        path = Path(path)
        if not path.is_file():
            raise FileNotFoundError(f"no tiny VAE at {path}; taew2_1.pth and taew2_2.pth are in madebyollin/taehv")
        vae = cls(TinyVaeConfig.for_space(latent_space), latent_space)
        load_state(vae, read_weights(path), path)
        return vae

    @classmethod
    def from_folder(cls, folder: str | Path, expected: LatentSpace | None = None) -> TinyVae:
        """A folder written by ``save``; ValueError where its latent space is not the expected one."""
        parts = ("config", "latent_space")
        saved, weights = read_model(folder, "tiny VAE", made_by="stage=tiny_vae", parts=parts)
        try:
            cfg, latent_space = TinyVaeConfig(**saved["config"]), LatentSpace(**saved["latent_space"])
        except TypeError as error:  # fields of another network
            raise ValueError(f"no tiny VAE in {folder}: {error}; pass a folder made by stage=tiny_vae") from error
        if expected is not None:
            expected.require(latent_space, owner=f"the tiny VAE in {folder}")
        vae = cls(cfg, latent_space)
        load_state(vae, weights, folder)
        return vae

    def save(self, folder: str | Path) -> None:
        """Writes model.safetensors and model.json (architecture and latent space). Atomic."""
        save_model(self, folder, {"config": asdict(self.config), "latent_space": self.latent_space.to_dict()})

    def use_channels_last(self) -> TinyVae:
        """Weights with channels last: on a CPU a third faster; results differ by rounding only."""
        return self.to(memory_format=torch.channels_last)

    # ------------------------------------------------------------------ decoding
    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Normalised latents [B, C, F, h, w] -> pixels [B, 3, 1 + 4(F-1), H, W] in [-1, 1], float32.

        A few latents at a time: the features of a whole clip of 81 x 480 x 832 would take some 19 GB in bfloat16
        (extrapolated from smaller ones on a CPU).
        """
        stream = self.streaming()
        return torch.cat([stream.push(part) for part in latents.split(LATENTS_PER_CALL, dim=2)], dim=2)

    def streaming(self) -> StreamingDecoder:
        """A decoder for one video that arrives in chunks of latents."""
        return StreamingDecoder(self)

    def decode_chunk(self, latents: Tensor, state: Memory | None) -> tuple[Tensor, Memory]:
        """Normalised latents [B, C, n, h, w] -> pixels in [-1, 1]; state None: the chunk opens the video."""
        rgb, state = self.reconstruct(latents, state)
        return rgb.float().clamp(0.0, 1.0) * 2 - 1, state

    def reconstruct(self, latents: Tensor, state: Memory | None = None) -> tuple[Tensor, Memory]:
        """As ``decode_chunk``, but RGB in [0, 1] that is not clamped; differentiable, for training."""
        if latents.ndim != 5 or latents.shape[1] != self.latent_channels:
            raise ValueError(
                f"latents have shape {tuple(latents.shape)}; this tiny VAE takes [B, {self.latent_channels}, F, h, w]"
            )
        patches, memory = _run(self.decoder, latents, state)
        if state is None:  # three frames before the first: latent 0 stands for one frame, every other for four
            patches = patches[:, :, TEMPORAL_STRIDE - 1 :]
        patch = self.config.patch_size
        return rearrange(patches, "b (c q r) t h w -> b c t (h q) (w r)", q=patch, r=patch), memory

    # ------------------------------------------------------------------ encoding
    @torch.no_grad()
    def encode(self, pixels: Tensor) -> Tensor:
        """Pixels [B, 3, T, H, W] in [-1, 1] -> normalised latents [B, C, ceil(T/4), h, w], approximate.

        TAEHV's rule: frames are taken by fours from frame 0, the last repeated to fill. So a latent looks up
        to three frames ahead of the frames that the Wan VAE puts into it: use the Wan VAE wherever exact
        latents matter.
        """
        return self.approximate_latents(pixels).float()

    def approximate_latents(self, pixels: Tensor) -> Tensor:
        """As ``encode``, but differentiable and in the dtype of the weights, for training."""
        if pixels.ndim != 5 or pixels.shape[1] != 3 or any(size % self.spatial_stride for size in pixels.shape[3:]):
            raise ValueError(
                f"pixels have shape {tuple(pixels.shape)}; this tiny VAE takes [B, 3, T, H, W] with height "
                f"and width divisible by {self.spatial_stride}"
            )
        missing = -pixels.shape[2] % TEMPORAL_STRIDE
        frames = torch.cat([pixels, pixels[:, :, -1:].expand(-1, -1, missing, -1, -1)], dim=2)
        patch = self.config.patch_size
        patches = rearrange(frames * 0.5 + 0.5, "b c t (h q) (w r) -> b (c q r) t h w", q=patch, r=patch)
        return _run(self.encoder, patches, None)[0]


def _run(layers: nn.Sequential, video: Tensor, memory: Memory | None) -> tuple[Tensor, Memory]:
    """All layers over [B, C, T, h, w], parallel in time -> result, last input of each memory block."""
    batch, carried = video.shape[0], iter(memory or ())
    last_inputs = []
    x = rearrange(video.to(next(layers.parameters()).dtype), "b c t h w -> (b t) c h w")
    for layer in layers:
        if not isinstance(layer, MemoryBlock):
            x = layer(x)
            continue
        steps = rearrange(x, "(b t) c h w -> b t h w c", b=batch)
        before = torch.zeros_like(steps[:, :1]) if memory is None else next(carried)
        past = torch.cat([before, steps[:, :-1]], dim=1)
        last_inputs.append(steps[:, -1:].clone())  # a copy, so that the state does not keep the whole chunk alive
        x = layer(x, rearrange(past, "b t h w c -> (b t) c h w"))
    return rearrange(x, "(b t) c h w -> b c t h w", b=batch), tuple(last_inputs)


def _conv3x3(in_channels: int, out_channels: int, stride: int = 1, bias: bool = True) -> nn.Conv2d:
    return nn.Conv2d(in_channels, out_channels, 3, stride=stride, padding=1, bias=bias)
