from __future__ import annotations

import itertools
import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch

from models import assemble
from models.assemble import build_dit, build_vae, load_role
from models.diffusion.noise import KeyedNoise
from models.motion.tracks import Tracks
from models.rollout import ChunkPass, rollout
from models.vae.tiny_vae import TinyVae, TinyVaeConfig
from models.wan.dit import WanDiT
from stream.codecs import Codecs, to_frames, to_pixels
from stream.session import StreamSession

PROMPT = "a red striped disc on a blue background"


@pytest.fixture(scope="module")
def codecs(tiny_weights) -> Codecs:
    return Codecs.load(tiny_weights.model_cfg)


@pytest.fixture(scope="module")
def student(tiny_weights):
    return load_role(tiny_weights.model_cfg, "student").eval().requires_grad_(False)


@pytest.fixture(scope="module")
def first_frame() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)


def _moving(frames: int, start: int = 0) -> Tracks:
    time = np.arange(start, start + frames, dtype=np.float32)
    points = np.stack([np.stack([2 + 0.3 * time, 3 + 0 * time], -1), np.stack([9 + 0 * time, 1 + 0.4 * time], -1)], 1)
    return Tracks.from_arrays(points, np.ones((frames, 2), bool), 16, 16)


def _open(student, codecs: Codecs, first_frame: np.ndarray, **options) -> StreamSession:
    settings = {"first_frame": first_frame, "prompt": PROMPT, "tracks": _moving(33)} | options
    return StreamSession(student, codecs, **settings)


def test_a_stream_equals_the_whole_clip_rolled_out_and_decoded_at_once(student, codecs, first_frame) -> None:
    session = _open(student, codecs, first_frame, num_frames=33, seed=4, sample_id=2)
    streamed = np.concatenate(list(session))
    noise, cfg = KeyedNoise(4), codecs.model_cfg
    ids = session._buffer._identities[None, :2]  # the identities of this stream
    condition = codecs.condition(codecs.encode_prompts([PROMPT]), _moving(33).with_ids(ids),
                                 codecs.encode_first_frames(first_frame[None]))  # fmt: skip
    with torch.no_grad():
        chunks = rollout(student, condition, cfg.rollout, num_chunks=3, noise=noise, sample_ids=[2],
                         latent_shape=codecs.frame_latent_shape)  # fmt: skip
        whole = codecs.decode(torch.cat([chunk.x0 for chunk in chunks], dim=2))[0]
    assert streamed.shape == whole.shape == (33, 16, 16, 3)
    assert np.abs(streamed.astype(int) - whole.astype(int)).max() <= 1  # rounding of float differences
    assert streamed.std() > 5


def test_seed_and_sample_name_noise_and_identities(student, codecs, first_frame) -> None:
    def made(seed: int, sample_id: int) -> list[float]:
        session = _open(student, codecs, first_frame, tracks=None, seed=seed, sample_id=sample_id)
        session.next_chunk()
        return [*session.unused_track_ids(4).tolist(), session.latents.sum().item()]

    first, *others = (made(*pair) for pair in ((0, 0), (0, 1), (1, 0)))
    assert made(0, 0) == first
    assert all(found != wanted for other in others for found, wanted in zip(other, first))


@pytest.mark.parametrize("num_frames", [1, 9, 10, 40])
def test_any_length_and_the_chunk_sizes(student, codecs, first_frame, num_frames: int) -> None:
    sizes = [len(chunk) for chunk in _open(student, codecs, first_frame, num_frames=num_frames)]
    assert sum(sizes) == num_frames
    assert sizes[:-1] == [9, 12, 12, 12][: len(sizes) - 1]


def test_pushing_pieces_equals_pushing_the_whole(student, codecs, first_frame) -> None:
    whole = np.concatenate(list(_open(student, codecs, first_frame, num_frames=33)))
    session = _open(student, codecs, first_frame, num_frames=33, tracks=_moving(9))
    frames = []
    for number, chunk in enumerate(session):
        frames.append(chunk)
        session.push_tracks(_moving(12, start=9 + 12 * number))
    np.testing.assert_array_equal(np.concatenate(frames), whole)


def test_a_snapshot_replays_bit_for_bit_and_may_branch(student, codecs, first_frame) -> None:
    session = _open(student, codecs, first_frame)
    for _ in range(3):
        session.next_chunk()
    state = session.snapshot()
    first = [session.next_chunk() for _ in range(3)]
    session.push_tracks(_moving(12))  # came since, and is forgotten
    session.restore(state)
    assert session.chunk_index == 3 and session.num_frames == 33 and not session.num_pending_track_frames
    for expected in first:
        np.testing.assert_array_equal(session.next_chunk(), expected)
    session.restore(state)
    session.set_prompt("a green ring")
    assert not np.array_equal(session.next_chunk(), first[0])


def test_after_undo_the_motion_that_waits_again_can_be_dropped_for_another(student, codecs, first_frame) -> None:
    def moving(dx: float, frames: int) -> Tracks:
        points = np.full((frames, 1, 2), 8.0) + dx * np.arange(frames)[:, None, None]
        return Tracks.from_arrays(points, np.ones((frames, 1), bool), 16, 16)

    def session() -> StreamSession:
        opened = StreamSession(student, codecs, first_frame=first_frame, prompt="")
        opened.push_tracks(moving(0.5, opened.frames_in_next_chunk))
        opened.next_chunk()
        return opened

    changed, wanted = session(), session()
    changed.push_tracks(moving(0.5, 12))
    changed.next_chunk()
    changed.undo()
    assert changed.num_pending_track_frames == 12
    changed.drop_pending_tracks()
    assert changed.num_pending_track_frames == 0
    for each in (changed, wanted):
        each.push_tracks(moving(-0.5, 12))
    np.testing.assert_array_equal(changed.next_chunk(), wanted.next_chunk())


def test_the_prompt_changes_the_next_chunk_only(student, codecs, first_frame) -> None:
    plain, changed = _open(student, codecs, first_frame), _open(student, codecs, first_frame)
    np.testing.assert_array_equal(plain.next_chunk(), changed.next_chunk())
    changed.set_prompt("a green ring on a pink background")
    assert not np.array_equal(plain.next_chunk(), changed.next_chunk())


def test_tracks_steer_and_the_ending_matters(student, codecs, first_frame) -> None:
    def latents(**options) -> torch.Tensor:
        session = _open(student, codecs, first_frame, **options)
        session.next_chunk()
        session.next_chunk()
        return session.latents

    held, released = (latents(tracks=_moving(9), ending=ending) for ending in ("hold", "release"))
    silent = latents(tracks=None)
    assert not torch.equal(held, released)
    assert not torch.equal(held, silent)
    assert torch.equal(latents(tracks=None, ending="release"), silent)


def test_an_endless_stream_is_finite_and_timed(student, codecs, first_frame) -> None:
    session = _open(student, codecs, first_frame)
    for chunk in itertools.islice(session, 12):
        assert chunk.dtype == np.uint8
    assert torch.isfinite(session.latents).all()
    timing = session.timing
    assert (timing.index, timing.num_frames) == (11, 12)
    parts = timing.condition_seconds, timing.denoise_seconds, timing.decode_seconds
    assert min(parts) > 0 and timing.total_seconds == pytest.approx(sum(parts))


def test_no_context_is_needed_for_an_unlimited_window(tiny_weights, student, first_frame) -> None:
    cfg = tiny_weights.model_cfg
    codecs = Codecs.load(replace(cfg, rollout=replace(cfg.rollout, window_chunks=None)))
    assert sum(len(chunk) for chunk in _open(student, codecs, first_frame, num_frames=46)) == 46
    with pytest.raises(ValueError, match="num_frames=null needs a window: model.rollout.window_chunks=null"):
        _open(student, codecs, first_frame)
    session = _open(student, codecs, first_frame, num_frames=9)
    session.next_chunk()
    with pytest.raises(ValueError, match="num_frames=9 are made, and model.rollout.window_chunks=null"):
        session.next_chunk()
    session.undo()
    session.next_chunk()


def _drawing(tiny_weights) -> tuple[WanDiT, Codecs]:
    """A student that reads drawn tracks, and its codecs: the VAE's state must run on from chunk to chunk."""
    cfg = tiny_weights.model_cfg
    cfg = replace(cfg, dit=replace(cfg.dit, track_encoding="rgb"))
    dit = build_dit(cfg, seed=0).eval()
    torch.nn.init.normal_(dit.head.head.weight, std=0.1, generator=torch.Generator().manual_seed(0))
    return dit, Codecs.load(cfg)


def test_tracks_drawn_as_pictures_stream_like_the_whole_clip(tiny_weights, first_frame) -> None:
    dit, codecs = _drawing(tiny_weights)
    cfg = codecs.model_cfg
    session = _open(dit, codecs, first_frame, num_frames=33)
    streamed = torch.cat([session.latents for _ in session], dim=2)
    tracks = _moving(33).with_ids(session._buffer._identities[None, :2])
    condition = codecs.condition(codecs.encode_prompts([PROMPT]), tracks, codecs.encode_first_frames(first_frame[None]))
    with torch.no_grad():
        chunks = rollout(dit, condition, cfg.rollout, num_chunks=3, noise=KeyedNoise(0), sample_ids=[0],
                         latent_shape=codecs.frame_latent_shape)  # fmt: skip
        whole = torch.cat([chunk.x0 for chunk in chunks], dim=2)
    torch.testing.assert_close(streamed, whole, atol=1e-4, rtol=1e-4)


def test_tracks_drawn_as_pictures_are_drawn_again_after_undo(tiny_weights, first_frame) -> None:
    session = _open(*_drawing(tiny_weights), first_frame)
    for _ in range(3):
        session.next_chunk()
    expected = session.latents
    session.undo()
    session.next_chunk()
    assert torch.equal(session.latents, expected)


def test_an_edit_that_changes_nothing_changes_nothing(student, codecs, first_frame) -> None:
    plain, edited = _open(student, codecs, first_frame), _open(student, codecs, first_frame)
    np.testing.assert_array_equal(plain.next_chunk(), edited.next_chunk(lambda shown: shown.noisy_latents))


def test_wrong_inputs_are_refused(student, codecs, first_frame) -> None:
    with pytest.raises(ValueError, match=r"\(8, 16, 3\).*model's clip size"):
        _open(student, codecs, first_frame[:8])
    with pytest.raises(ValueError, match="unknown word 'zebra'"):
        _open(student, codecs, first_frame, prompt="a zebra")
    with pytest.raises(ValueError, match="num_frames=0"):
        _open(student, codecs, first_frame, num_frames=0)


def test_frames_survive_the_way_to_pixels_and_back(first_frame) -> None:
    np.testing.assert_array_equal(to_frames(to_pixels(first_frame[None, None])), first_frame[None, None])


def test_what_a_decoder_gives_beyond_black_and_white_is_black_and_white() -> None:
    pixels = torch.tensor([-3.0, -1.01, -1.0, 1.0, 1.01, 3.0]).expand(1, 3, 1, 1, -1)
    assert to_frames(pixels)[0, 0, 0].tolist() == [[0] * 3] * 3 + [[255] * 3] * 3


def test_frames_that_are_not_finite_are_refused_and_the_stream_stays_where_it_was(student, codecs, first_frame) -> None:
    session, again = (_open(student, codecs, first_frame) for _ in range(2))
    session.next_chunk(), again.next_chunk()

    def overflow(pass_: ChunkPass) -> torch.Tensor:
        return torch.full_like(pass_.noisy_latents, torch.inf)

    with pytest.raises(ValueError, match="^generated frames hold values that are nan or infinite"):
        session.next_chunk(overflow)
    assert np.array_equal(session.next_chunk(), again.next_chunk())
    latents = torch.zeros(1, *codecs.frame_latent_shape).unsqueeze(2)
    assert codecs.decode(latents).shape[1] == 1
    with pytest.raises(ValueError, match="^generated frames hold values that are nan or infinite"):
        codecs.decode(latents * torch.nan)


def test_a_first_frame_may_be_read_only(student, codecs, first_frame) -> None:
    picture = first_frame.copy()
    picture.flags.writeable = False  # as np.asarray of a PIL image is
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        _open(student, codecs, picture)


def test_auto_is_the_dtype_of_the_device_that_is_used(tiny_weights, monkeypatch) -> None:
    monkeypatch.setattr(assemble, "pick_device", lambda name: torch.device("cuda"))  # which is there, and not used
    monkeypatch.setattr(assemble, "fast_dtype", lambda device: "float32" if device.type == "cpu" else "bfloat16")
    codecs = Codecs.load(replace(tiny_weights.model_cfg, dtype="auto"), device="cpu")
    assert next(codecs.vae.parameters()).dtype == torch.float32 and codecs.model_cfg.dtype == "float32"


def test_bfloat16_and_the_tiny_decoder(tiny_weights, first_frame, tmp_path) -> None:
    cfg = replace(tiny_weights.model_cfg, dtype="bfloat16", tiny_vae=str(tmp_path))
    TinyVae.from_config(TinyVaeConfig.sprites(4), build_vae(cfg).latent_space).save(tmp_path)
    codecs = Codecs.load(cfg, tiny=True)
    dit = load_role(cfg, "student").eval().to(codecs.model_cfg.torch_dtype)
    session = _open(dit, codecs, first_frame, num_frames=33)
    frames = np.concatenate(list(session))
    assert frames.shape == (33, 16, 16, 3) and torch.isfinite(session.latents).all()
    assert codecs.decoder is not codecs.vae
    assert next(codecs.vae.parameters()).dtype == next(codecs.decoder.parameters()).dtype == torch.bfloat16


def test_a_snapshot_of_another_decoder_is_refused(tiny_weights, student, codecs, first_frame) -> None:
    tiny = TinyVae.from_config(TinyVaeConfig.sprites(4), codecs.vae.latent_space)
    cfg = tiny_weights.model_cfg
    quick = _open(student, Codecs(cfg, build_vae(cfg), codecs.text_encoder, tiny_vae=tiny), first_frame)
    session = _open(student, codecs, first_frame)
    session.restore(quick.snapshot())  # nothing is decoded there yet
    np.testing.assert_array_equal(session.next_chunk(), _open(student, codecs, first_frame).next_chunk())
    quick.next_chunk()
    with pytest.raises(ValueError, match="a session that decodes by TinyVae, this one by WanVae; restore it with"):
        session.restore(quick.snapshot())
    assert session.chunk_index == 1 and len(session.next_chunk()) == 12
