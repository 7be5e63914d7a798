"""Randomness that is passed, never global: every draw is named by (seed, *key).

A key says what a draw is for, e.g. ``noise.normal(shape, sample_ids, "rollout", chunk, step)``. The same
key gives the same numbers on every rank, at every batch size and world size, and after a resume; integers
drawn for a whole step (an exit step, a window size) therefore agree on all ranks without communication.

Draws are made on the CPU and then moved, so that a GPU run and a CPU run see the same noise. Left out:
streams with a position. A draw has no memory; whoever wants a new one names a new key.
"""

from __future__ import annotations

import hashlib
import operator
from collections.abc import Sequence

import torch
from torch import Tensor

KeyPart = int | str


class KeyedNoise:
    """A family of independent random draws, each named by a key of ints and strings."""

    def __init__(self, seed: int):
        self.seed = operator.index(seed)

    def __repr__(self) -> str:
        return f"KeyedNoise(seed={self.seed})"

    def generator(self, *key: KeyPart) -> torch.Generator:
        """A fresh CPU generator for this key (torch's CPU generator reads 32 bits of the hash)."""
        return torch.Generator("cpu").manual_seed(self._hash(key) & 0xFFFFFFFF)

    def integers(self, high: int, *key: KeyPart) -> int:
        """One integer, uniform on [0, high)."""
        if high < 1:
            raise ValueError(f"high={high} must be at least 1 for key {key}")
        return self._hash(key) % high

    def uniform(self, *key: KeyPart) -> float:
        """One number, uniform on [0, 1) with 53 random bits."""
        return (self._hash(key) >> 75) * 2.0**-53

    def normal(
        self,
        shape_per_sample: Sequence[int],
        sample_ids: Sequence[int],
        *key: KeyPart,
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> Tensor:
        """Standard normal noise -> [len(sample_ids), *shape_per_sample].

        Each sample is drawn on its own from (seed, *key, sample id), in float32 and then cast: a sample's
        noise does not depend on its neighbours in the batch, nor on the dtype or device asked for.
        """
        if len(sample_ids) == 0:
            return torch.empty(0, *shape_per_sample, device=device, dtype=dtype)
        draws = [
            torch.randn(tuple(shape_per_sample), generator=self.generator(*key, "sample", sample_id))
            for sample_id in sample_ids
        ]
        return torch.stack(draws).to(device=device, dtype=dtype)

    def _hash(self, key: tuple[KeyPart, ...]) -> int:
        """128 bits; each part is written with its type and length, so ("a", "b") and ("ab",) differ."""
        digest = hashlib.blake2b(digest_size=16)
        for part in (self.seed, *key):
            text = part if isinstance(part, str) else str(operator.index(part))
            kind = "s" if isinstance(part, str) else "i"
            digest.update(f"{kind}{len(text.encode())}:{text}".encode())
        return int.from_bytes(digest.digest(), "big")
