"""Weights in oneDNN's layout: the same products, and nothing of them where they do not serve or are out of date."""

from __future__ import annotations

from copy import deepcopy

import pytest
import torch
from torch import nn
from wan_reference import make_condition, make_latents, perturbed_dit, rng

from models.device import fast_dtype
from models.wan import packed_linear
from models.wan.config import WanConfig
from models.wan.packed_linear import Linear, pack

CONFIG = WanConfig.tiny()
T500 = torch.tensor([500.0])
needs_products = pytest.mark.skipif(
    fast_dtype(torch.device("cpu")) != "bfloat16", reason="this CPU has no products of bfloat16"
)


def packed_layer() -> tuple[Linear, torch.Tensor]:
    layer = Linear(64, 96).bfloat16()
    for parameter in layer.parameters():
        parameter.data.normal_(std=0.3, generator=rng(2))
    layer.pack()
    return layer, torch.randn(2, 48, 64, generator=rng(3)).bfloat16()


@needs_products
@torch.no_grad()
def test_a_packed_layer_gives_the_same_bits_and_its_gelu_is_rounded_once_less():
    layer, x = packed_layer()
    assert layer.is_packed_for(x)
    plain = nn.functional.linear(x, layer.weight, layer.bias)
    assert torch.equal(layer(x), plain)
    exact = nn.functional.gelu(
        nn.functional.linear(x.float(), layer.weight.float(), layer.bias.float()), approximate="tanh"
    )
    within, apart = layer.with_gelu(x).float(), nn.functional.gelu(plain, approximate="tanh").float()
    error, before = ((found - exact).square().mean().sqrt() / exact.std() for found in (within, apart))
    assert error <= before < 0.01


@needs_products
@torch.no_grad()
def test_what_is_written_moved_or_copied_is_read_as_it_is():
    layer, x = packed_layer()
    copy = deepcopy(layer)
    assert not copy.is_packed_for(x) and torch.equal(copy(x), layer(x))
    layer.weight.zero_()
    assert not layer.is_packed_for(x) and torch.equal(layer(x), layer.bias.expand(2, 48, -1))
    layer, x = packed_layer()
    layer.load_state_dict({name: tensor + 1 for name, tensor in layer.state_dict().items()})
    assert torch.equal(layer(x), nn.functional.linear(x, layer.weight, layer.bias))
    layer, x = packed_layer()
    expected = nn.functional.linear(x.float(), layer.weight.float(), layer.bias.float())
    torch.testing.assert_close(layer.float()(x.float()), expected)


def test_gradients_flow_through_a_packed_layer():
    layer, x = packed_layer()
    assert not layer.is_packed_for(x)
    layer(x).square().sum().backward()
    assert layer.weight.grad is not None and layer.weight.grad.abs().max() > 0


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nothing_is_packed_where_the_device_has_no_products_for_it(monkeypatch, dtype):
    monkeypatch.setattr(packed_linear, "fast_dtype", lambda device: "float32")
    layer = Linear(8, 8).to(dtype)
    layer.pack()
    assert layer.packed is None


@torch.no_grad()
def test_adapters_are_left_alone():
    adapter = type("Adapter", (Linear,), {})(8, 8).bfloat16()
    pack([adapter, nn.Linear(8, 8)])
    assert adapter.packed is None


@needs_products
@torch.no_grad()
def test_a_model_prepared_for_inference_predicts_what_it_did_and_follows_its_weights():
    model, latents, condition = perturbed_dit(CONFIG), make_latents(CONFIG, 3), make_condition(CONFIG)
    exact = model(latents, T500, condition)
    model.bfloat16()
    before = model(latents, T500, condition)
    model.fuse_projections()
    found, attention, ffn = model(latents, T500, condition), model.blocks[0].self_attn, model.blocks[0].ffn
    assert attention._fused.packed is not None and all(
        layer.packed is not None for layer in (attention.o, ffn[0], ffn[2])
    )
    error, error_before = ((each - exact).square().mean().sqrt() / exact.std() for each in (found, before))
    assert error <= 1.1 * error_before
    for layer in (attention.k, ffn[0]):
        layer.weight.zero_()
        plain = deepcopy(model)
        torch.testing.assert_close(
            model(latents, T500, condition), plain(latents, T500, condition), rtol=0.05, atol=0.02
        )
        assert (model(latents, T500, condition) - found).abs().max() > 0.05
        found = model(latents, T500, condition)
