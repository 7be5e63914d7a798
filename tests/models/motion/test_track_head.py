"""The track head: grouping in time, equality of chunks and whole clip, zero start."""

from __future__ import annotations

import pytest
import torch

from models.condition import Condition, pixel_frames_of
from models.motion.track_head import TrackHead


def head(dtype: torch.dtype = torch.float32) -> TrackHead:
    torch.manual_seed(0)
    module = TrackHead(id_dim=8, hidden=32, out_channels=4)
    torch.nn.init.normal_(module.project.weight)
    torch.nn.init.normal_(module.project.bias)
    return module.to(dtype)


def clip(num_latents: int = 9, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    rng = torch.Generator().manual_seed(1)
    return torch.randn(2, 8, 1 + 4 * (num_latents - 1), 3, 5, generator=rng).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("chunk_frames", [1, 3])
def test_chunks_equal_the_whole_clip_bit_for_bit(chunk_frames, dtype):
    track_map = clip(dtype=dtype)
    condition = Condition(torch.ones(2, 4, 3), torch.ones(1, 4, 3), track_map=track_map)
    module = head(dtype)
    with torch.no_grad():
        parts = [module(condition.chunk(first, chunk_frames).track_map) for first in range(0, 9, chunk_frames)]
        assert torch.equal(torch.cat(parts, 2), module(track_map))


def test_it_is_the_two_convolutions():
    module, track_map = head(), clip()
    repeated = torch.cat([track_map[:, :, :1]] * 3 + [track_map], 2)
    expected = module.project(module.activation(module.compress(repeated)))
    torch.testing.assert_close(module(track_map), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("latent", [0, 1, 2, 8])
def test_a_latent_frame_sees_exactly_its_pixel_frames(latent):
    module, track_map = head(), clip()
    frames = pixel_frames_of(latent, 1)
    changed = track_map.clone()
    changed[:, :, frames] += 1.0
    with torch.no_grad():
        differs = (module(changed) != module(track_map)).any(0).any(0).any(-1).any(-1)
    assert differs.tolist() == [index == latent for index in range(9)]


def test_a_fresh_head_is_the_zero_map_but_can_learn():
    module = TrackHead(id_dim=8, hidden=32, out_channels=4)
    output = module(clip())
    assert output.shape == (2, 4, 9, 3, 5) and not output.any()
    output.sum().backward()
    assert module.project.weight.grad.abs().sum() > 0


def test_dropped_motion_is_zero_at_the_input_not_at_the_output():
    condition = Condition(torch.ones(2, 4, 3), torch.ones(1, 4, 3), track_map=clip())
    null = head()(condition.drop("motion").track_map)
    masked = head()(condition.mask_motion(torch.ones(2, 9, dtype=torch.bool)).track_map)
    assert torch.equal(null, masked) and null.abs().sum() > 0


@pytest.mark.parametrize("num_frames", [0, 2, 3, 6])
def test_other_lengths_are_refused(num_frames):
    with pytest.raises(ValueError, match=f"track map has {num_frames} frames"):
        head()(torch.zeros(1, 8, num_frames, 3, 5))
