"""The claims table: verdicts, what is measured once and kept, rows that name observations that exist."""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from data.app import compose_config
from data.trackers import TrackerConfig
from eval.benchmarks.claim_rows import ROWS, RUNS
from eval.benchmarks.claims import (
    TIMED_REPEATS,
    Claims,
    ClaimsConfig,
    Effect,
    Finding,
    Observations,
    Run,
)
from eval.benchmarks.context import EvalContext
from eval.benchmarks.latency import Latency, LatencyConfig
from eval.benchmarks.motion_transfer import MotionTransferConfig
from eval.metrics.interval import Interval
from eval.results import Results
from eval.run import main
from models.motion.track_head import TrackHead
from stream.codecs import Codecs
from stream.session import StreamSession
from stream.session_state import ChunkTiming


def finding(*intervals: Interval) -> Finding:
    return Finding(1, "claim", "paper", [Effect("effect", interval) for interval in intervals])


@pytest.mark.parametrize(
    ("intervals", "verdict"),
    [
        ([(0.1, 0.3)], "holds"),
        ([(-0.1, 0.3)], "within noise"),
        ([(-0.3, -0.1)], "does not hold"),
        ([(0.1, 0.3), (-0.1, 0.3)], "within noise"),
        ([(0.1, 0.3), (-0.3, -0.1)], "does not hold"),
        ([], "not measured"),
    ],
)
def test_the_interval_decides(intervals, verdict):
    assert finding(*(Interval((a + b) / 2, a, b, 4) for a, b in intervals)).verdict == verdict


@pytest.mark.parametrize(("mean", "of_a_run"), [(0.2, "holds"), (-0.2, "does not hold"), (None, "within noise")])
def test_a_figure_of_a_whole_run_stands_for_itself_and_that_of_one_clip_decides_nothing(mean, of_a_run):
    interval = Interval(mean, None, None, 1)
    assert Finding(1, "claim", "paper", [Effect("effect", interval, is_figure=True)]).verdict == of_a_run
    assert finding(interval).verdict == "within noise"


def test_one_clip_of_many_trainings_decides_nothing(tmp_path):
    key = "teacher.epe_px"
    path = ablations(tmp_path / "a.json", key, mine={"0": [1.0, None], "1": [2.0, None]},
                     theirs={"0": [4.0, 4.0], "1": [4.0, 4.0]})  # fmt: skip
    effect = observations(tmp_path, ablations=path).less("", "mine", "theirs", key)
    assert effect.interval.mean == 2.5 and effect.bounds == (-math.inf, math.inf)


class Recorder(Observations):
    """Answers every question with the same numbers and remembers what was asked."""

    def __init__(self) -> None:
        self.asked: set[str] = set()
        self.runs = RUNS
        self.context = EvalContext(None, None, None, 0, Path())  # type: ignore[arg-type]

    def values(self, name, key, seeds=None):
        self.asked.add(name)
        return [1.0, 2.0, 3.0]

    def common_seeds(self, names):
        return [] if set(names) <= set(RUNS) else ["0", "1"]

    def figure(self, name, key):
        self.asked.add(name)
        return 1.0

    def track_encoding_seconds(self):
        return [1.0, 1.0], [40.0, 41.0]


def test_every_row_measures_something_and_no_number_is_used_twice():
    for row in ROWS:
        assert row.find(Recorder()).effects, row.number
    assert [row.number for row in ROWS] == sorted({row.number for row in ROWS})
    assert {row.number for row in ROWS} == set(range(1, 19))


def test_every_run_is_asked_for_and_valid(tiny_weights):
    recorder = Recorder()
    for row in ROWS:
        row.find(recorder)
    assert set(RUNS) <= recorder.asked
    for name, run in RUNS.items():
        if run.bench == "motion_transfer":
            MotionTransferConfig(**run.settings)
        else:
            assert run.bench == "latency" and not run.settings, name
        rollout = replace(tiny_weights.model_cfg.rollout, **run.rollout)
        assert rollout.num_steps == len(rollout.step_indices)


NO_CONTEXT = EvalContext(None, None, None, 0, Path())  # type: ignore[arg-type]


def observations(tmp_path: Path, context: EvalContext = NO_CONTEXT, **changes) -> Observations:
    settings = replace(ClaimsConfig(), **changes)
    return Observations(replace(context, out=tmp_path), settings, {"student": Run("latency")})


@pytest.fixture
def context(tiny_weights, tmp_path) -> EvalContext:
    """Of a copy of the tiny model, whose weights may be changed."""
    weights = {role: str(tmp_path / role) for role in ("teacher", "student")}
    for role, path in weights.items():
        shutil.copytree(tiny_weights.folder / role, path)
    model_cfg = replace(tiny_weights.model_cfg, **weights)
    return EvalContext(model_cfg, Codecs.load(model_cfg), torch.device("cpu"), 0, tmp_path)


@pytest.fixture
def made(monkeypatch) -> list[Run]:
    """The runs that were made, with figures of no model."""
    runs = []

    def run(self, together):
        runs.extend(together)
        results = Results(seed=0)
        results.add("student.epe_px", [1.0, math.nan])
        results.put("student.frames_per_second", 7.0)
        return [results for _ in together]

    monkeypatch.setattr(Observations, "_run", run)
    return runs


def test_a_run_is_made_once_and_again_only_where_its_settings_changed(context, made, tmp_path):
    first = observations(tmp_path, context)
    assert first.values("student", "student.epe_px")[0] == 1.0
    again = observations(tmp_path, context)
    assert math.isnan(again.values("student", "student.epe_px")[1])
    assert again.figure("student", "student.frames_per_second") == 7.0
    assert len(made) == 1
    no_matter = observations(tmp_path, context, rows=[2], num_workers=2)  # no figure depends on these
    no_matter.values("student", "student.epe_px")
    assert len(made) == 1
    observations(tmp_path, context, num_clips=8).values("student", "student.epe_px")
    assert len(made) == 2


def test_a_run_is_made_again_with_another_seed_decoder_device_or_content_of_the_weights(context, made, tmp_path):
    def runs_made(context: EvalContext) -> int:
        observations(tmp_path, context).values("student", "student.epe_px")
        return len(made)

    assert [runs_made(context) for _ in range(2)] == [1, 1]
    assert [runs_made(replace(context, seed=1)) for _ in range(2)] == [2, 2]
    tiny = context.codecs.under(context.model_cfg)
    tiny.decoder = tiny_vae = torch.nn.Identity()
    assert tiny_vae is not tiny.vae and runs_made(replace(context, codecs=tiny)) == 3
    assert runs_made(replace(context, device=torch.device("cuda"))) == 4
    runs_made(context)
    (weights,) = Path(context.model_cfg.student).glob("*.safetensors")
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    assert [runs_made(context) for _ in range(2)] == [6, 6]
    (weights,) = Path(context.model_cfg.teacher).glob("*.safetensors")
    weights.write_bytes(weights.read_bytes()[:-1])
    assert runs_made(context) == 6  # the latency of a student reads no teacher


def test_streams_are_timed_together_or_not_at_all(context, made, tmp_path):
    context = context.changed(tiny_vae="one")
    runs = {
        "clips": Run("motion_transfer"),
        "full": Run("latency"),
        "growing": Run("latency", rollout={"window_chunks": None}),
        "tiny": Run("latency", tiny=True),
    }

    def observed() -> Observations:
        return Observations(replace(context, out=tmp_path), ClaimsConfig(), runs)

    seen = observed()
    assert seen.figure("tiny", "student.frames_per_second") == 7.0
    assert made == [runs["full"], runs["tiny"]]
    seen.values("full", "student.epe_px")
    observed().values("full", "student.epe_px")
    assert len(made) == 2
    (tmp_path / "runs" / "tiny.json").unlink()
    observed().values("full", "student.epe_px")
    assert made[2:] == made[:2]
    for alone in ("clips", "growing"):
        observed().values(alone, "student.epe_px")
        assert made[-1] == runs[alone]
    assert len(made) == 6


def test_without_a_tiny_vae_the_other_streams_are_timed(context, made, tmp_path):
    assert context.model_cfg.tiny_vae is None
    runs = {"full": Run("latency"), "tiny": Run("latency", tiny=True)}
    seen = Observations(replace(context, out=tmp_path), ClaimsConfig(), runs)
    assert seen.figure("full", "student.frames_per_second") == 7.0 and made == [runs["full"]]
    absent = replace(ROWS[0], effects=lambda seen: [seen.less("", "tiny", "full", "student.epe_px")]).find(seen)
    assert absent.verdict == "not measured" and "tiny needs model.tiny_vae" in absent.why_absent


def test_timings_of_streams_are_of_chunks_in_turn(context, tmp_path, monkeypatch):
    order = []
    make = StreamSession.next_chunk
    monkeypatch.setattr(StreamSession, "next_chunk", lambda self: order.append(id(self)) or make(self))
    runs = {"merged": Run("latency", rollout={"merged_cache": True}), "own_pass": Run("latency")}
    seen = Observations(replace(context, out=tmp_path), ClaimsConfig(num_chunks=50), runs)
    assert len(seen.values("merged", "student.chunk_seconds")) == len(seen.values("own_pass", "student.chunk_seconds"))
    assert order[:10] == order[:1] * 10  # the control, until it is set back each time
    assert order[10:] == [order[10], order[11], order[0]] * 50 and len({*order}) == 3
    assert "student.peak_resident_mib" not in seen.figures["merged"]  # that of both would be neither's


@pytest.mark.parametrize(("machine_slows", "grown"), [(True, 1.0), (False, 1.3)])
def test_what_row_7_says_of_growth_is_beyond_the_control_stream(context, machine_slows, grown):
    """Chunks of 1.3 times the seconds in the second half; the control's are too, or are not."""
    seconds = [1.0] * 40 + [1.3] * 40
    results = Results(seed=0)
    timings = [ChunkTiming(number, 12, 0.0, each, 0.0) for number, each in enumerate(seconds)]
    Latency(LatencyConfig(num_chunks=80))._put_times(results, timings, seconds if machine_slows else [1.0] * 80, 0.0)
    seen = Observations(context, ClaimsConfig(), RUNS)
    for name in ("latency", "latency_growing"):
        seen.made[name], seen.figures[name] = results.per_clip, results.values
    (row,) = (row for row in ROWS if row.number == 7)
    _, growth = row.effects(seen)
    assert growth.interval.mean == pytest.approx(1.05 - grown)


def test_figures_of_another_commit_are_kept_and_said_to_be(context, made, tmp_path, monkeypatch, caplog):
    for commit, warned in (("aaa", False), ("aaa", False), ("bbb", True)):
        monkeypatch.setattr("eval.results.git_commit", lambda commit=commit: commit)
        observations(tmp_path, context).values("student", "student.epe_px")
        assert ("student.json: figures of commit aaa are kept" in caplog.text) == warned
    assert len(made) == 1


def test_timings_of_another_machine_are_made_again(context, made, tmp_path, monkeypatch):
    observations(tmp_path, context).values("student", "student.epe_px")
    monkeypatch.setattr("stream.provenance._processor", lambda: "another processor")
    observations(tmp_path, context).values("student", "student.epe_px")
    assert len(made) == 2


def test_steps_are_taken_at_the_same_noise_on_any_grid(context, tmp_path):
    fine = context.changed(rollout=replace(context.model_cfg.rollout, num_inference_steps=50, step_indices=[0, 16, 32]))
    for wide, four in ((context, [0, 6, 12, 18]), (fine, [0, 12, 24, 36])):
        wide = wide if wide is fine else context.changed(
            rollout=replace(context.model_cfg.rollout, num_inference_steps=25, step_indices=[0, 8, 16]))  # fmt: skip
        changed = observations(tmp_path, wide)._context_of(RUNS["steps_4"]).model_cfg.rollout
        assert changed.step_indices == four


def test_the_tiny_decoder_is_not_compared_with_itself(context):
    context.codecs.decoder = object()  # type: ignore[assignment]
    with pytest.raises(ValueError, match="decoder=tiny, but row 9 compares"):
        Claims(ClaimsConfig()).run(context)


def test_a_stored_run_that_does_not_say_what_it_was_made_with_is_made_again(context, made, tmp_path):
    observations(tmp_path, context).values("student", "student.epe_px")
    path = tmp_path / "runs" / "student.json"
    kept = json.loads(path.read_text())
    kept["made_with"] = {key: kept["made_with"][key] for key in ("run", "claims", "model")}
    path.write_text(json.dumps(kept))
    observations(tmp_path, context).values("student", "student.epe_px")
    assert len(made) == 2


def ablations(path: Path, key: str, **names: dict[str, list]) -> str:
    """A file of ablations: values by name and seed."""
    stored = {
        name: {"seeds": {seed: {"per_clip": {key: values}} for seed, values in seeds.items()}}
        for name, seeds in names.items()
    }
    path.write_text(json.dumps(stored))
    return str(path)


def test_a_file_that_holds_no_ablations_is_named(tmp_path):
    (tmp_path / "a.json").write_text('{"base_student": {')
    with pytest.raises(
        ValueError, match=r"^bench.ablations=\S+/a.json is not what `python -m train.ablations` writes: "
    ):
        observations(tmp_path, ablations=str(tmp_path / "a.json"))


def test_ablations_are_compared_over_the_seeds_that_all_of_them_have(tmp_path):
    key, mine = "teacher.epe_px", {"0": [1.0, None, None], "1": [3.0, 4.0, None], "2": [8.0, 4.0, None]}
    path = ablations(tmp_path / "a.json", key, mine=mine, theirs={"0": [5.0] * 3, "1": [7.0] * 3},
                     first={"0": [2.0] * 3}, third={"3": [2.0] * 3})  # fmt: skip
    seen = observations(tmp_path, ablations=path)
    assert seen.values("mine", key)[:2] == [4.0, 4.0] and math.isnan(seen.values("mine", key)[2])
    effect = seen.less("", "mine", "theirs", key)  # 4 px of the first clip in both seeds, 3 px of the second in one
    assert effect.num_trainings == 2 and effect.interval.count == 2  # clips, not clips times seeds
    assert effect.interval.mean == 3.5 and effect.bounds[0] >= 3.0
    row = replace(ROWS[0], effects=lambda seen: [seen.less("", "theirs", "third", key)])
    assert row.find(seen).why_absent.endswith(
        "theirs has 0, 1; third has 3; make them with `python -m train.ablations --seeds 0 1 3`"
    )


def test_one_training_decides_nothing_and_trainings_that_disagree_do_not_either(tmp_path):
    key, clips = "teacher.epe_px", [4.0] * 50
    path = ablations(tmp_path / "a.json", key, zero={"0": [0.0] * 50, "1": [0.0] * 50}, one={"0": clips},
                     agree={"0": clips, "1": clips}, disagree={"0": clips, "1": [-1.0] * 50})  # fmt: skip
    seen = observations(tmp_path, ablations=path)
    row = replace(ROWS[0], effects=lambda seen: [seen.more("", "one", "zero", key)])
    alone = row.find(seen)
    assert alone.verdict == "within noise" and "(one training each)" in alone.to_json()["ours"]
    assert alone.to_json()["interval"] == [[None, None]]
    verdicts = [replace(row, effects=lambda seen, name=name: [seen.more("", name, "zero", key)]).find(seen).verdict
                for name in ("agree", "disagree")]  # fmt: skip
    assert verdicts == ["holds", "within noise"]


def test_timings_of_all_seeds_stand_in_turn(tmp_path):
    key = "student.seconds_per_frame"
    path = ablations(tmp_path / "a.json", key, fast={"0": [1.0, 2.0], "1": [3.0]})
    assert observations(tmp_path, ablations=path).values("fast", key) == [1.0, 2.0, 3.0]


def test_absent_ablations_are_said(tmp_path):
    seen = observations(tmp_path, ablations=ablations(tmp_path / "a.json", "teacher.epe_px", mine={"0": [1.0]}))
    row = replace(ROWS[0], effects=lambda seen: [seen.less("", "mine", "other", "teacher.epe_px")])
    absent = row.find(seen)
    assert absent.verdict == "not measured" and "train.ablations" in absent.to_json()["ours"]


def test_claims_of_a_tiny_model(tiny_weights, tmp_path):
    small = [
        "bench=claims", "bench.rows=[11,14]", "bench.num_clips=2", "bench.ablations=none.json", "bench.features=null",
        "bench.tracker.rows=4", "bench.tracker.cols=4", "bench.num_workers=0", f"out={tmp_path}",
    ]  # fmt: skip
    assert main(compose_config("eval", [*tiny_weights.overrides, *small])) == 0
    lines = json.loads((tmp_path / "claims.json").read_text())
    assert [line["row"] for line in lines] == [11, 14]
    assert set(lines[1]) == {"row", "claim", "paper", "ours", "interval", "verdict"}
    assert lines[0]["verdict"] == "not measured" and lines[1]["verdict"] != "not measured"
    assert (tmp_path / "runs/student.json").is_file()


def test_tracks_are_encoded_where_and_as_the_model_is_and_timed_by_the_clock_of_its_device(context, monkeypatch):
    model_cfg = replace(context.model_cfg, dtype="bfloat16")
    codecs = Codecs.load(model_cfg)
    seen, ticks = {}, iter(range(10**6))
    forward = TrackHead.forward

    def by_head(head, track_map):
        seen["dtypes"] = (head.compress.weight.dtype, track_map.dtype)
        return forward(head, track_map)

    monkeypatch.setattr(TrackHead, "forward", by_head)
    monkeypatch.setattr(codecs, "clock", lambda: float(next(ticks)))
    observed = observations(context.out, replace(context, model_cfg=model_cfg, codecs=codecs),
                            tracker=TrackerConfig(rows=4, cols=4))  # fmt: skip
    assert observed.track_encoding_seconds() == ([1.0] * TIMED_REPEATS,) * 2
    assert seen["dtypes"] == (torch.bfloat16, torch.bfloat16)


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"num_chunks": 40}, "bench.num_chunks=40 must be at least"), ({"num_workers": -1}, "bench.num_workers=-1"),
     ({"batch_size": 0}, "bench.batch_size=0 must be at least 1")],
)  # fmt: skip
def test_what_a_run_would_refuse_is_refused_before_the_first(settings: dict, message: str):
    with pytest.raises(ValueError, match=message):
        ClaimsConfig(**settings)


def test_an_unknown_row_is_refused():
    with pytest.raises(ValueError, match=r"bench.rows=\[99\] has 99; rows are"):
        Claims(ClaimsConfig(rows=[99]))
