from __future__ import annotations

import sys
import time

import pytest
import torch

from stream import benchmark
from stream.benchmark import Sizes, compare, main, run


@pytest.mark.filterwarnings("ignore")
def test_every_pair_agrees_and_is_reported() -> None:
    sizes = Sizes(heads=1, ffn_dim=64, layers=2, height=4, width=6, text_len=8, pairs=1, windows=(1, 2))
    with torch.no_grad():
        found = run(sizes)
    recomputed = [f"streamed_chunk_over_recompute_w{window}" for window in (1, 2)]
    names = ["dit_forward_over_diffusers", *recomputed, "streamed_decode_over_overlap"]
    assert list(found["seconds"]) == names
    drags = ["warm_start_w2", "iterations_4_w2"]
    names += [f"dragged_chunk_over_plain_{name}" for name in drags]
    assert all(found[name] > 0 for name in names)
    assert all(found[f"drag_memory_over_cache_{name}"] >= 0 for name in drags)
    assert max(found["max_difference"].values()) < 1e-4
    assert found["machine"]["torch"] == torch.__version__


@pytest.mark.parametrize("arguments", [["--pairs", "0"], ["--pairs", "-1"], ["--heads", "x"], ["--windows", "1", "0"]])
def test_counts_are_at_least_one(arguments: list[str], monkeypatch, capsys) -> None:
    monkeypatch.setattr(sys, "argv", ["benchmark", *arguments])
    with pytest.raises(SystemExit) as refused:
        main()
    assert refused.value.code == 2
    told = capsys.readouterr().err.splitlines()[-1]
    assert f"{arguments[0]}: {arguments[-1]} must be a whole number of at least 1" in told


@pytest.mark.parametrize("side", ["--height", "--width"])
def test_sides_are_whole_patches(side: str, monkeypatch, capsys) -> None:
    monkeypatch.setattr(sys, "argv", ["benchmark", side, "5"])
    monkeypatch.setattr(benchmark, "run", lambda sizes: pytest.fail("measured"))
    with pytest.raises(SystemExit):
        main()
    assert f"{side}: 5 must be a multiple of 2" in capsys.readouterr().err


def test_the_ratio_is_ours_over_the_other() -> None:
    def busy(seconds: float) -> torch.Tensor:
        until = time.process_time() + seconds
        while time.process_time() < until:
            pass
        return torch.tensor([seconds])

    found = compare(lambda: busy(0.01), lambda: busy(0.04), pairs=3)
    assert found.ratio == pytest.approx(0.25, rel=0.2)
    assert found.max_difference == pytest.approx(0.03)
