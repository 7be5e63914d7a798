"""Random weights of full size: every command takes them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from data.app import build_config, compose_config
from eval.random_weights import make
from models.assemble import build_clip_encoder, build_tiny_vae, load_role, validate
from stream.codecs import Codecs


def test_a_stream_is_made_of_them(tmp_path: Path):
    printed = subprocess.run(
        [sys.executable, "-m", "eval.random_weights", "--model", "tiny", "--out", str(tmp_path), "--device", "cpu"],
        check=True, capture_output=True, text=True,
    ).stdout.split()  # fmt: skip
    command = [sys.executable, "-m", "eval", "bench=latency", "bench.num_chunks=50", "device=cpu", *printed]
    subprocess.run([*command, f"out={tmp_path / 'out'}"], check=True, capture_output=True)
    assert (tmp_path / "out" / "metrics.json").is_file()


@pytest.mark.parametrize("name", ["wan_1_3b", "wan_5b"])
def test_all_parts_of_a_wan_model_are_there_and_fit(tmp_path: Path, name: str):
    """Its own, a few channels wide: clip encoder, text without UMT5, tiny VAE of the same latents."""
    small = ["model.dit.dim=64", "model.dit.ffn_dim=64", "model.dit.num_heads=4", "model.dit.num_layers=1"]
    small += ["model.vae.base_dim=4"] + (["model.vae.decoder_base_dim=4"] if name == "wan_5b" else [])
    small += ["model.dit.clip_dim=64"] if name == "wan_1_3b" else []
    model = ["image=unused", f"model={name}", *small]
    made = make(build_config(compose_config("stream", model).model), tmp_path, torch.device("cpu"))
    cfg = build_config(compose_config("stream", ["image=unused", *small, *made]).model)
    validate(cfg)
    codecs = Codecs.load(cfg)
    assert build_tiny_vae(cfg, codecs.vae.latent_space).spatial_stride == codecs.cell_px
    assert (build_clip_encoder(cfg) is not None) == (name == "wan_1_3b")
    assert codecs.encode_prompts(["any words"]).shape == (1, cfg.dit.text_len, cfg.dit.text_dim)
    for role in ("teacher", "student"):
        assert all(parameter.isfinite().all() for parameter in load_role(cfg, role).parameters())
