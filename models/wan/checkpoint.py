"""Weights of `WanDiT` in files: our own folders, and the public formats.

Read: official Wan and VideoX-Fun names (ours are the same), diffusers names, Self-Forcing and CausVid
training files (nested under "generator_ema" or "generator", prefixed by "model." and by wrappers). Every
translation is a strict two-way map: a name it does not know is an error. Files are safetensors, or pickles
restricted to tensors.
"""

from __future__ import annotations

import json
import logging
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from models.files import remove_unfinished, replace_file
from models.pretrained import load_state, read_weights, reading_weights, shortened
from models.vae.latent_space import LatentSpace
from models.wan.config import INPUT_FIELDS, MASK_CHANNELS, TRACK_HEAD_FIELDS, WanConfig
from models.wan.dit import WanDiT

logger = logging.getLogger(__name__)

StateDict = dict[str, Tensor]
InputLayout = list[tuple[str, int]]  # (part, channels) in order
WEIGHTS_NAME, CONFIG_NAME = "model.safetensors", "model.json"
TRACK_HEAD, INPUTS = "track_head.", "patch_embedding.weight"
NESTED_STATES = ("generator_ema", "generator")  # the first one present is read
WRAPPERS = ("_fsdp_wrapped_module.", "_checkpoint_wrapped_module.", "_orig_mod.")
PREFIXES = ("model.diffusion_model.", "diffusion_model.", "model.", "module.")
IGNORED_DIFFUSERS_KEYS = re.compile(r"blocks\.\d+\.attn2\.norm_added_q\.weight")  # in old files; no model reads them

# official -> diffusers; each stands for a weight and a bias, a norm weight, or one bare parameter
TOP_NAMES = {
    "patch_embedding": "patch_embedding",
    "text_embedding.0": "condition_embedder.text_embedder.linear_1",
    "text_embedding.2": "condition_embedder.text_embedder.linear_2",
    "time_embedding.0": "condition_embedder.time_embedder.linear_1",
    "time_embedding.2": "condition_embedder.time_embedder.linear_2",
    "time_projection.1": "condition_embedder.time_proj",
    "img_emb.proj.0": "condition_embedder.image_embedder.norm1",
    "img_emb.proj.1": "condition_embedder.image_embedder.ff.net.0.proj",
    "img_emb.proj.3": "condition_embedder.image_embedder.ff.net.2",
    "img_emb.proj.4": "condition_embedder.image_embedder.norm2",
    "head.modulation": "scale_shift_table",
    "head.head": "proj_out",
}
BLOCK_NAMES = {
    "modulation": "scale_shift_table",
    **{
        f"{ours}.{part}": f"{theirs}.{name}"
        for ours, theirs in (("self_attn", "attn1"), ("cross_attn", "attn2"))
        for part, name in (
            *(("q", "to_q"), ("k", "to_k"), ("v", "to_v"), ("o", "to_out.0")),
            *(("norm_q", "norm_q"), ("norm_k", "norm_k")),
        )
    },
    "cross_attn.k_img": "attn2.add_k_proj",
    "cross_attn.v_img": "attn2.add_v_proj",
    "cross_attn.norm_k_img": "attn2.norm_added_k",
    "norm3": "norm2",  # the affine norm before cross-attention: the two codebases swap the numbers
    "ffn.0": "ffn.net.0.proj",
    "ffn.2": "ffn.net.2",
}


def official_to_diffusers(state: Mapping[str, Tensor]) -> StateDict:
    """Our state dict under diffusers' names (track_head.* as it is). Raises ValueError on an unknown name."""
    return _rename(state, TOP_NAMES, BLOCK_NAMES, "official Wan")


def diffusers_to_official(state: Mapping[str, Tensor]) -> StateDict:
    """Inverse of `official_to_diffusers`."""
    top = {theirs: ours for ours, theirs in TOP_NAMES.items()}
    block = {theirs: ours for ours, theirs in BLOCK_NAMES.items()}
    known = {name: tensor for name, tensor in state.items() if not IGNORED_DIFFUSERS_KEYS.fullmatch(name)}
    return _rename(known, top, block, "diffusers")


def to_official(state: Any) -> StateDict:
    """A loaded file's content, whatever its format and wrappers -> state dict with official names.

    Raises ValueError where it is not floating-point tensors by name, or a name belongs to no known format.
    """
    if isinstance(state, Mapping):
        nested = (state.get(name) for name in NESTED_STATES)  # empty: an average that had not begun
        state = next((inner for inner in nested if isinstance(inner, Mapping) and inner), state)
    if not isinstance(state, Mapping) or not all(isinstance(name, str) for name in state):
        raise ValueError(f"it holds a {type(state).__name__}, not tensors by name; give another file")
    state = _with_bare_names(state)
    if reference := sorted(name for name in state if name.startswith("ref_conv.")):
        raise ValueError(
            f"the checkpoint holds {', '.join(reference)}: a Fun-V1.1 control model, whose reference image "
            "is an extra frame that WanDiT does not have; use Wan2.1-Fun-1.3B-Control (V1.0)"
        )
    if any(name.startswith("condition_embedder.") for name in state):
        state = diffusers_to_official(state)
    else:
        official_to_diffusers(state)  # refuses unknown names
    if others := [name for name, value in state.items() if not (torch.is_tensor(value) and value.is_floating_point())]:
        raise ValueError(f"no floating-point tensors: {shortened(others)}; give weights that are not quantised")
    return state


def load_pretrained(model: WanDiT, path: str | Path) -> list[str]:
    """Loads a file or folder of any known format into ``model``; returns what the checkpoint did not have.

    That is parameters of the track head, which keep their initial values, and input channels, as
    "patch_embedding.weight[track]"; nothing else may be absent. The columns of patch_embedding go to the channels
    that mean the same, and those of new channels are zero, so that the model starts as the old one; those that
    read a new track head, itself the zero map, keep their initial values, for behind two zeros no gradient would
    ever reach it. The model's latent space becomes the checkpoint's, as far as that tells. Raises ValueError naming
    the fields where the checkpoint is of another architecture.
    """
    content = read_state(path)
    try:
        state, saved = to_official(content), _saved_config(Path(path))
    except ValueError as error:
        raise ValueError(f"{path} is not of a DiT: {error}") from error
    _check_architecture(state, saved, model.config, path)
    layout = _input_layout(state[INPUTS].shape[1], model.config) if saved is None else saved.input_layout
    if layout != model.config.input_layout:
        state[INPUTS] = _grown_inputs(state[INPUTS], layout, model)
    _check_shapes(state, model, path)
    model.latent_space = _saved_latent_space(Path(path))
    missing, unexpected = model.load_state_dict(state, strict=False)
    if unexpected or [name for name in missing if not name.startswith(TRACK_HEAD)]:
        raise ValueError(f"{path} does not fit the model: missing {missing}, unexpected {unexpected}")
    had = dict(layout)
    new_inputs = [f"{INPUTS}[{part}]" for part, _ in model.config.input_layout if part not in had]
    if absent := [*missing, *new_inputs]:
        logger.info("%s does not have, so that these are learned from nothing: %s", path, ", ".join(absent))
    return absent


def save_dit(model: WanDiT, folder: str | Path, **provenance: Any) -> None:
    """Writes folder/model.safetensors and folder/model.json (config, latent space where it is known, provenance);
    each appears whole or not at all.

    The weights carry all of it too, so that a crash between the two files is told. One process writes a folder: what
    killed ones left half written there is removed.

    ``provenance``: JSON values, such as stage, step or the data used.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for name in (CONFIG_NAME, WEIGHTS_NAME):
        remove_unfinished(folder / name)
    about = {"config": model.config.to_dict(), "provenance": provenance}
    if model.latent_space is not None:
        about["latent_space"] = model.latent_space.to_dict()
    metadata = {"format": "pt"} | {name: json.dumps(value, sort_keys=True) for name, value in about.items()}
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    with replace_file(folder / CONFIG_NAME) as description, replace_file(folder / WEIGHTS_NAME) as weights:
        save_file(state, weights, metadata=metadata)
        description.write_text(json.dumps(about, indent=2) + "\n")


@torch.no_grad()
def without_tracks(model: WanDiT) -> WanDiT:
    """A video model without track channels that predicts what ``model`` does with its motion withheld; new weights.

    What a track head makes of no tracks is the same everywhere, a part of the patch embedding's bias.
    """
    config = replace(model.config, track_channels=0)
    state = {name: value.clone() for name, value in model.state_dict().items() if not name.startswith(TRACK_HEAD)}
    columns = dict(_columns(state[INPUTS], model.config.input_layout))
    track = columns.pop("track", None)
    state[INPUTS] = torch.cat(list(columns.values()), dim=1)
    if track is not None and model.config.has_track_head:
        nothing = track.new_zeros(1, model.config.track_map_dim, 1, 1, 1)
        state["patch_embedding.bias"] += torch.einsum("dcfpq,c->d", track, model.track_head(nothing).flatten())
    bare = WanDiT(config)
    bare.load_state_dict(state)
    bare.latent_space = model.latent_space
    return bare


def read_dit_config(folder: str | Path) -> WanConfig:
    """Config of a folder that `save_dit` wrote; raises FileNotFoundError where there is none, ValueError where it is of
    another network.
    """
    values = _read_description(Path(folder), "config")
    try:
        return WanConfig.from_dict(values)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{folder} is not of a DiT: {error}") from error


def read_provenance(folder: str | Path) -> dict[str, Any]:
    """What `save_dit` was told about where the weights come from: by the weights, where they say so themselves."""
    described = _read_description(Path(folder), "provenance")
    carried = _metadata(Path(folder)).get("provenance")
    return described if carried is None else json.loads(carried)


def load_dit(folder: str | Path, expected: WanConfig | None = None) -> WanDiT:
    """The model in a folder that `save_dit` wrote, on CPU, in the dtype it was saved in.

    ``expected``: raises ValueError naming the fields in which the saved architecture differs, before anything
    is built; its runtime fields (attention backend, activation checkpointing) are used.
    """
    folder = Path(folder)
    config = read_dit_config(folder)
    if expected is not None:
        if differences := config.architecture_differences(expected):
            raise ValueError(
                f"{folder} holds another architecture (field: saved, expected): {'; '.join(differences)}; "
                "change the model config, or give another folder"
            )
        config = expected
    _check_weights_config(folder / WEIGHTS_NAME, config)
    state = read_weights(folder / WEIGHTS_NAME)
    with torch.device("meta"):  # no memory and no time for weights that are replaced
        model = WanDiT(config)
    load_state(model, state, folder / WEIGHTS_NAME, assign=True)
    model.latent_space = _saved_latent_space(folder)
    return model.requires_grad_(True)


def read_state(path: str | Path) -> Any:
    """Content of a .safetensors or .pt/.pth/.bin file, or of a folder's (possibly sharded) safetensors files.

    Pickles are read with weights_only=True. A folder may be a whole diffusers pipeline: its transformer/ is
    read. Raises ValueError for a file that is damaged or holds no weights, FileNotFoundError for one that is absent.
    """
    path = Path(path)
    if path.is_dir():
        state: dict[str, Any] = {}
        for file in _weight_files(path):
            shard = read_weights(file)
            if twice := state.keys() & shard.keys():
                raise ValueError(f"{file} holds {shortened(twice)}, as another file of {path} does; get them again")
            state |= shard
        return state
    if not path.is_file():
        raise FileNotFoundError(f"no checkpoint at {path}; give a .safetensors or .pt file, or a folder of them")
    return read_weights(path)


def _weight_files(folder: Path) -> list[Path]:
    """Weight files of one model. An index decides, so that a second copy in the folder is never mixed in."""
    if not list(folder.glob("*.safetensors")) and (folder / "transformer").is_dir():
        folder = folder / "transformer"
    if indices := sorted(folder.glob("*.safetensors.index.json")):
        if len(indices) > 1:
            names = ", ".join(index.name for index in indices)
            raise ValueError(f"{folder} holds {names}: which model is meant? Leave one of them there")
        shards = _shards_in(indices[0])
        if absent := [shard for shard in shards if not (folder / shard).is_file()]:
            raise FileNotFoundError(f"{folder} lacks {shortened(absent)} of {indices[0].name}; download them too")
        return [folder / shard for shard in shards]
    files = sorted(folder.glob("*.safetensors"))
    if len(files) != 1:
        remedy = _folders_inside(folder) or "the path of one file"
        raise ValueError(f"{folder} holds {len(files)} .safetensors files and no index; give {remedy}")
    return files


def _shards_in(index: Path) -> list[str]:
    try:
        return sorted(set(json.loads(index.read_text())["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{index} is no index of weights: {error!r}; get the file again") from error


def _folders_inside(folder: Path) -> str:
    """The folders of weights in this one, or in its export/ where it is that of a stage."""
    found = [path.parent for place in ("*", "export/*") for path in sorted(folder.glob(f"{place}/{CONFIG_NAME}"))]
    return ", ".join(map(str, found))


def _read_description(folder: Path, part: str) -> dict[str, Any]:
    path = folder / CONFIG_NAME
    if not path.is_file():
        remedy = _folders_inside(folder) or "a folder that save_dit wrote"
        raise FileNotFoundError(f"no {CONFIG_NAME} in {folder}; give {remedy}")
    try:
        return json.loads(path.read_text())[part]
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{folder} is not of a DiT: its {CONFIG_NAME} tells no {part}; give another folder") from error


def _saved_config(path: Path) -> WanConfig | None:
    """The config inside a weights file of `save_dit`; None for public files, which do not tell."""
    config = _metadata(path).get("config")
    return None if config is None else WanConfig.from_dict(json.loads(config))


def _saved_latent_space(path: Path) -> LatentSpace | None:
    """The latent space that a weights file of `save_dit` was made in, where it tells."""
    space = _metadata(path).get("latent_space")
    return None if space is None else LatentSpace(**json.loads(space))


def _metadata(path: Path) -> dict[str, str]:
    """What a safetensors file, or that of a folder of ours, says beside its tensors; empty for what is none."""
    path = path / WEIGHTS_NAME if path.is_dir() else path
    if path.suffix != ".safetensors" or not path.is_file():
        return {}
    with reading_weights(path), safe_open(path, framework="pt") as file:
        return file.metadata() or {}


def _check_weights_config(weights: Path, config: WanConfig) -> None:
    """The weights file names its own config: a crash between the two renames of `save_dit` is noticed."""
    if not weights.is_file():
        raise FileNotFoundError(f"no {weights.name} beside {CONFIG_NAME} in {weights.parent}; get the whole folder")
    own = _saved_config(weights)
    if own is None:
        raise ValueError(f"{weights} names no config, so save_dit did not write it; read it with load_pretrained")
    if differences := own.architecture_differences(config):
        raise ValueError(
            f"{weights} was saved with another config than {CONFIG_NAME} says (field: weights, json): "
            f"{'; '.join(differences)}; an interrupted save, or a changed file: save the model again"
        )


def _with_bare_names(state: Mapping[str, Any]) -> dict[str, Any]:
    bare: dict[str, Any] = {}
    for name, tensor in state.items():
        if bare.setdefault(_bare_name(name), tensor) is not tensor:
            raise ValueError(f"it holds {_bare_name(name)} twice, under several prefixes; give a file of one model")
    return bare


def _bare_name(name: str) -> str:
    for wrapper in WRAPPERS:
        name = name.replace(wrapper, "")
    while prefix := next((prefix for prefix in PREFIXES if name.startswith(prefix)), None):
        name = name.removeprefix(prefix)
    return name


def _rename(state: Mapping[str, Tensor], top: dict[str, str], block: dict[str, str], source: str) -> StateDict:
    renamed, unknown = {}, []
    for name, tensor in state.items():
        new_name = name if name.startswith(TRACK_HEAD) else _translate(name, top, block)
        if new_name is None:
            unknown.append(name)
        else:
            renamed[new_name] = tensor
    if unknown:
        raise ValueError(f"not names of {source} weights: {shortened(unknown)}; give another file")
    return renamed


def _translate(name: str, top: dict[str, str], block: dict[str, str]) -> str | None:
    prefix, names = "", top
    if match := re.match(r"blocks\.\d+\.", name):
        prefix, names = match.group(), block
    local = name.removeprefix(prefix)
    if local in names:  # a bare parameter
        return prefix + names[local]
    module, _, parameter = local.rpartition(".")
    if module not in names or parameter not in ("weight", "bias"):
        return None
    return f"{prefix}{names[module]}.{parameter}"


def _check_architecture(state: StateDict, saved: WanConfig | None, config: WanConfig, path: str | Path) -> None:
    """What the file says of itself, or else what its weights show, must be the config's; input channels may grow."""
    if saved is None:
        expected = config.to_dict()
        found = _architecture(state, path)
        differences = [f"{name}: {value}, {expected[name]}" for name, value in found.items() if value != expected[name]]
    else:
        may_differ = INPUT_FIELDS if saved.has_track_head else (*INPUT_FIELDS, *TRACK_HEAD_FIELDS)
        differences = saved.architecture_differences(config, but=may_differ)
    if differences:
        raise ValueError(
            f"{path} holds another architecture (field: checkpoint, model): {'; '.join(differences)}; "
            "change the model config, or give another checkpoint"
        )


def _check_shapes(state: StateDict, model: WanDiT, path: str | Path) -> None:
    own = model.state_dict()
    found = [
        f"{name} {list(tensor.shape)}, {list(own[name].shape)}"
        for name, tensor in state.items()
        if name in own and tensor.shape != own[name].shape
    ]
    if found:
        raise ValueError(f"{path} holds tensors of other shapes (checkpoint, model): {shortened(found)}")


def _architecture(state: StateDict, path: str | Path) -> dict[str, Any]:
    required = (
        INPUTS,
        "blocks.0.ffn.0.weight",
        "head.head.weight",
        "time_embedding.0.weight",
    )
    if absent := [name for name in (*required, "text_embedding.0.weight") if name not in state]:
        raise ValueError(f"{path} is not a Wan transformer: it lacks {', '.join(absent)}")
    patch = state[INPUTS]
    clip = state.get("img_emb.proj.0.weight")
    return {
        "dim": patch.shape[0],
        "ffn_dim": state["blocks.0.ffn.0.weight"].shape[0],
        "num_layers": 1 + max(int(name.split(".")[1]) for name in state if name.startswith("blocks.")),
        "latent_channels": state["head.head.weight"].shape[0] // math.prod(patch.shape[2:]),
        "freq_dim": state["time_embedding.0.weight"].shape[1],
        "text_dim": state["text_embedding.0.weight"].shape[1],
        "patch_size": list(patch.shape[2:]),
        "qk_norm": "blocks.0.self_attn.norm_q.weight" in state,
        "cross_attn_norm": "blocks.0.norm3.weight" in state,
        "clip_dim": None if clip is None else clip.shape[0],
    }


def _input_layout(in_channels: int, config: WanConfig) -> InputLayout:
    """What the input channels of a public checkpoint mean, by their number; see WanConfig.input_layout."""
    noisy, mask = ("noisy", config.latent_channels), ("mask", MASK_CHANNELS)
    image, control = ("image", config.latent_channels), ("track", config.latent_channels)
    text_to_video, image_to_video = [noisy], [noisy, mask, image]
    fun_control, wan22_fun_control = [noisy, control, image], [noisy, control, mask, image]
    public = (text_to_video, image_to_video, fun_control, wan22_fun_control)
    found = [layout for layout in public if sum(width for _, width in layout) == in_channels]
    if config.input_layout in found or (not found and in_channels == config.in_channels):
        return config.input_layout
    if len(found) != 1:
        sizes = ", ".join(str(sum(width for _, width in layout)) for layout in public)
        raise ValueError(
            f"cannot tell the meaning of {in_channels} input channels; with {config.latent_channels} latent "
            f"channels the known layouts have {sizes}: text-to-video, image-to-video, control, 2.2 control"
        )
    return found[0]


def _grown_inputs(weight: Tensor, layout: InputLayout, model: WanDiT) -> Tensor:
    """patch_embedding.weight [D, old channels, ...] -> [D, in_channels, ...], by what the channels mean."""
    config = model.config
    old_columns = dict(_columns(weight, layout))
    columns = []
    for part, initial in _columns(model.patch_embedding.weight.detach(), config.input_layout):
        old = old_columns.pop(part, None)
        if old is not None and old.shape[1] != initial.shape[1]:
            raise ValueError(
                f"the checkpoint has {old.shape[1]} {part} channels, the model {initial.shape[1]}; make them equal"
            )
        if old is None:
            reads_head = part == "track" and config.has_track_head
            old = (initial if reads_head else torch.zeros_like(initial)).to(weight)
        columns.append(old)
    if old_columns:
        raise ValueError(
            f"the checkpoint's {', '.join(old_columns)} channels have no place in image_conditioning="
            f"'{config.image_conditioning}' with track_channels={config.track_channels}; change one of these"
        )
    return torch.cat(columns, dim=1)


def _columns(weight: Tensor, layout: InputLayout) -> Iterable[tuple[str, Tensor]]:
    """The columns of patch_embedding.weight by the part that they read."""
    names, widths = zip(*layout)
    return zip(names, weight.split(widths, dim=1))
