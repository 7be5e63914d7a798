"""ODE pairs on disk: one safetensors file per pair, beside the recipe that made them.

A pair is named by its number in the run, so any number of ranks write one folder, an interrupted run
leaves only whole files (write, fsync, rename), and the next run makes just those that are missing. What
all pairs share (the recipe and the null prompt) is written once; another recipe is refused in the same
folder.

Left out: how a pair is made (distill/ode_pairs.py) and used (distill/causal_init.py).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from models.assemble import ModelConfig
from models.condition import Condition, build_condition
from models.files import replace_file, write_json
from models.motion.tracks import Tracks

RECIPE_FILE = "recipe.json"
SHARED_FILE = "shared.safetensors"
MAKE_AGAIN = (
    "run that stage=ode_pairs again, it goes on (if it had been finished, delete its checkpoints/ first: pairs that "
    "exist are kept)"
)


@dataclass(frozen=True)
class OdePair:
    """One sample of the teacher's ODE and exactly what it was conditioned on; no batch dimension."""

    states: Tensor  # [K + 1, C, F, h, w] float16: inputs of the student's K steps, then the clean end
    prompt_embeds: Tensor  # [text_len, text_dim]
    points: Tensor | None = None  # [T, N, 2] float32 px, at the model's clip size
    visibility: Tensor | None = None  # [T, N] bool
    ids: Tensor | None = None  # [N] long: the identities that were drawn
    image_latents: Tensor | None = None  # [C, 1, h, w]
    clip_embeds: Tensor | None = None  # [257, 1280]
    track_latents: Tensor | None = None  # [C, F, h, w], tracks drawn as video (dit.track_encoding = rgb)


class PairStore:
    """A folder of ODE pairs."""

    def __init__(self, folder: Path, recipe: Mapping[str, object]) -> None:
        self.folder = folder
        self.recipe = dict(recipe)

    @classmethod
    def create(cls, folder: str | Path, recipe: Mapping[str, object], null_prompt_embeds: Tensor) -> PairStore:
        """Opens the folder for writing; every rank may call it.

        recipe: JSON values, num_pairs among them. A pair does not depend on how many there are, so another
        num_pairs extends the folder, and hides none that is there. Raises ValueError, naming the fields, where it holds
        another recipe.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        recipe = json.loads(json.dumps(dict(recipe)))
        path = folder / RECIPE_FILE
        if path.exists():
            _require_same_recipe(folder, json.loads(path.read_text()), recipe)
            there = cls(folder, recipe)
            while there.has(there.num_pairs):
                there.recipe["num_pairs"] = there.num_pairs + 1
            recipe = there.recipe
        else:
            with replace_file(folder / SHARED_FILE) as fresh:
                save_file({"null_prompt_embeds": null_prompt_embeds.cpu().contiguous()}, fresh)
        write_json(path, recipe)
        return cls(folder, recipe)

    @classmethod
    def open(cls, folder: str | Path) -> PairStore:
        """Opens a finished folder; raises FileNotFoundError or ValueError where pairs are missing."""
        folder = Path(folder)
        remedy = "make them with: python -m train stage=ode_pairs"
        if not (folder / RECIPE_FILE).exists() and (folder / "pairs" / RECIPE_FILE).exists():
            raise FileNotFoundError(f"stage.pairs={folder} is a run; its pairs are in {folder / 'pairs'}")
        if not (folder / RECIPE_FILE).exists():
            raise FileNotFoundError(f"stage.pairs={folder} must hold {RECIPE_FILE} and its pairs; {remedy}")
        store = cls(folder, json.loads((folder / RECIPE_FILE).read_text()))
        missing = store.missing()
        if missing:
            have = f"{store.num_pairs - len(missing)} of num_pairs={store.num_pairs}"
            raise ValueError(f"stage.pairs={folder} has {have}; {MAKE_AGAIN}")
        return store

    @property
    def num_pairs(self) -> int:
        return int(str(self.recipe["num_pairs"]))

    def missing(self) -> list[int]:
        """Numbers of the pairs that are not there yet."""
        return [index for index in range(self.num_pairs) if not self.has(index)]

    def has(self, index: int) -> bool:
        return self._path(index).exists()

    def write(self, index: int, pair: OdePair) -> None:
        """Writes one pair, whole or not at all. The zero tail of the prompt is not stored."""
        tensors = {name: value.cpu() for name, value in vars(pair).items() if value is not None}
        used = tensors["prompt_embeds"].ne(0).any(-1).nonzero()
        tensors["prompt_embeds"] = tensors["prompt_embeds"][: int(used.max()) + 1 if len(used) else 0]
        tensors = {name: value.contiguous() for name, value in tensors.items()}
        with replace_file(self._path(index)) as fresh:
            save_file(tensors, fresh)

    def read(self, index: int) -> OdePair:
        """One pair; the prompt is zero-padded to its full length again. Raises ValueError for a damaged file."""
        tensors = _load(self._path(index))
        prompt = torch.zeros_like(self.null_prompt_embeds[0], dtype=tensors["prompt_embeds"].dtype)
        prompt[: tensors["prompt_embeds"].shape[0]] = tensors["prompt_embeds"]
        return OdePair(**(tensors | {"prompt_embeds": prompt}))

    @cached_property
    def null_prompt_embeds(self) -> Tensor:
        """What a dropped prompt means, [1, text_len, text_dim]."""
        return _load(self.folder / SHARED_FILE)["null_prompt_embeds"]

    def _path(self, index: int) -> Path:
        return self.folder / f"pair_{index:06d}.safetensors"


def stack_states(pairs: Sequence[OdePair]) -> Tensor:
    """[B, K + 1, C, F, h, w] float32."""
    return torch.stack([pair.states.float() for pair in pairs])  # autocast on the CPU cannot stack float16


def stack_condition(
    pairs: Sequence[OdePair], null_prompt_embeds: Tensor, model_cfg: ModelConfig, device: torch.device | str = "cpu"
) -> Condition:
    """The condition the teacher saw for these pairs, on the device: a map of tracks is large, the tracks are not."""
    height, width = model_cfg.clip.height, model_cfg.clip.width
    tracks = None
    if pairs[0].points is not None:
        tracks = Tracks.stack([_tracks(pair, height, width) for pair in pairs]).to(device)
    return build_condition(
        prompt_embeds=torch.stack([pair.prompt_embeds for pair in pairs]),
        null_prompt_embeds=null_prompt_embeds,
        tracks=tracks,
        dit=model_cfg.dit,
        latent_size=model_cfg.latent_size,
        cell_px=model_cfg.vae.spatial_stride,
        image_latents=_stack([pair.image_latents for pair in pairs]),
        clip_embeds=_stack([pair.clip_embeds for pair in pairs]),
        track_latents=_stack([pair.track_latents for pair in pairs]),
    ).to(device)


def _tracks(pair: OdePair, height: int, width: int) -> Tracks:
    assert pair.points is not None and pair.visibility is not None and pair.ids is not None, "stored together"
    return Tracks(pair.points[None], pair.visibility[None], pair.ids[None], height, width)


def _load(path: Path) -> dict[str, Tensor]:
    """Tensors by name. Raises ValueError, naming the file, where it is not whole, as a copy can be."""
    try:
        return load_file(path)
    except SafetensorError as error:
        what = "copy it again" if path.name == SHARED_FILE else f"copy it again, or delete it and {MAKE_AGAIN}"
        raise ValueError(f"{path} ({path.stat().st_size} bytes) is not whole: {error}; {what}") from error


def _require_same_recipe(folder: Path, found: Mapping[str, object], wanted: Mapping[str, object]) -> None:
    names = sorted((found.keys() | wanted.keys()) - {"num_pairs"})
    fields = [name for name in names if found.get(name) != wanted.get(name)]
    if fields:
        what = ", ".join(f"{name}={found.get(name)} (now {wanted.get(name)})" for name in fields)
        remedy = "choose another output_dir or delete the folder"
        raise ValueError(f"{folder} holds pairs of another recipe: {what}; {remedy}")


def _stack(parts: Sequence[Tensor | None]) -> Tensor | None:
    present = [part for part in parts if part is not None]
    return torch.stack(present) if present else None
