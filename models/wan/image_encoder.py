"""CLIP features of the first frame, for the Wan models with an image cross-attention branch.

Wan reads open-CLIP XLM-R ViT-H/14's tokens after all blocks but the last: transformers'
``hidden_states[-2]``, the class token first. The image is resized to the model's square input without
cropping, bicubic and without antialiasing, as Wan does, then normalised with CLIP's statistics.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.pretrained import load_whole

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


class ClipImageEncoder(nn.Module):
    """Frozen CLIP vision tower from a folder in transformers format (a Wan repository's image_encoder/)."""

    def __init__(self, path: str | Path, dtype: torch.dtype = torch.float32) -> None:
        from transformers import CLIPVisionModel

        super().__init__()
        if not (Path(path) / "config.json").is_file():
            raise FileNotFoundError(
                f"no CLIP image encoder in {path}: there is no config.json. Download the image_encoder/ "
                "folder of a Wan I2V model in diffusers format (such as Wan-AI/Wan2.1-I2V-14B-480P-Diffusers)"
            )
        self.model = load_whole(CLIPVisionModel, path, dtype=dtype).eval().requires_grad_(False)
        settings = self.model.config
        self.image_size_px: int = settings.image_size
        self.clip_dim: int = settings.hidden_size
        self.num_tokens: int = 1 + (settings.image_size // settings.patch_size) ** 2

    @torch.no_grad()
    def encode(self, pixels: Tensor) -> Tensor:
        """Pixels [B, 3, H, W] in [-1, 1], any size -> [B, num_tokens, clip_dim]; 257 x 1280 for Wan."""
        if pixels.ndim != 4 or pixels.shape[1] != 3:
            raise ValueError(
                f"pixels have shape {tuple(pixels.shape)}; CLIP takes images [B, 3, H, W], frame 0 of a clip"
            )
        weight = next(self.model.parameters())
        pixels = pixels.to(weight.device, torch.float32)
        size = (self.image_size_px, self.image_size_px)
        images = F.interpolate(pixels, size=size, mode="bicubic", align_corners=False)
        mean, std = torch.tensor([CLIP_MEAN, CLIP_STD], device=weight.device)[:, None, :, None, None]
        images = (images * 0.5 + 0.5 - mean) / std
        return self.model(pixel_values=images.to(weight.dtype), output_hidden_states=True).hidden_states[-2]
