"""The RMS normalisation of the Wan VAE, in fewer passes over its features than diffusers' module makes.

Same parameters under the same names, so weights load and save as they are. The norm over channels is summed in
float32; only that sum, which has no channels, is kept in float32, where diffusers converts all features.
"""

from __future__ import annotations

from torch import Tensor, float32, nn

SMALLEST_SQUARE = 1e-24  # of a feature's norm, as in torch.nn.functional.normalize


class ChannelNorm(nn.Module):
    """x [B, C, ...] -> x / |x| * sqrt(C) * gamma, with the norm over channels."""

    def __init__(self, gamma: nn.Parameter) -> None:  # [C, 1, ...]
        super().__init__()
        self.gamma = gamma

    def forward(self, x: Tensor) -> Tensor:
        squares = (x * x).sum(1, keepdim=True, dtype=float32).clamp(min=SMALLEST_SQUARE)
        return x * (squares.rsqrt() * x.shape[1] ** 0.5).to(x.dtype) * self.gamma


def replace_norms(network: nn.Module) -> None:
    """Put a ChannelNorm where diffusers has a WanRMS_norm.

    Raises ValueError for one with a bias, or with channels last: no Wan VAE has any.
    """
    from diffusers.models.autoencoders.autoencoder_kl_wan import WanRMS_norm

    for parent in list(network.modules()):
        for name, child in parent.named_children():
            if not isinstance(child, WanRMS_norm):
                continue
            if not child.channel_first or isinstance(child.bias, nn.Parameter):
                raise ValueError(f"{name} normalises with a bias or over the last dimension; ChannelNorm does neither")
            setattr(parent, name, ChannelNorm(child.gamma))
