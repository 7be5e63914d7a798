"""Random weights of a model's full size, to measure speed and memory before anything is downloaded or trained.

`python -m eval.random_weights --model wan_1_3b --out weights/random` writes a DiT for both roles, the VAE, a tiny one
and, where the model reads it, a CLIP encoder of ViT-H/14, and prints the settings that name them:

    python -m eval bench=latency $(python -m eval.random_weights --model wan_1_3b --out weights/random)

What a chunk costs does not depend on its weights. Captions are read by their words' checksums (`text.kind=hashed`): the
text encoder runs once a prompt, and is left out.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
from torch import nn

from data.app import CONF_DIR, build_config, compose_config
from data.config_errors import choices_of
from models.assemble import ModelConfig, build_vae
from models.device import pick_device
from models.vae.tiny_vae import PRESETS, TinyVae, TinyVaeConfig
from models.wan.checkpoint import save_dit
from models.wan.dit import WanDiT
from models.wan.text_encoder import VocabularyEncoder

STD = 0.02  # small enough that no feature overflows


def make(model_cfg: ModelConfig, out: Path, device: torch.device) -> list[str]:
    """Writes all parts below ``out``; returns the settings, as a command takes them, that name them."""
    vae = build_vae(model_cfg, seed=0)
    vae.save(out / "vae")
    model_cfg.dit.text_dim = VocabularyEncoder.dim_for(model_cfg.dit.text_len)
    settings: dict[str, object] = {
        "model.vae.path": out / "vae",
        "model.teacher": out / "dit",
        "model.student": out / "dit",
        "model.text.kind": "hashed",
        "model.text.path": "null",
        "model.dit.text_dim": model_cfg.dit.text_dim,
    }
    with torch.device("meta"):
        dit = WanDiT(model_cfg.dit)
    save_dit(_filled(dit, model_cfg.torch_dtype, device), out / "dit", weights="random")
    if (tiny := _tiny_config(model_cfg)) is not None:
        TinyVae.from_config(tiny, vae.latent_space).save(out / "tiny_vae")
        settings["model.tiny_vae"] = out / "tiny_vae"
    if model_cfg.dit.clip_dim is not None:
        _save_clip(model_cfg, out / "clip", device)
        settings["model.clip_encoder"] = out / "clip"
    return [f"model={model_cfg.name}", *(f"{name}={value}" for name, value in settings.items())]


def _tiny_config(model_cfg: ModelConfig) -> TinyVaeConfig | None:
    """The largest preset that decodes such latents, which is MotionStream's for Wan 2.2; None where none does."""
    channels = model_cfg.vae.z_dim
    presets = [TinyVaeConfig.preset(name, channels) for name in PRESETS]
    fitting = [preset for preset in presets if preset.latent_shape == (channels, model_cfg.vae.spatial_stride)]
    return max(fitting, key=lambda preset: sum(preset.decoder_widths), default=None)


def _save_clip(model_cfg: ModelConfig, folder: Path, device: torch.device) -> None:
    from transformers import CLIPVisionConfig, CLIPVisionModel

    assert model_cfg.dit.clip_dim is not None
    config = CLIPVisionConfig(
        hidden_size=model_cfg.dit.clip_dim, intermediate_size=4 * model_cfg.dit.clip_dim, num_hidden_layers=32,
        num_attention_heads=16, image_size=224, patch_size=14,
    )  # fmt: skip
    with device:
        _filled(CLIPVisionModel(config), model_cfg.torch_dtype, device).save_pretrained(folder)


@torch.no_grad()
def _filled(module: nn.Module, dtype: torch.dtype, device: torch.device) -> nn.Module:
    """The module there, every parameter drawn from N(0, STD²)."""
    is_meta = any(parameter.is_meta for parameter in module.parameters())
    module = module.to(dtype)
    module = module.to_empty(device=device) if is_meta else module.to(device)
    for parameter in module.parameters():
        parameter.normal_(std=STD)
    return module


def main() -> None:
    """Entry of `python -m eval.random_weights`."""
    parser = argparse.ArgumentParser(
        prog="python -m eval.random_weights", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", choices=choices_of(CONF_DIR / "model"), default="wan_1_3b", help="of conf/model")
    parser.add_argument(
        "--out", type=Path, required=True, help="folder to write to; a folder of the model's name in it"
    )
    parser.add_argument("--device", default="auto", help="where weights are drawn: auto, cpu or cuda")
    arguments = parser.parse_args()
    model_cfg = build_config(compose_config("stream", [f"model={arguments.model}", "image=unused"]).model)
    try:
        device = pick_device(arguments.device, "--device")
    except ValueError as error:
        parser.error(str(error))
    out = arguments.out / arguments.model
    print(f"random weights of {arguments.model} are written to {out}", file=sys.stderr)
    print(*make(model_cfg.on(device), out, device))


if __name__ == "__main__":
    main()
