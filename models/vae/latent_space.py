"""The latent space of a VAE: its normalisation and a fingerprint by which models and shards recognise it.

A DiT, a tiny decoder and a shard of latents all presuppose one latent space. Two VAEs of equal shape have
different spaces, and raw latents differ from normalised ones, without any error at run time: so whatever
depends on a space stores it, and refuses another one when loaded.

Wan statistics: the published per-channel values of Wan 2.1 and Wan 2.2. Left out: measuring (``wan_vae.py``).
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, fields

# fmt: off
WAN_2_1_MEAN = (-0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508,
                0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921)
WAN_2_1_STD = (2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743,
               3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.9160)
WAN_2_2_MEAN = (-.2289, -.0052, -.1323, -.2339, -.2799, .0174, .1838, .1557, -.1382, .0542, .2813, .0891,
                .1570, -.0098, .0375, -.1825, -.2246, -.1207, -.0698, .5109, .2665, -.2108, -.2158, .2502,
                -.2055, -.0322, .1109, .1567, -.0729, .0899, -.2799, -.1230, -.0313, -.1649, .0117, .0723,
                -.2839, -.2083, -.0520, .3748, .0152, .1957, .1433, -.2944, .3573, -.0548, -.1681, -.0667)
WAN_2_2_STD = (.4765, 1.0364, .4514, 1.1677, .5313, .4990, .4818, .5013, .8158, 1.0344, .5894, 1.0901,
               .6885, .6165, .8454, .4978, .5759, .3523, .7135, .6804, .5833, 1.4146, .8986, .5659,
               .7069, .5338, .4889, .4917, .4069, .4999, .6866, .4093, .5709, .6065, .6415, .4944,
               .5726, 1.2042, .5458, 1.6887, .3971, 1.0600, .3943, .5537, .5444, .4089, .7468, .7744)
# fmt: on


@dataclass(frozen=True)
class LatentSpace:
    """What must agree between a VAE and everything that reads or writes its latents."""

    channels: int
    spatial_stride: int  # pixels per latent cell, each way
    fingerprint: str  # of the per-channel mean and std
    normalised: bool = True  # (posterior mode - mean) / std; False: the raw posterior mode

    @classmethod
    def of(cls, mean: tuple[float, ...], std: tuple[float, ...], spatial_stride: int) -> LatentSpace:
        """The normalised space with these per-channel statistics."""
        rounded = [[round(value, 4) + 0.0 for value in values] for values in (mean, std)]
        digest = hashlib.sha256(json.dumps([spatial_stride, *rounded]).encode()).hexdigest()
        return cls(channels=len(mean), spatial_stride=spatial_stride, fingerprint=digest[:12])

    @classmethod
    def wan_2_1(cls) -> LatentSpace:
        return cls.of(WAN_2_1_MEAN, WAN_2_1_STD, spatial_stride=8)

    @classmethod
    def wan_2_2(cls) -> LatentSpace:
        return cls.of(WAN_2_2_MEAN, WAN_2_2_STD, spatial_stride=16)

    def to_dict(self) -> dict[str, int | str | bool]:
        return asdict(self)

    @classmethod
    def shared(cls, first: LatentSpace | None, second: LatentSpace | None, owner: str) -> LatentSpace | None:
        """The space of both, as far as it is known. Raises ValueError where that of ``owner``, the second, differs."""
        if first is not None and second is not None:
            first.require(second, owner)
        return first or second

    def require(self, other: LatentSpace, owner: str) -> None:
        """Raises ValueError naming the fields in which ``other``, the space of ``owner``, is not this one."""
        mine, theirs = asdict(self), asdict(other)
        differing = [f.name for f in fields(self) if mine[f.name] != theirs[f.name]]
        if differing:
            told = ", ".join(f"{name}: {theirs[name]} instead of {mine[name]}" for name in differing)
            raise ValueError(
                f"{owner} was made for another latent space ({told}); use the VAE it was made with, or make it again"
            )
