"""The encode step: clips to latents, captions to text embeddings, first frames to CLIP features.

Which encoders, and where their weights are, is told by the composed `model` config. Their fingerprints are
written into the index, so that latents of another VAE are refused by the loader. Under torchrun the processes
share the clips, each on its own device.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from omegaconf import DictConfig
from torch import Tensor
from tqdm import tqdm

from data.progress import (
    TRY_AGAIN,
    ask_for,
    done_keys,
    is_done,
    is_made_now,
    mark,
    marker,
    read_rendered,
    read_sidecar,
    stamp,
    unmark,
)
from data.shards import trim_text
from data.video import UnreadableVideo
from models.device import DTYPES, fast_dtype, pick_device
from models.files import remove_abandoned, replace_file, write_json

if TYPE_CHECKING:
    from models.assemble import ModelConfig

log = logging.getLogger(__name__)

SAMPLED_BYTES = 1 << 20  # of the start and the end of each weight file: enough to tell versions apart
TEXT_PARTS = ("text_encoder", "tokenizer")  # what UMT5 reads of a whole repository at model.text.path


@dataclass
class EncodeConfig:
    batch_size: int = 8  # clips per forward pass
    device: str = "cpu"  # auto | cpu | cuda
    dtype: str = "float32"  # of VAE, text encoder and CLIP: float32 | bfloat16 | auto, the faster on the device

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise ValueError(f"encode.batch_size={self.batch_size} must be >= 1")
        if self.dtype == "auto":  # settled here: latents know the dtype that made them
            self.dtype = fast_dtype(pick_device(self.device, "encode.device"))
        if self.dtype not in DTYPES:
            raise ValueError(f"encode.dtype={self.dtype!r} must be one of {', '.join(DTYPES)}, auto")


@dataclass
class Encoders:
    vae: Any
    text: Any
    image: Any | None
    fingerprints: dict[str, str]


def encode_clips(cfg: EncodeConfig, out: Path, model: DictConfig, may_skip: bool = False) -> int:
    """Encode every tracked clip that is not encoded with these weights yet; returns the number of clips that the
    encoders do not reject (another process may still be at some), 0 with the reason in the log if they reject all.

    may_skip: without a VAE do nothing, saying so (step=all), instead of failing (step=encode).
    """
    rendered = set(done_keys(out, "render"))  # not all that have tracks, if fewer clips were asked for since
    keys = [key for key in done_keys(out, "track") if key in rendered]
    if may_skip and model.vae.path is None:
        log.info(
            "encode: skipped, model.vae.path is null: set it to a VAE folder to store latents with the clips; then run "
            "step=encode and step=pack"
        )
        return len(keys)
    rank, world = process_share()
    if cfg.device == "cuda":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    encoders = build_encoders(cfg, model)
    mine = keys[rank::world]
    clips = {key: marker(out, "render", key) for key in keys}
    stamps = {key: stamp(encoders.fingerprints, cfg.dtype, clip["clip"]) for key, clip in clips.items()}
    pending = [key for key in mine if not is_done(out, "encode", key, stamps[key])]
    log.info("encode: %d of %d clips to do", len(pending), len(mine))
    (out / "encoded").mkdir(exist_ok=True)
    if rank == 0:
        remove_abandoned(out / "encoded")
        ask_for(out, "encode", keys)
        text_len = encoders.text.null().shape[1]
        about = {"text_len": text_len, "fingerprints": encoders.fingerprints, "dtype": cfg.dtype}
        write_json(out / "encoded" / "about.json", about)
    with tqdm(total=len(pending), desc="encode", unit="clip") as bar:
        for group in _groups(pending, cfg.batch_size):
            for key, arrays, error in _encode_group(cfg, encoders, out, group):
                unmark(out, "encode", key)
                if error is None:
                    _save(out / "encoded" / f"{key}.npz", arrays)
                else:
                    log.warning("encode: %s rejected: %s", key, error)
                made_with = TRY_AGAIN if isinstance(error, UnreadableVideo) else stamps[key]
                reason = None if error is None else str(error)
                mark(out, "encode", key, made_with, clips[key]["origin"], reason, clips[key]["clip"])
                bar.update()
    return _not_rejected(out, stamps)


def _not_rejected(out: Path, stamps: dict[str, str]) -> int:
    """Number of the clips that are not rejected, for ever or for now; if there are none, the log says why."""
    notes = [(marker(out, "encode", key), made_with) for key, made_with in stamps.items()]
    reasons = [note["rejected"] for note, made_with in notes if note.get("stamp") in (made_with, TRY_AGAIN)]
    reasons = [reason for reason in reasons if reason is not None]
    if reasons and len(reasons) == len(stamps):
        log.error(
            "every clip was rejected by encode; first reason: %s. For captions in any words set "
            "model.text.kind=hashed or umt5",
            reasons[0],
        )
    return len(stamps) - len(reasons)


def encoded_now(out: Path, keys: Sequence[str]) -> list[str]:
    """Those of the keys whose latents are by the weights and dtype that encoded/about.json names, of the clip as it
    is rendered now.
    """
    path = out / "encoded" / "about.json"
    if not path.is_file():
        return []
    about = json.loads(path.read_text())
    return [key for key in keys if is_made_now(out, "encode", key, about["fingerprints"], about["dtype"])]


def process_share() -> tuple[int, int]:
    """Rank of this process and number of processes, as torchrun tells them; (0, 1) without it."""
    return int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))


def require_encoders(model: DictConfig) -> None:
    """Refuse encoders that cannot be loaded, before anything is made for them. Without a VAE none is loaded.

    Raises FileNotFoundError where nothing is at a path that is set, ValueError for umt5 without one.
    """
    from models.assemble import located

    if model.vae.path is None:
        return
    if not (Path(located(model.vae.path)) / "config.json").is_file():
        raise FileNotFoundError(
            f"model.vae.path={model.vae.path} holds no VAE (no config.json); set it to a folder of one, or to null for "
            "clips and tracks alone, on which `python -m train stage=vae` trains one"
        )
    if model.text.kind == "umt5" and model.text.path is None:
        raise ValueError("model.text.path is null; model.text.kind=umt5 needs the folder of its text_encoder/")
    for name, path in (("text.path", model.text.path), ("clip_encoder", model.clip_encoder)):
        if path is not None and not Path(located(path)).exists():
            raise FileNotFoundError(f"model.{name}={path}: there is nothing; set it to the folder of the weights")


def build_encoders(cfg: EncodeConfig, model: DictConfig) -> Encoders:
    """VAE, text encoder and, where model.clip_encoder is set, CLIP, frozen on cfg.device."""
    from data.app import build_config
    from models.assemble import ModelConfig, build_clip_encoder, build_text_encoder, build_vae

    settings = build_config(model, ModelConfig)
    vae, text, image = build_vae(settings), build_text_encoder(settings), build_clip_encoder(settings)
    for module in (vae, text, image):
        if isinstance(module, torch.nn.Module):
            module.to(cfg.device, DTYPES[cfg.dtype]).eval().requires_grad_(False)
    return Encoders(vae, text, image, fingerprints(settings))


def fingerprints(model: ModelConfig) -> dict[str, str]:
    """What makes latents and embeddings, known by the content of the weights, not by their place."""
    found = {
        "vae": fingerprint(model.vae.path),
        "text": fingerprint(model.text.path, model.text.kind, model.dit.text_len, parts=TEXT_PARTS),
    }
    if model.clip_encoder is not None:
        found["clip"] = fingerprint(model.clip_encoder)
    return found


def fingerprint(path: str | None, *settings: str | int, parts: Sequence[str] = ()) -> str:
    """Hash of settings and of the files at a path: their names, sizes, first and last MiB.

    parts: subfolders that alone are read; of a folder that lacks one of them, everything is. Hidden files and folders
    never count: downloads keep notes with their times there. Raises FileNotFoundError where there is nothing.
    """
    if path and not Path(path).exists():
        raise FileNotFoundError(f"{path} does not exist; weights are expected there")
    digest = hashlib.sha256(json.dumps(settings).encode())
    for file in _weight_files(Path(path), parts) if path else []:
        size = file.stat().st_size
        digest.update(f"{file.name} {size}".encode())
        with file.open("rb") as content:
            digest.update(content.read(SAMPLED_BYTES))
            content.seek(max(0, size - SAMPLED_BYTES))
            digest.update(content.read(SAMPLED_BYTES))
    return digest.hexdigest()[:16]


def _weight_files(root: Path, parts: Sequence[str]) -> list[Path]:
    if not root.is_dir():
        return [root]
    folders = [root / part for part in parts]
    if not folders or not all(folder.is_dir() for folder in folders):
        folders = [root]
    found = [file for folder in folders for file in folder.rglob("*") if file.is_file()]
    return sorted(file for file in found if not any(n.startswith(".") for n in file.relative_to(root).parts))


@torch.no_grad()
def _encode_group(
    cfg: EncodeConfig, encoders: Encoders, out: Path, keys: list[str]
) -> Iterator[tuple[str, dict[str, np.ndarray], ValueError | None]]:
    """(key, arrays, None) or (key, {}, why its caption cannot be encoded or its clip not be read)."""
    usable, texts, clips = [], [], []
    for key in keys:
        try:
            caption = read_sidecar(out, key)["caption"]
            text, frames = _half(encoders.text.encode([caption]))[0], read_rendered(out, key)
        except ValueError as error:  # a word or a length that this text encoder does not know, or the clip is broken
            yield key, {}, error
            continue
        usable.append(key)
        texts.append(text)
        clips.append(frames)
    if not usable:
        return
    pixels = torch.from_numpy(np.stack(clips)).permute(0, 4, 1, 2, 3).to(cfg.device).to(DTYPES[cfg.dtype]) / 127.5 - 1
    latents = _half(encoders.vae.encode(pixels))
    features = None if encoders.image is None else _half(encoders.image.encode(pixels[:, :, 0]))
    for n, key in enumerate(usable):
        arrays = {"latents": latents[n], "text": trim_text(texts[n])}
        if features is not None:
            arrays["clip"] = features[n]
        yield key, arrays, None


def _half(values: Tensor) -> np.ndarray:
    return values.float().cpu().numpy().astype(np.float16)


def _groups(keys: Sequence[str], size: int) -> Iterator[list[str]]:
    for start in range(0, len(keys), size):
        yield list(keys[start : start + size])


def _save(path: Path, arrays: dict[str, Any]) -> None:
    with replace_file(path) as fresh, fresh.open("wb") as file:
        np.savez(file, **arrays)
