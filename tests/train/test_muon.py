"""Muon: orthogonal updates for matrices, AdamW for the rest, a state that survives a resume."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from train import muon
from train.muon import Muon, is_hidden_matrix, orthogonalise


@pytest.mark.parametrize("shape", [(16, 16), (8, 40), (40, 8)])
@pytest.mark.parametrize("faster", ["float32", "bfloat16"])
def test_orthogonalise_brings_singular_values_near_one(monkeypatch, shape, faster):
    monkeypatch.setattr(muon, "fast_dtype", lambda device: faster)
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    values = torch.linalg.svdvals(orthogonalise(matrix))
    assert values.min() > 0.4 and values.max() < 1.4, values


def test_orthogonalise_keeps_the_singular_vectors():
    left, _ = torch.linalg.qr(torch.randn(12, 12, generator=torch.Generator().manual_seed(1)))
    right, _ = torch.linalg.qr(torch.randn(12, 12, generator=torch.Generator().manual_seed(2)))
    matrix = left @ torch.diag(torch.linspace(0.5, 2.0, 12)) @ right.T
    result = left.T @ orthogonalise(matrix) @ right
    off_diagonal = result - torch.diag(result.diagonal())
    assert off_diagonal.abs().max() < 0.05


def test_which_parameters_are_matrices():
    assert is_hidden_matrix("blocks.0.ffn.0.weight", torch.zeros(8, 4))
    assert is_hidden_matrix("decoder.mid_block.resnets.0.conv1.weight", torch.zeros(8, 4, 3, 3, 3))
    for name, shape in (
        ("patch_embedding.weight", (8, 4, 1, 2, 2)),
        ("head.head.weight", (8, 4)),
        ("blocks.0.modulation", (1, 6, 8)),
        ("blocks.0.norm3.weight", (8,)),
        ("decoder.norm_out.gamma", (8, 1, 1, 1)),
    ):
        assert not is_hidden_matrix(name, torch.zeros(shape)), name


def test_the_rest_is_adamw():
    torch.manual_seed(0)
    ours, reference = nn.LayerNorm(6), nn.LayerNorm(6)
    settings = {"betas": (0.9, 0.99), "weight_decay": 0.1}
    muon = Muon(ours.named_parameters(), 0.01, **settings)
    adamw = torch.optim.AdamW(reference.parameters(), lr=0.01, **settings)
    for step in range(5):
        x = torch.randn(4, 6, generator=torch.Generator().manual_seed(step))
        for module, optimizer in ((ours, muon), (reference, adamw)):
            optimizer.zero_grad()
            (module(x) ** 3).sum().backward()
            optimizer.step()
    for mine, theirs in zip(ours.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs)


def test_learns_and_resumes_exactly():
    def run(module: nn.Module, optimizer: Muon, steps: range) -> float:
        for step in steps:
            x = torch.randn(32, 8, generator=torch.Generator().manual_seed(step))
            loss = (module(x) - x.flip(1)).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        return loss.item()

    def build() -> tuple[nn.Module, Muon]:
        torch.manual_seed(0)
        module = nn.Sequential(nn.Linear(8, 32), nn.GELU(), nn.Linear(32, 8))
        return module, Muon(module.named_parameters(), 2e-3)

    module, optimizer = build()
    first = run(module, optimizer, range(1))
    assert run(module, optimizer, range(1, 60)) < 0.2 * first

    interrupted, before = build()
    run(interrupted, before, range(30))
    resumed, after = build()
    resumed.load_state_dict(interrupted.state_dict())
    after.load_state_dict(copy.deepcopy(before.state_dict()))
    run(resumed, after, range(30, 60))
    for mine, theirs in zip(resumed.parameters(), module.parameters(), strict=True):
        assert torch.equal(mine, theirs)
