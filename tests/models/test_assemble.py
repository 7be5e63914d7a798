"""The model configs: every YAML fits the schema and itself; what does not fit is refused with the way out."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf
from omegaconf.errors import ConfigKeyError

from models import assemble
from models.assemble import (
    ModelConfig,
    TextConfig,
    build_clip_encoder,
    build_dit,
    build_text_encoder,
    build_tiny_vae,
    build_vae,
    load_for_inference,
    load_role,
    located,
    nearest_num_frames,
    validate,
)
from models.condition import ClipGeometry
from models.rollout import RolloutConfig
from models.vae.latent_space import LatentSpace
from models.vae.tiny_vae import TinyVae, TinyVaeConfig
from models.vae.wan_vae import VaeConfig
from models.wan.checkpoint import save_dit
from models.wan.config import WanConfig

CONF = Path(__file__).parents[2] / "conf" / "model"
NAMES = sorted(path.stem for path in CONF.glob("*.yaml"))


def load(name: str, *overrides: str) -> ModelConfig:
    content = OmegaConf.load(CONF / f"{name}.yaml")
    assert content.pop("_target_") == "models.assemble.ModelConfig"
    assert content.pop("defaults") == [f"{name}_schema", "_self_"]
    merged = OmegaConf.merge(OmegaConf.structured(ModelConfig), content, OmegaConf.from_dotlist(list(overrides)))
    return OmegaConf.to_object(merged)


@pytest.mark.parametrize("name", NAMES)
def test_every_config_fits(name):
    cfg = load(name)
    assert cfg.name == name and isinstance(cfg.dit, WanConfig) and isinstance(cfg.clip, ClipGeometry)
    validate(cfg)


@pytest.mark.parametrize("faster", ["float32", "bfloat16"])
def test_auto_is_settled_as_the_faster_dtype_of_the_device_that_is_used(monkeypatch, faster):
    """A GPU beside a processor without bfloat16 products does not make them fast with device=cpu."""
    slower = {"float32": "bfloat16", "bfloat16": "float32"}[faster]
    monkeypatch.setattr(assemble, "fast_dtype", lambda device: faster if device.type == "cpu" else slower)
    cfg = load("sprites", "dtype=auto")
    assert cfg.on(torch.device("cpu")).dtype == faster and cfg.on(torch.device("cuda")).dtype == slower
    assert cfg.on(torch.device("cpu")).torch_dtype == getattr(torch, faster)
    assert load("sprites", "dtype=bfloat16").on(torch.device("cpu")).dtype == "bfloat16", "what is named is taken"


def test_shipped_weights_are_found_from_any_working_directory(tmp_path, monkeypatch, caplog):
    monkeypatch.chdir(tmp_path)
    shipped = load("sprites")
    for path in (shipped.vae.path, shipped.tiny_vae, shipped.teacher, shipped.student):
        assert (Path(path) / "config.json").is_file() or (Path(path) / "model.json").is_file()
    assert load("tiny").teacher is None
    caplog.set_level("INFO")
    assert located("models/zoo") == str(CONF.parents[1] / "models/zoo")
    assert "models/zoo is not in the working directory; taken from" in caplog.text
    assert located("no/such/weights") == "no/such/weights"
    (tmp_path / "models/zoo").mkdir(parents=True)
    assert located("models/zoo") == "models/zoo", "the working directory comes first"


@pytest.mark.parametrize(("wanted", "nearest"), [(1, 9), (10, 9), (14, 9), (16, 21), (21, 21), (33, 33), (49, 45)])
def test_nearest_length_of_whole_chunks(wanted, nearest):
    cfg = load("tiny")
    assert nearest_num_frames(cfg, wanted) == nearest
    validate(replace(cfg, clip=replace(cfg.clip, num_frames=nearest)))


def test_there_are_the_promised_configs():
    assert {"tiny", "sprites", "sprites_quick", "wan_1_3b", "wan_5b"} <= set(NAMES)


@pytest.mark.parametrize(
    ("name", "tokens_per_latent", "num_chunks", "in_channels"),
    [("tiny", 4, 3, 8), ("sprites", 64, 3, 32), ("sprites_quick", 16, 3, 32), ("wan_1_3b", 1560, 7, 48),
     ("wan_5b", 880, 10, 96)],
)  # fmt: skip
def test_derived_sizes(name, tokens_per_latent, num_chunks, in_channels):
    cfg = load(name)
    rows, columns = (size // patch for size, patch in zip(cfg.latent_size, cfg.dit.patch_size[1:]))
    assert (rows * columns, cfg.num_chunks, cfg.dit.in_channels) == (
        tokens_per_latent,
        num_chunks,
        in_channels,
    )
    assert cfg.latent_shape == (cfg.vae.z_dim, cfg.clip.num_latents, *cfg.latent_size)


def test_wan_configs_are_the_published_architectures():
    one, five = load("wan_1_3b"), load("wan_5b")
    control = WanConfig.wan_1_3b(clip_dim=1280, image_conditioning="fun_control", track_channels=16)
    assert one.dit.architecture_differences(control) == []
    assert five.dit.architecture_differences(WanConfig.wan_5b(track_channels=48)) == []
    assert replace(one.vae, path=None) == VaeConfig.wan_2_1()
    assert replace(five.vae, path=None) == VaeConfig.wan_2_2()
    assert (five.clip.num_frames - 1) / five.clip.fps <= 120 / 24, (
        "a clip that Wan 2.2 made, 121 frames, is long enough"
    )


@pytest.mark.parametrize("unknown", ["dit.num_layer=3", "rollout.windo_chunks=2", "clip.frames=33", "vaee=1"])
def test_an_unknown_key_is_refused(unknown):
    with pytest.raises(ConfigKeyError, match=re.escape(unknown.split("=")[0].split(".")[-1])):
        load("tiny", unknown)


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("clip.num_frames=80", "num_frames=80 must be 1 + 4k; nearest valid: 81"),
        ("clip.num_frames=41", "which model.rollout.chunk_frames=3 does not divide; nearest "
                               "valid num_frames: 45"),
        ("clip.height=18", "height=18 must be a multiple of 8 (VAE stride 4 x patch 2); nearest valid: 16"),
        ("clip.width=28", "clip.width=28 must be a multiple of 8 (VAE stride 4 x patch 2); nearest valid:"),
        ("rollout.window_chunks=0", "window_chunks=0 must be at least 1"),
        ("rollout.sink_chunks=-1", "sink_chunks=-1"),
        ("rollout.positions=relative", "relative"),
        ("rollout.step_indices=[0,50]", "step_indices=[0, 50]"),
        ("rollout.step_indices=[16,32]", "step_indices=[16, 32]"),
        ("dit.latent_channels=5", "model.dit.latent_channels=5 must be the VAE's z_dim=4"),
        ("dit.text_len=31", "model.dit.text_dim=288 must be 287"),
        ("dit.clip_dim=1280", "model.dit.clip_dim=1280 and model.clip_encoder=None must both be set"),
        ("text.kind=t5", "model.text.kind='t5' must be vocabulary or hashed or umt5"),
        ("dtype=float16", "model.dtype='float16' must be float32 or bfloat16 or auto"),
        ("guidance.txt=3", "guidance 'txt' must be one of text, motion"),
        ("dit.track_channels=0", "model.guidance.motion=1.5 needs a model that sees tracks"),
        ("vae.temporal_downsample=[true,false]", "true exactly twice"),
    ],
)  # fmt: skip
def test_parts_that_do_not_fit_are_refused(override, told):
    with pytest.raises(ValueError, match=re.escape(told)):
        validate(load("tiny", override))


def test_121_frames_of_chunks_of_three_point_to_117():
    with pytest.raises(ValueError, match=r"31 latent frames.*nearest valid num_frames: 117"):
        validate(load("wan_5b", "clip.num_frames=121"))


@settings(deadline=None)
@given(height=st.integers(1, 300), num_latents=st.integers(1, 60), chunk_frames=st.integers(1, 7))
def test_the_nearest_valid_value_is_valid(height, num_latents, chunk_frames):
    clip = ClipGeometry(height=height, width=16, num_frames=4 * num_latents - 3, fps=16)
    cfg = replace(load("tiny"), clip=clip, rollout=RolloutConfig(chunk_frames=chunk_frames))
    for _ in range(2):
        try:
            validate(cfg)
        except ValueError as error:
            told = re.search(r"clip\.(\w+)=.* nearest valid(?: num_frames)?: (\d+)", str(error))
            field, value = told.groups()
            step = 8 if field == "height" else 4 * chunk_frames
            assert abs(int(value) - vars(cfg.clip)[field]) <= step
            cfg = replace(cfg, clip=replace(cfg.clip, **{field: int(value)}))
    validate(cfg)


# ---------------------------------------------------------------------------- building
def test_fresh_weights_come_from_the_seed_alone():
    cfg = load("tiny")
    for build in (build_vae, build_dit):
        one, two, other = (build(cfg, seed=seed).state_dict() for seed in (1, 1, 2))
        assert all(torch.equal(one[name], two[name]) for name in one)
        assert not all(torch.equal(one[name], other[name]) for name in one)


def test_a_vae_is_loaded_unless_a_seed_asks_for_a_fresh_one(tmp_path):
    cfg = load("tiny")
    with pytest.raises(ValueError, match=r"model\.vae\.path is not set; train a VAE"):
        build_vae(cfg)
    saved = build_vae(cfg, seed=3)
    saved.save(tmp_path / "vae")
    cfg.vae.path = str(tmp_path / "vae")
    loaded = build_vae(cfg).state_dict()
    assert all(torch.equal(loaded[name], value) for name, value in saved.state_dict().items())
    assert build_vae(cfg).latents_per_call is None
    cfg.vae.path = str(tmp_path / "elsewhere")
    with pytest.raises(FileNotFoundError, match="elsewhere"):
        build_vae(cfg)


def test_the_tiny_vae_must_decode_the_space_of_the_vae(tmp_path):
    cfg = load("tiny")
    space = build_vae(cfg, seed=0).latent_space
    with pytest.raises(ValueError, match=r"model\.tiny_vae is not set"):
        build_tiny_vae(cfg, space)
    tiny_cfg = TinyVaeConfig(
        latent_channels=4, decoder_widths=[8, 8, 8], time_upscale=[True, True], encoder_width=8,
        time_downscale=[True, True],
    )  # fmt: skip
    TinyVae.from_config(tiny_cfg, space).save(tmp_path / "tiny")
    cfg.tiny_vae = str(tmp_path / "tiny")
    assert build_tiny_vae(cfg, space).latent_space == space
    with pytest.raises(ValueError, match="another latent space"):
        build_tiny_vae(cfg, LatentSpace.of((0.5,) * 4, (1.0,) * 4, 4))
    torch.save(
        TinyVae.from_config(TinyVaeConfig.taew2_1(), LatentSpace.wan_2_1()).state_dict(),
        tmp_path / "taew2_1.pth",
    )
    cfg.tiny_vae = str(tmp_path / "taew2_1.pth")
    assert build_tiny_vae(cfg, LatentSpace.wan_2_1()).latent_channels == 16


def test_encoders_of_the_sprites_world():
    cfg = load("sprites")
    encoder = build_text_encoder(cfg)
    codes = encoder.encode(["a red striped disc and a blue spotted ring on a cyan background then the disc turns pink"])
    assert codes.shape == (1, cfg.dit.text_len, cfg.dit.text_dim)
    assert build_clip_encoder(cfg) is None
    cfg.text = TextConfig(kind="umt5")
    with pytest.raises(ValueError, match=r"model\.text\.path is not set"):
        build_text_encoder(cfg)


def test_roles_are_loaded_from_their_folders(tmp_path, monkeypatch):
    cfg = load("tiny")
    with pytest.raises(
        ValueError, match=r"model\.student is not set; make one with `python -m train stage=self_forcing`"
    ):
        load_role(cfg, "student")
    with pytest.raises(ValueError, match="role='critic' must be teacher or student"):
        load_role(cfg, "critic")
    cfg.teacher = str(tmp_path / "teacher")
    with pytest.raises(FileNotFoundError, match="there is nothing"):
        load_role(cfg, "teacher")
    dit = build_dit(cfg, seed=5)
    save_dit(dit, tmp_path / "teacher")
    loaded = load_role(cfg, "teacher").state_dict()
    assert all(torch.equal(loaded[name], value) for name, value in dit.state_dict().items())
    ready = load_for_inference(cfg, "teacher", "cpu")
    assert not ready.training and not any(parameter.requires_grad for parameter in ready.parameters())
    assert all(torch.equal(ready.state_dict()[name], value) for name, value in dit.state_dict().items())
    cfg.dtype = "auto"
    with monkeypatch.context() as patch:  # a GPU that is not used
        patch.setattr(assemble, "pick_device", lambda name: torch.device("cuda"))
        patch.setattr(assemble, "fast_dtype", lambda device: "float32" if device.type == "cpu" else "bfloat16")
        assert load_for_inference(cfg, "teacher", "cpu").patch_embedding.weight.dtype == torch.float32
    cfg.dit = replace(cfg.dit, num_layers=3)
    with pytest.raises(ValueError, match="num_layers"):
        load_role(cfg, "teacher")


@pytest.mark.parametrize(("stage", "warned"), [("teacher", True), ("self_forcing", False), (None, False)])
def test_weights_of_the_other_role_are_told(stage, warned, tmp_path, caplog):
    cfg = load("tiny")
    cfg.student = str(tmp_path / "weights")
    save_dit(build_dit(cfg, seed=5), cfg.student, **({"stage": stage} if stage else {}))
    load_role(cfg, "student")
    assert ("was made by stage=teacher: it is no student" in caplog.text) == warned


def test_a_role_made_for_another_vae_is_refused(tmp_path):
    """VAEs of one shape have spaces of their own: a DiT makes noise for the wrong one, without an error."""
    cfg, dit = load("tiny"), build_dit(load("tiny"), seed=5)
    vae = build_vae(cfg, seed=0)
    for name, mean in (("vae", 0.0), ("other", 0.5)):
        vae.normalise_by([mean] * 4, [1.0] * 4)
        vae.save(tmp_path / name)
    cfg.vae.path, cfg.teacher, cfg.student = (str(tmp_path / name) for name in ("vae", "teacher", "student"))
    save_dit(dit, tmp_path / "teacher")
    made_here = load_role(cfg, "teacher")
    assert made_here.latent_space == cfg.latent_space, "its file does not tell, as published ones do not"
    save_dit(made_here, tmp_path / "student")
    assert load_for_inference(cfg, "student", "cpu").latent_space == cfg.latent_space
    cfg.vae.path = str(tmp_path / "other")
    load_role(cfg, "teacher")
    told = r"model\.student=.*student, to be used with model\.vae\.path=.*other, was made for another latent space"
    with pytest.raises(ValueError, match=told):
        load_role(cfg, "student")
    cfg.vae.path = str(tmp_path / "not here")
    assert load_role(cfg, "student").latent_space == made_here.latent_space
    weights = tmp_path / "student/model.safetensors"
    cfg.vae.path, cfg.student = str(tmp_path / "other"), str(weights)
    with pytest.raises(ValueError, match="was made for another latent space"):
        load_role(cfg, "student")


def test_a_published_checkpoint_is_a_teacher_too(tmp_path):
    from safetensors.torch import save_file

    cfg = load("tiny")
    dit = build_dit(cfg, seed=5)
    save_file(dit.state_dict(), tmp_path / "diffusion_pytorch_model.safetensors")
    cfg.teacher = str(tmp_path / "diffusion_pytorch_model.safetensors")
    loaded = load_role(cfg, "teacher").state_dict()
    assert all(torch.equal(loaded[name], value) for name, value in dit.state_dict().items())


@pytest.mark.parametrize(
    ("settings", "absent"),
    [
        ({}, r"track_head.project.bias, patch_embedding.weight\[track\]"),
        ({"track_encoding": "rgb", "track_channels": 16}, r"patch_embedding.weight\[track\]"),
        ({"track_channels": 0, "image_conditioning": "fun_control"}, r"patch_embedding.weight\[image\]"),
    ],
    ids=["track head", "drawn tracks", "image"],
)
def test_a_published_checkpoint_that_would_not_see_its_inputs_is_refused(settings, absent, tmp_path):
    from safetensors.torch import save_file

    cfg = load("tiny", "dit.image_conditioning=none", "dit.track_channels=0", "guidance.motion=0.0")
    cfg.teacher = str(tmp_path / "published.safetensors")
    save_file(build_dit(cfg, seed=5).state_dict(), cfg.teacher)
    cfg.dit = replace(load("tiny").dit, **({"image_conditioning": "none"} | settings))
    with pytest.raises(ValueError, match=rf"published.safetensors lacks .*{absent}, which.* train .*init_from="):
        load_role(cfg, "teacher")
