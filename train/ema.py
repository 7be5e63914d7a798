"""Exponential moving average of a module's weights, counted in updates of that module.

The average holds one tensor per parameter with the parameter's own sharding, and is updated in place on the
device: no gathering, no copy on the CPU. Saved through `state.full_state`, which gathers shards, it is
independent of the number of processes that trained it.

The decay rises as (1 + n) / (10 + n) up to its value, n updates after the start, so that neither random weights nor,
in a short run, those that it started from outweigh what was learned: a fixed 0.99, as in Self-Forcing's code, would
leave 0.67 of them after 40 updates. Short runs therefore never come to their decay: 0.99 takes 890 updates, 0.999
takes 8,990. Left out: averages of buffers (copied as they are in the module).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from train.state import fill_state, local


class Ema:
    """Average of the trainable parameters of `module`: none until update number `start`, then a copy, then
    decaying.
    """

    def __init__(self, decay: float, start: int = 0) -> None:
        self.decay, self.start = decay, start
        self.updates = 0  # of the module, seen so far
        self.values: dict[str, Tensor] = {}  # float32, sharded as the parameters

    @property
    def active(self) -> bool:
        return bool(self.values)

    @torch.no_grad()
    def update(self, module: nn.Module) -> None:
        """Call after each optimizer step of the module."""
        self.updates += 1
        if self.updates < self.start:
            return
        if not self.values:
            self.values = {name: p.detach().float().clone() for name, p in _trainable(module)}
            return
        decay = self.decay_at(self.updates)
        for name, parameter in _trainable(module):
            local(self.values[name]).lerp_(local(parameter.detach()).float(), 1 - decay)

    def decay_at(self, update: int) -> float:
        """Share of itself that the average keeps at an update (counted from 1) after its start."""
        since = update - max(self.start, 1)
        return min(self.decay, (1 + since) / (10 + since))

    def describe(self, num_updates: int) -> str:
        """What it comes to in a run of so many updates."""
        if num_updates <= max(self.start, 1):
            return f"EMA of no effect: it starts at update {self.start} of {num_updates}"
        last = self.decay_at(num_updates)
        rising = f", risen to {last:.3g} at the last of {num_updates}" if last < self.decay else ""
        return f"EMA {self.decay:g} from update {self.start}{rising}"

    @contextmanager
    def swapped(self, module: nn.Module) -> Iterator[nn.Module]:
        """The module with averaged weights inside the block (unchanged while the average is not active)."""
        if not self.active:
            yield module
            return
        raw = {name: parameter.detach().clone() for name, parameter in _trainable(module)}
        self._write(module, self.values)
        try:
            yield module
        finally:
            self._write(module, raw)

    def load(self, module: nn.Module, whole: Mapping[str, Tensor], updates: int) -> None:
        """Take over a saved average (whole tensors by parameter name; none where it had not started). What is trained
        since starts at its weights, what is frozen since is left out.
        """
        self.updates = updates
        self.values = {}
        if whole and updates >= self.start:  # a start that was put off since
            self.values = {name: p.detach().float().clone() for name, p in _trainable(module)}
            known = {name for name, _ in module.named_parameters()}
            kept = {name: value for name, value in whole.items() if name in self.values or name not in known}
            fill_state({name: value for name, value in self.values.items() if name in whole}, kept, "EMA")

    @torch.no_grad()
    def _write(self, module: nn.Module, values: dict[str, Tensor]) -> None:
        for name, parameter in _trainable(module):
            local(parameter).copy_(local(values[name]))


def _trainable(module: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    return ((name, parameter) for name, parameter in module.named_parameters() if parameter.requires_grad)
