"""What a streaming pass costs, counted: hardware-free, so that a slow path cannot slip in unnoticed."""

from __future__ import annotations

from collections import Counter

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from wan_reference import make_condition, make_latents, perturbed_dit

from models.wan.cache import CacheSpec
from models.wan.config import WanConfig
from models.wan.static_cache import StaticKVCache

OPS_PER_LAYER = 39  # of which 18 are the three RMS norms, one fused kernel each on CUDA
VIEWS = {
    *(
        "view",
        "_unsafe_view",
        "transpose",
        "t",
        "permute",
        "unsqueeze",
        "expand",
        "slice",
        "select",
        "unbind",
        "split",
    ),
    *("alias", "detach", "as_strided", "view_as_real", "view_as_complex", "split_with_sizes"),
}


class OpCounter(TorchDispatchMode):
    """Counts what reaches the backend."""

    def __init__(self) -> None:
        super().__init__()
        self.ops: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.ops[func._opname] += 1
        return func(*args, **(kwargs or {}))


@torch.no_grad()
def steady_chunk(num_layers: int) -> tuple[Counter[str], Counter[str], int]:
    """Ops of one denoising pass and of one cache pass with append, cache full; products of the latter."""
    config = WanConfig.tiny(num_layers=num_layers)
    model, latents = perturbed_dit(config), make_latents(config, frames=3)
    cache = StaticKVCache.empty(CacheSpec(3, 1, 1), num_layers)
    prepared, noisy, clean = (
        model.prepare(make_condition(config)),
        model.modulation(700.0),
        model.modulation(0.0),
    )
    for _ in range(4):
        context = cache.context((2, 3))
        with OpCounter() as denoising:
            model(latents, noisy, prepared, attention=context)
        with OpCounter() as caching:
            cache.append(model.cache_pass(latents, prepared, context, clean))
    return denoising.ops, caching.ops, caching.ops["addmm"]


def compute_ops(ops: Counter[str]) -> int:
    return sum(count for name, count in ops.items() if name not in VIEWS)


def test_compute_ops_per_layer():
    (two, *_), (three, *_) = steady_chunk(2), steady_chunk(3)
    difference = {name: three[name] - two[name] for name in three if name not in VIEWS and three[name] > two[name]}
    assert compute_ops(three) - compute_ops(two) == OPS_PER_LAYER, difference
    assert "cat" not in difference and "clone" not in difference, "keys and values go straight into their slot"


def test_nothing_is_read_back_from_the_device():
    denoising, caching, _ = steady_chunk(2)
    for ops in (denoising, caching):
        assert not [name for name in ops if "local_scalar" in name or name in ("item", "is_nonzero", "equal")]


def test_cache_pass_stops_at_the_last_keys_and_values():
    _, _, products = steady_chunk(2)
    assert products == 1 + 8 + 2  # patches; a whole layer: q k v o, q o, two of the FFN; k and v of the last layer
