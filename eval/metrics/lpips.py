"""LPIPS (AlexNet, heads version 0.1), computed from two weight files the user provides.

Paper: Zhang et al. 2018, eq. 1: unit-normalised features of five layers, squared difference, learned channel
weights, mean over space, sum over layers. The network is written out here, so that torchvision is not needed.
Nothing is downloaded: `load_lpips` says what is missing and where it comes from, and the caller reports that
text in place of a number. Published video papers rarely name the backbone; this one is AlexNet.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from eval.metrics.image import unit_images
from models.pretrained import read_weights

MIN_SIDE_PX = 31  # of an image: two max-pools follow the first layer
BACKBONE_FILE = "alexnet-owt-7be5be79.pth"
HEADS_FILE = "alex.pth"
HOW_TO_GET = (
    f"put {BACKBONE_FILE} (https://download.pytorch.org/models/{BACKBONE_FILE}) and "
    f"{HEADS_FILE} (lpips/weights/v0.1 of github.com/richzhang/PerceptualSimilarity) in one folder"
)
# (torchvision's index in `features`, in, out, kernel, stride, padding, max-pool first)
LAYERS = (
    (0, 3, 64, 11, 4, 2, False),
    (3, 64, 192, 5, 1, 2, True),
    (6, 192, 384, 3, 1, 1, True),
    (8, 384, 256, 3, 1, 1, False),
    (10, 256, 256, 3, 1, 1, False),
)


class Lpips(nn.Module):
    """Perceptual distance between images; random until weights are loaded."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.ModuleDict(
            {
                str(index): nn.Conv2d(fan_in, out, kernel, stride, padding)
                for index, fan_in, out, kernel, stride, padding, _ in LAYERS
            }
        )
        self.heads = nn.ModuleList(nn.Conv2d(layer[2], 1, 1, bias=False) for layer in LAYERS)
        self.register_buffer("shift", torch.tensor([-0.030, -0.088, -0.188]).view(1, 3, 1, 1))
        self.register_buffer("scale", torch.tensor([0.458, 0.448, 0.450]).view(1, 3, 1, 1))

    def forward(self, images: Tensor, reference: Tensor) -> Tensor:  # [N, 3, H, W] in [-1, 1] twice -> [N]
        """Distance of each pair, 0 for equal images."""
        total = images.new_zeros(len(images))
        for head, ours, theirs in zip(self.heads, self._activations(images), self._activations(reference), strict=True):
            total = total + head((ours - theirs) ** 2).mean(dim=(1, 2, 3))
        return total

    def _activations(self, images: Tensor) -> list[Tensor]:
        x, found = (images - self.shift) / self.scale, []
        for index, *_, pool in LAYERS:
            x = F.max_pool2d(x, 3, 2) if pool else x
            x = F.relu(self.features[str(index)](x))
            found.append(x / (x.norm(dim=1, keepdim=True) + 1e-10))
        return found

    @torch.no_grad()
    def frame_distances(self, frames: Tensor, reference: Tensor) -> Tensor:  # uint8 [T, H, W, 3] -> [T - 1]
        """LPIPS of frames 1..; frame 0 is given to an image-to-video model and is skipped."""
        return torch.cat([self(2 * ours - 1, 2 * theirs - 1) for ours, theirs in unit_images(frames, reference)])


def require_lpips(folder: str, setting: str) -> None:
    """Raises FileNotFoundError, naming the setting, where the folder lacks one of the files."""
    if missing := [name for name in (BACKBONE_FILE, HEADS_FILE) if not (Path(folder) / name).is_file()]:
        raise FileNotFoundError(f"{setting}={folder} holds no {' and no '.join(missing)}; {HOW_TO_GET}")


def load_lpips(folder: str | None, setting: str = "bench.lpips_weights") -> Lpips | str:
    """The metric, or the text that says how to get it.

    setting: of the folder, for messages.

    Raises:
        FileNotFoundError: the folder lacks one of the files.
        ValueError: a file is there but is not the checkpoint it should be.
    """
    if folder is None:
        return f"unavailable: {HOW_TO_GET} and set {setting}=FOLDER"
    require_lpips(folder, setting)
    backbone, heads = (read_weights(Path(folder) / name) for name in (BACKBONE_FILE, HEADS_FILE))
    if not isinstance(backbone, dict) or not isinstance(heads, dict):
        raise ValueError(f"{setting}={folder} does not hold LPIPS (AlexNet, v0.1) weights by name; {HOW_TO_GET}")
    metric = Lpips()
    state = {key: value for key, value in backbone.items() if key.startswith("features.")}
    state |= {
        f"heads.{i}.weight": heads[f"lin{i}.model.1.weight"]
        for i in range(len(LAYERS))
        if f"lin{i}.model.1.weight" in heads
    }
    state |= {"shift": metric.shift, "scale": metric.scale}
    try:
        metric.load_state_dict(state, strict=True)
    except RuntimeError as error:
        raise ValueError(f"{setting}={folder} does not hold LPIPS (AlexNet, v0.1) weights: {error}") from error
    return metric.eval().requires_grad_(False)
