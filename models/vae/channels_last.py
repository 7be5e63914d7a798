"""The layers of the Wan VAE with channels last: on a CPU convolutions then need no reordering.

Each class is diffusers' with the same parameters, the same feature cache and the same result, except for rounding;
only the layout that its result has in memory, the number of copies on the way there, and for few frames the kind of
product that makes a convolution, differ. diffusers pads, resamples and shuffles in a layout with channels first, so
that every convolution begins with a conversion.
Left out: GPUs, on which this was not measured.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from diffusers.models.autoencoders.autoencoder_kl_wan import (
    AvgDown3D,
    DupUp3D,
    WanCausalConv3d,
    WanDecoder3d,
    WanResample,
    WanResidualBlock,
    WanResidualUpBlock,
    WanUpsample,
)
from einops import rearrange, repeat
from torch import Tensor, nn

from models.vae.channel_norm import SMALLEST_SQUARE, ChannelNorm

KEPT_FRAMES = 2  # that a causal convolution over three frames needs of the chunk before
FEW_FRAMES = 8  # oneDNN 3.12's gradient of 3D weights (bfloat16, AMX) goes beyond its memory up to about here
AT_ONCE = 100_000  # features normalised together, in float32: what stays in a core's cache
FIRST_CALL = "Rep"  # diffusers' mark in a cache slot: the first call skipped temporal upsampling
FIRST_SLOT = [0]  # diffusers' default for the position that all layers share; unused where there is no cache
FeatureCache = list[Tensor | str | None]


class CausalConv(WanCausalConv3d):
    """Pads in space within the convolution, and in time with the cached frames or zeros."""

    def forward(self, x: Tensor, cache_x: Tensor | None = None) -> Tensor:
        before = self._padding[4]
        x = x.contiguous(memory_format=torch.channels_last_3d)  # copies what comes from outside
        if self.kernel_size == self.stride == (1, 1, 1):  # a product over channels, which avoids the same fault
            return _channels_second(F.linear(_channels_last(x), self.weight.flatten(1), self.bias))
        if before:
            cached = [] if cache_x is None else [cache_x]
            missing = before - sum(part.shape[2] for part in cached)
            x = torch.cat([*cached, x], dim=2) if cached else x
            x = F.pad(x, (0, 0, 0, 0, missing, 0)) if missing else x
        return self.of_padded(x)

    def of_padded(self, x: Tensor) -> Tensor:
        """The same where the frames before are in front of x."""
        columns, _, rows, _, _, _ = self._padding
        if torch.is_grad_enabled() and self.stride == (1, 1, 1) and x.shape[2] < self.kernel_size[0] + FEW_FRAMES:
            return self._by_frames(x, (rows, columns))
        if _is_left_to_a_slow_kernel(x):
            return torch.mkldnn_convolution(
                x, self.weight, self.bias, padding=(0, rows, columns), stride=self.stride, dilation=(1, 1, 1), groups=1
            )
        return F.conv3d(x, self.weight, self.bias, self.stride, (0, rows, columns))

    def _by_frames(self, x: Tensor, padding: tuple[int, int]) -> Tensor:
        """The frames that each result sees as the channels of one picture."""
        seen = rearrange(x.unfold(2, self.kernel_size[0], 1), "b c t h w k -> b t h w (c k)")
        pictures = _channels_second(seen.flatten(0, 1))
        result = F.conv2d(pictures, self.weight.flatten(1, 2), self.bias, padding=padding)
        return result.unflatten(0, seen.shape[:2]).transpose(1, 2)


class Upsample(WanUpsample):
    """Repeats pixels, which is exact in any precision; diffusers does it in float32."""

    def forward(self, x: Tensor) -> Tensor:
        return nn.Upsample.forward(self, x)


class Norm(ChannelNorm):
    """The norm over channels is then over the last dimension.

    torch's own goes over all features eight times on a CPU, and they do not fit its caches; without gradients it
    is done in place, on few frames at a time.
    """

    def forward(self, x: Tensor) -> Tensor:
        channels, features = x.shape[1], _channels_last(x)
        if torch.is_grad_enabled():
            gamma = self.gamma.flatten().to(x.dtype)  # float32 beside bfloat16 under autocast
            return _channels_second(F.rms_norm(features, (channels,), gamma, SMALLEST_SQUARE / channels))
        normalised = torch.empty_like(features)
        self.write(features, normalised)
        return _channels_second(normalised)

    def write(self, features: Tensor, target: Tensor, *, activate: bool = False) -> None:
        """The norm of [B, T, H, W, C], then SiLU where asked for, into a tensor of that shape."""
        gamma = self.gamma.flatten().float() * features.shape[-1] ** 0.5
        frames = max(1, AT_ONCE // features[:, 0].numel())
        for before, after in zip(features.split(frames, dim=1), target.split(frames, dim=1)):
            length = torch.linalg.vector_norm(before, dim=-1, keepdim=True, dtype=torch.float32)
            shrink = length.clamp_(min=SMALLEST_SQUARE**0.5).reciprocal_()
            part = after if after.dtype == torch.float32 else torch.empty_like(before, dtype=torch.float32)
            torch.mul(before, shrink, out=part).mul_(gamma)
            if activate:
                F.silu(part, inplace=True)
            if part is not after:
                after.copy_(part)


class Resample(WanResample):
    """Temporal upsampling as one shuffle of the channels that the convolution doubled."""

    def forward(self, x: Tensor, feat_cache: FeatureCache | None = None, feat_idx: list[int] = FIRST_SLOT) -> Tensor:
        if self.mode != "upsample3d" or feat_cache is None:
            return super().forward(x, feat_cache, feat_idx)
        slot, feat_idx[0] = feat_idx[0], feat_idx[0] + 1
        before = feat_cache[slot]
        if before is None:
            feat_cache[slot] = FIRST_CALL
        else:
            history = None if before == FIRST_CALL else before
            feat_cache[slot] = _last_frames(x, history)
            doubled = self.time_conv(x, history)
            x = _channels_second(rearrange(_channels_last(doubled), "b t h w (two c) -> b (t two) h w c", two=2))
        batch, _, num_frames = x.shape[:3]
        x = self.resample(x.transpose(1, 2).flatten(0, 1))
        return x.unflatten(0, (batch, num_frames)).transpose(1, 2)


class UpShortcut(DupUp3D):
    """Every cell repeated to a block of frames, rows and columns."""

    def add_to(self, x: Tensor, shortcut: Tensor, first_chunk: bool) -> Tensor:
        """x + self(shortcut); without gradients in place, and what is only repeated is not written out."""
        if torch.is_grad_enabled() or self.in_channels != self.out_channels:
            return x + self(shortcut, first_chunk)
        frames, skipped = _channels_last(x), self.factor_t - 1 if first_chunk else 0
        for index, frame in enumerate(frames.unbind(1), start=skipped):
            rows = _channels_last(shortcut)[:, index // self.factor_t].repeat_interleave(self.factor_s, dim=2)
            frame.unflatten(1, (-1, self.factor_s)).add_(rows.unsqueeze(2))
        return x

    def forward(self, x: Tensor, first_chunk: bool = False) -> Tensor:
        sizes = {"ft": self.factor_t, "fh": self.factor_s, "fw": self.factor_s}
        if self.in_channels == self.out_channels:
            blocks = repeat(_channels_last(x), "b t h w c -> b (t ft) (h fh) (w fw) c", **sizes)
        else:
            repeated = _channels_last(x).repeat_interleave(self.repeats, dim=-1)
            blocks = rearrange(
                repeated, "b t h w (c ft fh fw) -> b (t ft) (h fh) (w fw) c", c=self.out_channels, **sizes
            )
        return _channels_second(blocks[:, self.factor_t - 1 :] if first_chunk else blocks)


class DownShortcut(AvgDown3D):
    """The mean over blocks of frames, rows and columns, in groups of channels."""

    def forward(self, x: Tensor) -> Tensor:
        x = F.pad(x, (0, 0, 0, 0, -x.shape[2] % self.factor_t, 0))
        blocks = rearrange(
            _channels_last(x), "b (t ft) (h fh) (w fw) c -> b t h w (c ft fh fw)",
            ft=self.factor_t, fh=self.factor_s, fw=self.factor_s,
        )  # fmt: skip
        return _channels_second(blocks.unflatten(-1, (self.out_channels, self.group_size)).mean(-1))


class ResidualBlock(WanResidualBlock):
    """Without gradients, its features are normalised straight to where the convolutions read them."""

    def forward(self, x: Tensor, feat_cache: FeatureCache | None = None, feat_idx: list[int] = FIRST_SLOT) -> Tensor:
        if feat_cache is None or torch.is_grad_enabled():
            return super().forward(x, feat_cache, feat_idx)
        first = _activate_and_convolve(x, self.norm1, self.conv1, feat_cache, feat_idx)
        second = _activate_and_convolve(first, self.norm2, self.conv2, feat_cache, feat_idx)
        return second.add_(self.conv_shortcut(x))


class UpBlock(WanResidualUpBlock):
    """Has its shortcut add itself; diffusers copies what the block begins with, also where there is no shortcut."""

    def forward(
        self,
        x: Tensor,
        feat_cache: FeatureCache | None = None,
        feat_idx: list[int] = FIRST_SLOT,
        first_chunk: bool = False,
    ) -> Tensor:
        cache = () if feat_cache is None else (feat_cache, feat_idx)
        result = x
        for resnet in self.resnets:
            result = resnet(result, *cache)
        if self.upsampler is not None:
            result = self.upsampler(result, *cache)
        return result if self.avg_shortcut is None else self.avg_shortcut.add_to(result, x, first_chunk)


class Decoder(WanDecoder3d):
    """As in ResidualBlock, for the last convolution."""

    def forward(
        self,
        x: Tensor,
        feat_cache: FeatureCache | None = None,
        feat_idx: list[int] = FIRST_SLOT,
        first_chunk: bool = False,
    ) -> Tensor:
        if feat_cache is None or torch.is_grad_enabled():
            return super().forward(x, feat_cache, feat_idx, first_chunk)
        slot, feat_idx[0] = feat_idx[0], feat_idx[0] + 1
        history, feat_cache[slot] = feat_cache[slot], _last_frames(x, feat_cache[slot])
        x = self.mid_block(self.conv_in(x, history), feat_cache=feat_cache, feat_idx=feat_idx)
        for up_block in self.up_blocks:
            x = up_block(x, feat_cache=feat_cache, feat_idx=feat_idx, first_chunk=first_chunk)
        return _activate_and_convolve(x, self.norm_out, self.conv_out, feat_cache, feat_idx)


REPLACED: dict[type[nn.Module], type[nn.Module]] = {
    WanCausalConv3d: CausalConv, WanUpsample: Upsample, WanResample: Resample, DupUp3D: UpShortcut,
    AvgDown3D: DownShortcut, WanResidualBlock: ResidualBlock, WanResidualUpBlock: UpBlock, WanDecoder3d: Decoder,
    ChannelNorm: Norm,
}  # fmt: skip


def use_channels_last(network: nn.Module) -> None:
    """Give every layer of diffusers its class above, and lay out the weights of convolutions channels last."""
    for module in network.modules():
        if (faster := REPLACED.get(type(module))) is not None:
            module.__class__ = faster  # adds no state: parameters, names and hooks stay
        if isinstance(module, nn.Conv3d):
            module.to(memory_format=torch.channels_last_3d)
        elif isinstance(module, nn.Conv2d):
            module.to(memory_format=torch.channels_last)


def _activate_and_convolve(
    x: Tensor, norm: Norm, conv: CausalConv, feat_cache: FeatureCache, feat_idx: list[int]
) -> Tensor:
    """conv(silu(norm(x))) within a stream: normalised straight to where it is read, behind the frames before."""
    slot, feat_idx[0] = feat_idx[0], feat_idx[0] + 1
    frames, history = _channels_last(x), feat_cache[slot]
    seen = frames.new_empty(frames.shape[0], KEPT_FRAMES + frames.shape[1], *frames.shape[2:])
    seen[:, :KEPT_FRAMES] = 0 if history is None else _channels_last(history)
    norm.write(frames, seen[:, KEPT_FRAMES:], activate=True)
    feat_cache[slot] = _channels_second(seen[:, -KEPT_FRAMES:].clone())
    return conv.of_padded(_channels_second(seen))


def _is_left_to_a_slow_kernel(x: Tensor) -> bool:
    """Whether this is one clip in float32 on a CPU: torch gives few features of it to a kernel that unfolds them.

    That takes about twice as long as oneDNN's, which torch takes for batches, and reorders channels.
    """
    return (
        x.device.type == "cpu"
        and x.shape[0] == 1
        and x.dtype == torch.float32
        and torch.backends.mkldnn.is_available()
        and not torch.is_grad_enabled()
        and not torch.is_autocast_enabled("cpu")
    )


def _last_frames(x: Tensor, before: Tensor | None) -> Tensor:
    """The frames that the next call needs: those of x, with earlier ones or zeros in front where x has too few."""
    last = x[:, :, -KEPT_FRAMES:].clone()
    if last.shape[2] == KEPT_FRAMES:
        return last
    return torch.cat([torch.zeros_like(last) if before is None else before[:, :, -1:], last], dim=2)


def _channels_last(x: Tensor) -> Tensor:
    return x.movedim(1, -1)


def _channels_second(x: Tensor) -> Tensor:
    return x.movedim(-1, 1)
