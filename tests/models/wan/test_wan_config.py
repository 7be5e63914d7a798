"""Presets have the published sizes; the config refuses contradictions and round-trips."""

from __future__ import annotations

import pytest
import torch
from omegaconf import OmegaConf
from omegaconf.errors import ConfigKeyError

from models.wan.config import WanConfig
from models.wan.dit import WanDiT

FUN_CONTROL = {"image_conditioning": "fun_control", "track_channels": 16, "clip_dim": 1280}


@pytest.mark.parametrize(
    ("config", "in_channels", "millions", "tensors"),
    [
        (WanConfig.wan_1_3b(), 16, 1419.0, 825),
        (WanConfig.wan_14b(image_conditioning="inp", clip_dim=1280), 36, 16394.9, 1303),
        (WanConfig.wan_5b(), 48, 4999.8, 825),
        (WanConfig.wan_1_3b(image_conditioning="inp", clip_dim=1280), 36, 1564.4, 983),
        (WanConfig.wan_1_3b(**FUN_CONTROL), 48, 1564.5, 983),
    ],
    ids=["T2V-1.3B", "I2V-14B", "TI2V-5B", "Fun-1.3B-InP", "Fun-1.3B-Control"],
)
def test_parameter_counts(config: WanConfig, in_channels: int, millions: float, tensors: int):
    with torch.device("meta"):
        model = WanDiT(config)
    sizes = [p.numel() for name, p in model.state_dict().items() if not name.startswith("track_head.")]
    assert config.in_channels == in_channels
    assert round(sum(sizes) / 1e6, 1) == millions and len(sizes) == tensors
    if config.track_channels:
        assert sum(sizes) == 1_564_502_336  # fixed by the size of the published file


def test_input_layouts():
    def parts(**overrides: object) -> list[str]:
        return [part for part, _ in WanConfig.tiny(**overrides).input_layout]

    assert parts() == ["noisy"]
    assert parts(track_channels=4) == ["noisy", "track"]
    assert parts(image_conditioning="first_frame", track_channels=4) == ["noisy", "track"]
    assert parts(image_conditioning="fun_control", track_channels=4) == ["noisy", "track", "image"]
    assert parts(image_conditioning="inp", track_channels=4) == ["noisy", "mask", "image", "track"]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"dim": 81}, "dim=81 must be num_heads=2"),
        ({"dim": 82}, "even head_dim"),
        ({"num_heads": 0}, "num_heads=0 must be at least 1"),
        ({"num_layers": 0}, "num_layers=0 must be at least 1"),
        ({"clip_dim": 0}, "clip_dim=0 must be at least 1"),
        ({"track_channels": -1}, "track_channels=-1 must be at least 0"),
        ({"freq_dim": 33}, "freq_dim=33 must be even"),
        ({"track_id_dim": 7}, "track_id_dim=7 must be even"),
        ({"patch_size": [1, 0, 2]}, r"patch_size=\[1, 0, 2\]"),
        ({"patch_size": [2, 2, 2]}, r"patch_size=\[2, 2, 2\]"),
        ({"image_conditioning": "gray"}, "image_conditioning='gray' must be one of none, first_frame"),
        ({"track_encoding": "mlp"}, "track_encoding='mlp'"),
        ({"attention_backend": "fa9"}, "attention_backend='fa9' must be one of sdpa, matmul, flex, flash"),
    ],
)
def test_contradictions_are_refused(overrides: dict, message: str):
    with pytest.raises(ValueError, match=message):
        WanConfig.tiny(**overrides)


def test_dict_round_trip():
    config = WanConfig.tiny(**FUN_CONTROL)
    assert WanConfig.from_dict(config.to_dict()) == config
    with pytest.raises(ValueError, match="no field num_layer;"):
        WanConfig.from_dict(config.to_dict() | {"num_layer": 3})


def test_differences_leave_runtime_fields_out():
    config = WanConfig.tiny()
    assert not config.architecture_differences(WanConfig.tiny(attention_backend="matmul"))
    assert config.architecture_differences(WanConfig.tiny(num_layers=3, track_channels=4)) == [
        "num_layers: 2, 3",
        "track_channels: 0, 4",
    ]


def test_is_an_omegaconf_schema():
    merged = OmegaConf.merge(OmegaConf.structured(WanConfig), WanConfig.tiny().to_dict(), {"clip_dim": 1280})
    assert OmegaConf.to_object(merged) == WanConfig.tiny(clip_dim=1280)
    with pytest.raises(ConfigKeyError):
        OmegaConf.merge(OmegaConf.structured(WanConfig), {"num_layer": 3})
