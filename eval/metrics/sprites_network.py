"""A small video classifier of the sprites world: which shapes and colours a clip shows, and how they move.

It answers what no tracker can: whether an event that only the caption tells ("then the disc turns yellow") has
happened in a generated clip (`event_accuracy`). Its features are those of Fréchet distances on this world, per
clip and per frame, as I3D's and Inception's are on films, and of a perceptual distance as AlexNet's are in LPIPS;
their numbers do not compare.

Each frame passes three halvings on its own, then time and space are convolved in turn. An event falls into the
middle half of a clip (data/sprites.py), so the first and the last quarter show the colours before and after it:
both are pooled beside the whole clip. One head says what has each colour at the end: beside it, shapes are learned
many times faster. Trained by train/features.py. Left out: textures.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from math import prod
from pathlib import Path

import torch
from einops import rearrange, reduce
from torch import Tensor, nn
from torch.nn import functional as F

from data.sprites import COLORS, SHAPES, TEXTURES
from eval.metrics.image import unit_images
from models.assemble import located
from models.pretrained import load_state
from models.vae.folder import read_model, save_model

LABELS = {"shapes": list(SHAPES), "colors": list(COLORS)}  # what each logit stands for
BEARERS = ("nothing", "background", *SHAPES)  # what can have a colour
HEADS: dict[str, tuple[int, ...]] = {  # shape of each output, for one clip
    "shapes": (len(SHAPES),), "start_colors": (len(COLORS),), "end_colors": (len(COLORS),),
    "end_bearers": (len(COLORS), len(BEARERS)), "motion": (2,),
}  # fmt: skip
MOTION_UNIT = 0.01  # heights per frame: about the size of a clip's mean displacement, which the head reads as 1
SPATIAL_STRIDE = 8  # three halvings
MIN_FRAMES, MIN_PX = 5, 32
NORM_GROUPS = 4

_COLOR, _TEXTURE, _SHAPE = ("|".join(words) for words in (COLORS, TEXTURES, SHAPES))
_ARTICLE = "(?:an (?=[aeiou])|a (?![aeiou]))"
_THING = f"{_ARTICLE}(?:{_COLOR}) (?:{_TEXTURE}) (?:{_SHAPE})"
_CAPTION = re.compile(
    f"(?P<things>{_THING}(?: and {_THING})*) on {_ARTICLE}(?P<background>{_COLOR}) background"
    f"(?: then the (?P<changed>{_SHAPE}|background) turns (?P<color>{_COLOR}))?"
)


# --------------------------------------------------------------------------------------------- captions
@dataclass(frozen=True)
class CaptionLabels:
    """What a caption of the sprites world says."""

    sprites: tuple[tuple[str, str, str], ...]  # (colour, texture, shape), back to front
    background: str  # colour
    event: tuple[str, str] | None = None  # (a shape or "background", the colour that it turns)

    @property
    def shapes(self) -> frozenset[str]:
        return frozenset(shape for _, _, shape in self.sprites)

    @property
    def start_colors(self) -> frozenset[str]:
        """Of sprites and background, before the event."""
        return frozenset(self._color_of().values())

    @property
    def end_colors(self) -> frozenset[str]:
        """Of sprites and background, after the event."""
        return frozenset(self.end_bearers)

    @property
    def end_bearers(self) -> dict[str, str]:
        """Colour after the event -> the shape that has it, or "background"."""
        changed = dict([self.event] if self.event else [])
        return {color: bearer for bearer, color in (self._color_of() | changed).items()}

    def _color_of(self) -> dict[str, str]:
        return {shape: color for color, _, shape in self.sprites} | {"background": self.background}


def labels_of_caption(caption: str) -> CaptionLabels:
    """Inverts the captions of data/sprites.py. ValueError for any text that they cannot be."""
    match = _CAPTION.fullmatch(caption)
    if match is None:
        raise ValueError(
            f"caption={caption!r} must be one of the sprites world: 'a red striped disc and an orange spotted "
            "square on a blue background', and perhaps 'then the disc turns yellow'"
        )
    things = re.findall(f"({_COLOR}) ({_TEXTURE}) ({_SHAPE})", match["things"])
    event = (match["changed"], match["color"]) if match["changed"] else None
    labels = CaptionLabels(tuple(things), match["background"], event)
    _check(labels, caption)
    return labels


def _check(labels: CaptionLabels, caption: str) -> None:
    """The world draws shapes and colours without repetition, which makes a caption unambiguous."""
    if len(labels.shapes) < len(labels.sprites) or len(labels.start_colors) <= len(labels.sprites):
        raise ValueError(f"caption={caption!r} must name each shape and each colour once")
    if labels.event is None:
        return
    changed, color = labels.event
    if changed not in labels.shapes | {"background"}:
        raise ValueError(f"caption={caption!r} must change a shape that it names, or the background; no {changed}")
    if color in labels.start_colors:
        raise ValueError(f"caption={caption!r} must change to a colour that is not there before; {color} is")


# --------------------------------------------------------------------------------------------- text accuracy
def ends_with_color(end_logits: Tensor, color: str) -> bool:
    """Whether `color` is seen at the end of a clip with probability > 0.5; end_logits [8] of "end_colors"."""
    if color not in COLORS:
        raise ValueError(f"color={color!r} must be one of {', '.join(COLORS)}")
    return bool(end_logits[LABELS["colors"].index(color)] > 0)


def event_accuracy(end_logits: Tensor, captions: Sequence[str]) -> list[float]:
    """Whether each clip ends with the colour that its caption's event names: end_logits [B, 8] -> B figures.

    1.0: it does; 0.0: it does not; nan: the caption has no event, or is none of the sprites world (a folder of other
    videos), and the clip is no evidence either way.
    """
    events = [labels_of_caption(caption).event if _CAPTION.fullmatch(caption) else None for caption in captions]
    return [
        float("nan") if event is None else float(ends_with_color(logits, event[1]))
        for logits, event in zip(end_logits, events, strict=True)
    ]


# --------------------------------------------------------------------------------------------- network
@dataclass
class SpritesNetworkConfig:
    """Widths of the network, in channels."""

    frame_widths: list[int] = field(default_factory=lambda: [16, 32, 64])  # after each halving of a frame
    clip_widths: list[int] = field(default_factory=lambda: [64, 96])  # after each halving of time
    num_features: int = 64  # of a clip: few, so that a Fréchet distance needs few clips

    def __post_init__(self) -> None:
        if 2 ** len(self.frame_widths) != SPATIAL_STRIDE:
            raise ValueError(f"frame_widths={list(self.frame_widths)} must have 3 entries: a stride of 8 px")
        for name in ("frame_widths", "clip_widths"):
            if any(width < 1 or width % NORM_GROUPS for width in vars(self)[name]):
                raise ValueError(f"{name}={list(vars(self)[name])} must be multiples of {NORM_GROUPS}, norm groups")
        if self.num_features < 1:
            raise ValueError(f"num_features={self.num_features} must be at least 1: the heads read nothing else")


class SpritesNetwork(nn.Module):
    """Video -> outputs by head; any number of frames from 5 on, any size from 32 px on divisible by 8."""

    def __init__(self, cfg: SpritesNetworkConfig | None = None) -> None:
        super().__init__()
        self.config = cfg = cfg or SpritesNetworkConfig()
        first, *following = cfg.frame_widths
        self.conv_in = nn.Conv2d(3, first, 5, stride=2, padding=2)
        halvings = [
            _activated(nn.Conv2d(width, wider, 3, stride=2, padding=1), wider)
            for width, wider in zip(cfg.frame_widths, following)
        ]
        last = cfg.frame_widths[-1]
        self.frame_part = nn.Sequential(nn.SiLU(), *halvings, _activated(nn.Conv2d(last, last, 3, padding=1), last))
        widths = [last + 2, *cfg.clip_widths]  # x and y of each cell join the channels
        self.clip_part = nn.Sequential(*(_time_then_space(*pair) for pair in zip(widths, widths[1:])))
        self.pooled_to_features = nn.Linear(6 * widths[-1], cfg.num_features)  # mean and maximum of three stretches
        self.heads = nn.ModuleDict({name: nn.Linear(cfg.num_features, prod(shape)) for name, shape in HEADS.items()})

    @classmethod
    def from_config(cls, cfg: SpritesNetworkConfig | None = None, seed: int = 0) -> SpritesNetwork:
        """Fresh weights, drawn from the seed."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return cls(cfg)

    def forward(self, video: Tensor) -> dict[str, Tensor]:
        """Video as of `features` -> float32 logits of "shapes" [B, 5], "start_colors" and "end_colors" [B, 8].

        "end_bearers" [B, 8, 7]: logits of the one that has each colour at the end, of BEARERS.
        "motion" [B, 2]: mean displacement (x, y) of what moves, in frame heights per frame.
        """
        features = self.features(video)
        outputs = {name: head(features).float().unflatten(1, HEADS[name]) for name, head in self.heads.items()}
        return outputs | {"motion": MOTION_UNIT * outputs["motion"]}

    def features(self, video: Tensor) -> Tensor:
        """uint8, or float in [-1, 1], [B, 3, T, H, W] -> [B, num_features], what the heads read."""
        cells = self._cells(video)
        x = self.clip_part(torch.cat([cells, _coordinates(cells)], dim=1))
        pooled = torch.cat([reduce(x, "b d t h w -> b d t", how) for how in ("mean", "max")], dim=1)
        quarter = max(1, pooled.shape[2] // 4)
        stretches = (pooled[:, :, :quarter], pooled, pooled[:, :, -quarter:])
        return self.pooled_to_features(F.silu(torch.cat([each.mean(dim=2) for each in stretches], dim=1)))

    def frame_features(self, video: Tensor) -> Tensor:
        """Video as of `features` -> [B, T, D'], each frame seen on its own."""
        return reduce(self._cells(video), "b d t h w -> b t d", "mean")

    @torch.no_grad()
    def frame_distances(self, frames: Tensor, reference: Tensor) -> Tensor:  # uint8 [T, H, W, 3] twice -> [T - 1]
        """As LPIPS (Zhang et al. 2018, eq. 1) in this network's features: of frames 1.., 0 for equal ones.

        Features of each layer at unit length, squared difference, mean over cells, sum over layers; no channel is
        weighted, for there are no human judgements of this world. Frame 0 is given to a model, and left out.
        """
        return torch.cat([self._distances(*pair) for pair in unit_images(frames, reference)])

    def _distances(self, images: Tensor, reference: Tensor) -> Tensor:  # [N, 3, H, W] in [0, 1] twice -> [N]
        check_frame_size(*images.shape[2:])
        pairs = zip(self._layers(2 * images - 1), self._layers(2 * reference - 1), strict=True)
        return torch.stack([(F.normalize(a) - F.normalize(b)).square().sum(1).mean((1, 2)) for a, b in pairs]).sum(0)

    def _layers(self, images: Tensor) -> Iterator[Tensor]:  # [N, 3, H, W] in [-1, 1] -> [N, D, h, w] for each
        x = self.conv_in(images.to(self.conv_in.weight.dtype))
        for layer in self.frame_part:
            x = layer(x)
            yield x

    def _cells(self, video: Tensor) -> Tensor:  # [B, 3, T, H, W] -> [B, D', T, H/8, W/8]
        frames = rearrange(_as_floats(video).to(self.conv_in.weight.dtype), "b c t h w -> (b t) c h w")
        cells = self.frame_part(self.conv_in(frames.contiguous(memory_format=torch.channels_last)))
        return rearrange(cells, "(b t) d h w -> b d t h w", b=video.shape[0])

    # ------------------------------------------------------------------ files
    @classmethod
    def from_folder(cls, folder: str | Path) -> SpritesNetwork:
        """A folder written by ``save``, in float32 whatever it was written in."""
        folder = Path(located(str(folder)))
        saved, weights = read_model(folder, "sprites network", made_by="stage=features", parts=("labels", "config"))
        if saved["labels"] != LABELS:
            raise ValueError(f"{folder} was trained on the labels {saved['labels']}, here are {LABELS}; train it again")
        network = cls(SpritesNetworkConfig(**saved["config"]))
        load_state(network, weights, folder)
        return network

    def save(self, folder: str | Path) -> None:
        """Writes model.safetensors and model.json (architecture and labels). Atomic."""
        save_model(self, folder, {"config": asdict(self.config), "labels": LABELS})


def _activated(conv: nn.Module, width: int) -> nn.Sequential:
    return nn.Sequential(conv, nn.GroupNorm(NORM_GROUPS, width), nn.SiLU())


def _time_then_space(width: int, wider: int) -> nn.Sequential:
    """[B, width, T, h, w] -> [B, wider, ceil(T / 2), h, w]; time first, which halves the cost of space."""
    in_time = nn.Conv3d(width, wider, (3, 1, 1), stride=(2, 1, 1), padding=(1, 0, 0))
    in_space = nn.Conv3d(wider, wider, (1, 3, 3), padding=(0, 1, 1))
    return nn.Sequential(_activated(in_time, wider), _activated(in_space, wider))


def _coordinates(cells: Tensor) -> Tensor:
    """x and y of each cell's centre, in [-1, 1] over the frame: [B, 2, T, h, w]. A mean over cells keeps no place."""
    axes = [(2 * torch.arange(n, device=cells.device) + 1) / n - 1 for n in cells.shape[3:]]
    y, x = torch.meshgrid(*axes, indexing="ij")
    return torch.stack([x, y]).to(cells.dtype)[None, :, None].expand(len(cells), -1, cells.shape[2], -1, -1)


def _as_floats(video: Tensor) -> Tensor:
    """Refuses what the network cannot read; uint8 becomes [-1, 1]."""
    shape = tuple(video.shape)
    if len(shape) != 5 or shape[1] != 3 or shape[2] < MIN_FRAMES:
        raise ValueError(f"video has shape {shape}; the sprites network takes [B, 3, T, H, W] with T >= {MIN_FRAMES}")
    check_frame_size(*shape[3:])
    return video.float() / 127.5 - 1 if video.dtype == torch.uint8 else video


def check_frame_size(height: int, width: int) -> None:
    """Raises ValueError for frames that the network cannot read."""
    if any(size < MIN_PX or size % SPATIAL_STRIDE for size in (height, width)):
        raise ValueError(
            f"frames are {height} x {width} px; the sprites network takes height and width of at least {MIN_PX} px, "
            f"divisible by {SPATIAL_STRIDE}"
        )
