"""The drag benchmark: scenarios from a seed or from labels, and its figures on a tiny random student."""

from __future__ import annotations

import json
import shutil
import weakref
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
import torch

from data.app import compose_config
from data.sprites import SpritesConfig
from eval.benchmarks.context import EvalContext
from eval.benchmarks.drag import DragBenchConfig, DragBenchmark, Verdict, baseline_settings, by_kind
from eval.benchmarks.drag_ablation import (
    CLAIMS,
    VARIANTS,
    DragAblation,
    DragAblationConfig,
    over_seeds,
    same_as_full,
)
from eval.benchmarks.drag_pictures import pick_shown
from eval.benchmarks.drag_runs import DraggedChunks, Replay, Run, pasted
from eval.benchmarks.drag_scenarios import COMBINATIONS, DragEvent, labelled_scenarios, moved_to, sprites_scenarios
from eval.metrics.drag import LocatorConfig
from eval.run import main
from models.condition import ClipGeometry
from stream.codecs import Codecs
from stream.dragstream.drag import Drag, Handle, Pose, check_drag
from stream.dragstream.editor import DragEditor
from stream.dragstream.labels import DragLabel
from stream.provenance import peak_bytes
from stream.session_state import DragOutcome

GEOMETRY = ClipGeometry(64, 64, 33, 16)
WORLD = SpritesConfig(max_sprites=2, min_size=0.3, max_size=0.4)


def scenarios(count: int, seed: int = 0):
    return sprites_scenarios(WORLD, GEOMETRY, chunk_frames=3, count=count, seed=seed)


def test_every_combination_and_variant_is_there_and_every_drag_is_allowed() -> None:
    found = scenarios(204)
    assert len({scenario.key for scenario in found}) == 204
    assert {(s.mode, s.kind, s.num_handles) for s in found} == set(COMBINATIONS)
    assert {s.variant for s in found} == {"plain", "occlusion", "leaving", "long"}
    for scenario in found:
        for event in scenario.events:
            check_drag(event.drag, height=64, width=64, chunk_frames=3)
            assert (event.drag.editable | ~event.drag.handles[0].mask).all()
    long = next(s for s in found if s.variant == "long")
    assert 16 * 20 - 60 < 12 * long.num_chunks <= 16 * 20 + 12 and len(long.events) >= 5
    leaving = next(s for s in found if s.variant == "leaving" and s.mode == "animate")
    assert [event.brings_back for event in leaving.events] == [None, 0]


def test_scenarios_are_those_of_the_seed() -> None:
    first, again, other = scenarios(6), scenarios(6), scenarios(6, seed=1)
    for a, b, c in zip(first, again, other):
        np.testing.assert_array_equal(a.first_frame, b.first_frame)
        assert a.events[0].drag.handles[0].poses == b.events[0].drag.handles[0].poses
        assert (a.first_frame != c.first_frame).any()


def test_a_longer_opening_changes_when_is_dragged_and_nothing_else() -> None:
    late = sprites_scenarios(WORLD, GEOMETRY, chunk_frames=3, count=12, seed=0, opening_chunks=6)
    for a, b in zip(scenarios(12), late):
        made_again = a.mode == "edit"
        assert a.events[0].after_chunks == 1 + made_again and b.events[0].after_chunks == 6 + made_again
        assert b.num_chunks - a.num_chunks == 5
        np.testing.assert_array_equal(a.first_frame, b.first_frame)
        assert [h.poses for h in a.events[0].drag.handles] == [h.poses for h in b.events[0].drag.handles]


def test_a_drag_follows_its_object() -> None:
    mask = np.zeros((64, 64), bool)
    mask[20:30, 20:30] = True
    drag = Drag("animate", (Handle(mask, (25, 25), (Pose(dx=2),) * 3, (25, 25)),))
    placed = moved_to(drag, [Pose(dx=8, dy=-4)]).handles[0]
    assert placed.mask[16:26, 28:38].all() and placed.mask.sum() == 100 and placed.point == (33, 21)
    gone = moved_to(drag, [Pose(dx=100)]).handles[0]
    np.testing.assert_array_equal(gone.mask, mask)


def test_a_turned_handle_is_judged_where_its_point_has_gone() -> None:
    """A perfect rotation of something that looks the same at every angle but for its surroundings."""
    rows, cols = np.mgrid[:64, :64] + 0.5
    mask = (abs(cols - 32) < 20) & (abs(rows - 32) < 4)  # a bar
    before = np.full((64, 64, 3), 40, np.uint8)
    before[mask] = 220
    drag = Drag("edit", (Handle(mask, (48.0, 32.0), (Pose(degrees=90.0),), (32.0, 32.0)),))
    found = {}
    for name, frame in (("turned", before.transpose(1, 0, 2).copy()), ("still", before)):
        dragged = DraggedChunks(drag, before, torch.zeros(2, 16, 16), frame[None], torch.zeros(2, 1, 16, 16), 0, [1.0])
        run = Run(frame[None], [dragged], [])
        found[name] = DragBenchmark(DragBenchConfig()).judge(run, run)
    assert found["turned"].dai_rgb_r1 == 0.0 < found["still"].dai_rgb_r1
    assert found["turned"].dai_rgb_r5 < found["still"].dai_rgb_r5
    assert found["turned"].dai_rgb_warped < 1e-6 < found["turned"].dai_rgb, "the patch turns as the bar does"
    assert found["still"].dai_rgb_warped > found["turned"].dai_rgb


def test_a_rotation_is_pulled_at_a_point_beside_its_middle() -> None:
    turning = [s for s in scenarios(24) if s.kind == "rotation"]
    for scenario in turning:
        for handle in scenario.events[0].drag.handles:
            assert np.hypot(*np.subtract(handle.point, handle.center)) > 2


def test_a_pasted_region_is_where_it_should_be_and_no_longer_where_it_was() -> None:
    grey, red = 90, np.array([250, 10, 10])
    before = np.full((64, 64, 3), grey, np.uint8)
    before[20:30, 20:30] = red
    mask = (before == red).all(-1)
    drag = Drag("animate", (Handle(mask, (25.0, 25.0), tuple(Pose(dx=4.0 * n) for n in (1, 2, 3)), (25.0, 25.0)),))
    frames = np.repeat(before[None], 12, axis=0)
    dragged = DraggedChunks(drag, before, torch.zeros(2, 16, 16), frames, torch.zeros(2, 3, 16, 16), 0, [1.0])
    shapes = []

    def encode(video: np.ndarray) -> torch.Tensor:
        shapes.append(video.shape)
        return torch.arange(4.0).reshape(1, 4, 1, 1).expand(2, 4, 16, 16)

    (found,) = pasted(Run(frames, [dragged], []), encode).drags
    assert shapes == [(13, 64, 64, 3)] and found.latents[0, :, 0, 0].tolist() == [1.0, 2.0, 3.0]
    expected = np.full((64, 64, 3), grey, np.uint8)
    expected[20:30, 32:42] = red
    np.testing.assert_allclose(found.frames[-1], expected, atol=3)  # what is painted over is not exact
    assert (found.frames[1] == red).all(-1)[25].nonzero()[0].tolist() == list(range(22, 32))  # two px on


def test_the_given_frame_of_a_chunk_that_opens_a_video_keeps_its_region() -> None:
    before = np.full((64, 64, 3), 90, np.uint8)
    before[20:30, 20:30] = (250, 10, 10)
    mask = before[..., 0] == 250
    drag = Drag("edit", (Handle(mask, (25.0, 25.0), (Pose(dx=16.0),), (25.0, 25.0)),))
    frames = np.repeat(before[None], 9, axis=0)
    dragged = DraggedChunks(drag, before, torch.zeros(2, 16, 16), frames, torch.zeros(2, 3, 16, 16), 0, [1.0])
    (found,) = pasted(Run(frames, [dragged], []), lambda video: torch.zeros(2, 3, 16, 16)).drags
    place = [(frame[..., 0] == 250)[25].nonzero()[0].tolist() for frame in found.frames]
    assert place[0] == list(range(20, 30)) and place[-1] == list(range(36, 46))


def test_labels_need_a_first_frame_beside_them(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"has no \*_trajectory.json"):
        labelled_scenarios(tmp_path, GEOMETRY, 3)
    _label(tmp_path / "one")
    with pytest.raises(ValueError, match="has a label but no first frame"):
        labelled_scenarios(tmp_path, GEOMETRY, 3)


def _label(folder: Path) -> None:
    mask = np.zeros((16, 16), bool)
    mask[4:12, 4:12] = True
    poses = tuple(Pose(dx=n) for n in (1, 2, 3))
    DragLabel.from_drag(Drag("animate", (Handle(mask, (8, 8), poses, (8, 8)),)), "a red disc", 1, 3).write(folder)


def _run(tiny_weights, out: Path, *overrides: str) -> dict:
    small = ["bench=drag", f"out={out}", "bench.baselines=[sg_i2v]", "drag.iterations=1"]
    assert main(compose_config("eval", [*small, *tiny_weights.overrides, *overrides])) == 0
    return json.loads((out / "metrics.json").read_text())


def test_the_benchmark_measures_each_method_against_no_drag(tiny_weights, tmp_path: Path) -> None:
    bigger = ["model.clip.height=32", "model.clip.width=32", "bench.world.min_size=0.4", "bench.world.max_size=0.5",
              "bench.world.max_sprites=1"]  # fmt: skip
    metrics = _run(tiny_weights, tmp_path, "bench.num_scenarios=7", "bench.num_shown=1", *bigger)
    for role in ("drag", "no_drag", "sg_i2v"):
        for key in ("objmc_px", "dai_latent", "dai_rgb", "background_psnr_db", "seconds"):
            assert np.isfinite(metrics[f"{role}.{key}"]), (role, key)
    assert metrics["no_drag.background_psnr_db"] == 100.0 > metrics["drag.background_psnr_db"]
    assert metrics["drag.objmc_px"] != metrics["no_drag.objmc_px"]
    assert metrics["drag.objmc_ratio"] == metrics["drag.objmc_px"] / metrics["no_drag.objmc_px"]
    assert metrics["drag.seconds_ratio"] > 1 and metrics["drag.extra_memory_ratio"] > 0
    assert metrics["drag.fvd"].startswith("unavailable: get i3d")
    per_scenario = json.loads((tmp_path / "scenarios.json").read_text())
    assert len(per_scenario) == 7
    assert "interval over scenarios" in (tmp_path / "report.html").read_text()
    assert json.loads((tmp_path / "meta.json").read_text())["clips"] == [each["key"] for each in per_scenario]
    assert set(per_scenario[0]) == {"key", "prompt", "no_drag", "drag", "sg_i2v", "ideal"}
    assert metrics["ideal.objmc_px"] < 0.5 and "ideal.seconds_ratio" not in metrics  # nothing is generated for it
    report = (tmp_path / "report.html").read_text()
    assert "Before and after" in report and 'src="http' not in report


def test_frames_are_kept_of_what_is_shown_alone(tiny_weights, tmp_path: Path, monkeypatch) -> None:
    """A stream at 832 x 480 takes a megabyte a frame, in every method."""
    runs: list[weakref.ref[Run]] = []
    lengths: list[int] = []
    judge = DragBenchmark.judge

    def noting(bench: DragBenchmark, run: Run, base: Run) -> Verdict:
        runs.append(weakref.ref(run))
        lengths.append(len(run.frames))
        return judge(bench, run, base)

    monkeypatch.setattr(DragBenchmark, "judge", noting)
    model_cfg = replace(tiny_weights.model_cfg, clip=replace(tiny_weights.model_cfg.clip, height=32, width=32))
    context = EvalContext(model_cfg, Codecs.load(model_cfg), torch.device("cpu"), 0, tmp_path)
    world = SpritesConfig(max_sprites=2, min_size=0.36, max_size=0.42)
    bench = DragBenchmark(DragBenchConfig(num_scenarios=7, num_shown=1, baselines=[], world=world))
    outcome = bench.run(context)
    chunk_frames = model_cfg.rollout.chunk_frames
    expected = [scenario.num_frames(chunk_frames) for scenario in bench.scenarios(context)]
    assert lengths == [length for length in expected for _ in ("no_drag", "drag", "ideal")]
    alive = [run() is not None for run in runs]
    assert alive[:2] == [True, True] and not any(alive[3:]), "no_drag and drag of the one that is shown"
    assert len(outcome.sections()[-1].videos) == 1


def test_a_tracker_without_weights_is_refused_before_a_label_is_streamed(tiny_weights, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(DragBenchmark, "scenarios", lambda *given: pytest.fail("too late"))
    with pytest.raises(ImportError, match="cotracker3 has no weights"):
        _run(tiny_weights, tmp_path, "bench.labels=labels", "bench.tracker.name=cotracker3")


def test_what_no_scenario_measures_is_no_number_in_a_table() -> None:
    found = [Verdict(**dict.fromkeys(Verdict.__dataclass_fields__, value)) for value in (2.5, float("nan"))]
    rows = by_kind(scenarios(2), {"drag": found[:1] * 2, "paper": found, "ideal": found[1:] * 2}).rows
    assert [row[2:] for row in rows] == [["2.50", "2.50", "n/a"]] * 2
    (table,) = (
        section.table for section in DragAblation(DragAblationConfig())._sections([], {"full": found[1:]})
        if section.title == "Variants"
    )  # fmt: skip
    assert table.rows == [["full", *["n/a"] * 5]]


def test_the_benchmark_takes_official_labels(tiny_weights, tmp_path: Path) -> None:
    _label(tmp_path / "labels" / "one")
    picture = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    cv2.imwrite(str(tmp_path / "labels" / "one" / "first.png"), picture)
    metrics = _run(tiny_weights, tmp_path / "out", f"bench.labels={tmp_path / 'labels'}")
    assert np.isfinite(metrics["drag.objmc_px"])
    assert metrics["drag.background_psnr_db"] is None  # all of the frame is editable


def test_a_point_that_the_tracker_loses_is_not_judged(monkeypatch) -> None:
    """Two points of a label's handle go 4 px to the right; one is lost on its way and stays."""
    mask = np.zeros((64, 64), bool)
    mask[20, 20:22] = True
    drag = Drag("edit", (Handle(mask, (20.5, 20.5), (Pose(dx=4),), (20.5, 20.5)),))
    frames, latents = np.zeros((12, 64, 64, 3), np.uint8), torch.zeros(2, 3, 16, 16)
    dragged = DraggedChunks(drag, frames[0], latents[:, 0], frames, latents, 0, [1.0])

    class Tracker:
        def track(self, video, start):
            points = np.repeat(start[None], len(video), axis=0)
            points[6:, 0, 0] += 4.0
            visible = np.ones(points.shape[:2], bool)
            visible[6:, 1] = False
            return points, visible

    monkeypatch.setattr("eval.benchmarks.drag.build_tracker", lambda cfg: Tracker())
    found = DragBenchmark(DragBenchConfig(labels="labels"))._judge_drag(dragged)
    assert found["objmc_px"] == 0.0 and found["objmc_per_point_px"] == 0.0


def test_weights_that_are_not_there_stop_the_benchmark_before_it_streams(tiny_weights, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nowhere is no file; get i3d_torchscript.pt"):
        _run(tiny_weights, tmp_path, "bench.i3d_weights=nowhere")


def test_a_single_drag_has_no_distances(tiny_weights, tmp_path: Path) -> None:
    bigger = ["model.clip.height=32", "model.clip.width=32", "bench.world.min_size=0.4", "bench.world.max_size=0.5"]
    metrics = _run(tiny_weights, tmp_path, "bench.num_scenarios=1", "bench.baselines=[paper]", *bigger)
    assert metrics["drag.fvd"] == "unavailable: 1 video; a Fréchet distance needs 2 or more"
    assert np.isfinite(metrics["paper.objmc_px"])


def test_a_student_that_keeps_all_the_past_can_be_dragged(tiny_weights, tmp_path: Path) -> None:
    bigger = ["model.clip.height=32", "model.clip.width=32", "bench.world.min_size=0.4", "bench.world.max_size=0.5"]
    metrics = _run(
        tiny_weights,
        tmp_path,
        "bench.num_scenarios=1",
        "bench.baselines=[]",
        "model.rollout.window_chunks=null",
        *bigger,
    )
    assert np.isfinite(metrics["drag.objmc_px"]) and metrics["drag.extra_memory_ratio"] > 0


def test_an_unknown_method_names_the_known_ones() -> None:
    with pytest.raises(ValueError, match="bench.baselines has 'magic'; conf/drag has compat, dragvideo, marionette"):
        DragBenchConfig(baselines=["magic"])


def test_the_peak_is_what_is_held_at_once() -> None:
    def run() -> None:
        for _ in range(3):
            kept = torch.zeros(1 << 20)  # 4 MiB
            del kept
        pair = torch.zeros(1 << 20), torch.zeros(1 << 19)
        del pair

    assert peak_bytes(run, torch.device("cpu")) == pytest.approx(6 << 20, rel=0.01)


class TimedSession:
    """A session whose drags take 10 s and whose n-th chunk takes n s; an edit makes its chunk again within."""

    def __init__(self) -> None:
        self.now, self.num_frames, self.chunk_index = 0.0, 12, 1
        self.latents, self.frames = torch.zeros(1, 2, 3, 16, 16), np.zeros((12, 64, 64, 3), np.uint8)
        rollout = SimpleNamespace(chunk_frames=3)
        self.codecs = SimpleNamespace(clock=lambda: self.now, model_cfg=SimpleNamespace(rollout=rollout))

    @property
    def timing(self) -> SimpleNamespace:
        return SimpleNamespace(total_seconds=float(self.chunk_index))

    def next_chunk(self) -> np.ndarray:
        self.now += 1.0
        self.chunk_index += 1
        self.num_frames += 12
        return self.frames

    def drag(self, drag: Drag) -> DragOutcome:
        self.now += 10.0
        return DragOutcome(self.frames if drag.mode == "edit" else None, (), [])


@pytest.mark.parametrize(("mode", "poses", "seconds"), [("edit", 3, [10.0]), ("animate", 6, [12.0, 3.0])])
def test_the_time_of_a_drag_has_what_starting_it_took(mode, poses, seconds) -> None:
    session = TimedSession()
    mask = np.zeros((64, 64), bool)
    mask[20:30, 20:30] = True
    drag = Drag(mode, (Handle(mask, (25, 25), (Pose(dx=2),) * poses, (25, 25)),))
    scenario = replace(scenarios(1)[0], events=(DragEvent(1, drag),), num_chunks=4)
    run = Replay(session, scenario, LocatorConfig(), session.frames, session.latents).run()
    assert [dragged.seconds for dragged in run.drags] == [seconds]
    plain = [2.0, 3.0, 4.0, 5.0] if mode == "edit" else [4.0, 5.0]  # one beyond those judged; not the opening
    assert run.plain_seconds == plain and len(run.frames) == 12 * 4


def test_every_operation_is_shown_before_a_second_of_its_kind() -> None:
    scenarios = sprites_scenarios(WORLD, GEOMETRY, chunk_frames=3, count=204, seed=0)
    shown = [scenarios[n] for n in pick_shown(scenarios, 12)]
    assert len({(each.mode, each.kind) for each in shown[:6]}) == 6
    assert {each.variant for each in shown} == {each.variant for each in scenarios}
    assert pick_shown(scenarios[:3], 12) == [0, 2, 1] and pick_shown(scenarios, 0) == []


def test_the_ablations_say_of_each_claim_whether_it_holds(tiny_weights, tmp_path: Path, monkeypatch) -> None:
    overrides = ["bench=drag_ablation", f"out={tmp_path}", "bench.num_scenarios=2", "bench.num_seeds=2",
                 "bench.variants=[full,without ADSR,without context,I 0,I 2]", "drag.iterations=1",
                 "model.clip.height=32", "model.clip.width=32", "bench.world.min_size=0.4",
                 "bench.world.max_size=0.5", "bench.world.max_sprites=1"]  # fmt: skip
    assert main(compose_config("eval", [*tiny_weights.overrides, *overrides])) == 0
    claims = json.loads((tmp_path / "claims.json").read_text())
    assert [claim["row"] for claim in claims] == list(range(1, 21))
    by_claim = {claim["claim"]: claim for claim in claims}
    measured = by_claim["ADSR: without it objects do not arrive"]
    assert measured["verdict"] in ("holds", "does not hold", "within noise") and len(measured["interval"]) == 1
    assert by_claim["CSS improves the drag"]["verdict"] == "not measured"
    assert len(by_claim["Two iterations already drag"]["interval"]) == 3
    assert by_claim["Without L_cst the object follows as well"]["verdict"] == "not measured"
    assert "| ADSR: without it objects do not arrive |" in (tmp_path / "claims.md").read_text()
    per_clip = json.loads((tmp_path / "per_clip.json").read_text())
    assert len(per_clip["full.objmc_px"]) == 2  # a scenario's mean over the seeds
    seeds = [json.loads((tmp_path / f"seed_{n}.json").read_text())["verdicts"]["full"] for n in (0, 1)]
    means = [np.mean([one[n]["objmc_px"] for one in seeds]) for n in (0, 1)]
    assert per_clip["full.objmc_px"] == pytest.approx(means)
    assert json.loads((tmp_path / "metrics.json").read_text())["I 0.background_psnr_db"] == 100.0

    monkeypatch.setattr("eval.benchmarks.drag.DragBenchmark.stream", None)  # finished seeds are not dragged again
    assert main(compose_config("eval", [*tiny_weights.overrides, *overrides])) == 0
    assert json.loads((tmp_path / "per_clip.json").read_text()) == per_clip
    with pytest.raises(TypeError):
        main(compose_config("eval", [*tiny_weights.overrides, *overrides, "drag.lr=0.3"]))
    names = json.loads((tmp_path / "seed_0.json").read_text())["made_with"]["figures"]
    assert names == list(Verdict.__dataclass_fields__)  # a seed without a figure of today is dragged again
    trained = tmp_path / "trained"
    shutil.copytree(tiny_weights.folder / "student", trained)
    for kept in tmp_path.glob("seed_*.json"):
        kept.write_text(kept.read_text().replace(str(tiny_weights.folder / "student"), str(trained)))
    overrides += [f"model.student={trained}"]
    assert main(compose_config("eval", [*tiny_weights.overrides, *overrides])) == 0
    shutil.copytree(tiny_weights.folder / "teacher", trained, dirs_exist_ok=True)  # other weights in the same place
    with pytest.raises(TypeError):
        main(compose_config("eval", [*tiny_weights.overrides, *overrides]))


def test_a_variant_that_is_the_setting_itself_decides_no_difference() -> None:
    """Else a claim would be told by a difference of exactly nothing."""
    assert same_as_full(baseline_settings("paper"), list(VARIANTS)) == ["Ln 9"]
    ours = replace(baseline_settings("marionette"), iterations=4)
    same = same_as_full(ours, list(VARIANTS))
    assert "with tracks" in same
    claim = next(claim for claim in CLAIMS if ("with tracks", "objmc_px") in claim.better)
    found = DragAblation(DragAblationConfig()).finding(1, claim, {name: [] for name in VARIANTS}, 0, same)
    assert found.verdict == "not measured" and "`drag` is itself with tracks" in found.why_absent


def test_drag_settings_without_effect_are_told(tiny_weights, tmp_path: Path, caplog, monkeypatch) -> None:
    monkeypatch.setattr(DragBenchmark, "scenarios", lambda *given: pytest.fail("told first"))
    with pytest.raises(pytest.fail.Exception):
        main(compose_config("eval", [*tiny_weights.overrides, "bench=drag", f"out={tmp_path}", "drag.lr=0.5"]))
    assert "drag.lr has no effect with drag.iterations=0" in caplog.text


def test_neighbours_are_counted_from_before_the_drag(tiny_weights, tmp_path: Path, monkeypatch) -> None:
    """As many as the setting asks for, before the very first dragged chunk of an edit and of an animation."""
    seen: list[tuple[str, int]] = []
    edited = DragEditor._edited

    def noting(editor: DragEditor, *args) -> torch.Tensor:
        seen.append((editor.drag.mode, editor.neighbours.shape[2]))
        return edited(editor, *args)

    monkeypatch.setattr(DragEditor, "_edited", noting)
    model_cfg = replace(tiny_weights.model_cfg, clip=replace(tiny_weights.model_cfg.clip, height=32, width=32))
    codecs = Codecs.load(model_cfg)
    context = EvalContext(model_cfg, codecs, torch.device("cpu"), 0, tmp_path, baseline_settings("paper"))
    world = SpritesConfig(max_sprites=2, min_size=0.36, max_size=0.42)
    bench = DragBenchmark(DragBenchConfig(num_scenarios=7, baselines=[], world=world, opening_chunks=7))
    scenarios = bench.scenarios(context)
    settings = {str(count): replace(context.drag, iterations=1, adsr_frames=count) for count in (9, 18)}
    list(bench.stream(context, context.load("student"), [scenarios[0], scenarios[6]], settings))
    assert set(seen) == {(mode, count) for mode in ("edit", "animate") for count in (9, 18)}


def test_a_profile_that_optimises_nothing_has_nothing_to_ablate(tiny_weights, tmp_path: Path) -> None:
    overrides = [*tiny_weights.overrides, "bench=drag_ablation", f"out={tmp_path}"]
    with pytest.raises(ValueError, match="drag.iterations=0 leaves nothing to ablate; use drag=paper"):
        main(compose_config("eval", overrides))


def test_a_scenario_counts_once_however_many_seeds_drag_it() -> None:
    def verdicts(*objmc: float) -> list[Verdict]:
        figures = dict.fromkeys(Verdict.__dataclass_fields__, 1.0)
        return [Verdict(**figures | {"objmc_px": value}) for value in objmc]

    merged = over_seeds([verdicts(1.0, float("nan")), verdicts(3.0, 5.0)])
    assert [verdict.objmc_px for verdict in merged] == [2.0, 5.0] and merged[0].dai_rgb == 1.0
    bench, full, without = DragAblation(DragAblationConfig()), verdicts(1.0, 1.0, 1.0), verdicts(1.0, 2.0, 5.0)
    once, thrice = (
        bench.finding(1, CLAIMS[0], {"full": over_seeds([full] * n), "without ADSR": over_seeds([without] * n)}, seed=0)
        for n in (1, 3)
    )
    assert once.effects == thrice.effects and once.effects[0].interval.count == 3


def test_a_claim_holds_where_its_interval_lies_above_zero() -> None:
    def verdicts(objmc: float) -> list[Verdict]:
        noise = np.random.default_rng(0).normal(size=30)
        figures = dict.fromkeys(Verdict.__dataclass_fields__, 1.0)
        return [Verdict(**figures | {"objmc_px": objmc + 0.1 * x}) for x in noise]

    bench, claim = DragAblation(DragAblationConfig()), CLAIMS[0]
    for without, verdict in ((8.0, "holds"), (2.0, "does not hold"), (4.0, "within noise")):
        found = bench.finding(1, claim, {"full": verdicts(4.0), "without ADSR": verdicts(without)}, seed=0)
        assert found.verdict == verdict
    better = next(each for each in CLAIMS if each.better and each.better[0][0] == "with tracks")
    for with_tracks, verdict in ((2.0, "holds"), (8.0, "does not hold"), (4.0, "within noise")):
        found = bench.finding(1, better, {"full": verdicts(4.0), "with tracks": verdicts(with_tracks)}, seed=0)
        assert found.verdict == verdict
    robust = next(each for each in CLAIMS if each.claim == "Without L_cst the object follows as well")
    for no_drag, without, verdict in ((8.0, 4.5, "holds"), (8.0, 5.5, "does not hold"), (4.6, 4.5, "does not hold")):
        figures = {"I 0": verdicts(no_drag), "full": verdicts(4.0), "without L_cst": verdicts(without)}
        assert bench.finding(1, robust, figures, seed=0).verdict == verdict
