"""The loop of a drag on a tiny student: what it may touch, what it must hold, and that it is repeatable."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from models.condition import Condition
from models.diffusion.noise import KeyedNoise
from models.rollout import ChunkPass, LatentEdit, Rollout, RolloutConfig
from models.wan.config import WanConfig
from models.wan.dit import WanDiT
from stream.dragstream import editor as editor_module
from stream.dragstream import features as features_module
from stream.dragstream.config import METHODS, DragConfig
from stream.dragstream.drag import Drag, Handle, Pose
from stream.dragstream.editor import DragEditor, LatentAdam, read_references, segment_poses
from stream.dragstream.features import FeatureReader
from stream.dragstream.labels import DragLabel
from stream.dragstream.statistics import PER_CHANNEL

CONFIG = WanConfig.tiny(num_layers=4)
SIZE, CELLS, CHUNK = (64, 96), (8, 12), 3  # px, latent cells of 8 px, latent frames
NOISE = KeyedNoise(0)
LABEL = Path(__file__).resolve().parents[4] / "shared/data/dragstream_label/block_3_Drag_trajectory.json"


def config(**changes: object) -> DragConfig:
    """Settings for the pass that `last_pass` gives."""
    return DragConfig(**{"step": 1} | changes)


def mask(x0: int = 16, x1: int = 48, y0: int = 16, y1: int = 40) -> np.ndarray:
    inside = np.zeros(SIZE, bool)
    inside[y0:y1, x0:x1] = True
    return inside


def handle(*poses: Pose, **where: int) -> Handle:
    return Handle(mask(**where), (32.0, 28.0), poses, (32.0, 28.0))


@torch.no_grad()
def make_student(config: WanConfig) -> WanDiT:
    rng = torch.Generator().manual_seed(0)
    student = WanDiT(config, rng).requires_grad_(False)
    for parameter in student.parameters():
        parameter += 0.05 * torch.randn(parameter.shape, generator=rng)
    return student


def run_chunks(student: WanDiT, cells: tuple[int, int], count: int, edit: LatentEdit | None = None) -> list[ChunkPass]:
    """The passes of a stream from text alone; the last chunk is edited."""
    config, passes = student.config, []
    prompt = torch.randn(1, config.text_len, config.text_dim, generator=torch.Generator().manual_seed(1))
    condition = Condition(prompt, torch.zeros_like(prompt))
    video = Rollout(student, RolloutConfig(), noise=NOISE, sample_ids=[0],
                    latent_shape=(config.latent_channels, *cells), cache="static")  # fmt: skip
    for chunk in range(count):

        def see(shown: ChunkPass, is_last: bool = chunk == count - 1) -> torch.Tensor:
            passes.append(shown)
            return edit(shown) if edit is not None and is_last else shown.noisy_latents

        video.next_chunk(condition, edit=see)
    return passes


def last_pass() -> tuple[WanDiT, ChunkPass]:
    """A student, and the second step of its second chunk."""
    student = make_student(CONFIG)
    return student, run_chunks(student, CELLS, 2)[-2]


@pytest.fixture(scope="module")
def shown() -> tuple[WanDiT, ChunkPass]:
    return last_pass()


def make_editor(
    shown: tuple[WanDiT, ChunkPass],
    cfg: DragConfig,
    drag: Drag,
    first_chunk: int = 1,
    noise: KeyedNoise = NOISE,
    size: tuple[int, int] = SIZE,
) -> DragEditor:
    """Of the chunk shown, whose features are its references."""
    student, chunk_pass = shown
    references = read_references(FeatureReader(student, cfg, chunk_pass.sigma), cfg, drag, chunk_pass, noise)
    return DragEditor(student, cfg, drag, size=size, noise=noise, first_chunk=first_chunk, references=references)


def edit(shown: tuple[WanDiT, ChunkPass], cfg: DragConfig, drag: Drag, seed: int = 0) -> torch.Tensor:
    return make_editor(shown, cfg, drag, noise=KeyedNoise(seed))(shown[1])


RIGHT = Drag("edit", (handle(Pose(dx=20.0)),))


@pytest.mark.parametrize("method", METHODS)
def test_each_method_changes_the_latents_repeatably(shown, method: str):
    cfg = config(method=method, iterations=2)
    first, again = edit(shown, cfg, RIGHT), edit(shown, cfg, RIGHT)
    assert torch.equal(first, again) and torch.isfinite(first).all()
    assert (first - shown[1].noisy_latents).abs().max() > 1e-3


def test_another_seed_switches_frequencies_otherwise(shown):
    cfg = config(iterations=4)
    assert not torch.equal(edit(shown, cfg, RIGHT), edit(shown, cfg, RIGHT, seed=1))
    fixed = replace(cfg, cutoffs=[0.4])
    assert torch.equal(edit(shown, fixed, RIGHT), edit(shown, fixed, RIGHT, seed=1))


@pytest.mark.parametrize("changes", [{}, {"cst_on": "x0", "reduction": "all"}, {"norm": "l1", "reduction": "sum"}])
def test_the_optimisation_lowers_the_reconstruction_loss(shown, changes: dict):
    cfg = config(iterations=30, max_iterations=None, cutoffs=[None], segment_ratio=None, **changes)
    editor = make_editor(shown, cfg, RIGHT)
    editor(shown[1])
    losses = editor.logs[0].losses
    assert len(losses) == 30 and losses[-1] < 0.9 * losses[0]


def test_no_movement_no_iterations_and_other_steps_return_the_latents_themselves(shown):
    chunk_pass = shown[1]
    still = Drag("edit", (handle(Pose()),))
    for cfg, drag, given in (
        (config(), still, chunk_pass),
        (config(iterations=0, warm_rounds=0), RIGHT, chunk_pass),
        (config(), RIGHT, replace(chunk_pass, step=2)),
    ):
        assert make_editor(shown, cfg, drag)(given) is given.noisy_latents


def test_statistics_are_those_before_the_drag(shown):
    found, before = edit(shown, config(), RIGHT), shown[1].noisy_latents
    for ours, wanted in zip(torch.std_mean(found, PER_CHANNEL), torch.std_mean(before, PER_CHANNEL)):
        torch.testing.assert_close(ours, wanted, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("css_on", ["update", "gradient"])
def test_where_the_gaussian_map_is_zero_a_step_changes_nothing(css_on: str):
    before = torch.randn(1, 4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    gain = torch.zeros(1, 1, 3, 8, 8)
    gain[..., :4] = 0.01
    adam = LatentAdam(config(css_on=css_on, lr=0.1))
    after = adam.step(before, torch.randn(before.shape, generator=torch.Generator().manual_seed(1)), gain)
    assert torch.equal(after[..., 4:], before[..., 4:])
    step = float((after - before)[..., :4].abs().mean())
    assert step == pytest.approx(0.001 if css_on == "update" else 0.1, rel=0.05)  # Adam undoes a scaled gradient


def test_the_update_is_that_of_torchs_adam():
    cfg, start = config(lr=0.03, weight_decay=0.1), torch.randn(1, 2, 1, 4, 4)
    leaf = start.clone().requires_grad_()
    reference = torch.optim.AdamW([leaf], lr=cfg.lr, betas=(0.9, 0.999), eps=1e-8, weight_decay=cfg.weight_decay)
    ours, adam = start, LatentAdam(cfg)
    for seed in range(3):
        gradient = torch.randn(start.shape, generator=torch.Generator().manual_seed(seed))
        leaf.grad = gradient
        reference.step()
        ours = adam.step(ours, gradient, None)
    torch.testing.assert_close(ours, leaf.detach(), atol=1e-6, rtol=1e-5)


def test_a_restarted_optimizer_descends_by_the_sign_at_each_iteration():
    before, rng = torch.zeros(1, 2, 1, 4, 4), torch.Generator().manual_seed(0)
    adam = LatentAdam(config(restart_optimizer=True, lr=0.1))
    for _ in range(3):
        gradient = torch.randn(before.shape, generator=rng)
        after = adam.step(before, gradient, None)
        torch.testing.assert_close(after, before - 0.1 * gradient.sign(), atol=1e-5, rtol=0)
        before = after


def test_a_gradient_longer_than_the_limit_is_shortened_to_it():
    gradient = torch.full((1, 2, 1, 4, 4), 3.0)
    for limit, wanted in ((0.5, gradient * 0.5 / gradient.norm()), (50.0, gradient)):
        adam = LatentAdam(config(grad_clip=limit))
        adam.step(torch.zeros_like(gradient), gradient, None)
        torch.testing.assert_close(adam.mean, 0.1 * wanted)  # of Adam's first step


def test_frames_without_a_target_may_change_around_the_last_one(shown):
    cfg, targets = config(css_box="target"), [None, [Pose(dx=8.0)], [Pose(dx=40.0)]]
    scene = editor_module.Scene(cfg, None, shown[1], RIGHT.handles, (), [Pose()], None, SIZE, NOISE)
    first, middle, last = make_editor(shown, cfg, RIGHT)._gain(scene, targets)[0, 0]
    assert torch.equal(first, last) and not torch.equal(middle, last)


def test_what_comes_back_changes_where_it_shall_be_and_not_where_its_mask_was(shown):
    cfg, pose = config(css_box="handle"), Pose(dx=24.0)
    reference = FeatureReader(shown[0], cfg, shown[1].sigma).reference(shown[1], [])
    gains = []
    for given in (replace(handle(pose), reference=reference), handle(pose)):
        drag = Drag("edit", (given,))
        scene = editor_module.Scene(cfg, None, shown[1], drag.handles, (reference,), [None], None, SIZE, NOISE)
        gains.append(make_editor(shown, cfg, drag)._gain(scene, [[pose]])[0, 0, 0].sum(0).argmax().item())
    assert gains[0] - gains[1] == 3  # columns of 8 px


def test_the_whole_has_the_statistics_of_before_in_the_end_where_the_profile_says_so(shown):
    found = edit(shown, config(iterations=1, method="sg_i2v", adsr="compat"), RIGHT)
    for ours, wanted in zip(torch.std_mean(found), torch.std_mean(shown[1].noisy_latents)):
        torch.testing.assert_close(ours, wanted, atol=1e-5, rtol=1e-5)


def test_a_reference_is_of_the_frame_asked_for(shown):
    reader = FeatureReader(shown[0], config(), shown[1].sigma)
    for frame in (0, 1, -1):
        found = reader.reference(shown[1], [None], frame)
        with torch.no_grad():
            features, x0 = reader.features_and_x0(shown[1], shown[1].noisy_latents)
        torch.testing.assert_close(found.clean, x0[0, :, frame], atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(found.variants[None], features[frame], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("left_as_it_is", ["low_pass_keys", "low_pass_tokens"])
def test_both_keys_and_values_lose_their_high_frequencies(shown, monkeypatch, left_as_it_is: str):
    monkeypatch.setattr(features_module, left_as_it_is, lambda tokens, *_: tokens)
    found = FeatureReader(shown[0], config(), shown[1].sigma).reference(shown[1], [None, 0.1]).variants
    assert (found[None] - found[0.1]).abs().max() > 1e-4


def test_segments_are_equal_parts_of_at_most_the_given_length():
    cfg = config(segment_ratio=0.25, segment_degrees=8.0, iterations=1)
    start, targets = [Pose(10.0, 0.0)], [[Pose(20.0, 0.0)], None, [Pose(41.0, 0.0)]]
    segments = segment_poses(start, targets, cfg, 64)
    assert [part[2][0].dx for part in segments] == [25.5, 41.0]  # 31 px: two of 15.5
    assert [part[0][0].dx for part in segments] == [15.0, 20.0] and segments[0][1] is None
    floor = segment_poses(start, targets, replace(cfg, subdivision="floor"), 64)
    assert len(floor) == 1  # the official code's single step of 31 px
    from_origin = segment_poses(start, targets, replace(cfg, start="origin"), 64)
    assert [round(part[2][0].dx, 2) for part in from_origin] == [13.67, 27.33, 41.0]
    turning = segment_poses([Pose()], [[Pose(degrees=-200.0)]], cfg, 64)
    assert len(turning) == 25 and turning[0][0][0].degrees == -8.0
    assert len(segment_poses([Pose()], [[Pose(degrees=-200.0)]], replace(cfg, max_iterations=5), 64)) == 5
    assert len(segment_poses([Pose()], [[Pose()]], cfg, 64)) == 1


def test_an_animation_goes_on_where_the_last_chunk_ended(shown):
    poses = tuple(Pose(dx=4.0 * n) for n in range(1, 7))
    editor = make_editor(shown, config(), Drag("animate", (handle(*poses),)), first_chunk=0)
    start, targets = editor._poses(shown[1].chunk, CHUNK)
    assert start == [poses[2]] and [each[0] for each in targets] == list(poses[3:])


def test_an_edit_of_the_first_chunk_leaves_the_given_frame(shown):
    target = Pose(dx=8.0)
    editor = make_editor(shown, config(), Drag("edit", (handle(target),)), first_chunk=0)
    assert editor._poses(0, 3) == ([Pose()], [None, [Pose(dx=4.0)], [target]])
    assert [poses[0].dx for poses in editor._poses(1, 3)[1]] == pytest.approx([8 / 3, 16 / 3, 8])
    assert editor._poses(0, 1) == ([Pose()], [None])


def test_an_edit_of_the_last_frame_alone_has_no_target_in_the_others(shown):
    editor = make_editor(shown, config(edit_frames="last"), Drag("edit", (handle(Pose(dx=8.0)),)))
    assert editor._poses(1, 3) == ([Pose()], [None, None, [Pose(dx=8.0)]])


def test_what_comes_back_has_no_way_and_no_old_place(shown):
    reference = FeatureReader(shown[0], config(), shown[1].sigma).reference(shown[1], (None,))
    back = replace(handle(Pose(dx=200.0), Pose(dx=100.0), Pose(dx=8.0)), reference=reference)
    editor = make_editor(shown, config(), Drag("animate", (back,)), first_chunk=shown[1].chunk)
    start, targets = editor._poses(shown[1].chunk, CHUNK)
    assert start == [None]
    assert segment_poses(start, targets, config(), SIZE[0]) == [targets]


def test_a_handle_that_leaves_the_frame_is_no_error_and_one_far_away_has_no_pull(shown):
    far = Drag("edit", (handle(Pose(dx=500.0)),))
    cfg = config(iterations=1, cst_weight=0.0, edit_frames="last", warm_rounds=0)
    before = shown[1].noisy_latents
    torch.testing.assert_close(edit(shown, cfg, far), before, atol=1e-5, rtol=0)
    partly = edit(shown, config(iterations=1), Drag("edit", (handle(Pose(dx=70.0)), handle(Pose(dy=-30.0)))))
    assert torch.isfinite(partly).all() and (partly - before).abs().max() > 1e-3


def test_a_later_handle_is_in_front(shown):
    student, chunk_pass = shown
    both = Drag("edit", (handle(Pose(dx=8.0)), handle(Pose(dx=8.0), x0=16, x1=32)))
    scene_of = editor_module.Scene
    reader = FeatureReader(student, config(), chunk_pass.sigma)
    reference = reader.reference(chunk_pass, [None])
    scene = scene_of(config(), reader, chunk_pass, both.handles, (reference,) * 2, [Pose()] * 2, None, SIZE, NOISE)
    objective = editor_module.OBJECTIVES["dragstream"](scene)
    objective.aim([None, None, [Pose(dx=8.0), Pose(dx=8.0)]], 0)
    front, back = objective.patches
    assert len(front.cells) == 2 * 3 and len(back.cells) == 2 * 3  # of 4 x 3 cells the front one takes half
    assert front.cells[:, 0].max() < back.cells[:, 0].min()


def test_stored_features_bring_an_object_back(shown):
    student, chunk_pass = shown
    reference = FeatureReader(student, config(), chunk_pass.sigma).reference(chunk_pass, config().cutoffs)
    outside = Handle(mask(), (32.0, 28.0), (Pose(dx=-10.0),), (32.0, 28.0), reference)
    assert torch.isfinite(edit(shown, config(iterations=1), Drag("edit", (outside,)))).all()


def test_the_feature_is_attention_before_its_projection_in_the_reference_layers(shown):
    student, chunk_pass = shown
    reader = FeatureReader(student, config(layers=[1, 2], detach_key_value=False), chunk_pass.sigma)
    inputs = []
    for layer in (1, 2):
        student.blocks[layer].self_attn.o.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    with torch.no_grad():
        features, _ = reader.features_and_x0(chunk_pass, chunk_pass.noisy_latents)
    rows, cols = CELLS[0] // 2, CELLS[1] // 2
    assert features.shape == (CHUNK, 2 * CONFIG.dim, rows, cols)
    for number, tokens in enumerate(inputs):  # [1, F * rows * cols, D]
        part = features[:, number * CONFIG.dim : (number + 1) * CONFIG.dim]
        torch.testing.assert_close(part.permute(0, 2, 3, 1).reshape(1, -1, CONFIG.dim), tokens, atol=1e-5, rtol=1e-4)


def test_detached_keys_leave_the_gradient_through_the_queries(shown):
    student, chunk_pass = shown

    def gradient(detach: bool) -> torch.Tensor:
        reader = FeatureReader(student, config(layers=[0], detach_key_value=detach), chunk_pass.sigma)
        latents = chunk_pass.noisy_latents.clone().requires_grad_()
        return torch.autograd.grad(reader.features(chunk_pass, latents).square().sum(), latents)[0]

    assert gradient(True).abs().max() > 0
    assert (gradient(True) - gradient(False)).abs().max() > 1e-6


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"method": "magic"}, "drag.method=magic must be dragstream or sg_i2v or dragvideo"),
        ({"iterations": 9, "max_iterations": 4}, "drag.iterations=9"),
        ({"cutoffs": [0.0]}, "drag.cutoffs=\\[0.0\\] must be positive"),
        ({"cutoff_range": [0.6, 0.1]}, "drag.cutoff_range"),
        ({"segment_degrees": 0.0}, "segment_degrees=0.0 must be > 0"),
        ({"segment_ratio": float("nan")}, "segment_ratio=nan, .* must be > 0"),
        ({"cutoffs": [None, float("nan")]}, "drag.cutoffs=\\[None, nan\\] must be positive"),
        ({"lr": float("nan")}, "drag.lr=nan must be >= 0"),
        ({"warm_gain": float("inf")}, "drag.warm_gain=inf must be >= 0 and finite"),
        ({"rec_weight": -1.0}, "drag.rec_weight=-1.0 must be >= 0"),
        ({"css_alpha": 0.0}, "drag.css_alpha=0.0 must be > 0, or null for none"),
    ],
)
def test_a_setting_out_of_range_names_itself(settings: dict, message: str):
    with pytest.raises(ValueError, match=message):
        config(**settings)


def test_the_layers_are_those_of_the_paper_or_the_same_share_of_another_depth():
    assert config().layers_of(30) == [12, 13, 14, 15]
    assert config().layers_of(6) == [2]
    assert config(layers=[1, 3]).layers_of(4) == [1, 3]
    with pytest.raises(ValueError, match="drag.layers=\\[4\\] must be blocks of the model, 0..3"):
        config(layers=[4]).layers_of(4)


@pytest.mark.skipif(not LABEL.is_file(), reason=f"no official label at {LABEL}")
def test_the_official_label_drives_an_edit_of_a_wan_shaped_student() -> None:
    """832 x 480 px: latents of 60 x 104, 1560 tokens a frame; nothing but sizes differs from the sprites world."""
    student, drag = make_student(WanConfig.tiny(latent_channels=16)), DragLabel.read(LABEL).to_drag()
    cfg = config(iterations=1, max_iterations=2, segment_ratio=1 / 30)
    editors: list[DragEditor] = []

    def dragged(shown: ChunkPass) -> torch.Tensor:
        if shown.step == cfg.step:
            editors.append(make_editor((student, shown), cfg, drag, drag.chunk, size=(480, 832)))
            return editors[0](shown)
        return shown.noisy_latents

    run_chunks(student, (60, 104), drag.chunk + 1, dragged)
    (editor,) = editors
    log = editor.logs[0]
    assert (log.chunk, log.num_segments, len(log.losses)) == (2, 2, 2) and np.isfinite(log.losses).all()
    assert editor.references[0].variants[0.4].shape == (80, 30, 52)


@pytest.mark.parametrize("method", METHODS)
def test_a_reference_keeps_what_its_method_reads_and_nothing_else_alive(shown, method: str):
    student, chunk_pass = shown
    reference = FeatureReader(student, config(method=method), chunk_pass.sigma).reference(chunk_pass, [None])
    kept = [
        reference.clean,
        *reference.variants.values(),
        *(t for kv in reference.key_values for t in (kv.key, kv.value)),
    ]
    assert all(tensor.untyped_storage().nbytes() == tensor.nbytes for tensor in kept)
    assert bool(reference.key_values) == (reference.alone is not None) == (method == "sg_i2v")
