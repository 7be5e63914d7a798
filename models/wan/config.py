"""Hyper-parameters of the Wan diffusion transformer and the layout of its input channels.

Sizes are those of Wan 2.1 / 2.2 (arXiv 2503.20314) and of the VideoX-Fun variants that MotionStream starts
from. What follows from other numbers (head_dim, in_channels) is derived. Leaves out where weights come from:
see checkpoint.py.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from models.motion.embedding import OFFSET_DIM
from models.wan.attention import ATTENTION_BACKENDS

IMAGE_CONDITIONING = ("none", "first_frame", "fun_control", "inp")
TRACK_ENCODINGS = ("head", "rgb")
MASK_CHANNELS = 4  # Wan I2V: one channel per pixel frame of a latent frame
COUNTS = (
    "dim", "ffn_dim", "num_heads", "num_layers", "latent_channels", "freq_dim", "text_dim", "text_len", "clip_dim",
    "track_id_dim", "track_hidden",
)  # fmt: skip
HALVED = ("freq_dim", "track_id_dim")  # half sines, half cosines
RUNTIME_FIELDS = ("attention_backend", "activation_checkpointing")  # no effect on the weights
INPUT_FIELDS = ("image_conditioning", "track_channels", "track_encoding")  # which input channels there are
TRACK_HEAD_FIELDS = ("track_id_dim", "track_offsets", "track_hidden")  # no effect where there is no track head


@dataclass
class WanConfig:
    """Architecture of a `WanDiT`.

    Raises ValueError where values contradict each other.
    """

    dim: int  # width of the residual stream
    ffn_dim: int  # hidden width of the feed-forward network
    num_heads: int
    num_layers: int  # transformer blocks
    latent_channels: int  # channels of a VAE latent; also the output
    freq_dim: int = 256  # width of the sinusoidal timestep encoding
    text_dim: int = 4096  # width of a text encoder token
    text_len: int = 512  # text tokens, zero-padded
    patch_size: list[int] = field(default_factory=lambda: [1, 2, 2])  # latent frames, rows, columns
    eps: float = 1e-6  # of every norm but those of the CLIP projection
    qk_norm: bool = True
    cross_attn_norm: bool = True
    clip_dim: int | None = None  # width of a CLIP image token; None: no image cross-attention
    image_conditioning: str = "none"  # none | first_frame | fun_control | inp; see input_layout
    track_channels: int = 0  # channels after the track head; 0: a model without tracks
    track_id_dim: int = 64  # width of a track's identity encoding
    track_offsets: bool = False  # the head also sees where in its cell a track lies (ours; the paper floors it away)
    track_hidden: int = 128  # hidden width of the track head
    track_encoding: str = "head"  # head: learned from the track map | rgb: VAE latents of drawn tracks
    attention_backend: str = "sdpa"  # sdpa | matmul | flex | flash
    activation_checkpointing: bool = False  # recompute each block in the backward pass

    def __post_init__(self) -> None:
        self.patch_size = [int(size) for size in self.patch_size]
        for name in COUNTS:
            if (count := vars(self)[name]) is not None and count < 1:
                raise ValueError(f"{name}={count} must be at least 1")
        for name in HALVED:
            if vars(self)[name] % 2:
                raise ValueError(f"{name}={vars(self)[name]} must be even: half sines, half cosines")
        if self.track_channels < 0:
            raise ValueError(f"track_channels={self.track_channels} must be at least 0, a model without tracks")
        if self.dim % self.num_heads or self.head_dim % 2:
            raise ValueError(f"dim={self.dim} must be num_heads={self.num_heads} times an even head_dim; change one")
        if len(self.patch_size) != 3 or self.patch_size[0] != 1 or min(self.patch_size) < 1:
            raise ValueError(f"patch_size={self.patch_size} must be [1, rows, columns], as in every Wan model")
        for name, allowed in (
            ("image_conditioning", IMAGE_CONDITIONING),
            ("track_encoding", TRACK_ENCODINGS),
            ("attention_backend", ATTENTION_BACKENDS),
        ):
            value = vars(self)[name]
            if value not in allowed:
                raise ValueError(f"{name}='{value}' must be one of {', '.join(allowed)}")

    @property
    def head_dim(self) -> int:
        return self.dim // self.num_heads

    @property
    def out_channels(self) -> int:
        return self.latent_channels

    @property
    def input_layout(self) -> list[tuple[str, int]]:
        """Order and width of the input channels: (part, channels).

        none, first_frame: [noisy | track]; fun_control: [noisy | track | image] with a zero image where F >
        0; inp: [noisy | mask | image | track]. Without tracks these are the layouts of the official
        checkpoints; the control channels of Fun-Control are the track channels here.
        """
        noisy, image = ("noisy", self.latent_channels), ("image", self.latent_channels)
        track, mask = ("track", self.track_channels), ("mask", MASK_CHANNELS)
        layouts = {
            "none": [noisy, track],
            "first_frame": [noisy, track],
            "fun_control": [noisy, track, image],
            "inp": [noisy, mask, image, track],
        }
        return [(part, width) for part, width in layouts[self.image_conditioning] if width]

    @property
    def in_channels(self) -> int:
        return sum(width for _, width in self.input_layout)

    @property
    def has_track_head(self) -> bool:
        return self.track_channels > 0 and self.track_encoding == "head"

    @property
    def track_map_dim(self) -> int:
        """Channels of the track map that the head reads."""
        return self.track_id_dim + (OFFSET_DIM if self.track_offsets else 0)

    @classmethod
    def wan_1_3b(cls, **overrides: Any) -> WanConfig:
        """Wan2.1 T2V-1.3B; with image_conditioning and clip_dim=1280, the Fun-1.3B models."""
        sizes: dict[str, Any] = {
            "dim": 1536,
            "ffn_dim": 8960,
            "num_heads": 12,
            "num_layers": 30,
            "latent_channels": 16,
        }
        return cls(**(sizes | overrides))

    @classmethod
    def wan_14b(cls, **overrides: Any) -> WanConfig:
        """Wan2.1 T2V-14B; with image_conditioning="inp" and clip_dim=1280, I2V-14B.

        I2V-14B was trained on latents of [image, gray frames], which a caller may pass as image_latents. The stages
        and streams here encode the image alone, and zeros stand for the rest, as in Fun-Control.
        """
        sizes: dict[str, Any] = {
            "dim": 5120,
            "ffn_dim": 13824,
            "num_heads": 40,
            "num_layers": 40,
            "latent_channels": 16,
        }
        return cls(**(sizes | overrides))

    @classmethod
    def wan_5b(cls, **overrides: Any) -> WanConfig:
        """Wan2.2 TI2V-5B: the first latent frame is the clean image."""
        sizes: dict[str, Any] = {
            "dim": 3072,
            "ffn_dim": 14336,
            "num_heads": 24,
            "num_layers": 30,
            "latent_channels": 48,
        }
        return cls(**(sizes | {"image_conditioning": "first_frame"} | overrides))

    @classmethod
    def tiny(cls, **overrides: Any) -> WanConfig:
        """A few thousand weights of the same architecture, for tests (head_dim 40: unequal RoPE axes)."""
        sizes: dict[str, Any] = {
            "dim": 80,
            "ffn_dim": 160,
            "num_heads": 2,
            "num_layers": 2,
            "latent_channels": 4,
            "freq_dim": 32,
            "text_dim": 24,
            "text_len": 8,
        }
        return cls(**(sizes | {"track_id_dim": 8, "track_hidden": 12} | overrides))

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> WanConfig:
        """Inverse of to_dict; raises ValueError naming unknown fields."""
        known = {item.name for item in fields(cls)}
        if unknown := sorted(set(values) - known):
            raise ValueError(f"WanConfig has no field {', '.join(unknown)}; its fields are {', '.join(sorted(known))}")
        return cls(**values)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def architecture_differences(self, other: WanConfig, but: Collection[str] = ()) -> list[str]:
        """ "field: mine, theirs" for each field that changes the weights or what they mean, ``but`` for those named."""
        mine, theirs = self.to_dict(), other.to_dict()
        ignored = (*RUNTIME_FIELDS, *but)
        return [
            f"{name}: {mine[name]}, {theirs[name]}"
            for name in mine
            if name not in ignored and mine[name] != theirs[name]
        ]
