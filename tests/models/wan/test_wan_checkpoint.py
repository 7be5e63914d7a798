"""Public formats load strictly, as the same function; our folders are atomic and know what they hold."""

from __future__ import annotations

import copy
import json
import logging
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import WanTransformer3DModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from wan_reference import (
    diffusers_arguments,
    diffusers_twin,
    make_condition,
    make_latents,
    perturbed_dit,
    rng,
)

from models.vae.latent_space import LatentSpace
from models.wan import checkpoint
from models.wan.checkpoint import (
    diffusers_to_official,
    load_dit,
    load_pretrained,
    official_to_diffusers,
    read_dit_config,
    read_provenance,
    save_dit,
    to_official,
    without_tracks,
)
from models.wan.config import WanConfig
from models.wan.dit import WanDiT

C = 6  # latent channels: unlike 4, they make the public layouts differ in size, as they do in Wan
T2V = WanConfig.tiny(latent_channels=C)
I2V = WanConfig.tiny(latent_channels=C, image_conditioning="inp", clip_dim=16)
I2V_TRACKS = WanConfig.tiny(latent_channels=C, image_conditioning="inp", track_channels=C, clip_dim=16)
CONTROL = WanConfig.tiny(latent_channels=C, image_conditioning="fun_control", track_channels=C, clip_dim=16)
TRACKS = {"track_map": torch.ones(1, 8, 9, 4, 6)}


def assert_same_state(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())


@pytest.mark.parametrize(("config", "num_tensors"), [(T2V, 69), (I2V, 87)])
def test_names_map_both_ways(config: WanConfig, num_tensors: int):
    state = WanDiT(config).state_dict()
    renamed = official_to_diffusers(state)
    assert len(state) == len(renamed) == num_tensors
    assert renamed.keys() == WanTransformer3DModel(**diffusers_arguments(config)).state_dict().keys()
    assert_same_state(diffusers_to_official(renamed), state)


@pytest.mark.parametrize("config", [T2V, I2V])
def test_loads_a_diffusers_folder(config: WanConfig, tmp_path: Path):
    source, model = perturbed_dit(config), WanDiT(config)
    diffusers_twin(source).save_pretrained(tmp_path / "transformer", max_shard_size="100KB")
    assert len(list((tmp_path / "transformer").glob("*.safetensors"))) > 1, "the folder must be sharded"
    for path in (tmp_path / "transformer", tmp_path):
        model.reset_parameters()
        assert load_pretrained(model, path) == []
        assert_same_state(model.state_dict(), source.state_dict())


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
def test_loads_official_safetensors(prefix: str, tmp_path: Path):
    source, model = perturbed_dit(I2V), WanDiT(I2V)
    save_file({prefix + name: tensor for name, tensor in source.state_dict().items()}, tmp_path / "wan.safetensors")
    load_pretrained(model, tmp_path / "wan.safetensors")
    assert_same_state(model.state_dict(), source.state_dict())


def test_loads_self_forcing_files_and_prefers_the_average(tmp_path: Path):
    source, raw, model = perturbed_dit(T2V, 1), perturbed_dit(T2V, 2), WanDiT(T2V)
    average = {f"model._fsdp_wrapped_module.{name}": tensor for name, tensor in source.state_dict().items()}
    file = {
        "generator": {f"model.{name}": t for name, t in raw.state_dict().items()},
        "generator_ema": average,
    }
    torch.save(file, tmp_path / "model.pt")
    load_pretrained(model, tmp_path / "model.pt")
    assert_same_state(model.state_dict(), source.state_dict())
    for before_the_average in ({}, None):
        torch.save(file | {"generator_ema": before_the_average}, tmp_path / "model.pt")
        model.reset_parameters()
        load_pretrained(model, tmp_path / "model.pt")
        assert_same_state(model.state_dict(), raw.state_dict())
    del file["generator_ema"]
    torch.save(file, tmp_path / "model.pt")
    model.reset_parameters()
    load_pretrained(model, tmp_path / "model.pt")
    assert_same_state(model.state_dict(), raw.state_dict())


def test_pickles_with_code_are_refused(tmp_path: Path):
    torch.save({"generator": {"x": Path("code")}}, tmp_path / "model.pt")
    with pytest.raises(
        ValueError, match=r"model.pt .* cannot be read as weights: Unsupported global.* save these alone"
    ):
        load_pretrained(WanDiT(T2V), tmp_path / "model.pt")


def test_unknown_names_are_refused():
    state = WanDiT(T2V).state_dict()
    for extra in ("control_adapter.conv.weight", "blocks.0.attn.q.weight", "blocks.0.ffn.0.scale"):
        with pytest.raises(ValueError, match=extra):
            to_official(state | {extra: torch.zeros(1)})
    with pytest.raises(ValueError, match=r"Fun-V1\.1"):
        to_official(state | {"ref_conv.weight": torch.zeros(1), "ref_conv.bias": torch.zeros(1)})
    diffusers = official_to_diffusers(state)
    old = diffusers | {"blocks.0.attn2.norm_added_q.weight": torch.zeros(80)}
    assert_same_state(to_official(old), state)


@pytest.mark.parametrize("value", [torch.ones(160, 80, dtype=torch.int8), torch.ones(160, 80) > 0, 3, None])
def test_what_is_no_floating_point_tensor_is_refused(value: object):
    """Integers are steps of a quantiser, whose scale is elsewhere."""
    with pytest.raises(ValueError, match=r"no floating-point tensors: blocks\.0\.ffn\.0\.weight"):
        to_official(WanDiT(T2V).state_dict() | {"blocks.0.ffn.0.weight": value})


def test_two_weights_of_one_name_are_refused():
    state = WanDiT(T2V).state_dict()
    with pytest.raises(ValueError, match=r"holds blocks\.0\.ffn\.0\.bias twice, under several prefixes"):
        to_official(state | {"model.blocks.0.ffn.0.bias": torch.zeros(160)})


def test_names_that_are_no_strings_are_refused():
    with pytest.raises(ValueError, match="holds a dict, not tensors by name"):
        to_official({"generator": {1: torch.zeros(1)}})


def test_missing_weights_are_refused(tmp_path: Path):
    state = WanDiT(T2V).state_dict()
    del state["blocks.1.ffn.2.bias"]
    save_file(state, tmp_path / "wan.safetensors")
    with pytest.raises(ValueError, match=r"missing \['blocks.1.ffn.2.bias'\]"):
        load_pretrained(WanDiT(T2V), tmp_path / "wan.safetensors")


def test_another_architecture_is_named(tmp_path: Path):
    save_file(WanDiT(I2V).state_dict(), tmp_path / "wan.safetensors")
    model = WanDiT(WanConfig.tiny(latent_channels=C, ffn_dim=80, num_layers=3))
    with pytest.raises(ValueError, match=r"ffn_dim: 160, 80; num_layers: 2, 3; clip_dim: 16, None"):
        load_pretrained(model, tmp_path / "wan.safetensors")


@torch.no_grad()
@pytest.mark.parametrize("target", [CONTROL, I2V_TRACKS])
def test_grown_model_starts_as_the_old_one(target: WanConfig, tmp_path: Path, caplog: pytest.LogCaptureFixture):
    """Control reads [noisy | control -> track | image]; image-to-video gains track columns at the end."""
    old = CONTROL if target is CONTROL else I2V
    source, model = (
        perturbed_dit(WanConfig.from_dict(old.to_dict() | {"track_encoding": "rgb"})),
        WanDiT(target, rng(5)),
    )
    save_file(source.state_dict(), tmp_path / "fun.safetensors")
    with caplog.at_level(logging.INFO):
        missing = load_pretrained(model, tmp_path / "fun.safetensors")
    parts = {name.split(".")[0] for name in missing}
    assert parts == ({"track_head"} if old is CONTROL else {"track_head", "patch_embedding"})
    assert ("patch_embedding.weight[track]" in missing) == (old is I2V) and "track_head" in caplog.text
    latents, image = make_latents(target, 3), make_latents(target, 1, seed=5)
    timestep = torch.tensor([400.0])
    control = {"track_map": torch.zeros(1, C, 3, 4, 6), "track_map_is_latent": True} if old is CONTROL else {}
    expected = source(latents, timestep, make_condition(old, image_latents=image, **control))
    ours = model(latents, timestep, make_condition(target, image_latents=image, **TRACKS))
    torch.testing.assert_close(ours, expected, rtol=0, atol=2e-6)
    model.track_head.project.weight.normal_(generator=rng(1))
    tracked = model(latents, timestep, make_condition(target, image_latents=image, **TRACKS))
    assert not torch.equal(tracked, ours), "the columns of old and new track channels read a head that has learned"


@torch.no_grad()
def test_text_to_video_grows_into_first_frame_with_tracks(tmp_path: Path):
    source = perturbed_dit(T2V)
    save_file(official_to_diffusers(source.state_dict()), tmp_path / "wan.safetensors")
    model = WanDiT(WanConfig.tiny(latent_channels=C, image_conditioning="first_frame", track_channels=4))
    load_pretrained(model, tmp_path / "wan.safetensors")
    latents, timestep = make_latents(T2V, 3), torch.tensor([400.0])
    grown = model(latents, timestep, make_condition(T2V, **TRACKS))
    torch.testing.assert_close(grown, source(latents, timestep, make_condition(T2V)), rtol=0, atol=2e-6)


@pytest.mark.parametrize("encoding", ["head", "rgb"])
def test_a_video_model_without_tracks_can_learn_them(encoding: str, tmp_path: Path):
    """Zero columns behind a head that is the zero map would get no gradient: the tracks would never be seen."""
    save_file(perturbed_dit(T2V).state_dict(), tmp_path / "wan.safetensors")
    target = WanConfig.tiny(latent_channels=C, track_channels=C, track_encoding=encoding)
    model = WanDiT(target, rng(5))
    load_pretrained(model, tmp_path / "wan.safetensors")
    drawn = {"track_map": torch.randn(1, C, 3, 4, 6, generator=rng(2)), "track_map_is_latent": True}
    given = make_condition(target, **(TRACKS if encoding == "head" else drawn))
    model(make_latents(T2V, 3), torch.tensor([400.0]), given).square().mean().backward()
    reader = model.track_head.project if encoding == "head" else model.patch_embedding
    assert reader.weight.grad[:, -C:].abs().sum() > 0


@torch.no_grad()
@pytest.mark.parametrize("encoding", ["head", "rgb"])
@pytest.mark.parametrize("config", [CONTROL, I2V_TRACKS], ids=["control", "at the end"])
def test_without_tracks_it_is_what_it_was_with_its_motion_withheld(config: WanConfig, encoding: str):
    model = perturbed_dit(replace(config, track_encoding=encoding))
    bare = without_tracks(model)
    assert bare.config.track_channels == 0 and not hasattr(bare, "track_head")
    latents, image, timestep = make_latents(config, 3), make_latents(config, 1, seed=5), torch.tensor([400.0])
    drawn = {"track_map": torch.randn(1, C, 3, 4, 6, generator=rng(2)), "track_map_is_latent": True}
    given = make_condition(model.config, image_latents=image, **(TRACKS if encoding == "head" else drawn))
    expected = model(latents, timestep, given.drop("motion"))
    ours = bare(latents, timestep, make_condition(bare.config, image_latents=image))
    torch.testing.assert_close(ours, expected, rtol=0, atol=2e-6)
    assert not torch.allclose(model(latents, timestep, given), expected, atol=1e-4)


def test_columns_are_never_guessed_or_dropped(tmp_path: Path):
    save_file(WanDiT(I2V).state_dict(), tmp_path / "i2v.safetensors")
    wider = WanConfig.tiny(latent_channels=C, image_conditioning="fun_control", track_channels=9, clip_dim=16)
    with pytest.raises(ValueError, match="mask channels have no place"):
        load_pretrained(WanDiT(wider), tmp_path / "i2v.safetensors")
    save_file(
        WanDiT(WanConfig.tiny(latent_channels=C, track_channels=5, track_encoding="rgb")).state_dict(),
        tmp_path / "odd.safetensors",
    )
    with pytest.raises(ValueError, match=r"meaning of 11 input channels; .* known layouts have 6, 16, 18, 22"):
        load_pretrained(WanDiT(T2V), tmp_path / "odd.safetensors")


def test_our_own_files_tell_what_their_channels_mean(tmp_path: Path):
    """16 channels: image-to-video by their number, but this file says [noisy 6 | track 10]."""
    config = WanConfig.tiny(latent_channels=C, track_channels=10, track_encoding="rgb")
    source, model = perturbed_dit(config), WanDiT(WanConfig.tiny(latent_channels=C, track_channels=10))
    save_dit(source, tmp_path)
    load_pretrained(model, tmp_path)
    assert torch.equal(model.patch_embedding.weight, source.patch_embedding.weight)


def test_wan22_control_columns_are_reordered(tmp_path: Path):
    """[noisy | control | mask | image] -> [noisy | mask | image | track]."""
    state = WanDiT(I2V_TRACKS).state_dict()
    public = torch.arange(22.0).view(1, 22, 1, 1, 1).expand_as(state["patch_embedding.weight"])
    save_file(state | {"patch_embedding.weight": public.contiguous()}, tmp_path / "fun.safetensors")
    model = WanDiT(I2V_TRACKS)
    load_pretrained(model, tmp_path / "fun.safetensors")
    columns = model.patch_embedding.weight[0, :, 0, 0, 0].tolist()
    assert columns == [*range(6), *range(12, 16), *range(16, 22), *range(6, 12)]


def test_folder_round_trip(tmp_path: Path):
    model = perturbed_dit(CONTROL)
    save_dit(model, tmp_path / "student", stage="self_forcing", step=400)
    assert sorted(path.name for path in (tmp_path / "student").iterdir()) == [
        "model.json",
        "model.safetensors",
    ]
    assert read_dit_config(tmp_path / "student") == CONTROL
    assert read_provenance(tmp_path / "student") == {"stage": "self_forcing", "step": 400}
    runtime = WanConfig.from_dict(CONTROL.to_dict() | {"attention_backend": "matmul"})
    loaded = load_dit(tmp_path / "student", expected=runtime)
    assert loaded.config == runtime and all(parameter.requires_grad for parameter in loaded.parameters())
    assert_same_state(loaded.state_dict(), model.state_dict())
    save_dit(model.bfloat16(), tmp_path / "student")
    assert load_dit(tmp_path / "student").patch_embedding.weight.dtype == torch.bfloat16


def test_files_keep_the_latent_space_that_a_model_was_made_in(tmp_path: Path):
    space, model, grown = LatentSpace.of((0.0,) * C, (1.0,) * C, 4), perturbed_dit(CONTROL), WanDiT(CONTROL)
    save_dit(model, tmp_path / "unknown")
    assert json.loads((tmp_path / "unknown/model.json").read_text()).keys() == {"config", "provenance"}
    assert load_dit(tmp_path / "unknown").latent_space is None
    model.latent_space = space
    save_dit(copy.deepcopy(model), tmp_path / "known")
    assert load_dit(tmp_path / "known").latent_space == space == without_tracks(model).latent_space
    for path in (tmp_path / "known", tmp_path / "known/model.safetensors"):
        grown.latent_space = None
        load_pretrained(grown, path)
        assert grown.latent_space == space
    load_pretrained(grown, tmp_path / "unknown")
    assert grown.latent_space is None


def test_a_folder_is_a_source_of_pretrained_weights(tmp_path: Path):
    source, model = perturbed_dit(CONTROL), WanDiT(CONTROL)
    save_dit(source, tmp_path)
    assert load_pretrained(model, tmp_path) == []
    assert_same_state(model.state_dict(), source.state_dict())


def test_another_architecture_is_refused_before_anything_is_built(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    save_dit(WanDiT(T2V), tmp_path)
    monkeypatch.setattr(checkpoint, "read_weights", lambda path: pytest.fail("read the weights"))
    with pytest.raises(ValueError, match=r"num_layers: 2, 4; track_channels: 0, 4"):
        load_dit(tmp_path, expected=WanConfig.tiny(latent_channels=C, num_layers=4, track_channels=4))


@pytest.mark.parametrize("change", [{"track_hidden": 6}, {"track_offsets": True}, {"eps": 1e-5}, {"text_len": 4}])
def test_settings_of_our_own_folder_are_compared_by_name(change: dict[str, float], tmp_path: Path):
    """eps and text_len show in no shape; of a head they would be told as torch tells two sizes."""
    save_dit(WanDiT(CONTROL), tmp_path)
    with pytest.raises(ValueError, match=f"another architecture .*: {next(iter(change))}: "):
        load_pretrained(WanDiT(replace(CONTROL, **change)), tmp_path)


def test_what_a_file_had_no_channels_for_is_told(tmp_path: Path):
    save_dit(WanDiT(T2V), tmp_path)
    drawn = WanConfig.tiny(latent_channels=C, track_channels=C, track_encoding="rgb", track_hidden=7)
    assert load_pretrained(WanDiT(drawn), tmp_path) == ["patch_embedding.weight[track]"]


def test_files_older_than_torch_1_6_are_read(tmp_path: Path):
    state = perturbed_dit(T2V).state_dict()
    torch.save(state, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    assert_same_state(checkpoint.read_state(tmp_path / "old.pt"), state)


def test_a_kill_between_the_two_files_leaves_the_weights_with_their_own_provenance(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    save_dit(perturbed_dit(T2V, 1), tmp_path, step=1)
    rename = Path.replace

    def killed(self: Path, target: Path) -> Path:
        if target.name == "model.json":
            raise KeyboardInterrupt
        return rename(self, target)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Path, "replace", killed)
        save_dit(newer := perturbed_dit(T2V, 2), tmp_path, step=2)
    assert_same_state(load_dit(tmp_path).state_dict(), newer.state_dict())
    assert read_provenance(tmp_path) == {"step": 2}


def test_what_a_killed_save_left_goes_with_the_next_one(tmp_path: Path):
    left, other = tmp_path / ".model.safetensors.0123abcd", tmp_path / ".model.safetensors.backup"
    for path in (left, other):
        path.write_bytes(b"half")
    save_dit(WanDiT(T2V), tmp_path)
    assert not left.exists() and other.exists()


def test_an_interrupted_save_leaves_the_old_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    old = perturbed_dit(T2V, 1)
    save_dit(old, tmp_path, step=1)

    def killed(state: object, path: Path, **kwargs: object) -> None:
        path.write_bytes(b"half a file")
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint, "save_file", killed)
    with pytest.raises(KeyboardInterrupt):
        save_dit(perturbed_dit(T2V, 2), tmp_path, step=2)
    assert_same_state(load_dit(tmp_path).state_dict(), old.state_dict())
    assert read_provenance(tmp_path) == {"step": 1}


def test_a_config_of_other_weights_is_noticed(tmp_path: Path):
    """The weights file carries its own config: a crash between the two renames cannot pair them wrongly."""
    save_dit(WanDiT(WanConfig.tiny(latent_channels=C, num_heads=1)), tmp_path)
    description = json.loads((tmp_path / "model.json").read_text())
    description["config"]["num_heads"] = 2  # same shapes, another function
    (tmp_path / "model.json").write_text(json.dumps(description))
    with pytest.raises(ValueError, match=r"model.safetensors .* num_heads: 1, 2"):
        load_dit(tmp_path)


def test_a_folder_of_another_network_is_named(tmp_path: Path):
    (tmp_path / "model.json").write_text(json.dumps({"config": {"widths": [1]}, "provenance": {}}))
    save_file({"decoder.0.weight": torch.zeros(1)}, tmp_path / "model.safetensors")
    for read in (load_dit, lambda folder: load_pretrained(WanDiT(T2V), folder)):
        with pytest.raises(ValueError, match=f"{tmp_path} is not of a DiT: "):
            read(tmp_path)
    for description in ('{"config": {"widths": [1]}, "latent_space": {}}', "{", "3"):  # as a tiny VAE's, or damaged
        (tmp_path / "model.json").write_text(description)
        with pytest.raises(ValueError, match=f"{tmp_path} is not of a DiT: its model.json tells no provenance"):
            read_provenance(tmp_path)


def test_our_own_folder_with_other_weights_or_none_is_named(tmp_path: Path):
    model = WanDiT(T2V)
    save_dit(model, tmp_path)
    weights = tmp_path / "model.safetensors"
    with safe_open(weights, framework="pt") as file:
        about = file.metadata()
    save_file({name: value for name, value in model.state_dict().items() if "ffn.2.bias" not in name}, weights, about)
    with pytest.raises(ValueError, match=rf"{weights} does not hold .*absent: blocks.0.ffn.2.bias, blocks.1.ffn"):
        load_dit(tmp_path)
    weights.unlink()
    with pytest.raises(FileNotFoundError, match=rf"no model.safetensors beside model.json in {tmp_path}"):
        load_dit(tmp_path)


def test_absent_files_are_named(tmp_path: Path):
    with pytest.raises(FileNotFoundError, match=r"no model.json in .*; give a folder that save_dit wrote"):
        load_dit(tmp_path)
    save_dit(WanDiT(T2V), tmp_path / "export" / "student")
    with pytest.raises(FileNotFoundError, match=rf"give {tmp_path / 'export' / 'student'}"):
        load_dit(tmp_path / "export")
    with pytest.raises(FileNotFoundError, match="no checkpoint at"):
        load_pretrained(WanDiT(T2V), tmp_path / "absent.pt")
    (tmp_path / "checkpoints").mkdir()  # beside export/, the folder of a stage
    for folder in (tmp_path, tmp_path / "export"):
        with pytest.raises(ValueError, match=rf"0 \.safetensors files and no index; give {tmp_path}/export/student$"):
            load_pretrained(WanDiT(T2V), folder)


@pytest.mark.parametrize("name", ["w.safetensors", "w.pt"])
@pytest.mark.parametrize("kept", [0, 0.5, "version https://git-lfs.github.com/spec/v1"])
def test_a_file_that_is_not_whole_is_named(tmp_path: Path, name: str, kept: float | str):
    path, state = tmp_path / name, WanDiT(T2V).state_dict()
    save_file(state, path) if path.suffix == ".safetensors" else torch.save(state, path)
    whole = path.read_bytes()
    path.write_bytes(kept.encode() if isinstance(kept, str) else whole[: int(kept * len(whole))])
    with pytest.raises(ValueError, match=rf"{path} \(\d+ bytes\) cannot be read as weights: .*get it again"):
        load_pretrained(WanDiT(T2V), path)


def test_our_own_folder_with_weights_cut_short_is_named(tmp_path: Path):
    save_dit(WanDiT(T2V), tmp_path)
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    for read in (load_dit, read_provenance):
        with pytest.raises(ValueError, match=rf"{weights} .* cannot be read as weights"):
            read(tmp_path)


def test_shards_that_are_absent_are_named(tmp_path: Path):
    WanTransformer3DModel(**diffusers_arguments(T2V)).save_pretrained(tmp_path, max_shard_size="100KB")
    load_pretrained(WanDiT(T2V), tmp_path)
    first, second, *_ = sorted(tmp_path.glob("*-of-*.safetensors"))
    whole = load_file(second)
    save_file(whole | load_file(first), second)
    with pytest.raises(ValueError, match=rf"{second} holds .*, as another file of {tmp_path} does"):
        load_pretrained(WanDiT(T2V), tmp_path)
    save_file(whole, second)
    first.unlink()
    with pytest.raises(FileNotFoundError, match=rf"{tmp_path} lacks {first.name} of .*index.json; download"):
        load_pretrained(WanDiT(T2V), tmp_path)
    index = next(tmp_path.glob("*.index.json"))
    index.write_text("{}")
    with pytest.raises(ValueError, match=rf"{index} is no index of weights"):
        load_pretrained(WanDiT(T2V), tmp_path)
    (tmp_path / "half.safetensors.index.json").write_text("{}")
    with pytest.raises(ValueError, match=r"holds .*, half.safetensors.index.json: which model is meant"):
        load_pretrained(WanDiT(T2V), tmp_path)


def test_what_is_no_state_or_has_other_shapes_is_named(tmp_path: Path):
    path = tmp_path / "w.pt"
    torch.save([torch.zeros(1)], path)
    with pytest.raises(ValueError, match=f"{path} is not of a DiT: it holds a list, not tensors by name"):
        load_pretrained(WanDiT(T2V), path)
    model = WanDiT(T2V)
    torch.save(model.state_dict() | {"blocks.1.self_attn.q.weight": torch.zeros(3, 3)}, path)
    with pytest.raises(ValueError, match=rf"{path} holds tensors of other shapes .*: blocks.1.self_attn.q.weight"):
        load_pretrained(model, path)
