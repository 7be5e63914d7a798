"""Ablations of training on the zoo's world: models that differ in one thing each, over several seeds.

Every variant is a training run of the zoo's recipe with a few overrides and a fraction of its steps, from where the
zoo's runs arrived (`make zoo` keeps them), judged on held-out clips; the results go into one file
(models/zoo/sprites/ablations.json) that `python -m eval bench=claims` reads. Killed and started again, it goes on.
Left out: what the comparison means (eval/benchmarks/claim_rows.py).
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from eval.results import write_json
from train.pipeline import PROCESSES, ROOT, Step, run_all
from train.zoo import PARTS, ZOO

ZOO_STARTS = {  # runs of the zoo that variants start from -> what they export
    "zoo_stage1": "teacher/export/teacher",
    "zoo_teacher": PARTS["teacher"],
    "zoo_causal_init": "causal_init/export/student",
}
KEPT_METRICS = ("epe_px", "psnr_db", "registration_correlation", "registration_position_px", "seconds_per_frame",
                "chunk_seconds", "denoise_seconds")  # fmt: skip


@dataclass(frozen=True)
class Training:
    """One training run: a stage of the zoo with overrides, starting from another run's weights."""

    name: str
    stage: str  # experiment=sprites/<stage>
    steps: int
    init_from: str | None = None  # name of a run, here or in ZOO_STARTS; null: new weights, or the zoo's teacher
    overrides: tuple[str, ...] = ()

    @property
    def exported(self) -> str:
        return "teacher" if self.stage.startswith("teacher") else "student"


@dataclass(frozen=True)
class Judged:
    """One observation: a model under a benchmark."""

    name: str
    training: str  # name of the run whose weights are judged
    overrides: tuple[str, ...] = ()
    bench: str = "eval"  # experiment=sprites/<bench>


FLOORED = ("model.dit.track_offsets=false",)  # as the paper has it
RGB = ("model.dit.track_encoding=rgb", *FLOORED)
ABSOLUTE = ("model.rollout.positions=absolute",)
CHUNK_1 = ("model.rollout.chunk_frames=1",)
MERGED = ("model.rollout.merged_cache=true",)
TRAININGS = [
    Training("base_teacher", "teacher_short", 400, overrides=FLOORED),
    Training("offsets", "teacher_short", 400),
    Training("rgb_tracks", "teacher_short", 400, overrides=RGB),
    Training("mid_mask", "teacher_stage2", 100, "zoo_stage1"),
    Training("no_mid_mask", "teacher_stage2", 100, "zoo_stage1", ("stage.mid_mask_probability=0.0",)),
    Training("base_student", "self_forcing", 40, "zoo_causal_init"),
    Training("no_ode", "self_forcing", 40),
    Training("absolute", "self_forcing", 40, "zoo_causal_init", ABSOLUTE),
    Training("merged_cache", "self_forcing", 40, "zoo_causal_init", MERGED),
    Training("random_context", "self_forcing", 40, "zoo_causal_init",
             ("stage.sink_chunks=[0,1]", "stage.window_chunks=[1,2]")),
    Training("causal_teacher", "causal_teacher", 100, "zoo_teacher"),
    Training("causal_teacher_student", "self_forcing", 40, "causal_teacher"),
    Training("chunk_1_init", "causal_init", 100, "zoo_causal_init", CHUNK_1),
    Training("chunk_1", "self_forcing", 40, "chunk_1_init", CHUNK_1),
    Training("chunk_1_all_the_past", "self_forcing", 40, "chunk_1_init",
             (*CHUNK_1, "stage.sink_chunks=[0]", "stage.window_chunks=[null]")),
]  # fmt: skip
SHORT = ("model.clip.num_frames=9", "bench.num_clips=64")  # as long as these teachers' clips
RELEASED = ("bench.release_frame=17",)
LONG = ("bench.num_frames=129", "bench.num_clips=12", "bench.requery_frames=32")
TIMED = ("bench.num_chunks=60",)
WINDOW_2 = "model.rollout.window_chunks=2"
JUDGED = [
    Judged("base_teacher", "base_teacher", (*SHORT, *FLOORED)),
    Judged("offsets", "offsets", SHORT),
    Judged("rgb_tracks", "rgb_tracks", (*SHORT, *RGB)),
    Judged("mid_mask", "mid_mask", RELEASED),
    Judged("no_mid_mask", "no_mid_mask", RELEASED),
    Judged("base_student", "base_student"),
    Judged("base_window_2", "base_student", (*LONG, WINDOW_2), "long_video"),  # three chunks are within any window
    Judged("base_long", "base_student", LONG, "long_video"),
    Judged("base_latency", "base_student", TIMED, "latency"),
    Judged("no_ode", "no_ode"),
    Judged("causal_teacher", "causal_teacher_student"),
    Judged("absolute_long", "absolute", (*LONG, *ABSOLUTE), "long_video"),
    Judged("merged_cache", "merged_cache", MERGED),
    Judged("random_context", "random_context"),
    Judged("random_context_window_2", "random_context", (*LONG, WINDOW_2), "long_video"),
    Judged("chunk_1", "chunk_1", CHUNK_1),
    Judged("chunk_1_long", "chunk_1", (*LONG, *CHUNK_1), "long_video"),  # three chunks of three never roll
    Judged("chunk_1_all_the_past_long", "chunk_1_all_the_past", (*LONG, *CHUNK_1), "long_video"),
    Judged("chunk_1_latency", "chunk_1", (*CHUNK_1, *TIMED), "latency"),
]
JUDGED_CLIPS = ("bench.num_clips=32", "bench.num_floor_clips=1", "bench.num_inference_steps=12",
                "bench.withhold_tracks=false", "bench.features=null")  # fmt: skip


def chain(out: Path, zoo: Path, seed: int) -> list[Step]:
    """Everything of one seed; ``zoo``: folder of the zoo's runs, with its clips and latents in zoo/data."""
    folder = out / f"seed_{seed}"
    by_name = {training.name: training for training in TRAININGS}
    vae, teacher = f"model.vae.path={zoo / PARTS['vae']}", f"model.teacher={zoo / PARTS['teacher']}"

    def exported(name: str) -> Path:
        return zoo / ZOO_STARTS[name] if name in ZOO_STARTS else folder / name / "export" / by_name[name].exported

    def train(training: Training) -> Step:
        where = [f"shards={zoo / 'data/shards'}", f"output_dir={folder / training.name}", f"seed={seed}", vae]
        if training.exported == "student" and training.stage != "causal_teacher":
            where.append(teacher)
        if training.init_from is not None:
            where.append(f"stage.init_from={exported(training.init_from)}")
        if training.stage == "causal_init":
            where.append(f"stage.pairs={zoo / 'ode_pairs/pairs'}")
        settings = (f"steps={training.steps}", *training.overrides)
        return Step(training.name, ("train", f"experiment=sprites/{training.stage}", *where, *settings), PROCESSES)

    def judge(judged: Judged) -> Step:
        role = by_name[judged.training].exported
        weights = (vae, f"model.{role}={exported(judged.training)}", f"seed={seed}")
        where = f"out={folder / 'judged' / judged.name}"
        clips = (f"bench.roles=[{role}]", *JUDGED_CLIPS) if judged.bench == "eval" else ()
        arguments = ("eval", f"experiment=sprites/{judged.bench}", where, *weights, *clips, *judged.overrides)
        return Step(f"judge {judged.name}", arguments)

    return [*(train(training) for training in TRAININGS), *(judge(judged) for judged in JUDGED)]


def collect(out: Path, seeds: Sequence[int]) -> dict[str, dict]:
    """Observation -> the commands that made it and, per seed, one value per clip of each metric."""
    found: dict[str, dict] = {}
    for judged in JUDGED:
        folders = [out / f"seed_{seed}" / "judged" / judged.name for seed in seeds]
        per_clip = [json.loads((folder / "per_clip.json").read_text()) for folder in folders]
        meta = json.loads((folders[0] / "meta.json").read_text())
        training = next(training for training in TRAININGS if training.name == judged.training)
        found[judged.name] = {
            "training": {
                "stage": training.stage, "steps": training.steps, "init_from": training.init_from,
                "overrides": list(training.overrides),
            },
            "evaluation": {"bench": judged.bench, "overrides": list(judged.overrides)},
            "seeds": list(seeds),
            "git_commit": meta["git_commit"],
            "per_clip": [
                {
                    key: [None if value is None else round(value, 5) for value in values]
                    for key, values in one.items()
                    if key.split(".")[0] in ("teacher", "student") and key.split(".")[-1] in KEPT_METRICS
                }
                for one in per_clip
            ],
        }  # fmt: skip
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], prog="python -m train.ablations")
    parser.add_argument("--out", type=Path, default=ROOT / "outputs" / "ablations", help="folder of the runs")
    parser.add_argument("--zoo", type=Path, default=ROOT / "outputs" / "zoo", help="folder of the runs of `make zoo`")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1], help="one set of models each")
    parser.add_argument("--result", type=Path, default=ZOO / "ablations.json", help="file that the claims read")
    arguments = parser.parse_args()
    out, zoo = arguments.out.resolve(), arguments.zoo.resolve()
    if not (zoo / PARTS["student"]).is_dir():
        parser.error(f"--zoo={zoo} has no {PARTS['student']}; run `make zoo` first, or name the folder of its runs")
    for seed in arguments.seeds:
        print(f"seed {seed}")
        run_all(chain(out, zoo, seed), out / f"seed_{seed}")
    arguments.result.parent.mkdir(parents=True, exist_ok=True)
    write_json(arguments.result, collect(out, arguments.seeds))
    print(arguments.result)


if __name__ == "__main__":
    main()
