"""Our driving of the Wan VAE against diffusers' own, whole against chunked, files, normalisation."""

from __future__ import annotations

import json
from copy import deepcopy
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from diffusers.models.autoencoders.autoencoder_kl_wan import WanCausalConv3d
from safetensors.torch import load_file, save_file

from data.encode import fingerprint
from models.device import DTYPES, fast_dtype
from models.vae.channels_last import use_channels_last
from models.vae.latent_space import LatentSpace
from models.vae.wan_vae import NETWORK, VaeConfig, WanVae, latent_space_of

FASTER = DTYPES[fast_dtype(torch.device("cpu"))]  # without bfloat16 products convolutions of it are of another kernel
WAN_2_1 = VaeConfig(base_dim=8, z_dim=4)
WAN_2_2 = VaeConfig(base_dim=8, decoder_base_dim=16, z_dim=6, is_residual=True, patch_size=2)
SPRITES = VaeConfig(
    base_dim=8, z_dim=4, dim_mult=[1, 2, 4], num_res_blocks=1, temporal_downsample=[True, True], latents_per_call=None
)
CASES = {
    "wan_2_1": (WAN_2_1, (1, 3, 13, 32, 48)),
    "wan_2_2": (WAN_2_2, (1, 3, 9, 32, 64)),
    "sprites": (SPRITES, (2, 3, 9, 16, 24)),
}


def make(name: str, latents_per_call: int | None = 1) -> tuple[WanVae, torch.Tensor]:
    """A perturbed VAE with a normalisation that is not the identity, and a clip."""
    cfg, shape = CASES[name]
    vae = WanVae.from_config(cfg, seed=1)
    vae.latents_per_call = latents_per_call
    rng = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in vae.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=rng))
    mean = torch.linspace(-0.3, 0.4, cfg.z_dim).tolist()
    std = torch.linspace(0.5, 2.0, cfg.z_dim).tolist()
    vae.autoencoder.register_to_config(latents_mean=mean, latents_std=std)
    return vae, torch.rand(shape, generator=rng) * 2 - 1


@pytest.mark.parametrize("name", CASES)
def test_encode_and_decode_equal_diffusers_with_one_normalisation(name):
    from diffusers import AutoencoderKLWan

    vae, pixels = make(name)
    theirs = AutoencoderKLWan.from_config(vae.autoencoder.config)
    theirs.load_state_dict(vae.autoencoder.state_dict())
    latents = vae.encode(pixels)
    mean = torch.tensor(vae.latents_mean).view(1, -1, 1, 1, 1)
    std = torch.tensor(vae.latents_std).view(1, -1, 1, 1, 1)
    with torch.no_grad():
        reference = theirs.encode(pixels).latent_dist.mode()
        decoded = theirs.decode(latents * std + mean).sample
    torch.testing.assert_close(latents, (reference - mean) / std, atol=1e-5, rtol=0)
    torch.testing.assert_close(vae.decode(latents), decoded, atol=2e-5, rtol=0)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("chunks", [(1, 1, 1), (1, 2), (2, 1), (3,)])
def test_streaming_decode_equals_whole_decode(name, chunks):
    vae, _ = make(name, latents_per_call=None)
    stride = vae.spatial_stride
    latents = torch.randn(
        1, vae.latent_channels, 3, 32 // stride, 64 // stride, generator=torch.Generator().manual_seed(0)
    )
    stream = vae.streaming()
    parts = [stream.push(part) for part in latents.split(chunks, dim=2)]
    assert [part.shape[2] for part in parts] == [4 * n - 3 * (i == 0) for i, n in enumerate(chunks)]
    vae.latents_per_call = 1
    torch.testing.assert_close(torch.cat(parts, 2), vae.decode(latents), atol=2e-5, rtol=0)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("chunks", [(1, 4, 4), (5, 4), (1, 8), (9,)])
def test_streaming_encode_equals_whole_encode(name, chunks):
    vae, pixels = make(name, latents_per_call=None)
    pixels = pixels[:, :, :9]
    stream = vae.streaming_encoder()
    parts = [stream.push(part) for part in pixels.split(chunks, dim=2)]
    vae.latents_per_call = 1
    torch.testing.assert_close(torch.cat(parts, 2), vae.encode(pixels), atol=2e-5, rtol=0)


def test_first_latent_is_the_first_frame_alone():
    vae, pixels = make("sprites")
    assert torch.equal(vae.encode(pixels)[:, :, :1], vae.encode(pixels[:, :, :1]))


def test_interleaved_streams_do_not_meet():
    vae, _ = make("wan_2_2")
    a, b = torch.randn(2, 1, vae.latent_channels, 3, 2, 2, generator=torch.Generator().manual_seed(0))
    streams = vae.streaming(), vae.streaming()
    parts: tuple[list, list] = ([], [])
    for index in range(3):
        for stream, latents, out in zip(streams, (a, b), parts):
            out.append(stream.push(latents[:, :, index : index + 1]))
            vae.decode(latents)  # a whole decode between the pushes disturbs nothing
    assert torch.equal(torch.cat(parts[0], 2), vae.decode(a))
    assert torch.equal(torch.cat(parts[1], 2), vae.decode(b))


def test_restored_stream_replays_bit_for_bit():
    vae, _ = make("wan_2_1")
    latents = torch.randn(1, 4, 4, 2, 3, generator=torch.Generator().manual_seed(0))
    stream = vae.streaming()
    opening = stream.snapshot()
    first = stream.push(latents[:, :, :2])
    saved = stream.snapshot()
    second = stream.push(latents[:, :, 2:])
    other = stream.push(-latents[:, :, 2:])
    stream.restore(saved)
    assert torch.equal(stream.push(latents[:, :, 2:]), second)
    stream.restore(opening)
    assert torch.equal(stream.push(latents[:, :, :2]), first)
    assert not torch.equal(other, second)


def test_a_stream_refuses_another_size():
    vae, _ = make("sprites")
    stream = vae.streaming()
    stream.push(torch.zeros(1, 4, 1, 4, 4))
    with pytest.raises(ValueError, match=r"began with \(1, 4, 4, 4\)"):
        stream.push(torch.zeros(2, 4, 1, 4, 4))


def test_training_path_is_differentiable_through_every_parameter():
    vae, pixels = make("sprites", latents_per_call=None)
    noise = torch.randn(2, 4, 3, 4, 6, generator=torch.Generator().manual_seed(0))
    posterior = vae.posterior(pixels)
    assert posterior.mean.shape == posterior.logvar.shape == noise.shape
    reconstruction = vae.reconstruct(posterior.mean + posterior.std * noise)
    assert reconstruction.shape == pixels.shape
    ((reconstruction - pixels).square().mean() + 1e-4 * posterior.logvar.exp().mean()).backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in vae.parameters())


def test_whole_clip_calls_have_the_gradient_of_single_calls():
    gradients = []
    for latents_per_call in (1, None):
        vae, pixels = make("sprites", latents_per_call)
        vae.reconstruct(vae.posterior(pixels).mode()).square().mean().backward()
        gradients.append(torch.cat([p.grad.flatten() for p in vae.parameters()]))
    error = (gradients[0] - gradients[1]).norm() / gradients[0].norm()
    assert error < 1e-5


@pytest.mark.parametrize("name", CASES)
def test_channels_last_changes_rounding_only(name, tmp_path):
    vae, pixels = make(name)
    names, latents = list(vae.state_dict()), vae.encode(pixels)
    expected = _streamed(vae, latents)
    vae.use_channels_last()
    assert list(vae.state_dict()) == names
    torch.testing.assert_close(vae.encode(pixels), latents, atol=1e-5, rtol=0)
    for found, reference in zip(_streamed(vae, latents), expected, strict=True):
        torch.testing.assert_close(found, reference, atol=2e-5, rtol=0)
    vae.save(tmp_path / "vae")
    torch.testing.assert_close(WanVae.from_folder(tmp_path / "vae").encode(pixels), latents, atol=1e-5, rtol=0)


def _streamed(vae: WanVae, latents: torch.Tensor) -> list[torch.Tensor]:
    """Chunks of one latent, of all but two, and of one: each leaves another number of frames in the caches."""
    stream = vae.streaming()
    return [stream.push(part) for part in latents.tensor_split([1, latents.shape[2] - 1], dim=2)]


def test_channels_last_has_the_same_gradients():
    gradients = []
    for channels_last in (False, True):
        vae, pixels = make("sprites", latents_per_call=None)
        if channels_last:
            vae.use_channels_last()
        vae.reconstruct(vae.posterior(pixels).mode()).square().mean().backward()
        gradients.append(torch.cat([p.grad.contiguous().flatten() for p in vae.parameters()]))
    assert (gradients[0] - gradients[1]).norm() / gradients[0].norm() < 1e-5


@pytest.mark.parametrize("name", ["wan_2_2", "sprites"])
def test_channels_last_stays_from_one_convolution_to_the_next(name, monkeypatch):
    vae, _ = make(name, latents_per_call=None)
    vae.to(FASTER).use_channels_last()
    seen: list[tuple[tuple[int, ...], bool]] = []

    def looking(convolve, layout: torch.memory_format):
        def run(x: torch.Tensor, *args):
            seen.append((tuple(x.shape), x.is_contiguous(memory_format=layout)))
            return convolve(x, *args)

        return run

    size = (32 // vae.spatial_stride, 48 // vae.spatial_stride)
    latents = torch.randn(2, vae.latent_channels, 4, *size)  # one small clip in float32 torch leaves to another kernel
    stream = vae.streaming()
    stream.push(latents[:, :, :1])
    monkeypatch.setattr(F, "conv3d", looking(F.conv3d, torch.channels_last_3d))
    monkeypatch.setattr(F, "conv2d", looking(F.conv2d, torch.channels_last))
    stream.push(latents[:, :, 1:])
    assert len(seen) > 10
    assert [shape for shape, as_it_reads in seen if not as_it_reads] == []


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this torch is built without oneDNN")
@pytest.mark.parametrize("name", ["wan_2_2", "sprites"])
def test_one_float32_clip_is_decoded_as_in_a_batch_and_not_by_the_slow_kernel(name):
    vae, _ = make(name, latents_per_call=None)
    vae.use_channels_last()
    latents = torch.randn(2, vae.latent_channels, 4, 8, 8, generator=torch.Generator().manual_seed(3))
    expected = vae.decode(latents)[:1]
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiled:
        found = vae.decode(latents[:1])
    kernels = {event.key for event in profiled.key_averages()}
    assert not [kernel for kernel in kernels if "slow_conv3d" in kernel]
    assert "aten::mkldnn_convolution" in kernels
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=0)


def test_measured_normalisation_gives_unit_statistics_and_survives_the_file(tmp_path):
    vae, pixels = make("sprites", SPRITES.latents_per_call)
    vae.measure_normalisation([pixels, pixels.flip(-1)])
    latents = torch.cat([vae.encode(pixels), vae.encode(pixels.flip(-1))]).transpose(0, 1).flatten(1)
    torch.testing.assert_close(latents.mean(1), torch.zeros(4), atol=1e-4, rtol=0)
    torch.testing.assert_close(latents.std(1), torch.ones(4), atol=1e-2, rtol=0)
    vae.save(tmp_path / "vae")
    vae.save(tmp_path / "vae")  # again, over the first
    assert [path.name for path in tmp_path.iterdir()] == ["vae"]
    loaded = WanVae.from_folder(tmp_path / "vae", expected=SPRITES)
    assert loaded.latent_space == vae.latent_space
    assert torch.equal(loaded.encode(pixels), vae.encode(pixels))
    assert json.loads((tmp_path / "vae" / "config.json").read_text())["latents_std"] == list(vae.latents_std)


def test_a_folder_tells_its_latent_space_without_its_weights(tmp_path):
    vae, _ = make("wan_2_2")
    vae.save(tmp_path / "vae")
    (tmp_path / "vae/diffusion_pytorch_model.safetensors").unlink()
    assert latent_space_of(tmp_path / "vae") == vae.latent_space
    assert latent_space_of(tmp_path) is None
    (tmp_path / "config.json").write_text(f'{{"_class_name": "{NETWORK}"}}')  # diffusers' defaults: Wan 2.1
    assert latent_space_of(tmp_path) == LatentSpace.wan_2_1()


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        (
            '{"_class_name": "WanTransformer3DModel"}',
            "config.json is of WanTransformer3DModel, not of Auto",
        ),
        ('{"model_type": "umt5"}', "config.json is of another network, not of AutoencoderKLWan"),
        ("{", "config.json is not JSON"),
    ],
)
def test_a_folder_of_another_network_is_named(tmp_path, settings, told):
    """A text encoder would be of Wan 2.1's latent space, by diffusers' defaults."""
    (tmp_path / "config.json").write_text(settings)
    for read in (latent_space_of, WanVae.from_folder):
        with pytest.raises(ValueError, match=told):
            read(tmp_path)


def test_the_files_of_a_vae_do_not_tell_where_it_was_loaded_from(tmp_path):
    """Shards know a VAE by the content of its files."""
    make("wan_2_1")[0].save(tmp_path / "one")
    WanVae.from_folder(tmp_path / "one").save(tmp_path / "again")
    assert fingerprint(str(tmp_path / "one")) == fingerprint(str(tmp_path / "again"))


def test_a_channel_without_information_is_not_blown_up(caplog):
    vae, pixels = make("sprites")
    with torch.no_grad():
        vae.autoencoder.quant_conv.weight[2].zero_()
    vae.measure_normalisation([pixels])
    assert "[2]" in caplog.text
    assert vae.encode(pixels)[:, 2].abs().max() < 1


def test_another_architecture_is_refused_by_name(tmp_path):
    make("sprites")[0].save(tmp_path / "vae")
    with pytest.raises(ValueError, match=r"vae\.base_dim: 8 saved, 16 asked"):
        WanVae.from_folder(tmp_path / "vae", expected=replace(SPRITES, base_dim=16))
    with pytest.raises(FileNotFoundError, match="stage=vae"):
        WanVae.from_folder(tmp_path / "nothing")


def test_a_folder_that_lacks_weights_is_refused(tmp_path):
    """diffusers would draw them at random."""
    make("sprites")[0].save(tmp_path / "vae")
    weights = next(tmp_path.glob("vae/*.safetensors"))
    state = load_file(weights)
    absent = min(state)
    save_file({name: value for name, value in state.items() if name != absent}, weights, {"format": "pt"})
    with pytest.raises(ValueError, match=f"vae is not a whole AutoencoderKLWan: .*{absent}; download it again"):
        WanVae.from_folder(tmp_path / "vae")


@pytest.mark.parametrize(
    ("pixels", "told"),
    [
        (torch.zeros(1, 3, 8, 16, 16), "num_frames=8 must be 1 \\+ 4k"),
        (torch.zeros(1, 3, 5, 18, 16), "18 x 16 must divide by the VAE's stride 4"),
        (torch.zeros(1, 4, 5, 16, 16), r"takes \[B, 3, T, H, W\]"),
    ],
)
def test_wrong_pixels_are_refused(pixels, told):
    vae, _ = make("sprites")
    with pytest.raises(ValueError, match=told):
        vae.encode(pixels)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"base_dim": 0}, "vae.base_dim=0 must be at least 1"),
        ({"num_res_blocks": 0}, "vae.num_res_blocks=0 must be at least 1"),
        ({"dim_mult": [1, 0, 4]}, r"vae.dim_mult=\[1, 0, 4\] must be factors of at least 1"),
    ],
)
def test_sizes_that_no_network_has_are_refused(change, told):
    with pytest.raises(ValueError, match=told):
        replace(SPRITES, **change)


def test_the_same_seed_gives_the_same_weights_and_leaves_the_global_state():
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    one, two = (WanVae.from_config(SPRITES, seed=3).state_dict() for _ in range(2))
    assert torch.equal(torch.rand(1), expected)
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_wan_sizes():
    with torch.device("meta"):
        wan_2_1 = WanVae.from_config(VaeConfig.wan_2_1()).autoencoder
        wan_2_2 = WanVae.from_config(VaeConfig.wan_2_2()).autoencoder
    millions = [sum(p.numel() for p in part.parameters()) / 1e6 for part in (wan_2_1.decoder, wan_2_2.decoder)]
    assert millions == pytest.approx([73.3, 555.0], abs=0.1)
    assert (VaeConfig.wan_2_1().spatial_stride, VaeConfig.wan_2_2().spatial_stride) == (8, 16)


def test_wan_2_1_statistics_are_diffusers_defaults():
    from diffusers import AutoencoderKLWan

    with torch.device("meta"):
        autoencoder = AutoencoderKLWan()
    assert WanVae(autoencoder).latent_space == LatentSpace.wan_2_1()
    assert (LatentSpace.wan_2_1().channels, LatentSpace.wan_2_2().channels) == (16, 48)
    with pytest.raises(ValueError, match="channels: 48 instead of 16"):
        LatentSpace.wan_2_1().require(LatentSpace.wan_2_2(), owner="the decoder")


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"temporal_downsample": [True, True]}, "one entry per spatial halving"),
        ({"temporal_downsample": [True, True, True]}, "true exactly twice"),
        ({"latents_per_call": 0}, "latents_per_call=0"),
    ],
)
def test_impossible_configs_are_refused(change, told):
    with pytest.raises(ValueError, match=told):
        VaeConfig(**change)


@pytest.mark.parametrize("kernel", [1, 3])
@pytest.mark.parametrize("num_frames", [1, 2, 4, 12])
def test_gradients_of_convolutions_are_those_of_diffusers(kernel, num_frames):
    """In some of these shapes oneDNN 3.12 ends the process on a CPU with AMX, or reads what nobody wrote."""
    rng, exact = torch.Generator().manual_seed(0), WanCausalConv3d(48, 24, kernel, padding=kernel // 2)
    with torch.no_grad():
        exact.weight.normal_(std=0.1, generator=rng)
    conv = deepcopy(exact).to(FASTER)
    use_channels_last(conv)
    pixels = torch.randn(2, 48, num_frames, 64, 64, generator=rng)
    wanted, found = exact(pixels), conv(pixels.to(FASTER))
    left = [torch.full((size,), torch.nan) for size in (10**5, 10**6, 3 * 10**6)]
    del left  # what freed memory may hold
    torch.testing.assert_close(found.float(), wanted, atol=0.1, rtol=0.02)
    weights = torch.randn(wanted.shape, generator=rng)
    (wanted * weights).sum().backward()
    (found * weights.to(FASTER)).float().sum().backward()
    for ours, theirs in zip(conv.parameters(), exact.parameters()):
        assert (ours.grad.float() - theirs.grad).norm() < 0.02 * theirs.grad.norm()
