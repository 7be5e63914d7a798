"""Latents back to frames."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from stream.codecs import CPU_CLIPS, Codecs


@pytest.mark.parametrize("num_clips", [1, CPU_CLIPS, 2 * CPU_CLIPS + 1])
def test_clips_that_are_decoded_in_groups_are_those_decoded_alone(tiny_weights, num_clips) -> None:
    codecs = Codecs.load(tiny_weights.model_cfg)
    latents = torch.randn(num_clips, *codecs.model_cfg.latent_shape, generator=torch.Generator().manual_seed(0))
    alone = np.concatenate([codecs.decode(clip[None]) for clip in latents])
    together = codecs.decode(latents)
    assert together.dtype == np.uint8 and together.shape == alone.shape and alone.std() > 1
    assert np.abs(together.astype(int) - alone).max() <= 1


def test_a_damaged_clip_of_any_group_is_refused(tiny_weights) -> None:
    codecs = Codecs.load(tiny_weights.model_cfg)
    latents = torch.zeros(CPU_CLIPS + 1, *codecs.model_cfg.latent_shape)
    latents[-1, 0, 0, 0, 0] = torch.nan
    with pytest.raises(ValueError, match="nan or infinite"):
        codecs.decode(latents)
