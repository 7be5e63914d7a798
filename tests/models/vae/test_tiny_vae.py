"""The tiny VAE: public layout, parallel = sequential = streaming, latent space asserted."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.nn import functional as F

from models.vae.latent_space import LatentSpace
from models.vae.tiny_vae import LATENTS_PER_CALL, Grow, MemoryBlock, TimePool, TinyVae, TinyVaeConfig

WAN_LATENTS = Path(__file__).parents[4] / "shared" / "data" / "wan_latents.safetensors"
SMALL = TinyVaeConfig(decoder_widths=[24, 16, 12, 8], encoder_width=12)
SMALL_SHUFFLED = TinyVaeConfig(latent_channels=48, patch_size=2, decoder_widths=[24, 16, 12, 8], encoder_width=12)


def make(cfg: TinyVaeConfig) -> TinyVae:
    space = LatentSpace.of((0.0,) * cfg.latent_channels, (1.0,) * cfg.latent_channels, cfg.spatial_stride)
    return TinyVae.from_config(cfg, space, seed=1)


def one_step(layers: list, frame: torch.Tensor, memory: dict, index: int = 0) -> list[torch.Tensor]:
    """Independent reference: one frame [B, C, h, w] through the layers, depth first -> resulting frames."""
    if index == len(layers):
        return [frame]
    layer = layers[index]
    if isinstance(layer, MemoryBlock):
        past = memory.get(index, torch.zeros_like(frame))
        memory[index] = frame
        stacked = layer.conv[0](torch.cat([frame, past], 1))
        frames = [F.relu(layer.conv[4](F.relu(layer.conv[2](F.relu(stacked)))) + frame)]
    elif isinstance(layer, TimePool):
        waiting = [*memory.pop(index, []), frame]
        if len(waiting) < layer.stride:
            memory[index] = waiting
            return []
        frames = [layer.conv(torch.cat(waiting, 1))]
    elif isinstance(layer, Grow):  # in the published order: pixels repeated first
        frames = list(layer.conv(frame.repeat_interleave(2, -1).repeat_interleave(2, -2)).chunk(layer.stride, dim=1))
    else:
        frames = [layer(frame)]
    return [out for each in frames for out in one_step(layers, each, memory, index + 1)]


@torch.no_grad()
def sequential_decode(vae: TinyVae, latents: torch.Tensor) -> torch.Tensor:
    memory: dict = {}
    frames = [out for z in latents.unbind(2) for out in one_step(list(vae.decoder), z, memory)][3:]
    rgb = torch.stack([F.pixel_shuffle(frame, vae.config.patch_size) for frame in frames], dim=2)
    return rgb.clamp(0, 1) * 2 - 1


@torch.no_grad()
def sequential_encode(vae: TinyVae, pixels: torch.Tensor) -> torch.Tensor:
    memory: dict = {}
    frames = [*pixels.unbind(2), *[pixels[:, :, -1]] * (-pixels.shape[2] % 4)]
    patches = [F.pixel_unshuffle(frame * 0.5 + 0.5, vae.config.patch_size) for frame in frames]
    return torch.stack([out for patch in patches for out in one_step(list(vae.encoder), patch, memory)], dim=2)


@pytest.mark.parametrize("cfg", [SMALL, SMALL_SHUFFLED], ids=["p1", "p2"])
def test_channels_last_changes_rounding_only(cfg):
    vae = make(cfg)
    latents = torch.randn(2, cfg.latent_channels, 5, 3, 4, generator=torch.Generator().manual_seed(0))
    expected = vae.decode(latents)
    stream = vae.use_channels_last().streaming()
    found = torch.cat([stream.push(part) for part in latents.tensor_split([1, 3], dim=2)], dim=2)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("cfg", [SMALL, SMALL_SHUFFLED, TinyVaeConfig.sprites()], ids=["p1", "p2", "sprites"])
def test_parallel_equals_sequential_equals_streaming(cfg):
    vae = make(cfg)
    latents = torch.randn(2, cfg.latent_channels, 5, 3, 4, generator=torch.Generator().manual_seed(0))
    whole = vae.decode(latents)
    assert whole.shape == (2, 3, 17, 3 * cfg.spatial_stride, 4 * cfg.spatial_stride)
    assert whole.std() > 0.01  # not everything is clamped
    torch.testing.assert_close(whole, sequential_decode(vae, latents), atol=1e-6, rtol=0)
    for chunks in [(1,) * 5, (2, 3), (3, 1, 1)]:
        stream = vae.streaming()
        parts = [stream.push(part) for part in latents.split(chunks, dim=2)]
        assert [part.shape[2] for part in parts] == [4 * n - 3 * (i == 0) for i, n in enumerate(chunks)]
        torch.testing.assert_close(torch.cat(parts, 2), whole, atol=1e-6, rtol=0)


def test_a_whole_clip_is_decoded_a_few_latents_at_a_time(monkeypatch):
    vae, lengths, reconstruct = make(SMALL), [], TinyVae.reconstruct

    def counted(self, latents, state=None):
        lengths.append(latents.shape[2])
        return reconstruct(self, latents, state)

    monkeypatch.setattr(TinyVae, "reconstruct", counted)
    assert vae.decode(torch.zeros(1, 16, 7, 2, 2)).shape[2] == 25
    assert lengths == [LATENTS_PER_CALL, LATENTS_PER_CALL, 1]


@pytest.mark.parametrize("num_frames", [5, 8, 17])
@pytest.mark.parametrize("cfg", [SMALL, SMALL_SHUFFLED], ids=["p1", "p2"])
def test_encoder_equals_sequential(cfg, num_frames):
    vae = make(cfg)
    pixels = torch.rand(1, 3, num_frames, 32, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    latents = vae.encode(pixels)
    assert latents.shape[2] == -(-num_frames // 4)
    torch.testing.assert_close(latents, sequential_encode(vae, pixels), atol=1e-6, rtol=0)


def test_memory_reaches_back_but_never_forward():
    vae = make(SMALL)
    latents = torch.randn(1, 16, 5, 2, 2, generator=torch.Generator().manual_seed(0))
    changed = latents.clone()
    changed[:, :, 2] += 1
    a, b = vae.decode(latents), vae.decode(changed)
    assert torch.equal(a[:, :, :5], b[:, :, :5])
    assert not torch.equal(a[:, :, 5:9], b[:, :, 5:9])
    assert not torch.equal(a[:, :, 9:13], b[:, :, 9:13])


def test_public_sizes_and_names():
    def millions(module: torch.nn.Module) -> float:
        return round(sum(p.numel() for p in module.parameters()) / 1e6, 3)

    with torch.device("meta"):
        one = TinyVae(TinyVaeConfig.taew2_1(), LatentSpace.wan_2_1())
        two = TinyVae(TinyVaeConfig.taew2_2(), LatentSpace.wan_2_2())
        large = TinyVae(TinyVaeConfig.wan_2_2_large(), LatentSpace.wan_2_2())
    assert (millions(one.decoder), millions(one.encoder)) == (9.845, 1.471)
    assert (millions(two.decoder), millions(two.encoder)) == (9.924, 1.495)
    assert millions(large.decoder) == pytest.approx(56.7, abs=0.05)
    names = one.state_dict()
    assert names["decoder.1.weight"].shape == (256, 16, 3, 3)
    assert names["decoder.3.conv.0.weight"].shape == (256, 512, 3, 3)
    assert names["decoder.13.conv.weight"].shape == (
        256,
        128,
        1,
        1,
    )  # the first block that doubles the frame rate
    assert "decoder.14.bias" not in names and names["decoder.22.bias"].shape == (3,)
    assert names["encoder.2.conv.weight"].shape == (64, 128, 1, 1)
    assert names["encoder.17.weight"].shape == (16, 64, 3, 3)


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_a_public_file_loads_strictly(tmp_path, suffix):
    from safetensors.torch import save_file

    state = TinyVae.from_config(TinyVaeConfig.taew2_2(), LatentSpace.wan_2_2(), seed=4).state_dict()
    path = tmp_path / f"taew2_2{suffix}"
    save_file(state, path) if suffix == ".safetensors" else torch.save(state, path)
    loaded = TinyVae.from_file(path, LatentSpace.wan_2_2()).state_dict()
    assert all(torch.equal(loaded[name], state[name]) for name in state)
    with pytest.raises(ValueError, match=f"{path} does not hold .* this TinyVae .*of another shape: decoder.1.weight"):
        TinyVae.from_file(path, LatentSpace.wan_2_1())
    torch.save([1], tmp_path / "list.pth")
    with pytest.raises(ValueError, match=r"list.pth does not hold .*absent: decoder.1.bias, .* and \d+ more"):
        TinyVae.from_file(tmp_path / "list.pth", LatentSpace.wan_2_2())
    with pytest.raises(ValueError, match="no published tiny VAE"):
        TinyVae.from_file(path, LatentSpace.of((0.5,) * 16, (1.0,) * 16, 8))


def test_the_latent_space_is_kept_and_asserted(tmp_path):
    vae = make(TinyVaeConfig.sprites())
    vae.save(tmp_path / "tiny")
    loaded = TinyVae.from_folder(tmp_path / "tiny", expected=vae.latent_space)
    latents = torch.randn(1, 8, 2, 4, 4, generator=torch.Generator().manual_seed(0))
    assert torch.equal(loaded.decode(latents), vae.decode(latents))
    other = LatentSpace.of((0.1,) * 8, (1.0,) * 8, 4)
    with pytest.raises(ValueError, match="another latent space \\(fingerprint"):
        TinyVae.from_folder(tmp_path / "tiny", expected=other)
    with pytest.raises(ValueError, match="stride 4 cannot decode"):
        TinyVae(TinyVaeConfig.sprites(), LatentSpace.wan_2_1())


@pytest.mark.parametrize(
    ("description", "told"),
    [
        ("{", "model.json is not JSON"),
        ('{"config": {}}', "its model.json tells no latent_space; pass a folder made by stage=tiny_vae"),
        ('{"config": {"num_layers": 2}, "latent_space": {}}', "no tiny VAE in .*num_layers"),
    ],
)
def test_a_folder_of_another_network_is_named(tmp_path, description, told):
    make(TinyVaeConfig.sprites()).save(tmp_path / "tiny")
    (tmp_path / "tiny/model.json").write_text(description)
    with pytest.raises(ValueError, match=told):
        TinyVae.from_folder(tmp_path / "tiny")


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"encoder_width": 0}, "encoder_width=0, .* must be at least 1"),
        ({"decoder_widths": [8, 8, 8]}, "must have 4 entries"),
        ({"time_upscale": [True, True, True]}, "true exactly twice"),
    ],
)
def test_impossible_configs_are_refused(change, told):
    with pytest.raises(ValueError, match=told):
        TinyVaeConfig(**change)


def test_training_path_reaches_every_decoder_weight():
    vae = make(TinyVaeConfig.sprites())
    rgb, _ = vae.reconstruct(torch.randn(1, 8, 3, 4, 4, generator=torch.Generator().manual_seed(0)))
    rgb.square().mean().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in vae.decoder.parameters())


@pytest.mark.skipif(not WAN_LATENTS.exists(), reason=f"no real latents at {WAN_LATENTS}")
def test_real_wan_latents_are_normalised_and_decodable():
    latents = load_file(WAN_LATENTS)["latents"].float()
    assert latents.shape[1] == LatentSpace.wan_2_1().channels
    std = latents.std(dim=(0, 2, 3, 4))
    assert std.min() > 0.5 and std.max() < 1.5  # raw Wan latents would reach 3.3
    frames = make(SMALL).decode(latents[:, :, :3, :8, :8])
    assert frames.shape == (1, 3, 9, 64, 64)
