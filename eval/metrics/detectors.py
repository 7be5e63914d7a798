"""Networks whose features the Fréchet distances are of: I3D (FVD), Inception (FID), the sprites network.

I3D and Inception are the TorchScript files that the reference implementations of FVD (StyleGAN-V) and FID
(StyleGAN2-ADA) use. They are never downloaded: a loader returns the text that says how to get a missing file, and
the benchmark reports it in place of a number. I3D has two valid call styles whose figures differ slightly:
* "raw": uint8 frames of any size; the network resizes and rescales them itself;
* "prepared": floats in [-1, 1] at 224 x 224, which the caller made.
The style is part of the features' origin, so that sets of different styles refuse to be compared. TorchScript runs
code from its file: load only the file named here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from eval.metrics.frechet import Features, frechet_distance, joined
from eval.metrics.sprites_network import MIN_FRAMES, SpritesNetwork

I3D_FILE, INCEPTION_FILE = "i3d_torchscript.pt", "inception-2015-12-05.pt"
I3D_HELP = (
    f"unavailable: get {I3D_FILE} (linked in src/metrics of github.com/universome/stylegan-v) and set "
    "bench.i3d_weights=FILE"
)
INCEPTION_HELP = (
    f"unavailable: get {INCEPTION_FILE} (https://api.ngc.nvidia.com/v2/models/nvidia/research/stylegan3/versions/1/"
    f"files/metrics/{INCEPTION_FILE}) and set bench.inception_weights=FILE"
)
SPRITES_HELP = "unavailable: set bench.features=FOLDER, a sprites network made by stage=features"
MIN_I3D_FRAMES, I3D_SIZE = 10, 224
PROBE_PX = 32  # of what a network is tried on when it is loaded
BATCH = 16


class I3d:
    """Video features: 400 logits of the Kinetics I3D."""

    def __init__(self, network: torch.nn.Module) -> None:
        self.network = network

    @torch.no_grad()
    def features(self, videos: np.ndarray | Tensor) -> Features:
        """uint8 [N, T, H, W, 3] ("raw"), or float [N, 3, T, 224, 224] in [-1, 1] ("prepared").

        Raises:
            ValueError: neither of the two, or fewer than 10 frames.
        """
        style, video = self._style_of(videos)
        if video.shape[2] < MIN_I3D_FRAMES:
            raise ValueError(f"videos have {video.shape[2]} frames; I3D needs at least {MIN_I3D_FRAMES}")
        raw = style == "raw"
        batches = [
            self.network(part.float(), rescale=raw, resize=raw, return_features=True) for part in video.split(BATCH)
        ]
        return Features(torch.cat(batches).float().cpu().numpy(), f"i3d {style}")

    @staticmethod
    def _style_of(videos: np.ndarray | Tensor) -> tuple[str, Tensor]:
        video = torch.as_tensor(videos)
        if video.ndim == 5 and video.dtype == torch.uint8 and video.shape[-1] == 3:
            return "raw", video.permute(0, 4, 1, 2, 3)
        prepared = video.ndim == 5 and video.is_floating_point() and video.shape[1] == 3
        if prepared and video.shape[3:] == (I3D_SIZE, I3D_SIZE) and float(video.abs().max()) <= 1:
            return "prepared", video
        raise ValueError(
            f"videos are {video.dtype} {tuple(video.shape)}; give uint8 [N, T, H, W, 3] as they are, or floats "
            f"[N, 3, T, {I3D_SIZE}, {I3D_SIZE}] in [-1, 1]: a mixture of both would be scaled twice or not at all"
        )


class Inception:
    """Image features: the 2048 of Inception's last pooling."""

    def __init__(self, network: torch.nn.Module) -> None:
        self.network = network

    @torch.no_grad()
    def features(self, frames: np.ndarray) -> Features:
        """uint8 [N, H, W, 3] of any size."""
        if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[-1] != 3:
            raise ValueError(f"frames are {frames.dtype} {frames.shape}; they must be uint8 [N, H, W, 3]")
        images = torch.from_numpy(np.ascontiguousarray(frames)).permute(0, 3, 1, 2)
        found = [self.network(part, return_features=True) for part in images.split(BATCH)]
        return Features(torch.cat(found).float().cpu().numpy(), "inception")

    def frame_features(self, videos: np.ndarray) -> Features:
        """uint8 [N, T, H, W, 3] -> one vector a frame."""
        return self.features(videos.reshape(-1, *videos.shape[2:]))


class SpritesDetector:
    """The sprites network as a detector: its distances are named fvd_sprites and fid_sprites, and compare with no
    others."""

    def __init__(self, network: SpritesNetwork) -> None:
        self.network = network.eval()

    @torch.no_grad()
    def video_features(self, videos: np.ndarray) -> Features:
        """uint8 [N, T, H, W, 3] -> one vector a video."""
        found = [self.network.features(_channels_first(videos[n : n + BATCH])) for n in range(0, len(videos), BATCH)]
        return Features(torch.cat(found).float().numpy(), "sprites video")

    @torch.no_grad()
    def frame_features(self, videos: np.ndarray) -> Features:
        """uint8 [N, T, H, W, 3] -> one vector a frame."""
        parts = [_channels_first(videos[n : n + BATCH]) for n in range(0, len(videos), BATCH)]
        found = [self.network.frame_features(part).flatten(0, 1) for part in parts]
        return Features(torch.cat(found).float().numpy(), "sprites frame")


@dataclass(frozen=True, eq=False)
class Detectors:
    """The networks, each or the text that says how to get it."""

    sprites: SpritesDetector | str
    i3d: I3d | str
    inception: Inception | str

    @classmethod
    def load(cls, features: str | None, i3d_weights: str | None, inception_weights: str | None) -> Detectors:
        """Raises FileNotFoundError for a path that is set and holds none, ValueError for one that holds another."""
        return cls(load_sprites_detector(features), load_i3d(i3d_weights), load_inception(inception_weights))

    def features(self, video: np.ndarray) -> dict[str, Features | str]:
        """Of a video uint8 [T, H, W, 3], by the name of the distance that they are for; or why there is none."""
        length, videos = len(video), video[None]
        sprites, i3d, inception = self.sprites, self.i3d, self.inception
        if length < MIN_I3D_FRAMES:
            i3d = f"unavailable: videos of {length} frames; I3D needs {MIN_I3D_FRAMES} or more"
        if length < MIN_FRAMES:
            sprites = f"unavailable: videos of {length} frames; the sprites network needs {MIN_FRAMES} or more"
        return {
            "fvd_sprites": sprites if isinstance(sprites, str) else sprites.video_features(videos),
            "fid_sprites": sprites if isinstance(sprites, str) else sprites.frame_features(videos),
            "fvd": i3d if isinstance(i3d, str) else i3d.features(videos),
            "fid": inception if isinstance(inception, str) else inception.frame_features(videos),
        }


class Distances:
    """fvd_sprites, fid_sprites, fvd and fid of two sets of videos, which are given one at a time and not kept."""

    def __init__(self, detectors: Detectors) -> None:
        self.detectors = detectors
        self._features: list[tuple[dict[str, Features | str], dict[str, Features | str]]] = []

    def add(self, video: np.ndarray, reference: np.ndarray) -> None:
        """One of each set, uint8 [T, H, W, 3]; T is the same in all."""
        self._features.append((self.detectors.features(video), self.detectors.features(reference)))

    def found(self) -> dict[str, float | str]:
        """The distances by name, each or why there is none."""
        return {name: self._distance(name) for name in self._features[0][0]}

    def _distance(self, name: str) -> float | str:
        if (count := len(self._features)) < 2:
            return f"unavailable: {count} video; a Fréchet distance needs 2 or more"
        videos: list[Features] = []
        references: list[Features] = []
        for pair in self._features:
            for members, features in zip((videos, references), pair, strict=True):
                if isinstance(one := features[name], str):
                    return one
                members.append(one)
        return frechet_distance(joined(videos), joined(references))


def load_i3d(path: str | None) -> I3d | str:
    """The network, or how to get it. Raises FileNotFoundError where there is no such file, ValueError for another."""
    blank = np.zeros((1, MIN_I3D_FRAMES, PROBE_PX, PROBE_PX, 3), np.uint8)
    network = _load(path, I3D_HELP, lambda network: I3d(network).features(blank))
    return network if isinstance(network, str) else I3d(network)


def load_inception(path: str | None) -> Inception | str:
    """The network, or how to get it. Raises FileNotFoundError where there is no such file, ValueError for another."""
    blank = np.zeros((1, PROBE_PX, PROBE_PX, 3), np.uint8)
    network = _load(path, INCEPTION_HELP, lambda network: Inception(network).features(blank))
    return network if isinstance(network, str) else Inception(network)


def load_sprites_detector(folder: str | None) -> SpritesDetector | str:
    """The network, or how to get it. Raises FileNotFoundError or ValueError for a folder that does not hold one."""
    return SPRITES_HELP if folder is None else SpritesDetector(SpritesNetwork.from_folder(folder))


def _load(path: str | None, remedy: str, probe: Callable[[torch.nn.Module], object]) -> torch.nn.Module | str:
    """The network of a file, after ``probe`` has called it as a benchmark will, hours later."""
    if path is None:
        return remedy
    how = remedy.removeprefix("unavailable: ")
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path} is no file; {how}")
    try:
        network = torch.jit.load(path, map_location="cpu").eval()
    except RuntimeError as error:
        raise ValueError(f"{path} is not a TorchScript file: {error}") from error
    try:
        probe(network)
    except RuntimeError as error:
        raise ValueError(f"{path} holds another network, which cannot be called as it has to be; {how}") from error
    return network


def _channels_first(videos: np.ndarray) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(videos)).permute(0, 4, 1, 2, 3)
