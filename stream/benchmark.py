"""Ratios that hold on any machine: our forward against diffusers', a cached chunk against recomputing its
context, streaming decoding against decoding the overlap again, a dragged chunk against a plain one. `python -m
stream.benchmark` prints one JSON object.

Each ratio is ours over the other (below 1: ours is faster). Both sides have the same weights and their
outputs are compared first, but for drags, which are there to differ. They are timed in turn, in CPU time of one
thread, and the median of the pairs' ratios is taken: absolute seconds on a shared machine mean little. The default
sizes keep the balance of attention and matrix products of Wan 2.1 1.3B (width 384 = 3 heads x 128, 390 tokens a
latent frame); what a drag costs depends on --layers too, which are 30 there. Leaves out GPUs: `python -m eval
bench=latency` times the real stream there.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from models.condition import Condition
from models.diffusion.noise import KeyedNoise
from models.diffusion.prediction import add_noise
from models.rollout import ChunkPass, LatentEdit, Rollout, RolloutConfig
from models.vae.latent_space import LatentSpace
from models.vae.tiny_vae import TinyVae, TinyVaeConfig
from models.wan.attention import ChunkMask
from models.wan.checkpoint import official_to_diffusers
from models.wan.config import WanConfig
from models.wan.dit import WanDiT
from models.wan.static_cache import StaticKVCache
from stream.dragstream.config import DragConfig
from stream.dragstream.drag import Drag, Handle
from stream.dragstream.editor import DragEditor, read_references
from stream.dragstream.features import FeatureReader
from stream.provenance import extra_peak_bytes, git_commit, machine

CHANNELS, CHUNK_FRAMES, SINK_CHUNKS = 16, 3, 1
STRIDE = 8  # px of a latent cell
PATCH = 2  # cells of a token's side
DRAGS = {  # the default's warm start; the paper's four iterations, in one segment
    "warm_start": DragConfig(tracks="release"),
    "iterations_4": DragConfig(tracks="release", warm_rounds=0, iterations=4),
}
OVERLAP_LATENTS = 3  # what a decoder without state decodes again at each chunk (Self-Forcing's demo)


@dataclass
class Sizes:
    """Sizes of the benchmark's models and of its latents."""

    heads: int = 3  # of 128 channels each
    ffn_dim: int = 2240
    layers: int = 2  # the ratios hardly depend on it
    height: int = 30  # latent cells
    width: int = 52  # latent cells
    text_len: int = 128
    pairs: int = 5  # timed pairs per ratio
    windows: tuple[int, ...] = (1, 2, 6)  # past chunks in the cache, beside one sink; drags only with the last

    def dit_config(self) -> WanConfig:
        return WanConfig(
            dim=128 * self.heads,
            ffn_dim=self.ffn_dim,
            num_heads=self.heads,
            num_layers=self.layers,
            latent_channels=CHANNELS,
            text_dim=64,
            text_len=self.text_len,
        )

    def noise(self, batch: int, frames: int, *key: str) -> Tensor:  # [B, C, F, h, w]
        return KeyedNoise(0).normal((CHANNELS, frames, self.height, self.width), range(batch), *key)


@dataclass(frozen=True)
class Ratio:
    """Ours over the other, and how far their outputs are apart."""

    ratio: float  # median over pairs
    seconds: float  # ours, median CPU time
    max_difference: float  # of the outputs, absolute


def compare(ours: Callable[[], Tensor], other: Callable[[], Tensor], pairs: int) -> Ratio:
    """Time both in turn. Each call returns its output; the first calls warm up and are compared."""
    difference = float((ours() - other()).abs().max())
    timed = [(_cpu_seconds(ours), _cpu_seconds(other)) for _ in range(pairs)]
    return Ratio(statistics.median(a / b for a, b in timed), statistics.median(a for a, _ in timed), difference)


def dit_against_diffusers(sizes: Sizes) -> Ratio:
    """One bidirectional forward of a chunk, ours over diffusers' WanTransformer3DModel."""
    from diffusers import WanTransformer3DModel

    dit, cfg = _random_dit(sizes), sizes.dit_config()
    theirs = WanTransformer3DModel(
        num_attention_heads=cfg.num_heads,
        attention_head_dim=cfg.head_dim,
        in_channels=CHANNELS,
        out_channels=CHANNELS,
        text_dim=cfg.text_dim,
        freq_dim=cfg.freq_dim,
        ffn_dim=cfg.ffn_dim,
        num_layers=cfg.num_layers,
        cross_attn_norm=True,
        qk_norm="rms_norm_across_heads",
        eps=cfg.eps,
    ).eval()
    theirs.load_state_dict(official_to_diffusers(dit.state_dict()), strict=True)
    latents, timestep, condition = (
        sizes.noise(1, CHUNK_FRAMES, "input"),
        torch.tensor([731.25]),
        _condition(sizes),
    )
    return compare(
        lambda: dit(latents, timestep, condition),
        lambda: theirs(latents, timestep, condition.prompt_embeds, return_dict=False)[0],
        sizes.pairs,
    )


def streamed_against_recomputed(sizes: Sizes, window_chunks: int) -> Ratio:
    """A chunk with the KV cache (3 denoising passes and a cache pass) over 3 passes that recompute the
    context.

    Taken at the first chunk whose context is full: there both see the same tokens at the same positions, so
    the outputs agree.
    """
    dit, condition, noise = _random_dit(sizes), _condition(sizes), KeyedNoise(0)
    cfg = RolloutConfig(CHUNK_FRAMES, SINK_CHUNKS, window_chunks)
    video = Rollout(
        dit,
        cfg,
        noise=noise,
        sample_ids=[0],
        latent_shape=(CHANNELS, sizes.height, sizes.width),
        cache="static",
    )
    past = torch.cat([video.next_chunk(condition).x0 for _ in range(SINK_CHUNKS + window_chunks)], dim=2)
    boundary, index = video.snapshot(), video.chunk_index

    def streamed() -> Tensor:
        video.restore(boundary)
        return video.next_chunk(condition).x0

    def recomputed() -> Tensor:
        return _recomputed_chunk(dit, condition, cfg, past, noise, index)

    return compare(streamed, recomputed, sizes.pairs)


def decoding_against_overlap(sizes: Sizes) -> Ratio:
    """Streaming decoding of a chunk over decoding it together with the latents before it (tiny decoder)."""
    with torch.random.fork_rng():
        vae = TinyVae.from_config(TinyVaeConfig.taew2_1(), LatentSpace.wan_2_1(), seed=0).eval()
    latents = sizes.noise(1, 4 * CHUNK_FRAMES, "latents")[..., ::2, ::2]  # decoding is slow
    stream, chunk = vae.streaming(), latents[:, :, -CHUNK_FRAMES:]
    stream.push(latents[:, :, :-CHUNK_FRAMES])
    boundary = stream.snapshot()

    def streamed() -> Tensor:
        stream.restore(boundary)
        return stream.push(chunk)

    def overlapped() -> Tensor:
        return vae.decode(latents[:, :, -CHUNK_FRAMES - OVERLAP_LATENTS :])[:, :, -4 * CHUNK_FRAMES :]

    return compare(streamed, overlapped, sizes.pairs)


@dataclass(frozen=True)
class DragCost:
    """What a drag adds to the denoising of a chunk."""

    ratio: float  # of its CPU time to that of the plain chunk, median over pairs
    memory_ratio: float  # most that it holds at once beyond what a plain pass does, over the cache


def dragged_against_plain(sizes: Sizes, window_chunks: int, settings: DragConfig) -> DragCost:
    """A chunk of an animation, the features of whose handle are known, over the same chunk without the drag."""
    dit, condition, noise = _random_dit(sizes), _condition(sizes), KeyedNoise(0)
    rollout = RolloutConfig(CHUNK_FRAMES, SINK_CHUNKS, window_chunks)
    latent_shape = (CHANNELS, sizes.height, sizes.width)
    video = Rollout(dit, rollout, noise=noise, sample_ids=[0], latent_shape=latent_shape, cache="static")
    passes: list[ChunkPass] = []

    def look(shown: ChunkPass) -> Tensor:
        passes.append(shown)
        return shown.noisy_latents

    for _ in range(SINK_CHUNKS + window_chunks + 1):
        video.next_chunk(condition, edit=look)
    cfg = settings.for_student(rollout.num_steps, sizes.layers)
    size, drag = (STRIDE * sizes.height, STRIDE * sizes.width), _drag(sizes)
    source = passes[cfg.step - rollout.num_steps]
    reader = FeatureReader(dit, cfg, source.sigma)
    references = read_references(reader, cfg, drag, source, noise)
    boundary, chunk = video.snapshot(), video.chunk_index

    def edit(shown: ChunkPass) -> Tensor:
        editor = DragEditor(dit, cfg, drag, size=size, noise=noise, first_chunk=chunk, references=references)
        return editor(shown)

    def seconds(by: LatentEdit | None) -> float:
        video.restore(boundary)
        return _cpu_seconds(lambda: video.next_chunk(condition, edit=by).x0)

    ratios = [seconds(edit) / seconds(None) for _ in range(sizes.pairs)]
    extra: list[int] = []

    def weigh(shown: ChunkPass) -> Tensor:
        if shown.step == cfg.step:
            extra.append(
                extra_peak_bytes(
                    lambda: edit(shown), lambda: reader.x0(shown, shown.noisy_latents), torch.device("cpu")
                )
            )
        return shown.noisy_latents

    seconds(weigh)
    assert isinstance(video.cache, StaticKVCache)
    return DragCost(statistics.median(ratios), max(extra) / video.cache.num_bytes)


def run(sizes: Sizes) -> dict[str, object]:
    """All ratios with what they were measured on."""
    ratios = {"dit_forward_over_diffusers": dit_against_diffusers(sizes)}
    for window in sizes.windows:
        ratios[f"streamed_chunk_over_recompute_w{window}"] = streamed_against_recomputed(sizes, window)
    ratios["streamed_decode_over_overlap"] = decoding_against_overlap(sizes)
    drags = {
        f"{name}_w{window}": dragged_against_plain(sizes, window, settings)
        for name, settings in DRAGS.items()
        for window in sizes.windows[-1:]
    }
    return {
        **{name: round(found.ratio, 4) for name, found in ratios.items()},
        **{f"dragged_chunk_over_plain_{name}": round(cost.ratio, 4) for name, cost in drags.items()},
        **{f"drag_memory_over_cache_{name}": round(cost.memory_ratio, 4) for name, cost in drags.items()},
        "seconds": {name: round(found.seconds, 4) for name, found in ratios.items()},
        "max_difference": {name: found.max_difference for name, found in ratios.items()},
        "sizes": vars(sizes),
        "git_commit": git_commit(),
        "machine": machine(),
    }


def _recomputed_chunk(
    dit: WanDiT, condition: Condition, cfg: RolloutConfig, past: Tensor, noise: KeyedNoise, index: int
) -> Tensor:
    """The chunk without a cache: every pass runs over clean past and noisy chunk, under the chunk mask."""
    mask = ChunkMask(cfg.chunk_frames, cfg.sink_chunks, cfg.window_chunks)
    shape = (CHANNELS, cfg.chunk_frames, *past.shape[-2:])
    latents, x0 = noise.normal(shape, [0], "rollout", index, 0, "start"), past[:, :, :0]
    for step, sigma in enumerate(cfg.sigmas):
        if step > 0:
            latents = add_noise(x0, noise.normal(shape, [0], "rollout", index, step, "renoise"), sigma)
        levels = torch.zeros(1, past.shape[2] + cfg.chunk_frames)
        levels[:, past.shape[2] :] = sigma
        x0 = dit.predict_x0(torch.cat([past, latents], dim=2), levels, condition, attention=mask)
        x0 = x0[:, :, past.shape[2] :]
    return x0


def _random_dit(sizes: Sizes) -> WanDiT:
    """Random weights, the zero-initialised head included."""
    rng = torch.Generator().manual_seed(0)
    dit = WanDiT(sizes.dit_config(), rng).eval().requires_grad_(False)
    torch.nn.init.normal_(dit.head.head.weight, std=0.02, generator=rng)
    return dit


def _drag(sizes: Sizes) -> Drag:
    """A square of a third of the height, moved by a twelfth of it over one chunk."""
    height, width = STRIDE * sizes.height, STRIDE * sizes.width
    mask, side = np.zeros((height, width), bool), height // 3
    mask[side : 2 * side, side : 2 * side] = True
    path = [(1.5 * side + frame * side / 12, 1.5 * side) for frame in range(CHUNK_FRAMES + 1)]
    return Drag("animate", (Handle.translation(mask, path=path),))


def _condition(sizes: Sizes) -> Condition:
    cfg = sizes.dit_config()
    embeds = KeyedNoise(1).normal((cfg.text_len, cfg.text_dim), [0], "prompt")
    return Condition(prompt_embeds=embeds, null_prompt_embeds=torch.zeros_like(embeds))


def _cpu_seconds(call: Callable[[], Tensor]) -> float:
    started = time.process_time()
    call()
    return time.process_time() - started


def count(text: str) -> int:
    """A number of an option. Raises ArgumentTypeError below 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} must be a whole number of at least 1")
    return int(text)


def even_count(text: str) -> int:
    """Latent cells of a side, which patches of two fill. Raises ArgumentTypeError for an odd number and below 1."""
    if count(text) % PATCH:
        raise argparse.ArgumentTypeError(f"{text} must be a multiple of {PATCH}, the side of a patch")
    return int(text)


def main() -> None:
    """Entry of `python -m stream.benchmark`."""
    parser = argparse.ArgumentParser(prog="python -m stream.benchmark", description=__doc__.split("\n\n")[0])
    default = Sizes()
    for name in ("heads", "ffn_dim", "layers", "height", "width", "text_len", "pairs"):
        kind = even_count if name in ("height", "width") else count
        parser.add_argument(f"--{name.replace('_', '-')}", type=kind, default=vars(default)[name])
    parser.add_argument("--windows", type=count, nargs="*", default=default.windows, help="past chunks in the cache")
    arguments = vars(parser.parse_args())
    torch.set_num_threads(1)
    with torch.no_grad():
        print(json.dumps(run(Sizes(**arguments | {"windows": tuple(arguments["windows"])})), indent=1))


if __name__ == "__main__":
    main()
