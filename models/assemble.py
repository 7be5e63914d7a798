"""One model, described by one dataclass: which parts it has, how they fit together, where their weights are.

``ModelConfig`` is the schema of conf/model/*.yaml. ``validate`` checks that its parts fit before anything is
built; the ``build_*`` functions and the ``load_*`` functions build one part each. Checks within one part are in that
part's own dataclass.

Left out: Hydra (``data/app.py``), and the choice of a device.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from models.condition import FRAMES_PER_LATENT, ClipGeometry, num_pixel_frames
from models.device import DTYPES, fast_dtype, pick_device
from models.diffusion.guidance import Guidance
from models.rollout import RolloutConfig
from models.vae.latent_space import LatentSpace
from models.vae.tiny_vae import TinyVae
from models.vae.wan_vae import VaeConfig, WanVae, latent_space_of
from models.wan.checkpoint import load_dit, load_pretrained, read_provenance
from models.wan.config import WanConfig
from models.wan.dit import WanDiT
from models.wan.image_encoder import ClipImageEncoder
from models.wan.text_encoder import HashedEncoder, TextEncoder, Umt5Encoder, VocabularyEncoder

log = logging.getLogger(__name__)

TEXT_KINDS = ("vocabulary", "hashed", "umt5")
REPO_DIR = Path(__file__).resolve().parents[1]
ROLE_STAGES = {"teacher": "teacher", "student": "self_forcing"}  # role: the stage that makes it
OTHER_ROLES = {"teacher": ("causal_init", "causal_teacher", "self_forcing"), "student": ("teacher",)}


def located(path: str) -> str:
    """The path, or where it is below the repository if only there is something, as the shipped weights are."""
    if Path(path).exists() or not (REPO_DIR / path).exists():
        return path
    log.info("%s is not in the working directory; taken from %s", path, REPO_DIR)
    return str(REPO_DIR / path)


@dataclass
class TextConfig:
    """Which text encoder; its length and width are dit.text_len and dit.text_dim."""

    kind: str = "vocabulary"  # vocabulary: fixed code of the sprites world | hashed: the same for any words | umt5
    path: str | None = None  # umt5: folder with text_encoder/ and tokenizer/
    null_caption: str = ""  # umt5: what a dropped text means; the vocabulary's null is the empty caption


@dataclass
class ModelConfig:
    """All of a model. Paths are relative to the working directory, or else to the repository; an unset one is refused
    when needed.
    """

    clip: ClipGeometry  # size of a clip, for data, training, streaming and evaluation
    dit: WanConfig  # architecture of teacher, student and critic
    name: str = ""  # of the YAML file
    vae: VaeConfig = field(default_factory=VaeConfig)
    tiny_vae: str | None = None  # folder of a trained tiny VAE, or a published taew2_1 / taew2_2 file
    text: TextConfig = field(default_factory=TextConfig)
    clip_encoder: str | None = None  # folder of the CLIP image encoder; needed where dit.clip_dim is set
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    guidance: dict[str, float] = field(default_factory=dict)  # weight of text and motion guidance; 0: without it
    teacher: str | None = None  # folder of the trained teacher, or a published checkpoint
    student: str | None = None  # folder of the distilled student
    dtype: str = "float32"  # of frozen weights: float32 | bfloat16 | auto, the faster on the device

    def __post_init__(self) -> None:
        self.vae = replace(self.vae, path=self.vae.path and located(self.vae.path))
        self.text = replace(self.text, path=self.text.path and located(self.text.path))
        for name in ("clip_encoder", "tiny_vae", "teacher", "student"):
            path = vars(self)[name]
            setattr(self, name, path and located(path))

    def on(self, device: torch.device) -> ModelConfig:
        """With dtype=auto settled for the device, so that what is made with it names it."""
        return replace(self, dtype=fast_dtype(device)) if self.dtype == "auto" else self

    @property
    def torch_dtype(self) -> torch.dtype:
        return DTYPES[self.on(pick_device("auto")).dtype]

    @property
    def latent_size(self) -> tuple[int, int]:
        """Height and width of a latent frame, in cells."""
        return self.clip.height // self.vae.spatial_stride, self.clip.width // self.vae.spatial_stride

    @property
    def latent_shape(self) -> tuple[int, int, int, int]:
        """[C, F, h, w] of a clip's latents."""
        return (self.vae.z_dim, self.clip.num_latents, *self.latent_size)

    @property
    def latent_space(self) -> LatentSpace | None:
        """That of the VAE at vae.path; None where there is none: latents that are stored need no VAE."""
        return latent_space_of(self.vae.path) if self.vae.path else None

    @property
    def num_chunks(self) -> int:
        """Chunks in a clip."""
        return self.clip.num_latents // self.rollout.chunk_frames


# --------------------------------------------------------------------------------------------- validation
def validate(cfg: ModelConfig) -> None:
    """Raises ValueError where the parts of a model do not fit together. Builds nothing, reads no file."""
    _check_choices(cfg)
    _check_size(cfg)
    _check_rollout(cfg)
    _check_channels(cfg)
    _check_text(cfg)
    _check_guidance(cfg)


def _check_choices(cfg: ModelConfig) -> None:
    for name, value, allowed in (
        ("dtype", cfg.dtype, (*DTYPES, "auto")),
        ("text.kind", cfg.text.kind, TEXT_KINDS),
    ):
        if value not in allowed:
            raise ValueError(f"model.{name}={value!r} must be {' or '.join(allowed)}")


def _check_size(cfg: ModelConfig) -> None:
    for side, value, patch in (
        ("height", cfg.clip.height, cfg.dit.patch_size[1]),
        ("width", cfg.clip.width, cfg.dit.patch_size[2]),
    ):
        multiple = cfg.vae.spatial_stride * patch
        if value % multiple:
            nearest = max(1, round(value / multiple)) * multiple
            raise ValueError(
                f"model.clip.{side}={value} must be a multiple of {multiple} (VAE stride "
                f"{cfg.vae.spatial_stride} x patch {patch}); nearest valid: {nearest}"
            )


def _check_rollout(cfg: ModelConfig) -> None:
    rollout, latents = cfg.rollout, cfg.clip.num_latents
    if rollout.window_chunks is not None and rollout.window_chunks < 1:
        raise ValueError(
            f"model.rollout.window_chunks={rollout.window_chunks} must be at least 1, or null for all past "
            "chunks: a chunk that does not see the one before it cannot continue it"
        )
    if latents % rollout.chunk_frames:
        raise ValueError(
            f"model.clip.num_frames={cfg.clip.num_frames} gives {latents} latent frames, which "
            f"model.rollout.chunk_frames={rollout.chunk_frames} does not divide; nearest valid num_frames: "
            f"{nearest_num_frames(cfg, cfg.clip.num_frames)}"
        )


def nearest_num_frames(cfg: ModelConfig, num_frames: int) -> int:
    """The clip length of whole chunks that is nearest to a number of frames."""
    chunk = cfg.rollout.chunk_frames
    return num_pixel_frames(max(1, round(((num_frames - 1) / FRAMES_PER_LATENT + 1) / chunk)) * chunk)


def _check_channels(cfg: ModelConfig) -> None:
    if cfg.dit.latent_channels != cfg.vae.z_dim:
        raise ValueError(
            f"model.dit.latent_channels={cfg.dit.latent_channels} must be the VAE's z_dim={cfg.vae.z_dim}; change one"
        )
    if cfg.dit.track_encoding == "rgb" and cfg.dit.track_channels not in (0, cfg.vae.z_dim):
        raise ValueError(
            f"model.dit.track_channels={cfg.dit.track_channels} must be z_dim={cfg.vae.z_dim} where "
            "track_encoding is rgb: tracks are drawn and encoded by the VAE"
        )
    if (cfg.dit.clip_dim is None) != (cfg.clip_encoder is None):
        raise ValueError(
            f"model.dit.clip_dim={cfg.dit.clip_dim} and model.clip_encoder={cfg.clip_encoder} must both be "
            "set or both be null: the image cross-attention reads what the CLIP encoder writes"
        )


def _check_text(cfg: ModelConfig) -> None:
    wanted = VocabularyEncoder.dim_for(cfg.dit.text_len)
    if cfg.text.kind != "umt5" and cfg.dit.text_dim != wanted:
        raise ValueError(
            f"model.dit.text_dim={cfg.dit.text_dim} must be {wanted}, the width of the word code at "
            f"text_len={cfg.dit.text_len}"
        )


def _check_guidance(cfg: ModelConfig) -> None:
    if "motion" in Guidance(cfg.guidance).weights and cfg.dit.track_channels == 0:
        raise ValueError(
            f"model.guidance.motion={cfg.guidance['motion']} needs a model that sees tracks, but model.dit."
            "track_channels=0; set the weight to 0"
        )


# --------------------------------------------------------------------------------------------- building
def build_vae(cfg: ModelConfig, seed: int | None = None) -> WanVae:
    """With a seed, fresh weights (to train a VAE, or for tests); without, the weights at ``vae.path``.

    Raises ValueError where the path is unset: nothing may be encoded by a VAE that was never trained.
    """
    if seed is not None:
        return WanVae.from_config(cfg.vae, seed)
    if cfg.vae.path is None:
        raise ValueError("model.vae.path is not set; train a VAE with `python -m train stage=vae` and pass its folder")
    return WanVae.from_folder(cfg.vae.path, expected=cfg.vae)


def build_tiny_vae(cfg: ModelConfig, latent_space: LatentSpace) -> TinyVae:
    """The tiny VAE at ``tiny_vae``; ValueError where it decodes another latent space than the VAE's."""
    if cfg.tiny_vae is None:
        raise ValueError(
            "model.tiny_vae is not set; pass the folder of a trained one, or a taew2_1 / taew2_2 file of "
            "madebyollin/taehv"
        )
    if Path(cfg.tiny_vae).is_file():
        return TinyVae.from_file(cfg.tiny_vae, latent_space)
    return TinyVae.from_folder(cfg.tiny_vae, expected=latent_space)


def build_text_encoder(cfg: ModelConfig) -> TextEncoder:
    """The text encoder, at the DiT's length; ValueError where its width is not the DiT's."""
    encoder: TextEncoder
    if cfg.text.kind == "vocabulary":
        encoder = VocabularyEncoder(cfg.dit.text_len)
    elif cfg.text.kind == "hashed":
        encoder = HashedEncoder(cfg.dit.text_len)
    elif cfg.text.path is None:
        raise ValueError("model.text.path is not set; pass a folder with text_encoder/ and tokenizer/ of a Wan model")
    else:
        encoder = Umt5Encoder(cfg.text.path, cfg.dit.text_len, cfg.text.null_caption, cfg.torch_dtype)
    if encoder.text_dim != cfg.dit.text_dim:
        raise ValueError(
            f"the text encoder at model.text.path={cfg.text.path} has width {encoder.text_dim}; "
            f"model.dit.text_dim={cfg.dit.text_dim} must be the same"
        )
    return encoder


def build_clip_encoder(cfg: ModelConfig) -> ClipImageEncoder | None:
    """The CLIP image encoder, or None for a model without image cross-attention."""
    if cfg.clip_encoder is None:
        return None
    encoder = ClipImageEncoder(cfg.clip_encoder, cfg.torch_dtype)
    if encoder.clip_dim != cfg.dit.clip_dim:
        raise ValueError(
            f"the CLIP encoder at model.clip_encoder={cfg.clip_encoder} has width {encoder.clip_dim}; "
            f"model.dit.clip_dim={cfg.dit.clip_dim} must be the same"
        )
    return encoder


def build_dit(cfg: ModelConfig, seed: int) -> WanDiT:
    """A DiT with fresh weights, drawn from the seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return WanDiT(cfg.dit)


def load_role(cfg: ModelConfig, role: str) -> WanDiT:
    """The trained "teacher" or "student": a folder that a stage exported, or a published checkpoint of any
    format.

    Raises ValueError where the path is unset, the checkpoint lacks what this model needs to see its tracks and
    image, or was made for another VAE than model.vae; FileNotFoundError where nothing is there.
    """
    if role not in ROLE_STAGES:
        raise ValueError(f"role={role!r} must be {' or '.join(ROLE_STAGES)}")
    path = {"teacher": cfg.teacher, "student": cfg.student}[role]
    made_by = f"make one with `python -m train stage={ROLE_STAGES[role]}` and pass its folder"
    if not path:
        raise ValueError(f"model.{role} is not set; {made_by}")
    if not Path(path).exists():
        raise FileNotFoundError(f"model.{role}={path}: there is nothing; {made_by}")
    if (Path(path) / "model.json").is_file():
        made = read_provenance(path)
        if made.get("stage") in OTHER_ROLES[role]:
            log.warning("model.%s=%s was made by stage=%s: it is no %s", role, path, made["stage"], role)
        if others := cfg.rollout.differences(made.get("rollout", {})):
            log.warning("model.%s=%s has not seen model.rollout.%s in training", role, path, ", ".join(others))
        return load_exported(cfg, path, owner=f"model.{role}={path}")
    log.info("%s: published checkpoint %s", role, path)
    dit = build_dit(cfg, seed=0)
    if absent := load_pretrained(dit, path):
        raise ValueError(
            f"model.{role}={path} lacks {', '.join(absent)}, which model.dit has: it would not see these inputs; "
            f"change model.dit, or train them with `python -m train stage=teacher stage.init_from={path}`"
        )
    return _in_space_of_vae(dit, cfg, owner=f"model.{role}={path}")


def load_exported(cfg: ModelConfig, path: str, owner: str) -> WanDiT:
    """The DiT in a folder that a stage exported.

    Raises ValueError where it is not of model.dit, or was made for another latent space than that of model.vae.
    """
    return _in_space_of_vae(load_dit(path, expected=cfg.dit), cfg, owner)


def _in_space_of_vae(dit: WanDiT, cfg: ModelConfig, owner: str) -> WanDiT:
    """A DiT of unknown latent space, as published ones are, is taken to be in that of the VAE it is used with."""
    owner = f"{owner}, to be used with model.vae.path={cfg.vae.path},"
    dit.latent_space = LatentSpace.shared(cfg.latent_space, dit.latent_space, owner)
    return dit


def load_for_inference(cfg: ModelConfig, role: str, device: torch.device | str) -> WanDiT:
    """`load_role`, in eval mode on its device and in model.dtype, for weights that do not change any more."""
    dtype = cfg.on(torch.device(device)).torch_dtype
    dit = load_role(cfg, role).eval().requires_grad_(False).to(device, dtype)
    dit.fuse_projections()
    return dit
