"""Drags on a running stream: editing, animating, and refusing what cannot be."""

from __future__ import annotations

import gc
import math
from dataclasses import replace
from weakref import ref

import numpy as np
import pytest
import torch
from drag_sessions import LEFT, advance, drag, mask, open_session, refused
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from models.motion.tracks import Tracks
from stream.dragstream import features as features_module
from stream.dragstream.config import OPTIMISATION, DragConfig
from stream.dragstream.drag import Drag, Handle, Pose
from stream.dragstream.statistics import PER_CHANNEL
from stream.session import StreamSession


def test_a_zero_drag_repeats_the_chunk_bit_for_bit(parts) -> None:
    plain, dragged = open_session(parts), open_session(parts)
    expected = advance(plain, 3)
    advance(dragged, 2)
    np.testing.assert_array_equal(dragged.drag(drag("edit", Pose())).frames, expected[1])
    dragged.drag(drag("animate", Pose()))
    np.testing.assert_array_equal(dragged.next_chunk(), expected[2])


def test_a_zero_drag_releases_no_tracks(parts) -> None:
    still = np.full((9, 1, 2), 7.0, np.float32)
    tracks = Tracks.from_arrays(still, np.ones((9, 1), bool), 16, 16)
    session = open_session(parts, tracks=tracks)
    expected = advance(session, 2)[-1]
    np.testing.assert_array_equal(session.drag(drag("edit", Pose())).frames, expected)
    assert session._buffer.take(4).num_tracks == 1


@pytest.mark.parametrize("mode", ["edit", "animate"])
def test_an_edit_goes_on_from_what_is_shown_earlier_drags_included(parts, mode: str) -> None:
    plain, session = open_session(parts), open_session(parts)
    undragged = advance(plain, 3)[-1]
    if mode == "edit":
        advance(session, 3)
        shown = session.drag(drag("edit", LEFT)).frames
    else:
        advance(session, 2)
        session.drag(drag("animate", LEFT))
        shown = session.next_chunk()
    assert (shown != undragged).any()
    np.testing.assert_array_equal(session.drag(drag("edit", Pose())).frames, shown)
    session.undo()
    if mode == "edit":
        np.testing.assert_array_equal(session.next_chunk(), undragged)


def test_an_edit_replaces_the_latest_chunk_and_later_ones_follow_from_it(parts) -> None:
    plain, dragged = open_session(parts), open_session(parts, drag=DragConfig(iterations=4))
    expected = advance(plain, 4)
    advance(dragged, 2)
    outcome = dragged.drag(drag("edit", LEFT))
    assert outcome.frames.shape == expected[1].shape and (outcome.frames != expected[1]).any()
    assert (dragged.chunk_index, dragged.num_frames) == (2, 21)
    assert (dragged.next_chunk() != expected[2]).any()
    assert outcome.logs[0].chunk == 1 and len(outcome.logs[0].losses) == 4
    assert len(outcome.references) == 1 and set(outcome.references[0].variants) == {None, 0.2, 0.4, 0.6}


def test_an_animation_bends_its_chunks_only_while_it_lasts(parts) -> None:
    session = open_session(parts)
    advance(session, 2)
    poses = tuple(Pose(dx=-n) for n in range(1, 7))
    outcome = session.drag(Drag("animate", (Handle(mask(), (7.0, 7.0), poses, (7.0, 7.0)),)))
    assert outcome.frames is None
    advance(session, 4)
    assert [log.chunk for log in outcome.logs] == [2, 3]


def test_the_same_seed_gives_the_same_edit_and_another_another(parts) -> None:
    def edited(seed: int) -> np.ndarray:
        session = open_session(parts, seed=seed)
        advance(session, 2)
        return session.drag(drag("edit", LEFT)).frames

    np.testing.assert_array_equal(edited(0), edited(0))
    assert (edited(0) != edited(1)).any()


def test_a_prompt_set_before_an_edit_holds_from_the_next_chunk_on(parts) -> None:
    plain, edited = open_session(parts), open_session(parts)
    shown, _ = (advance(session, 2)[-1] for session in (plain, edited))
    for session in (plain, edited):
        session.set_prompt("a green disc on a red background")
    np.testing.assert_array_equal(edited.drag(drag("edit", Pose())).frames, shown)
    np.testing.assert_array_equal(edited.next_chunk(), plain.next_chunk())


@pytest.mark.parametrize(
    ("edited", "chunks"),
    [
        (mask(12, 16, 12, 16), [2, 3]),  # something else
        (mask(0, 3, 4, 10), [2]),  # where it is now, 3 px further to the left
        (mask(6, 7, 4, 10), [2]),  # there too, and not a frame later
        (mask(8, 10, 4, 10), [2, 3]),  # where it was when it was grabbed
    ],
)
def test_an_animation_goes_on_after_an_edit_of_its_chunk_but_for_one_that_meets_it(parts, edited, chunks) -> None:
    session = open_session(parts)
    advance(session, 2)
    poses = tuple(Pose(dx=-n) for n in range(1, 7))
    outcome = session.drag(Drag("animate", (Handle(mask(), (7.0, 7.0), poses, (7.0, 7.0)),)))
    with pytest.raises(ValueError, match=r"animates begins with chunk 2, after chunk 1 that this one would edit"):
        session.drag(drag("edit", LEFT))
    session.next_chunk()
    y, x = np.argwhere(edited)[0] + 0.5
    session.drag(Drag("edit", (Handle(edited, (x, y), (Pose(dy=1.0),), (x, y)),)))
    session.next_chunk()
    assert [log.chunk for log in outcome.logs] == chunks


@pytest.mark.parametrize("mode", ["edit", "animate"])
def test_what_comes_back_to_where_it_was_grabbed_is_no_still_drag(parts, mode: str) -> None:
    """Its poses count from the frame that its reference is of: none is the way home."""
    frames = []
    for brings in (True, False):
        session = open_session(parts)
        advance(session, 2)
        outcome = session.drag(drag("animate", Pose(dx=-20.0)))
        advance(session, 2)
        home = drag(mode, Pose()).handles[0]
        outcome = session.drag(Drag(mode, (replace(home, reference=outcome.references[0] if brings else None),)))
        frames.append(session.next_chunk() if mode == "animate" else outcome.frames)
    assert not np.array_equal(*frames)


@pytest.mark.parametrize("frames", [0, 2, 9, 18])
def test_statistics_come_from_as_many_frames_before_as_there_are(parts, frames: int) -> None:
    """But for the first, which is given: it is clean at every step."""
    session = open_session(parts, drag=DragConfig(adsr_frames=frames))
    for chunk in range(1, 8):
        session.next_chunk()
        neighbours = session._memory.neighbours(session.drag_cfg)
        kept = 3 * min(chunk, math.ceil(frames / 3)) - (chunk <= math.ceil(frames / 3))  # whole chunks
        assert (0 if neighbours is None else neighbours.shape[2]) == min(frames, max(0, kept))


def test_a_given_frame_alone_is_no_neighbour(parts) -> None:
    student, codecs = parts
    rollout = replace(codecs.model_cfg.rollout, chunk_frames=1)
    cfg = DragConfig(adsr="neighbours", iterations=1)
    session = open_session((student, codecs.under(replace(codecs.model_cfg, rollout=rollout))), drag=cfg)
    session.next_chunk()
    assert session._memory.neighbours(session.drag_cfg) is None
    advance(session, 2)
    assert session._memory.neighbours(session.drag_cfg).shape[2] == 2


def test_who_drew_a_mask_may_go_on_drawing_on_it(parts) -> None:
    def animated(paints: bool) -> np.ndarray:
        session, canvas, editable = open_session(parts), mask(), mask(0, 12, 0, 16)
        advance(session, 2)
        poses = tuple(Pose(dx=-0.5 * n) for n in range(1, 7))
        session.drag(Drag("animate", (Handle(canvas, (7.0, 7.0), poses, (7.0, 7.0)),), editable))
        session.next_chunk()
        if paints:
            canvas[:], editable[:] = mask(12, 16, 12, 16), False
        return session.next_chunk()

    np.testing.assert_array_equal(animated(True), animated(False))


def test_an_animation_that_is_over_is_not_kept(parts) -> None:
    session = open_session(parts, drag=DragConfig(iterations=1))
    advance(session, 2)
    kept = ref(session.drag(drag("animate", LEFT)).references[0])
    session.next_chunk()
    assert kept() is not None, "the chunk can be taken back and made again"
    advance(session, 2)
    gc.collect()
    assert kept() is None


def test_a_reference_of_other_features_is_refused(parts) -> None:
    session = open_session(parts, drag=DragConfig(iterations=1, layers=[0]))
    advance(session, 2)
    (reference,) = session.drag(drag("animate", LEFT)).references
    back = drag("animate", LEFT)
    back = replace(back, handles=(replace(back.handles[0], reference=reference),))
    for changes in ({"layers": [1]}, {"step": 1}, {"method": "sg_i2v"}):
        session.drag_cfg = DragConfig(**({"iterations": 1, "layers": [0]} | changes))
        refused(session, back, r"handle 0 brings a reference that was read with drag.method=dragstream in blocks \[0\]")
    session.drag_cfg = DragConfig()
    session.drag(back)  # what the frame shows needs no features
    (plain,) = session.drag(drag("animate", LEFT)).references
    session.drag_cfg = DragConfig(iterations=1)
    back = replace(back, handles=(replace(back.handles[0], reference=plain),))
    refused(session, back, "a reference that was read with drag.iterations=0, without features")


def test_the_warm_start_costs_one_pass_a_round_and_no_more(parts, monkeypatch) -> None:
    cfg = DragConfig(warm_rounds=2)
    session = open_session(parts, drag=cfg)
    advance(session, 3)
    calls, predict = [], type(session.student).predict_x0
    monkeypatch.setattr(
        type(session.student), "predict_x0", lambda *args, **kwargs: calls.append(1) or predict(*args, **kwargs)
    )
    session.next_chunk()
    plain = len(calls)
    session.drag(drag("edit", LEFT))
    assert len(calls) == plain + 1 + cfg.warm_rounds  # the steps before the last are as they were


def test_a_reference_without_features_is_what_the_stream_shows(parts) -> None:
    session = open_session(parts)
    advance(session, 3)
    latents = session.latents
    (reference,) = session.drag(drag("edit", LEFT)).references
    assert torch.equal(reference.clean, latents[0, :, -1]) and not reference.variants and reference.alone is None


def test_a_prompt_changed_in_the_stream_alters_the_next_chunk(parts) -> None:
    plain, changed = open_session(parts), open_session(parts)
    for session in (plain, changed):
        advance(session, 2)
    changed.set_prompt("a green disc on a red background")
    assert (changed.next_chunk() != plain.next_chunk()).any()


def test_an_animation_goes_on_with_the_settings_it_began_with(parts) -> None:
    poses = tuple(Pose(dx=-n) for n in range(1, 7))

    def animated(later: DragConfig) -> list[np.ndarray]:
        session = open_session(parts, drag=DragConfig(adsr="neighbours", adsr_frames=5, step=1))
        advance(session, 3)
        session.drag(Drag("animate", (Handle(mask(), (7.0, 7.0), poses, (7.0, 7.0)),)))
        first = session.next_chunk()
        session.drag_cfg = later
        return [first, session.next_chunk()]

    went_on = animated(DragConfig(adsr="neighbours", adsr_frames=5, step=1))
    for found, wanted in zip(animated(DragConfig(adsr_frames=0)), went_on):
        np.testing.assert_array_equal(found, wanted)


def test_a_chunk_edited_at_a_step_is_not_edited_before_it(parts) -> None:
    session = open_session(parts)
    advance(session, 3)
    edited = session.drag(drag("edit", LEFT)).frames
    session.drag_cfg = replace(session.drag_cfg, step=1)
    refused(session, drag("edit", LEFT), "drag.step=1 must be at least 2: chunk 2 was edited there")
    session.drag_cfg = replace(session.drag_cfg, step=2)
    again = session.drag(drag("edit", Pose())).frames
    np.testing.assert_array_equal(again, edited)
    session.undo()
    session.next_chunk()
    session.drag_cfg = replace(session.drag_cfg, step=1)
    session.drag(drag("edit", LEFT))


def test_a_chunk_animated_at_a_step_is_not_edited_before_it(parts) -> None:
    session = open_session(parts)
    advance(session, 2)
    session.drag(drag("animate", LEFT))
    session.next_chunk()
    session.drag_cfg = replace(session.drag_cfg, step=1)
    refused(session, drag("edit", Pose()), "drag.step=1 must be at least 2: chunk 2 was edited there")
    session.next_chunk()  # the animation is over
    session.drag(drag("edit", Pose()))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mode": "pull"}, "mode='pull' must be edit or animate"),
        ({"handles": ()}, "must have at least one handle"),
        ({"chunk": 0}, r"chunk=0 is not the latest, 2: it is gone; drag chunk 2"),
        ({"chunk": 1}, r"chunk=1 is not the latest, 2: undo\(1\) first"),
        ({"chunk": 7}, "chunk=7 does not exist yet; the latest is 2"),
        ({"editable": np.ones((8, 16), bool)}, r"the editable mask is bool \(8, 16\); it must be bool \(16, 16\)"),
        ({"editable": np.zeros((16, 16), bool)}, "the editable mask is empty"),
    ],
)
@pytest.mark.parametrize("mode", ["edit", "animate"])
def test_a_bad_drag_is_refused_before_anything_is_computed(parts, mode: str, change: dict, message: str) -> None:
    session = open_session(parts)
    advance(session, 3)
    refused(session, replace(drag(mode, LEFT), **change), message)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"point": (20.0, 3.0)}, r"handle 0 is at \(20, 3\), outside the frame of 16 x 16 px"),
        ({"mask": np.zeros((16, 16), bool)}, "the mask of handle 0 is empty"),
        ({"mask": np.ones((16, 12), bool)}, r"the mask of handle 0 is bool \(16, 12\)"),
        ({"mask": np.ones((16, 16))}, "the mask of handle 0 is float64"),
        ({"point": (float("nan"), 3.0)}, "not finite"),
        ({"poses": (LEFT, LEFT)}, "one target per handle, not 2"),
    ],
)
def test_a_bad_handle_is_refused_before_anything_is_computed(parts, change: dict, message: str) -> None:
    session = open_session(parts)
    advance(session, 1)
    good = drag("edit", LEFT)
    refused(session, replace(good, handles=(replace(good.handles[0], **change),)), message)


def test_trajectories_must_be_as_long_as_each_other_and_fill_chunks(parts) -> None:
    session = open_session(parts)
    with pytest.raises(ValueError, match="the session has made no chunk yet"):
        session.drag(drag("edit", LEFT))
    advance(session, 1)
    one, two = (Handle(mask(), (7.0, 7.0), (LEFT,) * count, (7.0, 7.0)) for count in (3, 6))
    refused(session, Drag("animate", (one, two)), "trajectories of 3, 6 latent frames")
    refused(session, Drag("animate", (replace(one, poses=(LEFT,) * 4),)), "have 4 latent frames.*nearest valid: 3")


@pytest.mark.parametrize(
    ("cfg", "message"),
    [(DragConfig(step=3), r"drag.step=3 must be in -3..2: the student's steps"),
     (DragConfig(layers=[7]), r"drag.layers=\[7\] must be blocks of the model, 0..1")],
)  # fmt: skip
def test_settings_that_do_not_fit_the_student_are_refused_at_once(parts, cfg: DragConfig, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        open_session(parts, drag=cfg)
    session = open_session(parts)
    with pytest.raises(ValueError, match=message):
        session.drag_cfg = cfg


def test_settings_of_the_optimisation_have_no_effect_without_it(parts) -> None:
    other: dict = {
        "method": "sg_i2v", "layers": [0], "max_iterations": 5, "segment_ratio": 0.1, "segment_degrees": 1.0,
        "subdivision": "floor", "start": "origin", "lr": 0.3, "restart_optimizer": True,
        "weight_decay": 0.5, "grad_clip": 0.1, "tolerance": 9.0,
        "norm": "l1", "reduction": "sum", "rec_weight": 0.0, "cst_weight": 9.0, "cst_on": "x0",
        "detach_key_value": False, "recompute": False, "cutoffs": [0.3], "cutoff_range": [0.1, 0.2],
        "filter_rope": "pre", "css_alpha": None, "css_box": "target", "css_on": "gradient",
    }  # fmt: skip
    assert set(other) == set(OPTIMISATION)

    def edited(**changes) -> np.ndarray:
        session = open_session(parts, drag=DragConfig(**changes))
        advance(session, 2)
        return session.drag(drag("edit", LEFT)).frames

    np.testing.assert_array_equal(edited(**other), edited())
    assert (edited(**other, iterations=1) != edited(iterations=1)).any()
    assert set(DragConfig(**other).without_effect()) == set(OPTIMISATION)
    assert not DragConfig(**other, iterations=1).without_effect() and not DragConfig().without_effect()
    assert not DragConfig(**other, iterations=1).remarks() and not DragConfig().remarks()
    (remark,) = DragConfig(lr=0.3).remarks()
    assert remark == "drag.lr has no effect with drag.iterations=0; set it to optimise"
    (remark,) = DragConfig(iterations=1, segment_degrees=1.0, subdivision="floor").remarks()
    assert remark.startswith("drag.segment_degrees, drag.subdivision have no effect with drag.segment_ratio=null")
    for name, value in other.items():
        assert getattr(DragConfig(), name) != value, name


def test_a_stream_without_drags_runs_no_filter_and_no_attention_of_its_own(parts, monkeypatch) -> None:
    for name in ("split_attention", "low_pass_keys", "low_pass_tokens"):
        monkeypatch.setattr(features_module, name, lambda *_: pytest.fail("a drag's feature was read"))
    monkeypatch.setattr(torch.fft, "fft2", lambda *_: pytest.fail("an FFT ran"))
    session = open_session(parts)
    passes = []
    hook = session.student.blocks[-1].self_attn.o.register_forward_pre_hook(lambda *_: passes.append(1))
    advance(session, 3)
    hook.remove()
    assert len(passes) == 3 * session.codecs.model_cfg.rollout.num_steps  # the cache pass stops before it


def test_the_official_profiles_shift_of_clean_latents_is_a_switch(parts) -> None:
    plain, shifted = open_session(parts), open_session(parts, drag=DragConfig(match_clean=True))
    expected, found = advance(plain, 4), advance(shifted, 4)
    np.testing.assert_array_equal(np.concatenate(found[:2]), np.concatenate(expected[:2]))  # not before chunk 2
    assert (found[2] != expected[2]).any()


def test_clean_latents_are_shifted_to_those_of_two_chunks_but_the_first(parts) -> None:
    session, latents = open_session(parts, drag=DragConfig(match_clean=True)), []
    for first in (1, 1, 1, 2):
        session.next_chunk()
        latents.append(session.latents)
        wanted = latents[first:]
        assert len(session._memory.clean) == len(wanted)
        assert all(found is x0 for found, x0 in zip(session._memory.clean, wanted))


POSES = st.builds(Pose, st.floats(-30, 30), st.floats(-30, 30), st.floats(-200, 200))
REGIONS = st.tuples(st.integers(0, 15), st.integers(0, 15), st.integers(1, 16), st.integers(1, 16))
ACTIONS = st.one_of(
    st.tuples(st.sampled_from(["edit", "animate"]), st.lists(st.tuples(REGIONS, POSES), min_size=1, max_size=3),
              st.booleans()),
    st.tuples(st.just("next")), st.tuples(st.just("undo")), st.tuples(st.just("prompt")),
)  # fmt: skip


@settings(max_examples=100, deadline=None, suppress_health_check=list(HealthCheck))
@given(actions=st.lists(ACTIONS, min_size=1, max_size=4), method=st.sampled_from(["dragstream", "sg_i2v", "dragvideo"]))
def test_random_drag_scripts(parts, actions: list[tuple], method: str) -> None:
    cfg = DragConfig(method=method, iterations=1, max_iterations=2)
    session = open_session(parts, undo_chunks=2, drag=cfg)
    advance(session, 2)
    for action in actions:
        if action[0] in ("edit", "animate"):
            _drag_at_random(session, *action)
        elif action[0] == "undo" and session._boundaries:
            session.undo()
        elif action[0] == "prompt":
            session.set_prompt("a green disc on a red background")
        if not session.chunk_index:
            session.next_chunk()
        session.next_chunk()
        assert torch.isfinite(session.latents).all()
    again = session.snapshot()
    expected = advance(session, 2)
    session.undo(2)
    for found, wanted in zip(advance(session, 2), expected):
        np.testing.assert_array_equal(found, wanted)
    session.restore(again)
    np.testing.assert_array_equal(session.next_chunk(), expected[0])


def _drag_at_random(session: StreamSession, mode: str, regions: list, masked: bool) -> None:
    handles = []
    for (x, y, width, height), pose in regions:
        inside = mask(x, min(16, x + width), y, min(16, y + height))
        poses = (pose,) if mode == "edit" else tuple(Pose().toward(pose, share) for share in (0.3, 0.7, 1.0))
        handles.append(Handle(inside, (x + 0.5, y + 0.5), poses, (x + 0.5, y + 0.5)))
    if not session._boundaries:  # undone as far as it goes
        session.next_chunk()
    before = session.latest_passes[session.drag_cfg.step].noisy_latents
    outcome = session.drag(Drag(mode, tuple(handles), mask(0, 12, 0, 16) if masked else None))
    if mode == "edit" and session.drag_cfg.method == "dragstream":
        found = session.latest_passes[session.drag_cfg.step].noisy_latents
        for ours, wanted in zip(torch.std_mean(found, PER_CHANNEL), torch.std_mean(before, PER_CHANNEL)):
            torch.testing.assert_close(ours, wanted, atol=2e-4, rtol=2e-4)
    assert all(np.isfinite(log.losses).all() for log in outcome.logs)
