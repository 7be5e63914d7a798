from __future__ import annotations

import json
import signal
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from data.app import build_config, claim, compose_config
from data.config_errors import ConfigError
from data.sprites import SpritesConfig, render_clip
from data.trackers import TrackerConfig
from data.video import write_video
from eval.benchmarks.context import EvalContext, progress_bar
from eval.benchmarks.latency import Latency, LatencyConfig, growth
from eval.benchmarks.long_video import LongVideo, LongVideoConfig, _course
from eval.benchmarks.motion_transfer import MotionTransferConfig
from eval.clips import sprites_clips
from eval.judge import Judge, still_error, worker_pool, workers_for
from eval.metrics.image import frame_psnr
from eval.metrics.registration import RegistrationConfig
from eval.metrics.sprites_network import SpritesNetwork, SpritesNetworkConfig
from eval.roles import SamplingConfig, generate
from eval.run import EvalConfig, main
from models.assemble import load_for_inference
from models.device import DTYPES
from models.diffusion.noise import KeyedNoise
from stream.codecs import Codecs
from stream.session_state import ChunkTiming
from stream.track_source import query_grid

QUICK = [
    "bench.num_clips=3",
    "bench.tracker.rows=4",
    "bench.tracker.cols=4",
    "bench.num_shown=1",
    "bench.num_workers=0",
]


def _run(tiny_weights, out: Path, *overrides: str) -> dict[str, float]:
    assert main(compose_config("eval", [f"out={out}", *tiny_weights.overrides, *overrides])) == 0
    return json.loads((out / "metrics.json").read_text())


@pytest.fixture(scope="module")
def clips(tiny_weights):
    cfg, queries = tiny_weights.model_cfg, query_grid(tiny_weights.model_cfg, TrackerConfig())
    return sprites_clips(SpritesConfig(), cfg.clip, num_clips=3, split="test", queries=queries, noise=KeyedNoise(0))


def test_motion_transfer_writes_every_figure(tiny_weights, tmp_path: Path, capsys) -> None:
    metrics = _run(tiny_weights, tmp_path, "bench=motion_transfer", "bench.num_inference_steps=2", *QUICK)
    for name in (
        "noise_floor",
        "noise_floor_vae",
        "teacher",
        "teacher_withheld",
        "student",
        "student_withheld",
    ):
        for metric in ("epe_px", "epe_unoccluded_px", "epe_median_px", "pck_4px_ratio"):
            key = f"{name}.{metric}"
            assert metrics[f"{key}_low"] <= metrics[key] <= metrics[f"{key}_high"]
    for role in ("teacher", "student"):
        assert metrics[f"{role}.lpips"].startswith("unavailable")
        gain = metrics[f"{role}_withheld.epe_px"] - metrics[f"{role}.epe_px"]
        assert metrics[f"{role}.epe_gain_from_tracks_px"] == pytest.approx(gain)
        assert gain != 0 and metrics[f"{role}.frames_per_second"] > 0
        assert 0 < metrics[f"{role}.psnr_db"] < 50 and -1 <= metrics[f"{role}.ssim"] <= 1
    assert metrics["latent_cell_px"] == 4 and metrics["num_clips"] == 3
    assert metrics["noise_floor.epe_px"] < metrics["student.epe_px"]
    meta = json.loads((tmp_path / "meta.json").read_text())
    assert meta["config"]["bench"]["num_inference_steps"] == 2 and meta["machine"]["torch"]
    assert meta["machine"]["auto_dtype"] in DTYPES
    report = (tmp_path / "report.html").read_text()
    assert report.count("<video") == 1 and "plain CFG scale 4.5" in report
    assert "epe_gain_from_tracks_px" in capsys.readouterr().out


def test_a_run_is_reproducible_and_a_guidance_is_obeyed(tiny_weights, tmp_path: Path) -> None:
    common = ["bench.num_inference_steps=2", "bench.roles=[teacher]", "bench.withhold_tracks=false", *QUICK]
    first, again = (_run(tiny_weights, tmp_path / name, *common) for name in ("a", "b"))
    assert first["teacher.epe_px"] == again["teacher.epe_px"] and first["teacher.ssim"] == again["teacher.ssim"]
    plain = _run(tiny_weights, tmp_path / "c", "model.guidance.text=0", *common)
    assert plain["teacher.ssim"] != first["teacher.ssim"]
    assert "student.epe_px" not in first and "teacher_withheld.epe_px" not in first


def test_a_folder_of_real_videos(tiny_weights, tmp_path: Path) -> None:
    source = tmp_path / "videos"
    for seed in range(2):
        write_video(source / f"{seed}.mp4", render_clip(SpritesConfig(num_frames=40), seed).frames, 16)
    (source / "0.txt").write_text("a red disc\n")
    (source / "broken.mp4").write_bytes(b"no video")
    overrides = [f"bench.source={source}", "bench.roles=[student]", *QUICK]
    metrics = _run(tiny_weights, tmp_path / "out", *overrides)
    assert metrics["num_clips"] == 2 and "student.registration_position_px" not in metrics
    assert "noise_floor.epe_px" not in metrics, "the ground truth is this tracker's own output"
    assert metrics["noise_floor_vae.epe_px"] > 0
    meta = json.loads((tmp_path / "out" / "meta.json").read_text())
    assert meta["clips"] == ["0", "1"]
    (source / "1.txt").write_text("an unheard-of word\n")
    alone = _run(tiny_weights, tmp_path / "alone", *overrides, "bench.whole_video=true")
    assert alone["num_clips"] == 1 and alone["student.epe_px"] != metrics["student.epe_px"]
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="no usable video"):
        _run(tiny_weights, tmp_path / "out", *overrides, f"bench.source={tmp_path / 'empty'}")


def test_the_batch_size_does_not_matter(tiny_weights, clips) -> None:
    codecs = Codecs.load(tiny_weights.model_cfg)
    for role in ("student", "teacher"):
        dit = load_for_inference(tiny_weights.model_cfg, role, "cpu")
        one, many = (
            list(generate(role, dit, codecs, clips, SamplingConfig(2), with_tracks=True, noise=KeyedNoise(0),
                          batch_size=size))
            for size in (1, 3)
        )  # fmt: skip
        assert [len(batch.clips) for batch in one] == [1, 1, 1] and many[0].frames.shape == (3, 33, 16, 16, 3)
        frames = np.concatenate([batch.frames for batch in one])
        assert np.abs(frames.astype(int) - many[0].frames.astype(int)).max() <= 1


def test_the_judge_prefers_the_truth(clips) -> None:
    judge = Judge(clips, TrackerConfig(), RegistrationConfig(), "unavailable: test")
    truth = judge.judge([clip.frames for clip in clips])
    backwards = judge.judge([clip.frames[::-1].copy() for clip in clips])
    assert truth.endpoint.mean_px < backwards.endpoint.mean_px
    assert min(truth.psnr_db) == 100 and max(backwards.psnr_db) < 40
    assert still_error(clips).mean_px > 0.5


def test_the_judge_takes_videos_as_they_come(clips) -> None:
    """A clip of Wan takes 97 MB: those of a run need not exist at once."""
    judge, made, judged = Judge(clips, TrackerConfig(), RegistrationConfig(), "unavailable: test"), [], []

    def videos():
        for clip in clips:
            made.append(len(judged))
            yield clip.frames

    judge.judge(videos(), judged.append)
    assert made == [0, 1, 2]


@pytest.mark.parametrize(("source", "layers"), [("sprites", 3), (".", 0)])
def test_rigid_layers_are_for_sprites(source, layers) -> None:
    """On real video, which does not move rigidly, they gave a third of the true tracks an error of more than 2 px."""
    given = TrackerConfig(max_layers=None)
    assert MotionTransferConfig(source=source, tracker=given).tracker.max_layers == layers
    assert MotionTransferConfig(source=source, tracker=TrackerConfig(max_layers=2)).tracker.max_layers == 2


@pytest.mark.parametrize(
    ("num_workers", "num_clips", "tracker", "processes"),
    [(None, 100, "lucas_kanade", 8), (None, 3, "lucas_kanade", 3), (None, 1, "lucas_kanade", 0),
     (None, 100, "cotracker3", 0), (0, 100, "lucas_kanade", 0), (2, 100, "lucas_kanade", 2)],
)  # fmt: skip
def test_every_core_judges_unless_the_tracker_uses_them_by_itself(
    monkeypatch, num_workers, num_clips, tracker, processes
) -> None:
    monkeypatch.setattr("eval.judge.usable_cores", lambda: 8)
    assert workers_for(num_workers, num_clips, TrackerConfig(name=tracker)) == processes


def test_long_video_follows_error_and_drift(tiny_weights, tmp_path: Path) -> None:
    common = [
        "bench=long_video",
        "bench.num_frames=30",
        "bench.window_frames=15",
        *QUICK[1:],
        "bench.num_clips=2",
    ]
    metrics = _run(tiny_weights, tmp_path / "a", "bench.requery_frames=13", *common)
    for key in (
        "epe_px",
        "epe_frames_0_to_14_px",
        "epe_frames_15_to_29_px",
        "saturation_drift",
        "latent_std_drift",
    ):
        assert metrics[f"student.{key}"] > 0
    assert metrics["noise_floor.saturation_drift"] < metrics["student.saturation_drift"] + 1
    assert (tmp_path / "a" / "report.html").read_text().count("<img") == 4
    shared = ["bench.num_workers=1", "bench.num_floor_clips=1"]
    again = _run(tiny_weights, tmp_path / "b", "bench.requery_frames=13", *common, *shared)
    assert again["student.epe_px"] == metrics["student.epe_px"]
    per_clip = json.loads((tmp_path / "b" / "per_clip.json").read_text())
    assert {name: len(per_clip[f"{name}.saturation_drift"]) for name in ("student", "noise_floor")} == {
        "student": 2, "noise_floor": 1,
    }  # fmt: skip
    assert len(json.loads((tmp_path / "b" / "meta.json").read_text())["clips"]) == 2
    once = _run(tiny_weights, tmp_path / "c", "bench.requery_frames=0", *common)
    assert once["student.epe_px"] != metrics["student.epe_px"]


def test_long_video_compares_each_frame_with_the_ground_truth(tiny_weights, tmp_path: Path, monkeypatch) -> None:
    streamed = []
    stream = LongVideo._stream

    def watched(self, context, student, clip, *others):
        frames, latents = stream(self, context, student, clip, *others)
        streamed.append((torch.from_numpy(frames[:30]), torch.from_numpy(clip.frames[:30])))
        return frames, latents

    monkeypatch.setattr(LongVideo, "_stream", watched)
    network = SpritesNetwork.from_config(SpritesNetworkConfig([8, 8, 8], [8, 8], 8))
    network.save(tmp_path / "features")
    size = ["model.clip.height=32", "model.clip.width=32"]  # the least that the network reads
    settings = ["bench.num_frames=30", "bench.window_frames=15", "bench.num_clips=2", "bench.requery_frames=0", *size]
    features = f"bench.features={tmp_path / 'features'}"
    metrics = _run(tiny_weights, tmp_path / "out", "bench=long_video", features, *settings, *QUICK[1:])
    per_clip = json.loads((tmp_path / "out" / "per_clip.json").read_text())
    for metric, unit, measure in (("psnr", "_db", frame_psnr), ("lpips_sprites", "", network.frame_distances)):
        expected = torch.stack([measure(*pair) for pair in streamed])  # of frames 1 to 29
        for key, span in (("", slice(29)), ("_frames_0_to_14", slice(14)), ("_frames_15_to_29", slice(14, 29))):
            assert per_clip[f"student.{metric}{key}{unit}"] == pytest.approx(expected[:, span].mean(1).tolist())
    assert metrics["student.lpips"].startswith("unavailable") and "noise_floor.psnr_db" not in metrics
    report = (tmp_path / "out" / "report.html").read_text()
    assert report.count("<img") == 5 and "lpips: unavailable" in report


def test_segments_cover_every_frame_once() -> None:
    for num_frames, requery in ((40, 13), (40, 0), (41, 20), (42, 20), (5, 48)):
        spans = LongVideoConfig(num_frames=num_frames, requery_frames=requery).segments()
        assert [t for span in spans for t in range(span.start, span.stop)] == list(range(num_frames))
        assert min(span.stop - span.start for span in spans) >= 2


def test_a_stride_leaves_frames_out_of_the_error_and_of_nothing_else(clips) -> None:
    clip, T = clips[0], clips[0].tracks.num_frames
    whole, every_third = (
        _course(LongVideoConfig(num_frames=T, requery_frames=0, frame_stride=stride), [clip.tracks], clip.frames)
        for stride in (1, 3)
    )
    assert whole.error_px.isfinite().nonzero().flatten().tolist() == list(range(1, T))
    assert every_third.error_px.isfinite().nonzero().flatten().tolist() == list(range(3, T, 3))
    assert torch.equal(whole.saturation, every_third.saturation)


def test_strides_that_leave_a_grid_without_a_judged_frame_are_refused() -> None:
    LongVideoConfig(num_frames=40, requery_frames=13, frame_stride=12)
    with pytest.raises(ValueError, match=r"bench.frame_stride=13 must be below 13"):
        LongVideoConfig(num_frames=39, requery_frames=13, frame_stride=13)
    with pytest.raises(ValueError, match=r"bench.frame_stride=0 must be at least 1"):
        LongVideoConfig(frame_stride=0)


def test_latency_of_a_growing_window(tiny_weights, tmp_path: Path) -> None:
    metrics = _run(tiny_weights, tmp_path, "bench=latency", "bench.num_chunks=50", "model.rollout.window_chunks=null")
    assert metrics["num_chunks"] == 50


def test_the_peak_of_memory_is_that_of_the_stream_alone(tiny_weights, monkeypatch, tmp_path: Path) -> None:
    called: list[str] = []
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: called.append("reset"))
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: called.append("read") or 5 << 20)
    monkeypatch.setattr("eval.benchmarks.latency.used_memory", lambda device: 1 << 20)
    codecs = Codecs.load(tiny_weights.model_cfg)
    context = EvalContext(tiny_weights.model_cfg, codecs, torch.device("cuda"), 0, tmp_path)
    student = load_for_inference(tiny_weights.model_cfg, "student", "cpu")
    monkeypatch.setattr(EvalContext, "load", lambda self, role: called.append("load") or student)
    results = Latency(LatencyConfig(num_chunks=50)).run(context).results
    assert called == ["reset", "load", "read"] and results.values["student.peak_device_mib"] == 5


@pytest.mark.parametrize(
    ("merged", "passes"),
    [("true", "3 denoising passes, the last of which is cached"), ("false", "3 denoising passes and one cache pass")],
)
def test_latency_says_how_many_passes_a_chunk_takes(tiny_weights, tmp_path: Path, merged, passes) -> None:
    _run(tiny_weights, tmp_path, "bench=latency", "bench.num_chunks=50", f"model.rollout.merged_cache={merged}")
    assert f"{passes}, on " in (tmp_path / "report.html").read_text()


def test_latency_reports_and_its_ratio_sees_growth(tiny_weights, tmp_path: Path) -> None:
    metrics = _run(tiny_weights, tmp_path, "bench=latency", "bench.num_chunks=52")
    assert metrics["student.chunk_seconds_p50"] <= metrics["student.chunk_seconds_p95"]
    assert metrics["student.frames_per_second_without_decoding"] > metrics["student.frames_per_second"] > 0
    assert 0.2 < metrics["student.chunk_52_over_chunk_20"] < 5
    assert {"student.first_frame_seconds", "student.peak_resident_mib", "student.resident_growth_mib"} <= set(metrics)
    timings = [ChunkTiming(i, 12, 0.0, 0.1 + 0.001 * i, 0.0) for i in range(401)]
    assert growth(timings, [1.0] * 401) == pytest.approx(0.4905 / 0.1195, rel=0.01)
    slower = [timing.total_seconds for timing in timings]  # not the stream, but the machine
    assert growth(timings, slower) == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["bench=latency", "bench.num_chunks=5"], "^bench.num_chunks=5 must be at least 50"),
        (["bench=latency", "bench.warmup_chunks=-1"], "^bench.warmup_chunks=-1 must be in"),
        (["bench.roles=[critic]"], "^bench.roles=.*critic"),
        (["bench.num_inference_steps=0"], "^bench.num_inference_steps=0"),
        (["bench.release_frame=0"], "^bench.release_frame=0"),
        (["bench.release_frame=33"], "^bench.release_frame=33 must be less than model.clip.num_frames=33"),
        (["bench.roles=[]"], r"^bench.roles=\[\] judges nothing"),
        (["bench.num_shown=-1"], "^bench.num_shown=-1 must be at least 0"),
        (["bench.num_clips=0"], "^bench.num_clips=0"),
        (["bench.batch_size=0"], "^bench.batch_size=0"),
        (["bench.num_floor_clips=0"], "^bench.num_floor_clips=0 must be at least 1"),
        (["bench.source=/nowhere"], "^bench.source=/nowhere must be sprites, or a folder that exists"),
        (["bench.num_workers=-1"], "^bench.num_workers=-1 must be at least 0"),
        (["bench=long_video", "bench.num_workers=-1"], "^bench.num_workers=-1 must be at least 0"),
        (["bench=claims", "bench.num_workers=-1"], "^bench.num_workers=-1 must be at least 0"),
        (["bench=long_video", "bench.requery_frames=1"], "^bench.requery_frames=1"),
        (["bench=long_video", "bench.num_floor_clips=0"], "^bench.num_floor_clips=0"),
        (["bench=long_video", "bench.num_frames=1"], "^bench.num_frames=1"),
        (["bench=drag", "bench.num_scenarios=0"], "^bench.num_scenarios=0, bench.tracks_per_side"),
        (["bench=drag_ablation", "bench.num_seeds=0"], "bench.num_seeds=0 must be at least 1"),
        (["device=gpu"], "^device=gpu must be auto, cpu or cuda"),
        (["model.teacher=null"], "model.teacher is not set"),
        (["model.dit.ffn_dim=64"], "ffn_dim"),
        (["decoder=huge"], "decoder=huge must be full or tiny"),
        (["bench.tracker.name=exact"], "tracker.name=exact reads the scene, not the video"),
        (["bench=long_video", "bench.tracker.name=exact"], "tracker.name=exact reads the scene, not the video"),
        (["bench.lpips_weights=/nowhere"], "/nowhere holds no alexnet.* and no alex.pth; put"),
        (["bench.tracker.name=cotracker3"], "cotracker3 has no weights"),
    ],
)  # fmt: skip
def test_wrong_settings_say_what_is_wanted(tiny_weights, tmp_path: Path, overrides, message) -> None:
    quick = [] if any(override.startswith("bench=") for override in overrides) else QUICK[:1]
    with pytest.raises((ValueError, ImportError, FileNotFoundError), match=message):
        _run(tiny_weights, tmp_path, *quick, *overrides)


def test_an_out_below_a_file_is_refused_before_any_work(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    nothing = ["model=tiny", "model.vae.path=/nowhere"]  # would be refused next
    with pytest.raises(ConfigError, match=r"out=\S+/file/x: \S+/file is a file where a folder is needed"):
        _run(SimpleNamespace(overrides=nothing), tmp_path / "file" / "x")


def test_an_out_that_another_run_writes_to_is_refused(tiny_weights, tmp_path: Path) -> None:
    """Else figures of one and the configuration of the other would stand side by side."""
    with claim(tmp_path, "out"), pytest.raises(ValueError, match=rf"^out={tmp_path} is being written by process \d+"):
        _run(tiny_weights, tmp_path, *QUICK)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [(["bench.lpips_weights=/nowhere"], "/nowhere holds no alexnet"),
     (["bench.features=/nowhere"], "no sprites network in /nowhere")],
)  # fmt: skip
def test_weights_of_metrics_are_looked_for_before_any_clip_is_tracked(
    tiny_weights, tmp_path: Path, monkeypatch, overrides, message
) -> None:
    monkeypatch.setattr("eval.benchmarks.motion_transfer.load_clips", lambda *given: pytest.fail("too late"))
    with pytest.raises(FileNotFoundError, match=message):
        _run(tiny_weights, tmp_path, *overrides)


@pytest.mark.parametrize(
    ("bench", "work"),
    [("motion_transfer", "motion_transfer.load_clips"), ("long_video", "long_video.LongVideo._clips"),
     ("drag", "drag.DragBenchmark.scenarios")],
)  # fmt: skip
def test_frames_that_the_sprites_network_cannot_read_are_refused_before_any_is_made(
    tiny_weights, tmp_path: Path, monkeypatch, bench, work
) -> None:
    monkeypatch.setattr(f"eval.benchmarks.{work}", lambda *given: pytest.fail("too late"))
    SpritesNetwork.from_config().save(tmp_path / "features")
    with pytest.raises(ValueError, match="^frames are 16 x 16 px; the sprites network takes .* at least 32 px"):
        _run(tiny_weights, tmp_path / "out", f"bench={bench}", f"bench.features={tmp_path / 'features'}")


def test_a_tracker_without_weights_is_refused_before_a_long_stream(tiny_weights, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("eval.benchmarks.long_video.LongVideo._stream", lambda *given: pytest.fail("too late"))
    with pytest.raises(ImportError, match="cotracker3 has no weights"):
        _run(tiny_weights, tmp_path, "bench=long_video", "bench.tracker.name=cotracker3")


def test_interrupted_judges_end_without_a_word() -> None:
    with worker_pool(1) as pool:
        assert pool.submit(signal.getsignal, signal.SIGINT).result() == signal.SIG_DFL


def test_tensors_go_to_a_judge_without_shared_memory() -> None:
    """A thread of the executor would copy them there, with threads that slow the caller down from then on."""
    with worker_pool(1) as pool:
        assert not pool.submit(torch.Tensor.is_shared, torch.ones(3)).result()
        assert list(pool.map(torch.Tensor.is_shared, [torch.ones(3), torch.zeros(2)])) == [False, False]


def test_unknown_fields_of_a_benchmark_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"no field 'bench.num_clip'"):
        compose_config("eval", ["bench.num_clip=4"])
    with pytest.raises(ConfigError, match="did you mean"):
        compose_config("eval", ["bench=latency", "bench.num_chunk=40"])
    settings = build_config(compose_config("eval", ["bench=latency"]), EvalConfig)
    assert settings.out == "outputs/eval/latency"


def test_progress_in_a_log_file_is_a_line_now_and_then(capsys, monkeypatch) -> None:
    monkeypatch.setattr("eval.benchmarks.context.LOG_INTERVAL", 0.0)
    with progress_bar(2, "drag", "stream") as bar:
        bar.update()
        bar.update()
    lines = capsys.readouterr().err.replace("\r", "").strip().splitlines()
    assert lines[0].startswith("drag: 0 of 2 streams after") and lines[-1].startswith("drag: 2 of 2 streams after")
