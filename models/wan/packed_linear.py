"""A linear layer whose weight is laid out once for the products of a CPU, for inference in bfloat16.

torch lays a weight out anew in every product, and computes a GELU in bfloat16 as slowly as the product before it: at
the few hundred tokens of a small student that is an eighth of each pass. oneDNN takes a weight that is laid out
already, and has a GELU at the end of a product. Costs the weight's memory once more. Leaves out float32, other devices,
and gradients: there, and where a weight has changed since, the layer is an nn.Linear.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from models.device import fast_dtype

TOKENS = 256  # of the products that a layout is chosen for; it serves others as well


@dataclass(frozen=True, eq=False)
class PackedWeight:
    """A weight in a layout of oneDNN's choice, and what it was made of."""

    layout: Tensor  # opaque
    made_of: tuple[tuple[int, int], ...]

    @classmethod
    @torch.no_grad()
    def of(cls, weight: Tensor, sources: Sequence[Tensor]) -> PackedWeight | None:
        """None where this device has no products for it. ``sources``: the parameters whose values ``weight`` has."""
        if weight.device.type != "cpu" or weight.dtype != torch.bfloat16 or not torch.backends.mkldnn.is_available():
            return None
        if fast_dtype(weight.device) != "bfloat16":
            return None
        return cls(torch.ops.mkldnn._reorder_linear_weight(weight.detach(), TOKENS), _states(sources))

    def serves(self, x: Tensor, sources: Sequence[Tensor]) -> bool:
        """Whether x can be multiplied by it, and the parameters are what they were."""
        if torch.is_grad_enabled() or torch.compiler.is_compiling() or x.dtype != torch.bfloat16:
            return False
        return _states(sources) == self.made_of

    def product(self, x: Tensor, bias: Tensor | None, gelu: bool = False) -> Tensor:
        """x W^T + bias, and the tanh GELU of it."""
        end, algorithm = ("gelu", "tanh") if gelu else ("none", "")
        return torch.ops.mkldnn._linear_pointwise(x, self.layout, bias, end, [], algorithm)

    def __deepcopy__(self, memo: dict[int, Any]) -> None:
        """A copy of a layer has parameters of its own, and no layout of them."""


class Linear(nn.Linear):
    """nn.Linear; after `pack`, inference in bfloat16 on a CPU reads the weight in oneDNN's layout."""

    packed: PackedWeight | None = None

    def pack(self) -> None:
        """Lay the weight out, where that serves. Once it is written to in place (not by its ``.data``) or moved, the
        weight itself is read again.
        """
        self.packed = PackedWeight.of(self.weight, [self.weight])

    def is_packed_for(self, x: Tensor) -> bool:
        """Whether x is multiplied by the weight's layout."""
        return self.packed is not None and self.packed.serves(x, [self.weight])

    def forward(self, input: Tensor) -> Tensor:
        if self.packed is not None and self.packed.serves(input, [self.weight]):
            return self.packed.product(input, self.bias)
        return super().forward(input)

    def with_gelu(self, x: Tensor) -> Tensor:
        """The tanh GELU of `forward`, for an x that it is packed for: rounded once instead of twice."""
        assert self.packed is not None, "is_packed_for(x)"
        return self.packed.product(x, self.bias, gelu=True)


def pack(layers: Sequence[nn.Module]) -> None:
    """Those that are plain; what adapters have replaced stays as it is."""
    for layer in layers:
        if type(layer) is Linear:
            layer.pack()


def _states(sources: Sequence[Tensor]) -> tuple[tuple[int, int], ...]:
    return tuple((source.data_ptr(), source._version) for source in sources)
