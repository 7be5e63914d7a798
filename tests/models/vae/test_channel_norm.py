from __future__ import annotations

import pytest
import torch
from diffusers.models.autoencoders.autoencoder_kl_wan import WanRMS_norm
from torch import nn

from models.vae.channel_norm import ChannelNorm, replace_norms


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("images", [True, False])
def test_it_is_the_norm_of_diffusers_with_the_same_parameters(dtype, tolerance, images) -> None:
    rng = torch.Generator().manual_seed(0)
    network = nn.ModuleDict({"norm": WanRMS_norm(24, images=images), "other": nn.Linear(2, 2)})
    nn.init.uniform_(network["norm"].gamma, 0.5, 1.5, generator=rng)
    x = torch.randn(2, 24, *([5] * (2 if images else 3)), generator=rng)
    x[0, :, 0] = 0.0  # a norm of zero
    expected, names = network["norm"](x), list(network.state_dict())
    replace_norms(network)
    assert isinstance(network["norm"], ChannelNorm) and list(network.state_dict()) == names
    found = network.to(dtype)["norm"](x.to(dtype))
    assert found.dtype is dtype
    torch.testing.assert_close(found.float(), expected, atol=tolerance, rtol=tolerance)


def test_a_norm_that_it_cannot_stand_for_is_refused() -> None:
    for norm in (WanRMS_norm(4, bias=True), WanRMS_norm(4, channel_first=False)):
        with pytest.raises(ValueError, match="0 normalises with a bias or over the last dimension"):
            replace_norms(nn.Sequential(norm))
